// SPDX-License-Identifier: Apache-2.0
#include "cuda_common.cuh"
#include "upfirdn2d_strip.h"

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

constexpr int kStripThreads = 128;

template <class T, int V, int UP, int DOWN, bool EPILOGUE>
__global__ void __launch_bounds__(kStripThreads, 8)
    strip_kernel(const UpFirDnParams p, const FirStrips plan, const uint32_t threads) {
  const uint32_t thread = blockIdx.x * kStripThreads + threadIdx.x;
  if (thread >= threads) return;
  FirStrip<T, V, UP, DOWN, EPILOGUE> strip(p, plan, thread);
  strip.walk();
}

template <class T, int V, int UP, int DOWN, bool EPILOGUE>
void launch(const UpFirDnParams& p, const FirStrip<T, V, UP, DOWN, EPILOGUE>*, cudaStream_t stream) {
  const FirStrips plan = plan_fir_strips(p, V);
  const uint32_t threads = static_cast<uint32_t>(plan.threads(p.out_width));
  const uint32_t blocks = (threads + kStripThreads - 1) / kStripThreads;
  strip_kernel<T, V, UP, DOWN, EPILOGUE><<<blocks, kStripThreads, 0, stream>>>(p, plan, threads);
}

template <class T, int V>
void run_strips(const UpFirDnParams& p, cudaStream_t stream) {
  visit_fir_strip<T, V>(p, [&](auto* strip) { launch(p, strip, stream); });
}

template <class T>
Error run(const UpFirDnParams& p, cudaStream_t stream) {
  constexpr int V = 4;  // 16 bytes of float; eight lanes of a half type spill registers
  if (fir_strips_fit(p)) {
    fir_strip_packs_fit<T, V>(p) ? run_strips<T, V>(p, stream) : run_strips<T, 1>(p, stream);
    return launch_error();
  }
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
