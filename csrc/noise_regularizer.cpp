// SPDX-License-Identifier: Apache-2.0
#include "noise_regularizer.h"

#include "elementwise.h"

namespace fe {
namespace FE_ISA {
namespace {

constexpr int64_t kChunk = 1024;  // columns of a row buffer

// One map of one sample, with its pyramid in the workspace.
struct Map {
  const void* data;
  void* grad;
  const NoiseMapPlan* plan;
  int64_t side, sample;
  float* coarse;  // levels 1 and up, one after the other
  float* grad_coarse;
  float* moments;

  float* level(float* pyramid, int32_t l) const { return pyramid + noise_level_offset(side, 1, l); }
};

template <class T>
Map map_at(const NoiseRegularizerParams& p, const NoisePlan& plan, int64_t sample, int32_t index) {
  const NoiseMapPlan& m = plan.maps[index];
  const int64_t side = p.sides[index], offset = sample * side * side;
  Map map{};
  map.data = static_cast<const T*>(p.maps[index]) + offset;
  if (p.grad_maps[index]) map.grad = static_cast<T*>(p.grad_maps[index]) + offset;
  map.plan = &m;
  map.side = side;
  map.sample = sample;
  map.coarse = p.coarse + sample * plan.coarse + m.first_coarse;
  map.grad_coarse = map.coarse + p.batch * plan.coarse;
  map.moments = p.moments + 2 * (sample * plan.levels + m.first_level);
  return map;
}

// Which map and band a block of one sample is.
inline int32_t map_of(const NoisePlan& plan, int32_t count, int64_t block) {
  int32_t index = count - 1;
  while (plan.maps[index].first_block > block) --index;
  return index;
}

// Sums of products with the value to the right and with the value above, in lanes beside each other: an addition need not
// wait for the one before. In float32 along a row, in double over the rows.
constexpr int32_t kLanes = 32;

struct Products {
  double x[kLanes] = {}, y[kLanes] = {};

  void save(double* sums) const {
    sums[0] = sums[1] = 0.0;
    for (int32_t i = 0; i < kLanes; ++i) sums[0] += x[i], sums[1] += y[i];
  }
};

// Adds a row's products along x where ALONG, and along y where ABOVE.
template <bool ALONG, bool ABOVE, class T>
void add_row(const T* row, const T* above, int64_t side, Products& products) {
  float x[kLanes] = {}, y[kLanes] = {};
  const auto add = [&](const auto* here, const auto* right, const auto* up) {
#pragma omp simd
    for (int32_t i = 0; i < kLanes; ++i) {
      if (ALONG) x[i] += load(here[i]) * load(right[i]);
      if (ABOVE) y[i] += load(here[i]) * load(up[i]);
    }
  };
  int64_t first = 0;
  for (; first + kLanes < side; first += kLanes) add(row + first, row + first + 1, ABOVE ? above + first : row);
  // The last lanes, in which the row's last value has its first one to the right; zeros beyond them.
  float here[kLanes] = {}, right[kLanes] = {}, up[kLanes] = {};
  const int64_t left = side - first;
  for (int64_t i = 0; i < left; ++i) here[i] = load(row[first + i]);
  for (int64_t i = 0; ALONG && i + 1 < left; ++i) right[i] = here[i + 1];
  for (int64_t i = 0; ABOVE && i < left; ++i) up[i] = load(above[first + i]);
  right[left - 1] = load(row[0]);
  add(here, right, up);
#pragma omp simd
  for (int32_t i = 0; i < kLanes; ++i) {
    if (ALONG) products.x[i] += static_cast<double>(x[i]);
    if (ABOVE) products.y[i] += static_cast<double>(y[i]);
  }
}

// Means over 2x2 of rows [first, end) of a level, whose side is `side`, into the next level.
template <class T>
void halve(const T* map, int64_t side, int64_t first, int64_t end, float* next) {
  const int64_t half = side / 2;
  for (int64_t y = first; y < end; y += 2) {
    const T* a = map + y * side;
    const T* b = a + side;
    float* out = next + y / 2 * half;
#pragma omp simd
    for (int64_t i = 0; i < half; ++i)
      out[i] = ((load(a[2 * i]) + load(a[2 * i + 1])) + (load(b[2 * i]) + load(b[2 * i + 1]))) * 0.25f;
  }
}

inline int64_t row_above(int64_t row, int64_t side) { return row ? row - 1 : side - 1; }

// Sums over rows [first, end) of a level, and the next level under them unless it is null. With `whole` false the row above
// the first belongs to another band and may not be there yet: its products are left to `finish_map`.
template <class T>
void sum_rows(const T* map, int64_t side, int64_t first, int64_t end, bool whole, float* next, double* sums) {
  Products products;
  for (int64_t row = first; row < end; ++row) {
    const T* here = map + row * side;
    if (whole || row > first) {
      add_row<true, true>(here, map + row_above(row, side) * side, side, products);
    } else {
      add_row<true, false>(here, here, side, products);
    }
    // While the two rows are in the L1 cache. A level that has a next one has an even side, and bands of even height.
    if (next && row % 2) halve(map, side, row - 1, row + 1, next);
  }
  products.save(sums);
}

struct Band {
  int64_t first, end;
};

inline Band band_at(const Map& map, int64_t index) {
  const int64_t first = index * map.plan->rows, end = first + map.plan->rows;
  return {first, end < map.side ? end : map.side};
}

template <class T>
void halve_band(const Map& map, const Band& band) {
  const int32_t inner = map.plan->inner;
  if (inner > 0) halve(static_cast<const T*>(map.data), map.side, band.first, band.end, map.level(map.coarse, 1));
  for (int32_t l = 1; l < inner; ++l)
    halve(map.level(map.coarse, l), map.side >> l, band.first >> l, band.end >> l, map.level(map.coarse, l + 1));
}

void halve_rest(const Map& map) {
  for (int32_t l = map.plan->inner < 1 ? 1 : map.plan->inner; l + 1 < map.plan->levels; ++l)
    halve(map.level(map.coarse, l), map.side >> l, 0, map.side >> l, map.level(map.coarse, l + 1));
}

template <class T>
void sum_band(const Map& map, const Band& band, double* sums) {
  const int32_t inner = map.plan->inner;
  const auto next = [&](int32_t l) { return l < inner ? map.level(map.coarse, l + 1) : nullptr; };
  sum_rows(static_cast<const T*>(map.data), map.side, band.first, band.end, true, next(0), sums);
  for (int32_t l = 1; l <= inner; ++l)
    sum_rows(map.level(map.coarse, l), map.side >> l, band.first >> l, band.end >> l, false, next(l), sums + 2 * l);
}

void finish_map(const Map& map, const double* partials) {
  const NoiseMapPlan& m = *map.plan;
  for (int32_t l = 0; l < m.levels; ++l) {
    const int64_t side = map.side >> l;
    const float* level = map.level(map.coarse, l);  // not read at level 0
    double sums[2];
    if (l > m.inner) {
      sum_rows(level, side, 0, side, true, nullptr, sums);
    } else {
      Products above;
      for (int64_t b = 0; l > 0 && b < m.blocks; ++b) {
        const int64_t row = band_at(map, b).first >> l;
        add_row<false, true>(level + row * side, level + row_above(row, side) * side, side, above);
      }
      above.save(sums);
      for (int64_t b = 0; b < m.blocks; ++b) {
        sums[0] += partials[kNoiseSums * b + 2 * l];
        sums[1] += partials[kNoiseSums * b + 2 * l + 1];
      }
    }
    const double area = static_cast<double>(side) * static_cast<double>(side);
    map.moments[2 * l] = static_cast<float>(sums[0] / area);
    map.moments[2 * l + 1] = static_cast<float>(sums[1] / area);
  }
}

template <class T>
void forward(const NoiseRegularizerParams& p, int threads) {
  const NoisePlan plan = plan_noise(p, false);
  const int64_t blocks = p.batch * plan.blocks, maps = p.batch * p.count;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t sample = i / plan.blocks, block = i % plan.blocks;
      const int32_t index = map_of(plan, p.count, block);
      const Map map = map_at<T>(p, plan, sample, index);
      const Band band = band_at(map, block - map.plan->first_block);
      sum_band<T>(map, band, p.partials + kNoiseSums * i);
    }
#pragma omp for schedule(static, 1)  // neighbours are alike in size
    for (int64_t i = 0; i < maps; ++i) {
      const Map map = map_at<T>(p, plan, i / p.count, static_cast<int32_t>(i % p.count));
      halve_rest(map);
      finish_map(map, p.partials + kNoiseSums * (map.sample * plan.blocks + map.plan->first_block));
    }
  }
  for (int64_t n = 0; n < p.batch; ++n) {
    double loss = 0.0;
    for (int32_t i = 0; i < 2 * plan.levels; ++i) {
      const double moment = static_cast<double>(p.moments[2 * n * plan.levels + i]);
      loss += moment * moment;
    }
    p.loss[n] = static_cast<float>(loss);
  }
}

// grad = along_x * (left + right) + along_y * (above + below) + next / 4, for rows [first, end) of a level.
template <class T>
void gradient_rows(const T* map, int64_t side, int64_t first, int64_t end, float along_x, float along_y,
                   const float* next, T* grad) {
  float tail[kChunk];
  for (int64_t y = first; y < end; ++y) {
    const T* row = map + y * side;
    const T* above = map + (y ? y - 1 : side - 1) * side;
    const T* below = map + (y + 1 < side ? y + 1 : 0) * side;
    T* out = grad + y * side;
    for (int64_t start = 0; start < side; start += kChunk) {
      const int64_t stop = start + kChunk < side ? start + kChunk : side;
      if (next) {
        // Levels that have a next one have an even side.
        const float* from = next + y / 2 * (side / 2) + start / 2;
        const int64_t pairs = (stop - start) / 2;
#pragma omp simd
        for (int64_t i = 0; i < pairs; ++i) {
          const float quarter = from[i] * 0.25f;
          tail[2 * i] = quarter;
          tail[2 * i + 1] = quarter;
        }
      } else {
        for (int64_t i = 0; i < stop - start; ++i) tail[i] = 0.0f;
      }
      const auto edge = [&](int64_t i) {
        const float beside = load(row[i ? i - 1 : side - 1]) + load(row[i + 1 < side ? i + 1 : 0]);
        store(along_x * beside + along_y * (load(above[i]) + load(below[i])) + tail[i - start], out + i);
      };
      if (start == 0) edge(0);
      if (stop == side && side > 1) edge(side - 1);
      const int64_t from = start > 0 ? start : 1, to = stop < side ? stop : side - 1;
#pragma omp simd
      for (int64_t i = from; i < to; ++i) {
        const float beside = load(row[i - 1]) + load(row[i + 1]);
        store(along_x * beside + along_y * (load(above[i]) + load(below[i])) + tail[i - start], out + i);
      }
    }
  }
}

struct Slopes {
  float along_x, along_y;
};

inline Slopes slopes_at(const Map& map, int32_t l, float grad) {
  const float side = static_cast<float>(map.side >> l);
  const float factor = 2.0f * grad / (side * side);
  return {factor * map.moments[2 * l], factor * map.moments[2 * l + 1]};
}

void coarse_gradient(const Map& map, int32_t l, int64_t first, int64_t end, float grad) {
  const Slopes slopes = slopes_at(map, l, grad);
  const float* next = l + 1 < map.plan->levels ? map.level(map.grad_coarse, l + 1) : nullptr;
  gradient_rows(map.level(map.coarse, l), map.side >> l, first, end, slopes.along_x, slopes.along_y, next,
                map.level(map.grad_coarse, l));
}

template <class T>
void backward(const NoiseRegularizerParams& p, int threads) {
  const NoisePlan plan = plan_noise(p, false);
  const int64_t blocks = p.batch * plan.blocks, maps = p.batch * p.count;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t block = i % plan.blocks;
      const Map map = map_at<T>(p, plan, i / plan.blocks, map_of(plan, p.count, block));
      halve_band<T>(map, band_at(map, block - map.plan->first_block));
    }
#pragma omp for schedule(static, 1)  // neighbours are alike in size
    for (int64_t i = 0; i < maps; ++i) {
      const Map map = map_at<T>(p, plan, i / p.count, static_cast<int32_t>(i % p.count));
      halve_rest(map);
      for (int32_t l = map.plan->levels - 1; l >= 1 && l >= map.plan->inner; --l)
        coarse_gradient(map, l, 0, map.side >> l, p.grad[map.sample]);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t block = i % plan.blocks;
      const Map map = map_at<T>(p, plan, i / plan.blocks, map_of(plan, p.count, block));
      const Band band = band_at(map, block - map.plan->first_block);
      const float grad = p.grad[map.sample];
      for (int32_t l = map.plan->inner - 1; l >= 1; --l) coarse_gradient(map, l, band.first >> l, band.end >> l, grad);
      const Slopes slopes = slopes_at(map, 0, grad);
      gradient_rows(static_cast<const T*>(map.data), map.side, band.first, band.end, slopes.along_x, slopes.along_y,
                    map.plan->levels > 1 ? map.level(map.grad_coarse, 1) : nullptr, static_cast<T*>(map.grad));
    }
  }
}

// Values are taken relative to the map's first one: a constant map then has a variance of exactly 0, and a mean far from
// 0 costs no precision.
template <class T>
void block_moments(const T* values, float origin, int64_t count, double* out) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += load(values[i]) - origin;
  const float mean = sum / static_cast<float>(count);
  // In double: beside the square of an outlier, float32 would lose all others.
  double squares = 0.0;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < count; ++i) {
    const float centred = (load(values[i]) - origin) - mean;
    squares += static_cast<double>(centred * centred);
  }
  out[0] = static_cast<double>(mean);
  out[1] = squares;
}

template <class T>
void apply_block(T* values, float origin, float mean, float factor, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) store(((load(values[i]) - origin) - mean) * factor, values + i);
}

struct NormalizeBlock {
  int64_t sample, first, count;
  int32_t map;
};

inline NormalizeBlock normalize_block_at(const NormalizeNoiseParams& p, const NormalizePlan& plan, int64_t index) {
  const int64_t blocks = plan.first_block[p.count];
  NormalizeBlock b{};
  b.sample = index / blocks;
  const int64_t block = index % blocks;
  while (plan.first_block[b.map + 1] <= block) ++b.map;
  b.first = (block - plan.first_block[b.map]) * kNormalizeBlock;
  b.count = normalize_count(p.pixels[b.map], block - plan.first_block[b.map]);
  return b;
}

struct MapTotals {
  double mean, factor;
};

// Means and sums of squares of the blocks of a map into those of the map; no difference of large sums is taken.
inline MapTotals combine_moments(const double* partials, int64_t pixels) {
  const int64_t blocks = (pixels + kNormalizeBlock - 1) / kNormalizeBlock;
  double sum = 0.0, squares = 0.0;
  for (int64_t b = 0; b < blocks; ++b) sum += partials[2 * b] * static_cast<double>(normalize_count(pixels, b));
  const double mean = sum / static_cast<double>(pixels);
  for (int64_t b = 0; b < blocks; ++b) {
    const double apart = partials[2 * b] - mean;
    squares += partials[2 * b + 1] + apart * apart * static_cast<double>(normalize_count(pixels, b));
  }
  return {mean, normalize_factor(squares, pixels)};
}

template <class T>
void normalize(const NormalizeNoiseParams& p, int threads) {
  const NormalizePlan plan = plan_normalize(p);
  const int64_t blocks = plan.first_block[p.count], all = p.batch * blocks;
  double* totals = p.workspace + 2 * all;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < all; ++i) {
      const NormalizeBlock b = normalize_block_at(p, plan, i);
      const T* map = static_cast<const T*>(p.maps[b.map]) + b.sample * p.pixels[b.map];
      block_moments(map + b.first, load(map[0]), b.count, p.workspace + 2 * i);
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < p.batch * p.count; ++i) {
      const int64_t sample = i / p.count;
      const int32_t index = static_cast<int32_t>(i % p.count);
      const double* partials = p.workspace + 2 * (sample * blocks + plan.first_block[index]);
      const T* map = static_cast<const T*>(p.maps[index]) + sample * p.pixels[index];
      const MapTotals total = combine_moments(partials, p.pixels[index]);
      totals[kNormalizeTotals * i] = static_cast<double>(load(map[0]));
      totals[kNormalizeTotals * i + 1] = total.mean;
      totals[kNormalizeTotals * i + 2] = total.factor;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < all; ++i) {
      const NormalizeBlock b = normalize_block_at(p, plan, i);
      T* map = static_cast<T*>(p.maps[b.map]) + b.sample * p.pixels[b.map];
      const double* total = totals + kNormalizeTotals * (b.sample * p.count + b.map);
      apply_block(map + b.first, static_cast<float>(total[0]), static_cast<float>(total[1]),
                  static_cast<float>(total[2]), b.count);
    }
  }
}

}  // namespace

void noise_regularizer_fwd(const NoiseRegularizerParams& p, int threads) {
  if (p.dtype == kFloat16) return forward<Float16>(p, threads);
  if (p.dtype == kBFloat16) return forward<BFloat16>(p, threads);
  forward<float>(p, threads);
}

void noise_regularizer_bwd(const NoiseRegularizerParams& p, int threads) {
  if (p.dtype == kFloat16) return backward<Float16>(p, threads);
  if (p.dtype == kBFloat16) return backward<BFloat16>(p, threads);
  backward<float>(p, threads);
}

void normalize_noise(const NormalizeNoiseParams& p, int threads) {
  if (p.dtype == kFloat16) return normalize<Float16>(p, threads);
  if (p.dtype == kBFloat16) return normalize<BFloat16>(p, threads);
  normalize<float>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
