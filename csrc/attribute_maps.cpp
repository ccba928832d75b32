// SPDX-License-Identifier: Apache-2.0
#include "attribute_maps.h"

#include "elementwise.h"

namespace fe {
namespace FE_ISA {
namespace {

// Whether every value of the block is finite: only then may a weight of 0 be skipped, since 0 * NaN is NaN.
template <class T>
bool all_finite(const T* in, int64_t inputs, int64_t pixels, int32_t count) {
  float zero = 0.0f;
  for (int64_t i = 0; i < inputs; ++i) {
    const T* values = in + i * pixels;
#pragma omp simd reduction(+ : zero)
    for (int32_t q = 0; q < count; ++q) zero += load(values[q]) * 0.0f;
  }
  return zero == 0.0f;
}

// Calls body(output, its sums) for every output, sums[q] = the sum over i of weights[output * inputs + i] * in[i][q]. An
// attribute concerns a few parts of many: most weights are 0. Those that are not are taken two at a time.
template <class T, class Body>
void mix(const T* in, int64_t inputs, int64_t pixels, const float* weights, int64_t outputs, int32_t count, Body&& body) {
  const bool skips = all_finite(in, inputs, pixels, count);
  float sums[256];
  for (int64_t j = 0; j < outputs; ++j) {
    const float* own = weights + j * inputs;
    const auto next = [&](int64_t i) {
      while (i < inputs && skips && own[i] == 0.0f) ++i;
      return i;
    };
    for (int32_t q = 0; q < count; ++q) sums[q] = 0.0f;
    for (int64_t i = next(0); i < inputs;) {
      const int64_t second = next(i + 1);
      const bool pair = second < inputs;
      const T* a = in + i * pixels;
      const T* b = pair ? in + second * pixels : a;
      const float weight_a = own[i], weight_b = pair ? own[second] : 0.0f;
      if (pair) {
#pragma omp simd
        for (int32_t q = 0; q < count; ++q) sums[q] = (sums[q] + weight_a * load(a[q])) + weight_b * load(b[q]);
      } else {
#pragma omp simd
        for (int32_t q = 0; q < count; ++q) sums[q] += weight_a * load(a[q]);
      }
      i = pair ? next(second + 1) : inputs;
    }
    body(j, static_cast<const float*>(sums));
  }
}

template <class T>
void forward_block(const AttributeMapsParams& p, int64_t sample, int64_t first, int32_t count) {
  const T* probs = static_cast<const T*>(p.probs) + sample * p.parts * p.pixels + first;
  T* out = static_cast<T*>(p.out) + sample * p.attributes * p.pixels + first;
  mix(probs, p.parts, p.pixels, p.relation + sample * p.relation_stride, p.attributes, count,
      [&](int64_t a, const float* sums) {
        const float factor = p.attr[sample * p.attributes + a];
        T* row = out + a * p.pixels;
#pragma omp simd
        for (int32_t q = 0; q < count; ++q) store(factor * sums[q], row + q);
      });
}

template <class T>
void backward_block(const AttributeMapsParams& p, int64_t sample, int64_t first, int32_t count, float* partial) {
  const T* grad = static_cast<const T*>(p.grad) + sample * p.attributes * p.pixels + first;
  if (p.grad_probs) {
    T* grad_probs = static_cast<T*>(p.grad_probs) + sample * p.parts * p.pixels + first;
    mix(grad, p.attributes, p.pixels, p.transposed + sample * p.attributes * p.parts, p.parts, count,
        [&](int64_t k, const float* sums) {
          T* row = grad_probs + k * p.pixels;
#pragma omp simd
          for (int32_t q = 0; q < count; ++q) store(sums[q], row + q);
        });
  }
  if (!p.grad_attr) return;
  const T* probs = static_cast<const T*>(p.probs) + sample * p.parts * p.pixels + first;
  mix(probs, p.parts, p.pixels, p.relation + sample * p.relation_stride, p.attributes, count,
      [&](int64_t a, const float* sums) {
        const T* row = grad + a * p.pixels;
        float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
        for (int32_t q = 0; q < count; ++q) sum += load(row[q]) * sums[q];
        partial[a] = sum;
      });
}

template <class T>
void run(const AttributeMapsParams& p, int threads, bool is_backward) {
  const BlockPlan plan = plan_attribute_blocks(p.pixels);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t sample = i / plan.blocks_per_sample, first = i % plan.blocks_per_sample * plan.pixels_per_block;
    const int64_t left = p.pixels - first;
    const int32_t count = static_cast<int32_t>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
    if (is_backward)
      backward_block<T>(p, sample, first, count, p.grad_attr ? p.workspace + i * p.attributes : nullptr);
    else
      forward_block<T>(p, sample, first, count);
  }
  if (!is_backward || !p.grad_attr) return;
  for (int64_t n = 0; n < p.batch; ++n) {
    for (int64_t a = 0; a < p.attributes; ++a) {
      const float* partial = p.workspace + n * plan.blocks_per_sample * p.attributes + a;
      double sum = 0.0;
      for (int64_t b = 0; b < plan.blocks_per_sample; ++b) sum += static_cast<double>(partial[b * p.attributes]);
      p.grad_attr[n * p.attributes + a] = static_cast<float>(sum);
    }
  }
}

void run_dtype(const AttributeMapsParams& p, int threads, bool is_backward) {
  if (p.dtype == kFloat16) return run<Float16>(p, threads, is_backward);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads, is_backward);
  run<float>(p, threads, is_backward);
}

}  // namespace

void attribute_maps_fwd(const AttributeMapsParams& p, int threads) { run_dtype(p, threads, false); }
void attribute_maps_bwd(const AttributeMapsParams& p, int threads) { run_dtype(p, threads, true); }

}  // namespace FE_ISA
}  // namespace fe
