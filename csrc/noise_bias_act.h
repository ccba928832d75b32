// SPDX-License-Identifier: Apache-2.0
// y = clamp(act(x * scale + noise * strength + bias) * gain): parameters and their checks.
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
  float* workspace;       // noise_bias_act_bwd_workspace() floats, only for the reductions
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

template <class Visit>
void visit_fields(NoiseBiasActParams& p, Visit&& visit) {
  visit("x", p.x), visit("y", p.y), visit("grad", p.grad), visit("saved", p.saved), visit("grad_x", p.grad_x);
  visit("scale", p.scale), visit("noise", p.noise), visit("strength", p.strength), visit("bias", p.bias);
  visit("grad_scale", p.grad_scale), visit("grad_noise", p.grad_noise), visit("grad_strength", p.grad_strength);
  visit("grad_bias", p.grad_bias), visit("workspace", p.workspace);
  visit("batch", p.batch), visit("channels", p.channels), visit("pixels", p.pixels);
  visit("noise_stride", p.noise_stride), visit("dtype", p.dtype), visit("act", p.act);
  visit("channels_last", p.channels_last), visit("saved_is_input", p.saved_is_input);
  visit("slope", p.slope), visit("gain", p.gain), visit("clamp", p.clamp);
}

struct NoiseBiasActOffsets {
  int64_t bias, scale, strength, total;  // in floats of the workspace
};

inline NoiseBiasActOffsets noise_bias_act_offsets(const NoiseBiasActParams& p, const BlockPlan& plan) {
  const int64_t rows = p.batch * plan.blocks_per_sample;
  NoiseBiasActOffsets w{};
  w.bias = 0;
  w.scale = w.bias + (p.grad_bias ? rows * p.channels : 0);
  w.strength = w.scale + (p.grad_scale ? rows * p.channels : 0);
  w.total = w.strength + (p.grad_strength ? rows : 0);
  return w;
}

// channels_last: a block of threads holds whole pixels, enough of them to pay for its row of sums, and not more than a
// thousand blocks where that can be. Planar: it holds up to what a warp reads at once of every channel.
inline BlockPlan plan_noise_bias_act_cuda(const NoiseBiasActParams& p) {
  const int64_t pixels = p.batch * p.pixels;
  int64_t size = 0;
  if (p.channels_last) {
    const int64_t worth = 4096 / p.channels, few = (pixels + 1023) / 1024;
    size = worth > few ? worth : few;
    size = size < 8 ? 8 : (size > kMaxBlockPixels ? kMaxBlockPixels : (size + 7) / 8 * 8);
  } else {
    size = 128;
    while (size > 32 && pixels < 264 * size) size /= 2;
  }
  return {(p.pixels + size - 1) / size, static_cast<int32_t>(size)};
}

// Floats of workspace that the backward pass needs for the gradients asked for.
inline int64_t noise_bias_act_bwd_workspace(const NoiseBiasActParams& p, bool cuda) {
  return noise_bias_act_offsets(p, cuda ? plan_noise_bias_act_cuda(p) : plan_cpu_blocks(p.pixels, p.channels)).total;
}

inline Error check_noise_bias_act(const NoiseBiasActParams& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.act < 0 || p.act > 5) return "act is not a known activation";
  if (p.batch < 1 || p.channels < 1 || p.pixels < 1) return "x must not be empty";
  if (p.noise_stride != 0 && p.noise_stride != p.pixels) return "noise must have the pixels of x";
  return nullptr;
}

inline Error check_noise_bias_act_fwd(const NoiseBiasActParams& p) {
  if (Error error = check_noise_bias_act(p)) return error;
  return p.x && p.y ? nullptr : "x and y must not be null";
}

inline Error check_noise_bias_act_bwd(const NoiseBiasActParams& p) {
  if (Error error = check_noise_bias_act(p)) return error;
  if (!p.grad || !p.saved || !p.grad_x) return "grad, saved and grad_x must not be null";
  if (p.grad_scale && !p.saved_is_input) return "the gradient to scale needs the saved input";
  if ((p.grad_bias || p.grad_scale || p.grad_strength) && !p.workspace) return "workspace must not be null";
  if (p.grad_strength && !p.noise) return "the gradient to strength needs the noise";
  return nullptr;
}

}  // namespace fe
