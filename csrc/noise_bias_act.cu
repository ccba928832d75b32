// SPDX-License-Identifier: Apache-2.0
#include "noise_bias_act.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

// Flat, grid-stride. A pack never leaves its pixel (channels_last: V divides C) or its plane (V divides P).
template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads) forward_kernel(const NoiseBiasActParams p) {
  const Index channels = static_cast<Index>(p.channels), pixels = static_cast<Index>(p.pixels);
  const Index packs = static_cast<Index>(p.batch) * channels * pixels / V;
  const float strength = p.strength ? *p.strength : 1.0f;
  const Index stride = static_cast<Index>(gridDim.x) * kThreads;
  for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += stride) {
    const Index first = i * V;
    const Index outer = first / (p.channels_last ? channels : pixels);
    const Index inner = first - outer * (p.channels_last ? channels : pixels);
    const Index sample = outer / (p.channels_last ? pixels : channels);
    const Index middle = outer - sample * (p.channels_last ? pixels : channels);
    const Pack<T, V> x = static_cast<const Pack<T, V>*>(p.x)[i];
    Pack<T, V> y;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const Index c = p.channels_last ? inner + v : middle;
      const Index q = p.channels_last ? middle : inner + v;
      float z = load(x.lane[v]);
      if (p.scale) z *= p.scale[sample * channels + c];
      if (p.noise) z += p.noise[sample * static_cast<Index>(p.noise_stride) + q] * strength;
      if (p.bias) z += p.bias[c];
      store(finish(p.act, z, p.slope, p.gain, p.clamp), &y.lane[v]);
    }
    static_cast<Pack<T, V>*>(p.y)[i] = y;
  }
}

// One block of threads per block of pixels of one sample; its sums go to its own row of the workspace.
template <class T, bool FROM_INPUT>
struct BackwardElement {
  const NoiseBiasActParams& p;
  float strength, clamp;

  __device__ __forceinline__ float operator()(int64_t index, int64_t sample, int64_t c, int64_t q, float* saved) const {
    const float grad = load(static_cast<const T*>(p.grad)[index]);
    *saved = load(static_cast<const T*>(p.saved)[index]);
    const float scale = p.scale ? p.scale[sample * p.channels + c] : 1.0f;
    float gz;
    if (FROM_INPUT) {
      float z = *saved * scale;
      if (p.noise) z += p.noise[sample * p.noise_stride + q] * strength;
      if (p.bias) z += p.bias[c];
      gz = grad * slope_from_input(p.act, z, p.slope, p.gain, clamp);
    } else {
      gz = grad * slope_from_output(p.act, *saved, p.slope, p.gain, clamp);
    }
    store(gz * scale, static_cast<T*>(p.grad_x) + index);
    return gz;
  }
};

template <class T, bool FROM_INPUT>
__global__ void __launch_bounds__(kThreads)
    backward_kernel(const NoiseBiasActParams p, const BlockPlan plan, const NoiseBiasActOffsets offsets) {
  __shared__ float rows[kWarps][256];             // per warp: sum over channels of each pixel
  __shared__ float sums[2][kWarps][kWarp];        // channels_last: bias and scale sums of 32 channels
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t sample = blockIdx.x / plan.blocks_per_sample;
  const int64_t first = (blockIdx.x % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t left = p.pixels - first;
  const int count = static_cast<int>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
  float clamp = p.clamp;
  if (!FROM_INPUT && clamp >= 0.0f) {
    T rounded;
    store(clamp, &rounded);
    clamp = load(rounded);
  }
  const BackwardElement<T, FROM_INPUT> element{p, p.strength ? *p.strength : 1.0f, clamp};
  float* bias_row = p.grad_bias ? p.workspace + offsets.bias + blockIdx.x * p.channels : nullptr;
  float* scale_row = p.grad_scale ? p.workspace + offsets.scale + blockIdx.x * p.channels : nullptr;
  const bool wants_rows = p.grad_noise || p.grad_strength;
  for (int q = lane; q < count; q += kWarp) rows[warp][q] = 0.0f;
  __syncwarp();

  if (p.channels_last) {
    // A warp owns every eighth pixel; its lanes are 32 neighbouring channels.
    for (int64_t tile = 0; tile < p.channels; tile += kWarp) {
      const int64_t c = tile + lane;
      float bias_sum = 0.0f, scale_sum = 0.0f;
      for (int q = warp; q < count; q += kWarps) {
        float gz = 0.0f, saved = 0.0f;
        if (c < p.channels)
          gz = element((sample * p.pixels + first + q) * p.channels + c, sample, c, first + q, &saved);
        bias_sum += gz;
        scale_sum += gz * saved;
        if (wants_rows) {
          const float row = warp_sum(gz);
          if (lane == 0) rows[warp][q] += row;
        }
      }
      sums[0][warp][lane] = bias_sum;
      sums[1][warp][lane] = scale_sum;
      __syncthreads();
      if (warp < 2 && c < p.channels) {
        float total = 0.0f;
        for (int w = 0; w < kWarps; ++w) total += sums[warp][w][lane];
        if (warp == 0 && bias_row) bias_row[c] = total;
        if (warp == 1 && scale_row) scale_row[c] = total;
      }
      __syncthreads();
    }
  } else {
    // A warp owns every eighth channel; its lanes are neighbouring pixels.
    for (int64_t c = warp; c < p.channels; c += kWarps) {
      float bias_sum = 0.0f, scale_sum = 0.0f;
      for (int q = lane; q < count; q += kWarp) {
        float saved;
        const float gz = element((sample * p.channels + c) * p.pixels + first + q, sample, c, first + q, &saved);
        bias_sum += gz;
        scale_sum += gz * saved;
        if (wants_rows) rows[warp][q] += gz;
      }
      bias_sum = warp_sum(bias_sum);
      scale_sum = warp_sum(scale_sum);
      if (lane == 0 && bias_row) bias_row[c] = bias_sum;
      if (lane == 0 && scale_row) scale_row[c] = scale_sum;
    }
  }
  if (!wants_rows) return;

  __syncthreads();
  float strength_sum = 0.0f;
  for (int q = threadIdx.x; q < count; q += kThreads) {
    float row = 0.0f;
    for (int w = 0; w < kWarps; ++w) row += rows[w][q];
    if (p.grad_noise) p.grad_noise[sample * p.pixels + first + q] = row * element.strength;
    if (p.grad_strength) strength_sum += row * p.noise[sample * p.noise_stride + first + q];
  }
  if (!p.grad_strength) return;
  strength_sum = warp_sum(strength_sum);
  if (lane == 0) sums[0][0][warp] = strength_sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += sums[0][0][w];
    p.workspace[offsets.strength + blockIdx.x] = total;
  }
}

template <class T, int V>
void launch_forward(const NoiseBiasActParams& p, cudaStream_t stream) {
  const int64_t packs = p.batch * p.channels * p.pixels / V;
  const unsigned blocks = grid_stride_blocks(packs);
  // 32-bit index arithmetic costs a quarter of 64-bit division; the loop counter must not overflow past the end either.
  if (packs * V + static_cast<int64_t>(blocks) * kThreads * V < (int64_t{1} << 31))
    forward_kernel<T, V, int32_t><<<blocks, kThreads, 0, stream>>>(p);
  else
    forward_kernel<T, V, int64_t><<<blocks, kThreads, 0, stream>>>(p);
}

template <class T>
void forward(const NoiseBiasActParams& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const int64_t inner = p.channels_last ? p.channels : p.pixels;
  const bool aligned = (reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y)) % 16 == 0;
  if (aligned && inner % V == 0)
    launch_forward<T, V>(p, stream);
  else
    launch_forward<T, 1>(p, stream);
}

template <class T>
void backward(const NoiseBiasActParams& p, cudaStream_t stream) {
  const BlockPlan plan = plan_cuda_blocks(p.pixels, p.channels);
  const NoiseBiasActOffsets offsets = noise_bias_act_offsets(p, plan);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
  const unsigned grid = static_cast<unsigned>(blocks);
  if (p.saved_is_input)
    backward_kernel<T, true><<<grid, kThreads, 0, stream>>>(p, plan, offsets);
  else
    backward_kernel<T, false><<<grid, kThreads, 0, stream>>>(p, plan, offsets);
  if (p.grad_bias) combine_cuda(p.workspace + offsets.bias, 1, blocks, p.channels, p.grad_bias, stream);
  if (p.grad_scale)
    combine_cuda(p.workspace + offsets.scale, p.batch, plan.blocks_per_sample, p.channels, p.grad_scale, stream);
  if (p.grad_strength) combine_cuda(p.workspace + offsets.strength, 1, blocks, 1, p.grad_strength, stream);
}

template <class T>
void run(const NoiseBiasActParams& p, cudaStream_t stream, bool is_backward) {
  is_backward ? backward<T>(p, stream) : forward<T>(p, stream);
}

Error run_dtype(const NoiseBiasActParams& p, int device, void* stream, bool is_backward) {
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

Error noise_bias_act_fwd_cuda(const NoiseBiasActParams& p, int device, void* stream) {
  return FE_ISA::run_dtype(p, device, stream, false);
}

Error noise_bias_act_bwd_cuda(const NoiseBiasActParams& p, int device, void* stream) {
  return FE_ISA::run_dtype(p, device, stream, true);
}

}  // namespace fe
