// SPDX-License-Identifier: Apache-2.0
#include "gates.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

__device__ __forceinline__ float affine(float value, const float* scale, const float* shift, int64_t channel) {
  if (scale) value *= scale[channel];
  return shift ? value + shift[channel] : value;
}

// Flat, grid-stride, V elements a thread. A pack never leaves its pixel (V divides C) or its plane (V divides P), unless
// there is no affine map and the channel does not matter.
template <class T, int V, bool BACKWARD>
__global__ void __launch_bounds__(kThreads) gate_kernel(const GateParams p) {
  using Packed = Pack<T, V>;
  const int64_t packs = p.batch * p.channels * p.pixels / V;
  const bool has_affine = p.z_scale || p.z_shift || p.c_scale || p.c_shift;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    int64_t channel = 0;
    if (has_affine) channel = p.channels_last ? i * V % p.channels : i * V / p.pixels % p.channels;
    const Packed h = static_cast<const Packed*>(p.h)[i], z = static_cast<const Packed*>(p.z)[i];
    Packed c{}, grad{}, first{}, second{}, third{};
    if (p.c) c = static_cast<const Packed*>(p.c)[i];
    if (BACKWARD) grad = static_cast<const Packed*>(p.grad)[i];
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const int64_t own = p.channels_last && has_affine ? channel + v : channel;
      const float hidden = load(h.lane[v]), gate = affine(load(z.lane[v]), p.z_scale, p.z_shift, own);
      const float candidate = p.c ? affine(load(c.lane[v]), p.c_scale, p.c_shift, own) : 0.0f;
      if (!BACKWARD) {
        store(p.c ? gru_gate(hidden, gate, candidate) : reset_gate(hidden, gate), &first.lane[v]);
        continue;
      }
      const GateGradients slopes =
          p.c ? gru_gate_slopes(hidden, gate, candidate) : reset_gate_slopes(hidden, gate);
      const float g = load(grad.lane[v]);
      store(g * slopes.h, &first.lane[v]);
      store(affine(g * slopes.z, p.z_scale, nullptr, own), &second.lane[v]);
      store(affine(g * slopes.c, p.c_scale, nullptr, own), &third.lane[v]);
    }
    static_cast<Packed*>(BACKWARD ? p.grad_h : p.y)[i] = first;
    if (BACKWARD) static_cast<Packed*>(p.grad_z)[i] = second;
    if (BACKWARD && p.c) static_cast<Packed*>(p.grad_c)[i] = third;
  }
}

template <class T, bool BACKWARD>
void run(const GateParams& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const bool has_affine = p.z_scale || p.z_shift || p.c_scale || p.c_shift;
  const int64_t total = p.batch * p.channels * p.pixels;
  const int64_t inner = !has_affine ? total : (p.channels_last ? p.channels : p.pixels);
  uintptr_t addresses = 0;
  for (const void* pointer : {p.h, p.z, p.c, static_cast<const void*>(p.y), p.grad, static_cast<const void*>(p.grad_h),
                              static_cast<const void*>(p.grad_z), static_cast<const void*>(p.grad_c)})
    addresses |= reinterpret_cast<uintptr_t>(pointer);
  if (addresses % 16 == 0 && inner % V == 0) {
    const unsigned blocks = grid_stride_blocks(total / V);
    gate_kernel<T, V, BACKWARD><<<blocks, kThreads, 0, stream>>>(p);
  } else {
    const unsigned blocks = grid_stride_blocks(total);
    gate_kernel<T, 1, BACKWARD><<<blocks, kThreads, 0, stream>>>(p);
  }
}

template <bool BACKWARD>
Error run_dtype(const GateParams& p, int device, void* stream) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16)
    run<Float16, BACKWARD>(p, s);
  else if (p.dtype == kBFloat16)
    run<BFloat16, BACKWARD>(p, s);
  else
    run<float, BACKWARD>(p, s);
  return launch_error();
}

}  // namespace
}  // namespace FE_ISA

Error gate_fwd_cuda(const GateParams& p, int device, void* stream) {
  return FE_ISA::run_dtype<false>(p, device, stream);
}

Error gate_bwd_cuda(const GateParams& p, int device, void* stream) {
  return FE_ISA::run_dtype<true>(p, device, stream);
}

}  // namespace fe
