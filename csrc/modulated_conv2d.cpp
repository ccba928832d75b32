// SPDX-License-Identifier: Apache-2.0
#include "modulated_conv2d.h"

#include "elementwise.h"
#include "sums.h"

namespace fe {
namespace FE_ISA {
namespace {

constexpr int kLanes = 32;         // channels a channels_last block works on at once: their sums stay in registers
constexpr int kRows = 16;          // partial sums over channels that each pixel keeps
constexpr int32_t kPixels = 256;   // plan_cpu_blocks never makes a larger block

struct Block {
  int64_t sample, first_pixel, index;
  int32_t pixels;
};

inline Block block_at(const BlockPlan& plan, int64_t index, int64_t pixels) {
  const int64_t sample = index / plan.blocks_per_sample;
  const int64_t first = (index % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t left = pixels - first;
  return {sample, first, index, static_cast<int32_t>(left < plan.pixels_per_block ? left : plan.pixels_per_block)};
}

template <class Params>
inline int64_t element(const Params& p, const Block& block, int64_t c, int64_t q) {
  return p.channels_last ? (block.sample * p.pixels + block.first_pixel + q) * p.channels + c
                         : (block.sample * p.channels + c) * p.pixels + block.first_pixel + q;
}

// The noise that each pixel of the block adds.
inline void noise_offsets(const ModulatedEpilogueParams& p, const Block& block, float* offset) {
  const float strength = p.strength ? *p.strength : 1.0f;
  const float* noise = p.noise ? p.noise + block.sample * p.noise_stride + block.first_pixel : nullptr;
  for (int32_t q = 0; q < block.pixels; ++q) offset[q] = noise ? noise[q] * strength : 0.0f;
}

// The sum of kRows values by halves: four short steps, where adding one by one would take sixteen.
FE_HD float tree_sum(float* value) {
  for (int half = kRows / 2; half > 0; half /= 2)
    for (int j = 0; j < half; ++j) value[j] += value[j + half];
  return value[0];
}

template <class T, int ACT, bool WRITE>
void forward_block(const ModulatedEpilogueParams& p, const Block& block) {
  const int64_t channels = p.channels;
  const int32_t pixels = block.pixels;
  const float slope = p.slope, gain = p.gain, limit = clamp_limit(p.clamp);
  const float* scale = p.scale + (WRITE ? block.sample * channels : 0);
  const float* bias = p.bias;
  const float* factors = p.rgb_factors + block.sample * 3 * channels;
  float* rgb = p.rgb + block.sample * 3 * p.pixels + block.first_pixel;
  float offset[kPixels];
  if (WRITE) noise_offsets(p, block, offset);

  if (p.channels_last) {
    const float *red = factors, *green = factors + channels, *blue = factors + 2 * channels;
    for (int32_t q = 0; q < pixels; ++q) {
      const T* x = static_cast<const T*>(p.x) + element(p, block, 0, q);
      T* y = WRITE ? static_cast<T*>(p.y) + element(p, block, 0, q) : nullptr;
      const float noise = WRITE ? offset[q] : 0.0f;
      alignas(64) float sum[3][kRows] = {};
      auto add = [&](int64_t c, int j) {
        float value = load(x[c]);
        if (WRITE) {
          value = finish_within<ACT>(value * scale[c] + noise + bias[c], slope, gain, limit);
          store(value, y + c);
        }
        sum[0][j] += value * red[c];
        sum[1][j] += value * green[c];
        sum[2][j] += value * blue[c];
      };
      int64_t first = 0;
      for (; first + kRows <= channels; first += kRows) {
#pragma omp simd
        for (int j = 0; j < kRows; ++j) add(first + j, j);
      }
      const int rest = static_cast<int>(channels - first);
#pragma omp simd
      for (int j = 0; j < rest; ++j) add(first + j, j);
      for (int k = 0; k < 3; ++k) rgb[k * p.pixels + q] = tree_sum(sum[k]);
    }
    return;
  }
  float sums[3][kPixels] = {};
  for (int64_t c = 0; c < channels; ++c) {
    const T* x = static_cast<const T*>(p.x) + element(p, block, c, 0);
    T* y = WRITE ? static_cast<T*>(p.y) + element(p, block, c, 0) : nullptr;
    const float d = WRITE ? scale[c] : 1.0f, shift = WRITE ? bias[c] : 0.0f;
    const float red = factors[c], green = factors[channels + c], blue = factors[2 * channels + c];
#pragma omp simd
    for (int32_t q = 0; q < pixels; ++q) {
      float value = load(x[q]);
      if (WRITE) {
        value = finish_within<ACT>(value * d + offset[q] + shift, slope, gain, limit);
        store(value, y + q);
      }
      sums[0][q] += value * red;
      sums[1][q] += value * green;
      sums[2][q] += value * blue;
    }
  }
  for (int k = 0; k < 3; ++k)
    for (int32_t q = 0; q < pixels; ++q) rgb[k * p.pixels + q] = sums[k][q];
}

// What one block adds to the sums over pixels, at the channels from `first` on.
struct Sums {
  float* kind[5];  // bias, scale, and the three rows of rgb_factors; null: not wanted
};

struct Inversion {
  float limit, inverse, inverse_below;
};

template <class T>
Inversion inversion(const ModulatedEpilogueParams& p) {
  // The output was rounded to its dtype; so was the limit it was clamped to.
  T rounded;
  store(p.clamp, &rounded);
  return {clamp_limit(p.clamp < 0.0f ? p.clamp : load(rounded)), 1.0f / p.gain, 1.0f / (p.gain * p.slope)};
}

template <class T, int ACT, bool RGB, bool FULL>
void backward_lanes(const ModulatedEpilogueParams& p, const Block& block, const Inversion& inv, int64_t first,
                    int32_t count, const float* offset, const Sums& sums, float* rows) {
  // channels_last: 32 channels, all pixels of the block. Arrays of constant size live in vector registers.
  const int32_t lanes = FULL ? kLanes : count;
  alignas(64) float scale[kLanes], bias[kLanes], factor[3][kLanes], sum[5][kLanes] = {};
  for (int32_t i = 0; i < lanes; ++i) {
    scale[i] = p.scale ? p.scale[block.sample * p.channels + first + i] : 1.0f;
    bias[i] = p.bias ? p.bias[first + i] : 0.0f;
    if (RGB)
      for (int k = 0; k < 3; ++k) factor[k][i] = p.rgb_factors[(block.sample * 3 + k) * p.channels + first + i];
  }
  const float slope = p.slope, gain = p.gain, limit = inv.limit;
  const float inverse = inv.inverse, inverse_below = inv.inverse_below;
  const T none[kLanes] = {};
  const float* grad_rgb = RGB ? p.grad_rgb + block.sample * 3 * p.pixels + block.first_pixel : nullptr;
  const int64_t base = element(p, block, first, 0);
  for (int32_t q = 0; q < block.pixels; ++q) {
    const T* saved = static_cast<const T*>(p.saved) + base + q * p.channels;
    const T* grad = p.grad ? static_cast<const T*>(p.grad) + base + q * p.channels : none;
    T* grad_x = static_cast<T*>(p.grad_x) + base + q * p.channels;
    const float noise = offset[q];
    const float g0 = RGB ? grad_rgb[q] : 0.0f, g1 = RGB ? grad_rgb[p.pixels + q] : 0.0f;
    const float g2 = RGB ? grad_rgb[2 * p.pixels + q] : 0.0f;
    float* row = rows + q * kRows;
    for (int32_t half = 0; half < lanes; half += kRows) {
      const int32_t width = FULL ? kRows : (lanes - half < kRows ? lanes - half : kRows);
#pragma omp simd
      for (int32_t j = 0; j < width; ++j) {
        const int32_t i = half + j;
        const float y = load(saved[i]);
        float g = load(grad[i]);
        if (RGB) g += g0 * factor[0][i] + g1 * factor[1][i] + g2 * factor[2][i];
        const float gz = g * slope_within<ACT>(y, slope, gain, limit);
        const float core = input_from_output<ACT>(y, inverse, inverse_below) - noise - bias[i];
        sum[0][i] += gz;
        sum[1][i] += gz * core;
        if (RGB) {
          sum[2][i] += g0 * y;
          sum[3][i] += g1 * y;
          sum[4][i] += g2 * y;
        }
        row[j] += gz;
        store(gz * scale[i], grad_x + i);
      }
    }
  }
  for (int k = 0; k < (RGB ? 5 : 2); ++k)
    if (sums.kind[k])
      for (int32_t i = 0; i < lanes; ++i) sums.kind[k][first + i] = sum[k][i];
}

template <class T, int ACT, bool RGB>
void backward_plane(const ModulatedEpilogueParams& p, const Block& block, const Inversion& inv, int64_t c,
                    const float* offset, const Sums& sums, float* rows) {
  const float slope = p.slope, gain = p.gain, limit = inv.limit;
  const float inverse = inv.inverse, inverse_below = inv.inverse_below;
  const float scale = p.scale ? p.scale[block.sample * p.channels + c] : 1.0f;
  const float bias = p.bias ? p.bias[c] : 0.0f;
  const int64_t base = element(p, block, c, 0);
  const T none[kPixels] = {};
  const T* saved = static_cast<const T*>(p.saved) + base;
  const T* grad = p.grad ? static_cast<const T*>(p.grad) + base : none;
  T* grad_x = static_cast<T*>(p.grad_x) + base;
  float factor[3] = {};
  const float* grad_rgb = RGB ? p.grad_rgb + block.sample * 3 * p.pixels + block.first_pixel : nullptr;
  if (RGB)
    for (int k = 0; k < 3; ++k) factor[k] = p.rgb_factors[(block.sample * 3 + k) * p.channels + c];
  float sum_bias = 0.0f, sum_scale = 0.0f, sum0 = 0.0f, sum1 = 0.0f, sum2 = 0.0f;
#pragma omp simd reduction(+ : sum_bias, sum_scale, sum0, sum1, sum2)
  for (int32_t q = 0; q < block.pixels; ++q) {
    const float y = load(saved[q]);
    float g = load(grad[q]);
    if (RGB) {
      const float g0 = grad_rgb[q], g1 = grad_rgb[p.pixels + q], g2 = grad_rgb[2 * p.pixels + q];
      g += g0 * factor[0] + g1 * factor[1] + g2 * factor[2];
      sum0 += g0 * y;
      sum1 += g1 * y;
      sum2 += g2 * y;
    }
    const float gz = g * slope_within<ACT>(y, slope, gain, limit);
    sum_bias += gz;
    sum_scale += gz * (input_from_output<ACT>(y, inverse, inverse_below) - offset[q] - bias);
    rows[q] += gz;
    store(gz * scale, grad_x + q);
  }
  const float sum[5] = {sum_bias, sum_scale, sum0, sum1, sum2};
  for (int k = 0; k < (RGB ? 5 : 2); ++k)
    if (sums.kind[k]) sums.kind[k][c] = sum[k];
}

template <class T, int ACT, bool RGB>
void backward_block(const ModulatedEpilogueParams& p, const BlockPlan& plan, const ModulatedOffsets& offsets,
                    const Inversion& inv, const Block& block) {
  const int64_t channels = p.channels, area = p.batch * plan.blocks_per_sample * channels;
  float* row_of = p.workspace + block.index * channels;
  Sums sums{};
  if (p.grad_bias) sums.kind[0] = row_of + offsets.bias;
  if (p.grad_scale) sums.kind[1] = row_of + offsets.scale;
  for (int k = 0; k < 3 && p.grad_factors; ++k) sums.kind[2 + k] = row_of + offsets.factors + k * area;
  float offset[kPixels], total[kPixels];
  alignas(64) float rows[kPixels * kRows];
  noise_offsets(p, block, offset);
  if (p.channels_last) {
    for (int32_t i = 0; i < block.pixels * kRows; ++i) rows[i] = 0.0f;
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes)
      backward_lanes<T, ACT, RGB, true>(p, block, inv, c, kLanes, offset, sums, rows);
    if (c < channels)
      backward_lanes<T, ACT, RGB, false>(p, block, inv, c, static_cast<int32_t>(channels - c), offset, sums, rows);
  } else {
    for (int32_t q = 0; q < block.pixels; ++q) total[q] = 0.0f;
    for (int64_t c = 0; c < channels; ++c) backward_plane<T, ACT, RGB>(p, block, inv, c, offset, sums, total);
  }
  if (!p.grad_noise && !p.grad_strength) return;
  if (p.channels_last) {
    for (int32_t q = 0; q < block.pixels; ++q) total[q] = tree_sum(rows + q * kRows);
  }
  const float strength = p.strength ? *p.strength : 1.0f;
  if (p.grad_noise) {
    float* grad_noise = p.grad_noise + block.sample * p.pixels + block.first_pixel;
    for (int32_t q = 0; q < block.pixels; ++q) grad_noise[q] = total[q] * strength;
  }
  if (p.grad_strength) {
    const float* noise = p.noise + block.sample * p.noise_stride + block.first_pixel;
    float sum = 0.0f;
    for (int32_t q = 0; q < block.pixels; ++q) sum += total[q] * noise[q];
    p.workspace[offsets.strength + block.index] = sum;
  }
}

template <class T, int ACT, bool RGB>
void backward(const ModulatedEpilogueParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.pixels, p.channels);
  const ModulatedOffsets offsets = modulated_offsets(p, plan);
  const Inversion inv = inversion<T>(p);
  const int64_t each = plan.blocks_per_sample, blocks = p.batch * each, channels = p.channels;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i)
    backward_block<T, ACT, RGB>(p, plan, offsets, inv, block_at(plan, i, p.pixels));
  if (p.grad_bias) combine(p.workspace + offsets.bias, blocks, channels, p.grad_bias);
  if (p.grad_strength) combine(p.workspace + offsets.strength, blocks, 1, p.grad_strength);
  for (int64_t n = 0; n < p.batch; ++n) {
    const float* rows = p.workspace + n * each * channels;
    if (p.grad_scale) {
      float* out = p.grad_scale + n * channels;
      combine(rows + offsets.scale, each, channels, out);
      // The sums are of dL/dz * (scale * x); what multiplies scale is x.
      if (p.scale)
        for (int64_t c = 0; c < channels; ++c) out[c] /= p.scale[n * channels + c];
    }
    for (int k = 0; k < 3 && p.grad_factors; ++k)
      combine(rows + offsets.factors + k * blocks * channels, each, channels, p.grad_factors + (n * 3 + k) * channels);
  }
}

template <class T, bool SUM, bool FULL>
void style_lanes(const ModulatedStyleParams& p, const Block& block, int64_t first, int32_t count, float* sums) {
  const int32_t lanes = FULL ? kLanes : count;
  alignas(64) float style[kLanes], sum[kLanes] = {};
  for (int32_t i = 0; i < lanes; ++i) style[i] = p.style[block.sample * p.channels + first + i];
  const int64_t base = element(p, block, first, 0);
  for (int32_t q = 0; q < block.pixels; ++q) {
    const T* x = SUM ? static_cast<const T*>(p.x) + base + q * p.channels : nullptr;
    const T* grad = static_cast<const T*>(p.grad) + base + q * p.channels;
    T* grad_x = static_cast<T*>(p.grad_x) + base + q * p.channels;
#pragma omp simd
    for (int32_t i = 0; i < lanes; ++i) {
      const float g = load(grad[i]);
      if (SUM) sum[i] += g * load(x[i]);
      store(g * style[i], grad_x + i);
    }
  }
  if (SUM)
    for (int32_t i = 0; i < lanes; ++i) sums[first + i] = sum[i];
}

template <class T, bool SUM>
void style_block(const ModulatedStyleParams& p, const Block& block) {
  const int64_t channels = p.channels;
  float* sums = SUM ? p.workspace + block.index * channels : nullptr;
  if (p.channels_last) {
    int64_t c = 0;
    for (; c + kLanes <= channels; c += kLanes) style_lanes<T, SUM, true>(p, block, c, kLanes, sums);
    if (c < channels) style_lanes<T, SUM, false>(p, block, c, static_cast<int32_t>(channels - c), sums);
    return;
  }
  for (int64_t c = 0; c < channels; ++c) {
    const int64_t base = element(p, block, c, 0);
    const T* x = SUM ? static_cast<const T*>(p.x) + base : nullptr;
    const T* grad = static_cast<const T*>(p.grad) + base;
    T* grad_x = static_cast<T*>(p.grad_x) + base;
    const float style = p.style[block.sample * channels + c];
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int32_t q = 0; q < block.pixels; ++q) {
      const float g = load(grad[q]);
      if (SUM) sum += g * load(x[q]);
      store(g * style, grad_x + q);
    }
    if (SUM) sums[c] = sum;
  }
}

template <class T>
void style(const ModulatedStyleParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.pixels, p.channels);
  const int64_t each = plan.blocks_per_sample, blocks = p.batch * each;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const Block block = block_at(plan, i, p.pixels);
    p.grad_style ? style_block<T, true>(p, block) : style_block<T, false>(p, block);
  }
  for (int64_t n = 0; n < p.batch && p.grad_style; ++n)
    combine(p.workspace + n * each * p.channels, each, p.channels, p.grad_style + n * p.channels);
}

template <class T, int ACT, bool WRITE>
void forward(const ModulatedEpilogueParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.pixels, p.channels);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) forward_block<T, ACT, WRITE>(p, block_at(plan, i, p.pixels));
}

template <class T>
void run_forward(const ModulatedEpilogueParams& p, int threads) {
  if (!p.y) return forward<T, kLinear, false>(p, threads);
#define FE_CASE(ACT) \
  case ACT:          \
    return forward<T, ACT, true>(p, threads);
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

template <class T, int ACT>
void run_backward(const ModulatedEpilogueParams& p, int threads) {
  p.grad_rgb ? backward<T, ACT, true>(p, threads) : backward<T, ACT, false>(p, threads);
}

template <class T>
void run_backward(const ModulatedEpilogueParams& p, int threads) {
  if (p.act == kLeakyRelu) return run_backward<T, kLeakyRelu>(p, threads);
  if (p.act == kRelu) return run_backward<T, kRelu>(p, threads);
  run_backward<T, kLinear>(p, threads);
}

}  // namespace

void modulated_epilogue_fwd(const ModulatedEpilogueParams& p, int threads) {
  if (p.dtype == kFloat16) return run_forward<Float16>(p, threads);
  if (p.dtype == kBFloat16) return run_forward<BFloat16>(p, threads);
  run_forward<float>(p, threads);
}

void modulated_epilogue_bwd(const ModulatedEpilogueParams& p, int threads) {
  if (p.dtype == kFloat16) return run_backward<Float16>(p, threads);
  if (p.dtype == kBFloat16) return run_backward<BFloat16>(p, threads);
  run_backward<float>(p, threads);
}

void modulated_style_bwd(const ModulatedStyleParams& p, int threads) {
  if (p.dtype == kFloat16) return style<Float16>(p, threads);
  if (p.dtype == kBFloat16) return style<BFloat16>(p, threads);
  style<float>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
