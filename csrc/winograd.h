// SPDX-License-Identifier: Apache-2.0
// A float32 layer around a 3 x 3 convolution, channels_last, by Winograd's minimal filtering F(4x4, 3x3): tiles of 6 x
// 6 inputs become 36 values in which the convolution is a product of matrices, with a quarter of the multiplications.
// Styles go in with the tiles, the epilogue or the styles' gradient come out with them. CPU only.
//
// A transposed convolution of stride 2 gives rows of two kinds, which see two taps or one, and columns likewise: four
// convolutions, by F(3, 2) where there are two taps; 49 multiplications of 81. Its data gradient is the sum of four.
#pragma once

#include "common.h"

namespace fe {

constexpr int64_t kWinogradPanel = 32;  // outputs whose weights lie together
constexpr int64_t kWinogradRows = 8;    // blocks are multiples of so many tiles, for the matrix product

// The transformed weight: [36, outputs / 32, inputs, 32]; split: [25, outputs / 32, inputs, 32], where rows and columns
// have the four values of the outer taps, and the middle one.
struct WinogradWeightParams {
  const float* weight;  // [outputs, inputs, 3, 3]
  float* transformed;
  int64_t outputs;
  int64_t inputs;
  bool split;
};

template <class Visit>
void visit_fields(WinogradWeightParams& p, Visit&& visit) {
  visit("weight", p.weight), visit("transformed", p.transformed), visit("outputs", p.outputs);
  visit("inputs", p.inputs), visit("split", p.split);
}

// conv: [batch, height, width, outputs] of style * x. y = clamp(act(conv * scale + noise * strength + bias) * gain), rgb
// its sums with rgb_factors, grad_style those of conv * other over pixels. Null pointers stand for absent operands.
//
// Where down is 2, x is [batch, 2 height, 2 width, inputs / 4], and the inputs are the four pixels of a square, row by row;
// where up is 2, y is [batch, 2 height, 2 width, outputs / 4] likewise. Vectors of outputs have the channels of y.
//
// split, where up is 2: y is the transposed convolution [batch, 2 height + 1, 2 width + 1, outputs] of style * x, whose
// weight was flipped, and has no epilogue; where down is 2: its data gradient of x, [batch, 2 height + 1, 2 width + 1,
// inputs].
struct WinogradParams {
  const float* x;
  float* y;
  const float* transformed;  // the weight
  const float* style;        // [batch, channels of x]
  const float* scale;        // [batch, channels of y]
  const float* noise;        // [batch or 1, pixels of y]
  const float* strength;     // one value
  const float* bias;         // [channels of y]
  const float* rgb_factors;  // [batch, 3, channels of y]
  float* rgb;                // [batch, 3, pixels of y]; null: not wanted
  const float* other;        // like y
  float* grad_style;         // [batch, outputs]; null: not wanted
  float* unbounded;          // one value: NaN where conv has a NaN or an infinity, which tiles spread further than a
                             // convolution does; else 0
  float* workspace;          // winograd_workspace() floats
  int64_t batch;
  int64_t inputs;
  int64_t outputs;
  int64_t height;
  int64_t width;
  int64_t down;
  int64_t up;
  bool split;
  int64_t noise_stride;  // pixels of y, or 0 when one map serves the batch
  int64_t buffers;       // threads that have a part of the workspace
  int32_t act;
  float slope;
  float gain;
  float clamp;  // negative: none
};

template <class Visit>
void visit_fields(WinogradParams& p, Visit&& visit) {
  visit("x", p.x), visit("y", p.y), visit("transformed", p.transformed), visit("style", p.style);
  visit("scale", p.scale), visit("noise", p.noise), visit("strength", p.strength), visit("bias", p.bias);
  visit("rgb_factors", p.rgb_factors), visit("rgb", p.rgb), visit("other", p.other);
  visit("grad_style", p.grad_style), visit("unbounded", p.unbounded), visit("workspace", p.workspace);
  visit("batch", p.batch), visit("inputs", p.inputs), visit("outputs", p.outputs), visit("height", p.height);
  visit("width", p.width), visit("down", p.down), visit("up", p.up), visit("split", p.split);
  visit("noise_stride", p.noise_stride), visit("buffers", p.buffers), visit("act", p.act), visit("slope", p.slope);
  visit("gain", p.gain), visit("clamp", p.clamp);
}

// How the tiles are cut, by the shape alone. A block's transformed values stay in a core's cache between the three steps
// where its weights fit beside them. Weights that do not are read from memory at each block: large blocks then, with all
// threads at each.
struct WinogradPlan {
  int64_t tile, values;               // output pixels a side, values of a tile and channel
  int64_t down, across, each, tiles;  // tiles of a sample by rows and columns, of a sample, of the batch
  int64_t blocks, block_tiles;
  int64_t from, value;  // floats between tiles of the transformed input, and between its values
  int64_t to;           // the same of the result, between its values
  int64_t floats;       // of one buffer
  bool shared;
};

inline WinogradPlan plan_winograd(const WinogradParams& p) {
  constexpr int64_t kNear = 1600000, kWeights = 5000000, kShared = 128, kBlocks = 16;  // bytes, bytes, tiles, blocks
  WinogradPlan w{};
  w.tile = p.split ? 3 : 4;
  w.values = p.split ? 16 : 36;
  const int64_t more = p.split && p.up == 2;  // the last row and column of the transposed convolution
  w.down = (p.height + more + w.tile - 1) / w.tile;
  w.across = (p.width + more + w.tile - 1) / w.tile;
  w.each = w.down * w.across;
  w.tiles = p.batch * w.each;
  w.shared = 4 * w.values * p.inputs * p.outputs > kWeights;
  const int64_t fit = kNear / (4 * w.values * (p.inputs + p.outputs)) / kWinogradRows * kWinogradRows;
  const int64_t spread = (w.tiles / kBlocks + kWinogradRows - 1) / kWinogradRows * kWinogradRows;  // for many threads
  const int64_t close = fit < spread ? fit : spread;
  const int64_t most = w.shared ? kShared : (close < kWinogradRows ? kWinogradRows : close);
  w.block_tiles = most < w.tiles ? most : w.tiles;
  w.blocks = (w.tiles + w.block_tiles - 1) / w.block_tiles;
  // Odd multiples of a line, so that rows and values do not all fall into the same sets of a cache.
  w.from = p.inputs + 16;
  const int64_t rows = (w.block_tiles + kWinogradRows - 1) / kWinogradRows * kWinogradRows;
  w.value = rows * w.from + 48;
  w.to = rows * p.outputs + 48;
  w.floats = w.values * (w.value + w.to);
  return w;
}

inline int64_t winograd_buffers(const WinogradParams& p, const WinogradPlan& w) {
  return w.shared ? 1 : (p.buffers < w.blocks ? p.buffers : w.blocks);
}

inline int64_t winograd_workspace(const WinogradParams& p, bool) {
  const WinogradPlan w = plan_winograd(p);
  return winograd_buffers(p, w) * w.floats + (p.grad_style ? w.tiles * p.outputs : 0);
}

inline Error check_winograd_weight(const WinogradWeightParams& p) {
  if (p.inputs < 1 || p.outputs < 1 || p.outputs % kWinogradPanel) return "outputs must be a multiple of 32";
  return p.weight && p.transformed ? nullptr : "weight and transformed must not be null";
}

inline Error check_winograd(const WinogradParams& p) {
  if (p.batch < 1 || p.height < 1 || p.width < 1) return "x must not be empty";
  if ((p.down != 1 && p.down != 2) || (p.up != 1 && p.up != 2)) return "down and up must be 1 or 2";
  if (p.split && p.up + p.down != 3) return "split needs up or down";
  if (p.inputs < 1 || p.inputs % (16 * (p.split ? 1 : p.down * p.down)))
    return "the channels of x must be a multiple of 16";
  if (p.outputs < 1 || p.outputs % kWinogradPanel || p.outputs % (16 * (p.split ? 1 : p.up * p.up)))
    return "outputs must be a multiple of 32, the channels of y of 16";
  if (p.split && (p.noise || p.bias || p.rgb || p.act)) return "split has no epilogue";
  if (p.buffers < 1) return "buffers must be positive";
  if (p.act < 0 || p.act > 2) return "act must be piecewise linear";
  if (p.noise_stride != 0 && p.noise_stride != p.height * p.width * p.up * p.up)
    return "noise must have the pixels of y";
  if (p.rgb && !p.rgb_factors) return "rgb needs rgb_factors";
  if (p.grad_style && (!p.other || p.up != 1)) return "grad_style needs other, and up must be 1";
  if (!p.x || !p.y || !p.transformed || !p.unbounded || !p.workspace)
    return "x, y, transformed, unbounded and workspace must not be null";
  return nullptr;
}

}  // namespace fe
