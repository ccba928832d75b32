// SPDX-License-Identifier: Apache-2.0
// Kullback-Leibler divergences per sample, of two-point and of normal distributions: parameters and their checks.
#pragma once

#include "common.h"

namespace fe {

// loss[n] = sum_a weight[a] * KL(|target - smoothing| || sigmoid(logits)) / attributes
struct BernoulliKlParams {
  const void* logits;   // [batch, attributes]
  const void* target;   // the same
  const float* weight;  // [attributes], or null for ones
  float* loss;          // [batch]
  const float* grad;    // [batch]
  void* grad_logits;    // of the logits' dtype
  int64_t batch;
  int64_t attributes;
  int32_t dtype;
  int32_t target_dtype;
  double smoothing;
};

// loss[n] = sum_i (mu^2 + e^logvar - 1 - logvar) / 2
struct GaussianKlParams {
  const void* mu;  // [batch, elements], like logvar and both gradients
  const void* logvar;
  float* loss;        // [batch]
  const float* grad;  // [batch]
  void* grad_mu;
  void* grad_logvar;
  double* workspace;  // gaussian_kl_fwd_workspace() doubles
  int64_t batch;
  int64_t elements;
  int32_t dtype;
};

template <class Visit>
void visit_fields(BernoulliKlParams& p, Visit&& visit) {
  visit("logits", p.logits), visit("target", p.target), visit("weight", p.weight), visit("loss", p.loss);
  visit("grad", p.grad), visit("grad_logits", p.grad_logits);
  visit("batch", p.batch), visit("attributes", p.attributes), visit("dtype", p.dtype);
  visit("target_dtype", p.target_dtype), visit("smoothing", p.smoothing);
}

template <class Visit>
void visit_fields(GaussianKlParams& p, Visit&& visit) {
  visit("mu", p.mu), visit("logvar", p.logvar), visit("loss", p.loss), visit("grad", p.grad);
  visit("grad_mu", p.grad_mu), visit("grad_logvar", p.grad_logvar), visit("workspace", p.workspace);
  visit("batch", p.batch), visit("elements", p.elements), visit("dtype", p.dtype);
}

// Doubles of workspace: one sum a block on the CPU; on a GPU one block of threads adds up a whole sample.
inline int64_t gaussian_kl_fwd_workspace(const GaussianKlParams& p, bool cuda) {
  return cuda ? 0 : p.batch * plan_cpu_blocks(p.elements, 1).blocks_per_sample;
}

inline Error check_bernoulli_kl(const BernoulliKlParams& p) {
  if (p.dtype < kFloat32 || p.dtype > kBFloat16) return "dtype is not supported";
  if (p.target_dtype < kFloat32 || p.target_dtype > kUInt8) return "target dtype is not supported";
  if (p.batch < 1 || p.attributes < 1) return "logits must not be empty";
  return p.logits && p.target ? nullptr : "logits and target must not be null";
}

inline Error check_bernoulli_kl_fwd(const BernoulliKlParams& p) {
  if (Error error = check_bernoulli_kl(p)) return error;
  return p.loss ? nullptr : "loss must not be null";
}

inline Error check_bernoulli_kl_bwd(const BernoulliKlParams& p) {
  if (Error error = check_bernoulli_kl(p)) return error;
  return p.grad && p.grad_logits ? nullptr : "grad and grad_logits must not be null";
}

inline Error check_gaussian_kl(const GaussianKlParams& p) {
  if (p.dtype < kFloat32 || p.dtype > kBFloat16) return "dtype is not supported";
  if (p.batch < 1 || p.elements < 1) return "mu must not be empty";
  return p.mu && p.logvar ? nullptr : "mu and logvar must not be null";
}

inline Error check_gaussian_kl_fwd(const GaussianKlParams& p) {
  if (Error error = check_gaussian_kl(p)) return error;
  return p.loss ? nullptr : "loss must not be null";
}

inline Error check_gaussian_kl_bwd(const GaussianKlParams& p) {
  if (Error error = check_gaussian_kl(p)) return error;
  return p.grad && (p.grad_mu || p.grad_logvar) ? nullptr : "grad and a gradient to write must not be null";
}

}  // namespace fe
