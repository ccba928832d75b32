// SPDX-License-Identifier: Apache-2.0
#include "gates.h"

#include "elementwise.h"

namespace fe {
namespace FE_ISA {
namespace {

constexpr int64_t kBlock = 8192;  // elements of a block of work
constexpr int64_t kRun = 1024;    // elements of a row buffer

// z * scale + shift for elements that lie in one row: `scale` and `shift` are one value (STEP 0) or one an element.
template <class T, int STEP>
void affine_row(const T* from, const float* scale, const float* shift, int64_t count, float* out) {
  const float one_scale = scale ? scale[0] : 1.0f, one_shift = shift ? shift[0] : 0.0f;
  if (STEP == 0 || (!scale && !shift)) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = load(from[i]) * one_scale + one_shift;
  } else if (scale && shift) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = load(from[i]) * scale[i] + shift[i];
  } else if (scale) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = load(from[i]) * scale[i];
  } else {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) out[i] = load(from[i]) + shift[i];
  }
}

template <class T, bool RESET>
void forward_run(const GateParams& p, int64_t base, int64_t count, const float* z, const float* c) {
  const T* h = static_cast<const T*>(p.h) + base;
  T* y = static_cast<T*>(p.y) + base;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    store(RESET ? reset_gate(load(h[i]), z[i]) : gru_gate(load(h[i]), z[i], c[i]), y + i);
}

template <class T, bool RESET>
void backward_run(const GateParams& p, int64_t base, int64_t count, float* z, float* c) {
  const T* h = static_cast<const T*>(p.h) + base;
  const T* grad = static_cast<const T*>(p.grad) + base;
  T* grad_h = static_cast<T*>(p.grad_h) + base;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    const GateGradients slopes = RESET ? reset_gate_slopes(load(h[i]), z[i]) : gru_gate_slopes(load(h[i]), z[i], c[i]);
    const float g = load(grad[i]);
    store(g * slopes.h, grad_h + i);
    z[i] = g * slopes.z;
    if (!RESET) c[i] = g * slopes.c;
  }
}

template <class T>
void store_scaled(const float* from, const float* scale, int64_t step, int64_t count, T* out) {
  if (scale && step) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(from[i] * scale[i], out + i);
  } else {
    const float factor = scale ? scale[0] : 1.0f;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) store(from[i] * factor, out + i);
  }
}

inline const float* at(const float* vector, int64_t channel) { return vector ? vector + channel : nullptr; }

template <class T, bool RESET>
void run_block(const GateParams& p, int64_t first, int64_t end, bool is_backward) {
  float z[kRun], c[kRun];
  // A row is a stretch of memory over which the channel stands still (planes) or counts up (channels_last).
  const bool affine = p.z_scale || p.z_shift || p.c_scale || p.c_shift;
  const int64_t row = !affine ? p.batch * p.channels * p.pixels : (p.channels_last ? p.channels : p.pixels);
  const int64_t step = affine && p.channels_last ? 1 : 0;
  for (int64_t base = first; base < end;) {
    const int64_t inside = base % row, left = row - inside < end - base ? row - inside : end - base;
    const int64_t count = left < kRun ? left : kRun;
    const int64_t channel = !affine ? 0 : (p.channels_last ? inside : base / row % p.channels);
    const float* z_scale = at(p.z_scale, channel);
    const float* c_scale = at(p.c_scale, channel);
    const float* z_shift = at(p.z_shift, channel);
    const float* c_shift = at(p.c_shift, channel);
    const T* z_from = static_cast<const T*>(p.z) + base;
    step ? affine_row<T, 1>(z_from, z_scale, z_shift, count, z) : affine_row<T, 0>(z_from, z_scale, z_shift, count, z);
    if (!RESET) {
      const T* c_from = static_cast<const T*>(p.c) + base;
      step ? affine_row<T, 1>(c_from, c_scale, c_shift, count, c) : affine_row<T, 0>(c_from, c_scale, c_shift, count, c);
    }
    if (is_backward) {
      backward_run<T, RESET>(p, base, count, z, c);
      store_scaled(z, z_scale, step, count, static_cast<T*>(p.grad_z) + base);
      if (!RESET) store_scaled(c, c_scale, step, count, static_cast<T*>(p.grad_c) + base);
    } else {
      forward_run<T, RESET>(p, base, count, z, c);
    }
    base += count;
  }
}

template <class T>
void run(const GateParams& p, int threads, bool is_backward) {
  // Blocks start anew with every sample: which elements share a vector must not depend on the batch.
  const int64_t each = p.channels * p.pixels, per_sample = (each + kBlock - 1) / kBlock, blocks = p.batch * per_sample;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < blocks; ++i) {
    const int64_t sample = i / per_sample, inside = i % per_sample * kBlock;
    const int64_t first = sample * each + inside, end = sample * each + (inside + kBlock < each ? inside + kBlock : each);
    p.c ? run_block<T, false>(p, first, end, is_backward) : run_block<T, true>(p, first, end, is_backward);
  }
}

void run_dtype(const GateParams& p, int threads, bool is_backward) {
  if (p.dtype == kFloat16) return run<Float16>(p, threads, is_backward);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads, is_backward);
  run<float>(p, threads, is_backward);
}

}  // namespace

void gate_fwd(const GateParams& p, int threads) { run_dtype(p, threads, false); }
void gate_bwd(const GateParams& p, int threads) { run_dtype(p, threads, true); }

}  // namespace FE_ISA
}  // namespace fe
