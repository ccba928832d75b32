// SPDX-License-Identifier: Apache-2.0
#include "modulated_vectors.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

constexpr int kColumnThreads = 1024;
constexpr int kRowGroups = kColumnThreads / kWarp;
constexpr int kAhead = 8;  // loads under way in a thread

// A warp has one output of one sample; V inputs a lane at once.
template <int V>
__global__ void __launch_bounds__(kThreads) demodulation_kernel(const DemodulationParams p) {
  const int64_t index = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (index >= p.batch * p.outputs) return;
  const int64_t sample = index / p.outputs;
  const float* style = p.style + sample * p.inputs;
  const float* squares = p.squares + (index - sample * p.outputs) * p.inputs;
  float sum = 0.0f;
#pragma unroll 4
  for (int64_t i = threadIdx.x % kWarp * V; i < p.inputs; i += kWarp * V) {
    float s[V], w[V];
    read_floats(style + i, s);
    read_floats(squares + i, w);
#pragma unroll
    for (int v = 0; v < V; ++v) sum += s[v] * s[v] * w[v];
  }
  sum = warp_sum(sum);
  if (threadIdx.x % kWarp == 0) p.demodulation[index] = 1.0f / sqrtf(sum + p.epsilon);
}

// A block has a warp's width of neighbouring inputs of one sample; each of its warps every kRowGroups-th output.
__global__ void __launch_bounds__(kColumnThreads) demodulation_backward_kernel(const DemodulationParams p) {
  __shared__ float sums[kRowGroups][kWarp];
  const int lane = threadIdx.x % kWarp, group = threadIdx.x / kWarp;
  const int64_t sample = blockIdx.y, column = static_cast<int64_t>(blockIdx.x) * kWarp + lane;
  const bool mine = column < p.inputs;
  const float* grad = p.grad + sample * p.outputs;
  const float* demodulation = p.demodulation + sample * p.outputs;
  float sum = 0.0f;
  for (int64_t first = group; first < p.outputs; first += kAhead * kRowGroups) {
    float values[kAhead], cubic[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) {
      const int64_t o = first + u * kRowGroups;
      const bool exists = o < p.outputs;
      values[u] = exists && mine ? __ldg(p.squares + o * p.inputs + column) : 0.0f;
      const float d = exists ? demodulation[o] : 0.0f;
      cubic[u] = exists ? grad[o] * (d * d * d) : 0.0f;
    }
#pragma unroll
    for (int u = 0; u < kAhead; ++u) sum += cubic[u] * values[u];
  }
  sums[group][lane] = sum;
  __syncthreads();
  for (int step = kRowGroups / 2; step > 0; step /= 2) {
    if (group < step) sums[group][lane] += sums[group + step][lane];
    __syncthreads();
  }
  if (group == 0 && mine) {
    const int64_t index = sample * p.inputs + column;
    p.grad_style[index] -= p.style[index] * sums[0][lane];
  }
}

// A pack of V elements a thread. LAST: they are of V neighbouring channels, otherwise of one.
template <class T, int V, bool LAST>
__global__ void __launch_bounds__(kThreads)
    weight_kernel(const ModulatedWeightParams p, const uint32_t packs, const Divisor<uint32_t> inner,
                  const Divisor<uint32_t> channels) {
  for (uint32_t index = blockIdx.x * kThreads + threadIdx.x; index < packs; index += gridDim.x * kThreads) {
    const uint32_t first = index * V, line = LAST ? first : inner.quotient(first);
    const uint32_t channel = line - channels.quotient(line) * static_cast<uint32_t>(p.channels);
    float values[V], style[V];
    read_floats(p.weight + first, values);
    if constexpr (LAST) {
      read_floats(p.style + channel, style);
    } else {
      const float one = __ldg(p.style + channel);
#pragma unroll
      for (int v = 0; v < V; ++v) style[v] = one;
    }
#pragma unroll
    for (int v = 0; v < V; ++v) values[v] *= style[v];
    Fragment<T, V> pack;
    pack.pack(values);
    pack.write(p.y, index);
  }
}

template <class T>
void modulate(const ModulatedWeightParams& p, cudaStream_t stream) {
  constexpr int V = 4;
  const bool last = p.inner == 1;
  const bool packs = (last ? p.channels : p.inner) % V == 0 && aligned(p.weight, 16) && aligned(p.y, V * sizeof(T)) &&
                     (!last || aligned(p.style, 16));
  const uint32_t count = static_cast<uint32_t>(p.outer * p.channels * p.inner) / (packs ? V : 1);
  const Divisor<uint32_t> inner(p.inner), channels(p.channels);
  auto kernel = packs ? (last ? weight_kernel<T, V, true> : weight_kernel<T, V, false>)
                      : (last ? weight_kernel<T, 1, true> : weight_kernel<T, 1, false>);
  kernel<<<grid_stride_blocks(count), kThreads, 0, stream>>>(p, count, inner, channels);
}

}  // namespace
}  // namespace FE_ISA

Error demodulation_fwd_cuda(const DemodulationParams& p, int device, void* stream) {
  using namespace FE_ISA;
  if (Error error = select_device(device)) return error;
  const int64_t blocks = (p.batch * p.outputs + kWarps - 1) / kWarps;
  const bool packs = p.inputs % 4 == 0 && aligned(p.style, 16) && aligned(p.squares, 16);
  auto kernel = packs ? demodulation_kernel<4> : demodulation_kernel<1>;
  kernel<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return launch_error();
}

Error demodulation_bwd_cuda(const DemodulationParams& p, int device, void* stream) {
  using namespace FE_ISA;
  if (p.batch > 65535) return "batch must be at most 65535";
  if (Error error = select_device(device)) return error;
  const dim3 grid(static_cast<unsigned>((p.inputs + kWarp - 1) / kWarp), static_cast<unsigned>(p.batch));
  demodulation_backward_kernel<<<grid, kColumnThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return launch_error();
}

Error modulated_weight_cuda(const ModulatedWeightParams& p, int device, void* stream) {
  using namespace FE_ISA;
  if (p.outer * p.channels * p.inner >= (int64_t{1} << 31)) return "weight must have fewer than 2^31 elements";
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16)
    modulate<Float16>(p, s);
  else if (p.dtype == kBFloat16)
    modulate<BFloat16>(p, s);
  else
    modulate<float>(p, s);
  return launch_error();
}

}  // namespace fe
