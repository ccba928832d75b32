// SPDX-License-Identifier: Apache-2.0
// Noise maps of a StyleGAN2: the autocorrelation penalty over each map's pyramid, and normalisation in place.
#pragma once

#include <cmath>

#include "common.h"

namespace fe {

constexpr int32_t kMaxNoiseMaps = 24;
constexpr int32_t kNoiseTile = 64;       // CUDA: pixels of a tile's side
constexpr int32_t kNoiseTileLevels = 4;  // CUDA: levels made from a tile; the map of the next one goes to memory

// A map is [batch, side, side]. Its levels: the map, and means over 2x2 of the level before until the side is at most
// `stop`. All maps share one dtype; what is made from them is float32.
struct NoiseRegularizerParams {
  const void* maps[kMaxNoiseMaps];
  void* grad_maps[kMaxNoiseMaps];
  int64_t sides[kMaxNoiseMaps];
  int32_t count;
  int32_t stop;
  int32_t dtype;
  int64_t batch;
  float* moments;     // [batch, levels of all maps, 2]: the mean products along x and along y; read backward
  float* loss;        // [batch]
  const float* grad;  // [batch]
  double* partials;   // noise_regularizer_fwd_partials() doubles, forward only
  float* coarse;      // noise_regularizer_fwd_coarse() or noise_regularizer_bwd_coarse() floats, which may be none
};

template <class Visit>
void visit_fields(NoiseRegularizerParams& p, Visit&& visit) {
  visit("maps", p.maps), visit("grad_maps", p.grad_maps), visit("sides", p.sides), visit("count", p.count);
  visit("stop", p.stop), visit("dtype", p.dtype), visit("batch", p.batch), visit("moments", p.moments);
  visit("loss", p.loss), visit("grad", p.grad), visit("partials", p.partials), visit("coarse", p.coarse);
}

FE_HD int32_t noise_levels(int64_t side, int32_t stop) {
  int32_t levels = 1;
  for (; side > stop; side /= 2) ++levels;
  return levels;
}

// How one map is cut. CPU: bands of whole rows, in which `inner` levels below the map are made. CUDA: square tiles.
struct NoiseMapPlan {
  int32_t levels, inner, first_level;
  int32_t blocks_across, blocks;
  int32_t rows;          // CPU: rows of a band, a multiple of 2^inner
  int64_t first_block;   // of one sample
  int64_t first_coarse;  // floats of one sample's coarse maps
};

struct NoisePlan {
  NoiseMapPlan maps[kMaxNoiseMaps];
  int32_t levels;  // of all maps
  int64_t blocks;  // of one sample
  int64_t coarse;  // floats of one sample
};

// Floats before level `level` in a map's coarse pyramid, whose first level is `first`.
FE_HD int64_t noise_level_offset(int64_t side, int32_t first, int32_t level) {
  int64_t offset = 0;
  for (int32_t l = first; l < level; ++l) offset += (side >> l) * (side >> l);
  return offset;
}

FE_HD NoisePlan plan_noise(const NoiseRegularizerParams& p, bool cuda) {
  NoisePlan plan{};
  for (int32_t i = 0; i < p.count; ++i) {
    NoiseMapPlan& m = plan.maps[i];
    const int64_t side = p.sides[i];
    m.levels = noise_levels(side, p.stop);
    m.first_level = plan.levels;
    m.first_block = plan.blocks;
    m.first_coarse = plan.coarse;
    if (cuda) {
      m.blocks_across = static_cast<int32_t>((side + kNoiseTile - 1) / kNoiseTile);
      m.blocks = m.blocks_across * m.blocks_across;
      plan.coarse += noise_level_offset(side, kNoiseTileLevels, m.levels);
    } else {
      // About 16 thousand elements a band: they stay in the L2 cache while their coarse levels are made.
      m.inner = m.levels - 1 < 4 ? m.levels - 1 : 4;
      const int64_t units = 16384 / (side << m.inner);
      const int64_t rows = (units < 1 ? 1 : units) << m.inner;
      m.rows = static_cast<int32_t>(rows < side ? rows : side);
      m.blocks = static_cast<int32_t>((side + m.rows - 1) / m.rows);
      plan.coarse += noise_level_offset(side, 1, m.levels);
    }
    plan.levels += m.levels;
    plan.blocks += m.blocks;
  }
  return plan;
}

// CUDA: a tile is read with `kNoiseHalo` pixels before it (and, backward, after it), which hold the neighbours of its cells
// at every level made from it. A position beyond the map's edge continues at the other edge.
constexpr int32_t kNoiseHalo = 8;

FE_HD int32_t noise_wrap(int32_t position, int32_t side) {
  if (position >= 0 && position < side) return position;
  const int32_t rest = position % side;
  return rest < 0 ? rest + side : rest;
}

// A block's sums along x and y, for the levels it makes.
constexpr int32_t kNoiseSums = 10;

FE_HD int64_t noise_regularizer_fwd_partials(const NoiseRegularizerParams& p, bool cuda) {
  return kNoiseSums * p.batch * plan_noise(p, cuda).blocks;
}

FE_HD int64_t noise_regularizer_fwd_coarse(const NoiseRegularizerParams& p, bool cuda) {
  return p.batch * plan_noise(p, cuda).coarse;
}

// Twice: the coarse maps and their gradients.
FE_HD int64_t noise_regularizer_bwd_coarse(const NoiseRegularizerParams& p, bool cuda) {
  return 2 * p.batch * plan_noise(p, cuda).coarse;
}

inline Error check_noise_regularizer(const NoiseRegularizerParams& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.count < 1 || p.count > kMaxNoiseMaps) return "noises must hold 1 to 24 maps";
  if (p.batch < 1) return "noises must not be empty";
  if (p.stop < 1) return "stop must be positive";
  for (int32_t i = 0; i < p.count; ++i) {
    if (!p.maps[i]) return "noises must not be null";
    if (p.sides[i] < 1 || p.sides[i] > 65536) return "side must be between 1 and 65536";
    if (p.sides[i] % (int64_t{1} << (noise_levels(p.sides[i], p.stop) - 1))) return "side must halve evenly down to stop";
  }
  return p.moments ? nullptr : "moments must not be null";
}

inline Error check_noise_regularizer_fwd(const NoiseRegularizerParams& p) {
  if (Error error = check_noise_regularizer(p)) return error;
  return p.loss && p.partials ? nullptr : "loss and partials must not be null";
}

inline Error check_noise_regularizer_bwd(const NoiseRegularizerParams& p) {
  if (Error error = check_noise_regularizer(p)) return error;
  for (int32_t i = 0; i < p.count; ++i) {
    if (!p.grad_maps[i]) return "grad_maps must not be null";
  }
  return p.grad ? nullptr : "grad must not be null";
}

// Normalisation in place: every map of every sample to mean 0 and standard deviation 1.
struct NormalizeNoiseParams {
  void* maps[kMaxNoiseMaps];
  int64_t pixels[kMaxNoiseMaps];
  int32_t count;
  int32_t dtype;
  int64_t batch;
  double* workspace;  // normalize_noise_workspace() doubles
};

template <class Visit>
void visit_fields(NormalizeNoiseParams& p, Visit&& visit) {
  visit("maps", p.maps), visit("pixels", p.pixels), visit("count", p.count), visit("dtype", p.dtype);
  visit("batch", p.batch), visit("workspace", p.workspace);
}

constexpr int32_t kNormalizeBlock = 4096;  // elements

struct NormalizePlan {
  int64_t first_block[kMaxNoiseMaps + 1];  // of one sample
};

FE_HD int64_t normalize_count(int64_t pixels, int64_t block) {
  const int64_t left = pixels - block * kNormalizeBlock;
  return left < kNormalizeBlock ? left : kNormalizeBlock;
}

FE_HD NormalizePlan plan_normalize(const NormalizeNoiseParams& p) {
  NormalizePlan plan{};
  for (int32_t i = 0; i < p.count; ++i)
    plan.first_block[i + 1] = plan.first_block[i] + (p.pixels[i] + kNormalizeBlock - 1) / kNormalizeBlock;
  return plan;
}

// 1 / the standard deviation. A map without spread becomes zeros; NaN is not equal to 0 and goes on.
FE_HD double normalize_factor(double squares, int64_t pixels) {
  const double freedom = pixels > 1 ? static_cast<double>(pixels - 1) : 1.0;
  return squares == 0.0 ? 0.0 : 1.0 / std::sqrt(squares / freedom);
}

// A block's mean and sum of squares, both relative to the map's first value; then per map that value, the mean and the
// factor. In place, the first value is overwritten while other blocks still need it: hence the copy.
constexpr int32_t kNormalizeTotals = 3;

FE_HD int64_t normalize_noise_workspace(const NormalizeNoiseParams& p, bool) {
  return p.batch * (2 * plan_normalize(p).first_block[p.count] + kNormalizeTotals * p.count);
}

inline Error check_normalize_noise(const NormalizeNoiseParams& p) {
  if (p.dtype != kFloat32 && p.dtype != kFloat16 && p.dtype != kBFloat16) return "dtype is not supported";
  if (p.count < 1 || p.count > kMaxNoiseMaps) return "noises must hold 1 to 24 maps";
  if (p.batch < 1) return "noises must not be empty";
  for (int32_t i = 0; i < p.count; ++i) {
    if (!p.maps[i]) return "noises must not be null";
    if (p.pixels[i] < 1) return "a map must not be empty";
  }
  return p.workspace ? nullptr : "workspace must not be null";
}

}  // namespace fe
