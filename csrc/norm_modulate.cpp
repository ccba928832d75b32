// SPDX-License-Identifier: Apache-2.0
#include "norm_modulate.h"

#include <cmath>

#include "elementwise.h"

namespace fe {
namespace FE_ISA {
namespace {

// Elements handled between two looks at the operands. Their coefficients (channels_last) and intermediate results fit the
// L1 cache together.
constexpr int32_t kRun = 512;

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
  const int32_t group = LAST ? (piece.width == p.channels ? kRun / piece.width : 1) : kRun;
  for (int32_t q = 0; q < piece.pixels; q += group) {
    const int32_t left = piece.pixels - q, members = left < group ? left : group;
    const int64_t pixel = piece.first + q;
    const int64_t base = LAST ? (piece.sample * p.pixels + pixel) * p.channels + piece.channel
                              : (piece.sample * p.channels + piece.channel) * p.pixels + pixel;
    body(Run{base, pixel, members, members * piece.width});
  }
}

// Calls body with the pieces of at most one run's width that make up a block of pixels of one sample.
template <class Body>
void for_each_piece(const NormModulateParams& p, const NormPlan& plan, int64_t block, Body&& body) {
  const int64_t sample = block / plan.blocks, first = (block % plan.blocks) * plan.pixels_per_block;
  const int64_t left = p.pixels - first;
  const int32_t pixels = static_cast<int32_t>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
  for (int64_t channel = 0; channel < p.channels; channel += kRun) {
    const int64_t width = p.channels - channel;
    body(Piece{sample, channel, first, pixels, static_cast<int32_t>(width < kRun ? width : kRun)});
  }
}

inline Piece plane_block(const NormModulateParams& p, const NormPlan& plan, int64_t plane, int64_t block) {
  const int64_t first = block * plan.pixels_per_block, left = p.pixels - first;
  return {plane / p.channels, plane % p.channels, first,
          static_cast<int32_t>(left < plan.pixels_per_block ? left : plan.pixels_per_block), 1};
}

// A coefficient as a run reads it: one value for a plane, a row that repeats for every pixel otherwise.
template <bool LAST>
struct Coefficient {
  float row[LAST ? kRun : 1];

  template <class Value>
  void fill(const NormModulateParams& p, const Piece& piece, Value&& value) {
    const int32_t width = piece.width;
    for (int32_t i = 0; i < width; ++i) row[i] = value(piece.channel + i);
    if (!LAST || width != p.channels) return;
    for (int32_t i = width; i < kRun; ++i) row[i] = row[i - width];
  }
};

template <bool LAST>
inline float at(const float* row, float single, int32_t i) {
  return LAST ? row[i] : single;
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

// The values of a map under a run; null for an operand that is no map. A map of one channel is spread out into `spread`.
template <class T, bool LAST>
const T* map_under(const NormModulateParams& p, const Piece& piece, const Run& run, const void* data, int32_t kind,
                   T* spread) {
  if (!is_map(kind)) return nullptr;
  const T* map = static_cast<const T*>(data);
  if (kind == kPerElement) return map + run.base;
  map += piece.sample * p.pixels + run.pixel;
  if (!LAST) return map;
  for (int32_t member = 0; member < run.members; ++member)
    for (int32_t i = 0; i < piece.width; ++i) spread[member * piece.width + i] = map[member];
  return spread;
}

// Statistics. Each run (planar) or block (channels_last) is read twice, the second time from the cache: once for a mean
// to shift by, once for the deviations from it.

inline Moments moments_about(float pivot, double deviations, double squares, double count) {
  const double rest = squares - deviations * deviations / count;
  return {static_cast<double>(pivot) + deviations / count, rest < 0.0 ? 0.0 : rest};
}

template <class T>
Moments plane_moments(const NormModulateParams& p, const Piece& piece) {
  Moments found{0.0, 0.0};
  double seen = 0.0;
  for_each_run<false>(p, piece, [&](const Run& run) {
    const T* x = static_cast<const T*>(p.x) + run.base;
    float sum = 0.0f, deviations = 0.0f, squares = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int32_t i = 0; i < run.count; ++i) sum += load(x[i]);
    const float pivot = sum / static_cast<float>(run.count);
#pragma omp simd reduction(+ : deviations, squares)
    for (int32_t i = 0; i < run.count; ++i) {
      const float deviation = load(x[i]) - pivot;
      deviations += deviation;
      squares += deviation * deviation;
    }
    const Moments here = moments_about(pivot, deviations, squares, run.count);
    found = seen > 0.0 ? merge(found, seen, here, run.count) : here;
    seen += run.count;
  });
  return found;
}

// out[i] = the sum of row[i], row[i + width], ... in that order: the members of the runs of one piece.
inline void fold(const NormModulateParams& p, const Piece& piece, const float* row, double* out) {
  const int32_t width = piece.width;
  for (int32_t i = 0; i < width; ++i) out[i] = static_cast<double>(row[i]);
  if (width != p.channels) return;
  for (int32_t first = width; first + width <= kRun; first += width)
    for (int32_t i = 0; i < width; ++i) out[i] += static_cast<double>(row[first + i]);
}

template <class T>
void piece_moments(const NormModulateParams& p, const Piece& piece, double* mean, double* squares) {
  float sums[kRun] = {}, deviations[kRun] = {};
  double total[kRun];
  Coefficient<true> pivot;
  for_each_run<true>(p, piece, [&](const Run& run) {
    const T* x = static_cast<const T*>(p.x) + run.base;
#pragma omp simd
    for (int32_t i = 0; i < run.count; ++i) sums[i] += load(x[i]);
  });
  fold(p, piece, sums, total);
  pivot.fill(p, piece, [&](int64_t c) { return static_cast<float>(total[c - piece.channel] / piece.pixels); });
  for (float& sum : sums) sum = 0.0f;
  for_each_run<true>(p, piece, [&](const Run& run) {
    const T* x = static_cast<const T*>(p.x) + run.base;
#pragma omp simd
    for (int32_t i = 0; i < run.count; ++i) {
      const float deviation = load(x[i]) - pivot.row[i];
      deviations[i] += deviation;
      sums[i] += deviation * deviation;
    }
  });
  fold(p, piece, deviations, mean);
  fold(p, piece, sums, squares);
  for (int32_t i = 0; i < piece.width; ++i) {
    const Moments found = moments_about(pivot.row[i], mean[i], squares[i], piece.pixels);
    mean[i] = found.mean;
    squares[i] = found.squares;
  }
}

inline void save_statistics(const NormModulateParams& p, int64_t plane, const Moments& found) {
  const double rstd = 1.0 / std::sqrt(found.squares / static_cast<double>(p.pixels) + static_cast<double>(p.eps));
  const float mean = static_cast<float>(found.mean);
  const int64_t step = p.batch * p.channels;
  p.statistics[plane] = mean;
  p.statistics[plane + step] = static_cast<float>(rstd);
  p.statistics[plane + 2 * step] = static_cast<float>((static_cast<double>(mean) - found.mean) * rstd);
}

inline double block_count(const NormModulateParams& p, const NormPlan& plan, int64_t block) {
  const int64_t left = p.pixels - block * plan.pixels_per_block;
  return static_cast<double>(left < plan.pixels_per_block ? left : plan.pixels_per_block);
}

// Forward: z = ((x - mean) * scale + offset) * gamma + shift, where a gamma or beta of one value a channel is already in
// the coefficients. The activation is a loop of its own over the run, which is in the L1 cache: one loop with everything
// would be compiled for every combination.

template <class T, bool LAST, bool GAMMA, bool BETA>
void forward_run(const T* x, const T* gamma, const T* beta, float* z, const float* mean_row, const float* scale_row,
                 const float* offset_row, const float* shift_row, float one, int32_t count) {
  const float mean = mean_row[0], scale = scale_row[0], offset = offset_row[0], shift = shift_row[0];
#pragma omp simd
  for (int32_t i = 0; i < count; ++i) {
    float value = normalise(load(x[i]), at<LAST>(mean_row, mean, i), at<LAST>(scale_row, scale, i),
                            at<LAST>(offset_row, offset, i));
    if (GAMMA) value *= one + load(gamma[i]);
    if (GAMMA && !BETA) value += at<LAST>(shift_row, shift, i);
    if (BETA) value += load(beta[i]);
    z[i] = value;
  }
}

template <class T, int ACT>
void activate_run(const float* z, T* y, float slope, int32_t count) {
#pragma omp simd
  for (int32_t i = 0; i < count; ++i) store(activate<ACT>(z[i], slope), y + i);
}

template <class T, int ACT>
void activation_slope_run(const T* grad, float* z, float slope, int32_t count) {
#pragma omp simd
  for (int32_t i = 0; i < count; ++i) z[i] = load(grad[i]) * activation_slope<ACT>(z[i], slope);
}

// FUNCTION of the activation `act`.
#define FE_BY_ACTIVATION(FUNCTION)                                                                          \
  {FUNCTION<T, kLinear>, FUNCTION<T, kRelu>, FUNCTION<T, kLeakyRelu>, FUNCTION<T, kTanh>, FUNCTION<T, kSigmoid>, \
   FUNCTION<T, kSilu>}

template <class T>
auto activate_function(int32_t act) {
  static constexpr void (*functions[])(const float*, T*, float, int32_t) = FE_BY_ACTIVATION(activate_run);
  return functions[act];
}

template <class T>
auto activation_slope_function(int32_t act) {
  static constexpr void (*functions[])(const T*, float*, float, int32_t) = FE_BY_ACTIVATION(activation_slope_run);
  return functions[act];
}

#undef FE_BY_ACTIVATION

template <class T, bool LAST>
void forward_piece(const NormModulateParams& p, const Piece& piece) {
  const bool gamma_map = is_map(p.gamma_kind), beta_map = is_map(p.beta_kind);
  Coefficient<LAST> mean, scale, offset, shift;
  const auto gain_of = [&](const Normalisation& n, int64_t c) { return n.after * channel_gamma(p, piece.sample, c); };
  mean.fill(p, piece, [&](int64_t c) { return normalisation_of(p, piece.sample, c).mean; });
  scale.fill(p, piece, [&](int64_t c) {
    const Normalisation n = normalisation_of(p, piece.sample, c);
    return n.scale * gain_of(n, c);
  });
  offset.fill(p, piece, [&](int64_t c) {
    const Normalisation n = normalisation_of(p, piece.sample, c);
    return n.rest * gain_of(n, c) + (gamma_map ? 0.0f : channel_beta(p, piece.sample, c));
  });
  shift.fill(p, piece, [&](int64_t c) { return channel_beta(p, piece.sample, c); });
  const auto modulate = gamma_map ? (beta_map ? forward_run<T, LAST, true, true> : forward_run<T, LAST, true, false>)
                                  : (beta_map ? forward_run<T, LAST, false, true> : forward_run<T, LAST, false, false>);
  const auto activate = activate_function<T>(p.act);
  const T* x = static_cast<const T*>(p.x);
  T* y = static_cast<T*>(p.y);
  T spread[2][LAST ? kRun : 1];
  float z[kRun];
  for_each_run<LAST>(p, piece, [&](const Run& run) {
    const T* gamma = map_under<T, LAST>(p, piece, run, p.gamma, p.gamma_kind, spread[0]);
    const T* beta = map_under<T, LAST>(p, piece, run, p.beta, p.beta_kind, spread[1]);
    modulate(x + run.base, gamma, beta, z, mean.row, scale.row, offset.row, shift.row, unit(p), run.count);
    activate(z, y + run.base, p.slope, run.count);
  });
}

template <class T>
void forward(const NormModulateParams& p, int threads) {
  const NormPlan plan = plan_norm(p);
  const int64_t planes = p.batch * p.channels, blocks = p.batch * plan.blocks;
  const bool statistics = p.norm == kInstanceNorm;
#pragma omp parallel num_threads(threads) if (threads > 1)
  if (p.channels_last) {
    double* mean = p.workspace;
    double* squares = p.workspace + blocks * p.channels;
    if (statistics) {
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block)
        for_each_piece(p, plan, block, [&](const Piece& piece) {
          const int64_t at = block * p.channels + piece.channel;
          piece_moments<T>(p, piece, mean + at, squares + at);
        });
#pragma omp for schedule(static)
      for (int64_t plane = 0; plane < planes; ++plane) {
        const int64_t first = (plane / p.channels) * plan.blocks * p.channels + plane % p.channels;
        Moments found{mean[first], squares[first]};
        double seen = block_count(p, plan, 0);
        for (int64_t block = 1; block < plan.blocks; ++block) {
          const double count = block_count(p, plan, block);
          found = merge(found, seen, {mean[first + block * p.channels], squares[first + block * p.channels]}, count);
          seen += count;
        }
        save_statistics(p, plane, found);
      }
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      for_each_piece(p, plan, block, [&](const Piece& piece) { forward_piece<T, true>(p, piece); });
  } else if (plan.partial) {
    const int64_t pieces = planes * plan.blocks;
    Moments* partial = reinterpret_cast<Moments*>(p.workspace);
    if (statistics) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < pieces; ++i)
        partial[i] = plane_moments<T>(p, plane_block(p, plan, i / plan.blocks, i % plan.blocks));
#pragma omp for schedule(static)
      for (int64_t plane = 0; plane < planes; ++plane) {
        Moments found = partial[plane * plan.blocks];
        for (int64_t block = 1; block < plan.blocks; ++block)
          found = merge(found, static_cast<double>(block * plan.pixels_per_block), partial[plane * plan.blocks + block],
                        block_count(p, plan, block));
        save_statistics(p, plane, found);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces; ++i)
      forward_piece<T, false>(p, plane_block(p, plan, i / plan.blocks, i % plan.blocks));
  } else {
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < planes; ++plane) {
      if (statistics) {
        Moments found = plane_moments<T>(p, plane_block(p, plan, plane, 0));
        for (int64_t block = 1; block < plan.blocks; ++block)
          found = merge(found, static_cast<double>(block * plan.pixels_per_block),
                        plane_moments<T>(p, plane_block(p, plan, plane, block)), block_count(p, plan, block));
        save_statistics(p, plane, found);
      }
      for (int64_t block = 0; block < plan.blocks; ++block)
        forward_piece<T, false>(p, plane_block(p, plan, plane, block));
    }
  }
}

// Backward. With gz = dL/dz and gn = gz * gamma (gamma only where it is a map), three sums a plane: gz, gn, gn * u.

struct Sums {
  double gz, gn, slope;
};

template <bool LAST>
struct Gradients {
  const NormModulateParams& p;
  Coefficient<LAST> mean, scale, rest, gain, shift;  // u = (x - mean) * scale + rest; z = u * gain * gamma + shift

  Gradients(const NormModulateParams& params, const Piece& piece) : p(params) {
    mean.fill(p, piece, [&](int64_t c) { return normalisation_of(p, piece.sample, c).mean; });
    scale.fill(p, piece, [&](int64_t c) { return normalisation_of(p, piece.sample, c).scale; });
    rest.fill(p, piece, [&](int64_t c) { return normalisation_of(p, piece.sample, c).rest; });
    gain.fill(p, piece, [&](int64_t c) {
      return normalisation_of(p, piece.sample, c).after * channel_gamma(p, piece.sample, c);
    });
    shift.fill(p, piece, [&](int64_t c) { return channel_beta(p, piece.sample, c); });
  }
};

// Writes u, z, and for a map the factor that gamma is.
template <class T, bool LAST, bool GAMMA, bool BETA>
void recompute_run(const T* x, const T* gamma, const T* beta, const Gradients<LAST>& k, float one, int32_t count,
                   float* u, float* z, float* factor) {
  const float mean = k.mean.row[0], scale = k.scale.row[0], rest = k.rest.row[0];
  const float gain = k.gain.row[0], shift = k.shift.row[0];
#pragma omp simd
  for (int32_t i = 0; i < count; ++i) {
    const float value = normalise(load(x[i]), at<LAST>(k.mean.row, mean, i), at<LAST>(k.scale.row, scale, i),
                                  at<LAST>(k.rest.row, rest, i));
    float result = value * at<LAST>(k.gain.row, gain, i);
    u[i] = value;
    if (GAMMA) {
      factor[i] = one + load(gamma[i]);
      result *= factor[i];
    }
    z[i] = result + (BETA ? load(beta[i]) : at<LAST>(k.shift.row, shift, i));
  }
}

// Calls body(run, u, gz, gn) with the intermediate results of each run of a piece.
template <class T, bool LAST, class Body>
void for_each_gradient(const NormModulateParams& p, const Piece& piece, Body&& body) {
  const Gradients<LAST> k(p, piece);
  const bool gamma_map = is_map(p.gamma_kind), beta_map = is_map(p.beta_kind);
  const auto recompute =
      gamma_map ? (beta_map ? recompute_run<T, LAST, true, true> : recompute_run<T, LAST, true, false>)
                : (beta_map ? recompute_run<T, LAST, false, true> : recompute_run<T, LAST, false, false>);
  const auto activation_gradient = activation_slope_function<T>(p.act);
  const T* x = static_cast<const T*>(p.x);
  const T* grad = static_cast<const T*>(p.grad);
  float u[kRun], gz[kRun], gn[kRun];
  T spread[2][LAST ? kRun : 1];
  for_each_run<LAST>(p, piece, [&](const Run& run) {
    const T* gamma = map_under<T, LAST>(p, piece, run, p.gamma, p.gamma_kind, spread[0]);
    const T* beta = map_under<T, LAST>(p, piece, run, p.beta, p.beta_kind, spread[1]);
    recompute(x + run.base, gamma, beta, k, unit(p), run.count, u, gz, gn);
    activation_gradient(grad + run.base, gz, p.slope, run.count);
    if (gamma_map) {
#pragma omp simd
      for (int32_t i = 0; i < run.count; ++i) gn[i] *= gz[i];
    }
    body(run, u, gz, gamma_map ? gn : gz);
  });
}

template <class T>
Sums plane_sums(const NormModulateParams& p, const Piece& piece) {
  Sums total{0.0, 0.0, 0.0};
  for_each_gradient<T, false>(p, piece, [&](const Run& run, const float* u, const float* gz, const float* gn) {
    float first = 0.0f, second = 0.0f, third = 0.0f;
#pragma omp simd reduction(+ : first, second, third)
    for (int32_t i = 0; i < run.count; ++i) {
      first += gz[i];
      second += gn[i];
      third += gn[i] * u[i];
    }
    total.gz += first;
    total.gn += second;
    total.slope += third;
  });
  return total;
}

template <class T>
void piece_sums(const NormModulateParams& p, const Piece& piece, double* out) {
  float first[kRun] = {}, second[kRun] = {}, third[kRun] = {};
  for_each_gradient<T, true>(p, piece, [&](const Run& run, const float* u, const float* gz, const float* gn) {
#pragma omp simd
    for (int32_t i = 0; i < run.count; ++i) {
      first[i] += gz[i];
      second[i] += gn[i];
      third[i] += gn[i] * u[i];
    }
  });
  fold(p, piece, first, out);
  fold(p, piece, second, out + p.channels);
  fold(p, piece, third, out + 2 * p.channels);
}

// Keeps the totals of a plane and writes the gradients that have one value a channel.
inline void save_sums(const NormModulateParams& p, int64_t plane, const Sums& total, double* totals) {
  const int64_t sample = plane / p.channels, channel = plane % p.channels, step = p.batch * p.channels;
  const Normalisation n = normalisation_of(p, sample, channel);
  const float gamma = channel_gamma(p, sample, channel);
  totals[plane] = total.gn;
  totals[plane + step] = total.slope;
  if (p.grad_gamma && p.gamma_kind == kPerChannel)
    static_cast<float*>(p.grad_gamma)[plane] = static_cast<float>(total.slope * n.after);
  if (p.grad_beta && p.beta_kind == kPerChannel) static_cast<float*>(p.grad_beta)[plane] = static_cast<float>(total.gz);
  if (p.grad_mean) p.grad_mean[plane] = static_cast<float>(-total.gn * gamma * n.after);
  if (p.grad_rstd) p.grad_rstd[plane] = static_cast<float>(total.slope * gamma);
}

template <class T, bool LAST>
void backward_piece(const NormModulateParams& p, const Piece& piece, const double* totals) {
  Coefficient<LAST> scale, mean_grad, slope_grad, after;
  const int64_t row = piece.sample * p.channels, step = p.batch * p.channels;
  const bool statistics = p.norm == kInstanceNorm;
  scale.fill(p, piece, [&](int64_t c) {
    const Normalisation n = normalisation_of(p, piece.sample, c);
    return n.scale * n.after * channel_gamma(p, piece.sample, c);
  });
  const auto mean_of = [&](const double* sum) {
    return statistics ? static_cast<float>(*sum / static_cast<double>(p.pixels)) : 0.0f;
  };
  mean_grad.fill(p, piece, [&](int64_t c) { return mean_of(totals + row + c); });
  slope_grad.fill(p, piece, [&](int64_t c) { return mean_of(totals + row + c + step); });
  after.fill(p, piece, [&](int64_t c) { return normalisation_of(p, piece.sample, c).after; });
  T* grad_x = static_cast<T*>(p.grad_x);
  T* grad_gamma = is_map(p.gamma_kind) ? static_cast<T*>(p.grad_gamma) : nullptr;
  T* grad_beta = is_map(p.beta_kind) ? static_cast<T*>(p.grad_beta) : nullptr;
  if (!grad_x && !grad_gamma && !grad_beta) return;
  for_each_gradient<T, LAST>(p, piece, [&](const Run& run, const float* u, const float* gz, const float* gn) {
    if (grad_x) {
      T* out = grad_x + run.base;
      const float s = scale.row[0], m = mean_grad.row[0], g = slope_grad.row[0];
#pragma omp simd
      for (int32_t i = 0; i < run.count; ++i)
        store(normalise_gradient(gn[i], u[i], at<LAST>(scale.row, s, i), at<LAST>(mean_grad.row, m, i),
                                 at<LAST>(slope_grad.row, g, i)),
              out + i);
    }
    if (grad_gamma) {
      T* out = grad_gamma + run.base;
      const float a = after.row[0];
#pragma omp simd
      for (int32_t i = 0; i < run.count; ++i) store(gz[i] * (u[i] * at<LAST>(after.row, a, i)), out + i);
    }
    if (grad_beta) {
      T* out = grad_beta + run.base;
#pragma omp simd
      for (int32_t i = 0; i < run.count; ++i) store(gz[i], out + i);
    }
  });
}

template <class T>
void backward(const NormModulateParams& p, int threads) {
  const NormPlan plan = plan_norm(p);
  const int64_t planes = p.batch * p.channels, blocks = p.batch * plan.blocks;
  const bool wants_sums = norm_backward_needs_sums(p);
  double* totals = p.workspace;
  double* partial = totals + 2 * planes;
#pragma omp parallel num_threads(threads) if (threads > 1)
  if (p.channels_last) {
    if (wants_sums) {
#pragma omp for schedule(static)
      for (int64_t block = 0; block < blocks; ++block)
        for_each_piece(p, plan, block, [&](const Piece& piece) {
          piece_sums<T>(p, piece, partial + 3 * block * p.channels + piece.channel);
        });
#pragma omp for schedule(static)
      for (int64_t plane = 0; plane < planes; ++plane) {
        const double* first = partial + 3 * (plane / p.channels) * plan.blocks * p.channels + plane % p.channels;
        Sums total{0.0, 0.0, 0.0};
        for (int64_t block = 0; block < plan.blocks; ++block, first += 3 * p.channels) {
          total.gz += first[0];
          total.gn += first[p.channels];
          total.slope += first[2 * p.channels];
        }
        save_sums(p, plane, total, totals);
      }
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      for_each_piece(p, plan, block, [&](const Piece& piece) { backward_piece<T, true>(p, piece, totals); });
  } else {
    // Few large planes are cut into blocks for the sums; else the sums leave a plane in the cache for its gradients.
    const int64_t cuts = plan.partial ? plan.blocks : 1, pieces = planes * cuts;
    Sums* sums = reinterpret_cast<Sums*>(partial);
    if (wants_sums && plan.partial) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < pieces; ++i)
        sums[i] = plane_sums<T>(p, plane_block(p, plan, i / cuts, i % cuts));
    }
    if (wants_sums && plan.partial) {
#pragma omp for schedule(static)
      for (int64_t plane = 0; plane < planes; ++plane) {
        Sums total{0.0, 0.0, 0.0};
        for (int64_t block = 0; block < cuts; ++block) {
          const Sums& here = sums[plane * cuts + block];
          total = {total.gz + here.gz, total.gn + here.gn, total.slope + here.slope};
        }
        save_sums(p, plane, total, totals);
      }
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces; ++i) {
      if (plan.partial) {
        backward_piece<T, false>(p, plane_block(p, plan, i / cuts, i % cuts), totals);
        continue;
      }
      if (wants_sums) {
        Sums total{0.0, 0.0, 0.0};
        for (int64_t block = 0; block < plan.blocks; ++block) {
          const Sums here = plane_sums<T>(p, plane_block(p, plan, i, block));
          total = {total.gz + here.gz, total.gn + here.gn, total.slope + here.slope};
        }
        save_sums(p, i, total, totals);
      }
      for (int64_t block = 0; block < plan.blocks; ++block)
        backward_piece<T, false>(p, plane_block(p, plan, i, block), totals);
    }
  }
}

template <class T>
void run(const NormModulateParams& p, int threads, bool is_backward) {
  is_backward ? backward<T>(p, threads) : forward<T>(p, threads);
}

void run_dtype(const NormModulateParams& p, int threads, bool is_backward) {
  if (p.dtype == kFloat16) return run<Float16>(p, threads, is_backward);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads, is_backward);
  run<float>(p, threads, is_backward);
}

}  // namespace

void norm_modulate_fwd(const NormModulateParams& p, int threads) { run_dtype(p, threads, false); }
void norm_modulate_bwd(const NormModulateParams& p, int threads) { run_dtype(p, threads, true); }

}  // namespace FE_ISA
}  // namespace fe
