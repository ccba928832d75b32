// SPDX-License-Identifier: Apache-2.0
// y = clamp(act(x * scale + noise * strength + bias) * gain): parameters and entry points.
#pragma once

#include "common.h"

namespace fe {

// Null pointers stand for absent operands. x, y, grad, saved, grad_x share one dtype and one layout, [batch, channels,
// pixels] or, channels_last, [batch, pixels, channels]; everything else is float32.
struct NoiseBiasActParams {
  const void* x;
  void* y;
  const void* grad;   // dL/dy
  const void* saved;  // y, or x when saved_is_input
  void* grad_x;
  const float* scale;     // [batch, channels]
  const float* noise;     // [batch or 1, pixels]
  const float* strength;  // one value; read on the device
  const float* bias;      // [channels]
  float* grad_scale;      // [batch, channels]
  float* grad_noise;      // [batch, pixels]
  float* grad_strength;   // one value
  float* grad_bias;       // [channels]
  float* workspace;       // noise_bias_act_workspace() floats, only for the reductions
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t noise_stride;  // pixels, or 0 when one map serves the batch
  int32_t dtype;
  int32_t act;
  bool channels_last;
  bool saved_is_input;
  float slope;
  float gain;
  float clamp;  // negative: none
};

struct NoiseBiasActWorkspace {
  int64_t bias, scale, strength, total;  // offsets in floats
};

inline NoiseBiasActWorkspace noise_bias_act_workspace(const NoiseBiasActParams& p, const BlockPlan& plan) {
  const int64_t rows = p.batch * plan.blocks_per_sample;
  NoiseBiasActWorkspace w{};
  w.bias = 0;
  w.scale = w.bias + (p.grad_bias ? rows * p.channels : 0);
  w.strength = w.scale + (p.grad_scale ? rows * p.channels : 0);
  w.total = w.strength + (p.grad_strength ? rows : 0);
  return w;
}

inline Error check_noise_bias_act(const NoiseBiasActParams& p, bool backward) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.act < 0 || p.act > 5) return "act is not a known activation";
  if (p.batch < 1 || p.channels < 1 || p.pixels < 1) return "x must not be empty";
  if (p.noise_stride != 0 && p.noise_stride != p.pixels) return "noise must have the pixels of x";
  if (!backward && (!p.x || !p.y)) return "x and y must not be null";
  if (backward && (!p.grad || !p.saved || !p.grad_x)) return "grad, saved and grad_x must not be null";
  if (backward && p.grad_scale && !p.saved_is_input) return "the gradient to scale needs the saved input";
  if (backward && (p.grad_bias || p.grad_scale || p.grad_strength) && !p.workspace) return "workspace must not be null";
  if (backward && p.grad_strength && !p.noise) return "the gradient to strength needs the noise";
  return nullptr;
}

#define FE_DECLARE_NOISE_BIAS_ACT(ISA)                                       \
  namespace ISA {                                                            \
  void noise_bias_act_fwd(const NoiseBiasActParams& params, int threads);    \
  void noise_bias_act_bwd(const NoiseBiasActParams& params, int threads);    \
  }

Error noise_bias_act_fwd_cuda(const NoiseBiasActParams& params, int device, void* stream);
Error noise_bias_act_bwd_cuda(const NoiseBiasActParams& params, int device, void* stream);

}  // namespace fe
