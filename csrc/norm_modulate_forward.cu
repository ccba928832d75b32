// SPDX-License-Identifier: Apache-2.0
#include "norm_modulate_tiles.cuh"

namespace fe {
namespace FE_ISA {
namespace {

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

}  // namespace
}  // namespace FE_ISA

Error norm_modulate_fwd_cuda(const NormModulateParams& p, int device, void* stream) {
  return FE_ISA::run(p, device, stream, [](auto layout, const NormModulateParams& params, cudaStream_t s) {
    FE_ISA::forward<decltype(layout)>(params, s);
  });
}

}  // namespace fe
