// SPDX-License-Identifier: Apache-2.0
#include "modulated_conv2d.h"

#include <limits>
#include <type_traits>

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

// Channels of a pixel in packs, at most. Where they are many a warp has a pixel and a block of forward_kernel 16, so
// that its elements count to 2^30.
constexpr int64_t kMostPacked = int64_t{1} << 26;

// channels_last: `width` lanes a pixel, a pack of V neighbouring channels each. Planar (V is 1): a thread a pixel. A
// thread has U pixels, and a block of threads never leaves its sample. Two packs of 16 bytes a thread are 32 KiB under
// way a multiprocessor in 64 registers, as four are in 128; what lies along the channels is read once for both.
// WRITE: the epilogue's output is stored; otherwise only ToRGB's sums are wanted, of x itself.
template <class T, int V, int U, bool WRITE>
__global__ void __launch_bounds__(kThreads, 4)
    forward_kernel(const ModulatedEpilogueParams p, const unsigned blocks_per_sample, const int width) {
  using Index = std::conditional_t<(V > 1), int, int64_t>;  // of an element among the block's; see kMostPacked
  const float strength = p.strength ? __ldg(p.strength) : 1.0f;
  const int place = threadIdx.x % width, own = threadIdx.x / width, pixels = kThreads / width;
  const int channels = static_cast<int>(p.channels);
  const bool last = V > 1 || p.channels_last;
  const unsigned sample = blockIdx.x / blocks_per_sample;
  const int64_t first = static_cast<int64_t>(blockIdx.x % blocks_per_sample) * (U * pixels);
  const int64_t left = p.pixels - first;
  const int count = static_cast<int>(left < U * pixels ? left : U * pixels);
  const Index pitch = last ? channels : 1, step = last ? 1 : static_cast<Index>(p.pixels);
  const int64_t base = sample * p.channels * p.pixels + first * pitch;
  float offset[U], sums[U][3];
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int q = own + u * pixels;
    const bool noisy = WRITE && p.noise && q < count;
    offset[u] = noisy ? __ldg(p.noise + sample * p.noise_stride + first + q) * strength : 0.0f;
    sums[u][0] = sums[u][1] = sums[u][2] = 0.0f;
  }
  for (int c = place * V; c < channels; c += width * V) {
    Fragment<T, V> pack[U];
    float value[U][V];
#pragma unroll
    for (int u = 0; u < U; ++u) {
      const int q = own + u * pixels;
      pack[u] = {};
      if (q < count) pack[u].read(static_cast<const T*>(p.x) + base + (q * pitch + c * step), 0);
      pack[u].unpack(value[u]);
    }
    if constexpr (WRITE) {
      float scale[V], bias[V];
      read_floats(p.scale + sample * p.channels + c, scale);
      read_floats(p.bias + c, bias);
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) value[u][v] = value[u][v] * scale[v] + offset[u] + bias[v];
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int q = own + u * pixels;
        finish_all(p, value[u]);
        pack[u].pack(value[u]);
        if (q < count) pack[u].write(static_cast<T*>(p.y) + base + (q * pitch + c * step), 0);
      }
    }
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      float factors[V];
      read_floats(p.rgb_factors + (sample * 3 + k) * p.channels + c, factors);
#pragma unroll
      for (int u = 0; u < U; ++u) {
#pragma unroll
        for (int v = 0; v < V; ++v) sums[u][k] += value[u][v] * factors[v];
      }
    }
  }
#pragma unroll
  for (int u = 0; u < U; ++u) {
    const int q = own + u * pixels;
#pragma unroll
    for (int k = 0; k < 3; ++k) {
      const float sum = group_sum(sums[u][k], width);
      if (place == 0 && q < count) p.rgb[(sample * 3 + k) * p.pixels + first + q] = sum;
    }
  }
}

// What one element adds to the sums over pixels: bias, scale, and the three rows of rgb_factors.
struct Terms {
  float value[5];
};

// Slope and inverse of the activation, by its output: what slope_from_output and input_from_output give, without a
// switch. Made on the host and passed by value: constant memory instead of registers.
struct InverseOfOutput {
  float limit;                     // of the clamp, rounded as the output is; NaN: none
  float kink;                      // smaller outputs lie on the activation's lower side
  float slope_above, slope_below;  // dy/dz
  float input_above, input_below;  // z/y

  FE_HD float slope(float y) const {
    const float magnitude = y < 0.0f ? -y : y;
    return magnitude >= limit ? 0.0f : (y < kink ? slope_below : slope_above);
  }
  FE_HD float input(float y) const { return y * (y < kink ? input_below : input_above); }
};

template <class T>
InverseOfOutput inverse_of_output(const ModulatedEpilogueParams& p) {
  T rounded;
  store(p.clamp, &rounded);
  InverseOfOutput inverse{};
  inverse.limit = clamp_limit(p.clamp < 0.0f ? p.clamp : load(rounded));
  inverse.slope_above = inverse.slope_below = p.gain;
  inverse.input_above = inverse.input_below = 1.0f / p.gain;
  if (p.act == kLeakyRelu) inverse.slope_below = p.slope * p.gain, inverse.input_below = 1.0f / (p.gain * p.slope);
  // 0 lies on the flat side of a ReLU.
  if (p.act == kRelu) inverse.slope_below = 0.0f, inverse.kink = std::numeric_limits<float>::denorm_min();
  return inverse;
}

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
    const float gz = grad * inverse.slope(y);
    float core = inverse.input(y);
    if (p.noise) core -= p.noise[sample * p.noise_stride + q] * strength;
    if (p.bias) core -= p.bias[c];
    terms.value[0] = gz;
    terms.value[1] = gz * core;
    store(p.scale ? gz * p.scale[sample * p.channels + c] : gz, static_cast<T*>(p.grad_x) + index);
    return terms;
  }
};

// One block of threads per block of pixels of one sample; its sums go to its own rows of the workspace.
// channels_last: `width` lanes a pixel, a pack of V neighbouring channels each. Planar: V is 1.
// A thread's registers hold its sums and the packs under way: with four blocks a multiprocessor 32 KiB of packs beside
// ToRGB's sums, 64 KiB without. What lies along the channels or the pixels waits in shared memory, of which sm_80 has
// enough for three blocks with ToRGB's sums, sm_86 and sm_89 for two.
template <class T, bool RGB, bool LAST, int V>
__global__ void __launch_bounds__(kThreads, 4)
    backward_kernel(const ModulatedEpilogueParams p, const BlockPlan plan, const ModulatedOffsets offsets,
                    const InverseOfOutput inverse, const int width) {
  constexpr int kKinds = RGB ? 5 : 2;
  constexpr int kCopies = LAST ? 1 : kWarps;
  constexpr int kPixels = LAST ? kMaxBlockPixels : kPlanarPixels;
  __shared__ float rows[kCopies][kPixels];           // sum over channels of each pixel; planar: per warp
  __shared__ float sums[kKinds][kWarps][kWarp * V];  // channels_last: sums of as many channels as a warp sees at once
  __shared__ Pack<float, V> vectors[kKinds][LAST ? kWarp : 1];       // scale, bias, rgb_factors of these channels
  __shared__ Pack<float, RGB ? 4 : 1> of_pixel[LAST ? kPixels : 1];  // the noise it adds, and grad_rgb
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  // What is live throughout is 32 bits wide.
  const unsigned blocks_per_sample = static_cast<unsigned>(plan.blocks_per_sample);
  const unsigned sample = blockIdx.x / blocks_per_sample, block = blockIdx.x % blocks_per_sample;
  const int64_t first = static_cast<int64_t>(block) * plan.pixels_per_block;
  const int64_t left = p.pixels - first;
  const int count = static_cast<int>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
  const bool wants_rows = p.grad_noise || p.grad_strength;
  // Where the row of sums of one kind begins; null when nobody wants it.
  auto row_of = [&](int kind) -> float* {
    float* row = p.workspace + blockIdx.x * p.channels;
    if (kind == 0) return p.grad_bias ? row + offsets.bias : nullptr;
    if (kind == 1) return p.grad_scale ? row + offsets.scale : nullptr;
    const int64_t factors = ((sample * 3 + kind - 2) * plan.blocks_per_sample + block) * p.channels;
    return p.grad_factors ? p.workspace + offsets.factors + factors : nullptr;
  };
  const float strength = p.strength ? __ldg(p.strength) : 1.0f;
  if constexpr (LAST) {
    constexpr int U = (RGB ? 4 : 8) / sizeof(T);  // pixels in flight
    const int place = lane % width, group = lane / width, groups = kWarp / width;
    const int channels = static_cast<int>(p.channels);
    const int64_t base = (sample * p.pixels + first) * p.channels;
    for (int q = threadIdx.x; q < count; q += kThreads) {
      of_pixel[q].lane[0] = p.noise ? __ldg(p.noise + sample * p.noise_stride + first + q) * strength : 0.0f;
#pragma unroll
      for (int k = 0; k < kKinds - 2; ++k)
        of_pixel[q].lane[1 + k] = __ldg(p.grad_rgb + (sample * 3 + k) * p.pixels + first + q);
    }
    for (int start = 0; start < channels; start += width * V) {
      for (int j = threadIdx.x; j < kKinds * kWarp * V; j += kThreads) {
        const int kind = j / (kWarp * V), channel = j % (kWarp * V), c = start + channel;
        if (channel >= width * V || c >= channels) continue;
        float value = 0.0f;
        if (kind == 0) value = p.scale ? __ldg(p.scale + sample * p.channels + c) : 1.0f;
        if (kind == 1) value = p.bias ? __ldg(p.bias + c) : 0.0f;
        if (kind >= 2) value = __ldg(p.rgb_factors + (sample * 3 + kind - 2) * p.channels + c);
        vectors[kind][channel / V].lane[channel % V] = value;
      }
      __syncthreads();
      const int c = start + place * V;
      const bool inside = c < channels;
      float sum[kKinds][V];
#pragma unroll
      for (int v = 0; v < V; ++v) {
#pragma unroll
        for (int k = 0; k < kKinds; ++k) sum[k][v] = 0.0f;
      }
      // Rounded up to whole groups, so that the lanes of a warp go round together.
      for (int at = warp * groups + group; at < (count + groups - 1) / groups * groups; at += U * kWarps * groups) {
        Fragment<T, V> y_pack[U], grad_pack[U];
#pragma unroll
        for (int u = 0; u < U; ++u) {
          const int q = at + u * kWarps * groups;
          if (q >= count || !inside) continue;
          const int64_t index = base + static_cast<int64_t>(q) * channels + c;
          y_pack[u].read(static_cast<const T*>(p.saved) + index, 0);
          if (p.grad) grad_pack[u].read(static_cast<const T*>(p.grad) + index, 0);
        }
#pragma unroll
        for (int u = 0; u < U; ++u) {
          asm volatile("" ::: "memory");  // `vectors` is to be read again for each pixel, not kept in registers
          const int q = at + u * kWarps * groups;
          const bool active = q < count && inside;
          float row = 0.0f;
          if (active) {  // a lane beyond the end adds nothing to the sums
            float y[V], grad[V] = {};
            y_pack[u].unpack(y);
            if (p.grad) grad_pack[u].unpack(grad);
            if constexpr (RGB) {
#pragma unroll
              for (int k = 0; k < 3; ++k) {
                const float colour = of_pixel[q].lane[1 + k];
                const Pack<float, V> factors = vectors[2 + k][place];
#pragma unroll
                for (int v = 0; v < V; ++v) grad[v] += colour * factors.lane[v], sum[2 + k][v] += colour * y[v];
              }
            }
            const float offset = of_pixel[q].lane[0];
            const Pack<float, V> scale = vectors[0][place], bias = vectors[1][place];
#pragma unroll
            for (int v = 0; v < V; ++v) {
              const float gz = grad[v] * inverse.slope(y[v]);
              row += gz;
              sum[0][v] += gz;
              sum[1][v] += gz * (inverse.input(y[v]) - offset - bias.lane[v]);
              grad[v] = gz * scale.lane[v];
            }
            y_pack[u].pack(grad);
            y_pack[u].write(static_cast<T*>(p.grad_x) + base + static_cast<int64_t>(q) * channels + c, 0);
          }
          if (!wants_rows) continue;
          row = group_sum(row, width);
          // The same lane sees this pixel again in the next piece of its channels.
          if (active && place == 0) rows[0][q] = start ? rows[0][q] + row : row;
        }
      }
#pragma unroll
      for (int k = 0; k < kKinds; ++k) {
#pragma unroll
        for (int v = 0; v < V; ++v) {
          const float total = sum_over_groups(sum[k][v], width);
          if (group == 0) sums[k][warp][place * V + v] = total;
        }
      }
      __syncthreads();  // the next piece's sums are written after its own barrier
      for (int j = threadIdx.x; j < kKinds * kWarp * V; j += kThreads) {
        const int kind = j / (kWarp * V), channel = j % (kWarp * V);
        float* row = row_of(kind);
        if (!row || channel >= width * V || start + channel >= p.channels) continue;
        float total = 0.0f;
        for (int w = 0; w < kWarps; ++w) total += sums[kind][w][channel];
        row[start + channel] = total;
      }
    }
  } else {
    // A warp owns every eighth channel; its lanes are neighbouring pixels.
    const BackwardElement<T, RGB> element{p, inverse, strength};
    for (int q = lane; q < count; q += kWarp) rows[warp][q] = 0.0f;
    __syncwarp();
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
    for (int w = 0; w < kCopies; ++w) row += rows[w][q];
    if (p.grad_noise) p.grad_noise[sample * p.pixels + first + q] = row * strength;
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

// Lines as in noise_bias_act.cu: the channels of a pixel, or (planar) a block's pixels of a channel.
template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4)
    style_kernel(const ModulatedStyleParams p, const BlockPlan plan, const int width) {
  constexpr int U = 2;  // lines in flight
  __shared__ float across[kWarps][kWarp * V];
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int place = lane % width, group = lane / width, groups = kWarp / width;
  const int64_t sample = blockIdx.x / plan.blocks_per_sample;
  const int64_t first = (blockIdx.x % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t left = p.pixels - first;
  const int count = static_cast<int>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
  const int channels = static_cast<int>(p.channels);
  const int lines = p.channels_last ? count : channels, length = p.channels_last ? channels : count;
  const int64_t pitch = p.channels_last ? p.channels : p.pixels;
  const int64_t base =
      p.channels_last ? (sample * p.pixels + first) * p.channels : sample * p.channels * p.pixels + first;
  const float* styles = p.style + sample * p.channels;
  float* row = p.grad_style ? p.workspace + blockIdx.x * p.channels : nullptr;
  for (int start = 0; start < length; start += width * V) {
    const int own = start + place * V;
    const bool inside = own < length;
    float style[V], sums[V];
#pragma unroll
    for (int v = 0; v < V; ++v) sums[v] = 0.0f, style[v] = p.channels_last && inside ? __ldg(styles + own + v) : 0.0f;
    for (int at = warp * groups; at < lines; at += U * kWarps * groups) {
      Fragment<T, V> grad_pack[U], x_pack[U];
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int line = at + u * kWarps * groups + group;
        if (line >= lines || !inside) continue;
        const int64_t index = base + line * pitch + own;
        grad_pack[u].read(static_cast<const T*>(p.grad) + index, 0);
        if (row) x_pack[u].read(static_cast<const T*>(p.x) + index, 0);
      }
#pragma unroll
      for (int u = 0; u < U; ++u) {
        const int line = at + u * kWarps * groups + group;
        const bool active = line < lines && inside;
        float line_sum = 0.0f;
        if (active) {
          float grad[V], x[V];
          grad_pack[u].unpack(grad);
          if (row) {
            x_pack[u].unpack(x);
#pragma unroll
            for (int v = 0; v < V; ++v) sums[v] += grad[v] * x[v], line_sum += grad[v] * x[v];
          }
          const float line_style = p.channels_last ? 0.0f : __ldg(styles + line);
#pragma unroll
          for (int v = 0; v < V; ++v) grad[v] *= p.channels_last ? style[v] : line_style;
          grad_pack[u].pack(grad);
          grad_pack[u].write(static_cast<T*>(p.grad_x) + base + line * pitch + own, 0);
        }
        if (p.channels_last || !row) continue;
        line_sum = group_sum(line_sum, width);
        if (active && place == 0) row[line] = start ? row[line] + line_sum : line_sum;
      }
    }
    if (!p.channels_last || !row) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float sum = sum_over_groups(sums[v], width);
      if (group == 0) across[warp][place * V + v] = sum;
    }
    __syncthreads();
    for (int j = threadIdx.x; j < width * V && start + j < length; j += kThreads) {
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += across[w][j];
      row[start + j] = total;
    }
    __syncthreads();
  }
}

template <class T, int V, int U>
void launch_forward(const ModulatedEpilogueParams& p, int width, cudaStream_t stream) {
  const int64_t block = U * kThreads / width, each = (p.pixels + block - 1) / block;
  const unsigned per_sample = static_cast<unsigned>(each), blocks = static_cast<unsigned>(p.batch * each);
  if (p.y)
    forward_kernel<T, V, U, true><<<blocks, kThreads, 0, stream>>>(p, per_sample, width);
  else
    forward_kernel<T, V, U, false><<<blocks, kThreads, 0, stream>>>(p, per_sample, width);
}

template <class T>
void forward(const ModulatedEpilogueParams& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T), U = 2;
  if (!p.channels_last || p.channels % V != 0 || p.channels > kMostPacked || !aligned(p.x, 16) || !aligned(p.y, 16) ||
      !aligned(p.scale, 16) || !aligned(p.bias, 16) || !aligned(p.rgb_factors, 16)) {
    int width = 1;
    while (p.channels_last && width < kWarp && width < p.channels) width *= 2;
    return launch_forward<T, 1, 1>(p, width, stream);
  }
  int width = 1;
  while (width < kWarp && width * V < p.channels) width *= 2;
  if (p.batch * p.pixels * width < 264 * U * kThreads)  // several pixels a thread would not fill the largest GPU
    launch_forward<T, V, 1>(p, width, stream);
  else
    launch_forward<T, V, U>(p, width, stream);
}

template <class T>
void backward(const ModulatedEpilogueParams& p, cudaStream_t stream) {
  const BlockPlan plan = plan_modulated_cuda(p);
  const ModulatedOffsets offsets = modulated_offsets(p, plan);
  const int64_t each = plan.blocks_per_sample, blocks = p.batch * each;
  const unsigned grid = static_cast<unsigned>(blocks);
  const InverseOfOutput inverse = inverse_of_output<T>(p);
  constexpr int V = 4, kBytes = V * sizeof(T);
  const bool packs = p.channels_last && p.channels % V == 0 && aligned(p.saved, kBytes) && aligned(p.grad, kBytes) &&
                     aligned(p.grad_x, kBytes);
  int width = 1;
  while (width < kWarp && width * (packs ? V : 1) < p.channels) width *= 2;
#define FE_PICK(RGB)                                    \
  (!p.channels_last ? backward_kernel<T, RGB, false, 1> \
                    : (packs ? backward_kernel<T, RGB, true, V> : backward_kernel<T, RGB, true, 1>))
  auto kernel = p.grad_rgb ? FE_PICK(true) : FE_PICK(false);
#undef FE_PICK
  kernel<<<grid, kThreads, 0, stream>>>(p, plan, offsets, inverse, width);
  // The sums for scale were of dL/dz * (scale * x); what multiplies scale is x.
  combine_cuda<4>({{{p.workspace + offsets.bias, 1, blocks, p.channels, p.grad_bias, nullptr},
                    {p.workspace + offsets.scale, p.batch, each, p.channels, p.grad_scale, p.scale},
                    {p.workspace + offsets.factors, 3 * p.batch, each, p.channels, p.grad_factors, nullptr},
                    {p.workspace + offsets.strength, 1, blocks, 1, p.grad_strength, nullptr}}},
                  stream);
}

template <class T, int V>
void launch_style(const ModulatedStyleParams& p, cudaStream_t stream) {
  const BlockPlan plan = plan_modulated_cuda(p);
  const int64_t piece = p.pixels < plan.pixels_per_block ? p.pixels : plan.pixels_per_block;
  int width = 1;
  while (width < kWarp && width * V < (p.channels_last ? p.channels : piece)) width *= 2;
  const unsigned blocks = static_cast<unsigned>(p.batch * plan.blocks_per_sample);
  style_kernel<T, V><<<blocks, kThreads, 0, stream>>>(p, plan, width);
  if (p.grad_style) combine_cuda(p.workspace, p.batch, plan.blocks_per_sample, p.channels, p.grad_style, stream);
}

template <class T>
void style(const ModulatedStyleParams& p, cudaStream_t stream) {
  constexpr int V = 4, kBytes = V * sizeof(T);
  if ((p.channels_last ? p.channels : p.pixels) % V == 0 && aligned(p.x, kBytes) && aligned(p.grad, kBytes) &&
      aligned(p.grad_x, kBytes))
    launch_style<T, V>(p, stream);
  else
    launch_style<T, 1>(p, stream);
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

Error modulated_epilogue_fwd_cuda(const ModulatedEpilogueParams& p, int device, void* stream) {
  if (p.channels >= (int64_t{1} << 30)) return "channels must be below 2^30";
  FE_RUN(forward, p)
}
Error modulated_epilogue_bwd_cuda(const ModulatedEpilogueParams& p, int device, void* stream) {
  if (p.channels >= (int64_t{1} << 30)) return "channels must be below 2^30";
  FE_RUN(backward, p)
}
Error modulated_style_bwd_cuda(const ModulatedStyleParams& p, int device, void* stream) {
  if (p.channels >= (int64_t{1} << 30)) return "channels must be below 2^30";
  FE_RUN(style, p)
}

#undef FE_RUN

}  // namespace fe
