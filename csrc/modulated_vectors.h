// SPDX-License-Identifier: Apache-2.0
// modulated_conv2d's arithmetic on styles and weights, away from the pixels: one launch each instead of several.
#pragma once

#include "common.h"

namespace fe {

// Backward: grad_style -= style * sum_o grad[o] * demodulation[o]^3 * squares[o], with what is there already.
struct DemodulationParams {
  const float* squares;  // [outputs, inputs], the sums of the squares of each filter's taps
  const float* style;    // [batch, inputs]
  float* demodulation;   // [batch, outputs] = (sum_i style[i]^2 * squares[i] + epsilon)^-1/2; the backward pass reads it
  const float* grad;     // [batch, outputs]
  float* grad_style;     // [batch, inputs]
  int64_t batch;
  int64_t outputs;
  int64_t inputs;
  float epsilon;
};

template <class Visit>
void visit_fields(DemodulationParams& p, Visit&& visit) {
  visit("squares", p.squares), visit("style", p.style), visit("demodulation", p.demodulation);
  visit("grad", p.grad), visit("grad_style", p.grad_style), visit("batch", p.batch), visit("outputs", p.outputs);
  visit("inputs", p.inputs), visit("epsilon", p.epsilon);
}

// y = weight * style, of one sample: [outer, channels, inner] times [channels].
struct ModulatedWeightParams {
  const float* weight;
  const float* style;
  void* y;
  int64_t outer;
  int64_t channels;
  int64_t inner;
  int32_t dtype;  // of y
};

template <class Visit>
void visit_fields(ModulatedWeightParams& p, Visit&& visit) {
  visit("weight", p.weight), visit("style", p.style), visit("y", p.y), visit("outer", p.outer);
  visit("channels", p.channels), visit("inner", p.inner), visit("dtype", p.dtype);
}

inline Error check_demodulation(const DemodulationParams& p) {
  if (p.batch < 1 || p.outputs < 1 || p.inputs < 1) return "style and squares must not be empty";
  if (!p.squares || !p.style || !p.demodulation) return "squares, style and demodulation must not be null";
  return nullptr;
}

inline Error check_demodulation_fwd(const DemodulationParams& p) { return check_demodulation(p); }

inline Error check_demodulation_bwd(const DemodulationParams& p) {
  if (Error error = check_demodulation(p)) return error;
  if (!p.grad || !p.grad_style) return "grad and grad_style must not be null";
  return nullptr;
}

inline Error check_modulated_weight(const ModulatedWeightParams& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.outer < 1 || p.channels < 1 || p.inner < 1) return "weight must not be empty";
  if (!p.weight || !p.style || !p.y) return "weight, style and y must not be null";
  return nullptr;
}

}  // namespace fe
