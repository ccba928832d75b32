// SPDX-License-Identifier: Apache-2.0
#include "masked_mse.h"

#include "rows.h"

namespace fe {
namespace FE_ISA {
namespace {

inline void load_mask(const MaskOperand& mask, int64_t sample, int64_t first, int32_t count, float* out) {
  load_row(mask.data, mask.dtype, sample * mask.stride + first, count, out);
}

void effective_mask(const MaskedMseParams& p, int64_t sample, int64_t first, int32_t count, float* mask) {
  if (p.mask.data) {
    load_mask(p.mask, sample, first, count, mask);
  } else {
    for (int32_t q = 0; q < count; ++q) mask[q] = 1.0f;
  }
  float operand[kMaxBlockPixels];
  const int32_t relax = p.relax;
  if (p.exclude.data) {
    load_mask(p.exclude, sample, first, count, operand);
#pragma omp simd
    for (int32_t q = 0; q < count; ++q) mask[q] = exclude_from(mask[q], operand[q], relax);
  }
  if (p.include.data) {
    load_mask(p.include, sample, first, count, operand);
#pragma omp simd
    for (int32_t q = 0; q < count; ++q) mask[q] = include_in(mask[q], operand[q], relax);
  }
}

template <class T>
double weighted_squares(const MaskedMseParams& p, int64_t sample, int64_t first, int32_t count, const float* mask) {
  const T* a = static_cast<const T*>(p.a);
  const T* b = static_cast<const T*>(p.b);
  double total = 0.0;
  if (p.channels_last) {
    for (int32_t q = 0; q < count; ++q) {
      const int64_t base = (sample * p.pixels + first + q) * p.channels;
      float sum = 0.0f;
      for (int64_t c = 0; c < p.channels; ++c) {
        const float difference = load(a[base + c]) - load(b[base + c]);
        sum += difference * difference;
      }
      total += static_cast<double>(mask[q] * sum);
    }
    return total;
  }
  for (int64_t c = 0; c < p.channels; ++c) {
    const int64_t base = (sample * p.channels + c) * p.pixels + first;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int32_t q = 0; q < count; ++q) {
      const float difference = load(a[base + q]) - load(b[base + q]);
      sum += mask[q] * (difference * difference);
    }
    total += static_cast<double>(sum);
  }
  return total;
}

template <class T>
void forward(const MaskedMseParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.pixels, p.channels);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t sample = i / plan.blocks_per_sample;
    const int64_t first = (i % plan.blocks_per_sample) * plan.pixels_per_block;
    const int64_t left = p.pixels - first;
    const int32_t count = static_cast<int32_t>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
    float mask[kMaxBlockPixels];
    effective_mask(p, sample, first, count, mask);
    double weight = 0.0;
    if (p.normalize_by_mask) {
#pragma omp simd reduction(+ : weight)
      for (int32_t q = 0; q < count; ++q) weight += static_cast<double>(mask[q]);
    }
    p.workspace[2 * i] = weighted_squares<T>(p, sample, first, count, mask);
    p.workspace[2 * i + 1] = weight;
  }
  for (int64_t n = 0; n < p.batch; ++n) {
    double squares = 0.0, weight = 0.0;
    for (int64_t i = n * plan.blocks_per_sample; i < (n + 1) * plan.blocks_per_sample; ++i) {
      squares += p.workspace[2 * i];
      weight += p.workspace[2 * i + 1];
    }
    const double divisor =
        static_cast<double>(p.channels) * (p.normalize_by_mask ? weight : static_cast<double>(p.pixels));
    const double inverse = divisor == 0.0 ? 0.0 : 1.0 / divisor;
    p.inverse_weight[n] = static_cast<float>(inverse);
    // An empty mask gives 0, unless the masked values hold a NaN, which is reported.
    p.loss[n] = static_cast<float>(squares * inverse);
  }
}

template <class T>
void backward(const MaskedMseParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.pixels, p.channels);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t sample = i / plan.blocks_per_sample;
    const int64_t first = (i % plan.blocks_per_sample) * plan.pixels_per_block;
    const int64_t left = p.pixels - first;
    const int32_t count = static_cast<int32_t>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
    const float factor = 2.0f * p.grad[sample] * p.inverse_weight[sample];
    const T* a = static_cast<const T*>(p.a);
    const T* b = static_cast<const T*>(p.b);
    T* grad_a = static_cast<T*>(p.grad_a);
    T* grad_b = static_cast<T*>(p.grad_b);
    float mask[kMaxBlockPixels];
    effective_mask(p, sample, first, count, mask);
    if (p.channels_last) {
      for (int32_t q = 0; q < count; ++q) {
        const int64_t base = (sample * p.pixels + first + q) * p.channels;
        for (int64_t c = 0; c < p.channels; ++c) {
          const float gradient = factor * mask[q] * (load(a[base + c]) - load(b[base + c]));
          if (grad_a) store(gradient, grad_a + base + c);
          if (grad_b) store(-gradient, grad_b + base + c);
        }
      }
      continue;
    }
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t base = (sample * p.channels + c) * p.pixels + first;
      if (grad_a) {
#pragma omp simd
        for (int32_t q = 0; q < count; ++q)
          store(factor * mask[q] * (load(a[base + q]) - load(b[base + q])), grad_a + base + q);
      }
      if (grad_b) {
#pragma omp simd
        for (int32_t q = 0; q < count; ++q)
          store(factor * mask[q] * (load(b[base + q]) - load(a[base + q])), grad_b + base + q);
      }
    }
  }
}

}  // namespace

void masked_mse_fwd(const MaskedMseParams& p, int threads) {
  if (p.dtype == kFloat16) return forward<Float16>(p, threads);
  if (p.dtype == kBFloat16) return forward<BFloat16>(p, threads);
  forward<float>(p, threads);
}

void masked_mse_bwd(const MaskedMseParams& p, int threads) {
  if (p.dtype == kFloat16) return backward<Float16>(p, threads);
  if (p.dtype == kBFloat16) return backward<BFloat16>(p, threads);
  backward<float>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
