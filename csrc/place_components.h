// SPDX-License-Identifier: Apache-2.0
// Feature maps of face parts placed on a canvas, and where parts lie in a mask: parameters, windows and checks.
#pragma once

#include "common.h"

namespace fe {

constexpr int32_t kMaxComponents = 24;
constexpr int32_t kNowhere = -(1 << 30);         // both coordinates of the centre of a part that is not there
constexpr int64_t kLargestSide = int64_t{1} << 24;  // keeps sums of coordinates within 64 bits

// Elements are moved as bytes. Everything shares one layout (see noise_bias_act.h); a window of component k is
// [batch, channels[k], heights[k], widths[k]], and the canvas holds the components' channels, then the features'.
struct PlaceComponentsParams {
  const void* components[kMaxComponents];
  void* grad_components[kMaxComponents];  // null where not wanted
  int32_t channels[kMaxComponents];
  int32_t heights[kMaxComponents];
  int32_t widths[kMaxComponents];
  const int32_t* centres;  // [batch, count, 2]: y, x
  const void* features;    // [batch, feature_channels, height, width], or null when feature_channels is 0
  void* grad_features;
  void* out;
  const void* grad;
  int64_t batch;
  int32_t count;
  int32_t feature_channels;
  int32_t height;
  int32_t width;
  int32_t item_size;  // bytes of an element
  bool channels_last;
};

struct MaskCentresParams {
  MaskOperand mask;  // [planes, height * width]; its stride is not used
  int32_t* centres;  // [planes, 2]
  int64_t planes;
  int64_t height;
  int64_t width;
};

template <class Visit>
void visit_fields(PlaceComponentsParams& p, Visit&& visit) {
  visit("components", p.components), visit("grad_components", p.grad_components), visit("channels", p.channels);
  visit("heights", p.heights), visit("widths", p.widths), visit("centres", p.centres);
  visit("features", p.features), visit("grad_features", p.grad_features), visit("out", p.out), visit("grad", p.grad);
  visit("batch", p.batch), visit("count", p.count), visit("feature_channels", p.feature_channels);
  visit("height", p.height), visit("width", p.width), visit("item_size", p.item_size);
  visit("channels_last", p.channels_last);
}

template <class Visit>
void visit_fields(MaskCentresParams& p, Visit&& visit) {
  visit("mask", p.mask), visit("centres", p.centres), visit("planes", p.planes), visit("height", p.height);
  visit("width", p.width);
}

inline Error check_place_components(const PlaceComponentsParams& p) {
  if (p.count < 1 || p.count > kMaxComponents) return "components must be 1 to 24 maps";
  if (p.batch < 1 || p.height < 1 || p.width < 1 || p.feature_channels < 0) return "the canvas must not be empty";
  if (p.height > kLargestSide || p.width > kLargestSide) return "the canvas is too large";
  if (p.item_size != 1 && p.item_size != 2 && p.item_size != 4 && p.item_size != 8) return "item_size is not supported";
  for (int32_t k = 0; k < p.count; ++k)
    if (p.channels[k] < 0 || p.heights[k] < 0 || p.widths[k] < 0) return "sizes of components must not be negative";
  return p.centres ? nullptr : "centres must not be null";
}

inline Error check_place_components_fwd(const PlaceComponentsParams& p) {
  if (Error error = check_place_components(p)) return error;
  for (int32_t k = 0; k < p.count; ++k)
    if (!p.components[k] && p.channels[k] && p.heights[k] && p.widths[k]) return "components must not be null";
  if (p.feature_channels && !p.features) return "features must not be null";
  return p.out ? nullptr : "out must not be null";
}

inline Error check_place_components_bwd(const PlaceComponentsParams& p) {
  if (Error error = check_place_components(p)) return error;
  return p.grad ? nullptr : "grad must not be null";
}

inline Error check_mask_centres(const MaskCentresParams& p) {
  if (p.planes < 1 || p.height < 1 || p.width < 1) return "mask must not be empty";
  if (p.height > kLargestSide || p.width > kLargestSide) return "mask is too large";
  if (p.mask.dtype < kFloat32 || p.mask.dtype > kUInt8) return "mask dtype is not supported";
  return p.mask.data && p.centres ? nullptr : "mask and centres must not be null";
}

namespace FE_ISA {

// Where a window of `size` round `centre` meets [0, limit): the first coordinate of the window, and the part inside.
// 64 bits: any 32-bit centre, kNowhere included, is safe.
struct Span {
  int64_t start, first, end;  // first >= end: nothing is inside
};

FE_HD Span window_span(int64_t centre, int64_t size, int64_t limit) {
  const int64_t start = centre - size / 2, stop = start + size;
  return {start, start < 0 ? 0 : (start > limit ? limit : start), stop < 0 ? 0 : (stop > limit ? limit : stop)};
}

// A mask value in units of 2^-20, within [0, 1]; NaN is 0. Sums of integers are exact in any order, so every backend
// finds the same centre.
FE_HD int32_t mask_units(float value) {
  const float bounded = value > 0.0f ? (value < 1.0f ? value : 1.0f) : 0.0f;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds half to even
  return static_cast<int32_t>((bounded * 1048576.0f + magic) - magic);
}

// The mean coordinate, halves to even; kNowhere without any weight.
FE_HD int32_t mean_coordinate(int64_t moment, int64_t weight) {
  if (weight == 0) return kNowhere;
  const double mean = static_cast<double>(moment) / static_cast<double>(weight);
  const double magic = 6755399441055744.0;  // 1.5 * 2^52
  return static_cast<int32_t>((mean + magic) - magic);
}

}  // namespace FE_ISA
}  // namespace fe
