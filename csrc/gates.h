// SPDX-License-Identifier: Apache-2.0
// Gates of a convolutional recurrent unit: parameters and their checks.
#pragma once

#include <initializer_list>

#include "common.h"

namespace fe {

// gru_gate: y = sigmoid(-z) * h + sigmoid(z) * tanh(c); reset_gate: y = sigmoid(z) * h. All tensors share one dtype and
// one layout (see noise_bias_act.h); a null scale is 1, a null shift 0, and they are float32 [channels].
struct GateParams {
  const void* h;
  const void* z;
  const void* c;  // null: reset_gate
  void* y;
  const void* grad;
  void* grad_h;
  void* grad_z;
  void* grad_c;
  const float* z_scale;
  const float* z_shift;
  const float* c_scale;
  const float* c_shift;
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int32_t dtype;
  bool channels_last;
};

template <class Visit>
void visit_fields(GateParams& p, Visit&& visit) {
  visit("h", p.h), visit("z", p.z), visit("c", p.c), visit("y", p.y), visit("grad", p.grad);
  visit("grad_h", p.grad_h), visit("grad_z", p.grad_z), visit("grad_c", p.grad_c);
  visit("z_scale", p.z_scale), visit("z_shift", p.z_shift), visit("c_scale", p.c_scale), visit("c_shift", p.c_shift);
  visit("batch", p.batch), visit("channels", p.channels), visit("pixels", p.pixels), visit("dtype", p.dtype);
  visit("channels_last", p.channels_last);
}

inline Error check_gate(const GateParams& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.batch < 1 || p.channels < 1 || p.pixels < 1) return "h must not be empty";
  return p.h && p.z ? nullptr : "h and z must not be null";
}

inline Error check_gate_fwd(const GateParams& p) {
  if (Error error = check_gate(p)) return error;
  return p.y ? nullptr : "y must not be null";
}

inline Error check_gate_bwd(const GateParams& p) {
  if (Error error = check_gate(p)) return error;
  if (!p.grad || !p.grad_h || !p.grad_z) return "grad, grad_h and grad_z must not be null";
  return !p.c == !p.grad_c ? nullptr : "c and grad_c must come together";
}

}  // namespace fe
