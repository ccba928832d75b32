// SPDX-License-Identifier: Apache-2.0
// The points are 0, +-a, +-1/a and infinity with a = 2^-1/2: errors are half of what the usual 0, +-1, +-2 give, about
// those of a direct sum.
#include "winograd.h"

#include "sums.h"
#include "vector.h"

#if defined(_OPENMP)
#include <omp.h>
#endif

namespace fe {
namespace FE_ISA {
namespace {

constexpr float kRoot = 1.41421356237309505f, kHalfRoot = 0.70710678118654752f;
constexpr int32_t kReach = kWinogradReach, kTile = kWinogradTile;

// One axis of a tile each: `to` apart in the result.
FE_HD void transform_input(const Vector* d, Vector* v, int32_t to) {
  const Vector even = d[4] - d[2] * 2.0f, odd = d[3] * kHalfRoot - d[1] * kRoot;
  const Vector far = d[4] - d[2] * 0.5f, away = d[3] * kRoot - d[1] * kHalfRoot;
  v[0] = d[0] - d[2] * 2.5f + d[4];
  v[to] = even + odd;
  v[2 * to] = even - odd;
  v[3 * to] = far + away;
  v[4 * to] = far - away;
  v[5 * to] = d[1] - d[3] * 2.5f + d[5];
}

FE_HD void transform_output(const Vector* m, Vector* y, int32_t to) {
  const Vector sum = m[1] + m[2], difference = m[1] - m[2];
  const Vector far = m[3] + m[4], away = m[3] - m[4];
  y[0] = m[0] + sum + far;
  y[to] = difference * kHalfRoot + away * kRoot;
  y[2 * to] = sum * 0.5f + far * 2.0f;
  y[3 * to] = difference * (0.5f * kHalfRoot) + away * (2.0f * kRoot) + m[5];
}

FE_HD void transform_weight(const Vector* g, int32_t step, Vector* u, int32_t to) {
  const Vector near = g[0] + g[2 * step] * 0.5f, far = g[0] + g[2 * step] * 2.0f;
  u[0] = g[0];
  u[to] = (near + g[step] * kHalfRoot) * (-2.0f / 3.0f);
  u[2 * to] = (near - g[step] * kHalfRoot) * (-2.0f / 3.0f);
  u[3 * to] = (far + g[step] * kRoot) * (1.0f / 6.0f);
  u[4 * to] = (far - g[step] * kRoot) * (1.0f / 6.0f);
  u[5 * to] = g[2 * step];
}

struct Tile {
  int64_t sample, row, column;  // of its first pixel on the convolution's grid
};

inline Tile tile_at(const WinogradPlan& w, int64_t index) {
  const int64_t inside = index % w.each;
  return {index / w.each, inside / w.across * kTile, inside % w.across * kTile};
}

// Writes the 36 values of a tile for every input channel, `value` floats apart.
void read_tile(const WinogradParams& p, const WinogradPlan& w, const Tile& tile, float* out) {
  const int64_t channels = p.inputs / (p.down * p.down);
  const float* style = p.style ? p.style + tile.sample * channels : nullptr;
  for (int64_t phase = 0; phase < p.down * p.down; ++phase, out += channels) {
    const float* pixel[kReach][kReach];
    for (int32_t i = 0; i < kReach; ++i) {
      for (int32_t j = 0; j < kReach; ++j) {
        const int64_t row = tile.row + i - 1, column = tile.column + j - 1;
        const bool inside = row >= 0 && row < p.height && column >= 0 && column < p.width;
        const int64_t line = (tile.sample * p.height + row) * p.down + phase / 2;
        pixel[i][j] = inside ? p.x + ((line * p.width + column) * p.down + phase % 2) * channels : nullptr;
      }
    }
    for (int64_t c = 0; c < channels; c += kVectorFloats) {
      Vector down[kReach][kReach];
#pragma GCC unroll 6
      for (int32_t j = 0; j < kReach; ++j) {
        Vector d[kReach];
        for (int32_t i = 0; i < kReach; ++i) d[i] = pixel[i][j] ? load_vector(pixel[i][j] + c) : Vector{};
        transform_input(d, &down[0][j], kReach);
      }
      const Vector s = style ? load_vector(style + c) : spread(1.0f);
#pragma GCC unroll 6
      for (int32_t i = 0; i < kReach; ++i) {
        Vector v[kReach];
        transform_input(down[i], v, 1);
        for (int32_t j = 0; j < kReach; ++j) store_vector(v[j] * s, out + (i * kReach + j) * w.value + c);
      }
    }
  }
}

template <int ACT>
FE_HD Vector finish_vector(Vector z, float slope, float gain, float limit) {
  const Vector zero{};
  if (ACT == kRelu) z = z < zero ? zero : z;
  if (ACT == kLeakyRelu) z = z < zero ? z * slope : z;
  z = z * gain;
  const Vector high = spread(limit), low = spread(-limit);  // NaN: none
  z = z > high ? high : z;
  return z < low ? low : z;
}

// ToRGB's sums of a pixel's finished channels.
void sum_rgb(const WinogradParams& p, int64_t sample, int64_t pixel, int64_t pixels, int64_t channels) {
  const float* y = p.y + (sample * pixels + pixel) * channels;
  const float* factors = p.rgb_factors + sample * 3 * channels;
  Vector sum[3] = {};
  for (int64_t c = 0; c < channels; c += kVectorFloats) {
    const Vector value = load_vector(y + c);
    for (int32_t k = 0; k < 3; ++k) sum[k] += value * load_vector(factors + k * channels + c);
  }
  for (int32_t k = 0; k < 3; ++k) {
    for (int32_t half = kVectorFloats / 2; half > 0; half /= 2)
      for (int32_t i = 0; i < half; ++i) sum[k][i] += sum[k][i + half];
    p.rgb[(sample * 3 + k) * pixels + pixel] = sum[k][0];
  }
}

// Writes a tile's pixels from its 36 values, and its part of grad_style to `sums`; returns 0, or NaN where a sum is not finite.
template <int ACT>
Vector write_tile(const WinogradParams& p, const WinogradPlan& w, const Tile& tile, const float* from, float* sums) {
  const int64_t up = p.up, channels = p.outputs / (up * up), width = p.width * up, pixels = p.height * up * width;
  const int64_t rows = p.height - tile.row < kTile ? p.height - tile.row : kTile;
  const int64_t columns = p.width - tile.column < kTile ? p.width - tile.column : kTile;
  const float limit = clamp_limit(p.clamp), strength = p.strength ? *p.strength : 1.0f;
  const float* noise = p.noise ? p.noise + tile.sample * p.noise_stride : nullptr;
  Vector unbounded{};
  for (int64_t phase = 0; phase < up * up; ++phase, from += channels) {
    const int64_t start = (tile.row * up + phase / 2) * width + tile.column * up + phase % 2;
    float offset[kTile][kTile] = {};
    for (int64_t i = 0; noise && i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) offset[i][j] = noise[start + (i * width + j) * up] * strength;
    for (int64_t c = 0; c < channels; c += kVectorFloats) {
      Vector down[kTile][kReach];
#pragma GCC unroll 6
      for (int32_t j = 0; j < kReach; ++j) {
        Vector m[kReach];
        for (int32_t i = 0; i < kReach; ++i) m[i] = load_vector(from + (i * kReach + j) * w.to + c);
        transform_output(m, &down[0][j], kReach);
      }
      const Vector scale = p.scale ? load_vector(p.scale + tile.sample * channels + c) : spread(1.0f);
      const Vector bias = p.bias ? load_vector(p.bias + c) : Vector{};
      Vector sum{};
#pragma GCC unroll 4
      for (int32_t i = 0; i < kTile; ++i) {
        Vector conv[kTile];
        transform_output(down[i], conv, 1);
        if (i >= rows) break;
        const int64_t first = (tile.sample * pixels + start + i * width * up) * channels + c;
#pragma GCC unroll 4
        for (int32_t j = 0; j < kTile; ++j) {
          if (j >= columns) break;
          const int64_t at = first + j * up * channels;
          unbounded += conv[j] * 0.0f;
          if (sums) sum += conv[j] * load_vector(p.other + at);
          const Vector z = conv[j] * scale + (bias + offset[i][j]);
          store_vector(finish_vector<ACT>(z, p.slope, p.gain, limit), p.y + at);
        }
      }
      if (sums) store_vector(sum, sums + c);
    }
  }
  for (int64_t i = 0; p.rgb && i < rows * up; ++i)
    for (int64_t j = 0; j < columns * up; ++j)
      sum_rgb(p, tile.sample, (tile.row * up + i) * width + tile.column * up + j, pixels, channels);
  return unbounded;
}

#if defined(__AVX512F__)
constexpr int32_t kProductRows = 8;
#else
constexpr int32_t kProductRows = 4;
#endif
constexpr int32_t kProductVectors = 2;

// Inputs that are summed up in registers: rounding errors grow with how many.
constexpr int64_t kProductInputs = 128;

// kProductRows rows of a panel of outputs: writes their products with so many inputs, or adds these.
template <bool ADD>
void multiply(const float* from, int64_t step, const float* weight, int64_t inputs, float* to, int64_t outputs) {
  Vector sum[kProductRows][kProductVectors] = {};
  for (int64_t c = 0; c < inputs; ++c) {
    Vector u[kProductVectors];
#pragma GCC unroll 2
    for (int32_t k = 0; k < kProductVectors; ++k)
      u[k] = load_vector(weight + c * kWinogradPanel + k * kVectorFloats);
#pragma GCC unroll 8
    for (int32_t r = 0; r < kProductRows; ++r) {
      const Vector v = spread(from[r * step + c]);
#pragma GCC unroll 2
      for (int32_t k = 0; k < kProductVectors; ++k) sum[r][k] += v * u[k];
    }
  }
#pragma GCC unroll 8
  for (int32_t r = 0; r < kProductRows; ++r) {
#pragma GCC unroll 2
    for (int32_t k = 0; k < kProductVectors; ++k) {
      float* out = to + r * outputs + k * kVectorFloats;
      store_vector(ADD ? load_vector(out) + sum[r][k] : sum[r][k], out);
    }
  }
}

void multiply_panel(const WinogradParams& p, const WinogradPlan& w, int64_t value, int64_t panel, int64_t rows,
                    const float* from, float* to) {
  const int64_t panels = p.outputs / kWinogradPanel;
  const float* weight = p.transformed + (value * panels + panel) * p.inputs * kWinogradPanel;
  from += value * w.value, to += value * w.to + panel * kWinogradPanel;
  for (int64_t c = 0; c < p.inputs; c += kProductInputs) {
    const int64_t inputs = p.inputs - c < kProductInputs ? p.inputs - c : kProductInputs;
    for (int64_t r = 0; r < rows; r += kProductRows) {
      for (int32_t k = 0; k < kWinogradPanel; k += kProductVectors * kVectorFloats) {
        const float* values = from + r * w.from + c;
        const float* taps = weight + c * kWinogradPanel + k;
        float* out = to + r * p.outputs + k;
        c == 0 ? multiply<false>(values, w.from, taps, inputs, out, p.outputs)
               : multiply<true>(values, w.from, taps, inputs, out, p.outputs);
      }
    }
  }
}

int team_rank() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

int team_size() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}

template <int ACT>
void run(const WinogradParams& p, const WinogradPlan& w, int64_t buffers, int threads) {
  const int64_t panels = p.outputs / kWinogradPanel;
  float* sums = p.grad_style ? p.workspace + buffers * w.floats : nullptr;  // a row a tile
  float unbounded = 0.0f;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : unbounded)
  {
    const int64_t rank = team_rank(), size = team_size();
    // The steps of a block are one thread's, or are shared out.
    const int64_t part = w.shared ? rank : 0, parts = w.shared ? size : 1;
    float* from = p.workspace + (w.shared ? 0 : rank) * w.floats;
    float* to = from + kWinogradValues * w.value;
    Vector seen{};
    for (int64_t block = w.shared ? 0 : rank; block < w.blocks; block += w.shared ? 1 : size) {
      const int64_t first = block * w.block_tiles;
      const int64_t tiles = w.tiles - first < w.block_tiles ? w.tiles - first : w.block_tiles;
      const int64_t rows = (tiles + kWinogradRows - 1) / kWinogradRows * kWinogradRows;
      for (int64_t t = part; t < rows; t += parts) {
        if (t < tiles) {
          read_tile(p, w, tile_at(w, first + t), from + t * w.from);
          continue;
        }
        for (int64_t k = 0; k < kWinogradValues; ++k)
          for (int64_t c = 0; c < p.inputs; ++c) from[k * w.value + t * w.from + c] = 0.0f;
      }
      if (w.shared) {
#pragma omp barrier
      }
      for (int64_t unit = part; unit < kWinogradValues * panels; unit += parts)
        multiply_panel(p, w, unit / panels, unit % panels, rows, from, to);
      if (w.shared) {
#pragma omp barrier
      }
      for (int64_t t = part; t < tiles; t += parts) {
        float* row = sums ? sums + (first + t) * p.outputs : nullptr;
        seen += write_tile<ACT>(p, w, tile_at(w, first + t), to + t * p.outputs, row);
      }
    }
    for (int32_t i = 0; i < kVectorFloats; ++i) unbounded += seen[i];
  }
  *p.unbounded = unbounded;
  for (int64_t n = 0; sums && n < p.batch; ++n)
    combine(sums + n * w.each * p.outputs, w.each, p.outputs, p.grad_style + n * p.outputs);
}

}  // namespace

void winograd(const WinogradParams& p, int threads) {
  const WinogradPlan w = plan_winograd(p);
  const int64_t buffers = winograd_buffers(p, w);
  if (!w.shared && threads > buffers) threads = static_cast<int>(buffers);
  if (p.act == kLeakyRelu) return run<kLeakyRelu>(p, w, buffers, threads);
  if (p.act == kRelu) return run<kRelu>(p, w, buffers, threads);
  run<kLinear>(p, w, buffers, threads);
}

void winograd_weight(const WinogradWeightParams& p, int threads) {
  const int64_t panels = p.outputs / kWinogradPanel;
#pragma omp parallel for schedule(static) collapse(2) num_threads(threads) if (threads > 1)
  for (int64_t panel = 0; panel < panels; ++panel) {
    for (int64_t i = 0; i < p.inputs; ++i) {
      alignas(64) float taps[9][kWinogradPanel];
      for (int64_t o = 0; o < kWinogradPanel; ++o) {
        const float* g = p.weight + ((panel * kWinogradPanel + o) * p.inputs + i) * 9;
        for (int32_t k = 0; k < 9; ++k) taps[k][o] = g[k];
      }
      for (int32_t o = 0; o < kWinogradPanel; o += kVectorFloats) {
        Vector g[9], down[kReach][3];
        for (int32_t k = 0; k < 9; ++k) g[k] = load_vector(taps[k] + o);
#pragma GCC unroll 3
        for (int32_t j = 0; j < 3; ++j) transform_weight(g + j, 3, &down[0][j], 3);
#pragma GCC unroll 6
        for (int32_t k = 0; k < kReach; ++k) {
          Vector u[kReach];
          transform_weight(down[k], 1, u, 1);
          for (int32_t l = 0; l < kReach; ++l)
            store_vector(u[l], p.transformed + (((k * kReach + l) * panels + panel) * p.inputs + i) * kWinogradPanel + o);
        }
      }
    }
  }
}

}  // namespace FE_ISA
}  // namespace fe
