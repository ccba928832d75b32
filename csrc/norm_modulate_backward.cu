// SPDX-License-Identifier: Apache-2.0
#include "norm_modulate_tiles.cuh"

namespace fe {
namespace FE_ISA {
namespace {

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

}  // namespace
}  // namespace FE_ISA

Error norm_modulate_bwd_cuda(const NormModulateParams& p, int device, void* stream) {
  return FE_ISA::run(p, device, stream, [](auto layout, const NormModulateParams& params, cudaStream_t s) {
    FE_ISA::backward<decltype(layout)>(params, s);
  });
}

}  // namespace fe
