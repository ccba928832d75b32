// SPDX-License-Identifier: Apache-2.0
#include "cuda_common.cuh"
#include "upfirdn2d_tile.h"

namespace fe {
namespace FE_ISA {
namespace {

template <class T, int V>
__global__ void __launch_bounds__(kThreads, 4) tile_kernel(const UpFirDnParams p, const FirTile tile) {
  extern __shared__ float4 shared[];  // float4: aligned for packs
  const FirBlock<T, V> block(p, tile, blockIdx.x, reinterpret_cast<float*>(shared));
  const int32_t warp = threadIdx.x / kWarp, thread = threadIdx.x % kWarp;
  block.load_samples(warp, kWarps, thread, kWarp);
  __syncthreads();
  if (p.separable) {
    block.filter_down(warp, kWarps, thread, kWarp);
    __syncthreads();
  }
  block.filter_along(warp, kWarps, thread, kWarp);
}

template <class T>
Error run(const UpFirDnParams& p, cudaStream_t stream) {
  constexpr int V = 4;  // 16 bytes of float; eight lanes of a half type spill registers
  const FirTile tile = plan_fir_tile(p);
  const int64_t blocks = tile.blocks();
  if (blocks >= (int64_t{1} << 31)) return "y is too large for one launch";
  const size_t shared = static_cast<size_t>(fir_tile_floats(p, tile)) * sizeof(float);
  if (fir_packs_fit<T, V>(p, tile))
    tile_kernel<T, V><<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(p, tile);
  else
    tile_kernel<T, 1><<<static_cast<unsigned>(blocks), kThreads, shared, stream>>>(p, tile);
  return launch_error();
}

}  // namespace
}  // namespace FE_ISA

Error upfirdn2d_fwd_cuda(const UpFirDnParams& p, int device, void* stream) {
  using namespace FE_ISA;
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16) return run<Float16>(p, s);
  if (p.dtype == kBFloat16) return run<BFloat16>(p, s);
  return run<float>(p, s);
}

}  // namespace fe
