// SPDX-License-Identifier: Apache-2.0
#include "modulated_conv2d.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

constexpr int kPixels = 256;  // plan_cuda_blocks never makes a larger block

// One element of the epilogue: its output, stored, or x itself where only ToRGB's sums are wanted.
template <class T, bool WRITE>
struct ForwardElement {
  const ModulatedEpilogueParams& p;
  float strength;

  __device__ __forceinline__ float operator()(int64_t index, int64_t sample, int64_t c, int64_t q) const {
    const float x = load(static_cast<const T*>(p.x)[index]);
    if (!WRITE) return x;
    float z = x * p.scale[sample * p.channels + c];
    if (p.noise) z += p.noise[sample * p.noise_stride + q] * strength;
    const float y = finish(p.act, z + p.bias[c], p.slope, p.gain, p.clamp);
    store(y, static_cast<T*>(p.y) + index);
    return y;
  }
};

// channels_last: a warp a pixel, its lanes neighbouring channels. Planar: a thread a pixel.
template <class T, bool WRITE>
__global__ void __launch_bounds__(kThreads) forward_kernel(const ModulatedEpilogueParams p) {
  const ForwardElement<T, WRITE> element{p, p.strength ? *p.strength : 1.0f};
  const int lane = p.channels_last ? threadIdx.x % kWarp : 0, width = p.channels_last ? kWarp : 1;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads / width;
  const int64_t total = p.batch * p.pixels;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / width; i < total; i += stride) {
    const int64_t sample = i / p.pixels, q = i - sample * p.pixels;
    const float* factors = p.rgb_factors + sample * 3 * p.channels;
    float red = 0.0f, green = 0.0f, blue = 0.0f;
    for (int64_t c = lane; c < p.channels; c += width) {
      const int64_t index = p.channels_last ? i * p.channels + c : (sample * p.channels + c) * p.pixels + q;
      const float value = element(index, sample, c, q);
      red += value * factors[c];
      green += value * factors[p.channels + c];
      blue += value * factors[2 * p.channels + c];
    }
    if (p.channels_last) red = warp_sum(red), green = warp_sum(green), blue = warp_sum(blue);
    float* rgb = p.rgb + sample * 3 * p.pixels + q;
    if (lane == 0) rgb[0] = red, rgb[p.pixels] = green, rgb[2 * p.pixels] = blue;
  }
}

// What one element adds to the sums over pixels: bias, scale, and the three rows of rgb_factors.
struct Terms {
  float value[5];
};

// Made on the host and passed by value: constant memory instead of registers.
struct InverseOfOutput {
  float clamp, above, below;
};

template <class T, bool RGB>
struct BackwardElement {
  const ModulatedEpilogueParams& p;
  const InverseOfOutput& inverse;
  float strength;

  __device__ __forceinline__ Terms operator()(int64_t index, int64_t sample, int64_t c, int64_t q) const {
    const float y = load(static_cast<const T*>(p.saved)[index]);
    float grad = p.grad ? load(static_cast<const T*>(p.grad)[index]) : 0.0f;
    Terms terms{};
    if (RGB) {
#pragma unroll
      for (int k = 0; k < 3; ++k) {
        const float g = p.grad_rgb[(sample * 3 + k) * p.pixels + q];
        grad += g * p.rgb_factors[(sample * 3 + k) * p.channels + c];
        terms.value[2 + k] = g * y;
      }
    }
    const float gz = grad * slope_from_output(p.act, y, p.slope, p.gain, inverse.clamp);
    float core = p.act == kLeakyRelu ? input_from_output<kLeakyRelu>(y, inverse.above, inverse.below)
                                     : input_from_output<kLinear>(y, inverse.above, inverse.below);
    if (p.noise) core -= p.noise[sample * p.noise_stride + q] * strength;
    if (p.bias) core -= p.bias[c];
    terms.value[0] = gz;
    terms.value[1] = gz * core;
    store(p.scale ? gz * p.scale[sample * p.channels + c] : gz, static_cast<T*>(p.grad_x) + index);
    return terms;
  }
};

// One block of threads per block of pixels of one sample; its sums go to its own rows of the workspace.
template <class T, bool RGB, bool LAST>
__global__ void __launch_bounds__(kThreads, 4)
    backward_kernel(const ModulatedEpilogueParams p, const BlockPlan plan, const ModulatedOffsets offsets,
                    const InverseOfOutput inverse) {
  constexpr int kKinds = RGB ? 5 : 2;
  __shared__ float rows[kWarps][kPixels];        // per warp: sum over channels of each pixel
  __shared__ float sums[kKinds][kWarps][kWarp];  // channels_last: sums of 32 channels
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t sample = blockIdx.x / plan.blocks_per_sample;
  const int64_t first = (blockIdx.x % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t left = p.pixels - first;
  const int count = static_cast<int>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
  const BackwardElement<T, RGB> element{p, inverse, p.strength ? *p.strength : 1.0f};
  const int64_t area = static_cast<int64_t>(gridDim.x) * p.channels;
  const bool wants_rows = p.grad_noise || p.grad_strength;
  // Where the row of sums of one kind begins; null when nobody wants it.
  auto row_of = [&](int kind) -> float* {
    float* row = p.workspace + blockIdx.x * p.channels;
    if (kind == 0) return p.grad_bias ? row + offsets.bias : nullptr;
    if (kind == 1) return p.grad_scale ? row + offsets.scale : nullptr;
    return p.grad_factors ? row + offsets.factors + (kind - 2) * area : nullptr;
  };
  for (int q = lane; q < count; q += kWarp) rows[warp][q] = 0.0f;
  __syncwarp();

  if constexpr (LAST) {
    // A warp owns every eighth pixel; its lanes are 32 neighbouring channels.
    for (int64_t tile = 0; tile < p.channels; tile += kWarp) {
      const int64_t c = tile + lane;
      Terms sum{};
      for (int q = warp; q < count; q += kWarps) {
        Terms terms{};
        if (c < p.channels)
          terms = element((sample * p.pixels + first + q) * p.channels + c, sample, c, first + q);
#pragma unroll
        for (int k = 0; k < kKinds; ++k) sum.value[k] += terms.value[k];
        if (wants_rows) {
          const float row = warp_sum(terms.value[0]);
          if (lane == 0) rows[warp][q] += row;
        }
      }
#pragma unroll
      for (int k = 0; k < kKinds; ++k) sums[k][warp][lane] = sum.value[k];
      __syncthreads();
      if (warp < kKinds && c < p.channels) {
        float total = 0.0f;
        for (int w = 0; w < kWarps; ++w) total += sums[warp][w][lane];
        if (float* row = row_of(warp)) row[c] = total;
      }
      __syncthreads();
    }
  } else {
    // A warp owns every eighth channel; its lanes are neighbouring pixels.
    for (int64_t c = warp; c < p.channels; c += kWarps) {
      Terms sum{};
      for (int q = lane; q < count; q += kWarp) {
        const Terms terms = element((sample * p.channels + c) * p.pixels + first + q, sample, c, first + q);
#pragma unroll
        for (int k = 0; k < kKinds; ++k) sum.value[k] += terms.value[k];
        if (wants_rows) rows[warp][q] += terms.value[0];
      }
#pragma unroll
      for (int k = 0; k < kKinds; ++k) {
        const float total = warp_sum(sum.value[k]);
        float* row = row_of(k);
        if (lane == 0 && row) row[c] = total;
      }
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

// The sums were of dL/dz * (scale * x); what multiplies scale is x.
__global__ void __launch_bounds__(kThreads) divide_kernel(float* sums, const float* scale, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) sums[i] /= scale[i];
}

template <class T>
struct StyleElement {
  const ModulatedStyleParams& p;

  __device__ __forceinline__ float operator()(int64_t index, float style) const {
    const float grad = load(static_cast<const T*>(p.grad)[index]);
    const float term = p.grad_style ? grad * load(static_cast<const T*>(p.x)[index]) : 0.0f;
    store(grad * style, static_cast<T*>(p.grad_x) + index);
    return term;
  }
};

template <class T>
__global__ void __launch_bounds__(kThreads) style_kernel(const ModulatedStyleParams p, const BlockPlan plan) {
  __shared__ float sums[kWarps][kWarp];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t sample = blockIdx.x / plan.blocks_per_sample;
  const int64_t first = (blockIdx.x % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t left = p.pixels - first;
  const int count = static_cast<int>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
  const StyleElement<T> element{p};
  float* row = p.grad_style ? p.workspace + blockIdx.x * p.channels : nullptr;
  if (p.channels_last) {
    for (int64_t tile = 0; tile < p.channels; tile += kWarp) {
      const int64_t c = tile + lane;
      float sum = 0.0f;
      if (c < p.channels) {
        const float style = p.style[sample * p.channels + c];
        for (int q = warp; q < count; q += kWarps)
          sum += element((sample * p.pixels + first + q) * p.channels + c, style);
      }
      sums[warp][lane] = sum;
      __syncthreads();
      if (warp == 0 && row && c < p.channels) {
        float total = 0.0f;
        for (int w = 0; w < kWarps; ++w) total += sums[w][lane];
        row[c] = total;
      }
      __syncthreads();
    }
  } else {
    for (int64_t c = warp; c < p.channels; c += kWarps) {
      const float style = p.style[sample * p.channels + c];
      float sum = 0.0f;
      for (int q = lane; q < count; q += kWarp)
        sum += element((sample * p.channels + c) * p.pixels + first + q, style);
      sum = warp_sum(sum);
      if (lane == 0 && row) row[c] = sum;
    }
  }
}

template <class T>
void forward(const ModulatedEpilogueParams& p, cudaStream_t stream) {
  const int64_t threads = p.batch * p.pixels * (p.channels_last ? kWarp : 1);
  const int64_t wanted = (threads + kThreads - 1) / kThreads;
  const unsigned blocks = static_cast<unsigned>(wanted < 132 * 32 ? wanted : 132 * 32);
  if (p.y)
    forward_kernel<T, true><<<blocks, kThreads, 0, stream>>>(p);
  else
    forward_kernel<T, false><<<blocks, kThreads, 0, stream>>>(p);
}

template <class T>
void backward(const ModulatedEpilogueParams& p, cudaStream_t stream) {
  const BlockPlan plan = plan_cuda_blocks(p.pixels, p.channels);
  const ModulatedOffsets offsets = modulated_offsets(p, plan);
  const int64_t each = plan.blocks_per_sample, blocks = p.batch * each;
  const unsigned grid = static_cast<unsigned>(blocks);
  T rounded;
  store(p.clamp, &rounded);
  const InverseOfOutput inverse{p.clamp < 0.0f ? p.clamp : load(rounded), 1.0f / p.gain, 1.0f / (p.gain * p.slope)};
  auto kernel = p.grad_rgb ? (p.channels_last ? backward_kernel<T, true, true> : backward_kernel<T, true, false>)
                           : (p.channels_last ? backward_kernel<T, false, true> : backward_kernel<T, false, false>);
  kernel<<<grid, kThreads, 0, stream>>>(p, plan, offsets, inverse);
  if (p.grad_bias) combine_cuda(p.workspace + offsets.bias, 1, blocks, p.channels, p.grad_bias, stream);
  if (p.grad_strength) combine_cuda(p.workspace + offsets.strength, 1, blocks, 1, p.grad_strength, stream);
  if (p.grad_scale) {
    combine_cuda(p.workspace + offsets.scale, p.batch, each, p.channels, p.grad_scale, stream);
    const int64_t count = p.batch * p.channels;
    const unsigned divisions = static_cast<unsigned>((count + kThreads - 1) / kThreads);
    if (p.scale) divide_kernel<<<divisions, kThreads, 0, stream>>>(p.grad_scale, p.scale, count);
  }
  for (int64_t n = 0; n < p.batch && p.grad_factors; ++n)
    for (int k = 0; k < 3; ++k)
      combine_cuda(p.workspace + offsets.factors + (k * blocks + n * each) * p.channels, 1, each, p.channels,
                   p.grad_factors + (n * 3 + k) * p.channels, stream);
}

template <class T>
void style(const ModulatedStyleParams& p, cudaStream_t stream) {
  const BlockPlan plan = plan_cuda_blocks(p.pixels, p.channels);
  style_kernel<T><<<static_cast<unsigned>(p.batch * plan.blocks_per_sample), kThreads, 0, stream>>>(p, plan);
  if (p.grad_style) combine_cuda(p.workspace, p.batch, plan.blocks_per_sample, p.channels, p.grad_style, stream);
}

}  // namespace
}  // namespace FE_ISA

#define FE_RUN(FUNCTION, P)                                      \
  if (Error error = FE_ISA::select_device(device)) return error; \
  const cudaStream_t s = static_cast<cudaStream_t>(stream);      \
  if ((P).dtype == kFloat16)                                     \
    FE_ISA::FUNCTION<FE_ISA::Float16>(P, s);                     \
  else if ((P).dtype == kBFloat16)                               \
    FE_ISA::FUNCTION<FE_ISA::BFloat16>(P, s);                    \
  else                                                           \
    FE_ISA::FUNCTION<float>(P, s);                               \
  return FE_ISA::launch_error();

Error modulated_epilogue_fwd_cuda(const ModulatedEpilogueParams& p, int device, void* stream) { FE_RUN(forward, p) }
Error modulated_epilogue_bwd_cuda(const ModulatedEpilogueParams& p, int device, void* stream) { FE_RUN(backward, p) }
Error modulated_style_bwd_cuda(const ModulatedStyleParams& p, int device, void* stream) { FE_RUN(style, p) }

#undef FE_RUN

}  // namespace fe
