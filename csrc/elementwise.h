// SPDX-License-Identifier: Apache-2.0
// The arithmetic of every element: the CPU kernels and the CUDA kernels call these same functions.
#pragma once

#include <cmath>
#include <cstring>

#include "common.h"

namespace fe {

enum Activation : int32_t { kLinear = 0, kRelu = 1, kLeakyRelu = 2, kTanh = 3, kSigmoid = 4, kSilu = 5 };
enum Relax : int32_t { kClamp = 0, kMinMax = 1 };

namespace FE_ISA {

FE_HD float bits_to_float(uint32_t bits) {
#if defined(__CUDA_ARCH__)
  return __uint_as_float(bits);
#else
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
#endif
}

FE_HD uint32_t float_to_bits(float value) {
#if defined(__CUDA_ARCH__)
  return __float_as_uint(value);
#else
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
#endif
}

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

FE_HD float load(float value) { return value; }
FE_HD float load(uint8_t value) { return static_cast<float>(value); }
FE_HD float load(BFloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

FE_HD float load(Float16 value) {
#if defined(__CUDA_ARCH__)
  return __half2float(__ushort_as_half(value.bits));
#else
  // Branch-free, so that it vectorises on every instruction set; subnormals are renormalised by one subtraction.
  const uint32_t shifted = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const uint32_t exponent = shifted & 0x0f800000u;
  const uint32_t normal = shifted + ((127u - 15u) << 23);
  const float subnormal = bits_to_float(normal + (1u << 23)) - bits_to_float(113u << 23);
  const uint32_t special = normal + ((128u - 16u) << 23);
  const uint32_t magnitude =
      exponent == 0x0f800000u ? special : (exponent == 0u ? float_to_bits(subnormal) : normal);
  return bits_to_float(magnitude | (static_cast<uint32_t>(value.bits & 0x8000u) << 16));
#endif
}

FE_HD void store(float value, float* out) { *out = value; }

// Round half to even within 0..255; NaN becomes 0.
FE_HD void store(float value, uint8_t* out) {
  const float bounded = value > 0.0f ? (value < 255.0f ? value : 255.0f) : 0.0f;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  *out = static_cast<uint8_t>(static_cast<int32_t>((bounded + magic) - magic));
}

FE_HD void store(float value, BFloat16* out) {
  // Round to nearest even; a NaN stays a NaN (plain rounding could carry its mantissa away).
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x0040u;
  out->bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

FE_HD void store(float value, Float16* out) {
#if defined(__CUDA_ARCH__)
  out->bits = __half_as_ushort(__float2half_rn(value));
#else
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  // Adding 0.5 aligns the mantissa so that the addition itself rounds a subnormal result.
  const uint32_t subnormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - float_to_bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t result =
      magnitude >= (143u << 23) ? special : (magnitude < (113u << 23) ? subnormal : normal);
  out->bits = static_cast<uint16_t>(result | sign);
#endif
}

// exp of x in [-105, 89] by range reduction and a degree-7 polynomial: at most 2 ulp; NaN stays NaN.
// Own code because compilers vectorise the library's expf only under fast-math.
FE_HD float exponential_within(float x) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer
  const float shifted = x * 1.44269504088896341f + magic, turns = shifted - magic;
  const float r = (x - turns * 0.693359375f) + turns * 2.12194440e-4f;
  float poly = 1.9841269841e-4f;
  poly = poly * r + 1.3888888889e-3f;
  poly = poly * r + 8.3333333333e-3f;
  poly = poly * r + 4.1666666667e-2f;
  poly = poly * r + 1.6666666667e-1f;
  poly = poly * r + 0.5f;
  poly = poly * r * r + r + 1.0f;
  // 2^turns in two factors: turns spans [-151, 128], which one float exponent cannot hold. The integer is read from the
  // low bits of `shifted`: converting a NaN would be undefined, and its bits may be any, since NaN times them is NaN.
  const int32_t whole = static_cast<int32_t>(float_to_bits(shifted) - float_to_bits(magic)), half = whole >> 1;
  const float first = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  const float second = bits_to_float(static_cast<uint32_t>(whole - half + 127) << 23);
  return poly * first * second;
}

// Exact at the ends: 0 and inf.
FE_HD float exponential(float x) {
  const float low = x < -105.0f ? -105.0f : x;
  return exponential_within(low > 89.0f ? 89.0f : low);
}

// exp(-|x|), which cannot overflow.
FE_HD float exponential_decay(float x) {
  const float below = bits_to_float(float_to_bits(x) | 0x80000000u);
  return exponential_within(below < -105.0f ? -105.0f : below);
}

// The tail keeps its relative precision down to the smallest numbers.
FE_HD float sigmoid(float x) {
  const float e = exponential_decay(x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

// sigmoid(x) and sigmoid(-x) of one exponential; their product is sigmoid's slope at x and at -x.
struct Sigmoids {
  float open, shut;
};

FE_HD Sigmoids sigmoids(float x) {
  const float e = exponential_decay(x), sum = 1.0f + e, small = e / sum, large = 1.0f / sum;
  return {x < 0.0f ? small : large, x < 0.0f ? large : small};
}

// tanh and its slope 1 - tanh^2, which is 4 e / (1 + e)^2 without a subtraction: to full relative precision where tiny.
struct Tangent {
  float value, slope;
};

FE_HD Tangent hyperbolic_tangent_and_slope(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float e = exponential_decay(2.0f * x), sum = 1.0f + e;
  const float tail = 1.0f - 2.0f * e / sum;
  // Near zero the subtraction above cancels: odd polynomial (minimax on |x| < 0.625) instead.
  const float square = x * x;
  float poly = -5.70498872745e-3f;
  poly = poly * square + 2.06390887954e-2f;
  poly = poly * square - 5.37397155531e-2f;
  poly = poly * square + 1.33314422036e-1f;
  poly = poly * square - 3.33332819422e-1f;
  const float centre = x + x * square * poly;
  return {magnitude < 0.625f ? centre : (x < 0.0f ? -tail : tail), 4.0f * e / (sum * sum)};
}

FE_HD float hyperbolic_tangent(float x) { return hyperbolic_tangent_and_slope(x).value; }

FE_HD float hyperbolic_tangent_slope(float x) { return hyperbolic_tangent_and_slope(x).slope; }

// To full relative precision where it is tiny: 1 - sigmoid(x) is sigmoid(-x), which the subtraction loses for large x.
FE_HD float sigmoid_slope(float x) {
  const float e = exponential_decay(x), sum = 1.0f + e;
  return e / (sum * sum);
}

FE_HD float silu_slope(float x) {
  const Sigmoids gate = sigmoids(x);
  return gate.open * (1.0f + x * gate.shut);
}

template <int ACT>
FE_HD float activate(float z, float slope) {
  if (ACT == kRelu) return z < 0.0f ? 0.0f : z;
  if (ACT == kLeakyRelu) return z < 0.0f ? z * slope : z;
  if (ACT == kTanh) return hyperbolic_tangent(z);
  if (ACT == kSigmoid) return sigmoid(z);
  if (ACT == kSilu) return z * sigmoid(z);
  return z;
}

template <int ACT>
FE_HD float activation_slope(float z, float slope) {
  if (ACT == kRelu) return z <= 0.0f ? 0.0f : 1.0f;
  if (ACT == kLeakyRelu) return z < 0.0f ? slope : 1.0f;
  if (ACT == kTanh) return hyperbolic_tangent_slope(z);
  if (ACT == kSigmoid) return sigmoid_slope(z);
  if (ACT == kSilu) return silu_slope(z);
  return 1.0f;
}

// Written with comparisons that are false for NaN, so that NaN passes through.
FE_HD float clamp_symmetric(float value, float limit) {
  const float below = value > limit ? limit : value;
  return below < -limit ? -limit : below;
}

template <int ACT>
FE_HD float finish(float z, float slope, float gain, float clamp) {
  const float y = activate<ACT>(z, slope) * gain;
  return clamp < 0.0f ? y : clamp_symmetric(y, clamp);
}

// dy/dz from the pre-activation z.
template <int ACT>
FE_HD float slope_from_input(float z, float slope, float gain, float clamp) {
  const float y = activate<ACT>(z, slope) * gain;
  const float magnitude = y < 0.0f ? -y : y;
  const bool clamped = clamp >= 0.0f && magnitude >= clamp;
  return clamped ? 0.0f : activation_slope<ACT>(z, slope) * gain;
}

// dy/dz from the output y of a piecewise linear activation with gain > 0 and slope > 0: y has z's sign. `clamp` is
// already rounded to y's storage type. y == 0 counts as the positive side of a leaky ReLU, and as the flat side of a ReLU.
template <int ACT>
FE_HD float slope_from_output(float y, float slope, float gain, float clamp) {
  const float magnitude = y < 0.0f ? -y : y;
  const bool clamped = clamp >= 0.0f && magnitude >= clamp;
  return clamped ? 0.0f : activation_slope<ACT>(y, slope) * gain;
}

// The same two for loops that must vectorise: a limit of NaN is none. GCC takes `clamp < 0` out of a loop by making two
// loops, of which it then vectorises one.
FE_HD float clamp_limit(float clamp) { return clamp < 0.0f ? bits_to_float(0x7fc00000u) : clamp; }

template <int ACT>
FE_HD float finish_within(float z, float slope, float gain, float limit) {
  return clamp_symmetric(activate<ACT>(z, slope) * gain, limit);
}

template <int ACT>
FE_HD float slope_within(float y, float slope, float gain, float limit) {
  const float magnitude = y < 0.0f ? -y : y;
  return magnitude >= limit ? 0.0f : activation_slope<ACT>(y, slope) * gain;
}

// z from the output y of a piecewise linear activation; `inverse` is 1 / gain, `inverse_below` 1 / (gain * slope). Where
// the output does not tell (clamped, or the flat side of a ReLU) dy/dz is 0, so that z counts for nothing there.
template <int ACT>
FE_HD float input_from_output(float y, float inverse, float inverse_below) {
  return ACT == kLeakyRelu && y < 0.0f ? y * inverse_below : y * inverse;
}

// The CUDA kernels switch per element on a value every thread shares, which costs nothing in a kernel bound by memory and
// keeps one binary per dtype instead of six.
#define FE_FOR_ACTIVATION(ACT, EXPRESSION)      \
  switch (ACT) {                                \
    case kRelu:                                 \
      return EXPRESSION(kRelu);                 \
    case kLeakyRelu:                            \
      return EXPRESSION(kLeakyRelu);            \
    case kTanh:                                 \
      return EXPRESSION(kTanh);                 \
    case kSigmoid:                              \
      return EXPRESSION(kSigmoid);              \
    case kSilu:                                 \
      return EXPRESSION(kSilu);                 \
    default:                                    \
      return EXPRESSION(kLinear);               \
  }

FE_HD float finish(int32_t act, float z, float slope, float gain, float clamp) {
#define FE_EXPRESSION(ACT) finish<ACT>(z, slope, gain, clamp)
  FE_FOR_ACTIVATION(act, FE_EXPRESSION)
#undef FE_EXPRESSION
}

FE_HD float slope_from_input(int32_t act, float z, float slope, float gain, float clamp) {
#define FE_EXPRESSION(ACT) slope_from_input<ACT>(z, slope, gain, clamp)
  FE_FOR_ACTIVATION(act, FE_EXPRESSION)
#undef FE_EXPRESSION
}

FE_HD float slope_from_output(int32_t act, float y, float slope, float gain, float clamp) {
  if (act == kRelu) return slope_from_output<kRelu>(y, slope, gain, clamp);
  if (act == kLeakyRelu) return slope_from_output<kLeakyRelu>(y, slope, gain, clamp);
  return slope_from_output<kLinear>(y, slope, gain, clamp);
}

#undef FE_FOR_ACTIVATION

// Normalisation. `rest` carries what float32 rounds off the mean: a plane far from zero loses nothing.
FE_HD float normalise(float x, float mean, float scale, float rest) { return (x - mean) * scale + rest; }

// dL/dx of a normalised element: `grad` reaches the normalised value `u`; mean_grad and slope_grad are the means of grad
// and of grad * u over the plane, or 0 where the statistics are constants. Then u does not count, not even an infinite
// one, whose product with 0 would be NaN.
FE_HD float normalise_gradient(float grad, float u, float scale, float mean_grad, float slope_grad) {
  return scale * (grad - ((slope_grad == 0.0f ? 0.0f : u * slope_grad) + mean_grad));
}

// Mean and summed squared deviations of a set of values, and the union of two sets: no difference of large numbers.
struct Moments {
  double mean, squares;
};

FE_HD Moments merge(const Moments& a, double a_count, const Moments& b, double b_count) {
  const double delta = b.mean - a.mean, share = b_count / (a_count + b_count);
  return {a.mean + delta * share, a.squares + (b.squares + delta * delta * (a_count * share))};
}

FE_HD float clamp_unit(float value) {
  const float low = value < 0.0f ? 0.0f : value;
  return low > 1.0f ? 1.0f : low;
}

// The mask a pixel of masked_mse is weighted with, NaN kept. `relax` is a Relax value.
FE_HD float exclude_from(float mask, float excluded, int32_t relax) {
  if (relax == kClamp) return clamp_unit(mask - excluded);
  const float limit = 1.0f - excluded;
  return (mask != mask || mask < limit) ? mask : limit;
}

FE_HD float include_in(float mask, float included, int32_t relax) {
  if (relax == kClamp) return clamp_unit(mask + included);
  return (mask != mask || mask > included) ? mask : included;
}

// An image's value as alpha_blend computes with it: levels 0..255 where the result is uint8, else values in [-1, 1].
template <bool LEVELS, class T>
FE_HD float image_value(T value) {
  return LEVELS ? load(value) * 127.5f + 127.5f : load(value);
}

template <bool LEVELS>
FE_HD float image_value(uint8_t value) {
  return LEVELS ? load(value) : load(value) / 127.5f - 1.0f;
}

// bg + m * (fg - bg) would not give fg back at m = 1, and would let a NaN of the other side through at 0 and 1.
FE_HD float blend(float fg, float bg, float m) {
  const float between = bg + m * (fg - bg);
  const float outside = m == 0.0f ? bg : between;
  return m == 1.0f ? fg : outside;
}

// The two-point divergences are a few dozen values a launch: double costs nothing, and the difference of nearly equal
// distributions keeps its digits.
FE_HD double smoothed(double target, double smoothing) {
  return target < smoothing ? smoothing - target : target - smoothing;
}

FE_HD double x_log_x(double x) { return x == 0.0 ? 0.0 : x * std::log(x); }

// KL(target || sigmoid(logit)), finite for every finite logit: the exponential cannot overflow, no logarithm sees 0.
FE_HD double bernoulli_divergence(double logit, double target) {
  const double tail = std::log1p(std::exp(logit < 0.0 ? logit : -logit));
  const double cross = (logit < 0.0 ? -target : 1.0 - target) * logit + tail;
  return x_log_x(target) + x_log_x(1.0 - target) + cross;
}

FE_HD double logistic(double x) {
  const double e = std::exp(x < 0.0 ? x : -x);
  return (x < 0.0 ? e : 1.0) / (1.0 + e);
}

// (e^x - 1 - x) / x^2 by its series: exact to float32 for |x| < 1, where the difference itself would cancel.
FE_HD float exponential_series(float x) {
  float series = 2.5052108e-8f;
  series = series * x + 2.7557319e-7f;
  series = series * x + 2.7557319e-6f;
  series = series * x + 2.4801587e-5f;
  series = series * x + 1.9841270e-4f;
  series = series * x + 1.3888889e-3f;
  series = series * x + 8.3333333e-3f;
  series = series * x + 4.1666667e-2f;
  series = series * x + 1.6666667e-1f;
  return series * x + 0.5f;
}

FE_HD float exponential_excess(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float far = exponential(x) - 1.0f - x;
  return magnitude < 1.0f ? x * x * exponential_series(x) : far;
}

FE_HD float exponential_minus_one(float x) {
  const float magnitude = x < 0.0f ? -x : x;
  const float far = exponential(x) - 1.0f;
  return magnitude < 1.0f ? x + x * x * exponential_series(x) : far;
}

// Gates: z and c are before their sigmoid and tanh.
struct GateGradients {
  float h, z, c;
};

FE_HD float gru_gate(float h, float z, float c) {
  const Sigmoids gate = sigmoids(z);
  return gate.shut * h + gate.open * hyperbolic_tangent(c);
}

FE_HD GateGradients gru_gate_slopes(float h, float z, float c) {
  const Sigmoids gate = sigmoids(z);
  const Tangent candidate = hyperbolic_tangent_and_slope(c);
  return {gate.shut, (candidate.value - h) * (gate.open * gate.shut), gate.open * candidate.slope};
}

FE_HD float reset_gate(float h, float z) { return sigmoid(z) * h; }

FE_HD GateGradients reset_gate_slopes(float h, float z) {
  const Sigmoids gate = sigmoids(z);
  return {gate.open, h * (gate.open * gate.shut), 0.0f};
}

}  // namespace FE_ISA
}  // namespace fe
