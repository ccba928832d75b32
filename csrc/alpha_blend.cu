// SPDX-License-Identifier: Apache-2.0
#include "alpha_blend.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

template <bool LEVELS>
__device__ __forceinline__ float load_image(const void* data, int32_t dtype, int64_t index) {
  switch (dtype) {
    case kFloat16:
      return image_value<LEVELS>(static_cast<const Float16*>(data)[index]);
    case kBFloat16:
      return image_value<LEVELS>(static_cast<const BFloat16*>(data)[index]);
    case kUInt8:
      return image_value<LEVELS>(static_cast<const uint8_t*>(data)[index]);
    default:
      return image_value<LEVELS>(static_cast<const float*>(data)[index]);
  }
}

// Where element `first` of an image lies: V elements from there share their plane (planar) or their pixel.
struct Position {
  int64_t mask;  // index of the first element's mask value
  int32_t step;  // 1 when the next element is the next pixel, 0 when it is the next channel
};

template <class Index>
__device__ __forceinline__ Position position(const AlphaBlendParams& p, Index first) {
  const Index channels = static_cast<Index>(p.channels), pixels = static_cast<Index>(p.pixels);
  const Index inner = p.channels_last ? channels : pixels;
  const Index outer = first / inner;
  const Index sample = outer / (p.channels_last ? pixels : channels);
  const Index q = p.channels_last ? outer - sample * pixels : first - outer * inner;
  return {static_cast<int64_t>(sample) * p.mask.stride + q, p.channels_last ? 0 : 1};
}

// One floating dtype throughout, V elements a thread and step.
template <class T, int V, class Index>
__global__ void __launch_bounds__(kThreads) forward_kernel(const AlphaBlendParams p) {
  const Index packs = static_cast<Index>(p.batch * p.channels * p.pixels / V);
  const Index stride = static_cast<Index>(gridDim.x) * kThreads;
  for (Index i = static_cast<Index>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += stride) {
    const Position at = position<Index>(p, i * V);
    const Pack<T, V> fg = static_cast<const Pack<T, V>*>(p.fg)[i];
    const Pack<T, V> bg = static_cast<const Pack<T, V>*>(p.bg)[i];
    Pack<T, V> y;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      const float m = load_mask(p.mask, at.mask + v * at.step);
      store(blend(load(fg.lane[v]), load(bg.lane[v]), m), &y.lane[v]);
    }
    static_cast<Pack<T, V>*>(p.y)[i] = y;
  }
}

// uint8 on either side: dtypes are looked up per element, which every thread does alike.
template <bool LEVELS>
__global__ void __launch_bounds__(kThreads) mixed_kernel(const AlphaBlendParams p) {
  const int64_t elements = p.batch * p.channels * p.pixels;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < elements; i += stride) {
    const float m = load_mask(p.mask, position<int64_t>(p, i).mask);
    const float y = blend(load_image<LEVELS>(p.fg, p.fg_dtype, i), load_image<LEVELS>(p.bg, p.bg_dtype, i), m);
    if (LEVELS) {
      store(y, static_cast<uint8_t*>(p.y) + i);
    } else if (p.y_dtype == kFloat16) {
      store(y, static_cast<Float16*>(p.y) + i);
    } else if (p.y_dtype == kBFloat16) {
      store(y, static_cast<BFloat16*>(p.y) + i);
    } else {
      store(y, static_cast<float*>(p.y) + i);
    }
  }
}

// A thread owns whole pixels: the mask is read once, and its gradient is a sum within the thread.
template <class T>
__global__ void __launch_bounds__(kThreads) backward_kernel(const AlphaBlendParams p) {
  const T* grad = static_cast<const T*>(p.grad);
  T* grad_fg = static_cast<T*>(p.grad_fg);
  T* grad_bg = static_cast<T*>(p.grad_bg);
  const int64_t all = p.batch * p.pixels, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all; i += stride) {
    const int64_t sample = i / p.pixels, q = i - sample * p.pixels;
    const float m = load_mask(p.mask, sample * p.mask.stride + q);
    float sum = 0.0f;
    for (int64_t c = 0; c < p.channels; ++c) {
      const int64_t e = p.channels_last ? i * p.channels + c : (sample * p.channels + c) * p.pixels + q;
      const float g = load(grad[e]);
      if (grad_fg) store(m * g, grad_fg + e);
      if (grad_bg) store((1.0f - m) * g, grad_bg + e);
      if (p.grad_mask)
        sum += g * (load_image<false>(p.fg, p.fg_dtype, e) - load_image<false>(p.bg, p.bg_dtype, e));
    }
    if (p.grad_mask) p.grad_mask[i] = sum;
  }
}

template <class T, int V>
void launch_forward(const AlphaBlendParams& p, cudaStream_t stream) {
  const int64_t packs = p.batch * p.channels * p.pixels / V;
  const unsigned blocks = grid_stride_blocks(packs);
  // The loop counter must not overflow past the end either.
  if (packs * V + static_cast<int64_t>(blocks) * kThreads * V < (int64_t{1} << 31))
    forward_kernel<T, V, int32_t><<<blocks, kThreads, 0, stream>>>(p);
  else
    forward_kernel<T, V, int64_t><<<blocks, kThreads, 0, stream>>>(p);
}

template <class T>
void forward(const AlphaBlendParams& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  const int64_t inner = p.channels_last ? p.channels : p.pixels;
  const uintptr_t addresses =
      reinterpret_cast<uintptr_t>(p.fg) | reinterpret_cast<uintptr_t>(p.bg) | reinterpret_cast<uintptr_t>(p.y);
  if (addresses % 16 == 0 && inner % V == 0)
    launch_forward<T, V>(p, stream);
  else
    launch_forward<T, 1>(p, stream);
}

Error run_forward(const AlphaBlendParams& p, cudaStream_t stream) {
  const unsigned blocks = grid_stride_blocks(p.batch * p.channels * p.pixels);
  if (p.y_dtype == kUInt8)
    mixed_kernel<true><<<blocks, kThreads, 0, stream>>>(p);
  else if (p.bg_dtype == kUInt8)
    mixed_kernel<false><<<blocks, kThreads, 0, stream>>>(p);
  else if (p.fg_dtype == kFloat16)
    forward<Float16>(p, stream);
  else if (p.fg_dtype == kBFloat16)
    forward<BFloat16>(p, stream);
  else
    forward<float>(p, stream);
  return launch_error();
}

Error run_backward(const AlphaBlendParams& p, cudaStream_t stream) {
  const unsigned blocks = grid_stride_blocks(p.batch * p.pixels);
  if (p.fg_dtype == kFloat16)
    backward_kernel<Float16><<<blocks, kThreads, 0, stream>>>(p);
  else if (p.fg_dtype == kBFloat16)
    backward_kernel<BFloat16><<<blocks, kThreads, 0, stream>>>(p);
  else
    backward_kernel<float><<<blocks, kThreads, 0, stream>>>(p);
  return launch_error();
}

}  // namespace
}  // namespace FE_ISA

Error alpha_blend_fwd_cuda(const AlphaBlendParams& p, int device, void* stream) {
  if (Error error = FE_ISA::select_device(device)) return error;
  return FE_ISA::run_forward(p, static_cast<cudaStream_t>(stream));
}

Error alpha_blend_bwd_cuda(const AlphaBlendParams& p, int device, void* stream) {
  if (Error error = FE_ISA::select_device(device)) return error;
  return FE_ISA::run_backward(p, static_cast<cudaStream_t>(stream));
}

}  // namespace fe
