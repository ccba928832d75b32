// SPDX-License-Identifier: Apache-2.0
// A register of floats of the instruction set being compiled, for kernels whose sums must stay in registers from one
// step to the next; operators become single instructions. Loops that need none of that are written with omp simd.
#pragma once

#include "elementwise.h"

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace fe {
namespace FE_ISA {

#if defined(__AVX512F__)
constexpr int32_t kVectorFloats = 16;
#elif defined(__AVX__)
constexpr int32_t kVectorFloats = 8;
#else
constexpr int32_t kVectorFloats = 4;
#endif

typedef float Vector __attribute__((vector_size(kVectorFloats * sizeof(float))));
typedef uint32_t Words __attribute__((vector_size(kVectorFloats * sizeof(uint32_t))));
typedef uint16_t Halves __attribute__((vector_size(kVectorFloats * sizeof(uint16_t))));

FE_HD Vector spread(float value) { return value - Vector{}; }

// Addresses need no alignment. The half types are converted as load() and store() of elementwise.h do it.
FE_HD Vector load_vector(const float* from) {
  Vector value;
  std::memcpy(&value, from, sizeof(value));
  return value;
}

FE_HD Vector load_vector(const BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  const Words words = __builtin_convertvector(halves, Words) << 16;
  Vector value;
  std::memcpy(&value, &words, sizeof(value));
  return value;
}

FE_HD void store_vector(const Vector& value, BFloat16* to) {
  Words bits;
  std::memcpy(&bits, &value, sizeof(bits));
  const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16, quiet = (bits >> 16) | 0x0040u;
  const Words chosen = (bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded;
  const Halves halves = __builtin_convertvector(chosen, Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

FE_HD Vector load_vector(const Float16* from) {
#if defined(__AVX512F__)
  return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#elif defined(__AVX__) && defined(__F16C__)
  return (Vector)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
#else
  Vector value;
  for (int32_t i = 0; i < kVectorFloats; ++i) value[i] = load(from[i]);
  return value;
#endif
}

FE_HD void store_vector(const Vector& value, Float16* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)value, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX__) && defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm256_cvtps_ph((__m256)value, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int32_t i = 0; i < kVectorFloats; ++i) store(value[i], to + i);
#endif
}

FE_HD void store_vector(const Vector& value, float* to) { std::memcpy(to, &value, sizeof(value)); }

// Whether a vector of T fills a cache line, so that it can be written past the caches by itself.
template <class T>
constexpr bool kVectorFillsLine = kVectorFloats * sizeof(T) == 64;

// Past the caches, to an address aligned to a line. A thread calls finish_streams of rows.h when it is done.
template <class T>
FE_HD void stream_vector(const Vector& value, T* to) {
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == sizeof(float)) return _mm512_stream_ps(reinterpret_cast<float*>(to), (__m512)value);
#endif
  store_vector(value, to);
}

}  // namespace FE_ISA
}  // namespace fe
