// SPDX-License-Identifier: Apache-2.0
#include "place_components.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

__device__ __forceinline__ Span vertical(const PlaceComponentsParams& p, int64_t n, int32_t k) {
  return window_span(p.centres[(n * p.count + k) * 2], p.heights[k], p.height);
}

__device__ __forceinline__ Span horizontal(const PlaceComponentsParams& p, int64_t n, int32_t k) {
  return window_span(p.centres[(n * p.count + k) * 2 + 1], p.widths[k], p.width);
}

// V neighbours along a row of one channel (planar), or one element. The canvas is gathered: each element is written once.
template <class Item, int V>
__global__ void __launch_bounds__(kThreads)
    place_kernel(const __grid_constant__ PlaceComponentsParams p, int64_t channels, int64_t packs) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < packs; i += stride) {
    const int64_t element = i * V;
    const int64_t outer = element / (p.channels_last ? channels : p.width);
    const int64_t inner = element - outer * (p.channels_last ? channels : p.width);
    const int64_t rows = outer / (p.channels_last ? p.width : p.height);
    const int64_t middle = outer - rows * (p.channels_last ? p.width : p.height);
    const int64_t n = rows / (p.channels_last ? p.height : channels);
    const int64_t last = rows - n * (p.channels_last ? p.height : channels);
    int64_t c = p.channels_last ? inner : last;
    const int64_t y = p.channels_last ? last : middle, x = p.channels_last ? middle : inner;
    int32_t k = 0;
    for (; k < p.count && c >= p.channels[k]; ++k) c -= p.channels[k];
    const bool is_feature = k == p.count;
    const int64_t owned = is_feature ? p.feature_channels : p.channels[k];
    const int64_t height = is_feature ? p.height : p.heights[k], width = is_feature ? p.width : p.widths[k];
    const Span down = is_feature ? Span{0, 0, p.height} : vertical(p, n, k);
    const Span across = is_feature ? Span{0, 0, p.width} : horizontal(p, n, k);
    const Item* source = static_cast<const Item*>(is_feature ? p.features : p.components[k]);
    Pack<Item, V> values;
#pragma unroll
    for (int v = 0; v < V; ++v) {
      Item value = 0;
      if (y >= down.first && y < down.end && x + v >= across.first && x + v < across.end) {
        const int64_t row = y - down.start, column = x + v - across.start;
        value = source[p.channels_last ? ((n * height + row) * width + column) * owned + c
                                       : ((n * owned + c) * height + row) * width + column];
      }
      values.lane[v] = value;
    }
    static_cast<Pack<Item, V>*>(p.out)[i] = values;
  }
}

// The gradient of component k, or of the features for k == p.count.
template <class Item>
__global__ void __launch_bounds__(kThreads)
    crop_kernel(const __grid_constant__ PlaceComponentsParams p, int32_t k, int64_t first, int64_t channels) {
  const bool is_feature = k == p.count;
  const int64_t owned = is_feature ? p.feature_channels : p.channels[k];
  const int64_t height = is_feature ? p.height : p.heights[k], width = is_feature ? p.width : p.widths[k];
  Item* out = static_cast<Item*>(is_feature ? p.grad_features : p.grad_components[k]);
  const Item* grad = static_cast<const Item*>(p.grad);
  const int64_t all = p.batch * owned * height * width, stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < all; i += stride) {
    const int64_t outer = i / (p.channels_last ? owned : width), inner = i - outer * (p.channels_last ? owned : width);
    const int64_t rows = outer / (p.channels_last ? width : height);
    const int64_t middle = outer - rows * (p.channels_last ? width : height);
    const int64_t n = rows / (p.channels_last ? height : owned), last = rows - n * (p.channels_last ? height : owned);
    const int64_t c = first + (p.channels_last ? inner : last);
    const Span down = is_feature ? Span{0, 0, p.height} : vertical(p, n, k);
    const Span across = is_feature ? Span{0, 0, p.width} : horizontal(p, n, k);
    const int64_t y = down.start + (p.channels_last ? last : middle);
    const int64_t x = across.start + (p.channels_last ? middle : inner);
    Item value = 0;
    if (y >= down.first && y < down.end && x >= across.first && x < across.end)
      value = grad[p.channels_last ? ((n * p.height + y) * p.width + x) * channels + c
                                   : ((n * channels + c) * p.height + y) * p.width + x];
    out[i] = value;
  }
}

__global__ void __launch_bounds__(kThreads) centres_kernel(const MaskCentresParams p) {
  __shared__ int64_t partial[3][kWarps];
  const int64_t pixels = p.height * p.width, first = blockIdx.x * pixels;
  int64_t sums[3] = {0, 0, 0};
  for (int64_t i = threadIdx.x; i < pixels; i += kThreads) {
    const int64_t units = mask_units(load_mask(p.mask, first + i)), y = i / p.width;
    sums[0] += units;
    sums[1] += units * y;
    sums[2] += units * (i - y * p.width);
  }
  for (int j = 0; j < 3; ++j) {
    sums[j] = warp_sum(sums[j]);
    if (threadIdx.x % kWarp == 0) partial[j][threadIdx.x / kWarp] = sums[j];
  }
  __syncthreads();
  if (threadIdx.x < 2) {
    int64_t weight = 0, moment = 0;
    for (int w = 0; w < kWarps; ++w) {
      weight += partial[0][w];
      moment += partial[1 + threadIdx.x][w];
    }
    p.centres[2 * static_cast<int64_t>(blockIdx.x) + threadIdx.x] = mean_coordinate(moment, weight);
  }
}

int64_t canvas_channels(const PlaceComponentsParams& p) {
  int64_t total = p.feature_channels;
  for (int32_t k = 0; k < p.count; ++k) total += p.channels[k];
  return total;
}

template <class Item>
void place(const PlaceComponentsParams& p, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(Item);
  const int64_t channels = canvas_channels(p), elements = p.batch * channels * p.height * p.width;
  if (elements == 0) return;
  if (!p.channels_last && p.width % V == 0 && reinterpret_cast<uintptr_t>(p.out) % 16 == 0)
    place_kernel<Item, V><<<grid_stride_blocks(elements / V), kThreads, 0, stream>>>(p, channels, elements / V);
  else
    place_kernel<Item, 1><<<grid_stride_blocks(elements), kThreads, 0, stream>>>(p, channels, elements);
}

template <class Item>
void crop(const PlaceComponentsParams& p, cudaStream_t stream) {
  const int64_t channels = canvas_channels(p);
  int64_t first = 0;
  for (int32_t k = 0; k <= p.count; ++k) {
    const bool is_feature = k == p.count;
    const int64_t owned = is_feature ? p.feature_channels : p.channels[k];
    const int64_t size =
        p.batch * owned * (is_feature ? int64_t{p.height} * p.width : int64_t{p.heights[k]} * p.widths[k]);
    if (size && (is_feature ? p.grad_features : p.grad_components[k]))
      crop_kernel<Item><<<grid_stride_blocks(size), kThreads, 0, stream>>>(p, k, first, channels);
    first += owned;
  }
}

Error run(const PlaceComponentsParams& p, int device, void* stream, bool is_backward) {
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.item_size == 1)
    is_backward ? crop<uint8_t>(p, s) : place<uint8_t>(p, s);
  else if (p.item_size == 2)
    is_backward ? crop<uint16_t>(p, s) : place<uint16_t>(p, s);
  else if (p.item_size == 4)
    is_backward ? crop<uint32_t>(p, s) : place<uint32_t>(p, s);
  else
    is_backward ? crop<uint64_t>(p, s) : place<uint64_t>(p, s);
  return launch_error();
}

}  // namespace
}  // namespace FE_ISA

Error place_components_fwd_cuda(const PlaceComponentsParams& p, int device, void* stream) {
  return FE_ISA::run(p, device, stream, false);
}

Error place_components_bwd_cuda(const PlaceComponentsParams& p, int device, void* stream) {
  return FE_ISA::run(p, device, stream, true);
}

Error mask_centres_cuda(const MaskCentresParams& p, int device, void* stream) {
  if (Error error = FE_ISA::select_device(device)) return error;
  FE_ISA::centres_kernel<<<static_cast<unsigned>(p.planes), FE_ISA::kThreads, 0, static_cast<cudaStream_t>(stream)>>>(p);
  return FE_ISA::launch_error();
}

}  // namespace fe
