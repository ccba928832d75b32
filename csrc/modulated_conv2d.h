// SPDX-License-Identifier: Apache-2.0
// What surrounds the convolution of modulated_conv2d: its epilogue with ToRGB's sums, the backward pass of that, and the
// styles' gradient. The convolution itself is PyTorch's.
#pragma once

#include "common.h"

namespace fe {

// Null pointers stand for absent operands. x, y, grad, saved, grad_x share one dtype and one layout, [batch, channels,
// pixels] or, channels_last, [batch, pixels, channels]; everything else is float32, rgb and grad_rgb planar.
struct ModulatedEpilogueParams {
  const void* x;
  void* y;            // may be x; null: only rgb is wanted, and it is made from x as it is
  const void* grad;   // dL/dy; null: zero
  const void* saved;  // y
  void* grad_x;       // may not be grad
  const float* scale;        // [batch, channels]
  const float* noise;        // [batch or 1, pixels]
  const float* strength;     // one value; read on the device
  const float* bias;         // [channels]
  const float* rgb_factors;  // [batch, 3, channels]
  float* rgb;                // [batch, 3, pixels]
  const float* grad_rgb;     // [batch, 3, pixels]
  float* grad_scale;         // [batch, channels]
  float* grad_noise;         // [batch, pixels]
  float* grad_strength;      // one value
  float* grad_bias;          // [channels]
  float* grad_factors;       // [batch, 3, channels]
  float* workspace;          // modulated_epilogue_bwd_workspace() floats
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t noise_stride;  // pixels, or 0 when one map serves the batch
  int32_t dtype;
  int32_t act;
  bool channels_last;
  float slope;
  float gain;
  float clamp;  // negative: none
};

template <class Visit>
void visit_fields(ModulatedEpilogueParams& p, Visit&& visit) {
  visit("x", p.x), visit("y", p.y), visit("grad", p.grad), visit("saved", p.saved), visit("grad_x", p.grad_x);
  visit("scale", p.scale), visit("noise", p.noise), visit("strength", p.strength), visit("bias", p.bias);
  visit("rgb_factors", p.rgb_factors), visit("rgb", p.rgb), visit("grad_rgb", p.grad_rgb);
  visit("grad_scale", p.grad_scale), visit("grad_noise", p.grad_noise), visit("grad_strength", p.grad_strength);
  visit("grad_bias", p.grad_bias), visit("grad_factors", p.grad_factors), visit("workspace", p.workspace);
  visit("batch", p.batch), visit("channels", p.channels), visit("pixels", p.pixels);
  visit("noise_stride", p.noise_stride), visit("dtype", p.dtype), visit("act", p.act);
  visit("channels_last", p.channels_last), visit("slope", p.slope), visit("gain", p.gain), visit("clamp", p.clamp);
}

// grad_x = grad * style, and grad_style = the sum over pixels of grad * x.
struct ModulatedStyleParams {
  const void* x;
  const void* grad;
  void* grad_x;        // may be grad
  const float* style;  // [batch, channels]
  float* grad_style;   // [batch, channels]; null: not wanted, and x is not read
  float* workspace;    // modulated_style_bwd_workspace() floats
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int32_t dtype;
  bool channels_last;
};

template <class Visit>
void visit_fields(ModulatedStyleParams& p, Visit&& visit) {
  visit("x", p.x), visit("grad", p.grad), visit("grad_x", p.grad_x), visit("style", p.style);
  visit("grad_style", p.grad_style), visit("workspace", p.workspace), visit("batch", p.batch);
  visit("channels", p.channels), visit("pixels", p.pixels), visit("dtype", p.dtype);
  visit("channels_last", p.channels_last);
}

// Partial sums, one row of `channels` a block of pixels for each kind.
struct ModulatedOffsets {
  int64_t bias, scale, factors, strength, total;  // in floats of the workspace; factors: three such areas
};

inline ModulatedOffsets modulated_offsets(const ModulatedEpilogueParams& p, const BlockPlan& plan) {
  const int64_t rows = p.batch * plan.blocks_per_sample;
  ModulatedOffsets w{};
  w.bias = 0;
  w.scale = w.bias + (p.grad_bias ? rows * p.channels : 0);
  w.factors = w.scale + (p.grad_scale ? rows * p.channels : 0);
  w.strength = w.factors + (p.grad_factors ? 3 * rows * p.channels : 0);
  w.total = w.strength + (p.grad_strength ? rows : 0);
  return w;
}

constexpr int32_t kPlanarPixels = 256;  // of a planar block, at most

// Multiples of 8 pixels, so that packs of pixels stay aligned. channels_last: enough of them to pay for the block's
// rows of sums, and not more than a thousand blocks where that can be. Planar: fewer where a plane is small, so that
// there are blocks enough for the largest GPU.
template <class Params>
BlockPlan plan_modulated_cuda(const Params& p) {
  int64_t size = (p.batch * p.pixels < (1 << 16) ? 4096 : 16384) / p.channels / 8 * 8;
  if (p.channels_last) {
    const int64_t worth = 4096 / p.channels, few = (p.batch * p.pixels + 1023) / 1024;
    size = ((worth > few ? worth : few) + 7) / 8 * 8;
  }
  const int64_t fewest = p.channels_last ? 8 : 32, most = p.channels_last ? kMaxBlockPixels : kPlanarPixels;
  size = size < fewest ? fewest : (size > most ? most : size);
  return {(p.pixels + size - 1) / size, static_cast<int32_t>(size)};
}

template <class Params>
BlockPlan plan_modulated(const Params& p, bool cuda) {
  return cuda ? plan_modulated_cuda(p) : plan_cpu_blocks(p.pixels, p.channels);
}

inline int64_t modulated_epilogue_bwd_workspace(const ModulatedEpilogueParams& p, bool cuda) {
  return modulated_offsets(p, plan_modulated(p, cuda)).total;
}

inline int64_t modulated_style_bwd_workspace(const ModulatedStyleParams& p, bool cuda) {
  return p.grad_style ? p.batch * plan_modulated(p, cuda).blocks_per_sample * p.channels : 0;
}

template <class Params>
inline Error check_modulated(const Params& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.batch < 1 || p.channels < 1 || p.pixels < 1) return "x must not be empty";
  return nullptr;
}

inline Error check_modulated_epilogue(const ModulatedEpilogueParams& p) {
  if (Error error = check_modulated(p)) return error;
  if (p.noise_stride != 0 && p.noise_stride != p.pixels) return "noise must have the pixels of x";
  return nullptr;
}

inline Error check_modulated_epilogue_fwd(const ModulatedEpilogueParams& p) {
  if (Error error = check_modulated_epilogue(p)) return error;
  if (p.act < 0 || p.act > 5) return "act is not a known activation";
  if (!p.x || !p.rgb || !p.rgb_factors) return "x, rgb and rgb_factors must not be null";
  if (p.y && (!p.scale || !p.bias)) return "y needs scale and bias";
  return nullptr;
}

inline Error check_modulated_epilogue_bwd(const ModulatedEpilogueParams& p) {
  if (Error error = check_modulated_epilogue(p)) return error;
  if (p.act < 0 || p.act > 2) return "act must be piecewise linear: its output must tell its input";
  if (!p.saved || !p.grad_x) return "saved and grad_x must not be null";
  if (!p.grad && !p.grad_rgb) return "grad or grad_rgb must be given";
  if (p.grad_rgb && !p.rgb_factors) return "grad_rgb needs rgb_factors";
  if (p.grad_factors && !p.grad_rgb) return "the gradient to rgb_factors needs grad_rgb";
  if (p.grad_strength && !p.noise) return "the gradient to strength needs the noise";
  if ((p.grad_bias || p.grad_scale || p.grad_factors || p.grad_strength) && !p.workspace)
    return "workspace must not be null";
  return nullptr;
}

inline Error check_modulated_style_bwd(const ModulatedStyleParams& p) {
  if (Error error = check_modulated(p)) return error;
  if (!p.grad || !p.grad_x || !p.style) return "grad, grad_x and style must not be null";
  if (p.grad_style && (!p.x || !p.workspace)) return "the gradient to style needs x and a workspace";
  return nullptr;
}

}  // namespace fe
