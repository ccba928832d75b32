// SPDX-License-Identifier: Apache-2.0
// Upsample, FIR filter and downsample, with the epilogue of a convolution behind it: parameters, checks, index maths.
#pragma once

#include "common.h"

namespace fe {

constexpr int32_t kMaxFirTaps = 32;  // per axis

// Null pointers stand for absent operands. x, y and add share one dtype and one layout: [batch, channels, height, width]
// or, channels_last, [batch, height, width, channels]; everything else is float32. Without `epilogue` the operands from
// `scale` on are not read.
struct UpFirDnParams {
  const void* x;
  void* y;
  const float* fir;       // [fir_height, fir_width], or one row for both axes when `separable`
  const float* scale;     // [batch, channels]
  const float* noise;     // [batch or 1, output pixels]
  const float* strength;  // one value; read on the device
  const float* bias;      // [channels]
  const void* add;        // added last
  int64_t batch;
  int64_t channels;
  int64_t in_height;
  int64_t in_width;
  int64_t out_height;
  int64_t out_width;
  int64_t noise_stride;  // output pixels, or 0 when one map serves the batch
  int64_t pad_x;         // zeros before the first column and the first row of the upsampled image; negative crops
  int64_t pad_y;
  int32_t fir_height;
  int32_t fir_width;
  int32_t up;
  int32_t down;
  int32_t dtype;
  int32_t act;
  bool separable;
  bool flip;  // correlate instead of convolve
  bool channels_last;
  bool epilogue;
  float fir_gain;
  float slope;
  float gain;
  float clamp;  // negative: none
};

template <class Visit>
void visit_fields(UpFirDnParams& p, Visit&& visit) {
  visit("x", p.x), visit("y", p.y), visit("fir", p.fir), visit("scale", p.scale), visit("noise", p.noise);
  visit("strength", p.strength), visit("bias", p.bias), visit("add", p.add);
  visit("batch", p.batch), visit("channels", p.channels), visit("in_height", p.in_height);
  visit("in_width", p.in_width), visit("out_height", p.out_height), visit("out_width", p.out_width);
  visit("noise_stride", p.noise_stride), visit("pad_x", p.pad_x), visit("pad_y", p.pad_y);
  visit("fir_height", p.fir_height), visit("fir_width", p.fir_width), visit("up", p.up), visit("down", p.down);
  visit("dtype", p.dtype), visit("act", p.act), visit("separable", p.separable), visit("flip", p.flip);
  visit("channels_last", p.channels_last), visit("epilogue", p.epilogue), visit("fir_gain", p.fir_gain);
  visit("slope", p.slope), visit("gain", p.gain), visit("clamp", p.clamp);
}

inline Error check_upfirdn2d_fwd(const UpFirDnParams& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (!p.x || !p.y || !p.fir) return "x, y and fir must not be null";
  if (p.batch < 1 || p.channels < 1 || p.in_height < 1 || p.in_width < 1) return "x must not be empty";
  if (p.out_height < 1 || p.out_width < 1) return "y must not be empty";
  if ((p.up != 1 && p.up != 2) || (p.down != 1 && p.down != 2)) return "up and down must be 1 or 2";
  if (p.fir_height < 1 || p.fir_width < 1 || p.fir_height > kMaxFirTaps || p.fir_width > kMaxFirTaps)
    return "fir must have 1 to 32 taps an axis";
  if (p.separable && p.fir_height != p.fir_width) return "a separable fir is one row for both axes";
  if (p.epilogue && (p.act < 0 || p.act > 5)) return "act is not a known activation";
  if (p.noise_stride != 0 && p.noise_stride != p.out_height * p.out_width) return "noise must have the pixels of y";
  return nullptr;
}

namespace FE_ISA {

// The samples under the filter at one output position: sample first + t meets tap `tap + t * up` for t < count. Between
// samples lie the zeros of upsampling, which are never touched. Samples outside the image are zero.
struct FirWindow {
  int64_t first;
  int32_t tap;
  int32_t count;
};

FE_HD FirWindow fir_window(int64_t output, int32_t up, int32_t down, int64_t pad, int32_t taps) {
  const int64_t position = output * down - pad;
  // Rounded up, also below zero.
  const int64_t first = up == 1 ? position : (position >= 0 ? (position + 1) / 2 : -(-position / 2));
  const int32_t tap = static_cast<int32_t>(first * up - position);
  return {first, tap, (taps - tap + up - 1) / up};
}

// The samples that `count` outputs from `output` on read, [first, first + size).
struct FirSpan {
  int64_t first;
  int32_t size;
};

FE_HD FirSpan fir_span(int64_t output, int32_t count, int32_t up, int32_t down, int64_t pad, int32_t taps) {
  const int64_t first = fir_window(output, up, down, pad, taps).first;
  int64_t end = first;
  for (int32_t back = 1; back <= 2 && back <= count; ++back) {  // with up = 2 the last but one may reach as far
    const FirWindow w = fir_window(output + count - back, up, down, pad, taps);
    if (w.first + w.count > end) end = w.first + w.count;
  }
  return {first, static_cast<int32_t>(end - first)};
}

// The most samples that any `count` neighbouring outputs read.
FE_HD int32_t fir_span_bound(int32_t count, int32_t up, int32_t down, int32_t taps) {
  return ((count - 1) * down + taps + up - 1) / up;
}

// The tap that meets a sample at offset `k`, as a correlation.
FE_HD int32_t fir_tap(int32_t k, int32_t taps, bool flip) { return flip ? k : taps - 1 - k; }

}  // namespace FE_ISA
}  // namespace fe
