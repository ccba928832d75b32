// SPDX-License-Identifier: Apache-2.0
// A whole layer of modulated_conv2d in one kernel, where its channels are few: the styles, a 3 x 3 convolution and the
// epilogue with ToRGB's sums; and the data gradient of that convolution with the styles' gradient.
#pragma once

#include "common.h"

namespace fe {

// Null pointers stand for absent operands. x, y and weight share one half type, channels_last; everything else is
// float32, rgb planar. Inputs and outputs are equally many.
struct ModulatedLayerParams {
  const void* x;             // [batch, height, width, channels]
  void* y;                   // like x
  const void* weight;        // [channels, 3, 3, channels], outputs first
  const float* style;        // [batch, channels]
  const float* scale;        // [batch, channels]
  const float* noise;        // [batch or 1, height, width]
  const float* strength;     // one value; read on the device
  const float* bias;         // [channels]
  const float* rgb_factors;  // [batch, 3, channels]
  float* rgb;                // [batch, 3, height, width]; null: not wanted
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  int64_t noise_stride;  // pixels, or 0 when one map serves the batch
  int32_t dtype;
  int32_t act;
  float slope;
  float gain;
  float clamp;  // negative: none
};

template <class Visit>
void visit_fields(ModulatedLayerParams& p, Visit&& visit) {
  visit("x", p.x), visit("y", p.y), visit("weight", p.weight), visit("style", p.style), visit("scale", p.scale);
  visit("noise", p.noise), visit("strength", p.strength), visit("bias", p.bias), visit("rgb_factors", p.rgb_factors);
  visit("rgb", p.rgb), visit("batch", p.batch), visit("channels", p.channels), visit("height", p.height);
  visit("width", p.width), visit("noise_stride", p.noise_stride), visit("dtype", p.dtype), visit("act", p.act);
  visit("slope", p.slope), visit("gain", p.gain), visit("clamp", p.clamp);
}

// data = the convolution of grad with `weight`; grad_x = data * style; grad_style = the sum over pixels of data * x.
struct ModulatedLayerGradientParams {
  const void* grad;    // of the forward convolution's result, [batch, height, width, channels]
  const void* weight;  // [channels, 3, 3, channels]: the forward pass's inputs first, its taps turned by 180 degrees
  const void* x;       // like grad; the forward pass's
  const float* style;  // [batch, channels]
  void* grad_x;        // like x
  float* grad_style;   // [batch, channels]; null: not wanted, and x is not read
  float* workspace;    // modulated_layer_bwd_workspace() floats
  int64_t batch;
  int64_t channels;
  int64_t height;
  int64_t width;
  int32_t dtype;
};

template <class Visit>
void visit_fields(ModulatedLayerGradientParams& p, Visit&& visit) {
  visit("grad", p.grad), visit("weight", p.weight), visit("x", p.x), visit("style", p.style);
  visit("grad_x", p.grad_x), visit("grad_style", p.grad_style), visit("workspace", p.workspace);
  visit("batch", p.batch), visit("channels", p.channels), visit("height", p.height), visit("width", p.width);
  visit("dtype", p.dtype);
}

constexpr int64_t kLayerSide = 16;  // pixels of a square that a block of threads computes at once
constexpr int64_t kLayerTaps = 9;

constexpr int64_t kLayerProcessors = 132;  // multiprocessors of the largest GPU

// Blocks of threads that a multiprocessor holds.
constexpr int64_t layer_resident(int64_t channels) { return channels == 32 ? 3 : 1; }

// Blocks of threads that share a sample's squares: not more than run at once, since one that waits for another to end
// would double the time.
inline int64_t layer_blocks(int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t processors) {
  const int64_t squares = ((height + kLayerSide - 1) / kLayerSide) * ((width + kLayerSide - 1) / kLayerSide);
  const int64_t most = processors * layer_resident(channels) / batch;
  return most < 1 ? 1 : (most < squares ? most : squares);
}

// The backward pass has the largest GPU's wherever it runs: its sums are the same everywhere.
inline int64_t layer_sums(int64_t batch, int64_t channels, int64_t height, int64_t width) {
  return layer_blocks(batch, channels, height, width, kLayerProcessors);
}

// Bytes of shared memory that a block of threads takes: the weight, two squares with their borders, and vectors.
inline int64_t layer_shared_bytes(int64_t channels) {
  const int64_t reach = kLayerSide + 2;
  return 2 * (kLayerTaps * channels * channels + 2 * reach * reach * channels) + 5 * channels * 4;
}

inline int64_t modulated_layer_bwd_workspace(const ModulatedLayerGradientParams& p, bool cuda) {
  return cuda && p.grad_style ? p.batch * layer_sums(p.batch, p.channels, p.height, p.width) * p.channels : 0;
}

template <class Params>
Error check_modulated_layer(const Params& p) {
  if (p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype must be a half type";
  if (p.channels != 32 && p.channels != 64) return "channels must be 32 or 64";
  if (p.batch < 1 || p.height < 1 || p.width < 1) return "x must not be empty";
  // Positions inside a sample are 32 bits wide.
  if (p.height * p.width * p.channels >= (int64_t{1} << 31)) return "a sample must have fewer than 2^31 elements";
  return p.weight && p.style ? nullptr : "weight and style must not be null";
}

inline Error check_modulated_layer_fwd(const ModulatedLayerParams& p) {
  if (Error error = check_modulated_layer(p)) return error;
  if (p.act < 0 || p.act > 2 || !(p.gain > 0.0f)) return "act must be piecewise linear, and gain positive";
  if (p.noise_stride != 0 && p.noise_stride != p.height * p.width) return "noise must have the pixels of x";
  if (p.rgb && !p.rgb_factors) return "rgb needs rgb_factors";
  return p.x && p.y ? nullptr : "x and y must not be null";
}

inline Error check_modulated_layer_bwd(const ModulatedLayerGradientParams& p) {
  if (Error error = check_modulated_layer(p)) return error;
  if (!p.grad || !p.grad_x) return "grad and grad_x must not be null";
  return p.grad_style && !p.x ? "the gradient to style needs x" : nullptr;
}

}  // namespace fe
