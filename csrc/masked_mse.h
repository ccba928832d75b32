// SPDX-License-Identifier: Apache-2.0
// Masked mean squared error per sample: parameters and their checks.
#pragma once

#include <initializer_list>

#include "common.h"

namespace fe {

// a, b, grad_a, grad_b share one dtype and one layout (see noise_bias_act.h). A mask operand is planar, [batch or 1,
// pixels], of its own dtype; a null pointer stands for an absent one.
struct MaskedMseParams {
  const void* a;
  const void* b;
  MaskOperand mask, exclude, include;
  float* loss;            // [batch]
  float* inverse_weight;  // [batch]: 1 / the divisor; written forward, read backward
  const float* grad;      // [batch]
  void* grad_a;
  void* grad_b;
  double* workspace;  // masked_mse_fwd_workspace() doubles
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int32_t dtype;
  int32_t relax;
  bool channels_last;
  bool normalize_by_mask;
};

template <class Visit>
void visit_fields(MaskedMseParams& p, Visit&& visit) {
  visit("a", p.a), visit("b", p.b), visit("mask", p.mask), visit("exclude", p.exclude), visit("include", p.include);
  visit("loss", p.loss), visit("inverse_weight", p.inverse_weight), visit("grad", p.grad);
  visit("grad_a", p.grad_a), visit("grad_b", p.grad_b), visit("workspace", p.workspace);
  visit("batch", p.batch), visit("channels", p.channels), visit("pixels", p.pixels), visit("dtype", p.dtype);
  visit("relax", p.relax), visit("channels_last", p.channels_last), visit("normalize_by_mask", p.normalize_by_mask);
}

// Doubles of workspace: two sums a block.
inline int64_t masked_mse_fwd_workspace(const MaskedMseParams& p, bool cuda) {
  return 2 * p.batch * plan_blocks(cuda, p.pixels, p.channels).blocks_per_sample;
}

inline Error check_masked_mse(const MaskedMseParams& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.relax != 0 && p.relax != 1) return "relax is not a known rule";
  if (p.batch < 1 || p.channels < 1 || p.pixels < 1) return "a must not be empty";
  if (!p.a || !p.b || !p.inverse_weight) return "a, b and inverse_weight must not be null";
  for (const MaskOperand* m : {&p.mask, &p.exclude, &p.include}) {
    if (Error error = check_mask_operand(*m, p.pixels)) return error;
  }
  return nullptr;
}

inline Error check_masked_mse_fwd(const MaskedMseParams& p) {
  if (Error error = check_masked_mse(p)) return error;
  return p.loss && p.workspace ? nullptr : "loss and workspace must not be null";
}

inline Error check_masked_mse_bwd(const MaskedMseParams& p) {
  if (Error error = check_masked_mse(p)) return error;
  return p.grad && (p.grad_a || p.grad_b) ? nullptr : "grad and a gradient to write must not be null";
}

}  // namespace fe
