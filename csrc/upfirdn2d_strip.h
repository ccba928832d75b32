// SPDX-License-Identifier: Apache-2.0
// What one thread of the strip kernel of upfirdn2d does: four separable taps, up or down by 2 or neither, which is every
// filter of StyleGAN2. A thread owns a pack of channels at one column of the output and walks down a strip of rows. It
// filters each row of samples along x in registers and adds it to the outputs it reaches, so that a row is read once, and
// neither shared memory nor a barrier is needed. The host can run the threads too, one after another.
#pragma once

#include <type_traits>

#include "upfirdn2d_tile.h"

// Unrolled, the loop over rows takes registers that would hold more threads.
#if defined(__CUDA_ARCH__)
#define FE_ROLLED _Pragma("unroll 1")
#else
#define FE_ROLLED
#endif

namespace fe {

constexpr int32_t kStripTaps = 4;
constexpr int32_t kStripAhead = 4;  // rows between a prefetch into the L2 cache and the load

// The threads of a launch: packs of lanes vary fastest, then columns, strips, images. Planar: an image is one channel.
struct FirStrips {
  int32_t rows;                        // of the output, in a strip
  int32_t channels;                    // elements from one column to the next
  int32_t source_pitch, target_pitch;  // elements from one row to the next
  int64_t images, packs, strips;

  FE_HD int64_t threads(int64_t columns) const { return images * strips * columns * packs; }
};

namespace FE_ISA {

inline FirStrips cut_fir_strips(const UpFirDnParams& p, int32_t lanes, int32_t rows) {
  FirStrips s{};
  s.rows = rows;
  s.channels = static_cast<int32_t>(p.channels_last ? p.channels : 1);
  s.source_pitch = static_cast<int32_t>(p.in_width * s.channels);
  s.target_pitch = static_cast<int32_t>(p.out_width * s.channels);
  s.images = p.channels_last ? p.batch : p.batch * p.channels;
  s.packs = s.channels / lanes;
  s.strips = (p.out_height + rows - 1) / rows;
  return s;
}

// A strip reads three rows more than it has: long ones, unless they leave the GPU idle.
inline FirStrips plan_fir_strips(const UpFirDnParams& p, int32_t lanes) {
  constexpr int64_t kEnough = int64_t{1} << 19;  // threads that fill the largest GPU several times
  int32_t rows = 32;
  while (rows > 4 && cut_fir_strips(p, lanes, rows).threads(p.out_width) < kEnough) rows /= 2;
  return cut_fir_strips(p, lanes, rows);
}

// Whether the strip kernel has this filter and activation, and 32 bits count its threads and the positions on an axis.
inline bool fir_strips_fit(const UpFirDnParams& p) {
  constexpr int64_t kLimit = int64_t{1} << 28;
  if (!p.separable || p.fir_width != kStripTaps || p.up * p.down > 2) return false;
  if (p.epilogue && p.act != kLinear && p.act != kLeakyRelu) return false;  // the others take many registers
  if (p.in_height > kLimit || p.in_width > kLimit || p.out_height > kLimit || p.out_width > kLimit) return false;
  if (p.pad_x > kLimit || p.pad_y > kLimit || p.pad_x < -kLimit || p.pad_y < -kLimit) return false;
  // The widths are bounded here, so that no product overflows.
  if (p.batch * p.channels > kLimit || p.in_width * p.channels > kLimit || p.out_width * p.channels > kLimit)
    return false;
  return plan_fir_strips(p, 1).threads(p.out_width) < (int64_t{1} << 31) - 1024;
}

// Whether packs of V channels stay within a pixel, and lie aligned.
template <class T, int V>
inline bool fir_strip_packs_fit(const UpFirDnParams& p) {
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y) | reinterpret_cast<uintptr_t>(p.add);
  return V == 1 || (p.channels_last && p.channels % V == 0 && addresses % (sizeof(T) * V) == 0);
}

// A pack as words: the compiler would clear one of a half type lane by lane.
template <class T, int V>
struct FirWords {
  using Word = std::conditional_t<sizeof(T) * V == 2, uint16_t, uint32_t>;
  Word word[sizeof(T) * V / sizeof(Word)];

  FE_HD float lane(int32_t v) const {
    if constexpr (sizeof(T) == 4) {
      return bits_to_float(word[v]);
    } else {
      return load(T{static_cast<uint16_t>(word[v / 2] >> (v % 2 * 16))});
    }
  }
};

// A load through the read-only cache: it may move above the stores to the output.
template <class T, int V>
FE_HD FirWords<T, V> read_words(const T* from) {
  FirWords<T, V> words;
#if defined(__CUDA_ARCH__)
  using Access = std::conditional_t<sizeof(words) == 16, uint4,
                                    std::conditional_t<sizeof(words) == 8, uint2, typename FirWords<T, V>::Word>>;
  static_assert(sizeof(Access) == sizeof(words), "packs are of four lanes or one");
  const Access bits = __ldg(reinterpret_cast<const Access*>(from));
  memcpy(&words, &bits, sizeof(words));
#else
  std::memcpy(&words, from, sizeof(words));
#endif
  return words;
}

FE_HD void prefetch(const void* address) {
#if defined(__CUDA_ARCH__)
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#else
  (void)address;
#endif
}

template <class T, int V>
FE_HD void store_pack(const float* value, FirPack<T, V>* pack) {
  for (int32_t v = 0; v < V; ++v) store(value[v], &pack->lane[v]);
}

#if defined(__CUDA_ARCH__)
// Two roundings in one instruction.
__device__ __forceinline__ void store_pack(const float* value, FirPack<BFloat16, 4>* pack) {
  const __nv_bfloat162 pairs[2] = {__floats2bfloat162_rn(value[0], value[1]),
                                   __floats2bfloat162_rn(value[2], value[3])};
  memcpy(pack, pairs, sizeof(pairs));
}
#endif

template <class T, int V, int UP, int DOWN, bool EPILOGUE>
struct FirStrip {
  static constexpr int32_t kReach = kStripTaps / UP;  // samples under the filter along an axis
  using Pack = FirPack<T, V>;

  const UpFirDnParams& p;
  const FirStrips& plan;
  uint32_t image, lane;
  int32_t column;
  int32_t row, end;      // of the output: the strip is [row, end)
  int32_t top;           // row, or the row above: up = 2 makes two rows of output from the rows m and m + 1
  int32_t next, stop;    // rows of samples: the next one, and the end of those the strip needs
  uint32_t bottom;       // the end of those of them inside the image, or 0
  const T* from;         // the first sample under the filter in row `next`; outside the image it is not read
  T* to;                 // the output to write next
  int64_t pixel;         // in the noise, of that output
  float noise;           // of that output, read while the one before it was made
  int32_t left;          // its column
  float taps[kStripTaps], along[kReach];  // as a correlation: all of them, and those that meet the samples of a row
  float scale[V], bias[V], strength;      // scale: with the filter's gain

  FE_HD FirStrip(const UpFirDnParams& params, const FirStrips& strips, uint32_t thread) : p(params), plan(strips) {
    const uint32_t packs = static_cast<uint32_t>(plan.packs), columns = static_cast<uint32_t>(p.out_width);
    const uint32_t rest = thread / packs, above = rest / columns;
    image = above / static_cast<uint32_t>(plan.strips);
    lane = thread % packs * V;
    column = static_cast<int32_t>(rest % columns);
    row = static_cast<int32_t>(above % static_cast<uint32_t>(plan.strips)) * plan.rows;
    end = FirBlock<T, V>::least(plan.rows, p.out_height - row) + row;

    const FirWindow x = fir_window(column, UP, DOWN, p.pad_x, kStripTaps);
    const FirWindow y = fir_window(row, UP, DOWN, p.pad_y, kStripTaps);
    left = static_cast<int32_t>(x.first);
    for (int32_t t = 0; t < kStripTaps; ++t) taps[t] = p.fir[fir_tap(t, kStripTaps, p.flip)];
    for (int32_t t = 0; t < kReach; ++t) along[t] = UP == 2 && x.tap == 1 ? taps[t * UP + 1] : taps[t * UP];
    top = UP == 2 ? row - (y.tap == 0) : row;
    next = static_cast<int32_t>(y.first);
    stop = next + (UP == 2 ? 1 + (end - top + 1) / 2 : kStripTaps - DOWN + DOWN * (end - row));
    const int32_t height = static_cast<int32_t>(p.in_height), least = stop < height ? stop : height;
    bottom = static_cast<uint32_t>(least > 0 ? least : 0);
    from = static_cast<const T*>(p.x) +
           ((image * p.in_height + next) * plan.source_pitch + x.first * plan.channels + lane);
    to = static_cast<T*>(p.y) +
         ((image * p.out_height + top) * plan.target_pitch + int64_t{column} * plan.channels + lane);
  }

  // What the sums are multiplied with, and the operands of the epilogue at this column.
  FE_HD void load_operands() {
    for (int32_t v = 0; v < V; ++v) scale[v] = p.fir_gain;
    if constexpr (EPILOGUE) {
      const int64_t sample = p.channels_last ? image : image / static_cast<uint32_t>(p.channels);
      const int64_t channel = p.channels_last ? lane : image % static_cast<uint32_t>(p.channels);
      strength = p.strength ? *p.strength : 1.0f;
      pixel = sample * p.noise_stride + top * p.out_width + column;
      noise = p.noise && top == row ? p.noise[pixel] : 0.0f;
      for (int32_t v = 0; v < V; ++v) {
        if (p.scale) scale[v] *= p.scale[sample * p.channels + channel + v];
        bias[v] = p.bias ? p.bias[channel + v] : 0.0f;
      }
    }
  }

  // The end of the columns to read in row y: 0 where the row is not wanted. As unsigned, what lies before the first is
  // beyond every end.
  FE_HD uint32_t columns_of(int32_t y) const {
    return static_cast<uint32_t>(y) < bottom ? static_cast<uint32_t>(p.in_width) : 0;
  }

  // Brings the samples `rows` below the next ones into the L2 cache: loads alone do not keep the memory busy.
  FE_HD void prefetch_row(int32_t rows) const {
    constexpr int32_t kLast = kReach - 1;
    if (static_cast<uint32_t>(left + kLast) < columns_of(next + rows))
      prefetch(from + (int64_t{rows} * plan.source_pitch + kLast * plan.channels));
  }

  // h = the next row, filtered along x. Samples outside the image are zero.
  FE_HD void advance(float* h) {
    FirWords<T, V> samples[kReach] = {};
    const uint32_t columns = columns_of(next);
    for (int32_t t = 0; t < kReach; ++t)
      if (static_cast<uint32_t>(left + t) < columns) samples[t] = read_words<T, V>(from + t * plan.channels);
    prefetch_row(kStripAhead);
    ++next;
    from += plan.source_pitch;
    for (int32_t v = 0; v < V; ++v) h[v] = along[0] * samples[0].lane(v);
    for (int32_t t = 1; t < kReach; ++t)
      for (int32_t v = 0; v < V; ++v) h[v] += along[t] * samples[t].lane(v);
  }

  FE_HD void walk() {
    float h[V], z[V], a[V] = {}, b[V] = {}, c[V] = {};  // a, b, c: the outputs below, of the rows so far
    for (int32_t k = 1; k < kStripAhead; ++k) prefetch_row(k);
    if constexpr (UP == 2) {
      advance(h);
      for (int32_t v = 0; v < V; ++v) a[v] = taps[1] * h[v], b[v] = taps[0] * h[v];
      load_operands();
      FE_ROLLED
      for (int32_t y = top; y < end; y += 2) {
        advance(h);
        for (int32_t v = 0; v < V; ++v) z[v] = a[v] + taps[3] * h[v], a[v] = taps[1] * h[v];
        write(y >= row, y + 1 < end, z);
        for (int32_t v = 0; v < V; ++v) z[v] = b[v] + taps[2] * h[v], b[v] = taps[0] * h[v];
        write(y + 1 < end, y + 2 < end, z);
      }
    } else {
      load_operands();
      int32_t due = next + kStripTaps;
      FE_ROLLED
      while (next < stop) {
        advance(h);
        for (int32_t v = 0; v < V; ++v) {
          z[v] = a[v] + taps[3] * h[v];
          a[v] = b[v] + taps[2] * h[v], b[v] = c[v] + taps[1] * h[v], c[v] = taps[0] * h[v];
        }
        if (next < due) continue;
        due += DOWN;
        write(true, next < stop, z);
      }
    }
  }

  // The next output, where it lies in the strip; `more`: so does the one below.
  FE_HD void write(bool wanted, bool more, float* z) {
    T* const out = to;
    to += plan.target_pitch;
    for (int32_t v = 0; v < V; ++v) z[v] *= scale[v];
    if constexpr (EPILOGUE) {
      const float shift = noise * strength;
      pixel += p.out_width;
      if (more && p.noise) noise = p.noise[pixel];
      if (!wanted) return;
      for (int32_t v = 0; v < V; ++v) z[v] = z[v] + shift + bias[v];
      const float slope = p.act == kLinear ? 1.0f : p.slope;
      for (int32_t v = 0; v < V; ++v) z[v] = finish<kLeakyRelu>(z[v], slope, p.gain, p.clamp);
      if (p.add) {
        const FirWords<T, V> added = read_words<T, V>(static_cast<const T*>(p.add) + (out - static_cast<T*>(p.y)));
        for (int32_t v = 0; v < V; ++v) z[v] += added.lane(v);
      }
    }
    if (!wanted) return;
    Pack pack;
    store_pack(z, &pack);
    *reinterpret_cast<Pack*>(out) = pack;
  }
};

// run(FirStrip type as a null pointer): the instance that computes p.
template <class T, int V, class Run>
inline void visit_fir_strip(const UpFirDnParams& p, Run&& run) {
  if (p.epilogue) {
    if (p.up == 2) return run(static_cast<FirStrip<T, V, 2, 1, true>*>(nullptr));
    if (p.down == 2) return run(static_cast<FirStrip<T, V, 1, 2, true>*>(nullptr));
    return run(static_cast<FirStrip<T, V, 1, 1, true>*>(nullptr));
  }
  if (p.up == 2) return run(static_cast<FirStrip<T, V, 2, 1, false>*>(nullptr));
  if (p.down == 2) return run(static_cast<FirStrip<T, V, 1, 2, false>*>(nullptr));
  run(static_cast<FirStrip<T, V, 1, 1, false>*>(nullptr));
}

}  // namespace FE_ISA
}  // namespace fe

#undef FE_ROLLED
