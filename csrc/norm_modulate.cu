// SPDX-License-Identifier: Apache-2.0
#include "norm_modulate.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

// One block of threads handles a tile: `width` channels times `lanes` pixel lanes of one sample. Planar: one channel, all
// threads along its pixels. Channels last: 32 neighbouring channels, a warp a pixel.
struct Tile {
  int64_t sample, channel, base, step;  // of this thread: its first element, and the way to the next pixel it reads
  int width, lane, lanes;
  bool inside;
};

template <bool LAST>
__device__ __forceinline__ Tile tile_of(const NormModulateParams& p, int64_t tile) {
  Tile t;
  t.width = LAST ? kWarp : 1;
  t.lanes = kThreads / t.width;
  t.lane = static_cast<int>(threadIdx.x) / t.width;
  const int64_t tiles = (p.channels + t.width - 1) / t.width;
  t.sample = tile / tiles;
  t.channel = (tile % tiles) * t.width + threadIdx.x % t.width;
  t.inside = t.channel < p.channels;
  t.step = LAST ? p.channels : 1;
  t.base = LAST ? t.sample * p.pixels * p.channels + t.channel : (t.sample * p.channels + t.channel) * p.pixels;
  return t;
}

// Sums of the threads that share a channel, in a fixed order; every thread gets its channel's.
template <bool LAST, int COUNT>
__device__ __forceinline__ void channel_sums(float (&values)[COUNT], float* shared) {
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    if (!LAST) values[i] = warp_sum(values[i]);
    if (LAST || lane == 0) shared[(i * kWarps + warp) * kWarp + (LAST ? lane : 0)] = values[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    float total = 0.0f;
    for (int w = 0; w < kWarps; ++w) total += shared[(i * kWarps + w) * kWarp + (LAST ? lane : 0)];
    values[i] = total;
  }
  __syncthreads();
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

// What gamma and beta are at one element; the value of its channel where they are no maps.
template <class T>
__device__ __forceinline__ float modulation(const void* data, int32_t kind, int64_t index, int64_t pixel, float single) {
  if (kind == kPerElement) return load(static_cast<const T*>(data)[index]);
  if (kind == kPerPixel) return load(static_cast<const T*>(data)[pixel]);
  return single;
}

// The statistics of a tile, from memory or from the copy in shared memory: a mean, then deviations from it.
template <bool LAST, class Read>
__device__ __forceinline__ void tile_statistics(const NormModulateParams& p, const Tile& t, Read read, float* shared) {
  float sum[1] = {0.0f};
  for (int64_t q = t.lane; q < p.pixels; q += t.lanes) sum[0] += read(q);
  channel_sums<LAST, 1>(sum, shared);
  const float pivot = sum[0] / static_cast<float>(p.pixels);
  float moments[2] = {0.0f, 0.0f};
  for (int64_t q = t.lane; q < p.pixels; q += t.lanes) {
    const float deviation = read(q) - pivot;
    moments[0] += deviation;
    moments[1] += deviation * deviation;
  }
  channel_sums<LAST, 2>(moments, shared);
  if (t.lane != 0 || !t.inside) return;
  const double count = static_cast<double>(p.pixels), off = static_cast<double>(moments[0]) / count;
  const double variance = static_cast<double>(moments[1]) / count - off * off;
  const double rstd = 1.0 / sqrt((variance < 0.0 ? 0.0 : variance) + static_cast<double>(p.eps));
  const double centre = static_cast<double>(pivot) + off;
  const float mean = static_cast<float>(centre);
  const int64_t plane = t.sample * p.channels + t.channel, step = p.batch * p.channels;
  p.statistics[plane] = mean;
  p.statistics[plane + step] = static_cast<float>(rstd);
  p.statistics[plane + 2 * step] = static_cast<float>((static_cast<double>(mean) - centre) * rstd);
}

constexpr int64_t kSharedPixels = 16384;  // of float32: a plane that fits shared memory

inline bool plane_fits(const NormModulateParams& p) { return !p.channels_last && p.pixels <= kSharedPixels; }

// One block a tile. KEEP: the plane is read once and kept in shared memory for the second and third use.
template <class T, bool LAST, bool KEEP>
__global__ void __launch_bounds__(kThreads) statistics_kernel(const NormModulateParams p) {
  extern __shared__ float plane[];
  __shared__ float sums[2 * kWarps * kWarp];
  const Tile t = tile_of<LAST>(p, blockIdx.x);
  const T* x = static_cast<const T*>(p.x);
  if (KEEP) {
    for (int64_t q = t.lane; q < p.pixels; q += t.lanes) plane[q] = load(x[t.base + q]);
    // A thread reads back only what it wrote itself.
  }
  const auto read = [&](int64_t q) {
    if (KEEP) return plane[q];
    return t.inside ? load(x[t.base + q * t.step]) : 0.0f;
  };
  tile_statistics<LAST>(p, t, read, sums);
  if (!KEEP) return;
  __syncthreads();  // the statistics that the first thread wrote are read by all
  const Normalisation n = normalisation_of(p, t.sample, t.channel);
  const float gamma = channel_value(p.gamma, p.gamma_kind, p.gamma_stride, t.sample, t.channel, 1.0f);
  const float beta = channel_value(p.beta, p.beta_kind, p.beta_stride, t.sample, t.channel, 0.0f);
  const float one = p.one_plus && p.gamma_kind != kAbsent ? 1.0f : 0.0f;
  for (int64_t q = t.lane; q < p.pixels; q += t.lanes) {
    const int64_t index = t.base + q, pixel = t.sample * p.pixels + q;
    const float u = normalise(plane[q], n.mean, n.scale, n.rest);
    const float z = u * (one + modulation<T>(p.gamma, p.gamma_kind, index, pixel, gamma)) +
                    modulation<T>(p.beta, p.beta_kind, index, pixel, beta);
    store(finish(p.act, z, p.slope, 1.0f, -1.0f), static_cast<T*>(p.y) + index);
  }
}

// Flat, grid-stride: every element by itself.
struct Element {
  int64_t index, sample, channel, pixel;
};

__device__ __forceinline__ Element element_at(const NormModulateParams& p, int64_t index) {
  const int64_t inner = p.channels_last ? p.channels : p.pixels, outer = index / inner, rest = index - outer * inner;
  const int64_t middle = p.channels_last ? p.pixels : p.channels, sample = outer / middle;
  const int64_t other = outer - sample * middle;
  const int64_t channel = p.channels_last ? rest : other, q = p.channels_last ? other : rest;
  return {index, sample, channel, sample * p.pixels + q};
}

// What backward and forward share: u, gamma's factor and z of one element.
struct Modulated {
  float u, factor, z;
};

template <class T>
__device__ __forceinline__ Modulated modulated(const NormModulateParams& p, const Element& e, const Normalisation& n) {
  const float one = p.one_plus && p.gamma_kind != kAbsent ? 1.0f : 0.0f;
  const float gamma = channel_value(p.gamma, p.gamma_kind, p.gamma_stride, e.sample, e.channel, 1.0f);
  const float beta = channel_value(p.beta, p.beta_kind, p.beta_stride, e.sample, e.channel, 0.0f);
  Modulated m;
  m.u = normalise(load(static_cast<const T*>(p.x)[e.index]), n.mean, n.scale, n.rest);
  m.factor = one + modulation<T>(p.gamma, p.gamma_kind, e.index, e.pixel, gamma);
  m.z = m.u * n.after * m.factor + modulation<T>(p.beta, p.beta_kind, e.index, e.pixel, beta);
  return m;
}

template <class T>
__global__ void __launch_bounds__(kThreads) forward_kernel(const NormModulateParams p) {
  const int64_t total = p.batch * p.channels * p.pixels, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    const Element e = element_at(p, i);
    const Modulated m = modulated<T>(p, e, normalisation_of(p, e.sample, e.channel));
    store(finish(p.act, m.z, p.slope, 1.0f, -1.0f), static_cast<T*>(p.y) + i);
  }
}

// One block a tile: the sums of gz, gn and gn * u over each plane, and the gradients that have one value a channel.
template <class T, bool LAST>
__global__ void __launch_bounds__(kThreads) sums_kernel(const NormModulateParams p) {
  __shared__ float shared[3 * kWarps * kWarp];
  const Tile t = tile_of<LAST>(p, blockIdx.x);
  const int64_t channel = t.inside ? t.channel : 0;
  const Normalisation n = normalisation_of(p, t.sample, channel);
  const bool gamma_map = p.gamma_kind == kPerPixel || p.gamma_kind == kPerElement;
  float sums[3] = {0.0f, 0.0f, 0.0f};
  for (int64_t q = t.lane; q < p.pixels && t.inside; q += t.lanes) {
    const int64_t index = t.base + q * t.step;
    const Modulated m = modulated<T>(p, {index, t.sample, channel, t.sample * p.pixels + q}, n);
    const float gz = load(static_cast<const T*>(p.grad)[index]) * slope_from_input(p.act, m.z, p.slope, 1.0f, -1.0f);
    const float gn = gamma_map ? gz * m.factor : gz;
    sums[0] += gz;
    sums[1] += gn;
    sums[2] += gn * m.u;
  }
  channel_sums<LAST, 3>(sums, shared);
  if (t.lane != 0 || !t.inside) return;
  const int64_t plane = t.sample * p.channels + t.channel, planes = p.batch * p.channels;
  const float one = p.one_plus && p.gamma_kind == kPerChannel ? 1.0f : 0.0f;
  const float gamma = one + channel_value(p.gamma, p.gamma_kind, p.gamma_stride, t.sample, t.channel, 1.0f);
  p.workspace[plane] = static_cast<double>(sums[1]);
  p.workspace[plane + planes] = static_cast<double>(sums[2]);
  if (p.grad_gamma && p.gamma_kind == kPerChannel) static_cast<float*>(p.grad_gamma)[plane] = sums[2] * n.after;
  if (p.grad_beta && p.beta_kind == kPerChannel) static_cast<float*>(p.grad_beta)[plane] = sums[0];
  if (p.grad_mean) p.grad_mean[plane] = -sums[1] * gamma * n.after;
  if (p.grad_rstd) p.grad_rstd[plane] = sums[2] * gamma;
}

template <class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const NormModulateParams p) {
  const int64_t planes = p.batch * p.channels, total = planes * p.pixels;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  const float inverse = 1.0f / static_cast<float>(p.pixels);
  const bool gamma_map = p.gamma_kind == kPerPixel || p.gamma_kind == kPerElement;
  const bool beta_map = p.beta_kind == kPerPixel || p.beta_kind == kPerElement;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    const Element e = element_at(p, i);
    const Normalisation n = normalisation_of(p, e.sample, e.channel);
    const Modulated m = modulated<T>(p, e, n);
    const float gz = load(static_cast<const T*>(p.grad)[i]) * slope_from_input(p.act, m.z, p.slope, 1.0f, -1.0f);
    const float gn = gamma_map ? gz * m.factor : gz;
    if (p.grad_x) {
      const int64_t plane = e.sample * p.channels + e.channel;
      const bool moving = p.norm == kInstanceNorm;
      const float mean_grad = moving ? static_cast<float>(p.workspace[plane]) * inverse : 0.0f;
      const float slope_grad = moving ? static_cast<float>(p.workspace[plane + planes]) * inverse : 0.0f;
      const float scale = n.scale * n.after * (gamma_map ? 1.0f : m.factor);
      store(normalise_gradient(gn, m.u, scale, mean_grad, slope_grad), static_cast<T*>(p.grad_x) + i);
    }
    if (p.grad_gamma && gamma_map) store(gz * (m.u * n.after), static_cast<T*>(p.grad_gamma) + i);
    if (p.grad_beta && beta_map) store(gz, static_cast<T*>(p.grad_beta) + i);
  }
}

inline unsigned flat_grid(const NormModulateParams& p) {
  const int64_t wanted = (p.batch * p.channels * p.pixels + kThreads - 1) / kThreads;
  return static_cast<unsigned>(wanted < 132 * 32 ? wanted : 132 * 32);
}

inline unsigned tile_grid(const NormModulateParams& p) {
  return static_cast<unsigned>(p.batch * (p.channels_last ? (p.channels + kWarp - 1) / kWarp : p.channels));
}

template <class T>
Error forward(const NormModulateParams& p, cudaStream_t stream) {
  if (p.norm == kInstanceNorm) {
    if (plane_fits(p)) {
      const int bytes = static_cast<int>(p.pixels * sizeof(float));
      const auto kernel = statistics_kernel<T, false, true>;
      const int most = static_cast<int>(kSharedPixels * sizeof(float));
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
      if (error != cudaSuccess) return cudaGetErrorString(error);
      kernel<<<tile_grid(p), kThreads, bytes, stream>>>(p);
      return launch_error();
    }
    if (p.channels_last)
      statistics_kernel<T, true, false><<<tile_grid(p), kThreads, 0, stream>>>(p);
    else
      statistics_kernel<T, false, false><<<tile_grid(p), kThreads, 0, stream>>>(p);
  }
  forward_kernel<T><<<flat_grid(p), kThreads, 0, stream>>>(p);
  return launch_error();
}

template <class T>
Error backward(const NormModulateParams& p, cudaStream_t stream) {
  if (norm_backward_needs_sums(p)) {
    if (p.channels_last)
      sums_kernel<T, true><<<tile_grid(p), kThreads, 0, stream>>>(p);
    else
      sums_kernel<T, false><<<tile_grid(p), kThreads, 0, stream>>>(p);
  }
  backward_kernel<T><<<flat_grid(p), kThreads, 0, stream>>>(p);
  return launch_error();
}

Error run(const NormModulateParams& p, int device, void* stream, bool is_backward) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16) return is_backward ? backward<Float16>(p, s) : forward<Float16>(p, s);
  if (p.dtype == kBFloat16) return is_backward ? backward<BFloat16>(p, s) : forward<BFloat16>(p, s);
  return is_backward ? backward<float>(p, s) : forward<float>(p, s);
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
