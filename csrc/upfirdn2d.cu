// SPDX-License-Identifier: Apache-2.0
#include "upfirdn2d.h"

#include "cuda_common.cuh"

namespace fe {
namespace FE_ISA {
namespace {

// One output a step, its samples gathered: neighbouring threads share them through the caches.
template <class T>
__global__ void __launch_bounds__(kThreads, 4) gather_kernel(const UpFirDnParams p) {
  const int64_t pixels = p.out_height * p.out_width;
  const int64_t total = p.batch * p.channels * pixels;
  const float strength = p.epilogue && p.strength ? *p.strength : 1.0f;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total; i += stride) {
    const int64_t sample = i / (p.channels * pixels);
    const int64_t c = p.channels_last ? i % p.channels : i / pixels % p.channels;
    const int64_t q = p.channels_last ? i / p.channels % pixels : i % pixels;
    const FirWindow wy = fir_window(q / p.out_width, p.up, p.down, p.pad_y, p.fir_height);
    const FirWindow wx = fir_window(q % p.out_width, p.up, p.down, p.pad_x, p.fir_width);
    const int64_t column_step = p.channels_last ? p.channels : 1, row_step = p.in_width * column_step;
    const T* image = static_cast<const T*>(p.x) +
                     (p.channels_last ? sample * p.in_height * row_step + c
                                      : (sample * p.channels + c) * p.in_height * row_step);
    float z = 0.0f;
    for (int32_t a = 0; a < wy.count; ++a) {
      const int64_t y = wy.first + a;
      if (y < 0 || y >= p.in_height) continue;
      const int32_t ky = fir_tap(wy.tap + a * p.up, p.fir_height, p.flip);
      float row = 0.0f;
      for (int32_t b = 0; b < wx.count; ++b) {
        const int64_t x = wx.first + b;
        if (x < 0 || x >= p.in_width) continue;
        const int32_t kx = fir_tap(wx.tap + b * p.up, p.fir_width, p.flip);
        row += p.fir[p.separable ? kx : ky * p.fir_width + kx] * load(image[y * row_step + x * column_step]);
      }
      z += p.separable ? p.fir[ky] * row : row;
    }
    z *= p.fir_gain;
    if (p.epilogue) {
      if (p.scale) z *= p.scale[sample * p.channels + c];
      if (p.noise) z += p.noise[sample * p.noise_stride + q] * strength;
      if (p.bias) z += p.bias[c];
      z = finish(p.act, z, p.slope, p.gain, p.clamp);
      if (p.add) z += load(static_cast<const T*>(p.add)[i]);
    }
    store(z, static_cast<T*>(p.y) + i);
  }
}

template <class T>
void run(const UpFirDnParams& p, cudaStream_t stream) {
  const int64_t total = p.batch * p.channels * p.out_height * p.out_width;
  const int64_t wanted = (total + kThreads - 1) / kThreads;
  gather_kernel<T><<<static_cast<unsigned>(wanted < 132 * 32 ? wanted : 132 * 32), kThreads, 0, stream>>>(p);
}

}  // namespace
}  // namespace FE_ISA

Error upfirdn2d_fwd_cuda(const UpFirDnParams& p, int device, void* stream) {
  using namespace FE_ISA;
  if (Error error = select_device(device)) return error;
  const cudaStream_t s = static_cast<cudaStream_t>(stream);
  if (p.dtype == kFloat16)
    run<Float16>(p, s);
  else if (p.dtype == kBFloat16)
    run<BFloat16>(p, s);
  else
    run<float>(p, s);
  return launch_error();
}

}  // namespace fe
