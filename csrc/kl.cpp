// SPDX-License-Identifier: Apache-2.0
#include "kl.h"

#include "rows.h"

namespace fe {
namespace FE_ISA {
namespace {

template <class T>
void bernoulli(const BernoulliKlParams& p, int threads, bool is_backward) {
  const double share = 1.0 / static_cast<double>(p.attributes);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t n = 0; n < p.batch; ++n) {
    const T* logits = static_cast<const T*>(p.logits) + n * p.attributes;
    T* grad_logits = is_backward ? static_cast<T*>(p.grad_logits) + n * p.attributes : nullptr;
    double sum = 0.0;
    for (int64_t first = 0; first < p.attributes; first += kMaxBlockPixels) {
      const int64_t left = p.attributes - first;
      const int32_t count = static_cast<int32_t>(left < kMaxBlockPixels ? left : kMaxBlockPixels);
      float target[kMaxBlockPixels];
      load_row(p.target, p.target_dtype, n * p.attributes + first, count, target);
      for (int32_t a = 0; a < count; ++a) {
        const double logit = load(logits[first + a]), t = smoothed(target[a], p.smoothing);
        const double weight = p.weight ? p.weight[first + a] * share : share;
        if (is_backward)
          store(static_cast<float>(p.grad[n] * weight * (logistic(logit) - t)), grad_logits + first + a);
        else
          sum += weight * bernoulli_divergence(logit, t);
      }
    }
    if (!is_backward) p.loss[n] = static_cast<float>(sum);
  }
}

template <class T>
void gaussian_forward(const GaussianKlParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.elements, 1);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const PixelBlock block = pixel_block(plan, i, p.elements);
    const T* mu = static_cast<const T*>(p.mu) + block.sample * p.elements + block.first;
    const T* logvar = static_cast<const T*>(p.logvar) + block.sample * p.elements + block.first;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int32_t q = 0; q < block.count; ++q) {
      const float m = load(mu[q]);
      sum += m * m + exponential_excess(load(logvar[q]));
    }
    p.workspace[i] = static_cast<double>(sum);
  }
  for (int64_t n = 0; n < p.batch; ++n) {
    double sum = 0.0;
    for (int64_t i = n * plan.blocks_per_sample; i < (n + 1) * plan.blocks_per_sample; ++i) sum += p.workspace[i];
    p.loss[n] = static_cast<float>(0.5 * sum);
  }
}

template <class T>
void gaussian_backward(const GaussianKlParams& p, int threads) {
  const BlockPlan plan = plan_cpu_blocks(p.elements, 1);
  const int64_t blocks = p.batch * plan.blocks_per_sample;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const PixelBlock block = pixel_block(plan, i, p.elements);
    const int64_t base = block.sample * p.elements + block.first;
    const float grad = p.grad[block.sample];
    if (p.grad_mu) {
      const T* mu = static_cast<const T*>(p.mu) + base;
      T* grad_mu = static_cast<T*>(p.grad_mu) + base;
#pragma omp simd
      for (int32_t q = 0; q < block.count; ++q) store(grad * load(mu[q]), grad_mu + q);
    }
    if (p.grad_logvar) {
      const T* logvar = static_cast<const T*>(p.logvar) + base;
      T* grad_logvar = static_cast<T*>(p.grad_logvar) + base;
#pragma omp simd
      for (int32_t q = 0; q < block.count; ++q)
        store(0.5f * grad * exponential_minus_one(load(logvar[q])), grad_logvar + q);
    }
  }
}

void bernoulli_of_dtype(const BernoulliKlParams& p, int threads, bool is_backward) {
  if (p.dtype == kFloat16) return bernoulli<Float16>(p, threads, is_backward);
  if (p.dtype == kBFloat16) return bernoulli<BFloat16>(p, threads, is_backward);
  bernoulli<float>(p, threads, is_backward);
}

}  // namespace

void bernoulli_kl_fwd(const BernoulliKlParams& p, int threads) { bernoulli_of_dtype(p, threads, false); }
void bernoulli_kl_bwd(const BernoulliKlParams& p, int threads) { bernoulli_of_dtype(p, threads, true); }

void gaussian_kl_fwd(const GaussianKlParams& p, int threads) {
  if (p.dtype == kFloat16) return gaussian_forward<Float16>(p, threads);
  if (p.dtype == kBFloat16) return gaussian_forward<BFloat16>(p, threads);
  gaussian_forward<float>(p, threads);
}

void gaussian_kl_bwd(const GaussianKlParams& p, int threads) {
  if (p.dtype == kFloat16) return gaussian_backward<Float16>(p, threads);
  if (p.dtype == kBFloat16) return gaussian_backward<BFloat16>(p, threads);
  gaussian_backward<float>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
