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

// V elements moved by one 16-byte access.
template <class T, int V>
struct alignas(sizeof(T) * V) Pack {
  T lane[V];
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

// out[group * width + j] = the sum over i < count of partial[(group * count + i) * width + j]; one warp a sum, fixed order.
static __global__ void combine_kernel(const float* partial, int64_t count, int64_t width, int64_t sums, float* out) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (index >= sums) return;
  const float* first = partial + (index / width) * count * width + index % width;
  double sum = 0.0;
  for (int64_t i = threadIdx.x % kWarp; i < count; i += kWarp) sum += static_cast<double>(first[i * width]);
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) out[index] = static_cast<float>(sum);
}

inline void combine_cuda(const float* partial, int64_t groups, int64_t count, int64_t width, float* out,
                         cudaStream_t stream) {
  const int64_t sums = groups * width;
  const unsigned blocks = static_cast<unsigned>((sums + kWarps - 1) / kWarps);
  combine_kernel<<<blocks, kThreads, 0, stream>>>(partial, count, width, sums, out);
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
