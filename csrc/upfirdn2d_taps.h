// SPDX-License-Identifier: Apache-2.0
// The filter of a call as the CPU kernels apply it.
#pragma once

#include "upfirdn2d.h"

namespace fe {
namespace FE_ISA {

inline float magnitude(float value) { return value < 0.0f ? -value : value; }

// The filter as correlation taps, gain included. Separable when it is the outer product of two vectors.
struct FirTaps {
  float rows[kMaxFirTaps], columns[kMaxFirTaps];
  float full[kMaxFirTaps * kMaxFirTaps];
  bool separable;
};

inline void make_taps(const UpFirDnParams& p, FirTaps* taps) {
  const int32_t height = p.fir_height, width = p.fir_width;
  taps->separable = p.separable;
  if (p.separable) {
    for (int32_t k = 0; k < width; ++k) {
      taps->columns[k] = p.fir[fir_tap(k, width, p.flip)];
      taps->rows[k] = taps->columns[k] * p.fir_gain;
    }
    return;
  }
  int32_t pivot = 0;
  for (int32_t y = 0; y < height; ++y) {
    for (int32_t x = 0; x < width; ++x) {
      const int32_t i = y * width + x;
      taps->full[i] = p.fir[fir_tap(y, height, p.flip) * width + fir_tap(x, width, p.flip)] * p.fir_gain;
      if (magnitude(taps->full[i]) > magnitude(taps->full[pivot])) pivot = i;
    }
  }
  // Rank 1: every row is a multiple of the one that holds the largest tap, to within the rounding of float products.
  const float largest = taps->full[pivot];
  if (!(magnitude(largest) > 0.0f)) return;
  const float* row = taps->full + pivot / width * width;
  const float tolerance = 2.4e-7f * magnitude(largest);
  for (int32_t x = 0; x < width; ++x) taps->columns[x] = row[x];
  for (int32_t y = 0; y < height; ++y) {
    taps->rows[y] = taps->full[y * width + pivot % width] / largest;
    for (int32_t x = 0; x < width; ++x) {
      if (!(magnitude(taps->full[y * width + x] - taps->rows[y] * row[x]) <= tolerance)) return;
    }
  }
  taps->separable = true;
}

}  // namespace FE_ISA
}  // namespace fe
