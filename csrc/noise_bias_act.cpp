// SPDX-License-Identifier: Apache-2.0
#include "noise_bias_act.h"

#include "elementwise.h"
#include "sums.h"

namespace fe {
namespace FE_ISA {
namespace {

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

inline const float* noise_row(const NoiseBiasActParams& p, const Block& block) {
  return p.noise ? p.noise + block.sample * p.noise_stride + block.first_pixel : nullptr;
}

inline float noise_strength(const NoiseBiasActParams& p) { return p.strength ? *p.strength : 1.0f; }

template <class T, int ACT, bool SCALE, bool BIAS>
void forward_pixels_last(const NoiseBiasActParams& p, const Block& block) {
  // channels_last: a vector runs over the channels of one pixel, whose noise is a scalar.
  const int64_t channels = p.channels;
  const int64_t base = (block.sample * p.pixels + block.first_pixel) * channels;
  const float* scale = SCALE ? p.scale + block.sample * channels : nullptr;
  const float* noise = noise_row(p, block);
  const float strength = noise_strength(p), slope = p.slope, gain = p.gain, clamp = p.clamp;
  for (int32_t q = 0; q < block.pixels; ++q) {
    const T* x = static_cast<const T*>(p.x) + base + q * channels;
    T* y = static_cast<T*>(p.y) + base + q * channels;
    const float* bias = p.bias;
    const float offset = noise ? noise[q] * strength : 0.0f;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      float z = load(x[c]);
      if (SCALE) z *= scale[c];
      z += offset;
      if (BIAS) z += bias[c];
      store(finish<ACT>(z, slope, gain, clamp), y + c);
    }
  }
}

template <class T, int ACT, bool NOISE>
void forward_planes(const NoiseBiasActParams& p, const Block& block) {
  // Planar: a vector runs over the pixels of one channel, whose scale and bias are scalars.
  const float* noise = noise_row(p, block);
  const float strength = noise_strength(p), slope = p.slope, gain = p.gain, clamp = p.clamp;
  const int32_t pixels = block.pixels;
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t base = (block.sample * p.channels + c) * p.pixels + block.first_pixel;
    const T* x = static_cast<const T*>(p.x) + base;
    T* y = static_cast<T*>(p.y) + base;
    const float scale = p.scale ? p.scale[block.sample * p.channels + c] : 1.0f;
    const float bias = p.bias ? p.bias[c] : 0.0f;
#pragma omp simd
    for (int32_t q = 0; q < pixels; ++q) {
      float z = load(x[q]) * scale;
      if (NOISE) z += noise[q] * strength;
      z += bias;
      store(finish<ACT>(z, slope, gain, clamp), y + q);
    }
  }
}

template <class T, int ACT>
void forward_block(const NoiseBiasActParams& p, const Block& block) {
  if (!p.channels_last) {
    p.noise ? forward_planes<T, ACT, true>(p, block) : forward_planes<T, ACT, false>(p, block);
  } else if (p.scale) {
    p.bias ? forward_pixels_last<T, ACT, true, true>(p, block) : forward_pixels_last<T, ACT, true, false>(p, block);
  } else {
    p.bias ? forward_pixels_last<T, ACT, false, true>(p, block) : forward_pixels_last<T, ACT, false, false>(p, block);
  }
}

// One run of `count` elements: contiguous in memory, with either one pixel and many channels (scale, bias vectors, noise
// scalar) or one channel and many pixels (the reverse). Writes dL/dz to `gz`, which stays in the L1 cache for the sums.
template <class T, int ACT, bool FROM_INPUT>
void backward_run(const NoiseBiasActParams& p, int64_t base, int64_t count, const float* scale_row, float scale,
                  const float* bias_row, float bias, const float* noise, float strength, float offset, float clamp,
                  float* gz) {
  const T* grad = static_cast<const T*>(p.grad) + base;
  const T* saved = static_cast<const T*>(p.saved) + base;
  T* grad_x = static_cast<T*>(p.grad_x) + base;
  const float slope = p.slope, gain = p.gain;
  if (FROM_INPUT) {
    // gz holds z first: separate simple loops vectorise, one loop with every operand optional does not.
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) gz[i] = load(saved[i]) * scale + offset + bias;
    if (scale_row) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) gz[i] = load(saved[i]) * scale_row[i] + offset + bias;
    }
    if (noise) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) gz[i] += noise[i] * strength;
    }
    if (bias_row) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) gz[i] += bias_row[i];
    }
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) gz[i] = load(grad[i]) * slope_from_input<ACT>(gz[i], slope, gain, clamp);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      gz[i] = load(grad[i]) * slope_from_output<ACT>(load(saved[i]), slope, gain, clamp);
  }
  if (scale_row) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(gz[i] * scale_row[i], grad_x + i);
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(gz[i] * scale, grad_x + i);
  }
}

template <class T, int ACT, bool FROM_INPUT>
void backward_block(const NoiseBiasActParams& p, const BlockPlan& plan, const Block& block) {
  const NoiseBiasActOffsets offsets = noise_bias_act_offsets(p, plan);
  const int64_t channels = p.channels;
  float* bias_sums = p.grad_bias ? p.workspace + offsets.bias + block.index * channels : nullptr;
  float* scale_sums = p.grad_scale ? p.workspace + offsets.scale + block.index * channels : nullptr;
  const float* noise = noise_row(p, block);
  const float strength = noise_strength(p);
  const float* scale_row = p.scale ? p.scale + block.sample * channels : nullptr;
  const bool wants_rows = p.grad_noise || p.grad_strength;
  float gz[kMaxBlockPixels];
  float rows[kMaxBlockPixels];  // sum of dL/dz over the channels of each pixel

  float clamp = p.clamp;
  if (!FROM_INPUT && clamp >= 0.0f) {
    T rounded;
    store(clamp, &rounded);
    clamp = load(rounded);
  }

  for (int64_t c = 0; c < channels; ++c) {
    if (bias_sums) bias_sums[c] = 0.0f;
    if (scale_sums) scale_sums[c] = 0.0f;
  }
  for (int32_t q = 0; q < block.pixels; ++q) rows[q] = 0.0f;

  if (p.channels_last) {
    // Without a scale, and from the output, dL/dz needs nothing that varies with the pixel or the channel: several
    // pixels make one run, which saves most of the loop overhead where there are few channels.
    const bool grouped = !FROM_INPUT && !scale_row && 2 * channels <= kMaxBlockPixels;
    const int32_t group = grouped ? static_cast<int32_t>(kMaxBlockPixels / channels) : 1;
    for (int32_t q = 0; q < block.pixels; q += group) {
      const int32_t members = block.pixels - q < group ? block.pixels - q : group;
      const float offset = noise ? noise[q] * strength : 0.0f;
      for (int64_t first = 0; first < channels; first += kMaxBlockPixels) {
        const int64_t count = channels - first < kMaxBlockPixels ? channels - first : kMaxBlockPixels;
        const int64_t base = (block.sample * p.pixels + block.first_pixel + q) * channels + first;
        backward_run<T, ACT, FROM_INPUT>(p, base, count * members, scale_row ? scale_row + first : nullptr, 1.0f,
                                         p.bias ? p.bias + first : nullptr, 0.0f, nullptr, 0.0f, offset, clamp, gz);
        for (int32_t member = 0; member < members; ++member) {
          const float* run = gz + member * count;
          if (bias_sums) {
            float* sums = bias_sums + first;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) sums[i] += run[i];
          }
          if (scale_sums) {
            float* sums = scale_sums + first;
            const T* x = static_cast<const T*>(p.saved) + base;
#pragma omp simd
            for (int64_t i = 0; i < count; ++i) sums[i] += run[i] * load(x[i]);
          }
          if (wants_rows) {
            float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
            for (int64_t i = 0; i < count; ++i) sum += run[i];
            rows[q + member] += sum;
          }
        }
      }
    }
  } else {
    const int64_t count = block.pixels;
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t base = (block.sample * channels + c) * p.pixels + block.first_pixel;
      backward_run<T, ACT, FROM_INPUT>(p, base, count, nullptr, scale_row ? scale_row[c] : 1.0f, nullptr,
                                       p.bias ? p.bias[c] : 0.0f, noise, strength, 0.0f, clamp, gz);
      if (bias_sums) {
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i) sum += gz[i];
        bias_sums[c] = sum;
      }
      if (scale_sums) {
        const T* x = static_cast<const T*>(p.saved) + base;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int64_t i = 0; i < count; ++i) sum += gz[i] * load(x[i]);
        scale_sums[c] = sum;
      }
      if (wants_rows) {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) rows[i] += gz[i];
      }
    }
  }

  if (p.grad_strength) {
    float sum = 0.0f;
    for (int32_t q = 0; q < block.pixels; ++q) sum += rows[q] * noise[q];
    p.workspace[offsets.strength + block.index] = sum;
  }
  if (p.grad_noise) {
    float* grad_noise = p.grad_noise + block.sample * p.pixels + block.first_pixel;
    for (int32_t q = 0; q < block.pixels; ++q) grad_noise[q] = rows[q] * strength;
  }
}

template <class T, int ACT>
void forward(const NoiseBiasActParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.pixels, p.channels);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) forward_block<T, ACT>(p, block_at(plan, i, p.pixels));
}

template <class T, int ACT>
void backward(const NoiseBiasActParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.pixels, p.channels);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
  // Smooth activations always save their input.
  constexpr bool can_use_output = ACT == kLinear || ACT == kRelu || ACT == kLeakyRelu;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const Block block = block_at(plan, i, p.pixels);
    if (can_use_output && !p.saved_is_input)
      backward_block<T, can_use_output ? ACT : kLinear, false>(p, plan, block);
    else
      backward_block<T, ACT, true>(p, plan, block);
  }
  const NoiseBiasActOffsets offsets = noise_bias_act_offsets(p, plan);
  if (p.grad_bias) combine(p.workspace + offsets.bias, blocks, p.channels, p.grad_bias);
  if (p.grad_strength) combine(p.workspace + offsets.strength, blocks, 1, p.grad_strength);
  if (p.grad_scale) {
    const int64_t rows = plan.blocks_per_sample * p.channels;
    for (int64_t n = 0; n < p.batch; ++n)
      combine(p.workspace + offsets.scale + n * rows, plan.blocks_per_sample, p.channels, p.grad_scale + n * p.channels);
  }
}

template <class T>
void run(const NoiseBiasActParams& p, int threads, bool is_backward) {
#define FE_CASE(ACT) \
  case ACT:          \
    return is_backward ? backward<T, ACT>(p, threads) : forward<T, ACT>(p, threads);
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

void run_dtype(const NoiseBiasActParams& p, int threads, bool is_backward) {
  if (p.dtype == kFloat16) return run<Float16>(p, threads, is_backward);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads, is_backward);
  run<float>(p, threads, is_backward);
}

}  // namespace

void noise_bias_act_fwd(const NoiseBiasActParams& p, int threads) { run_dtype(p, threads, false); }
void noise_bias_act_bwd(const NoiseBiasActParams& p, int threads) { run_dtype(p, threads, true); }

}  // namespace FE_ISA
}  // namespace fe
