// SPDX-License-Identifier: Apache-2.0
#include "upfirdn2d.h"

#include <cstring>

#include "elementwise.h"
#include "upfirdn2d_rolling.h"

namespace fe {
namespace FE_ISA {
namespace {

constexpr int32_t kBuffer = 16384;  // floats of each row buffer of a tile

// Not std::min and std::max: their instantiations belong to no instruction set.
inline int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }

template <class S, int N, bool ADD>
void sum_taps(const S* const* source, const float* factor, int64_t length, float* out) {
  const S *a = source[0], *b = source[N > 1 ? 1 : 0], *c = source[N > 2 ? 2 : 0], *d = source[N > 3 ? 3 : 0];
  const float fa = factor[0], fb = factor[N > 1 ? 1 : 0], fc = factor[N > 2 ? 2 : 0], fd = factor[N > 3 ? 3 : 0];
#pragma omp simd
  for (int64_t i = 0; i < length; ++i) {
    float sum = fa * load(a[i]);
    if (N > 1) sum += fb * load(b[i]);
    if (N > 2) sum += fc * load(c[i]);
    if (N > 3) sum += fd * load(d[i]);
    out[i] = ADD ? out[i] + sum : sum;
  }
}

template <class S, bool ADD>
void sum_up_to_four(const S* const* source, const float* factor, int32_t count, int64_t length, float* out) {
  if (count >= 4) return sum_taps<S, 4, ADD>(source, factor, length, out);
  if (count == 3) return sum_taps<S, 3, ADD>(source, factor, length, out);
  if (count == 2) return sum_taps<S, 2, ADD>(source, factor, length, out);
  sum_taps<S, 1, ADD>(source, factor, length, out);
}

// Sources and their taps: what both passes of a filter consist of.
template <class S>
struct Sum {
  const S* source[kMaxFirTaps];
  float factor[kMaxFirTaps];
  int32_t count = 0;

  void term(const S* from, float by) {
    source[count] = from;
    factor[count++] = by;
  }

  // out = the sum, or out += the sum
  void write(bool add, int64_t length, float* out) const {
    if (count == 0 && !add) std::memset(out, 0, static_cast<size_t>(length) * sizeof(float));
    for (int32_t i = 0; i < count; i += 4) {
      add || i > 0 ? sum_up_to_four<S, true>(source + i, factor + i, count - i, length, out)
                   : sum_up_to_four<S, false>(source + i, factor + i, count - i, length, out);
    }
  }
};

// The hot path of StyleGAN2 on planar images: four taps along the row, finished at once. `offset`: noise and bias.
template <bool EPILOGUE, class T>
void finish_four_taps(const float* row, const float* taps, float scale, const float* offset, const UpFirDnParams& p,
                      int32_t count, T* y) {
  const float f0 = taps[0], f1 = taps[1], f2 = taps[2], f3 = taps[3];
  const float slope = p.act == kLinear ? 1.0f : p.slope, gain = p.gain;
  // No test for "no clamp" in the loop.
  const float clamp = p.clamp < 0.0f ? bits_to_float(0x7f800000u) : p.clamp;
#pragma omp simd
  for (int32_t i = 0; i < count; ++i) {
    const float z = f0 * row[i] + f1 * row[i + 1] + f2 * row[i + 2] + f3 * row[i + 3];
    store(EPILOGUE ? clamp_symmetric(activate<kLeakyRelu>(z * scale + offset[i], slope) * gain, clamp) : z, y + i);
  }
}

// Cuts the output into tiles: a few rows by some pixels by all channels (by some, when there are very many). Planar images
// are one channel each. Sizes depend on the shape alone.
struct Tiling {
  int64_t images, channels;  // planar: N * C images of one channel
  int64_t across, down, along;
  int32_t pixels, rows, lanes;

  explicit Tiling(const UpFirDnParams& p) {
    images = p.channels_last ? p.batch : p.batch * p.channels;
    channels = p.channels_last ? p.channels : 1;
    const int64_t most_lanes = kBuffer / (fir_span_bound(1, p.up, p.down, p.fir_width) + 1);
    lanes = static_cast<int32_t>(channels <= most_lanes ? channels : most_lanes / 16 * 16);
    pixels = static_cast<int32_t>(smaller(p.out_width, larger(16, 4096 / lanes)));
    while (pixels > 1 && larger(pixels, fir_span_bound(pixels, p.up, p.down, p.fir_width) + 1) * lanes > kBuffer)
      pixels = (pixels + 1) / 2;
    // Planar images of several channels give tiles enough as they are.
    const int64_t bands = !p.channels_last && p.channels >= 8 ? 1 : 8;
    rows = static_cast<int32_t>(smaller(32, larger(4, p.out_height / bands)));
    across = (p.out_width + pixels - 1) / pixels;
    down = (p.out_height + rows - 1) / rows;
    along = (channels + lanes - 1) / lanes;
  }

  int64_t tiles() const { return images * across * down * along; }
};

template <class T>
class Tile {
 public:
  Tile(const UpFirDnParams& p, const FirTaps& taps, const Tiling& tiling, int64_t index) : p_(p), taps_(taps) {
    channels_ = tiling.channels;
    const int64_t along = index % tiling.along;
    const int64_t across = index / tiling.along % tiling.across;
    const int64_t down = index / tiling.along / tiling.across % tiling.down;
    image_ = index / tiling.along / tiling.across / tiling.down;
    lane_ = along * tiling.lanes;
    lanes_ = static_cast<int32_t>(smaller(tiling.lanes, channels_ - lane_));
    column_ = across * tiling.pixels;
    pixels_ = static_cast<int32_t>(smaller(tiling.pixels, p.out_width - column_));
    row_ = down * tiling.rows;
    end_row_ = smaller(row_ + tiling.rows, p.out_height);
    span_ = fir_span(column_, pixels_, p.up, p.down, p.pad_x, p.fir_width);
    inside_first_ = smaller(larger(span_.first, 0), p.in_width);
    inside_end_ = smaller(larger(span_.first + span_.size, inside_first_), p.in_width);
  }

  void run() {
    // Columns outside the image: written once, no later pass touches them.
    std::memset(row_buffer_, 0, static_cast<size_t>(span_.size) * lanes_ * sizeof(float));
    if (p_.epilogue) prepare_epilogue();
    if (fits_four_taps()) return p_.epilogue ? run_four_taps<true>() : run_four_taps<false>();
    for (int64_t row = row_; row < end_row_; ++row) {
      taps_.separable ? filter_separable(row) : filter_general(row);
      p_.epilogue ? finish_row(row) : store_row(row);
    }
  }

 private:
  bool whole() const { return lanes_ == channels_; }
  int64_t length() const { return static_cast<int64_t>(pixels_) * lanes_; }

  const T* input(int64_t row) const {
    return static_cast<const T*>(p_.x) + ((image_ * p_.in_height + row) * p_.in_width + inside_first_) * channels_ +
           lane_;
  }
  int64_t output(int64_t row) const {
    return ((image_ * p_.out_height + row) * p_.out_width + column_) * channels_ + lane_;
  }

  // Puts a sum over whole input rows in the part of the row buffer that lies inside the image.
  void write_inside(Sum<T>* sum) {
    float* out = row_buffer_ + (inside_first_ - span_.first) * lanes_;
    const int64_t inside = inside_end_ - inside_first_;
    if (whole()) return sum->write(false, inside * lanes_, out);
    for (int64_t i = 0; i < inside; ++i) {
      sum->write(false, lanes_, out + i * lanes_);
      for (int32_t t = 0; t < sum->count; ++t) sum->source[t] += channels_;
    }
  }

  // Filters the row buffer along the row: out_buffer_ = sum, or += sum.
  void filter_along(const float* columns, bool add) {
    const float* even = row_buffer_;
    const float* odd = row_buffer_;
    if (p_.up == 1 && p_.down == 2) split_row(&even, &odd);
    const bool phases = p_.up == 2 && p_.down == 1;  // neighbouring outputs then meet different taps
    for (int32_t phase = 0; phase < (phases ? 2 : 1) && phase < pixels_; ++phase) {
      const FirWindow w = fir_window(column_ + phase, p_.up, p_.down, p_.pad_x, p_.fir_width);
      const int64_t from = w.first - span_.first;
      Sum<float> sum;
      for (int32_t t = 0; t < w.count; ++t) {
        const float* source =
            even == odd ? row_buffer_ + (from + t) * lanes_ : (t % 2 ? odd : even) + t / 2 * static_cast<int64_t>(lanes_);
        sum.term(source, columns[w.tap + t * p_.up]);
      }
      if (phases)
        sum.write(add, (pixels_ - phase + 1) / 2 * static_cast<int64_t>(lanes_), phase_buffer_[phase]);
      else
        sum.write(add, length(), out_buffer_);
    }
  }

  // Pixels 0, 2, 4, ... and 1, 3, 5, ... of the row buffer, so that a stride of two becomes two runs.
  void split_row(const float** even, const float** odd) {
    *even = phase_buffer_[0], *odd = phase_buffer_[1];
    if (lanes_ == 1) {
      float *a = phase_buffer_[0], *b = phase_buffer_[1];
      const int32_t pairs = span_.size / 2;
#pragma omp simd
      for (int32_t i = 0; i < pairs; ++i) a[i] = row_buffer_[2 * i], b[i] = row_buffer_[2 * i + 1];
      if (span_.size % 2) a[pairs] = row_buffer_[span_.size - 1];
      return;
    }
    for (int32_t i = 0; i < span_.size; ++i)
      std::memcpy(phase_buffer_[i % 2] + i / 2 * static_cast<int64_t>(lanes_),
                  row_buffer_ + i * static_cast<int64_t>(lanes_), static_cast<size_t>(lanes_) * sizeof(float));
  }

  void join_phases() {
    if (p_.up == 1 || p_.down == 2) return;
    if (lanes_ == 1) {
      const float *a = phase_buffer_[0], *b = phase_buffer_[1];
      const int32_t pairs = pixels_ / 2;
#pragma omp simd
      for (int32_t i = 0; i < pairs; ++i) out_buffer_[2 * i] = a[i], out_buffer_[2 * i + 1] = b[i];
      if (pixels_ % 2) out_buffer_[pixels_ - 1] = a[pairs];
      return;
    }
    for (int32_t i = 0; i < pixels_; ++i)
      std::memcpy(out_buffer_ + i * static_cast<int64_t>(lanes_),
                  phase_buffer_[i % 2] + i / 2 * static_cast<int64_t>(lanes_), static_cast<size_t>(lanes_) * sizeof(float));
  }

  bool fits_four_taps() const {
    return lanes_ == 1 && channels_ == 1 && taps_.separable && p_.up == 1 && p_.down == 1 && p_.fir_width == 4 &&
           !(p_.epilogue && p_.add) && (!p_.epilogue || p_.act == kLinear || p_.act == kLeakyRelu);
  }

  template <bool EPILOGUE>
  void run_four_taps() {
    for (int64_t row = row_; row < end_row_; ++row) {
      filter_down(row);
      finish_four_taps<EPILOGUE>(row_buffer_, taps_.columns, EPILOGUE ? scale_[0] : 1.0f,
                                 EPILOGUE ? offset_of(row) : nullptr, p_, pixels_,
                                 static_cast<T*>(p_.y) + output(row));
    }
  }

  void filter_down(int64_t row) {
    const FirWindow w = fir_window(row, p_.up, p_.down, p_.pad_y, p_.fir_height);
    Sum<T> sum;
    for (int32_t t = 0; t < w.count; ++t) {
      const int64_t y = w.first + t;
      if (y >= 0 && y < p_.in_height) sum.term(input(y), taps_.rows[w.tap + t * p_.up]);
    }
    write_inside(&sum);
  }

  void filter_separable(int64_t row) {
    filter_down(row);
    filter_along(taps_.columns, false);
    join_phases();
  }

  void filter_general(int64_t row) {
    const FirWindow w = fir_window(row, p_.up, p_.down, p_.pad_y, p_.fir_height);
    bool add = false;
    for (int32_t t = 0; t < w.count; ++t) {
      const int64_t y = w.first + t;
      if (y < 0 || y >= p_.in_height) continue;
      Sum<T> copy;
      copy.term(input(y), 1.0f);
      write_inside(&copy);
      filter_along(taps_.full + (w.tap + t * p_.up) * p_.fir_width, add);
      add = true;
    }
    if (add)
      join_phases();
    else
      std::memset(out_buffer_, 0, static_cast<size_t>(length()) * sizeof(float));
  }

  // Scale and bias of every element of the tile's row.
  void prepare_epilogue() {
    const int64_t sample = p_.channels_last ? image_ : image_ / p_.channels;
    const int64_t first = p_.channels_last ? lane_ : image_ % p_.channels;
    for (int32_t i = 0; i < pixels_; ++i) {
      for (int32_t c = 0; c < lanes_; ++c) {
        scale_[i * lanes_ + c] = p_.scale ? p_.scale[sample * p_.channels + first + c] : 1.0f;
        bias_[i * lanes_ + c] = p_.bias ? p_.bias[first + c] : 0.0f;
      }
    }
    noise_ = p_.noise ? p_.noise + sample * p_.noise_stride + column_ : nullptr;
  }

  // Noise and bias of every element of a row of the tile.
  const float* offset_of(int64_t row) {
    if (!noise_) return bias_;
    const float strength = p_.strength ? *p_.strength : 1.0f;
    const float* noise = noise_ + row * p_.out_width;
    if (lanes_ == 1) {
#pragma omp simd
      for (int32_t i = 0; i < pixels_; ++i) offset_[i] = noise[i] * strength + bias_[i];
      return offset_;
    }
    for (int32_t i = 0; i < pixels_; ++i) {
      const float value = noise[i] * strength;
      const float* bias = bias_ + i * lanes_;
      float* out = offset_ + i * lanes_;
#pragma omp simd
      for (int32_t c = 0; c < lanes_; ++c) out[c] = value + bias[c];
    }
    return offset_;
  }

  void finish_row(int64_t row) {
    const float* offset = offset_of(row);
    if (p_.add) {
      finish(offset, out_buffer_, length());
      return store_row(row);
    }
    T* y = static_cast<T*>(p_.y) + output(row);
    if (whole()) return finish(offset, y, length());
    for (int32_t i = 0; i < pixels_; ++i) finish(offset, y + i * channels_, lanes_, i * static_cast<int64_t>(lanes_));
  }

  template <int ACT, class Out>
  void finish_as(const float* offset, Out* y, int64_t count, int64_t from) {
    const float *z = out_buffer_ + from, *scale = scale_ + from, *shift = offset + from;
    const float slope = p_.slope, gain = p_.gain, clamp = p_.clamp;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i)
      store(FE_ISA::finish<ACT>(z[i] * scale[i] + shift[i], slope, gain, clamp), y + i);
  }

  template <class Out>
  void finish(const float* offset, Out* y, int64_t count, int64_t from = 0) {
    switch (p_.act) {
      case kRelu:
        return finish_as<kRelu>(offset, y, count, from);
      case kLeakyRelu:
        return finish_as<kLeakyRelu>(offset, y, count, from);
      case kTanh:
        return finish_as<kTanh>(offset, y, count, from);
      case kSigmoid:
        return finish_as<kSigmoid>(offset, y, count, from);
      case kSilu:
        return finish_as<kSilu>(offset, y, count, from);
      default:
        return finish_as<kLinear>(offset, y, count, from);
    }
  }

  void store_row(int64_t row) {
    const int64_t runs = whole() ? 1 : pixels_, count = whole() ? length() : lanes_;
    for (int64_t run = 0; run < runs; ++run) {
      const float* z = out_buffer_ + run * lanes_;
      const int64_t base = output(row) + run * channels_;
      T* y = static_cast<T*>(p_.y) + base;
      if (p_.epilogue && p_.add) {
        const T* add = static_cast<const T*>(p_.add) + base;
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(z[i] + load(add[i]), y + i);
      } else {
#pragma omp simd
        for (int64_t i = 0; i < count; ++i) store(z[i], y + i);
      }
    }
  }

  const UpFirDnParams& p_;
  const FirTaps& taps_;
  int64_t channels_, image_, lane_, column_, row_, end_row_, inside_first_, inside_end_;
  int32_t lanes_, pixels_;
  FirSpan span_;
  const float* noise_ = nullptr;
  alignas(64) float row_buffer_[kBuffer];
  alignas(64) float out_buffer_[kBuffer];
  alignas(64) float phase_buffer_[2][kBuffer / 2 + kBuffer / 4];
  alignas(64) float scale_[kBuffer];
  alignas(64) float bias_[kBuffer];
  alignas(64) float offset_[kBuffer];
};

template <class T>
void run(const UpFirDnParams& p, int threads) {
  FirTaps taps;
  make_taps(p, &taps);
  if (rolling_fits(p, taps)) return run_rolling<T>(p, taps, threads);
  const Tiling tiling(p);
  const int64_t tiles = tiling.tiles();
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < tiles; ++i) Tile<T>(p, taps, tiling, i).run();
}

}  // namespace

void upfirdn2d_fwd(const UpFirDnParams& p, int threads) {
  if (p.dtype == kFloat16) return run<Float16>(p, threads);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, threads);
  run<float>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
