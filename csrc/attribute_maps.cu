// SPDX-License-Identifier: Apache-2.0
#include "attribute_maps.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

// A thread owns one pixel, and sums kRows outputs at once: a value that is read serves them all. Calls body(output, its
// sum) for every output.
template <class T, int kRows, class Body>
__device__ __forceinline__ void mix(const T* in, int inputs, int64_t pixels, const float* weights, int outputs,
                                    bool inside, Body&& body) {
  for (int j = 0; j < outputs; j += kRows) {
    float sums[kRows] = {};
    for (int i = 0; i < inputs && inside; ++i) {
      const float value = load(in[i * pixels]);
#pragma unroll
      for (int row = 0; row < kRows; ++row) {
        // Every thread reads the same weight: one access for the warp.
        if (j + row < outputs) sums[row] += weights[(j + row) * inputs + i] * value;
      }
    }
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      if (j + row < outputs) body(j + row, sums[row]);
    }
  }
}

template <class T, bool BACKWARD>
__global__ void __launch_bounds__(kThreads, 4) maps_kernel(const AttributeMapsParams p, const BlockPlan plan) {
  __shared__ float scratch[kWarps];
  const int64_t sample = blockIdx.x / plan.blocks_per_sample;
  const int64_t q = blockIdx.x % plan.blocks_per_sample * plan.pixels_per_block + threadIdx.x;
  const bool inside = q < p.pixels;
  const int attributes = static_cast<int>(p.attributes), parts = static_cast<int>(p.parts);
  const T* probs = static_cast<const T*>(p.probs) + sample * parts * p.pixels + q;
  const float* relation = p.relation + sample * p.relation_stride;
  if (!BACKWARD) {
    T* out = static_cast<T*>(p.out) + sample * attributes * p.pixels + q;
    mix<T, 8>(probs, parts, p.pixels, relation, attributes, inside, [&](int a, float sum) {
      if (inside) store(p.attr[sample * attributes + a] * sum, out + a * p.pixels);
    });
    return;
  }
  const T* grad = static_cast<const T*>(p.grad) + sample * attributes * p.pixels + q;
  if (p.grad_probs) {
    T* grad_probs = static_cast<T*>(p.grad_probs) + sample * parts * p.pixels + q;
    const float* transposed = p.transposed + sample * attributes * parts;
    mix<T, 8>(grad, attributes, p.pixels, transposed, parts, inside, [&](int k, float sum) {
      if (inside) store(sum, grad_probs + k * p.pixels);
    });
  }
  if (!p.grad_attr) return;
  mix<T, 4>(probs, parts, p.pixels, relation, attributes, inside, [&](int a, float sum) {
    const float product = warp_sum(inside ? load(grad[a * p.pixels]) * sum : 0.0f);
    __syncthreads();
    if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = product;
    __syncthreads();
    if (threadIdx.x == 0) {
      float total = 0.0f;
      for (int w = 0; w < kWarps; ++w) total += scratch[w];
      p.workspace[static_cast<int64_t>(blockIdx.x) * attributes + a] = total;
    }
  });
}

template <class T>
void run(const AttributeMapsParams& p, cudaStream_t stream, bool is_backward) {
  const BlockPlan plan = plan_attribute_blocks(p.pixels);
  const unsigned blocks = static_cast<unsigned>(p.batch * plan.blocks_per_sample);
  if (!is_backward) {
    maps_kernel<T, false><<<blocks, kThreads, 0, stream>>>(p, plan);
    return;
  }
  maps_kernel<T, true><<<blocks, kThreads, 0, stream>>>(p, plan);
  if (p.grad_attr) combine_cuda(p.workspace, p.batch, plan.blocks_per_sample, p.attributes, p.grad_attr, stream);
}

Error run_dtype(const AttributeMapsParams& p, int device, void* stream, bool is_backward) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16)
    run<Float16>(p, s, is_backward);
  else if (p.dtype == kBFloat16)
    run<BFloat16>(p, s, is_backward);
  else
    run<float>(p, s, is_backward);
  return launch_error();
}

}  // namespace
}  // namespace FE_ISA

Error attribute_maps_fwd_cuda(const AttributeMapsParams& p, int device, void* stream) {
  return FE_ISA::run_dtype(p, device, stream, false);
}

Error attribute_maps_bwd_cuda(const AttributeMapsParams& p, int device, void* stream) {
  return FE_ISA::run_dtype(p, device, stream, true);
}

}  // namespace fe
