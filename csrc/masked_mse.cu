// SPDX-License-Identifier: Apache-2.0
#include "masked_mse.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

// V neighbouring pixels of a mask, which lie in one row where a mask is halved.
template <int V>
__device__ __forceinline__ void read_mask(const MaskedMseParams& p, const MaskOperand& mask, bool halved,
                                          int64_t sample, int64_t q, float (&out)[V]) {
  const int64_t first = sample * mask.stride;
  if (halved) {
    const int64_t columns = p.width / 2;
    // Four pixels are read only of images below 2^31 pixels, which 32 bits divide faster.
    const int64_t row = V > 1 ? static_cast<uint32_t>(q) / static_cast<uint32_t>(p.width) : q / p.width;
    const int64_t column = q - row * p.width;
    const int64_t height = V > 1 ? static_cast<uint32_t>(p.pixels) / static_cast<uint32_t>(p.width) : p.pixels / p.width;
    const HalfTap y = half_tap(row, height / 2);
    const int64_t low = first + y.low * columns, high = first + y.high * columns;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const HalfTap x = half_tap(column + v, columns);
      out[v] = mix(mix(load_mask(mask, low + x.low), load_mask(mask, high + x.low), y.weight),
                   mix(load_mask(mask, low + x.high), load_mask(mask, high + x.high), y.weight), x.weight);
    }
    return;
  }
  if (V > 1 && mask.dtype == kFloat32) return read_floats(static_cast<const float*>(mask.data) + first + q, out);
#pragma unroll
  for (int v = 0; v < V; ++v) out[v] = load_mask(mask, first + q + v);
}

template <int V>
__device__ __forceinline__ void effective_mask(const MaskedMseParams& p, int64_t sample, int64_t q, float (&mask)[V]) {
  float other[V];
#pragma unroll
  for (int v = 0; v < V; ++v) mask[v] = 1.0f;
  if (p.mask.data) read_mask(p, p.mask, p.mask_halved, sample, q, mask);
  if (p.exclude.data) {
    read_mask(p, p.exclude, p.exclude_halved, sample, q, other);
#pragma unroll
    for (int v = 0; v < V; ++v) mask[v] = exclude_from(mask[v], other[v], p.relax);
  }
  if (p.include.data) {
    read_mask(p, p.include, p.include_halved, sample, q, other);
#pragma unroll
    for (int v = 0; v < V; ++v) mask[v] = include_in(mask[v], other[v], p.relax);
  }
}

__device__ __forceinline__ int64_t element_index(const MaskedMseParams& p, int64_t sample, int64_t c, int64_t q) {
  return p.channels_last ? (sample * p.pixels + q) * p.channels + c : (sample * p.channels + c) * p.pixels + q;
}

// Four neighbouring pixels of an image of three channels: three packs of four elements, in either layout.
struct FourPixels {
  static __device__ __forceinline__ int64_t index(const MaskedMseParams& p, int64_t sample, int64_t q, int pack) {
    return p.channels_last ? (sample * p.pixels + q) * 3 + 4 * pack : (sample * 3 + pack) * p.pixels + q;
  }

  // The pixel of element `v` of a pack.
  static __device__ __forceinline__ int pixel(bool channels_last, int pack, int v) {
    return channels_last ? (4 * pack + v) / 3 : v;
  }
};

struct MaskedPlan {
  int64_t blocks_per_sample;
  int64_t pixels_per_block;  // a multiple of what a block of threads reads at once
};

// A block a sample's thousandth: enough for the largest GPU, few enough for one block of threads to add their sums.
inline MaskedPlan plan_cuda(const MaskedMseParams& p) {
  const int64_t blocks = masked_mse_cuda_blocks(p), unit = 4 * kThreads;
  const int64_t size = (p.pixels + blocks - 1) / blocks;
  return {blocks, (size + unit - 1) / unit * unit};
}

// A thread owns whole pixels, so the mask is read once however many channels there are.
template <class T, bool FOUR>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(const MaskedMseParams p, const MaskedPlan plan) {
  __shared__ double partial[2][kWarps];
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  const int64_t sample = blockIdx.x / plan.blocks_per_sample;
  const int64_t first = (blockIdx.x % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t end = first + plan.pixels_per_block < p.pixels ? first + plan.pixels_per_block : p.pixels;
  double squares = 0.0, weight = 0.0;
  if constexpr (FOUR) {
    for (int64_t q = first + 4 * threadIdx.x; q < end; q += 4 * kThreads) {
      float mask[4], sum[4] = {};
      effective_mask(p, sample, q, mask);
      Fragment<T, 4> a_pack[3], b_pack[3];
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const int64_t i = FourPixels::index(p, sample, q, k);
        a_pack[k].read(a + i, 0);
        b_pack[k].read(b + i, 0);
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        float x[4], y[4];
        a_pack[k].unpack(x);
        b_pack[k].unpack(y);
#pragma unroll
        for (int v = 0; v < 4; ++v) x[v] -= y[v], x[v] *= x[v];
        if (p.channels_last) {
#pragma unroll
          for (int v = 0; v < 4; ++v) sum[FourPixels::pixel(true, k, v)] += x[v];
        } else {
#pragma unroll
          for (int v = 0; v < 4; ++v) sum[v] += x[v];
        }
      }
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        squares += static_cast<double>(mask[v] * sum[v]);
        weight += static_cast<double>(mask[v]);
      }
    }
  } else {
    for (int64_t q = first + threadIdx.x; q < end; q += kThreads) {
      float mask[1];
      effective_mask(p, sample, q, mask);
      float sum = 0.0f;
      for (int64_t c = 0; c < p.channels; ++c) {
        const int64_t i = element_index(p, sample, c, q);
        const float difference = load(a[i]) - load(b[i]);
        sum += difference * difference;
      }
      squares += static_cast<double>(mask[0] * sum);
      weight += static_cast<double>(mask[0]);
    }
  }
  squares = warp_sum(squares);
  weight = warp_sum(weight);
  if (threadIdx.x % kWarp == 0) {
    partial[0][threadIdx.x / kWarp] = squares;
    partial[1][threadIdx.x / kWarp] = weight;
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    double total = 0.0;
    for (int w = 0; w < kWarps; ++w) total += partial[threadIdx.x][w];
    p.workspace[2 * static_cast<int64_t>(blockIdx.x) + threadIdx.x] = total;
  }
}

__global__ void __launch_bounds__(kThreads) finish_kernel(const MaskedMseParams p, const int64_t blocks_per_sample) {
  __shared__ double partial[2][kWarps];
  const int64_t sample = blockIdx.x;
  const double* sums = p.workspace + 2 * sample * blocks_per_sample;
  double squares = 0.0, weight = 0.0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < blocks_per_sample; i += kThreads) {
    squares += sums[2 * i];
    weight += sums[2 * i + 1];
  }
  squares = warp_sum(squares);
  weight = warp_sum(weight);
  if (threadIdx.x % kWarp == 0) {
    partial[0][threadIdx.x / kWarp] = squares;
    partial[1][threadIdx.x / kWarp] = weight;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    squares = weight = 0.0;
    for (int w = 0; w < kWarps; ++w) squares += partial[0][w], weight += partial[1][w];
    const double divisor =
        static_cast<double>(p.channels) * (p.normalize_by_mask ? weight : static_cast<double>(p.pixels));
    const double inverse = divisor == 0.0 ? 0.0 : 1.0 / divisor;
    p.inverse_weight[sample] = static_cast<float>(inverse);
    p.loss[sample] = static_cast<float>(squares * inverse);
  }
}

template <class T, bool FOUR>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(const MaskedMseParams p, const MaskedPlan plan) {
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  T* grad_a = static_cast<T*>(p.grad_a);
  T* grad_b = static_cast<T*>(p.grad_b);
  const int64_t sample = blockIdx.x / plan.blocks_per_sample;
  const int64_t first = (blockIdx.x % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t end = first + plan.pixels_per_block < p.pixels ? first + plan.pixels_per_block : p.pixels;
  const float factor = 2.0f * p.grad[sample] * p.inverse_weight[sample];
  if constexpr (FOUR) {
    for (int64_t q = first + 4 * threadIdx.x; q < end; q += 4 * kThreads) {
      float mask[4];
      effective_mask(p, sample, q, mask);
#pragma unroll
      for (int v = 0; v < 4; ++v) mask[v] *= factor;
      Fragment<T, 4> a_pack[3], b_pack[3];
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const int64_t i = FourPixels::index(p, sample, q, k);
        a_pack[k].read(a + i, 0);
        b_pack[k].read(b + i, 0);
      }
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const int64_t i = FourPixels::index(p, sample, q, k);
        float x[4], y[4];
        a_pack[k].unpack(x);
        b_pack[k].unpack(y);
#pragma unroll
        for (int v = 0; v < 4; ++v)
          x[v] = (p.channels_last ? mask[FourPixels::pixel(true, k, v)] : mask[v]) * (x[v] - y[v]);
        if (grad_a) a_pack[k].pack(x), a_pack[k].write(grad_a + i, 0);
#pragma unroll
        for (int v = 0; v < 4; ++v) x[v] = -x[v];
        if (grad_b) b_pack[k].pack(x), b_pack[k].write(grad_b + i, 0);
      }
    }
  } else {
    for (int64_t q = first + threadIdx.x; q < end; q += kThreads) {
      float mask[1];
      effective_mask(p, sample, q, mask);
      for (int64_t c = 0; c < p.channels; ++c) {
        const int64_t i = element_index(p, sample, c, q);
        const float gradient = factor * mask[0] * (load(a[i]) - load(b[i]));
        if (grad_a) store(gradient, grad_a + i);
        if (grad_b) store(-gradient, grad_b + i);
      }
    }
  }
}

// Whether four pixels of an operand can be read at once: they lie in one row of a halved mask, or one access holds them.
bool reads_four(const MaskedMseParams& p, const MaskOperand& mask, bool halved) {
  if (!mask.data) return true;
  if (halved) return p.width % 4 == 0;
  return mask.dtype != kFloat32 || aligned(mask.data, 16);
}

template <class T, bool FOUR>
void launch(const MaskedMseParams& p, cudaStream_t stream, bool is_backward) {
  const MaskedPlan plan = plan_cuda(p);
  const unsigned blocks = static_cast<unsigned>(p.batch * plan.blocks_per_sample);
  if (is_backward) {
    backward_kernel<T, FOUR><<<blocks, kThreads, 0, stream>>>(p, plan);
    return;
  }
  forward_kernel<T, FOUR><<<blocks, kThreads, 0, stream>>>(p, plan);
  finish_kernel<<<static_cast<unsigned>(p.batch), kThreads, 0, stream>>>(p, plan.blocks_per_sample);
}

template <class T>
void run(const MaskedMseParams& p, cudaStream_t stream, bool is_backward) {
  constexpr int kBytes = 4 * sizeof(T);
  const bool images = p.channels == 3 && p.pixels % 4 == 0 && p.pixels < (int64_t{1} << 31) && aligned(p.a, kBytes) &&
                      aligned(p.b, kBytes) && aligned(p.grad_a, kBytes) && aligned(p.grad_b, kBytes);
  if (images && reads_four(p, p.mask, p.mask_halved) && reads_four(p, p.exclude, p.exclude_halved) &&
      reads_four(p, p.include, p.include_halved))
    launch<T, true>(p, stream, is_backward);
  else
    launch<T, false>(p, stream, is_backward);
}

Error run_dtype(const MaskedMseParams& p, int device, void* stream, bool is_backward) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16)
    run<Float16>(p, s, is_backward);
  else if (p.dtype == kBFloat16)
    run<BFloat16>(p, s, is_backward);
  else
    run<float>(p, s, is_backward);
  return launch_error();
}

}  // namespace
}  // namespace FE_ISA

Error masked_mse_fwd_cuda(const MaskedMseParams& p, int device, void* stream) {
  return FE_ISA::run_dtype(p, device, stream, false);
}

Error masked_mse_bwd_cuda(const MaskedMseParams& p, int device, void* stream) {
  return FE_ISA::run_dtype(p, device, stream, true);
}

}  // namespace fe
