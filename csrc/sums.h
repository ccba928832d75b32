// SPDX-License-Identifier: Apache-2.0
// Partial sums of blocks, one row each, put together in the order of the blocks.
#pragma once

#include "common.h"

namespace fe {
namespace FE_ISA {

// out[j] = the sum over i of partial[i * width + j], in index order, in double.
inline void combine(const float* partial, int64_t count, int64_t width, float* out) {
  constexpr int64_t kLanes = 32;  // sums that stay in registers
  for (int64_t first = 0; first < width; first += kLanes) {
    const int64_t lanes = width - first < kLanes ? width - first : kLanes;
    double sum[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) {
      const float* row = partial + i * width + first;
#pragma omp simd
      for (int64_t j = 0; j < lanes; ++j) sum[j] += static_cast<double>(row[j]);
    }
    for (int64_t j = 0; j < lanes; ++j) out[first + j] = static_cast<float>(sum[j]);
  }
}

}  // namespace FE_ISA
}  // namespace fe
