// SPDX-License-Identifier: Apache-2.0
// Rows of float32 that stay in the L1 cache: a block of a mask of any dtype, and that row spread over the channels.
#pragma once

#include "elementwise.h"

namespace fe {
namespace FE_ISA {

template <class T>
inline void load_row(const void* data, int64_t first, int32_t count, float* out) {
  const T* values = static_cast<const T*>(data) + first;
#pragma omp simd
  for (int32_t q = 0; q < count; ++q) out[q] = load(values[q]);
}

inline void load_row(const void* data, int32_t dtype, int64_t first, int32_t count, float* out) {
  if (dtype == kFloat16) return load_row<Float16>(data, first, count, out);
  if (dtype == kBFloat16) return load_row<BFloat16>(data, first, count, out);
  if (dtype == kUInt8) return load_row<uint8_t>(data, first, count, out);
  load_row<float>(data, first, count, out);
}

struct PixelBlock {
  int64_t sample, first;
  int32_t count;  // at most kMaxBlockPixels
};

inline PixelBlock pixel_block(const BlockPlan& plan, int64_t index, int64_t pixels) {
  const int64_t first = (index % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t left = pixels - first;
  return {index / plan.blocks_per_sample, first,
          static_cast<int32_t>(left < plan.pixels_per_block ? left : plan.pixels_per_block)};
}

// Calls body(first element, mask row, elements) over the runs of an image block that are contiguous in memory, so that
// one flat loop serves both layouts. Pixel q of the block has mask[q]; channels_last spreads it over the channels.
template <class Body>
inline void for_masked_runs(const PixelBlock& block, int64_t channels, int64_t pixels, bool channels_last,
                            const float* mask, Body&& body) {
  if (!channels_last) {
    for (int64_t c = 0; c < channels; ++c)
      body((block.sample * channels + c) * pixels + block.first, mask, block.count);
    return;
  }
  float spread[kMaxBlockPixels];
  const bool wide = channels > kMaxBlockPixels;
  const int32_t group = wide ? 1 : static_cast<int32_t>(kMaxBlockPixels / channels);
  const int64_t run = wide ? kMaxBlockPixels : channels;
  for (int32_t q = 0; q < block.count; q += group) {
    const int32_t members = block.count - q < group ? block.count - q : group;
    float* out = spread;
    for (int32_t member = 0; member < members; ++member)
      for (int64_t c = 0; c < run; ++c) *out++ = mask[q + member];
    const int64_t base = (block.sample * pixels + block.first + q) * channels;
    for (int64_t c = 0; c < channels; c += run) {
      const int64_t left = channels - c < run ? channels - c : run;
      body(base + c, static_cast<const float*>(spread), static_cast<int32_t>(left * members));
    }
  }
}

}  // namespace FE_ISA
}  // namespace fe
