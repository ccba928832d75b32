// SPDX-License-Identifier: Apache-2.0
#include "alpha_blend.h"

#include "rows.h"

namespace fe {
namespace FE_ISA {
namespace {

template <class F, class B, class Y>
void forward(const AlphaBlendParams& p, int threads) {
  constexpr bool levels = sizeof(Y) == 1;
  const BlockPlan plan = plan_cpu_blocks(p.pixels, p.channels);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const PixelBlock block = pixel_block(plan, i, p.pixels);
    float mask[kMaxBlockPixels];
    load_row(p.mask.data, p.mask.dtype, block.sample * p.mask.stride + block.first, block.count, mask);
    for_masked_runs(block, p.channels, p.pixels, p.channels_last, mask,
                    [&p](int64_t base, const float* m, int32_t count) {
                      const F* fg = static_cast<const F*>(p.fg) + base;
                      const B* bg = static_cast<const B*>(p.bg) + base;
                      Y* y = static_cast<Y*>(p.y) + base;
#pragma omp simd
                      for (int32_t q = 0; q < count; ++q)
                        store(blend(image_value<levels>(fg[q]), image_value<levels>(bg[q]), m[q]), y + q);
                    });
  }
}

template <class F, class B>
void forward_to(const AlphaBlendParams& p, int threads) {
  p.y_dtype == kUInt8 ? forward<F, B, uint8_t>(p, threads) : forward<F, B, F>(p, threads);
}

template <class T>
void forward_of(const AlphaBlendParams& p, int threads) {
  if (p.fg_dtype == kUInt8) return forward<uint8_t, T, uint8_t>(p, threads);
  p.bg_dtype == kUInt8 ? forward_to<T, uint8_t>(p, threads) : forward_to<T, T>(p, threads);
}

template <class T, class B>
void mask_gradient(const AlphaBlendParams& p, const PixelBlock& block) {
  const T* grad = static_cast<const T*>(p.grad);
  const T* fg = static_cast<const T*>(p.fg);
  const B* bg = static_cast<const B*>(p.bg);
  float rows[kMaxBlockPixels];
  if (p.channels_last) {
    for (int32_t q = 0; q < block.count; ++q) {
      const int64_t base = (block.sample * p.pixels + block.first + q) * p.channels;
      float sum = 0.0f;
      for (int64_t c = 0; c < p.channels; ++c)
        sum += load(grad[base + c]) * (load(fg[base + c]) - image_value<false>(bg[base + c]));
      rows[q] = sum;
    }
  } else {
    for (int32_t q = 0; q < block.count; ++q) rows[q] = 0.0f;
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t base = (block.sample * p.channels + c) * p.pixels + block.first;
#pragma omp simd
      for (int32_t q = 0; q < block.count; ++q)
        rows[q] += load(grad[base + q]) * (load(fg[base + q]) - image_value<false>(bg[base + q]));
    }
  }
  float* out = p.grad_mask + block.sample * p.pixels + block.first;
  for (int32_t q = 0; q < block.count; ++q) out[q] = rows[q];
}

template <class T>
void backward(const AlphaBlendParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.pixels, p.channels);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const PixelBlock block = pixel_block(plan, i, p.pixels);
    float mask[kMaxBlockPixels];
    load_row(p.mask.data, p.mask.dtype, block.sample * p.mask.stride + block.first, block.count, mask);
    for_masked_runs(block, p.channels, p.pixels, p.channels_last, mask,
                    [&p](int64_t base, const float* m, int32_t count) {
                      const T* grad = static_cast<const T*>(p.grad) + base;
                      if (p.grad_fg) {
                        T* grad_fg = static_cast<T*>(p.grad_fg) + base;
#pragma omp simd
                        for (int32_t q = 0; q < count; ++q) store(m[q] * load(grad[q]), grad_fg + q);
                      }
                      if (p.grad_bg) {
                        T* grad_bg = static_cast<T*>(p.grad_bg) + base;
#pragma omp simd
                        for (int32_t q = 0; q < count; ++q) store((1.0f - m[q]) * load(grad[q]), grad_bg + q);
                      }
                    });
    if (p.grad_mask) p.bg_dtype == kUInt8 ? mask_gradient<T, uint8_t>(p, block) : mask_gradient<T, T>(p, block);
  }
}

}  // namespace

void alpha_blend_fwd(const AlphaBlendParams& p, int threads) {
  if (p.fg_dtype == kUInt8 && p.bg_dtype == kUInt8) return forward<uint8_t, uint8_t, uint8_t>(p, threads);
  const int32_t dtype = p.fg_dtype == kUInt8 ? p.bg_dtype : p.fg_dtype;
  if (dtype == kFloat16) return forward_of<Float16>(p, threads);
  if (dtype == kBFloat16) return forward_of<BFloat16>(p, threads);
  forward_of<float>(p, threads);
}

void alpha_blend_bwd(const AlphaBlendParams& p, int threads) {
  if (p.fg_dtype == kFloat16) return backward<Float16>(p, threads);
  if (p.fg_dtype == kBFloat16) return backward<BFloat16>(p, threads);
  backward<float>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
