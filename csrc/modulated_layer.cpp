// SPDX-License-Identifier: Apache-2.0
// The layer as plain loops. On a CPU oneDNN's convolution is faster and nothing chooses these: they say what the CUDA
// kernels compute, and let tests run the code around them without a GPU.
#include "modulated_layer.h"

#include <vector>

#include "elementwise.h"

namespace fe {
namespace FE_ISA {
namespace {

template <class T>
void convolve(const T* x, const T* weight, const float* style, int64_t height, int64_t width, int64_t channels,
              int64_t row, int64_t column, float* sums) {
  for (int64_t o = 0; o < channels; ++o) sums[o] = 0.0f;
  for (int64_t tap = 0; tap < kLayerTaps; ++tap) {
    const int64_t r = row + tap / 3 - 1, c = column + tap % 3 - 1;
    if (r < 0 || r >= height || c < 0 || c >= width) continue;
    const T* pixel = x + (r * width + c) * channels;
    for (int64_t o = 0; o < channels; ++o) {
      const T* taps = weight + (o * kLayerTaps + tap) * channels;
      float sum = 0.0f;
      for (int64_t i = 0; i < channels; ++i) {
        T scaled = taps[i];
        if (style) store(load(scaled) * style[i], &scaled);
        sum += load(pixel[i]) * load(scaled);
      }
      sums[o] += sum;
    }
  }
}

float finished(const ModulatedLayerParams& p, float z) {
  if (p.act == kRelu) return finish<kRelu>(z, p.slope, p.gain, p.clamp);
  if (p.act == kLeakyRelu) return finish<kLeakyRelu>(z, p.slope, p.gain, p.clamp);
  return finish<kLinear>(z, p.slope, p.gain, p.clamp);
}

template <class T>
void forward(const ModulatedLayerParams& p, int threads) {
  const int64_t pixels = p.height * p.width;
  const float strength = p.strength ? *p.strength : 1.0f;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t line = 0; line < p.batch * p.height; ++line) {
    const int64_t sample = line / p.height, row = line % p.height;
    const T* x = static_cast<const T*>(p.x) + sample * pixels * p.channels;
    std::vector<float> sums(p.channels);
    for (int64_t column = 0; column < p.width; ++column) {
      const int64_t q = row * p.width + column;
      convolve(x, static_cast<const T*>(p.weight), p.style + sample * p.channels, p.height, p.width, p.channels, row,
               column, sums.data());
      const float offset = p.noise ? p.noise[sample * p.noise_stride + q] * strength : 0.0f;
      float rgb[3] = {};
      for (int64_t o = 0; o < p.channels; ++o) {
        const float scaled = p.scale ? sums[o] * p.scale[sample * p.channels + o] : sums[o];
        const float y = finished(p, scaled + offset + (p.bias ? p.bias[o] : 0.0f));
        store(y, static_cast<T*>(p.y) + (sample * pixels + q) * p.channels + o);
        for (int k = 0; p.rgb && k < 3; ++k) rgb[k] += y * p.rgb_factors[(sample * 3 + k) * p.channels + o];
      }
      for (int k = 0; p.rgb && k < 3; ++k) p.rgb[(sample * 3 + k) * pixels + q] = rgb[k];
    }
  }
}

template <class T>
void backward(const ModulatedLayerGradientParams& p, int threads) {
  const int64_t pixels = p.height * p.width;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t sample = 0; sample < p.batch; ++sample) {
    const float* style = p.style + sample * p.channels;
    const int64_t base = sample * pixels * p.channels;
    std::vector<float> sums(p.channels);
    std::vector<double> totals(p.channels);
    for (int64_t q = 0; q < pixels; ++q) {
      convolve(static_cast<const T*>(p.grad) + base, static_cast<const T*>(p.weight), nullptr, p.height, p.width,
               p.channels, q / p.width, q % p.width, sums.data());
      for (int64_t i = 0; i < p.channels; ++i) {
        const int64_t index = base + q * p.channels + i;
        T rounded;
        store(sums[i], &rounded);
        if (p.grad_style) totals[i] += load(rounded) * load(static_cast<const T*>(p.x)[index]);
        store(load(rounded) * style[i], static_cast<T*>(p.grad_x) + index);
      }
    }
    for (int64_t i = 0; p.grad_style && i < p.channels; ++i)
      p.grad_style[sample * p.channels + i] = static_cast<float>(totals[i]);
  }
}

}  // namespace

void modulated_layer_fwd(const ModulatedLayerParams& p, int threads) {
  p.dtype == kFloat16 ? forward<Float16>(p, threads) : forward<BFloat16>(p, threads);
}

void modulated_layer_bwd(const ModulatedLayerGradientParams& p, int threads) {
  p.dtype == kFloat16 ? backward<Float16>(p, threads) : backward<BFloat16>(p, threads);
}

}  // namespace FE_ISA
}  // namespace fe
