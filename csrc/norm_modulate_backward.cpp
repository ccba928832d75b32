// SPDX-License-Identifier: Apache-2.0
#include "norm_modulate_rows.h"

namespace fe {
namespace FE_ISA {
namespace {

// With gz = dL/dz and gn = gz * gamma (gamma only where it is a map), three sums a plane: gz, gn, gn * u.
struct Sums {
  double gz, gn, slope;
};

inline Sums operator+(const Sums& a, const Sums& b) { return {a.gz + b.gz, a.gn + b.gn, a.slope + b.slope}; }

// What the loops over a run read. x, grad and the maps as float32; `grad` reaches y, or z itself where a loop over the
// activation went before.
struct GradientRow {
  const float *x, *grad, *gamma, *beta;
  int32_t count;
};

// Rows that the gradients of x, gamma and beta are written to.
struct GradientOut {
  float *x, *gamma, *beta;
};

template <bool LAST>
struct GradientCoefficients {
  Modulation<LAST> z;
  Coefficient<LAST> scale, rest;                   // u = (x - mean) * scale + rest
  Coefficient<LAST> mean_grad, slope_grad, after;  // read where gradients are written

  GradientCoefficients(const NormModulateParams& p, const Piece& piece) : z(p, piece) {
    scale.fill(p, piece, [&](int64_t c) { return normalisation_of(p, piece.sample, c).scale; });
    rest.fill(p, piece, [&](int64_t c) { return normalisation_of(p, piece.sample, c).rest; });
  }

  // The means of gn and of gn * u over the plane; 0 where the statistics are constants, and where x has no gradient: then
  // there may be no totals.
  void fill_means(const NormModulateParams& p, const Piece& piece, const double* totals) {
    const double* row = totals + piece.sample * p.channels;
    const auto mean_of = [&](const double* sum) {
      return p.norm == kInstanceNorm && p.grad_x ? static_cast<float>(*sum / static_cast<double>(p.pixels)) : 0.0f;
    };
    mean_grad.fill(p, piece, [&](int64_t c) { return mean_of(row + c); });
    slope_grad.fill(p, piece, [&](int64_t c) { return mean_of(row + c + p.batch * p.channels); });
    after.fill(p, piece, [&](int64_t c) { return normalisation_of(p, piece.sample, c).after; });
  }
};

struct Gradient {
  float u, gz, gn;
};

// The gradient of element i of a run.
template <int ACT, bool GAMMA, bool BETA, bool LAST>
struct GradientAt {
  const GradientCoefficients<LAST>& k;
  const Modulate<LAST> z{k.z};
  const float scale = k.scale.row[0], rest = k.rest.row[0], slope = k.z.slope;

  inline Gradient operator()(const float* x, const float* grad, const float* gamma, const float* beta,
                             int32_t i) const {
    Gradient g;
    g.u = normalise(x[i], at<LAST>(k.z.mean.row, z.mean, i), at<LAST>(k.scale.row, scale, i),
                    at<LAST>(k.rest.row, rest, i));
    g.gz = grad[i];
    if (ACT != kLinear)
      g.gz *= activation_slope<ACT>(
          z.template operator()<GAMMA, BETA>(i, x[i], GAMMA ? gamma[i] : 0.0f, BETA ? beta[i] : 0.0f), slope);
    g.gn = GAMMA ? g.gz * (z.one + gamma[i]) : g.gz;
    return g;
  }
};

template <int ACT, bool GAMMA, bool BETA>
void sum_row(const GradientCoefficients<false>& k, const GradientRow& row, Sums& total) {
  const GradientAt<ACT, GAMMA, BETA, false> gradient{k};
  const float *x = row.x, *grad = row.grad, *gamma = row.gamma, *beta = row.beta;
  float gz = 0.0f, gn = 0.0f, slope = 0.0f;
#pragma omp simd reduction(+ : gz, gn, slope)
  for (int32_t i = 0; i < row.count; ++i) {
    const Gradient g = gradient(x, grad, gamma, beta, i);
    gz += g.gz;
    if (GAMMA) gn += g.gn;
    slope += g.gn * g.u;
  }
  total = total + Sums{gz, GAMMA ? gn : gz, slope};
}

// Channels last: of every channel of a run.
template <int ACT, bool GAMMA, bool BETA>
void sum_channels(const GradientCoefficients<true>& k, const GradientRow& row, float* gz, float* gn, float* slope) {
  const GradientAt<ACT, GAMMA, BETA, true> gradient{k};
  const float *x = row.x, *grad = row.grad, *gamma = row.gamma, *beta = row.beta;
#pragma omp simd
  for (int32_t i = 0; i < row.count; ++i) {
    const Gradient g = gradient(x, grad, gamma, beta, i);
    gz[i] += g.gz;
    gn[i] += g.gn;
    slope[i] += g.gn * g.u;
  }
}

template <int ACT, bool GAMMA, bool BETA, bool LAST, bool MAPS>
void write_gradients(const GradientCoefficients<LAST>& k, const GradientRow& row, const GradientOut& out) {
  const GradientAt<ACT, GAMMA, BETA, LAST> gradient{k};
  const float *x = row.x, *grad = row.grad, *gamma = row.gamma, *beta = row.beta;
  float *out_x = out.x, *out_gamma = out.gamma, *out_beta = out.beta;
  const float mean_grad = k.mean_grad.row[0], slope_grad = k.slope_grad.row[0], after = k.after.row[0];
#pragma omp simd
  for (int32_t i = 0; i < row.count; ++i) {
    const Gradient g = gradient(x, grad, gamma, beta, i);
    // z's scale is u's, times what follows the normalisation and gamma's factor.
    out_x[i] = normalise_gradient(g.gn, g.u, at<LAST>(k.z.scale.row, gradient.z.scale, i),
                                  at<LAST>(k.mean_grad.row, mean_grad, i), at<LAST>(k.slope_grad.row, slope_grad, i));
    if (MAPS) {
      out_gamma[i] = g.gz * (g.u * at<LAST>(k.after.row, after, i));
      out_beta[i] = g.gz;
    }
  }
}

// row = grad * dy/dz, from z in `row`.
template <int ACT>
void activation_slope_row(const float* grad, float* row, int32_t count) {
#pragma omp simd
  for (int32_t i = 0; i < count; ++i) row[i] = grad[i] * activation_slope<ACT>(row[i], 0.0f);
}

// Calls body with every run of a piece and its rows.
template <class T, bool LAST, class Body>
void for_each_gradient_row(const NormModulateParams& p, const Piece& piece, const GradientCoefficients<LAST>& k,
                           Body&& body) {
  const auto modulate = modulate_function<LAST>(p, kLinear);
  const auto slopes = FE_BY_SMOOTH_ACTIVATION(activation_slope_row, p.act);
  const bool needs_beta = p.act != kLinear;
  float buffers[4][kRun<LAST>], smooth[kRun<LAST>];
  for_each_run<LAST>(p, piece, [&](const Run& run) {
    GradientRow row;
    row.x = read_row(static_cast<const T*>(p.x) + run.base, run.count, buffers[0]);
    row.grad = read_row(static_cast<const T*>(p.grad) + run.base, run.count, buffers[1]);
    row.gamma = map_under<T, LAST>(p, piece, run, p.gamma, p.gamma_kind, buffers[2]);
    row.beta = needs_beta ? map_under<T, LAST>(p, piece, run, p.beta, p.beta_kind, buffers[3]) : nullptr;
    row.count = run.count;
    if (is_smooth(p.act)) {
      modulate(k.z, row.x, row.gamma, row.beta, smooth, run.count);
      slopes(row.grad, smooth, run.count);
      row.grad = smooth;
    }
    body(run, row);
  });
}

template <class T>
Sums plane_sums(const NormModulateParams& p, const Piece& piece) {
  const GradientCoefficients<false> k(p, piece);
  const auto add = by_activation(p.act, [&](auto ACT) {
    return by_flags(is_map(p.gamma_kind), is_map(p.beta_kind),
                    [&](auto GAMMA, auto BETA) { return &sum_row<ACT, GAMMA, BETA && ACT != kLinear>; });
  });
  Sums total{0.0, 0.0, 0.0};
  for_each_gradient_row<T>(p, piece, k, [&](const Run&, const GradientRow& row) { add(k, row, total); });
  return total;
}

template <class T>
void piece_sums(const NormModulateParams& p, const Piece& piece, double* out) {
  const GradientCoefficients<true> k(p, piece);
  const auto add = by_activation(p.act, [&](auto ACT) {
    return by_flags(is_map(p.gamma_kind), is_map(p.beta_kind),
                    [&](auto GAMMA, auto BETA) { return &sum_channels<ACT, GAMMA, BETA && ACT != kLinear>; });
  });
  float gz[kRun<true>] = {}, gn[kRun<true>] = {}, slope[kRun<true>] = {};
  for_each_gradient_row<T>(p, piece, k, [&](const Run&, const GradientRow& row) { add(k, row, gz, gn, slope); });
  fold(p, piece, gz, out);
  fold(p, piece, gn, out + p.channels);
  fold(p, piece, slope, out + 2 * p.channels);
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
  T* grad_x = static_cast<T*>(p.grad_x);
  T* grad_gamma = is_map(p.gamma_kind) ? static_cast<T*>(p.grad_gamma) : nullptr;
  T* grad_beta = is_map(p.beta_kind) ? static_cast<T*>(p.grad_beta) : nullptr;
  if (!grad_x && !grad_gamma && !grad_beta) return;
  GradientCoefficients<LAST> k(p, piece);
  k.fill_means(p, piece, totals);
  const bool maps = grad_gamma || grad_beta;
  const auto write = by_activation(p.act, [&](auto ACT) {
    return by_flags(is_map(p.gamma_kind), is_map(p.beta_kind), [&](auto GAMMA, auto BETA) {
      constexpr bool kBeta = BETA && ACT != kLinear;
      return maps ? &write_gradients<ACT, GAMMA, kBeta, LAST, true> : &write_gradients<ACT, GAMMA, kBeta, LAST, false>;
    });
  });
  float buffers[3][kRun<LAST>];
  // What is not wanted goes to a buffer and no further.
  const auto out_of = [&](T* gradient, const Run& run, float* buffer) {
    return gradient ? row_of(gradient + run.base, buffer) : buffer;
  };
  for_each_gradient_row<T>(p, piece, k, [&](const Run& run, const GradientRow& row) {
    const GradientOut out{out_of(grad_x, run, buffers[0]), out_of(grad_gamma, run, buffers[1]),
                          out_of(grad_beta, run, buffers[2])};
    write(k, row, out);
    if (grad_x) write_row(out.x, run.count, grad_x + run.base);
    if (grad_gamma) write_row(out.gamma, run.count, grad_gamma + run.base);
    if (grad_beta) write_row(out.beta, run.count, grad_beta + run.base);
  });
}

template <class T>
void backward(const NormModulateParams& p, int threads) {
  const NormPlan plan = plan_norm(p);
  const int64_t planes = p.batch * p.channels, blocks = p.batch * plan.blocks;
  const bool wants_sums = norm_backward_needs_sums(p);
  double* totals = p.workspace;
  double* partial = totals + 2 * planes;
  // The sum over the blocks of a plane, in their order.
  const auto join_sums = [&](int64_t plane, auto&& sums_of) {
    Sums total{0.0, 0.0, 0.0};
    for (int64_t block = 0; block < plan.blocks; ++block) total = total + sums_of(block);
    save_sums(p, plane, total, totals);
  };
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
        join_sums(plane, [&](int64_t block) {
          const double* sums = first + 3 * block * p.channels;
          return Sums{sums[0], sums[p.channels], sums[2 * p.channels]};
        });
      }
    }
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block)
      for_each_piece(p, plan, block, [&](const Piece& piece) { backward_piece<T, true>(p, piece, totals); });
  } else if (plan.partial) {
    const int64_t pieces = planes * plan.blocks;
    Sums* sums = reinterpret_cast<Sums*>(partial);
    if (wants_sums) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < pieces; ++i)
        sums[i] = plane_sums<T>(p, plane_block(p, plan, i / plan.blocks, i % plan.blocks));
#pragma omp for schedule(static)
      for (int64_t plane = 0; plane < planes; ++plane)
        join_sums(plane, [&](int64_t block) { return sums[plane * plan.blocks + block]; });
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces; ++i)
      backward_piece<T, false>(p, plane_block(p, plan, i / plan.blocks, i % plan.blocks), totals);
  } else {
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < planes; ++plane) {
      if (wants_sums)
        join_sums(plane, [&](int64_t block) { return plane_sums<T>(p, plane_block(p, plan, plane, block)); });
      // The last block first: it is the one that is surely still in the cache.
      for (int64_t block = plan.blocks - 1; block >= 0; --block)
        backward_piece<T, false>(p, plane_block(p, plan, plane, block), totals);
    }
  }
}

}  // namespace

void norm_modulate_bwd(const NormModulateParams& p, int threads) {
  if (p.dtype == kFloat16) return backward<Float16>(p, threads);
  if (p.dtype == kBFloat16) return backward<BFloat16>(p, threads);
  backward<float>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
