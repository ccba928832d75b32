// SPDX-License-Identifier: Apache-2.0
// Rows of float32 that stay in the L1 cache: a block of a mask of any dtype, and that row spread over the channels.
#pragma once

#include "elementwise.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fe {
namespace FE_ISA {

template <class T>
inline void load_row(const void* data, int64_t first, int32_t count, float* out) {
  const T* values = static_cast<const T*>(data) + first;
#pragma omp simd
  for (int32_t q = 0; q < count; ++q) out[q] = load(values[q]);
}

inline void load_row(const void* data, int32_t dtype, int64_t first, int32_t count, float* out) {
  if (dtype == kFloat16) return load_row<Float16>(data, first, count, out);
  if (dtype == kBFloat16) return load_row<BFloat16>(data, first, count, out);
  if (dtype == kUInt8) return load_row<uint8_t>(data, first, count, out);
  load_row<float>(data, first, count, out);
}

struct PixelBlock {
  int64_t sample, first;
  int32_t count;  // at most kMaxBlockPixels
};

inline PixelBlock pixel_block(const BlockPlan& plan, int64_t index, int64_t pixels) {
  const int64_t first = (index % plan.blocks_per_sample) * plan.pixels_per_block;
  const int64_t left = pixels - first;
  return {index / plan.blocks_per_sample, first,
          static_cast<int32_t>(left < plan.pixels_per_block ? left : plan.pixels_per_block)};
}

// out[q * channels + c] = mask[q]
inline void spread_row(const float* mask, int32_t count, int64_t channels, float* out) {
  if (channels == 3) {  // images: a constant vectorises
#pragma omp simd
    for (int32_t q = 0; q < count; ++q) out[3 * q] = out[3 * q + 1] = out[3 * q + 2] = mask[q];
    return;
  }
  for (int32_t q = 0; q < count; ++q)
    for (int64_t c = 0; c < channels; ++c) *out++ = mask[q];
}

// Calls body(first element, mask row, elements) over the runs of an image block that are contiguous in memory, so that
// one flat loop serves both layouts. Pixel q of the block has mask[q]; channels_last spreads it over the channels.
template <class Body>
inline void for_masked_runs(const PixelBlock& block, int64_t channels, int64_t pixels, bool channels_last,
                            const float* mask, Body&& body) {
  if (!channels_last) {
    for (int64_t c = 0; c < channels; ++c)
      body((block.sample * channels + c) * pixels + block.first, mask, block.count);
    return;
  }
  float spread[kMaxBlockPixels];
  const bool wide = channels > kMaxBlockPixels;
  const int32_t group = wide ? 1 : static_cast<int32_t>(kMaxBlockPixels / channels);
  const int64_t run = wide ? kMaxBlockPixels : channels;
  for (int32_t q = 0; q < block.count; q += group) {
    const int32_t members = block.count - q < group ? block.count - q : group;
    spread_row(mask + q, members, run, spread);
    const int64_t base = (block.sample * pixels + block.first + q) * channels;
    for (int64_t c = 0; c < channels; c += run) {
      const int64_t left = channels - c < run ? channels - c : run;
      body(base + c, static_cast<const float*>(spread), static_cast<int32_t>(left * members));
    }
  }
}

// Writes a finished row past the caches: a plain store reads each line of the output before it overwrites it.
// For outputs too large to stay in a cache. A thread that streamed calls finish_streams before others read.
inline void stream_row(const void* row, int64_t bytes, void* out) {
  const char* from = static_cast<const char*>(row);
  char* to = static_cast<char*>(out);
#if defined(__SSE2__)
  constexpr int64_t kLine = 64;
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(to) % kLine);
  const int64_t gap = misaligned ? kLine - misaligned : 0;
  const int64_t head = gap < bytes ? gap : bytes;
  std::memcpy(to, from, static_cast<size_t>(head));
  from += head, to += head, bytes -= head;
  for (; bytes >= kLine; from += kLine, to += kLine, bytes -= kLine) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX__)
    for (int64_t i = 0; i < kLine; i += 32)
      _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                          _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
    for (int64_t i = 0; i < kLine; i += 16)
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
  }
#endif
  std::memcpy(to, from, static_cast<size_t>(bytes));
}

inline void finish_streams() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace FE_ISA
}  // namespace fe
