// SPDX-License-Identifier: Apache-2.0
// What forward and backward of norm_modulate share on a GPU: the tile that a block of threads works on and how it is read,
// sums over it, what holds for all pixels of a channel, u and z of a pack, and the choice of a layout.
#pragma once

#include "cuda_common.cuh"
#include "norm_modulate.h"

namespace fe {
namespace FE_ISA {
namespace {

// How a block of threads reads a tile in steps, each thread kPacks packs of V elements a step. Planar: one channel, all
// threads along its pixels. Channels last: kAcross packs of neighbouring channels, and kLanes pixels beside each other.
template <class Type, bool CHANNELS_LAST, int VALUES>
struct Layout {
  using T = Type;
  static constexpr bool LAST = CHANNELS_LAST;
  static constexpr int V = VALUES;
  static constexpr int kAcross = LAST ? (V > 1 ? 8 : kWarp) : 1;
  static constexpr int kLanes = kThreads / kAcross;
  static constexpr int kPacks = V == 8 || (LAST && V > 1) ? 2 : 4;
  static constexpr int kWidth = LAST ? kAcross * V : 1;  // channels of a tile
  static constexpr int kStep = kLanes * kPacks * (LAST ? 1 : V);  // pixels
  static constexpr int kChannels = LAST ? V : 1;  // of one thread
  // Packs whose gradients are made beside each other: what the registers hold.
  static constexpr int kTogether = V == 8 || (LAST && V > 1) ? 1 : kPacks;
};

// What a thread works on: its channels from `channel` on, `column` of the tile, at the pixels [first, end) of the block.
struct Tile {
  int64_t sample, channel, base, first, end;
  int chunk, column;
  bool inside;
};

template <class L>
__host__ __device__ __forceinline__ int64_t tiles_of(const NormModulateParams& p) {
  return (p.channels + L::kWidth - 1) / L::kWidth;
}

template <class L>
__device__ __forceinline__ Tile tile_of(const NormModulateParams& p, const NormChunks& plan) {
  const unsigned chunks = static_cast<unsigned>(plan.chunks), tiles = static_cast<unsigned>(tiles_of<L>(p));
  const unsigned outer = blockIdx.x / chunks, chunk = blockIdx.x - outer * chunks;
  const unsigned sample = outer / tiles, tile = outer - sample * tiles;
  Tile t;
  t.sample = sample;
  t.column = L::LAST ? static_cast<int>(threadIdx.x) % L::kAcross * L::V : 0;
  t.channel = static_cast<int64_t>(tile) * L::kWidth + t.column;
  t.base = L::LAST ? t.sample * p.pixels * p.channels + t.channel : (t.sample * p.channels + t.channel) * p.pixels;
  t.chunk = static_cast<int>(chunk);
  t.first = static_cast<int64_t>(chunk) * plan.pixels_per_chunk;
  t.end = t.first + plan.pixels_per_chunk < p.pixels ? t.first + plan.pixels_per_chunk : p.pixels;
  t.inside = t.channel < p.channels;
  return t;
}

// The first pixel of the thread's pack k in a step that starts at `from`, and the index of the pack's first element.
template <class L>
__device__ __forceinline__ int64_t pixel_of(int64_t from, int k) {
  const int thread = static_cast<int>(threadIdx.x);
  return from + (L::LAST ? k * L::kLanes + thread / L::kAcross : (k * kThreads + thread) * L::V);
}

template <class L>
__device__ __forceinline__ int64_t index_of(const NormModulateParams& p, const Tile& t, int64_t pixel) {
  return t.base + (L::LAST ? pixel * p.channels : pixel);
}

// One access of the width of a pack, through the cache for what no thread of the kernel writes.
template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using type = unsigned short;
};
template <>
struct Word<4> {
  using type = unsigned int;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <class L>
using Bits = typename Word<sizeof(typename L::T) * L::V>::type;

template <class L>
union Elements {
  Bits<L> bits;
  Pack<typename L::T, L::V> pack;
};

template <class L>
__device__ __forceinline__ Bits<L> load_bits(const void* data, int64_t index) {
  return __ldg(reinterpret_cast<const Bits<L>*>(static_cast<const typename L::T*>(data) + index));
}

template <class L>
__device__ __forceinline__ void unpack(Bits<L> bits, float (&values)[L::V]) {
  Elements<L> elements;
  elements.bits = bits;
#pragma unroll
  for (int v = 0; v < L::V; ++v) values[v] = load(elements.pack.lane[v]);
}

template <class L>
__device__ __forceinline__ void load_pack(const void* data, int64_t index, float (&values)[L::V]) {
  unpack<L>(load_bits<L>(data, index), values);
}

template <class L>
__device__ __forceinline__ void store_pack(const float (&values)[L::V], void* data, int64_t index) {
  Elements<L> elements;
#pragma unroll
  for (int v = 0; v < L::V; ++v) store(values[v], &elements.pack.lane[v]);
  *reinterpret_cast<Bits<L>*>(static_cast<typename L::T*>(data) + index) = elements.bits;
}

// totals[i, channel] = the sum of values[i] over the threads that share the channel, in a fixed order, for all to read.
constexpr int kSharedSums = kWarps * kWarp;  // floats that one sum of every channel of a tile takes

template <class L, int COUNT>
__device__ __forceinline__ void channel_sums(const Tile& t, float (&values)[COUNT][L::kChannels], float* shared,
                                             float* totals) {
  const int thread = static_cast<int>(threadIdx.x), warp = thread / kWarp;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
#pragma unroll
    for (int c = 0; c < L::kChannels; ++c) {
#pragma unroll
      for (int step = kWarp / 2; step >= L::kAcross; step /= 2)
        values[i][c] += __shfl_xor_sync(0xffffffffu, values[i][c], step);
      if (thread % kWarp < L::kAcross) shared[(i * kWarps + warp) * L::kWidth + t.column + c] = values[i][c];
    }
  }
  __syncthreads();
  if (thread < COUNT * L::kWidth) {
    const float* first = shared + (thread / L::kWidth) * kWarps * L::kWidth + thread % L::kWidth;
    float total = 0.0f;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += first[w * L::kWidth];
    totals[thread] = total;
  }
  __syncthreads();
}

// The channel whose results this thread writes, one thread a channel of the tile; -1 for the others.
template <class L>
__device__ __forceinline__ int64_t own_channel(const NormModulateParams& p, const Tile& t) {
  const int64_t own = t.channel - t.column + threadIdx.x;
  return threadIdx.x < L::kWidth && own < p.channels ? own : -1;
}

// The same of one double a thread.
__device__ __forceinline__ double block_sum(double value, double* shared) {
  value = warp_sum(value);
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  double total = 0.0;
  for (int w = 0; w < kWarps; ++w) total += shared[w];
  __syncthreads();
  return total;
}

struct Normalisation {
  float mean, scale, rest, after;  // u = (x - mean) * scale + rest; the normalised value is u * after
};

__device__ __forceinline__ Normalisation normalisation_of(const NormModulateParams& p, int64_t sample, int64_t channel) {
  const int64_t plane = sample * p.channels + channel, step = p.batch * p.channels;
  if (p.norm == kInstanceNorm)
    return {p.statistics[plane], p.statistics[plane + step], p.statistics[plane + 2 * step], 1.0f};
  if (p.norm == kGivenNorm)
    return {p.mean[sample * p.mean_stride + channel], 1.0f, 0.0f, p.rstd[sample * p.rstd_stride + channel]};
  return {0.0f, 1.0f, 0.0f, 1.0f};
}

__device__ __forceinline__ float channel_value(const void* data, int32_t kind, int64_t stride, int64_t sample,
                                               int64_t channel, float absent) {
  return kind == kPerChannel ? static_cast<const float*>(data)[sample * stride + channel] : absent;
}

__device__ __forceinline__ float unit(const NormModulateParams& p) {
  return p.one_plus && p.gamma_kind != kAbsent ? 1.0f : 0.0f;
}

__host__ __device__ __forceinline__ bool is_map(int32_t kind) { return kind == kPerPixel || kind == kPerElement; }

// Gamma's factor where gamma is no map.
__device__ __forceinline__ float channel_factor(const NormModulateParams& p, int64_t sample, int64_t channel) {
  const float one = is_map(p.gamma_kind) ? 0.0f : unit(p);
  return one + channel_value(p.gamma, p.gamma_kind, p.gamma_stride, sample, channel, 1.0f);
}

// What holds for all pixels of a channel, in shared memory: the registers would not hold it for every channel of a thread.
enum Row { kMean, kScale, kRest, kAfter, kFactor, kBeta, kMeanGrad, kSlopeGrad, kRows };

template <class L>
struct Channels {
  float* rows;  // [kRows, kWidth], from this thread's first channel on

  // All threads of the block call this.
  __device__ __forceinline__ Channels(const NormModulateParams& p, const Tile& t, float* shared) : rows(shared + t.column) {
    const int64_t channel = own_channel<L>(p, t);
    if (channel >= 0) {
      float* own = shared + threadIdx.x;
      const Normalisation n = normalisation_of(p, t.sample, channel);
      own[kMean * L::kWidth] = n.mean;
      own[kScale * L::kWidth] = n.scale;
      own[kRest * L::kWidth] = n.rest;
      own[kAfter * L::kWidth] = n.after;
      own[kFactor * L::kWidth] = channel_factor(p, t.sample, channel);
      own[kBeta * L::kWidth] = channel_value(p.beta, p.beta_kind, p.beta_stride, t.sample, channel, 0.0f);
    }
    __syncthreads();
  }

  // Of element v of a pack.
  __device__ __forceinline__ float at(Row row, int v) const { return rows[row * L::kWidth + (L::LAST ? v : 0)]; }

  // Between two packs of a loop: the rows are to be read again, not kept in registers.
  __device__ __forceinline__ void forget() const {
    asm volatile("" ::: "memory");
  }
};

// The values of a map under a pack.
template <class L>
__device__ __forceinline__ void load_map(const NormModulateParams& p, const void* map, int32_t kind, const Tile& t,
                                         int64_t pixel, int64_t index, float (&values)[L::V]) {
  if (kind == kPerElement) return load_pack<L>(map, index, values);
  const int64_t at = t.sample * p.pixels + pixel;
  if (!L::LAST) return load_pack<L>(map, at, values);
  const float value = load(static_cast<const typename L::T*>(map)[at]);
#pragma unroll
  for (int v = 0; v < L::V; ++v) values[v] = value;
}

// u, gamma's factor and z of a pack: what forward and backward share.
template <class L>
struct Modulated {
  float u[L::V], factor[L::V], z[L::V];

  __device__ __forceinline__ Modulated(const NormModulateParams& p, const Channels<L>& channels, const Tile& t,
                                       const float (&x)[L::V], int64_t pixel, int64_t index) {
    float shift[L::V];
    if (is_map(p.gamma_kind)) {
      load_map<L>(p, p.gamma, p.gamma_kind, t, pixel, index, factor);
#pragma unroll
      for (int v = 0; v < L::V; ++v) factor[v] += unit(p);
    } else {
#pragma unroll
      for (int v = 0; v < L::V; ++v) factor[v] = channels.at(kFactor, v);
    }
    if (is_map(p.beta_kind)) {
      load_map<L>(p, p.beta, p.beta_kind, t, pixel, index, shift);
    } else {
#pragma unroll
      for (int v = 0; v < L::V; ++v) shift[v] = channels.at(kBeta, v);
    }
#pragma unroll
    for (int v = 0; v < L::V; ++v) {
      u[v] = normalise(x[v], channels.at(kMean, v), channels.at(kScale, v), channels.at(kRest, v));
      z[v] = u[v] * channels.at(kAfter, v) * factor[v] + shift[v];
    }
  }
};

// One switch a pack.
#define FE_EACH(EXPRESSION)                                  \
  {                                                          \
    _Pragma("unroll") for (int v = 0; v < V; ++v) EXPRESSION; \
    break;                                                   \
  }
#define FE_SWITCH(FUNCTION)                                                                \
  switch (act) {                                                                           \
    case kRelu: FE_EACH(values[v] = FUNCTION<kRelu>(values[v], slope, 1.0f, -1.0f))         \
    case kLeakyRelu: FE_EACH(values[v] = FUNCTION<kLeakyRelu>(values[v], slope, 1.0f, -1.0f)) \
    case kTanh: FE_EACH(values[v] = FUNCTION<kTanh>(values[v], slope, 1.0f, -1.0f))         \
    case kSigmoid: FE_EACH(values[v] = FUNCTION<kSigmoid>(values[v], slope, 1.0f, -1.0f))   \
    case kSilu: FE_EACH(values[v] = FUNCTION<kSilu>(values[v], slope, 1.0f, -1.0f))         \
    default: FE_EACH(values[v] = FUNCTION<kLinear>(values[v], slope, 1.0f, -1.0f))          \
  }

template <int V>
__device__ __forceinline__ void activate_pack(int32_t act, float slope, float (&values)[V]) {
  FE_SWITCH(finish)
}

template <int V>
__device__ __forceinline__ void slope_pack(int32_t act, float slope, float (&values)[V]) {
  FE_SWITCH(slope_from_input)
}

#undef FE_SWITCH
#undef FE_EACH

template <class L>
unsigned grid_of(const NormModulateParams& p, const NormChunks& plan) {
  return static_cast<unsigned>(p.batch * tiles_of<L>(p) * plan.chunks);
}

template <class L>
NormChunks steps_of(const NormModulateParams& p) {
  return {(p.pixels + L::kStep - 1) / L::kStep, L::kStep};
}

// Whether packs of `values` elements start where every tensor allows it, and none leaves its plane or its pixel.
inline bool packs_fit(const NormModulateParams& p, int values) {
  uintptr_t addresses = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y) |
                        reinterpret_cast<uintptr_t>(p.grad) | reinterpret_cast<uintptr_t>(p.grad_x);
  if (is_map(p.gamma_kind)) addresses |= reinterpret_cast<uintptr_t>(p.gamma) | reinterpret_cast<uintptr_t>(p.grad_gamma);
  if (is_map(p.beta_kind)) addresses |= reinterpret_cast<uintptr_t>(p.beta) | reinterpret_cast<uintptr_t>(p.grad_beta);
  return addresses % 16 == 0 && (p.channels_last ? p.channels : p.pixels) % values == 0;
}

// Calls launch(layout, p, stream), an object of the layout that the operands allow.
template <class T, class Launch>
void launch_dtype(const NormModulateParams& p, cudaStream_t stream, Launch&& launch) {
  // Channels last: four channels a thread, also of half types; the coefficients of eight would not fit the registers.
  constexpr int V = 16 / sizeof(T);
  const bool packs = packs_fit(p, p.channels_last ? 4 : V);
  if (p.channels_last)
    return packs ? launch(Layout<T, true, 4>{}, p, stream) : launch(Layout<T, true, 1>{}, p, stream);
  return packs ? launch(Layout<T, false, V>{}, p, stream) : launch(Layout<T, false, 1>{}, p, stream);
}

template <class Launch>
Error run(const NormModulateParams& p, int device, void* stream, Launch&& launch) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16) {
    launch_dtype<Float16>(p, s, launch);
  } else if (p.dtype == kBFloat16) {
    launch_dtype<BFloat16>(p, s, launch);
  } else {
    launch_dtype<float>(p, s, launch);
  }
  return launch_error();
}

}  // namespace
}  // namespace FE_ISA
}  // namespace fe
