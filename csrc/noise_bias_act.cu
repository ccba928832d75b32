// SPDX-License-Identifier: Apache-2.0
#include "noise_bias_act.h"

#include <type_traits>

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

// A thread has two packs, half a grid apart. A pack never leaves its pixel (channels_last: V divides C) or its plane (V
// divides P). `inner` is the packs of a pixel or of a plane; `middle` the pixels or the channels of a sample.
template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads)
    forward_kernel(const NoiseBiasActParams p, const Divisor<Index> inner, const Divisor<Index> middle,
                   const Index packs) {
  const Index threads = static_cast<Index>(gridDim.x) * kThreads;
  const Index own = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  Fragment<T, V> pack[2];
#pragma unroll
  for (int u = 0; u < 2; ++u)
    if (own + u * threads < packs) pack[u].read(p.x, own + u * threads);
  const float strength = p.strength ? __ldg(p.strength) : 1.0f;
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const Index i = own + u * threads;
    if (i >= packs) break;
    const Index outer = inner.quotient(i);
    const Index within = (i - outer * inner.value) * V;
    const Index sample = middle.quotient(outer);
    const Index among = outer - sample * middle.value;
    float z[V], row[V];
    pack[u].unpack(z);
    if (p.channels_last) {
      if (p.scale) {
        read_floats(p.scale + static_cast<int64_t>(sample) * p.channels + within, row);
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] *= row[v];
      }
      if (p.noise) {
        const float offset = __ldg(p.noise + static_cast<int64_t>(sample) * p.noise_stride + among) * strength;
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] += offset;
      }
      if (p.bias) {
        read_floats(p.bias + within, row);
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] += row[v];
      }
    } else {
      if (p.scale) {
        const float scale = __ldg(p.scale + outer);
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] *= scale;
      }
      if (p.noise) {
        read_floats(p.noise + static_cast<int64_t>(sample) * p.noise_stride + within, row);
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] += row[v] * strength;
      }
      if (p.bias) {
        const float bias = __ldg(p.bias + among);
#pragma unroll
        for (int v = 0; v < V; ++v) z[v] += bias;
      }
    }
    finish_all(p, z);
    pack[u].pack(z);
    pack[u].write(p.y, i);
  }
}

// As an output of that type was clamped.
template <class T>
__device__ __forceinline__ float rounded_clamp(float clamp) {
  if (clamp < 0.0f) return clamp;
  T rounded;
  store(clamp, &rounded);
  return load(rounded);
}

template <bool FROM_INPUT, int V>
__device__ __forceinline__ void slopes(const NoiseBiasActParams& p, float clamp, const float (&from)[V],
                                       float (&grad)[V]) {
#define FE_CASE(ACT, SLOPE)                                                                                  \
  case ACT:                                                                                                  \
    _Pragma("unroll") for (int v = 0; v < V; ++v) grad[v] *= SLOPE<ACT>(from[v], p.slope, p.gain, clamp);    \
    break;
  if constexpr (FROM_INPUT) {
    switch (p.act) {
      FE_CASE(kLinear, slope_from_input)
      FE_CASE(kRelu, slope_from_input)
      FE_CASE(kLeakyRelu, slope_from_input)
      FE_CASE(kTanh, slope_from_input)
      FE_CASE(kSigmoid, slope_from_input)
      FE_CASE(kSilu, slope_from_input)
    }
  } else {
    switch (p.act) {
      FE_CASE(kLinear, slope_from_output)
      FE_CASE(kRelu, slope_from_output)
      FE_CASE(kLeakyRelu, slope_from_output)
    }
  }
#undef FE_CASE
}

// The gradient to x alone, from the output: nothing is summed, and a thread has two packs as in forward_kernel.
template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads)
    slope_kernel(const NoiseBiasActParams p, const Divisor<Index> inner, const Divisor<Index> middle,
                 const Index packs) {
  const Index threads = static_cast<Index>(gridDim.x) * kThreads;
  const Index own = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x;
  Fragment<T, V> grad_pack[2], saved_pack[2];
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    if (own + u * threads >= packs) continue;
    grad_pack[u].read(p.grad, own + u * threads);
    saved_pack[u].read(p.saved, own + u * threads);
  }
  const float clamp = rounded_clamp<T>(p.clamp);
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const Index i = own + u * threads;
    if (i >= packs) break;
    float grad[V], saved[V];
    grad_pack[u].unpack(grad);
    saved_pack[u].unpack(saved);
    slopes<false>(p, clamp, saved, grad);
    if (p.scale) {
      const Index outer = inner.quotient(i);
      if (p.channels_last) {
        const float* row = p.scale + static_cast<int64_t>(middle.quotient(outer)) * p.channels;
        row += (i - outer * inner.value) * V;
#pragma unroll
        for (int v = 0; v < V; ++v) grad[v] *= __ldg(row + v);
      } else {
        const float scale = __ldg(p.scale + outer);
#pragma unroll
        for (int v = 0; v < V; ++v) grad[v] *= scale;
      }
    }
    grad_pack[u].pack(grad);
    grad_pack[u].write(p.grad_x, i);
  }
}

constexpr int kLine = 128;  // elements of a line that a warp sees at once, in packs of four: the widest planar block

// One block of threads per block of pixels of one sample; its sums go to its own row of the workspace. It sees lines of
// elements that are contiguous in memory: the channels of a pixel, or (planar) its pixels of a channel. `width` lanes
// share a line, a pack of V elements each; a warp has 32 / width lines at once. Sums along a line pass between those
// lanes, sums across lines stay in registers. V divides every line, or is 1.
template <class T, int V, bool FROM_INPUT, bool LAST>
__global__ void __launch_bounds__(kThreads, 4)
    backward_kernel(const NoiseBiasActParams p, const BlockPlan plan, const NoiseBiasActOffsets offsets,
                    const int width) {
  // Lines in flight: what 64 registers hold, 32 KiB of packs a multiprocessor (planar 64), from the input 16 to 32.
  constexpr int U = FROM_INPUT ? 1 : (LAST ? 4 : 8) / sizeof(T);
  constexpr int kKinds = LAST && FROM_INPUT ? 2 : 1;  // the gradient to scale needs the saved input
  __shared__ float across[kKinds][kWarps][kLine];     // LAST: bias and scale sums; planar: sums over channels
  __shared__ float rows[LAST ? kMaxBlockPixels : 1];  // LAST: sum over the channels of each pixel
  __shared__ float strength_sums[kWarps];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int place = lane % width, group = lane / width, groups = kWarp / width;
  // What is live throughout is 32 bits wide.
  const unsigned blocks_per_sample = static_cast<unsigned>(plan.blocks_per_sample);
  const unsigned sample = blockIdx.x / blocks_per_sample, block = blockIdx.x % blocks_per_sample;
  const int64_t first = static_cast<int64_t>(block) * plan.pixels_per_block;
  const int64_t left = p.pixels - first;
  const int count = static_cast<int>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
  const int channels = static_cast<int>(p.channels);
  const float strength = p.strength ? __ldg(p.strength) : 1.0f;
  const float clamp = FROM_INPUT ? p.clamp : rounded_clamp<T>(p.clamp);
  float* bias_row = p.grad_bias ? p.workspace + offsets.bias + blockIdx.x * p.channels : nullptr;
  float* scale_row = FROM_INPUT && p.grad_scale ? p.workspace + offsets.scale + blockIdx.x * p.channels : nullptr;
  const bool wants_rows = p.grad_noise || p.grad_strength;
  const int lines = LAST ? count : channels, length = LAST ? channels : count;
  const std::conditional_t<LAST, int, int64_t> pitch = LAST ? channels : p.pixels;
  const int64_t base = LAST ? (sample * p.pixels + first) * p.channels : sample * p.channels * p.pixels + first;
  const float* scales = p.scale ? p.scale + sample * p.channels : nullptr;
  const float* noise = p.noise ? p.noise + sample * p.noise_stride + first : nullptr;

  for (int start = 0; start < length; start += width * V) {
    const int own = start + place * V;
    const bool inside = own < length;
    // What varies along a line.
    float scale[V], offset[V], sums[V], scale_sums[V];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sums[v] = scale_sums[v] = offset[v] = 0.0f;
      scale[v] = LAST && scales && inside ? __ldg(scales + own + v) : 1.0f;
      if (!FROM_INPUT || !inside) continue;
      if (LAST && p.bias) offset[v] = __ldg(p.bias + own + v);
      if (!LAST && noise) offset[v] = __ldg(noise + own + v) * strength;
    }

    // Rounded up to whole groups, so that the lanes of a warp go round together.
    for (int at = warp * groups + group; at < (lines + groups - 1) / groups * groups; at += U * kWarps * groups) {
      Fragment<T, V> grad_pack[U], saved_pack[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int line = at + u * kWarps * groups;
        if (line >= lines || !inside) continue;
        const int64_t index = base + static_cast<int64_t>(line) * pitch + own;
        grad_pack[u].read(static_cast<const T*>(p.grad) + index, 0);
        saved_pack[u].read(static_cast<const T*>(p.saved) + index, 0);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int line = at + u * kWarps * groups;
        const bool active = line < lines && inside;
        float line_sum = 0.0f, line_scale_sum = 0.0f;
        if (active) {  // a lane beyond the end adds nothing to the sums
          float grad[V], saved[V];
          grad_pack[u].unpack(grad);
          saved_pack[u].unpack(saved);
          const float line_scale = !LAST && scales ? __ldg(scales + line) : 1.0f;
          if constexpr (FROM_INPUT) {
            const float line_bias = !LAST && p.bias ? __ldg(p.bias + line) : 0.0f;
            const float line_noise = LAST && noise ? __ldg(noise + line) * strength : 0.0f;
            float z[V];
#pragma unroll
            for (int v = 0; v < V; ++v)
              z[v] = LAST ? saved[v] * scale[v] + line_noise + offset[v]
                          : saved[v] * line_scale + offset[v] + line_bias;
            slopes<true>(p, clamp, z, grad);
          } else {
            slopes<false>(p, clamp, saved, grad);
          }
#pragma unroll
          for (int v = 0; v < V; ++v) {
            sums[v] += grad[v];
            line_sum += grad[v];
            scale_sums[v] += grad[v] * saved[v];
            line_scale_sum += grad[v] * saved[v];
            grad[v] *= LAST ? scale[v] : line_scale;
          }
          grad_pack[u].pack(grad);
          grad_pack[u].write(static_cast<T*>(p.grad_x) + base + static_cast<int64_t>(line) * pitch + own, 0);
        }
        // The lane that keeps a line's sum is the same for every piece of the line. The first lane of an active line is
        // inside.
        if constexpr (LAST) {
          if (!wants_rows) continue;
          line_sum = group_sum(line_sum, width);
          if (active && place == 0) rows[line] = start ? rows[line] + line_sum : line_sum;
        } else {
          if (bias_row) line_sum = group_sum(line_sum, width);
          if (scale_row) line_scale_sum = group_sum(line_scale_sum, width);
          if (!active || place != 0) continue;
          if (bias_row) bias_row[line] = start ? bias_row[line] + line_sum : line_sum;
          if (scale_row) scale_row[line] = start ? scale_row[line] + line_scale_sum : line_scale_sum;
        }
      }
    }

    if (LAST ? !bias_row && !scale_row : !wants_rows) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int j = (LAST ? 0 : start) + place * V + v;
      const float sum = sum_over_groups(sums[v], width);
      if (group == 0) across[0][warp][j] = sum;
      if constexpr (kKinds == 2) {
        const float scale_sum = sum_over_groups(scale_sums[v], width);
        if (group == 0) across[1][warp][j] = scale_sum;
      }
    }
    if constexpr (LAST) {
      __syncthreads();
      for (int j = threadIdx.x; j < kKinds * kLine; j += kThreads) {
        const int kind = j / kLine, c = j % kLine;
        float* row = kind ? scale_row : bias_row;
        if (!row || c >= width * V || start + c >= length) continue;
        float total = 0.0f;
        for (int w = 0; w < kWarps; ++w) total += across[kind][w][c];
        row[start + c] = total;
      }
      __syncthreads();
    }
  }
  if (!wants_rows) return;

  __syncthreads();
  float strength_sum = 0.0f;
  for (int q = threadIdx.x; q < count; q += kThreads) {
    float row = 0.0f;
    if constexpr (LAST) {
      row = rows[q];
    } else {
      for (int w = 0; w < kWarps; ++w) row += across[0][w][q];
    }
    if (p.grad_noise) p.grad_noise[sample * p.pixels + first + q] = row * strength;
    if (p.grad_strength) strength_sum += row * __ldg(noise + q);
  }
  if (!p.grad_strength) return;
  strength_sum = warp_sum(strength_sum);
  if (lane == 0) strength_sums[warp] = strength_sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += strength_sums[w];
    p.workspace[offsets.strength + blockIdx.x] = total;
  }
}

template <class T, int V, class Index>
void launch_elementwise(const NoiseBiasActParams& p, int64_t packs, unsigned blocks, cudaStream_t stream) {
  const Divisor<Index> inner((p.channels_last ? p.channels : p.pixels) / V);
  const Divisor<Index> middle(p.channels_last ? p.pixels : p.channels);
  auto kernel = p.grad_x ? slope_kernel<T, V, Index> : forward_kernel<T, V, Index>;
  kernel<<<blocks, kThreads, 0, stream>>>(p, inner, middle, static_cast<Index>(packs));
}

// The forward pass; the gradient to x where grad_x is given.
template <class T, int V>
void launch_elementwise(const NoiseBiasActParams& p, cudaStream_t stream) {
  const int64_t packs = p.batch * p.channels * p.pixels / V;
  int64_t blocks = (packs + kThreads - 1) / kThreads;
  if (blocks > 1056) blocks = (blocks + 1) / 2;  // fewer do not fill the largest GPU: a pack a thread
  // A thread's second pack must not overflow past the end either.
  if (packs + 2 * blocks * kThreads < (int64_t{1} << 31))
    launch_elementwise<T, V, uint32_t>(p, packs, static_cast<unsigned>(blocks), stream);
  else
    launch_elementwise<T, V, int64_t>(p, packs, static_cast<unsigned>(blocks), stream);
}

template <class T>
void forward(const NoiseBiasActParams& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const int64_t inner = p.channels_last ? p.channels : p.pixels;
  const bool rows = p.channels_last ? aligned(p.scale, 16) && aligned(p.bias, 16) : aligned(p.noise, 16);
  if (aligned(p.x, 16) && aligned(p.y, 16) && rows && inner % V == 0)
    launch_elementwise<T, V>(p, stream);
  else
    launch_elementwise<T, 1>(p, stream);
}

template <class T, int V>
void launch_backward(const NoiseBiasActParams& p, cudaStream_t stream) {
  const BlockPlan plan = plan_noise_bias_act_cuda(p);
  const NoiseBiasActOffsets offsets = noise_bias_act_offsets(p, plan);
  const int64_t each = plan.blocks_per_sample, blocks = p.batch * each;
  const int64_t piece = p.pixels < plan.pixels_per_block ? p.pixels : plan.pixels_per_block;
  const int64_t length = p.channels_last ? p.channels : piece;
  int width = 1;
  while (width < kWarp && width * V < length) width *= 2;
  auto kernel = p.saved_is_input
                    ? (p.channels_last ? backward_kernel<T, V, true, true> : backward_kernel<T, V, true, false>)
                    : (p.channels_last ? backward_kernel<T, V, false, true> : backward_kernel<T, V, false, false>);
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, stream>>>(p, plan, offsets, width);
  combine_cuda<3>({{{p.workspace + offsets.bias, 1, blocks, p.channels, p.grad_bias, nullptr},
                    {p.workspace + offsets.scale, p.batch, each, p.channels, p.grad_scale, nullptr},
                    {p.workspace + offsets.strength, 1, blocks, 1, p.grad_strength, nullptr}}},
                  stream);
}

template <class T>
void slope(const NoiseBiasActParams& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  if (aligned(p.grad, 16) && aligned(p.saved, 16) && aligned(p.grad_x, 16) &&
      (p.channels_last ? p.channels : p.pixels) % V == 0)
    launch_elementwise<T, V>(p, stream);
  else
    launch_elementwise<T, 1>(p, stream);
}

template <class T>
void backward(const NoiseBiasActParams& p, cudaStream_t stream) {
  if (!p.saved_is_input && !p.grad_noise && !p.grad_strength && !p.grad_bias) return slope<T>(p, stream);
  constexpr int V = kLine / kWarp, kBytes = V * sizeof(T);
  if (aligned(p.grad, kBytes) && aligned(p.saved, kBytes) && aligned(p.grad_x, kBytes) &&
      (p.channels_last ? p.channels : p.pixels) % V == 0)
    launch_backward<T, V>(p, stream);
  else
    launch_backward<T, 1>(p, stream);
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
  if (p.channels >= (int64_t{1} << 30)) return "channels must be below 2^30";
  return FE_ISA::run_dtype(p, device, stream, true);
}

}  // namespace fe
