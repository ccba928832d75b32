// SPDX-License-Identifier: Apache-2.0
#include "masked_mse.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

__device__ __forceinline__ float read_mask(const MaskedMseParams& p, const MaskOperand& mask, bool halved,
                                           int64_t sample, int64_t q) {
  const int64_t first = sample * mask.stride;
  if (!halved) return load_mask(mask, first + q);
  const int64_t columns = p.width / 2;
  const HalfTap y = half_tap(q / p.width, p.pixels / p.width / 2), x = half_tap(q % p.width, columns);
  const int64_t low = first + y.low * columns, high = first + y.high * columns;
  return mix(mix(load_mask(mask, low + x.low), load_mask(mask, high + x.low), y.weight),
             mix(load_mask(mask, low + x.high), load_mask(mask, high + x.high), y.weight), x.weight);
}

__device__ __forceinline__ float effective_mask(const MaskedMseParams& p, int64_t sample, int64_t q) {
  float mask = p.mask.data ? read_mask(p, p.mask, p.mask_halved, sample, q) : 1.0f;
  if (p.exclude.data) mask = exclude_from(mask, read_mask(p, p.exclude, p.exclude_halved, sample, q), p.relax);
  if (p.include.data) mask = include_in(mask, read_mask(p, p.include, p.include_halved, sample, q), p.relax);
  return mask;
}

__device__ __forceinline__ int64_t element_index(const MaskedMseParams& p, int64_t sample, int64_t c, int64_t q) {
  return p.channels_last ? (sample * p.pixels + q) * p.channels + c : (sample * p.channels + c) * p.pixels + q;
}

// A thread owns whole pixels, so the mask is read once however many channels there are.
template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const MaskedMseParams p, const BlockPlan plan) {
  __shared__ double partial[2][kWarps];
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  const int64_t sample = blockIdx.x / plan.blocks_per_sample;
  const int64_t first = (blockIdx.x % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t end = first + plan.pixels_per_block < p.pixels ? first + plan.pixels_per_block : p.pixels;
  double squares = 0.0, weight = 0.0;
  for (int64_t q = first + threadIdx.x; q < end; q += kThreads) {
    const float mask = effective_mask(p, sample, q);
    float sum = 0.0f;
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t i = element_index(p, sample, c, q);
      const float difference = load(a[i]) - load(b[i]);
      sum += difference * difference;
    }
    squares += static_cast<double>(mask * sum);
    weight += static_cast<double>(mask);
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

__global__ void finish_kernel(const MaskedMseParams p, const BlockPlan plan) {
  const int64_t sample = blockIdx.x;
  double squares = 0.0, weight = 0.0;
  for (int64_t i = threadIdx.x; i < plan.blocks_per_sample; i += kWarp) {
    squares += p.workspace[2 * (sample * plan.blocks_per_sample + i)];
    weight += p.workspace[2 * (sample * plan.blocks_per_sample + i) + 1];
  }
  squares = warp_sum(squares);
  weight = warp_sum(weight);
  if (threadIdx.x == 0) {
    const double divisor =
        static_cast<double>(p.channels) * (p.normalize_by_mask ? weight : static_cast<double>(p.pixels));
    const double inverse = divisor == 0.0 ? 0.0 : 1.0 / divisor;
    p.inverse_weight[sample] = static_cast<float>(inverse);
    p.loss[sample] = static_cast<float>(squares * inverse);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const MaskedMseParams p, const BlockPlan plan) {
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  T* grad_a = static_cast<T*>(p.grad_a);
  T* grad_b = static_cast<T*>(p.grad_b);
  const int64_t sample = blockIdx.x / plan.blocks_per_sample;
  const int64_t first = (blockIdx.x % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t end = first + plan.pixels_per_block < p.pixels ? first + plan.pixels_per_block : p.pixels;
  const float factor = 2.0f * p.grad[sample] * p.inverse_weight[sample];
  for (int64_t q = first + threadIdx.x; q < end; q += kThreads) {
    const float mask = effective_mask(p, sample, q);
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t i = element_index(p, sample, c, q);
      const float gradient = factor * mask * (load(a[i]) - load(b[i]));
      if (grad_a) store(gradient, grad_a + i);
      if (grad_b) store(-gradient, grad_b + i);
    }
  }
}

template <class T>
void run(const MaskedMseParams& p, cudaStream_t stream, bool is_backward) {
  const BlockPlan plan = plan_cuda_blocks(p.pixels, p.channels);
  const unsigned blocks = static_cast<unsigned>(p.batch * plan.blocks_per_sample);
  if (is_backward) {
    backward_kernel<T><<<blocks, kThreads, 0, stream>>>(p, plan);
    return;
  }
  forward_kernel<T><<<blocks, kThreads, 0, stream>>>(p, plan);
  finish_kernel<<<static_cast<unsigned>(p.batch), kWarp, 0, stream>>>(p, plan);
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
