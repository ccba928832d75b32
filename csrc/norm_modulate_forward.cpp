// SPDX-License-Identifier: Apache-2.0
#include <cmath>

#include "norm_modulate_rows.h"

namespace fe {
namespace FE_ISA {
namespace {

// Statistics. Deviations are taken from a pivot, the mean of the first eighth of the values: its square distance to the
// mean of all is at most eight times their variance, so that no difference of large numbers is made.
constexpr int32_t kPivotShare = 8;

inline Moments moments_about(float pivot, double deviations, double squares, double count) {
  const double rest = squares - deviations * deviations / count;
  return {static_cast<double>(pivot) + deviations / count, rest < 0.0 ? 0.0 : rest};
}

inline Moments run_moments(const float* x, int32_t count) {
  constexpr int32_t kLanes = 64;  // sums beside each other: additions need not wait for the one before
  const int32_t head = (count + kPivotShare - 1) / kPivotShare;
  float sum = 0.0f, deviations[kLanes] = {}, squares[kLanes] = {};
#pragma omp simd reduction(+ : sum)
  for (int32_t i = 0; i < head; ++i) sum += x[i];
  const float pivot = sum / static_cast<float>(head);
  const auto add = [&](const float* values, int32_t lane) {
    const float deviation = values[lane] - pivot;
    deviations[lane] += deviation;
    squares[lane] += deviation * deviation;
  };
  int32_t first = 0;
  for (; first + kLanes <= count; first += kLanes) {
#pragma omp simd
    for (int32_t lane = 0; lane < kLanes; ++lane) add(x + first, lane);
  }
  for (int32_t lane = 0; lane < count - first; ++lane) add(x + first, lane);
  float total = 0.0f, total_squares = 0.0f;
#pragma omp simd reduction(+ : total, total_squares)
  for (int32_t lane = 0; lane < kLanes; ++lane) {
    total += deviations[lane];
    total_squares += squares[lane];
  }
  return moments_about(pivot, total, total_squares, count);
}

template <class T>
Moments plane_moments(const NormModulateParams& p, const Piece& piece) {
  Moments found{0.0, 0.0};
  double seen = 0.0;
  float buffer[kRun<false>];
  for_each_run<false>(p, piece, [&](const Run& run) {
    const Moments here = run_moments(read_row(static_cast<const T*>(p.x) + run.base, run.count, buffer), run.count);
    found = seen > 0.0 ? merge(found, seen, here, run.count) : here;
    seen += run.count;
  });
  return found;
}

// Channels last: of every channel of a piece.
template <class T>
void piece_moments(const NormModulateParams& p, const Piece& piece, double* mean, double* squares) {
  constexpr int32_t kLength = kRun<true>;
  float sums[kLength] = {}, deviations[kLength] = {}, buffer[kLength];
  double total[kLength];
  Coefficient<true> pivot;
  const auto row_under = [&](const Run& run) {
    return read_row(static_cast<const T*>(p.x) + run.base, run.count, buffer);
  };
  Piece head = piece;
  head.pixels = (piece.pixels + kPivotShare - 1) / kPivotShare;
  for_each_run<true>(p, head, [&](const Run& run) {
    const float* x = row_under(run);
#pragma omp simd
    for (int32_t i = 0; i < run.count; ++i) sums[i] += x[i];
  });
  fold(p, piece, sums, total);
  pivot.fill(p, piece, [&](int64_t c) { return static_cast<float>(total[c - piece.channel] / head.pixels); });
  for (float& sum : sums) sum = 0.0f;
  for_each_run<true>(p, piece, [&](const Run& run) {
    const float* x = row_under(run);
#pragma omp simd
    for (int32_t i = 0; i < run.count; ++i) {
      const float deviation = x[i] - pivot.row[i];
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

// The moments of a plane from those of its blocks, which moments_of(block) gives.
template <class MomentsOf>
void join_statistics(const NormModulateParams& p, const NormPlan& plan, int64_t plane, MomentsOf&& moments_of) {
  Moments found = moments_of(0);
  for (int64_t block = 1; block < plan.blocks; ++block) {
    const int64_t seen = block * plan.pixels_per_block, left = p.pixels - seen;
    const int64_t count = left < plan.pixels_per_block ? left : plan.pixels_per_block;
    found = merge(found, static_cast<double>(seen), moments_of(block), static_cast<double>(count));
  }
  save_statistics(p, plane, found);
}

template <int ACT>
void activate_row(float* y, int32_t count) {
#pragma omp simd
  for (int32_t i = 0; i < count; ++i) y[i] = activate<ACT>(y[i], 0.0f);
}

template <class T, bool LAST>
void forward_piece(const NormModulateParams& p, const Piece& piece) {
  const Modulation<LAST> k(p, piece);
  const auto modulate = modulate_function<LAST>(p, p.act);
  const auto activate = FE_BY_SMOOTH_ACTIVATION(activate_row, p.act);
  float buffers[4][kRun<LAST>];
  for_each_run<LAST>(p, piece, [&](const Run& run) {
    const float* x = read_row(static_cast<const T*>(p.x) + run.base, run.count, buffers[0]);
    const float* gamma = map_under<T, LAST>(p, piece, run, p.gamma, p.gamma_kind, buffers[1]);
    const float* beta = map_under<T, LAST>(p, piece, run, p.beta, p.beta_kind, buffers[2]);
    T* out = static_cast<T*>(p.y) + run.base;
    float* y = row_of(out, buffers[3]);
    modulate(k, x, gamma, beta, y, run.count);
    if (is_smooth(p.act)) activate(y, run.count);
    write_row(y, run.count, out);
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
        join_statistics(p, plan, plane, [&](int64_t block) {
          return Moments{mean[first + block * p.channels], squares[first + block * p.channels]};
        });
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
      for (int64_t plane = 0; plane < planes; ++plane)
        join_statistics(p, plan, plane, [&](int64_t block) { return partial[plane * plan.blocks + block]; });
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < pieces; ++i)
      forward_piece<T, false>(p, plane_block(p, plan, i / plan.blocks, i % plan.blocks));
  } else {
#pragma omp for schedule(static)
    for (int64_t plane = 0; plane < planes; ++plane) {
      if (statistics)
        join_statistics(p, plan, plane,
                        [&](int64_t block) { return plane_moments<T>(p, plane_block(p, plan, plane, block)); });
      // The last block first: it is the one that is surely still in the cache.
      for (int64_t block = plan.blocks - 1; block >= 0; --block)
        forward_piece<T, false>(p, plane_block(p, plan, plane, block));
    }
  }
}

}  // namespace

void norm_modulate_fwd(const NormModulateParams& p, int threads) {
  if (p.dtype == kFloat16) return forward<Float16>(p, threads);
  if (p.dtype == kBFloat16) return forward<BFloat16>(p, threads);
  forward<float>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
