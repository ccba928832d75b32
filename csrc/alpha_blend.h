// SPDX-License-Identifier: Apache-2.0
// y = bg + mask * (fg - bg), exact where the mask is 0 or 1: parameters and their checks.
#pragma once

#include <initializer_list>

#include "common.h"

namespace fe {

// Images share one layout (see noise_bias_act.h). fg and bg are of one floating dtype, or either is uint8, which stands for
// value / 127.5 - 1. y is of fg's dtype or uint8. Gradients are of fg's dtype; grad_mask is float32, [batch, pixels].
struct AlphaBlendParams {
  const void* fg;
  const void* bg;
  MaskOperand mask;
  void* y;
  const void* grad;  // dL/dy
  void* grad_fg;
  void* grad_bg;
  float* grad_mask;
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int32_t fg_dtype;
  int32_t bg_dtype;
  int32_t y_dtype;
  bool channels_last;
};

template <class Visit>
void visit_fields(AlphaBlendParams& p, Visit&& visit) {
  visit("fg", p.fg), visit("bg", p.bg), visit("mask", p.mask), visit("y", p.y), visit("grad", p.grad);
  visit("grad_fg", p.grad_fg), visit("grad_bg", p.grad_bg), visit("grad_mask", p.grad_mask);
  visit("batch", p.batch), visit("channels", p.channels), visit("pixels", p.pixels);
  visit("fg_dtype", p.fg_dtype), visit("bg_dtype", p.bg_dtype), visit("y_dtype", p.y_dtype);
  visit("channels_last", p.channels_last);
}

inline Error check_alpha_blend(const AlphaBlendParams& p) {
  for (int32_t dtype : {p.fg_dtype, p.bg_dtype, p.y_dtype})
    if (dtype < kFloat32 || dtype > kUInt8) return "dtype is not supported";
  if (p.fg_dtype != kUInt8 && p.bg_dtype != kUInt8 && p.fg_dtype != p.bg_dtype)
    return "fg and bg must be of one floating dtype";
  if (p.batch < 1 || p.channels < 1 || p.pixels < 1) return "fg must not be empty";
  if (!p.mask.data) return "mask must not be null";
  return check_mask_operand(p.mask, p.pixels);
}

inline Error check_alpha_blend_fwd(const AlphaBlendParams& p) {
  if (Error error = check_alpha_blend(p)) return error;
  if (p.y_dtype != kUInt8 && p.y_dtype != p.fg_dtype) return "y must be of fg's dtype or uint8";
  return p.fg && p.bg && p.y ? nullptr : "fg, bg and y must not be null";
}

inline Error check_alpha_blend_bwd(const AlphaBlendParams& p) {
  if (Error error = check_alpha_blend(p)) return error;
  if (p.fg_dtype == kUInt8) return "fg must be floating point to have a gradient";
  if (!p.grad || !(p.grad_fg || p.grad_bg || p.grad_mask)) return "grad and a gradient to write must not be null";
  return !p.grad_mask || (p.fg && p.bg) ? nullptr : "the gradient to mask needs fg and bg";
}

}  // namespace fe
