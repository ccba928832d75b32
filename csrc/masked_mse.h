// SPDX-License-Identifier: Apache-2.0
// Masked mean squared error per sample: parameters and their checks.
#pragma once

#include "common.h"

namespace fe {

// a, b, grad_a, grad_b share one dtype and one layout (see noise_bias_act.h). A mask operand is planar, [batch or 1,
// pixels], of its own dtype; a null pointer stands for an absent one. A halved one has half the rows and half the columns,
// and is read bilinearly.
struct MaskedMseParams {
  const void* a;
  const void* b;
  MaskOperand mask, exclude, include;
  float* loss;            // [batch]
  float* inverse_weight;  // [batch]: 1 / the divisor; written forward, read backward
  const float* grad;      // [batch]
  void* grad_a;
  void* grad_b;
  double* workspace;  // masked_mse_fwd_workspace() doubles
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t width;  // columns, read where a mask is halved
  int32_t dtype;
  int32_t relax;
  bool channels_last;
  bool normalize_by_mask;
  bool mask_halved, exclude_halved, include_halved;
};

template <class Visit>
void visit_fields(MaskedMseParams& p, Visit&& visit) {
  visit("a", p.a), visit("b", p.b), visit("mask", p.mask), visit("exclude", p.exclude), visit("include", p.include);
  visit("loss", p.loss), visit("inverse_weight", p.inverse_weight), visit("grad", p.grad);
  visit("grad_a", p.grad_a), visit("grad_b", p.grad_b), visit("workspace", p.workspace);
  visit("batch", p.batch), visit("channels", p.channels), visit("pixels", p.pixels), visit("dtype", p.dtype);
  visit("relax", p.relax), visit("channels_last", p.channels_last), visit("normalize_by_mask", p.normalize_by_mask);
  visit("width", p.width), visit("mask_halved", p.mask_halved), visit("exclude_halved", p.exclude_halved);
  visit("include_halved", p.include_halved);
}

// Pixel i of a row lies between two elements of the row of half the length, `size` elements: the nearer one weighs 3/4,
// and beyond either end the last element goes on.
struct HalfTap {
  int64_t low, high;
  float weight;  // of the high one
};

FE_HD HalfTap half_tap(int64_t i, int64_t size) {
  const int64_t low = (i + 1) / 2 - 1;
  return {low < 0 ? 0 : low, low + 1 < size ? low + 1 : size - 1, i % 2 ? 0.25f : 0.75f};
}

FE_HD float mix(float low, float high, float weight) { return (1.0f - weight) * low + weight * high; }

// Blocks of threads a sample: some thousand together fill the largest GPU, and one block adds up a sample's sums.
inline int64_t masked_mse_cuda_blocks(const MaskedMseParams& p) {
  const int64_t wanted = (p.pixels + 1023) / 1024, most = p.batch < 66 ? 1056 / p.batch : 16;
  return wanted < most ? wanted : most;
}

// Doubles of workspace: two sums a block.
inline int64_t masked_mse_fwd_workspace(const MaskedMseParams& p, bool cuda) {
  const int64_t blocks = cuda ? masked_mse_cuda_blocks(p) : plan_cpu_blocks(p.pixels, p.channels).blocks_per_sample;
  return 2 * p.batch * blocks;
}

inline Error check_masked_mse(const MaskedMseParams& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.relax != 0 && p.relax != 1) return "relax is not a known rule";
  if (p.batch < 1 || p.channels < 1 || p.pixels < 1) return "a must not be empty";
  if (!p.a || !p.b || !p.inverse_weight) return "a, b and inverse_weight must not be null";
  const bool halved = p.mask_halved || p.exclude_halved || p.include_halved;
  if (halved && (p.width < 2 || p.width % 2 || p.pixels % (2 * p.width)))
    return "a halved mask needs an even number of rows and of columns";
  if (Error error = check_mask_operand(p.mask, p.mask_halved ? p.pixels / 4 : p.pixels)) return error;
  if (Error error = check_mask_operand(p.exclude, p.exclude_halved ? p.pixels / 4 : p.pixels)) return error;
  return check_mask_operand(p.include, p.include_halved ? p.pixels / 4 : p.pixels);
}

inline Error check_masked_mse_fwd(const MaskedMseParams& p) {
  if (Error error = check_masked_mse(p)) return error;
  return p.loss && p.workspace ? nullptr : "loss and workspace must not be null";
}

inline Error check_masked_mse_bwd(const MaskedMseParams& p) {
  if (Error error = check_masked_mse(p)) return error;
  return p.grad && (p.grad_a || p.grad_b) ? nullptr : "grad and a gradient to write must not be null";
}

}  // namespace fe
