// SPDX-License-Identifier: Apache-2.0
#include "modulated_vectors.h"

#include <cmath>

#include "elementwise.h"

namespace fe {
namespace FE_ISA {
namespace {

constexpr int64_t kColumns = 128;  // inputs whose sums stay in the first cache

// Sums over outputs of `count` inputs from `first` on, in the order of the outputs.
void demodulation_columns(const DemodulationParams& p, int64_t sample, int64_t first, int64_t count) {
  float sums[kColumns] = {};
  const float* grad = p.grad + sample * p.outputs;
  const float* demodulation = p.demodulation + sample * p.outputs;
  for (int64_t o = 0; o < p.outputs; ++o) {
    const float d = demodulation[o], cubic = grad[o] * (d * d * d);
    const float* squares = p.squares + o * p.inputs + first;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) sums[i] += cubic * squares[i];
  }
  const float* style = p.style + sample * p.inputs + first;
  float* grad_style = p.grad_style + sample * p.inputs + first;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) grad_style[i] -= style[i] * sums[i];
}

template <class T>
void modulate(const ModulatedWeightParams& p, int threads) {
  T* y = static_cast<T*>(p.y);
  if (p.inner == 1) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t a = 0; a < p.outer; ++a) {
      const float* weight = p.weight + a * p.channels;
      T* row = y + a * p.channels;
#pragma omp simd
      for (int64_t j = 0; j < p.channels; ++j) store(weight[j] * p.style[j], row + j);
    }
    return;
  }
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t a = 0; a < p.outer * p.channels; ++a) {
    const float* weight = p.weight + a * p.inner;
    const float style = p.style[a % p.channels];
    T* row = y + a * p.inner;
#pragma omp simd
    for (int64_t j = 0; j < p.inner; ++j) store(weight[j] * style, row + j);
  }
}

}  // namespace

void demodulation_fwd(const DemodulationParams& p, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t o = 0; o < p.outputs; ++o) {
    const float* squares = p.squares + o * p.inputs;
    for (int64_t n = 0; n < p.batch; ++n) {
      const float* style = p.style + n * p.inputs;
      float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
      for (int64_t i = 0; i < p.inputs; ++i) sum += style[i] * style[i] * squares[i];
      p.demodulation[n * p.outputs + o] = 1.0f / std::sqrt(sum + p.epsilon);
    }
  }
}

void demodulation_bwd(const DemodulationParams& p, int threads) {
  const int64_t blocks = (p.inputs + kColumns - 1) / kColumns;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t block = 0; block < p.batch * blocks; ++block) {
    const int64_t first = block % blocks * kColumns, left = p.inputs - first;
    demodulation_columns(p, block / blocks, first, left < kColumns ? left : kColumns);
  }
}

void modulated_weight(const ModulatedWeightParams& p, int threads) {
  if (p.dtype == kFloat16) return modulate<Float16>(p, threads);
  if (p.dtype == kBFloat16) return modulate<BFloat16>(p, threads);
  modulate<float>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
