// SPDX-License-Identifier: Apache-2.0
// What forward and backward of norm_modulate share on the CPU: how a call is cut up into runs that are contiguous in
// memory, the coefficients and maps under a run as rows of float32, and the loop that modulates a row.
#pragma once

#include <type_traits>

#include "norm_modulate.h"
#include "rows.h"

namespace fe {
namespace FE_ISA {
namespace {

// Elements handled between two looks at the operands. Channels last, their coefficients fit the L1 cache together.
template <bool LAST>
constexpr int32_t kRun = LAST ? 512 : 1024;

// A piece of work: `pixels` pixels of `width` neighbouring channels of one sample; planar pieces have width 1.
struct Piece {
  int64_t sample, channel, first;
  int32_t pixels, width;
};

// `count` elements that are contiguous in memory: `members` pixels of all channels of the piece.
struct Run {
  int64_t base, pixel;
  int32_t members, count;
};

template <bool LAST, class Body>
void for_each_run(const NormModulateParams& p, const Piece& piece, Body&& body) {
  // Several pixels make one run where there are few channels; a piece narrower than the channels is wider than half a run.
  const int32_t group = LAST ? (piece.width == p.channels ? kRun<LAST> / piece.width : 1) : kRun<LAST>;
  for (int32_t q = 0; q < piece.pixels; q += group) {
    const int32_t left = piece.pixels - q, members = left < group ? left : group;
    const int64_t pixel = piece.first + q;
    const int64_t base = LAST ? (piece.sample * p.pixels + pixel) * p.channels + piece.channel
                              : (piece.sample * p.channels + piece.channel) * p.pixels + pixel;
    body(Run{base, pixel, members, members * piece.width});
  }
}

// Channels last: calls body with the pieces of at most one run's width that make up a block of pixels of one sample.
template <class Body>
void for_each_piece(const NormModulateParams& p, const NormPlan& plan, int64_t block, Body&& body) {
  const int64_t sample = block / plan.blocks, first = (block % plan.blocks) * plan.pixels_per_block;
  const int64_t left = p.pixels - first;
  const int32_t pixels = static_cast<int32_t>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
  for (int64_t channel = 0; channel < p.channels; channel += kRun<true>) {
    const int64_t width = p.channels - channel;
    body(Piece{sample, channel, first, pixels, static_cast<int32_t>(width < kRun<true> ? width : kRun<true>)});
  }
}

// Planar: block `block` of a plane.
inline Piece plane_block(const NormModulateParams& p, const NormPlan& plan, int64_t plane, int64_t block) {
  const int64_t first = block * plan.pixels_per_block, left = p.pixels - first;
  return {plane / p.channels, plane % p.channels, first,
          static_cast<int32_t>(left < plan.pixels_per_block ? left : plan.pixels_per_block), 1};
}

// A coefficient as a run reads it: one value for a plane, a row that repeats for every pixel otherwise.
template <bool LAST>
struct Coefficient {
  float row[LAST ? kRun<LAST> : 1];

  template <class Value>
  void fill(const NormModulateParams& p, const Piece& piece, Value&& value) {
    const int32_t width = piece.width;
    for (int32_t i = 0; i < width; ++i) row[i] = value(piece.channel + i);
    if (!LAST || width != p.channels) return;
    for (int32_t i = width; i < kRun<LAST>; ++i) row[i] = row[i - width];
  }
};

template <bool LAST>
inline float at(const float* row, float single, int32_t i) {
  return LAST ? row[i] : single;
}

// out[i] = the sum of row[i], row[i + width], ... in that order: the members of the runs of one piece.
inline void fold(const NormModulateParams& p, const Piece& piece, const float* row, double* out) {
  const int32_t width = piece.width;
  for (int32_t i = 0; i < width; ++i) out[i] = static_cast<double>(row[i]);
  if (width != p.channels) return;
  for (int32_t first = width; first + width <= kRun<true>; first += width)
    for (int32_t i = 0; i < width; ++i) out[i] += static_cast<double>(row[first + i]);
}

// How a channel is normalised: u = (x - mean) * scale + rest, and the normalised value is u * after.
struct Normalisation {
  float mean, scale, rest, after;
};

inline Normalisation normalisation_of(const NormModulateParams& p, int64_t sample, int64_t channel) {
  if (p.norm == kInstanceNorm) {
    const float* found = p.statistics + sample * p.channels + channel;
    const int64_t step = p.batch * p.channels;
    return {found[0], found[step], found[2 * step], 1.0f};
  }
  if (p.norm == kGivenNorm)  // the gradient to rstd is summed over x - mean, which rstd = 0 cannot hide
    return {p.mean[sample * p.mean_stride + channel], 1.0f, 0.0f, p.rstd[sample * p.rstd_stride + channel]};
  return {0.0f, 1.0f, 0.0f, 1.0f};
}

inline float unit(const NormModulateParams& p) { return p.one_plus ? 1.0f : 0.0f; }

inline float channel_gamma(const NormModulateParams& p, int64_t sample, int64_t channel) {
  if (p.gamma_kind != kPerChannel) return 1.0f;
  return unit(p) + static_cast<const float*>(p.gamma)[sample * p.gamma_stride + channel];
}

inline float channel_beta(const NormModulateParams& p, int64_t sample, int64_t channel) {
  return p.beta_kind == kPerChannel ? static_cast<const float*>(p.beta)[sample * p.beta_stride + channel] : 0.0f;
}

inline bool is_map(int32_t kind) { return kind == kPerPixel || kind == kPerElement; }

// Values as float32: where they lie, or converted into `buffer`.
template <class T>
const float* read_row(const T* values, int32_t count, float* buffer) {
  if constexpr (std::is_same_v<T, float>) return values;
  load_row<T>(values, 0, count, buffer);
  return buffer;
}

// Where a loop writes the values of `out`: there, or into `buffer`, from which write_row then stores them.
template <class T>
float* row_of(T* out, float* buffer) {
  if constexpr (std::is_same_v<T, float>) return out;
  return buffer;
}

template <class T>
void write_row(const float* row, int32_t count, T* out) {
  if constexpr (std::is_same_v<T, float>) return;
#pragma omp simd
  for (int32_t i = 0; i < count; ++i) store(row[i], out + i);
}

// The values of a map under a run; null for an operand that is no map. Channels last, a map of one channel is spread out.
template <class T, bool LAST>
const float* map_under(const NormModulateParams& p, const Piece& piece, const Run& run, const void* data, int32_t kind,
                       float* buffer) {
  if (!is_map(kind)) return nullptr;
  const T* map = static_cast<const T*>(data);
  if (kind == kPerElement) return read_row(map + run.base, run.count, buffer);
  map += piece.sample * p.pixels + run.pixel;
  if (!LAST) return read_row(map, run.count, buffer);
  for (int32_t member = 0; member < run.members; ++member)
    for (int32_t i = 0; i < piece.width; ++i) buffer[member * piece.width + i] = load(map[member]);
  return buffer;
}

// Calls pick with flags and an activation as types: one compiled loop for each combination. What is not piecewise linear
// counts as linear; a loop of its own follows.
template <class Pick>
auto by_flags(bool a, bool b, Pick&& pick) {
  using Yes = std::true_type;
  using No = std::false_type;
  if (a) return b ? pick(Yes{}, Yes{}) : pick(Yes{}, No{});
  return b ? pick(No{}, Yes{}) : pick(No{}, No{});
}

template <class Pick>
auto by_activation(int32_t act, Pick&& pick) {
  if (act == kRelu) return pick(std::integral_constant<int, kRelu>{});
  if (act == kLeakyRelu) return pick(std::integral_constant<int, kLeakyRelu>{});
  return pick(std::integral_constant<int, kLinear>{});
}

inline bool is_smooth(int32_t act) { return act == kTanh || act == kSigmoid || act == kSilu; }

// FUNCTION of the smooth activation `act`, a row function.
#define FE_BY_SMOOTH_ACTIVATION(FUNCTION, act) \
  ((act) == kTanh ? FUNCTION<kTanh> : (act) == kSigmoid ? FUNCTION<kSigmoid> : FUNCTION<kSilu>)

// z = ((x - mean) * scale + offset) * gamma + shift, where a gamma or beta of one value a channel is already in the
// coefficients.
template <bool LAST>
struct Modulation {
  Coefficient<LAST> mean, scale, offset, shift;
  float one, slope;

  Modulation(const NormModulateParams& p, const Piece& piece) : one(unit(p)), slope(p.slope) {
    const bool gamma_map = is_map(p.gamma_kind);
    const auto of = [&](int64_t c) { return normalisation_of(p, piece.sample, c); };
    const auto gain = [&](const Normalisation& n, int64_t c) { return n.after * channel_gamma(p, piece.sample, c); };
    mean.fill(p, piece, [&](int64_t c) { return of(c).mean; });
    scale.fill(p, piece, [&](int64_t c) { return of(c).scale * gain(of(c), c); });
    offset.fill(p, piece, [&](int64_t c) {
      return of(c).rest * gain(of(c), c) + (gamma_map ? 0.0f : channel_beta(p, piece.sample, c));
    });
    shift.fill(p, piece, [&](int64_t c) { return channel_beta(p, piece.sample, c); });
  }
};

// The coefficients of a plane in registers.
template <bool LAST>
struct Modulate {
  const Modulation<LAST>& k;
  const float mean = k.mean.row[0], scale = k.scale.row[0], offset = k.offset.row[0], shift = k.shift.row[0];
  const float one = k.one;

  // z of element i of a run, from what gamma and beta are there.
  template <bool GAMMA, bool BETA>
  inline float operator()(int32_t i, float x, float gamma, float beta) const {
    float value = normalise(x, at<LAST>(k.mean.row, mean, i), at<LAST>(k.scale.row, scale, i),
                            at<LAST>(k.offset.row, offset, i));
    if (GAMMA) value *= one + gamma;
    if (GAMMA && !BETA) value += at<LAST>(k.shift.row, shift, i);
    if (BETA) value += beta;
    return value;
  }
};

template <int ACT, bool GAMMA, bool BETA, bool LAST>
void modulate_row(const Modulation<LAST>& k, const float* x, const float* gamma, const float* beta, float* y,
                  int32_t count) {
  const Modulate<LAST> z{k};
  const float slope = k.slope;
#pragma omp simd
  for (int32_t i = 0; i < count; ++i)
    y[i] = activate<ACT>(z.template operator()<GAMMA, BETA>(i, x[i], GAMMA ? gamma[i] : 0.0f, BETA ? beta[i] : 0.0f),
                         slope);
}

template <bool LAST>
auto modulate_function(const NormModulateParams& p, int32_t act) {
  return by_activation(act, [&](auto ACT) {
    return by_flags(is_map(p.gamma_kind), is_map(p.beta_kind),
                    [&](auto GAMMA, auto BETA) { return &modulate_row<ACT, GAMMA, BETA, LAST>; });
  });
}

}  // namespace
}  // namespace FE_ISA
}  // namespace fe
