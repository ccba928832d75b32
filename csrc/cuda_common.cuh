// SPDX-License-Identifier: Apache-2.0
// Launch and reduction pieces of the CUDA kernels. No allocation, no synchronisation: every launch can be captured.
#pragma once

#include <cuda_runtime.h>

#include "elementwise.h"

namespace fe {
namespace FE_ISA {

constexpr int kWarp = 32;
constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;

// V elements moved by one access; 16-bit types go through words, because the compiler splits 16-byte copies of them.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T lane[V];
};

template <class T, int V>
struct Fragment {
  static constexpr int kWords = static_cast<int>(sizeof(T)) * V / 4;
  Pack<uint32_t, kWords> words;

  __device__ __forceinline__ void read(const void* data, int64_t index) {
    words = static_cast<const Pack<uint32_t, kWords>*>(data)[index];
  }

  __device__ __forceinline__ void write(void* data, int64_t index) const {
    static_cast<Pack<uint32_t, kWords>*>(data)[index] = words;
  }

  __device__ __forceinline__ void unpack(float (&out)[V]) const {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int v = 0; v < V; ++v) out[v] = bits_to_float(words.lane[v]);
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) {
        out[2 * w] = load(T{static_cast<uint16_t>(words.lane[w])});
        out[2 * w + 1] = load(T{static_cast<uint16_t>(words.lane[w] >> 16)});
      }
    }
  }

  // Rounds as `store` does, two at a time in hardware; a NaN loses its payload.
  __device__ __forceinline__ void pack(const float (&values)[V]) {
    if constexpr (sizeof(T) == 4) {
#pragma unroll
      for (int v = 0; v < V; ++v) words.lane[v] = float_to_bits(values[v]);
    } else {
#pragma unroll
      for (int w = 0; w < kWords; ++w) words.lane[w] = pair(T{}, values[2 * w], values[2 * w + 1]);
    }
  }

 private:
  static __device__ __forceinline__ uint32_t pair(BFloat16, float low, float high) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return __bfloat16_as_ushort(both.x) | static_cast<uint32_t>(__bfloat16_as_ushort(both.y)) << 16;
  }

  static __device__ __forceinline__ uint32_t pair(Float16, float low, float high) {
    const __half2 both = __floats2half2_rn(low, high);
    return __half_as_ushort(both.x) | static_cast<uint32_t>(__half_as_ushort(both.y)) << 16;
  }
};

template <class T>
struct Fragment<T, 1> {
  T value;

  __device__ __forceinline__ void read(const void* data, int64_t index) { value = static_cast<const T*>(data)[index]; }
  __device__ __forceinline__ void write(void* data, int64_t index) const { static_cast<T*>(data)[index] = value; }
  __device__ __forceinline__ void unpack(float (&out)[1]) const { out[0] = load(value); }
  __device__ __forceinline__ void pack(const float (&values)[1]) { store(values[0], &value); }
};

// V float32 that the kernel does not write; V is 1 or a multiple of 4, then `from` is aligned to 16 bytes.
template <int V>
__device__ __forceinline__ void read_floats(const float* from, float (&out)[V]) {
  if constexpr (V == 1) {
    out[0] = __ldg(from);
  } else {
#pragma unroll
    for (int v = 0; v < V; v += 4) {
      const float4 four = __ldg(reinterpret_cast<const float4*>(from + v));
      out[v] = four.x, out[v + 1] = four.y, out[v + 2] = four.z, out[v + 3] = four.w;
    }
  }
}

// `finish` of a pack; the switch stands outside the loop over it.
template <class Params, int V>
__device__ __forceinline__ void finish_all(const Params& p, float (&z)[V]) {
#define FE_CASE(ACT)                                                                                  \
  case ACT:                                                                                           \
    _Pragma("unroll") for (int v = 0; v < V; ++v) z[v] = finish<ACT>(z[v], p.slope, p.gain, p.clamp); \
    break;
  switch (p.act) {
    FE_CASE(kLinear)
    FE_CASE(kRelu)
    FE_CASE(kLeakyRelu)
    FE_CASE(kTanh)
    FE_CASE(kSigmoid)
    FE_CASE(kSilu)
  }
#undef FE_CASE
}

inline bool aligned(const void* data, int64_t bytes) { return reinterpret_cast<uintptr_t>(data) % bytes == 0; }

// Division by a number known at launch: one multiplication for numbers below 2^31 (Granlund, Montgomery 1994, fig. 4.1).
template <class Index>
struct Divisor {
  explicit Divisor(int64_t divisor) : value(static_cast<Index>(divisor)) {}
  __device__ __forceinline__ Index quotient(Index number) const { return number / value; }
  Index value;
};

template <>
struct Divisor<uint32_t> {
  explicit Divisor(int64_t divisor) : value(static_cast<uint32_t>(divisor)), shift(0) {
    while ((uint64_t{1} << shift) < value) ++shift;
    multiplier = static_cast<uint32_t>((((uint64_t{1} << shift) - value) << 32) / value + 1);
  }
  __device__ __forceinline__ uint32_t quotient(uint32_t number) const {
    return (__umulhi(number, multiplier) + number) >> shift;
  }
  uint32_t value, multiplier, shift;
};

__device__ __forceinline__ float load_mask(const MaskOperand& mask, int64_t index) {
  switch (mask.dtype) {
    case kFloat16:
      return load(static_cast<const Float16*>(mask.data)[index]);
    case kBFloat16:
      return load(static_cast<const BFloat16*>(mask.data)[index]);
    case kUInt8:
      return load(static_cast<const uint8_t*>(mask.data)[index]);
    default:
      return load(static_cast<const float*>(mask.data)[index]);
  }
}

// Blocks of a grid-stride kernel over `items`: enough to fill the largest GPU several times over.
inline unsigned grid_stride_blocks(int64_t items) {
  const int64_t wanted = (items + kThreads - 1) / kThreads;
  return static_cast<unsigned>(wanted < 132 * 32 ? wanted : 132 * 32);
}

// Sum over a warp in a fixed tree; every lane gets the result.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// Sums over the `width` neighbouring lanes of a group (a power of two), and over the lanes of one place in all groups.
__device__ __forceinline__ float group_sum(float value, int width) {
  for (int step = width / 2; step > 0; step /= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

__device__ __forceinline__ float sum_over_groups(float value, int width) {
  for (int step = width; step < kWarp; step *= 2) value += __shfl_xor_sync(0xffffffffu, value, step);
  return value;
}

// out[group * width + j] = the sum over i < count of partial[(group * count + i) * width + j], in a fixed order and in
// double, over divisor[group * width + j] where there is one.
struct Combination {
  const float* partial;
  int64_t groups, count, width;
  float* out;  // null: nothing to do
  const float* divisor;
};

// Neighbouring sums a block of threads makes: as many as a 32-byte sector holds, so that no read is wasted.
__host__ __device__ inline int combined_columns(const Combination& c) { return c.width < 8 ? 1 : 8; }

__host__ __device__ inline int64_t combination_blocks(const Combination& c) {
  const int columns = combined_columns(c);
  return c.out ? (c.groups * c.width + columns - 1) / columns : 0;
}

template <int N>
struct Combinations {
  Combination each[N];
};

constexpr int kCombineThreads = 1024;  // the longest sums are a few thousand values

template <int N>
static __global__ void __launch_bounds__(kCombineThreads) combine_kernel(const Combinations<N> all) {
  __shared__ double sums[kCombineThreads];
  int64_t block = blockIdx.x;
  Combination c = all.each[0];
#pragma unroll
  for (int n = 1; n < N; ++n) {
    // The block belongs to the n-th one if those before it have no more blocks than this.
    const int64_t before = combination_blocks(c);
    if (block < before) break;
    block -= before;
    c = all.each[n];
  }
  const int columns = combined_columns(c), rows = kCombineThreads / columns;
  const int row = threadIdx.x / columns, column = threadIdx.x % columns;
  const int64_t index = block * columns + column;
  double sum = 0.0;
  if (index < c.groups * c.width) {
    constexpr int U = 8;  // reads in flight
    const int64_t group = c.groups == 1 ? 0 : index / c.width;
    const float* first = c.partial + group * c.count * c.width + (index - group * c.width);
    for (int64_t i = row; i < c.count; i += U * rows) {
      float values[U];
#pragma unroll
      for (int u = 0; u < U; ++u) values[u] = i + u * rows < c.count ? __ldg(first + (i + u * rows) * c.width) : 0.0f;
#pragma unroll
      for (int u = 0; u < U; ++u) sum += static_cast<double>(values[u]);
    }
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  for (int step = rows / 2; step > 0; step /= 2) {
    if (row < step) sums[threadIdx.x] += sums[threadIdx.x + step * columns];
    __syncthreads();
  }
  if (row == 0 && index < c.groups * c.width) {
    const float total = static_cast<float>(sums[column]);
    c.out[index] = c.divisor ? total / c.divisor[index] : total;
  }
}

// All sums in one launch; nothing is launched where there is nothing to do.
template <int N>
void combine_cuda(const Combinations<N>& all, cudaStream_t stream) {
  int64_t blocks = 0;
  for (const Combination& c : all.each) blocks += combination_blocks(c);
  if (blocks) combine_kernel<N><<<static_cast<unsigned>(blocks), kCombineThreads, 0, stream>>>(all);
}

inline void combine_cuda(const float* partial, int64_t groups, int64_t count, int64_t width, float* out,
                         cudaStream_t stream) {
  combine_cuda<1>({{{partial, groups, count, width, out, nullptr}}}, stream);
}

inline Error launch_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

inline Error select_device(int device) {
  const cudaError_t error = cudaSetDevice(device);
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace FE_ISA
}  // namespace fe
