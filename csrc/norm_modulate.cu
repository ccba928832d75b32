// SPDX-License-Identifier: Apache-2.0
#include "norm_modulate.h"

#include "cuda_common.cuh"

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
using Values = float[L::kPacks][L::V];

template <class L>
__device__ __forceinline__ void load_step(const void* data, const NormModulateParams& p, const Tile& t, int64_t from,
                                          Values<L>& x) {
#pragma unroll
  for (int k = 0; k < L::kPacks; ++k) {
    const int64_t pixel = pixel_of<L>(from, k);
    if (t.inside && pixel < t.end) {
      load_pack<L>(data, index_of<L>(p, t, pixel), x[k]);
    } else {
#pragma unroll
      for (int v = 0; v < L::V; ++v) x[k][v] = 0.0f;
    }
  }
}

// Of one step, which is in registers: totals[0, channel] is the sum, totals[1, channel] and totals[2, channel] those of the
// deviations from its mean and of their squares. Returns the pixels that were counted.
template <class L>
__device__ __forceinline__ float step_moments(const Tile& t, int64_t from, const Values<L>& x, float* shared,
                                              float* totals) {
  float sum[1][L::kChannels] = {};
#pragma unroll
  for (int k = 0; k < L::kPacks; ++k) {
#pragma unroll
    for (int v = 0; v < L::V; ++v) sum[0][L::LAST ? v : 0] += x[k][v];
  }
  channel_sums<L, 1>(t, sum, shared, totals);
  const float count = static_cast<float>(t.end - from < L::kStep ? t.end - from : L::kStep);
  float pivot[L::kChannels], moments[2][L::kChannels] = {};
#pragma unroll
  for (int c = 0; c < L::kChannels; ++c) pivot[c] = totals[t.column + c] / count;
#pragma unroll
  for (int k = 0; k < L::kPacks; ++k) {
    const bool valid = pixel_of<L>(from, k) < t.end;
#pragma unroll
    for (int v = 0; v < L::V; ++v) {
      const int c = L::LAST ? v : 0;
      const float deviation = valid ? x[k][v] - pivot[c] : 0.0f;
      moments[0][c] += deviation;
      moments[1][c] += deviation * deviation;
    }
  }
  channel_sums<L, 2>(t, moments, shared, totals + L::kWidth);
  return count;
}

// The moments of this thread's own channel.
template <class L>
__device__ __forceinline__ Moments own_moments(const float* totals, float pixels) {
  const float* own = totals + threadIdx.x;
  const double count = static_cast<double>(pixels), pivot = static_cast<double>(own[0] / pixels);
  const double sum = static_cast<double>(own[L::kWidth]);
  const double rest = static_cast<double>(own[2 * L::kWidth]) - sum * sum / count;
  return {pivot + sum / count, rest < 0.0 ? 0.0 : rest};
}

__device__ __forceinline__ void save_statistics(const NormModulateParams& p, int64_t plane, const Moments& found) {
  const double rstd = 1.0 / sqrt(found.squares / static_cast<double>(p.pixels) + static_cast<double>(p.eps));
  const float mean = static_cast<float>(found.mean);
  const int64_t step = p.batch * p.channels;
  p.statistics[plane] = mean;
  p.statistics[plane + step] = static_cast<float>(rstd);
  p.statistics[plane + 2 * step] = static_cast<float>((static_cast<double>(mean) - found.mean) * rstd);
}

template <class L>
__device__ __forceinline__ void apply_step(const NormModulateParams& p, const Tile& t, int64_t from,
                                           const Values<L>& x, float* rows) {
  const Channels<L> channels(p, t, rows);
#pragma unroll
  for (int k = 0; k < L::kPacks; ++k) {
    const int64_t pixel = pixel_of<L>(from, k);
    if (!t.inside || pixel >= t.end) continue;
    const int64_t index = index_of<L>(p, t, pixel);
    channels.forget();
    Modulated<L> m(p, channels, t, x[k], pixel, index);
    activate_pack(p.act, p.slope, m.z);
    store_pack<L>(m.z, p.y, index);
  }
}

// A plane that is one step: read once, kept in registers for the statistics and the result.
template <class L>
__global__ void __launch_bounds__(kThreads, 4) forward_whole_kernel(const NormModulateParams p, const NormChunks plan) {
  __shared__ float shared[2 * kSharedSums], totals[3 * L::kWidth];
  __shared__ alignas(16) float rows[kRows * L::kWidth];
  const Tile t = tile_of<L>(p, plan);
  Values<L> x;
  load_step<L>(p.x, p, t, 0, x);
  const float count = step_moments<L>(t, 0, x, shared, totals);
  const int64_t channel = own_channel<L>(p, t);
  if (channel >= 0) save_statistics(p, t.sample * p.channels + channel, own_moments<L>(totals, count));
  apply_step<L>(p, t, 0, x, rows);
}

// One block a chunk: its moments, to the workspace [plane, chunk, 2].
template <class L>
__global__ void __launch_bounds__(kThreads, 4) moments_kernel(const NormModulateParams p, const NormChunks plan) {
  __shared__ float shared[2 * kSharedSums], totals[3 * L::kWidth];
  const Tile t = tile_of<L>(p, plan);
  const int64_t channel = own_channel<L>(p, t);
  double* out = p.workspace + 2 * ((t.sample * p.channels + channel) * plan.chunks + t.chunk);
  for (int64_t from = t.first; from < t.end; from += L::kStep) {
    Values<L> x;
    load_step<L>(p.x, p, t, from, x);
    const float count = step_moments<L>(t, from, x, shared, totals);
    if (channel < 0) continue;
    Moments found = own_moments<L>(totals, count);
    if (from > t.first)
      found = merge({out[0], out[1]}, static_cast<double>(from - t.first), found, static_cast<double>(count));
    out[0] = found.mean;
    out[1] = found.squares;
  }
}

// One block a plane. The mean of all chunks first: no difference of large numbers.
__global__ void __launch_bounds__(kThreads) statistics_kernel(const NormModulateParams p, const NormChunks plan) {
  __shared__ double shared[kWarps];
  const int64_t plane = blockIdx.x;
  const double* found = p.workspace + 2 * plane * plan.chunks;
  const auto count_of = [&](int64_t chunk) {
    const int64_t left = p.pixels - chunk * plan.pixels_per_chunk;
    return static_cast<double>(left < plan.pixels_per_chunk ? left : plan.pixels_per_chunk);
  };
  double sum = 0.0, squares = 0.0;
  for (int64_t i = threadIdx.x; i < plan.chunks; i += kThreads) sum += found[2 * i] * count_of(i);
  const double mean = block_sum(sum, shared) / static_cast<double>(p.pixels);
  for (int64_t i = threadIdx.x; i < plan.chunks; i += kThreads) {
    const double delta = found[2 * i] - mean;
    squares += found[2 * i + 1] + delta * delta * count_of(i);
  }
  squares = block_sum(squares, shared);
  if (threadIdx.x == 0) save_statistics(p, plane, {mean, squares});
}

// One block a step.
template <class L>
__global__ void __launch_bounds__(kThreads, 4) forward_kernel(const NormModulateParams p, const NormChunks plan) {
  __shared__ alignas(16) float rows[kRows * L::kWidth];
  const Tile t = tile_of<L>(p, plan);
  Values<L> x;
  load_step<L>(p.x, p, t, t.first, x);
  apply_step<L>(p, t, t.first, x, rows);
}

// A pack's gradients: gz reaches z, gn = gz * gamma; a gamma of one value a channel is left to the plane's sums.
template <class L>
struct Gradient {
  float u[L::V], gz[L::V], gn[L::V];

  __device__ __forceinline__ Gradient(const NormModulateParams& p, const Channels<L>& channels, const Tile& t,
                                      int64_t pixel, int64_t index) {
    float x[L::V];
    load_pack<L>(p.x, index, x);
    load_pack<L>(p.grad, index, gz);
    Modulated<L> m(p, channels, t, x, pixel, index);
    slope_pack(p.act, p.slope, m.z);
    const bool gamma_map = is_map(p.gamma_kind);
#pragma unroll
    for (int v = 0; v < L::V; ++v) {
      u[v] = m.u[v];
      gz[v] *= m.z[v];
      gn[v] = gamma_map ? gz[v] * m.factor[v] : gz[v];
    }
  }
};

// Sums of gz, gn and gn * u.
template <class L>
using Sums = float[3][L::kChannels];

template <class L>
__device__ __forceinline__ void add_step(const NormModulateParams& p, const Channels<L>& channels, const Tile& t,
                                         int64_t from, Sums<L>& sums) {
#pragma unroll L::kTogether
  for (int k = 0; k < L::kPacks; ++k) {
    const int64_t pixel = pixel_of<L>(from, k);
    if (!t.inside || pixel >= t.end) continue;
    channels.forget();
    const Gradient<L> g(p, channels, t, pixel, index_of<L>(p, t, pixel));
#pragma unroll
    for (int v = 0; v < L::V; ++v) {
      const int c = L::LAST ? v : 0;
      sums[0][c] += g.gz[v];
      sums[1][c] += g.gn[v];
      sums[2][c] += g.gn[v] * g.u[v];
    }
  }
}

// The gradients that have one value a channel.
__device__ __forceinline__ void save_sums(const NormModulateParams& p, int64_t sample, int64_t channel, float gz,
                                          float gn, float slope) {
  const int64_t plane = sample * p.channels + channel;
  const Normalisation n = normalisation_of(p, sample, channel);
  const float gamma = channel_factor(p, sample, channel);
  if (p.grad_gamma && p.gamma_kind == kPerChannel) static_cast<float*>(p.grad_gamma)[plane] = slope * n.after;
  if (p.grad_beta && p.beta_kind == kPerChannel) static_cast<float*>(p.grad_beta)[plane] = gz;
  if (p.grad_mean) p.grad_mean[plane] = -gn * gamma * n.after;
  if (p.grad_rstd) p.grad_rstd[plane] = slope * gamma;
}

// The rows kMeanGrad and kSlopeGrad are the means of gn and of gn * u, 0 where the statistics are constants.
template <class L>
__device__ __forceinline__ void gradient_step(const NormModulateParams& p, const Channels<L>& channels, const Tile& t,
                                              int64_t from) {
  const bool gamma_map = is_map(p.gamma_kind);
#pragma unroll L::kTogether
  for (int k = 0; k < L::kPacks; ++k) {
    const int64_t pixel = pixel_of<L>(from, k);
    if (!t.inside || pixel >= t.end) continue;
    const int64_t index = index_of<L>(p, t, pixel);
    channels.forget();
    Gradient<L> g(p, channels, t, pixel, index);
#pragma unroll
    for (int v = 0; v < L::V; ++v) {
      const float after = channels.at(kAfter, v);
      const float scale = channels.at(kScale, v) * after * (gamma_map ? 1.0f : channels.at(kFactor, v));
      g.gn[v] = normalise_gradient(g.gn[v], g.u[v], scale, channels.at(kMeanGrad, v), channels.at(kSlopeGrad, v));
      g.u[v] = g.gz[v] * (g.u[v] * after);
    }
    if (p.grad_x) store_pack<L>(g.gn, p.grad_x, index);
    if (p.grad_gamma && gamma_map) store_pack<L>(g.u, p.grad_gamma, index);
    if (p.grad_beta && is_map(p.beta_kind)) store_pack<L>(g.gz, p.grad_beta, index);
  }
}

// The means that gradient_step reads, of this thread's own channel.
template <class L>
__device__ __forceinline__ void save_means(const NormModulateParams& p, float* rows, float gn, float slope) {
  const float inverse = 1.0f / static_cast<float>(p.pixels);
  const bool moving = p.norm == kInstanceNorm;
  rows[kMeanGrad * L::kWidth + threadIdx.x] = moving ? gn * inverse : 0.0f;
  rows[kSlopeGrad * L::kWidth + threadIdx.x] = moving ? slope * inverse : 0.0f;
}

// A plane that is one step: its sums, then its gradients, for which it comes from the cache.
template <class L>
__global__ void __launch_bounds__(kThreads, 4) backward_whole_kernel(const NormModulateParams p, const NormChunks plan) {
  __shared__ float shared[3 * kSharedSums], totals[3 * L::kWidth];
  __shared__ alignas(16) float rows[kRows * L::kWidth];
  const Tile t = tile_of<L>(p, plan);
  const Channels<L> channels(p, t, rows);
  Sums<L> sums = {};
  add_step<L>(p, channels, t, 0, sums);
  channel_sums<L, 3>(t, sums, shared, totals);
  const int64_t channel = own_channel<L>(p, t);
  if (channel >= 0) {
    const float* own = totals + threadIdx.x;
    save_sums(p, t.sample, channel, own[0], own[L::kWidth], own[2 * L::kWidth]);
    save_means<L>(p, rows, own[L::kWidth], own[2 * L::kWidth]);
  }
  __syncthreads();
  gradient_step<L>(p, channels, t, 0);
}

// One block a chunk: its sums, to the workspace behind the totals, [plane, chunk, 3].
template <class L>
__global__ void __launch_bounds__(kThreads, 4) sums_kernel(const NormModulateParams p, const NormChunks plan) {
  __shared__ float shared[3 * kSharedSums], totals[3 * L::kWidth];
  __shared__ alignas(16) float rows[kRows * L::kWidth];
  const Tile t = tile_of<L>(p, plan);
  const Channels<L> channels(p, t, rows);
  Sums<L> sums = {};
  for (int64_t from = t.first; from < t.end; from += L::kStep) add_step<L>(p, channels, t, from, sums);
  channel_sums<L, 3>(t, sums, shared, totals);
  const int64_t channel = own_channel<L>(p, t);
  if (channel < 0) return;
  double* out = p.workspace + 2 * p.batch * p.channels + 3 * ((t.sample * p.channels + channel) * plan.chunks + t.chunk);
#pragma unroll
  for (int i = 0; i < 3; ++i) out[i] = static_cast<double>(totals[i * L::kWidth + threadIdx.x]);
}

// One block a plane.
__global__ void __launch_bounds__(kThreads) totals_kernel(const NormModulateParams p, const NormChunks plan) {
  __shared__ double shared[kWarps];
  const int64_t plane = blockIdx.x, planes = p.batch * p.channels;
  const double* found = p.workspace + 2 * planes + 3 * plane * plan.chunks;
  double totals[3] = {0.0, 0.0, 0.0};
  for (int64_t i = threadIdx.x; i < plan.chunks; i += kThreads) {
#pragma unroll
    for (int j = 0; j < 3; ++j) totals[j] += found[3 * i + j];
  }
#pragma unroll
  for (int j = 0; j < 3; ++j) totals[j] = block_sum(totals[j], shared);
  if (threadIdx.x != 0) return;
  p.workspace[plane] = totals[1];
  p.workspace[plane + planes] = totals[2];
  save_sums(p, plane / p.channels, plane % p.channels, static_cast<float>(totals[0]), static_cast<float>(totals[1]),
            static_cast<float>(totals[2]));
}

// One block a step.
template <class L>
__global__ void __launch_bounds__(kThreads, 4) backward_kernel(const NormModulateParams p, const NormChunks plan) {
  __shared__ alignas(16) float rows[kRows * L::kWidth];
  const Tile t = tile_of<L>(p, plan);
  const Channels<L> channels(p, t, rows);
  const int64_t channel = own_channel<L>(p, t);
  if (channel >= 0) {
    const double* sums = p.workspace + t.sample * p.channels + channel;
    const bool moving = p.norm == kInstanceNorm && p.grad_x;
    save_means<L>(p, rows, moving ? static_cast<float>(sums[0]) : 0.0f,
                  moving ? static_cast<float>(sums[p.batch * p.channels]) : 0.0f);
  }
  __syncthreads();
  gradient_step<L>(p, channels, t, t.first);
}

template <class L>
unsigned grid_of(const NormModulateParams& p, const NormChunks& plan) {
  return static_cast<unsigned>(p.batch * tiles_of<L>(p) * plan.chunks);
}

template <class L>
NormChunks steps_of(const NormModulateParams& p) {
  return {(p.pixels + L::kStep - 1) / L::kStep, L::kStep};
}

template <class L>
void forward(const NormModulateParams& p, cudaStream_t stream) {
  const NormChunks steps = steps_of<L>(p), plan = plan_norm_chunks(p);
  const unsigned grid = grid_of<L>(p, steps);
  if (p.norm == kInstanceNorm && steps.chunks == 1) {
    forward_whole_kernel<L><<<grid, kThreads, 0, stream>>>(p, steps);
    return;
  }
  if (p.norm == kInstanceNorm) {
    moments_kernel<L><<<grid_of<L>(p, plan), kThreads, 0, stream>>>(p, plan);
    statistics_kernel<<<static_cast<unsigned>(p.batch * p.channels), kThreads, 0, stream>>>(p, plan);
  }
  forward_kernel<L><<<grid, kThreads, 0, stream>>>(p, steps);
}

template <class L>
void backward(const NormModulateParams& p, cudaStream_t stream) {
  const NormChunks steps = steps_of<L>(p), plan = plan_norm_chunks(p);
  const unsigned grid = grid_of<L>(p, steps);
  const bool wants_sums = norm_backward_needs_sums(p);
  if (wants_sums && steps.chunks == 1) {
    backward_whole_kernel<L><<<grid, kThreads, 0, stream>>>(p, steps);
    return;
  }
  if (wants_sums) {
    sums_kernel<L><<<grid_of<L>(p, plan), kThreads, 0, stream>>>(p, plan);
    totals_kernel<<<static_cast<unsigned>(p.batch * p.channels), kThreads, 0, stream>>>(p, plan);
  }
  const bool maps = (p.grad_gamma && is_map(p.gamma_kind)) || (p.grad_beta && is_map(p.beta_kind));
  if (p.grad_x || maps) backward_kernel<L><<<grid, kThreads, 0, stream>>>(p, steps);
}

template <class L>
Error launch(const NormModulateParams& p, cudaStream_t stream, bool is_backward) {
  is_backward ? backward<L>(p, stream) : forward<L>(p, stream);
  return launch_error();
}

// Whether packs of `values` elements start where every tensor allows it, and none leaves its plane or its pixel.
inline bool packs_fit(const NormModulateParams& p, int values) {
  uintptr_t addresses = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.y) |
                        reinterpret_cast<uintptr_t>(p.grad) | reinterpret_cast<uintptr_t>(p.grad_x);
  if (is_map(p.gamma_kind)) addresses |= reinterpret_cast<uintptr_t>(p.gamma) | reinterpret_cast<uintptr_t>(p.grad_gamma);
  if (is_map(p.beta_kind)) addresses |= reinterpret_cast<uintptr_t>(p.beta) | reinterpret_cast<uintptr_t>(p.grad_beta);
  return addresses % 16 == 0 && (p.channels_last ? p.channels : p.pixels) % values == 0;
}

template <class T>
Error launch_dtype(const NormModulateParams& p, cudaStream_t stream, bool is_backward) {
  // Channels last: four channels a thread, also of half types; the coefficients of eight would not fit the registers.
  constexpr int V = 16 / sizeof(T);
  const bool packs = packs_fit(p, p.channels_last ? 4 : V);
  if (p.channels_last)
    return packs ? launch<Layout<T, true, 4>>(p, stream, is_backward) : launch<Layout<T, true, 1>>(p, stream, is_backward);
  return packs ? launch<Layout<T, false, V>>(p, stream, is_backward) : launch<Layout<T, false, 1>>(p, stream, is_backward);
}

Error run(const NormModulateParams& p, int device, void* stream, bool is_backward) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16) return launch_dtype<Float16>(p, s, is_backward);
  if (p.dtype == kBFloat16) return launch_dtype<BFloat16>(p, s, is_backward);
  return launch_dtype<float>(p, s, is_backward);
}

}  // namespace
}  // namespace FE_ISA

Error norm_modulate_fwd_cuda(const NormModulateParams& p, int device, void* stream) {
  return FE_ISA::run(p, device, stream, false);
}

Error norm_modulate_bwd_cuda(const NormModulateParams& p, int device, void* stream) {
  return FE_ISA::run(p, device, stream, true);
}

}  // namespace fe
