// SPDX-License-Identifier: Apache-2.0
// y = act((x - mean) * rstd * gamma + beta), with mean and rstd of each plane: parameters and their checks.
#pragma once

#include "common.h"

namespace fe {

enum Norm : int32_t { kInstanceNorm = 0, kNoNorm = 1, kGivenNorm = 2 };
enum Modulation : int32_t { kAbsent = 0, kPerChannel = 1, kPerPixel = 2, kPerElement = 3 };

// Null pointers stand for absent operands. x, y, grad, grad_x share one dtype and one layout, [batch, channels, pixels]
// or, channels_last, [batch, pixels, channels]. gamma and beta are float32 [batch or 1, channels] when per channel, x's
// dtype otherwise: [batch, pixels] when per pixel, x's layout when per element.
struct NormModulateParams {
  const void* x;
  void* y;
  const void* grad;   // dL/dy
  void* grad_x;       // may be null
  float* statistics;  // [3, batch, channels]: mean, rstd, and rstd times what float32 rounded off the mean
  const void* gamma;
  const void* beta;
  const float* mean;  // [batch or 1, channels], given norm only
  const float* rstd;  // [batch or 1, channels], given norm only
  void* grad_gamma;   // float32 [batch, channels] when gamma is per channel, else x's dtype and layout
  void* grad_beta;    // likewise
  float* grad_mean;   // [batch, channels]
  float* grad_rstd;   // [batch, channels]
  double* workspace;
  int64_t batch;
  int64_t channels;
  int64_t pixels;
  int64_t gamma_stride;  // per channel: channels, or 0 when one row serves the batch
  int64_t beta_stride;
  int64_t mean_stride;
  int64_t rstd_stride;
  int32_t gamma_kind;
  int32_t beta_kind;
  int32_t dtype;
  int32_t norm;
  int32_t act;
  bool channels_last;
  bool one_plus;  // gamma scales by 1 + gamma
  float eps;
  float slope;
};

template <class Visit>
void visit_fields(NormModulateParams& p, Visit&& visit) {
  visit("x", p.x), visit("y", p.y), visit("grad", p.grad), visit("grad_x", p.grad_x);
  visit("statistics", p.statistics), visit("gamma", p.gamma), visit("beta", p.beta), visit("mean", p.mean);
  visit("rstd", p.rstd), visit("grad_gamma", p.grad_gamma), visit("grad_beta", p.grad_beta);
  visit("grad_mean", p.grad_mean), visit("grad_rstd", p.grad_rstd), visit("workspace", p.workspace);
  visit("batch", p.batch), visit("channels", p.channels), visit("pixels", p.pixels);
  visit("gamma_stride", p.gamma_stride), visit("beta_stride", p.beta_stride);
  visit("mean_stride", p.mean_stride), visit("rstd_stride", p.rstd_stride);
  visit("gamma_kind", p.gamma_kind), visit("beta_kind", p.beta_kind), visit("dtype", p.dtype);
  visit("norm", p.norm), visit("act", p.act), visit("channels_last", p.channels_last);
  visit("one_plus", p.one_plus), visit("eps", p.eps), visit("slope", p.slope);
}

// How one call is cut up. Channels last: blocks of pixels, all channels. Planar: a plane is one piece of work and stays in
// the cache between the statistics and the result; only where there are too few planes to share out is it cut too. Sums
// are made per block in both cases, so the bits do not depend on which it was.
struct NormPlan {
  int64_t blocks;  // of one sample, or of one plane
  int32_t pixels_per_block;
  bool partial;  // blocks, not planes, are the pieces of work, and leave their sums in the workspace
};

constexpr int64_t kPlaneBlockPixels = 16384;
constexpr int64_t kFewPlanes = 32;

inline NormPlan plan_norm(const NormModulateParams& p) {
  if (p.channels_last) {
    const BlockPlan plan = plan_blocks(p.pixels, p.channels, 32768, 32, 32768);
    return {plan.blocks_per_sample, plan.pixels_per_block, true};
  }
  const int64_t blocks = (p.pixels + kPlaneBlockPixels - 1) / kPlaneBlockPixels;
  return {blocks, static_cast<int32_t>(kPlaneBlockPixels), blocks > 1 && p.batch * p.channels < kFewPlanes};
}

// Partial sums of each block and channel: mean and squared deviations forward; backward three sums, and their totals.
inline int64_t norm_partials(const NormModulateParams& p) {
  const NormPlan plan = plan_norm(p);
  return plan.partial ? p.batch * p.channels * plan.blocks : 0;
}

// How the CUDA kernels cut planes up for their sums: by the shape alone, so that a sample's bits do not depend on its batch.
struct NormChunks {
  int64_t chunks;  // of one plane
  int32_t pixels_per_chunk;
};

constexpr int64_t kChunkElements = 4096;
constexpr int64_t kChunkChannels = 32;  // channels_last: of the tile that a block of threads works on
constexpr int64_t kManyChunks = 2048;   // of one sample: enough for every multiprocessor, chunks grow beyond it

inline NormChunks plan_norm_chunks(const NormModulateParams& p) {
  const int64_t grown = p.pixels * p.channels / (kChunkElements * kManyChunks);
  const int64_t size = (p.channels_last ? kChunkElements / kChunkChannels : kChunkElements) *
                       (grown < 1 ? 1 : (grown > 64 ? 64 : grown));
  return {(p.pixels + size - 1) / size, static_cast<int32_t>(size)};
}

inline int64_t norm_modulate_fwd_workspace(const NormModulateParams& p, bool cuda) {
  if (p.norm != kInstanceNorm) return 0;
  return 2 * (cuda ? p.batch * p.channels * plan_norm_chunks(p).chunks : norm_partials(p));
}

inline bool norm_backward_needs_sums(const NormModulateParams& p) {
  return (p.norm == kInstanceNorm && p.grad_x) || p.grad_mean || p.grad_rstd ||
         (p.grad_gamma && p.gamma_kind == kPerChannel) || (p.grad_beta && p.beta_kind == kPerChannel);
}

inline int64_t norm_modulate_bwd_workspace(const NormModulateParams& p, bool cuda) {
  if (!norm_backward_needs_sums(p)) return 0;
  const int64_t planes = p.batch * p.channels;
  return 3 * ((cuda ? planes * plan_norm_chunks(p).chunks : norm_partials(p)) + planes);
}

inline Error check_norm_modulate(const NormModulateParams& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.act < 0 || p.act > 5) return "act is not a known activation";
  if (p.norm < kInstanceNorm || p.norm > kGivenNorm) return "norm is not a known normalisation";
  if (p.batch < 1 || p.channels < 1 || p.pixels < 1) return "x must not be empty";
  if (p.gamma_kind < kAbsent || p.gamma_kind > kPerElement || p.beta_kind < kAbsent || p.beta_kind > kPerElement)
    return "gamma_kind and beta_kind must be known modulations";
  if ((p.gamma_kind != kAbsent && !p.gamma) || (p.beta_kind != kAbsent && !p.beta))
    return "gamma and beta must not be null where they are used";
  if (p.norm == kGivenNorm && (!p.mean || !p.rstd)) return "mean and rstd must be given";
  if (p.norm == kInstanceNorm && !p.statistics) return "statistics must not be null";
  return nullptr;
}

inline Error check_norm_modulate_fwd(const NormModulateParams& p) {
  if (Error error = check_norm_modulate(p)) return error;
  if (!p.x || !p.y) return "x and y must not be null";
  return norm_modulate_fwd_workspace(p, false) && !p.workspace ? "workspace must not be null" : nullptr;
}

inline Error check_norm_modulate_bwd(const NormModulateParams& p) {
  if (Error error = check_norm_modulate(p)) return error;
  if (!p.x || !p.grad) return "x and grad must not be null";
  if ((p.grad_gamma && p.gamma_kind == kAbsent) || (p.grad_beta && p.beta_kind == kAbsent))
    return "a gradient was asked for an absent operand";
  if ((p.grad_mean || p.grad_rstd) && p.norm != kGivenNorm) return "mean and rstd have gradients only when given";
  return norm_modulate_bwd_workspace(p, false) && !p.workspace ? "workspace must not be null" : nullptr;
}

}  // namespace fe
