// SPDX-License-Identifier: Apache-2.0
#include "masked_mse.h"

#include "rows.h"

namespace fe {
namespace FE_ISA {
namespace {

constexpr int32_t kSumLength = 256;  // a float32 sum's rounding error grows with its length
constexpr int64_t kStreamedBytes = int64_t{8} << 20;  // larger gradients rarely wait in a cache for their reader

// A block's pixels of a mask of half the size, row by row: two rows of the mask, mixed, then spread to pairs of columns.
void load_halved(const MaskedMseParams& p, const MaskOperand& mask, const PixelBlock& block, float* out) {
  const int64_t columns = p.width / 2, rows = p.pixels / p.width / 2, sample = block.sample * mask.stride;
  for (int32_t done = 0; done < block.count;) {
    const int64_t y = (block.first + done) / p.width, x = (block.first + done) % p.width;
    const int64_t left = p.width - x;
    const int32_t count = left < block.count - done ? static_cast<int32_t>(left) : block.count - done;
    const int64_t first = x / 2;
    const int32_t pairs = static_cast<int32_t>((x + count - 1) / 2 - first) + 1;
    // near[j] is column first - 1 + j, for j = 0 .. pairs + 1; what lies outside repeats the column at the edge.
    float near[kMaxBlockPixels / 2 + 3], far[kMaxBlockPixels / 2 + 3], spread[kMaxBlockPixels + 2];
    const int32_t start = first > 0 ? 0 : 1, end = first + pairs < columns ? pairs + 1 : pairs;
    const HalfTap tap = half_tap(y, rows);
    const int64_t column = sample + first - 1 + start;
    load_row(mask.data, mask.dtype, column + tap.low * columns, end - start + 1, near + start);
    load_row(mask.data, mask.dtype, column + tap.high * columns, end - start + 1, far + start);
#pragma omp simd
    for (int32_t j = start; j <= end; ++j) near[j] = mix(near[j], far[j], tap.weight);
    if (start == 1) near[0] = near[1];
    if (end == pairs) near[pairs + 1] = near[pairs];
#pragma omp simd
    for (int32_t j = 0; j < pairs; ++j) {
      spread[2 * j] = mix(near[j + 1], near[j], 0.25f);
      spread[2 * j + 1] = mix(near[j + 1], near[j + 2], 0.25f);
    }
    std::memcpy(out + done, spread + x % 2, sizeof(float) * static_cast<size_t>(count));
    done += count;
  }
}

inline void load_mask(const MaskedMseParams& p, const MaskOperand& mask, bool halved, const PixelBlock& block,
                      float* out) {
  if (halved) return load_halved(p, mask, block, out);
  load_row(mask.data, mask.dtype, block.sample * mask.stride + block.first, block.count, out);
}

// `relax` is a constant: GCC takes a branch out of a loop by making two loops, of which it then vectorises one.
template <int32_t RELAX>
void relax_mask(const MaskedMseParams& p, const PixelBlock& block, float* mask) {
  float operand[kMaxBlockPixels];
  if (p.exclude.data) {
    load_mask(p, p.exclude, p.exclude_halved, block, operand);
#pragma omp simd
    for (int32_t q = 0; q < block.count; ++q) mask[q] = exclude_from(mask[q], operand[q], RELAX);
  }
  if (p.include.data) {
    load_mask(p, p.include, p.include_halved, block, operand);
#pragma omp simd
    for (int32_t q = 0; q < block.count; ++q) mask[q] = include_in(mask[q], operand[q], RELAX);
  }
}

// The weights of a block's pixels: a row of the mask itself where that will do, else `buffer`.
const float* effective_mask(const MaskedMseParams& p, const PixelBlock& block, float* buffer) {
  const bool relaxed = p.exclude.data || p.include.data;
  if (p.mask.data && p.mask.dtype == kFloat32 && !relaxed && !p.mask_halved)
    return static_cast<const float*>(p.mask.data) + block.sample * p.mask.stride + block.first;
  if (p.mask.data) {
    load_mask(p, p.mask, p.mask_halved, block, buffer);
  } else {
    for (int32_t q = 0; q < block.count; ++q) buffer[q] = 1.0f;
  }
  if (relaxed) p.relax == kClamp ? relax_mask<kClamp>(p, block, buffer) : relax_mask<kMinMax>(p, block, buffer);
  return buffer;
}

template <class T>
double weighted_squares(const T* a, const T* b, const float* mask, int32_t count) {
  double total = 0.0;
  for (int32_t first = 0; first < count; first += kSumLength) {
    const int32_t end = count - first < kSumLength ? count : first + kSumLength;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int32_t q = first; q < end; ++q) {
      const float difference = load(a[q]) - load(b[q]);
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
    const PixelBlock block = pixel_block(plan, i, p.pixels);
    float buffer[kMaxBlockPixels];
    const float* mask = effective_mask(p, block, buffer);
    double squares = 0.0, weight = 0.0;
    if (p.normalize_by_mask) {
#pragma omp simd reduction(+ : weight)
      for (int32_t q = 0; q < block.count; ++q) weight += static_cast<double>(mask[q]);
    }
    for_masked_runs(block, p.channels, p.pixels, p.channels_last, mask,
                    [&p, &squares](int64_t base, const float* m, int32_t count) {
                      squares += weighted_squares(static_cast<const T*>(p.a) + base, static_cast<const T*>(p.b) + base,
                                                  m, count);
                    });
    p.workspace[2 * i] = squares;
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
void gradient_row(const T* a, const T* b, const float* weight, int32_t count, T* out) {
#pragma omp simd
  for (int32_t q = 0; q < count; ++q) store(weight[q] * (load(a[q]) - load(b[q])), out + q);
}

template <class T>
void gradient_row(const T* a, const T* b, const float* weight, int32_t count, bool streamed, T* out) {
  if (!streamed) return gradient_row(a, b, weight, count, out);
  T row[kMaxBlockPixels];
  gradient_row(a, b, weight, count, row);
  stream_row(row, static_cast<int64_t>(sizeof(T)) * count, out);
}

template <class T>
void backward(const MaskedMseParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.pixels, p.channels);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
  const bool streamed = p.batch * p.channels * p.pixels * static_cast<int64_t>(sizeof(T)) > kStreamedBytes;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static) nowait
    for (int64_t i = 0; i < blocks; ++i) {
      const PixelBlock block = pixel_block(plan, i, p.pixels);
      float buffer[kMaxBlockPixels];
      const float* mask = effective_mask(p, block, buffer);
      const float factor = 2.0f * p.grad[block.sample] * p.inverse_weight[block.sample];
#pragma omp simd
      for (int32_t q = 0; q < block.count; ++q) buffer[q] = factor * mask[q];
      for_masked_runs(block, p.channels, p.pixels, p.channels_last, buffer,
                      [&p, streamed](int64_t base, const float* weight, int32_t count) {
                        const T* a = static_cast<const T*>(p.a) + base;
                        const T* b = static_cast<const T*>(p.b) + base;
                        if (p.grad_a) gradient_row(a, b, weight, count, streamed, static_cast<T*>(p.grad_a) + base);
                        if (p.grad_b) gradient_row(b, a, weight, count, streamed, static_cast<T*>(p.grad_b) + base);
                      });
    }
    if (streamed) finish_streams();
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
