// SPDX-License-Identifier: Apache-2.0
// What one thread of the CUDA kernel of upfirdn2d for any filter does, in three steps with a barrier between them. The
// host can run them too, block by block and thread by thread: so the index maths are tested where there is no GPU.
#pragma once

#include "elementwise.h"
#include "upfirdn2d.h"

namespace fe {

// A block's share of the output: rows by columns by lanes. channels_last: lanes are neighbouring channels; planar: an image
// is one channel. The samples it reads, `span_rows` by `span_columns` at most, lie in shared memory as float.
struct FirTile {
  int32_t rows, columns, lanes, lane_shift;  // lanes = 1 << lane_shift
  int32_t span_rows, span_columns;
  int64_t images, channels, across, down, along;

  FE_HD int64_t blocks() const { return images * across * down * along; }
};

constexpr int32_t kFirTileFloats = 12288;  // 48 KiB: what a block may have without asking

namespace FE_ISA {

template <class T, int V>
struct alignas(sizeof(T) * V) FirPack {
  T lane[V];
};

// Floats of shared memory: the taps, the samples, and for a separable filter the rows after the vertical pass.
inline int32_t fir_tile_floats(const UpFirDnParams& p, const FirTile& t) {
  const int32_t taps = p.separable ? p.fir_width : p.fir_height * p.fir_width;
  return taps + (t.span_rows + (p.separable ? t.rows : 0)) * t.span_columns * t.lanes;
}

inline FirTile plan_fir_tile(const UpFirDnParams& p) {
  FirTile t{};
  t.images = p.channels_last ? p.batch : p.batch * p.channels;
  t.channels = p.channels_last ? p.channels : 1;
  while (t.lane_shift < 4 && (1 << t.lane_shift) < t.channels) ++t.lane_shift;
  t.rows = 16;
  t.columns = t.lane_shift > 2 ? 16 : 64;
  for (;;) {
    t.lanes = 1 << t.lane_shift;
    t.span_rows = fir_span_bound(t.rows, p.up, p.down, p.fir_height);
    t.span_columns = fir_span_bound(t.columns, p.up, p.down, p.fir_width);
    if (fir_tile_floats(p, t) <= kFirTileFloats) break;
    if (t.rows > 1 && t.rows >= t.columns)
      t.rows /= 2;
    else if (t.columns > 1)
      t.columns /= 2;
    else
      --t.lane_shift;
  }
  t.across = (p.out_width + t.columns - 1) / t.columns;
  t.down = (p.out_height + t.rows - 1) / t.rows;
  t.along = (t.channels + t.lanes - 1) / t.lanes;
  return t;
}

// V: neighbouring lanes a thread moves at once; it divides the channels, or is 1.
template <class T, int V>
struct FirBlock {
  // Shared memory is read 16 bytes at a time where lanes allow: four reads of one float each would collide in its banks.
  static constexpr int32_t kQuad = V < 4 ? V : 4;
  using Quad = FirPack<float, kQuad>;

  const UpFirDnParams& p;
  const FirTile& tile;
  float *taps, *samples, *middle;
  int64_t image, lane, row, column;
  int32_t rows, columns, lanes, inner, pitch;  // inner: packs of a row of output; pitch: floats of a row of samples
  FirSpan ys, xs;

  FE_HD FirBlock(const UpFirDnParams& params, const FirTile& plan, int64_t block, float* shared)
      : p(params), tile(plan) {
    pitch = tile.span_columns * tile.lanes;
    samples = shared;  // first, so that a pack of floats is aligned
    middle = samples + tile.span_rows * pitch;
    taps = middle + (p.separable ? tile.rows * pitch : 0);
    lane = block % tile.along * tile.lanes;
    column = block / tile.along % tile.across * tile.columns;
    row = block / tile.along / tile.across % tile.down * tile.rows;
    image = block / tile.along / tile.across / tile.down;
    rows = least(tile.rows, p.out_height - row);
    columns = least(tile.columns, p.out_width - column);
    lanes = least(tile.lanes, tile.channels - lane);
    inner = columns << tile.lane_shift;
    ys = fir_span(row, rows, p.up, p.down, p.pad_y, p.fir_height);
    xs = fir_span(column, columns, p.up, p.down, p.pad_x, p.fir_width);
  }

  static FE_HD int32_t least(int32_t size, int64_t left) { return left < size ? static_cast<int32_t>(left) : size; }

  // Step 1: taps as a correlation, samples as float, zero outside the image. A warp takes a row, its threads packs of it.
  FE_HD void load_samples(int32_t warp, int32_t warps, int32_t thread, int32_t width) const {
    const int32_t count = p.separable ? p.fir_width : p.fir_height * p.fir_width;
    for (int32_t k = warp * width + thread; k < count; k += warps * width) {
      const int32_t y = k / p.fir_width, x = k % p.fir_width;
      const int32_t from = fir_tap(x, p.fir_width, p.flip);
      taps[k] = p.fir[p.separable ? from : fir_tap(y, p.fir_height, p.flip) * p.fir_width + from];
    }
    const T* source = static_cast<const T*>(p.x);
    for (int32_t r = warp; r < ys.size; r += warps) {
      const int64_t y = ys.first + r;
      const bool row_inside = y >= 0 && y < p.in_height;
      const int64_t base = (image * p.in_height + y) * p.in_width;
      for (int32_t i = thread * V; i < xs.size << tile.lane_shift; i += width * V) {
        const int64_t x = xs.first + (i >> tile.lane_shift);
        const int32_t l = i & (tile.lanes - 1);
        float* out = samples + r * pitch + i;
        if (row_inside && x >= 0 && x < p.in_width && l < lanes) {
          const auto pack =
              *reinterpret_cast<const FirPack<T, V>*>(source + (base + x) * tile.channels + lane + l);
          for (int32_t v = 0; v < V; v += kQuad) {
            Quad quad;
            for (int32_t k = 0; k < kQuad; ++k) quad.lane[k] = load(pack.lane[v + k]);
            *reinterpret_cast<Quad*>(out + v) = quad;
          }
        } else {
          for (int32_t v = 0; v < V; v += kQuad) *reinterpret_cast<Quad*>(out + v) = Quad{};
        }
      }
    }
  }

  // Step 2, separable filters only: the vertical pass.
  FE_HD void filter_down(int32_t warp, int32_t warps, int32_t thread, int32_t width) const {
    for (int32_t r = warp; r < rows; r += warps) {
      const FirWindow w = fir_window(row + r, p.up, p.down, p.pad_y, p.fir_height);
      const float* from = samples + static_cast<int32_t>(w.first - ys.first) * pitch;
      for (int32_t i = thread; i < xs.size << tile.lane_shift; i += width) {
        float sum = 0.0f;
        for (int32_t t = 0; t < w.count; ++t) sum += taps[w.tap + t * p.up] * from[t * pitch + i];
        middle[r * pitch + i] = sum;
      }
    }
  }

  // Step 3: the horizontal pass (the whole filter, where it is not separable), the epilogue and the output.
  FE_HD void filter_along(int32_t warp, int32_t warps, int32_t thread, int32_t width) const {
    for (int32_t r = warp; r < rows; r += warps) {
      const FirWindow wy = fir_window(row + r, p.up, p.down, p.pad_y, p.fir_height);
      const float* from =
          p.separable ? middle + r * pitch : samples + static_cast<int32_t>(wy.first - ys.first) * pitch;
      for (int32_t i = thread * V; i < inner; i += width * V) {
        const int32_t c = i >> tile.lane_shift, l = i & (tile.lanes - 1);
        if (l >= lanes) continue;
        const FirWindow wx = fir_window(column + c, p.up, p.down, p.pad_x, p.fir_width);
        const float* first = from + (static_cast<int32_t>(wx.first - xs.first) << tile.lane_shift) + l;
        float z[V] = {};
        if (p.separable) {
          for (int32_t t = 0; t < wx.count; ++t)
            add_tap(taps[wx.tap + t * p.up], first + (t << tile.lane_shift), z);
        } else {
          for (int32_t s = 0; s < wy.count; ++s)
            for (int32_t t = 0; t < wx.count; ++t)
              add_tap(taps[(wy.tap + s * p.up) * p.fir_width + wx.tap + t * p.up],
                      first + s * pitch + (t << tile.lane_shift), z);
        }
        write(row + r, column + c, lane + l, z);
      }
    }
  }

  static FE_HD void add_tap(float tap, const float* from, float* z) {
    for (int32_t v = 0; v < V; v += kQuad) {
      const Quad quad = *reinterpret_cast<const Quad*>(from + v);
      for (int32_t k = 0; k < kQuad; ++k) z[v + k] += tap * quad.lane[k];
    }
  }

  FE_HD void write(int64_t y, int64_t x, int64_t first, const float* z) const {
    const int64_t pixel = y * p.out_width + x;
    const int64_t index = (image * p.out_height * p.out_width + pixel) * tile.channels + first;
    FirPack<T, V> pack, added{};
    if (p.epilogue && p.add) added = *reinterpret_cast<const FirPack<T, V>*>(static_cast<const T*>(p.add) + index);
    const int64_t sample = p.channels_last ? image : image / p.channels;
    const float shift = p.epilogue && p.noise
                            ? p.noise[sample * p.noise_stride + pixel] * (p.strength ? *p.strength : 1.0f)
                            : 0.0f;
    for (int32_t v = 0; v < V; ++v) {
      float value = z[v] * p.fir_gain;
      if (p.epilogue) {
        const int64_t c = p.channels_last ? first + v : image % p.channels;
        if (p.scale) value *= p.scale[sample * p.channels + c];
        value += shift;
        if (p.bias) value += p.bias[c];
        value = finish(p.act, value, p.slope, p.gain, p.clamp);
        if (p.add) value += load(added.lane[v]);
      }
      store(value, &pack.lane[v]);
    }
    *reinterpret_cast<FirPack<T, V>*>(static_cast<T*>(p.y) + index) = pack;
  }
};

// Whether packs of V lanes stay within the channels, and lie aligned.
template <class T, int V>
inline bool fir_packs_fit(const UpFirDnParams& p, const FirTile& tile) {
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y) | reinterpret_cast<uintptr_t>(p.add);
  return tile.lanes % V == 0 && tile.channels % V == 0 && addresses % (sizeof(T) * V) == 0;
}

}  // namespace FE_ISA
}  // namespace fe
