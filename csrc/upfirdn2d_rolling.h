// SPDX-License-Identifier: Apache-2.0
// upfirdn2d on the CPU for the filters of StyleGAN2 on channels_last images: four separable taps, up or down by 2 or
// neither. A row of samples is read once: a vector of channels slides along it with the samples under the filter in
// registers. The rows so filtered that later outputs need wait in a buffer, and the rows of output are made of them and of
// the fresh ones, epilogue included, while those are in registers.
#pragma once

#include "rows.h"
#include "upfirdn2d_taps.h"
#include "vector.h"

namespace fe {
namespace FE_ISA {

constexpr int32_t kRollingTaps = 4;
constexpr int32_t kRollingLanes = 512;   // the most channels of a tile
constexpr int32_t kRollingRow = 8192;    // floats of a filtered row of a tile, but for what UP = 2 makes at its ends
constexpr int64_t kCacheBytes = 48 << 20;  // images of more leave no cache the time to help

// Along either axis a step meets kFresh samples beside the kKept last ones of before, and makes kMade outputs.
template <int UP, int DOWN>
struct FirStep {
  static constexpr int kFresh = DOWN, kTaps = kRollingTaps / UP, kKept = kTaps - kFresh, kMade = UP;
};

inline bool rolling_fits(const UpFirDnParams& p, const FirTaps& taps) {
  return p.channels_last && p.channels >= kVectorFloats && taps.separable && p.fir_width == kRollingTaps &&
         p.fir_height == kRollingTaps && p.up * p.down <= 2 && (!p.epilogue || p.act == kLinear || p.act == kLeakyRelu);
}

// How an image is cut. Sizes depend on its shape alone.
struct RollingPlan {
  int64_t vectors, groups, segments, bands;  // vectors of channels; groups of them, segments of columns, bands of rows
  int32_t group, pixels, rows;               // sizes of a tile
  bool stream;

  explicit RollingPlan(const UpFirDnParams& p) {
    vectors = (p.channels + kVectorFloats - 1) / kVectorFloats;
    groups = (p.channels + kRollingLanes - 1) / kRollingLanes;
    group = static_cast<int32_t>((vectors + groups - 1) / groups);
    pixels = kRollingRow / (group * kVectorFloats) / 2 * 2;
    rows = 64;
    cut(p);
    // Enough tiles for several threads: narrow ones cost little, low ones filter rows twice.
    while (groups * segments * bands < 8 && (pixels > 8 || rows > 32)) {
      pixels > 8 ? pixels /= 2 : rows /= 2;
      cut(p);
    }
    const int64_t pixels_moved = p.in_height * p.in_width + p.out_height * p.out_width;
    const int64_t element = p.dtype == kFloat32 ? 4 : 2;
    stream = pixels_moved * p.channels * element > kCacheBytes && p.channels % kVectorFloats == 0 &&
             reinterpret_cast<uintptr_t>(p.y) % 64 == 0;
  }

  int64_t tiles(int64_t batch) const { return batch * groups * segments * bands; }

 private:
  void cut(const UpFirDnParams& p) {
    segments = (p.out_width + pixels - 1) / pixels;
    bands = (p.out_height + rows - 1) / rows;
  }
};

// Scale, bias, activation, gain and clamp of a vector of channels.
struct VectorEpilogue {
  Vector scale, bias, slope, gain, low, high;

  VectorEpilogue(const UpFirDnParams& p, int64_t image, int64_t lane) {
    scale = p.scale ? load_vector(p.scale + image * p.channels + lane) : spread(1.0f);
    bias = p.bias ? load_vector(p.bias + lane) : spread(0.0f);
    slope = spread(p.act == kLinear ? 1.0f : p.slope);
    gain = spread(p.gain);
    high = spread(p.clamp < 0.0f ? bits_to_float(0x7f800000u) : p.clamp);
    low = -high;
  }

  FE_HD Vector operator()(const Vector& z, float noise) const {
    const Vector shifted = z * scale + (spread(noise) + bias);
    const Vector y = (shifted < 0.0f ? shifted * slope : shifted) * gain;
    const Vector below = y > high ? high : y;  // false for NaN, which stays
    return below < low ? low : below;
  }
};

template <class T, int UP, int DOWN, bool EPILOGUE>
class RollingTile {
  using Step = FirStep<UP, DOWN>;
  static constexpr int kTaps = Step::kTaps, kKept = Step::kKept, kMade = Step::kMade;

 public:
  RollingTile(const UpFirDnParams& p, const FirTaps& taps, const RollingPlan& plan, int64_t index) : p_(p) {
    const int64_t group = index % plan.groups;
    const int64_t segment = index / plan.groups % plan.segments;
    const int64_t band = index / plan.groups / plan.segments % plan.bands;
    image_ = index / plan.groups / plan.segments / plan.bands;
    first_vector_ = group * plan.group;
    vectors_ = least(plan.group, plan.vectors - first_vector_);
    column_ = segment * plan.pixels;
    pixels_ = least(plan.pixels, p.out_width - column_);
    row_ = band * plan.rows;
    end_row_ = row_ + least(plan.rows, p.out_height - row_);
    const FirWindow w = fir_window(column_, UP, DOWN, p.pad_x, kRollingTaps);
    first_ = w.first;
    lead_ = UP == 2 && w.tap == 0;
    units_ = (pixels_ + lead_ + kMade - 1) / kMade;
    row_floats_ = vectors_ * units_ * kMade * kVectorFloats;
    // With UP = 2 the two outputs over the same samples meet odd taps, then even ones.
    for (int m = 0; m < kMade; ++m) {
      for (int t = 0; t < kTaps; ++t) {
        const int tap = (UP == 2 ? 1 - m : 0) + t * UP;
        along_[m][t] = taps.columns[tap], down_[m][t] = taps.rows[tap];
      }
    }
    strength_ = EPILOGUE && p.strength ? *p.strength : 1.0f;
    stream_ = kVectorFillsLine<T> && plan.stream;
  }

  void run() {
    for (int k = 0; k < kKept; ++k) kept_[k] = buffer_ + k * row_floats_;
    const FirWindow w = fir_window(row_, UP, DOWN, p_.pad_y, kRollingTaps);
    int64_t row = row_, sample = w.first;
    for (int k = 0; k < kKept; ++k) step<1, 0>(sample++, row, 0);
    if constexpr (UP == 2) {
      if (w.tap == 0) step<1, 1>(sample++, row++, 1);
      for (; row + 2 <= end_row_; row += 2) step<1, 2>(sample++, row, 0);
    } else if constexpr (DOWN == 1) {
      for (; row + 2 <= end_row_; row += 2, sample += 2) step<2, 2>(sample, row, 0);
    }
    for (; row < end_row_; ++row, sample += DOWN) step<DOWN, 1>(sample, row, 0);
  }

 private:
  static int32_t least(int32_t size, int64_t left) { return left < size ? static_cast<int32_t>(left) : size; }

  // A row of samples, or zeros everywhere: pitch 0.
  struct Row {
    const T* data;
    int64_t pitch;
    int64_t ahead;  // to the row that a later step reads at the same place
  };

  // Reads ROWS rows of samples from `sample` on and writes OUTS rows of output from `row` on, the first with the taps of
  // phase `phase`. Without OUTS it only fills the buffer.
  template <int ROWS, int OUTS>
  void step(int64_t sample, int64_t row, int phase) {
    const int64_t line = p_.in_width * p_.channels;
    Row fresh[ROWS];
    for (int r = 0; r < ROWS; ++r) {
      const int64_t y = sample + r;
      if (y < 0 || y >= p_.in_height)
        fresh[r] = {zeros_, 0, 0};
      else
        fresh[r] = {static_cast<const T*>(p_.x) + (image_ * p_.in_height + y) * line, p_.channels,
                    y + ROWS < p_.in_height ? ROWS * line : 0};
    }
    for (int32_t v = 0; v < vectors_; ++v) {
      // The last vector ends with the channels: some of them are computed twice.
      int64_t lane = (first_vector_ + v) * kVectorFloats;
      if (lane > p_.channels - kVectorFloats) lane = p_.channels - kVectorFloats;
      slide<ROWS, OUTS>(fresh, lane, v * units_ * kMade * kVectorFloats, row, phase);
    }
    float* turned[kKept];
    for (int k = 0; k < kKept; ++k) turned[k] = kept_[(k + ROWS) % kKept];
    for (int k = 0; k < kKept; ++k) kept_[k] = turned[k];
  }

  template <int ROWS, int OUTS>
  void slide(const Row* fresh, int64_t lane, int32_t offset, int64_t row, int phase) {
    constexpr int kOuts = OUTS > 0 ? OUTS : 1;
    const Row source[2] = {fresh[0], fresh[ROWS - 1]};
    const uint64_t width = static_cast<uint64_t>(p_.in_width);
    const auto at = [&](int r, int64_t i) {
      const bool inside = static_cast<uint64_t>(i) < width;
      if (!inside || source[r].pitch == 0) return Vector{};
      const T* from = source[r].data + i * source[r].pitch + lane;
      __builtin_prefetch(from + source[r].ahead, 0, 2);
      return load_vector(from);
    };
    Vector x[ROWS][kTaps];
    int64_t i = first_;
    for (int k = 0; k < kKept; ++k, ++i)
      for (int r = 0; r < ROWS; ++r) x[r][k] = at(r, i);
    Vector along[kMade][kTaps], down[kOuts][kTaps];
    for (int m = 0; m < kMade; ++m)
      for (int t = 0; t < kTaps; ++t) along[m][t] = spread(along_[m][t]);
    for (int o = 0; o < OUTS; ++o)
      for (int t = 0; t < kTaps; ++t) down[o][t] = spread(down_[UP == 2 ? o + phase : 0][t]);
    float* kept[kKept];
    for (int k = 0; k < kKept; ++k) kept[k] = kept_[k] + offset;

    const int64_t line = p_.out_width * p_.channels;
    const int64_t base = ((image_ * p_.out_height + row) * p_.out_width + column_) * p_.channels + lane;
    T* y = static_cast<T*>(p_.y) + base;
    const T* add = EPILOGUE && p_.add ? static_cast<const T*>(p_.add) + base : nullptr;
    const VectorEpilogue finish(p_, image_, lane);
    const float* noise =
        EPILOGUE && p_.noise ? p_.noise + image_ * p_.noise_stride + row * p_.out_width + column_ : nullptr;
    const int64_t ahead = row + 2 * OUTS <= p_.out_height ? OUTS * line : 0;
    const bool stream = stream_;

    for (int32_t unit = 0; unit < units_; ++unit) {
      for (int k = kKept; k < kTaps; ++k, ++i)
        for (int r = 0; r < ROWS; ++r) x[r][k] = at(r, i);
      for (int m = 0; m < kMade; ++m) {
        const int32_t made = unit * kMade + m, place = made * kVectorFloats;
        Vector rows[kKept + ROWS];
        for (int k = 0; k < kKept; ++k) rows[k] = load_vector(kept[k] + place);
        for (int r = 0; r < ROWS; ++r) {
          Vector sum = along[m][0] * x[r][0];
          for (int t = 1; t < kTaps; ++t) sum += along[m][t] * x[r][t];
          rows[kKept + r] = sum;
          store_vector(sum, kept[r] + place);
        }
        const int32_t pixel = made - lead_;
        if (UP == 2 && (pixel < 0 || pixel >= pixels_)) continue;
        for (int o = 0; o < OUTS; ++o) {
          const Vector* under = rows + (UP == 2 ? 0 : o);
          Vector z = down[o][0] * under[0];
          for (int t = 1; t < kTaps; ++t) z += down[o][t] * under[t];
          const int64_t to = o * line + pixel * p_.channels;
          if (EPILOGUE) {
            z = finish(z, noise ? noise[o * p_.out_width + pixel] * strength_ : 0.0f);
            if (add) z += load_vector(add + to);
          }
          if (stream) {
            stream_vector(z, y + to);
          } else {
            __builtin_prefetch(y + to + ahead, 1, 2);
            store_vector(z, y + to);
          }
        }
      }
      for (int r = 0; r < ROWS; ++r)
        for (int k = 0; k < kKept; ++k) x[r][k] = x[r][k + Step::kFresh];
    }
  }

  const UpFirDnParams& p_;
  int64_t image_, first_vector_, column_, row_, end_row_, first_;
  int32_t vectors_, pixels_, units_, row_floats_;
  int32_t lead_;  // outputs of the first step that lie before the tile
  float strength_;
  bool stream_;
  float along_[kMade][kTaps], down_[kMade][kTaps];
  float* kept_[kKept];  // filtered rows, oldest first
  T zeros_[1] = {};
  alignas(64) float buffer_[kKept * (kRollingRow + 2 * kRollingLanes)];
};

template <class T, int UP, int DOWN, bool EPILOGUE>
void run_rolling(const UpFirDnParams& p, const FirTaps& taps, int threads) {
  const RollingPlan plan(p);
  const int64_t tiles = plan.tiles(p.batch);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < tiles; ++i) RollingTile<T, UP, DOWN, EPILOGUE>(p, taps, plan, i).run();
    if (plan.stream) finish_streams();
  }
}

template <class T, bool EPILOGUE>
void run_rolling(const UpFirDnParams& p, const FirTaps& taps, int threads) {
  if (p.up == 2) return run_rolling<T, 2, 1, EPILOGUE>(p, taps, threads);
  if (p.down == 2) return run_rolling<T, 1, 2, EPILOGUE>(p, taps, threads);
  run_rolling<T, 1, 1, EPILOGUE>(p, taps, threads);
}

template <class T>
void run_rolling(const UpFirDnParams& p, const FirTaps& taps, int threads) {
  p.epilogue ? run_rolling<T, true>(p, taps, threads) : run_rolling<T, false>(p, taps, threads);
}

}  // namespace FE_ISA
}  // namespace fe
