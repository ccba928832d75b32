// SPDX-License-Identifier: Apache-2.0
// Masked mean squared error per sample: parameters and entry points.
#pragma once

#include <initializer_list>

#include "common.h"

namespace fe {

// a, b, grad_a, grad_b share one dtype and one layout (see noise_bias_act.h). A mask operand is planar, [batch or 1,
// pixels], of its own dtype; a null pointer stands for an absent one.
struct MaskOperand {
  const void* data;
  int64_t stride;  // pixels, or 0 when one map serves the batch
  int32_t dtype;
};

struct MaskedMseParams {
  const void* a;
  const void* b;
  MaskOperand mask, exclude, include;
  float* loss;            // [batch]
  float* inverse_weight;  // [batch]: 1 / the divisor; written forward, read backward
  const float* grad;      // [batch]
  void* grad_a;
  void* grad_b;
  double* workspace;  // 2 * batch * blocks
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int32_t dtype;
  int32_t relax;
  bool channels_last;
  bool normalize_by_mask;
};

inline Error check_mask_operand(const MaskOperand& m, int64_t pixels) {
  if (!m.data) return nullptr;
  if (m.dtype < kFloat32 || m.dtype > kUInt8) return "mask dtype is not supported";
  if (m.stride != 0 && m.stride != pixels) return "mask must have the pixels of a";
  return nullptr;
}

inline Error check_masked_mse(const MaskedMseParams& p, bool backward) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.relax != 0 && p.relax != 1) return "relax is not a known rule";
  if (p.batch < 1 || p.channels < 1 || p.pixels < 1) return "a must not be empty";
  if (!p.a || !p.b || !p.inverse_weight) return "a, b and inverse_weight must not be null";
  if (!backward && (!p.loss || !p.workspace)) return "loss and workspace must not be null";
  if (backward && (!p.grad || (!p.grad_a && !p.grad_b))) return "grad and a gradient to write must not be null";
  for (const MaskOperand* m : {&p.mask, &p.exclude, &p.include}) {
    if (Error error = check_mask_operand(*m, p.pixels)) return error;
  }
  return nullptr;
}

#define FE_DECLARE_MASKED_MSE(ISA)                                    \
  namespace ISA {                                                     \
  void masked_mse_fwd(const MaskedMseParams& params, int threads);    \
  void masked_mse_bwd(const MaskedMseParams& params, int threads);    \
  }

Error masked_mse_fwd_cuda(const MaskedMseParams& params, int device, void* stream);
Error masked_mse_bwd_cuda(const MaskedMseParams& params, int device, void* stream);

}  // namespace fe
