// SPDX-License-Identifier: Apache-2.0
#include "place_components.h"

#include "rows.h"

namespace fe {
namespace FE_ISA {
namespace {

using Byte = unsigned char;

inline Byte* at(void* data, int64_t bytes) { return static_cast<Byte*>(data) + bytes; }
inline const Byte* at(const void* data, int64_t bytes) { return static_cast<const Byte*>(data) + bytes; }

struct Window {
  Span y, x;
};

inline Window window_of(const PlaceComponentsParams& p, int64_t n, int32_t k) {
  const int32_t* centre = p.centres + (n * p.count + k) * 2;
  return {window_span(centre[0], p.heights[k], p.height), window_span(centre[1], p.widths[k], p.width)};
}

inline int64_t canvas_channels(const PlaceComponentsParams& p) {
  int64_t total = p.feature_channels;
  for (int32_t k = 0; k < p.count; ++k) total += p.channels[k];
  return total;
}

// The component that channel c of the canvas belongs to, and the channel within it; p.count stands for the features.
inline int32_t owner_of(const PlaceComponentsParams& p, int64_t* c) {
  int32_t k = 0;
  for (; k < p.count && *c >= p.channels[k]; ++k) *c -= p.channels[k];
  return k;
}

// One channel of the canvas: every byte is written once, from the front to the back.
void place_plane(const PlaceComponentsParams& p, int64_t n, int64_t channel, Byte* out) {
  const int64_t item = p.item_size, plane = static_cast<int64_t>(p.height) * p.width * item;
  int64_t c = channel;
  const int32_t k = owner_of(p, &c);
  if (k == p.count) {
    std::memcpy(out, at(p.features, (n * p.feature_channels + c) * plane), plane);
    return;
  }
  const Window w = window_of(p, n, k);
  if (w.y.first >= w.y.end || w.x.first >= w.x.end) {
    std::memset(out, 0, plane);
    return;
  }
  const Byte* source = at(p.components[k], (n * p.channels[k] + c) * p.heights[k] * p.widths[k] * item);
  const int64_t run = (w.x.end - w.x.first) * item;
  int64_t done = 0;
  for (int64_t y = w.y.first; y < w.y.end; ++y) {
    const int64_t begin = (y * p.width + w.x.first) * item;
    std::memset(out + done, 0, begin - done);
    std::memcpy(out + begin, source + ((y - w.y.start) * p.widths[k] + w.x.first - w.x.start) * item, run);
    done = begin + run;
  }
  std::memset(out + done, 0, plane - done);
}

// One row of a channels_last canvas.
void place_row(const PlaceComponentsParams& p, int64_t n, int64_t y, Byte* out) {
  const int64_t item = p.item_size;
  for (int64_t x = 0; x < p.width; ++x) {
    for (int32_t k = 0; k < p.count; ++k) {
      const Window w = window_of(p, n, k);
      const int64_t bytes = p.channels[k] * item;
      if (y >= w.y.first && y < w.y.end && x >= w.x.first && x < w.x.end) {
        const int64_t pixel = (n * p.heights[k] + y - w.y.start) * p.widths[k] + x - w.x.start;
        std::memcpy(out, at(p.components[k], pixel * bytes), bytes);
      } else {
        std::memset(out, 0, bytes);
      }
      out += bytes;
    }
    const int64_t bytes = p.feature_channels * item;
    if (bytes) std::memcpy(out, at(p.features, ((n * p.height + y) * p.width + x) * bytes), bytes);
    out += bytes;
  }
}

// The gradient of component k of sample n: its window cut out of the canvas' gradient, zero where that was clipped.
void crop(const PlaceComponentsParams& p, int64_t n, int32_t k, int64_t first_channel, int64_t all_channels) {
  const int64_t item = p.item_size, height = p.heights[k], width = p.widths[k], channels = p.channels[k];
  const Window w = window_of(p, n, k);
  const bool inside = w.y.first < w.y.end && w.x.first < w.x.end;
  Byte* out = at(p.grad_components[k], n * channels * height * width * item);
  if (!inside) {
    std::memset(out, 0, channels * height * width * item);
    return;
  }
  const int64_t left = w.x.first - w.x.start, run = w.x.end - w.x.first;
  // A "line" is a row of one channel (planar) or a row of all channels of the window (channels_last).
  const int64_t lines = p.channels_last ? 1 : channels, step = (p.channels_last ? channels : 1) * item;
  for (int64_t c = 0; c < lines; ++c) {
    for (int64_t row = 0; row < height; ++row, out += width * step) {
      const int64_t y = w.y.start + row;
      if (y < w.y.first || y >= w.y.end) {
        std::memset(out, 0, width * step);
        continue;
      }
      std::memset(out, 0, left * step);
      std::memset(out + (left + run) * step, 0, (width - left - run) * step);
      if (p.channels_last) {
        const Byte* grad = at(p.grad, (((n * p.height + y) * p.width + w.x.first) * all_channels + first_channel) * item);
        for (int64_t i = 0; i < run; ++i)
          std::memcpy(out + (left + i) * step, grad + i * all_channels * item, channels * item);
      } else {
        const int64_t plane = n * all_channels + first_channel + c;
        std::memcpy(out + left * step, at(p.grad, ((plane * p.height + y) * p.width + w.x.first) * item), run * item);
      }
    }
  }
}

void copy_features(const PlaceComponentsParams& p, int64_t n, int64_t first_channel, int64_t all_channels) {
  const int64_t pixels = static_cast<int64_t>(p.height) * p.width, bytes = p.feature_channels * p.item_size;
  Byte* out = at(p.grad_features, n * pixels * bytes);
  if (!p.channels_last) {
    std::memcpy(out, at(p.grad, (n * all_channels + first_channel) * pixels * p.item_size), pixels * bytes);
    return;
  }
  for (int64_t q = 0; q < pixels; ++q)
    std::memcpy(out + q * bytes, at(p.grad, ((n * pixels + q) * all_channels + first_channel) * p.item_size), bytes);
}

}  // namespace

void place_components_fwd(const PlaceComponentsParams& p, int threads) {
  const int64_t channels = canvas_channels(p);
  const int64_t units = p.batch * (p.channels_last ? p.height : channels);
  const int64_t bytes = (p.channels_last ? channels : p.height) * p.width * p.item_size;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < units; ++i) {
    if (p.channels_last)
      place_row(p, i / p.height, i % p.height, at(p.out, i * bytes));
    else
      place_plane(p, i / channels, i % channels, at(p.out, i * bytes));
  }
}

void place_components_bwd(const PlaceComponentsParams& p, int threads) {
  const int64_t channels = canvas_channels(p), units = p.batch * (p.count + 1);
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t i = 0; i < units; ++i) {
    const int64_t n = i / (p.count + 1);
    const int32_t k = static_cast<int32_t>(i % (p.count + 1));
    int64_t first = 0;
    for (int32_t j = 0; j < k; ++j) first += p.channels[j];
    if (k == p.count) {
      if (p.grad_features) copy_features(p, n, first, channels);
    } else if (p.grad_components[k]) {
      crop(p, n, k, first, channels);
    }
  }
}

void mask_centres(const MaskCentresParams& p, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
  for (int64_t plane = 0; plane < p.planes; ++plane) {
    int64_t weight = 0, moment_y = 0, moment_x = 0;
    for (int64_t y = 0; y < p.height; ++y) {
      int64_t row = 0;
      for (int64_t first = 0; first < p.width; first += kMaxBlockPixels) {
        const int64_t left = p.width - first;
        const int32_t count = static_cast<int32_t>(left < kMaxBlockPixels ? left : kMaxBlockPixels);
        float values[kMaxBlockPixels];
        load_row(p.mask.data, p.mask.dtype, (plane * p.height + y) * p.width + first, count, values);
        int64_t sum = 0, moment = 0;
#pragma omp simd reduction(+ : sum, moment)
        for (int32_t x = 0; x < count; ++x) {
          const int64_t units = mask_units(values[x]);
          sum += units;
          moment += units * x;
        }
        row += sum;
        moment_x += moment + first * sum;
      }
      weight += row;
      moment_y += y * row;
    }
    p.centres[2 * plane] = mean_coordinate(moment_y, weight);
    p.centres[2 * plane + 1] = mean_coordinate(moment_x, weight);
  }
}

}  // namespace FE_ISA
}  // namespace fe
