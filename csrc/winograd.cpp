// SPDX-License-Identifier: Apache-2.0
// For three taps the points are 0, +-a, +-1/a and infinity with a = 2^-1/2: errors are half of what the usual 0, +-1
// and +-2 give, about those of a direct sum. For two they are 0, +-1 and infinity, with sums and differences alone.
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

// One axis of a tile. A filter of 3 taps gives 4 outputs of 6 values, one of 2 taps 3 outputs of 4, and one of a single
// tap beside it 3 of 3; as many inputs as values.
template <int TAPS>
constexpr int32_t kReach = TAPS == 3 ? 6 : (TAPS == 2 ? 4 : 3);
template <int TAPS>
constexpr int32_t kTile = kReach<TAPS> - TAPS + 1;

// `to` apart in the result.
template <int TAPS>
FE_HD void transform_input(const Vector* d, Vector* v, int32_t to) {
  if constexpr (TAPS == 3) {
    const Vector even = d[4] - d[2] * 2.0f, odd = d[3] * kHalfRoot - d[1] * kRoot;
    const Vector far = d[4] - d[2] * 0.5f, away = d[3] * kRoot - d[1] * kHalfRoot;
    v[0] = d[0] - d[2] * 2.5f + d[4];
    v[to] = even + odd;
    v[2 * to] = even - odd;
    v[3 * to] = far + away;
    v[4 * to] = far - away;
    v[5 * to] = d[1] - d[3] * 2.5f + d[5];
  } else if constexpr (TAPS == 2) {
    v[0] = d[0] - d[2];
    v[to] = d[2] + d[1];
    v[2 * to] = d[2] - d[1];
    v[3 * to] = d[3] - d[1];
  } else {
    for (int32_t k = 0; k < 3; ++k) v[k * to] = d[k];
  }
}

template <int TAPS>
FE_HD void transform_output(const Vector* m, Vector* y, int32_t to) {
  if constexpr (TAPS == 3) {
    const Vector sum = m[1] + m[2], difference = m[1] - m[2];
    const Vector far = m[3] + m[4], away = m[3] - m[4];
    y[0] = m[0] + sum + far;
    y[to] = difference * kHalfRoot + away * kRoot;
    y[2 * to] = sum * 0.5f + far * 2.0f;
    y[3 * to] = difference * (0.5f * kHalfRoot) + away * (2.0f * kRoot) + m[5];
  } else if constexpr (TAPS == 2) {
    y[0] = m[0] + (m[1] + m[2]);
    y[to] = m[1] - m[2];
    y[2 * to] = m[1] + m[2] + m[3];
  } else {
    for (int32_t k = 0; k < 3; ++k) y[k * to] = m[k];
  }
}

// The values of an axis' three taps: six, or four of the outer two taps and the middle one.
constexpr int32_t kWeights = 6, kSplitWeights = 5, kMiddle = 4;

template <bool SPLIT>
FE_HD void transform_weight(const Vector* g, int32_t step, Vector* u, int32_t to) {
  const Vector first = g[0], middle = g[step], last = g[2 * step];
  if constexpr (SPLIT) {
    u[0] = first;
    u[to] = (first + last) * 0.5f;
    u[2 * to] = (first - last) * 0.5f;
    u[3 * to] = last;
    u[kMiddle * to] = middle;
  } else {
    const Vector near = first + last * 0.5f, far = first + last * 2.0f;
    u[0] = first;
    u[to] = (near + middle * kHalfRoot) * (-2.0f / 3.0f);
    u[2 * to] = (near - middle * kHalfRoot) * (-2.0f / 3.0f);
    u[3 * to] = (far + middle * kRoot) * (1.0f / 6.0f);
    u[4 * to] = (far - middle * kRoot) * (1.0f / 6.0f);
    u[5 * to] = last;
  }
}

struct Tile {
  int64_t sample, row, column;  // of its first pixel on the convolution's grid
};

inline Tile tile_at(const WinogradPlan& w, int64_t index) {
  const int64_t inside = index % w.each;
  return {index / w.each, inside / w.across * w.tile, inside % w.across * w.tile};
}

// One of the convolutions of a call: a single one, or split the four that rows and columns of either kind ask for.
struct Pass {
  bool odd_row, odd_column;                  // of what has every second row and column
  int64_t rows, columns, x_rows, x_columns;  // on its grid
  int64_t before_row, before_column;         // how far tiles of x begin ahead of those of y
  int64_t x_phase, x_phases, y_phase, y_phases;
  bool adds, ends;  // to what the passes before have written; the last of them
};

inline Pass pass_at(const WinogradParams& p, int32_t index) {
  Pass pass{};
  pass.rows = pass.x_rows = p.height, pass.columns = pass.x_columns = p.width;
  if (!p.split) {
    pass.before_row = pass.before_column = 1, pass.ends = true;
    pass.x_phases = p.down * p.down, pass.y_phases = p.up * p.up;
    return pass;
  }
  pass.odd_row = index / 2 == 1, pass.odd_column = index % 2 == 1;
  pass.x_phases = pass.y_phases = 1;
  // Of 2 n + 1 rows n + 1 are even.
  const int64_t rows = p.height + !pass.odd_row, columns = p.width + !pass.odd_column;
  if (p.up == 2) {  // even ones see the row of x before theirs too
    pass.rows = rows, pass.columns = columns, pass.y_phase = index, pass.ends = true;
    pass.before_row = !pass.odd_row, pass.before_column = !pass.odd_column;
  } else {
    pass.x_rows = rows, pass.x_columns = columns, pass.x_phase = index;
    pass.adds = index > 0, pass.ends = index == 3;
  }
  return pass;
}

// Pixels of x or y: `step` of them between neighbours of one phase, side * n pixels a row.
struct Map {
  int64_t step, width, pixels;
};

inline Map map_of(const WinogradParams& p, int64_t step) {
  const int64_t more = p.split && step == 2 ? 1 : 0, width = p.width * step + more;
  return {step, width, (p.height * step + more) * width};
}

// Writes a tile's values of every input channel, `value` floats apart.
template <int ROWS, int COLUMNS>
void read_tile(const WinogradParams& p, const WinogradPlan& w, const Pass& pass, const Tile& tile, float* out) {
  constexpr int32_t kDown = kReach<ROWS>, kAcross = kReach<COLUMNS>;
  const Map map = map_of(p, p.down);
  const int64_t channels = p.inputs / pass.x_phases;
  const float* style = p.style ? p.style + tile.sample * channels : nullptr;
  for (int64_t k = 0; k < pass.x_phases; ++k, out += channels) {
    const int64_t phase = pass.x_phase + k;
    const float* pixel[kDown][kAcross];
    for (int32_t i = 0; i < kDown; ++i) {
      for (int32_t j = 0; j < kAcross; ++j) {
        const int64_t row = tile.row + i - pass.before_row, column = tile.column + j - pass.before_column;
        const bool inside = row >= 0 && row < pass.x_rows && column >= 0 && column < pass.x_columns;
        const int64_t line = row * map.step + phase / 2, at = line * map.width + column * map.step + phase % 2;
        pixel[i][j] = inside ? p.x + (tile.sample * map.pixels + at) * channels : nullptr;
      }
    }
    for (int64_t c = 0; c < channels; c += kVectorFloats) {
      Vector down[kDown][kAcross];
#pragma GCC unroll 6
      for (int32_t j = 0; j < kAcross; ++j) {
        Vector d[kDown];
        for (int32_t i = 0; i < kDown; ++i) d[i] = pixel[i][j] ? load_vector(pixel[i][j] + c) : Vector{};
        transform_input<ROWS>(d, &down[0][j], kAcross);
      }
      const Vector s = style ? load_vector(style + c) : spread(1.0f);
#pragma GCC unroll 6
      for (int32_t i = 0; i < kDown; ++i) {
        Vector v[kAcross];
        transform_input<COLUMNS>(down[i], v, 1);
        for (int32_t j = 0; j < kAcross; ++j) store_vector(v[j] * s, out + (i * kAcross + j) * w.value + c);
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

// Writes a tile's pixels from its values, and its part of grad_style to `sums`; returns 0, or NaN where a sum is not
// finite.
template <int ACT, int ROWS, int COLUMNS>
Vector write_tile(const WinogradParams& p, const WinogradPlan& w, const Pass& pass, const Tile& tile, const float* from,
                  float* sums) {
  constexpr int32_t kDown = kReach<ROWS>, kAcross = kReach<COLUMNS>, kRows = kTile<ROWS>, kColumns = kTile<COLUMNS>;
  const Map map = map_of(p, p.up);
  const int64_t channels = p.outputs / pass.y_phases;
  const int64_t rows = pass.rows - tile.row < kRows ? pass.rows - tile.row : kRows;
  const int64_t columns = pass.columns - tile.column < kColumns ? pass.columns - tile.column : kColumns;
  const float limit = clamp_limit(p.clamp), strength = p.strength ? *p.strength : 1.0f;
  const float* noise = p.noise ? p.noise + tile.sample * p.noise_stride : nullptr;
  Vector unbounded{};
  for (int64_t k = 0; k < pass.y_phases; ++k, from += channels) {
    const int64_t phase = pass.y_phase + k;
    const int64_t start =
        (tile.row * map.step + phase / 2) * map.width + tile.column * map.step + phase % 2;
    float offset[kRows][kColumns] = {};
    for (int64_t i = 0; noise && i < rows; ++i)
      for (int64_t j = 0; j < columns; ++j) offset[i][j] = noise[start + (i * map.width + j) * map.step] * strength;
    for (int64_t c = 0; c < channels; c += kVectorFloats) {
      Vector down[kRows][kAcross];
#pragma GCC unroll 6
      for (int32_t j = 0; j < kAcross; ++j) {
        Vector m[kDown];
        for (int32_t i = 0; i < kDown; ++i) m[i] = load_vector(from + (i * kAcross + j) * w.to + c);
        transform_output<ROWS>(m, &down[0][j], kAcross);
      }
      const Vector scale = p.scale ? load_vector(p.scale + tile.sample * channels + c) : spread(1.0f);
      const Vector bias = p.bias ? load_vector(p.bias + c) : Vector{};
      Vector sum{};
#pragma GCC unroll 4
      for (int32_t i = 0; i < kRows; ++i) {
        Vector conv[kColumns];
        transform_output<COLUMNS>(down[i], conv, 1);
        if (i >= rows) break;
        const int64_t first = (tile.sample * map.pixels + start + i * map.width * map.step) * channels + c;
#pragma GCC unroll 4
        for (int32_t j = 0; j < kColumns; ++j) {
          if (j >= columns) break;
          const int64_t at = first + j * map.step * channels;
          Vector value = conv[j];
          unbounded += value * 0.0f;
          if (pass.adds) value += load_vector(p.y + at);
          if (pass.ends) {
            if (sums) sum += value * load_vector(p.other + at);
            value = finish_vector<ACT>(value * scale + (bias + offset[i][j]), p.slope, p.gain, limit);
          }
          store_vector(value, p.y + at);
        }
      }
      if (sums && pass.ends) store_vector(sum, sums + c);
    }
  }
  const int64_t up = p.up;
  for (int64_t i = 0; p.rgb && i < rows * up; ++i)
    for (int64_t j = 0; j < columns * up; ++j)
      sum_rgb(p, tile.sample, (tile.row * up + i) * map.width + tile.column * up + j, map.pixels, channels);
  return unbounded;
}

// As many sums as registers hold.
#if defined(__AVX512F__)
constexpr int32_t kProductRows = 8;
#else
constexpr int32_t kProductRows = 6;
#endif
constexpr int32_t kProductVectors = 2;

// Inputs that are summed up in registers: rounding errors grow with how many.
constexpr int64_t kProductInputs = 128;

// Rows of a panel of outputs: writes their products with so many inputs, or adds these.
template <int ROWS, bool ADD>
void multiply(const float* from, int64_t step, const float* weight, int64_t inputs, float* to, int64_t outputs) {
  Vector sum[ROWS][kProductVectors] = {};
  for (int64_t c = 0; c < inputs; ++c) {
    Vector u[kProductVectors];
#pragma GCC unroll 2
    for (int32_t k = 0; k < kProductVectors; ++k)
      u[k] = load_vector(weight + c * kWinogradPanel + k * kVectorFloats);
#pragma GCC unroll 8
    for (int32_t r = 0; r < ROWS; ++r) {
      const Vector v = spread(from[r * step + c]);
#pragma GCC unroll 2
      for (int32_t k = 0; k < kProductVectors; ++k) sum[r][k] += v * u[k];
    }
  }
#pragma GCC unroll 8
  for (int32_t r = 0; r < ROWS; ++r) {
#pragma GCC unroll 2
    for (int32_t k = 0; k < kProductVectors; ++k) {
      float* out = to + r * outputs + k * kVectorFloats;
      store_vector(ADD ? load_vector(out) + sum[r][k] : sum[r][k], out);
    }
  }
}

// All rows of a panel, the last ones by smaller products.
template <bool ADD, int ROWS = kProductRows>
void multiply_rows(const float* from, int64_t step, const float* weight, int64_t inputs, float* to, int64_t outputs,
                   int64_t rows) {
  for (; rows >= ROWS; rows -= ROWS, from += ROWS * step, to += ROWS * outputs)
    multiply<ROWS, ADD>(from, step, weight, inputs, to, outputs);
  if constexpr (ROWS > 1)
    if (rows > 0) multiply_rows<ADD, ROWS == 6 ? 4 : ROWS / 2>(from, step, weight, inputs, to, outputs, rows);
}

// The products of one value of all tiles with one panel of a weight's values.
void multiply_panel(const WinogradParams& p, const WinogradPlan& w, const float* weight, int64_t rows,
                    const float* from, float* to) {
  for (int64_t c = 0; c < p.inputs; c += kProductInputs) {
    const int64_t inputs = p.inputs - c < kProductInputs ? p.inputs - c : kProductInputs;
    for (int64_t k = 0; k < kWinogradPanel; k += kProductVectors * kVectorFloats) {
      const float* taps = weight + c * kWinogradPanel + k;
      c == 0 ? multiply_rows<false>(from, w.from, taps, inputs, to + k, p.outputs, rows)
             : multiply_rows<true>(from + c, w.from, taps, inputs, to + k, p.outputs, rows);
    }
  }
}

// What one pass does, for its kinds of rows and columns.
struct Steps {
  void (*read)(const WinogradParams&, const WinogradPlan&, const Pass&, const Tile&, float*);
  Vector (*write)(const WinogradParams&, const WinogradPlan&, const Pass&, const Tile&, const float*, float*);
  int32_t down, across;  // values by rows and columns
};

template <int ACT, int ROWS, int COLUMNS>
Steps steps() {
  return {read_tile<ROWS, COLUMNS>, write_tile<ACT, ROWS, COLUMNS>, kReach<ROWS>, kReach<COLUMNS>};
}

template <int ACT>
Steps steps_of(const WinogradParams& p, const Pass& pass) {
  if (!p.split) return steps<ACT, 3, 3>();
  if (pass.odd_row) return pass.odd_column ? steps<kLinear, 1, 1>() : steps<kLinear, 1, 2>();
  return pass.odd_column ? steps<kLinear, 2, 1>() : steps<kLinear, 2, 2>();
}

// Which of the weight's values goes with a value of the tiles: those of a single tap are all one.
inline int64_t weight_value(const WinogradParams& p, const Pass& pass, const Steps& steps, int64_t value) {
  const int64_t row = value / steps.across, column = value % steps.across;
  return (pass.odd_row ? kMiddle : row) * (p.split ? kSplitWeights : kWeights) + (pass.odd_column ? kMiddle : column);
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
  const int64_t panels = p.outputs / kWinogradPanel, panel_floats = p.inputs * kWinogradPanel;
  float* sums = p.grad_style ? p.workspace + buffers * w.floats : nullptr;  // a row a tile
  float unbounded = 0.0f;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : unbounded)
  {
    const int64_t rank = team_rank(), size = team_size();
    // The steps of a block are one thread's, or are shared out.
    const int64_t part = w.shared ? rank : 0, parts = w.shared ? size : 1;
    float* from = p.workspace + (w.shared ? 0 : rank) * w.floats;
    float* to = from + w.values * w.value;
    Vector seen{};
    for (int64_t block = w.shared ? 0 : rank; block < w.blocks; block += w.shared ? 1 : size) {
      const int64_t first = block * w.block_tiles;
      const int64_t tiles = w.tiles - first < w.block_tiles ? w.tiles - first : w.block_tiles;
      for (int32_t index = 0; index < (p.split ? 4 : 1); ++index) {
        const Pass pass = pass_at(p, index);
        const Steps steps = steps_of<ACT>(p, pass);
        for (int64_t t = part; t < tiles; t += parts)
          steps.read(p, w, pass, tile_at(w, first + t), from + t * w.from);
        if (w.shared) {
#pragma omp barrier
        }
        for (int64_t unit = part; unit < steps.down * steps.across * panels; unit += parts) {
          const int64_t value = unit / panels, panel = unit % panels;
          const float* weight = p.transformed + (weight_value(p, pass, steps, value) * panels + panel) * panel_floats;
          multiply_panel(p, w, weight, tiles, from + value * w.value, to + value * w.to + panel * kWinogradPanel);
        }
        if (w.shared) {
#pragma omp barrier
        }
        for (int64_t t = part; t < tiles; t += parts) {
          float* row = sums ? sums + (first + t) * p.outputs : nullptr;
          seen += steps.write(p, w, pass, tile_at(w, first + t), to + t * p.outputs, row);
        }
      }
    }
    for (int32_t i = 0; i < kVectorFloats; ++i) unbounded += seen[i];
  }
  *p.unbounded = unbounded;
  for (int64_t n = 0; sums && n < p.batch; ++n)
    combine(sums + n * w.each * p.outputs, w.each, p.outputs, p.grad_style + n * p.outputs);
}

template <bool SPLIT>
void transform_weights(const WinogradWeightParams& p, int threads) {
  constexpr int32_t kValues = SPLIT ? kSplitWeights : kWeights;
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
        Vector g[9], down[kValues][3];
        for (int32_t k = 0; k < 9; ++k) g[k] = load_vector(taps[k] + o);
#pragma GCC unroll 3
        for (int32_t j = 0; j < 3; ++j) transform_weight<SPLIT>(g + j, 3, &down[0][j], 3);
#pragma GCC unroll 6
        for (int32_t k = 0; k < kValues; ++k) {
          Vector u[kValues];
          transform_weight<SPLIT>(down[k], 1, u, 1);
          for (int32_t l = 0; l < kValues; ++l) {
            const int64_t row = ((k * kValues + l) * panels + panel) * p.inputs + i;
            store_vector(u[l], p.transformed + row * kWinogradPanel + o);
          }
        }
      }
    }
  }
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
  p.split ? transform_weights<true>(p, threads) : transform_weights<false>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
