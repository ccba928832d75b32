# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""The passes around modulated_conv2d's convolution, in Triton. Imported only when it runs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.modulated_conv2d_parts import demodulate, demodulate_backward, modulate
from faceedit.kernels.noise_bias_act_triton import ACT_CODES, _activate, _derivative
from faceedit.kernels.tensors import empty_float, empty_like, memory_format

__all__ = ["demodulate", "demodulate_backward", "dots", "epilogue", "epilogue_backward", "modulate", "scale"]
__all__ += ["style_backward"]

BLOCK_P, BLOCK_C = 64, 32


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, scale_ptr, noise_ptr, strength_ptr, bias_ptr, factors_ptr, rgb_ptr,
    channels, pixels, noise_stride, blocks_per_sample, slope, gain, clamp,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SCALE: tl.constexpr, NOISE: tl.constexpr, STRENGTH: tl.constexpr,
    BIAS: tl.constexpr, CLAMP: tl.constexpr, WRITE: tl.constexpr, RGB: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks_per_sample
    q = (program % blocks_per_sample) * BLOCK_P + tl.arange(0, BLOCK_P)
    red = tl.zeros((BLOCK_P,), dtype=tl.float32)
    green = tl.zeros((BLOCK_P,), dtype=tl.float32)
    blue = tl.zeros((BLOCK_P,), dtype=tl.float32)
    if NOISE:
        offset = tl.load(noise_ptr + sample * noise_stride + q, mask=q < pixels, other=0.0)
        if STRENGTH:
            offset = offset * tl.load(strength_ptr)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (q < pixels)[:, None] & (c < channels)[None, :]
        if CHANNELS_LAST:
            index = (sample * pixels + q)[:, None] * channels + c[None, :]
        else:
            index = (sample * channels + c)[None, :] * pixels + q[:, None]
        value = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
        if WRITE:
            if SCALE:
                value = value * tl.load(scale_ptr + sample * channels + c, mask=c < channels, other=0.0)[None, :]
            if NOISE:
                value = value + offset[:, None]
            if BIAS:
                value = value + tl.load(bias_ptr + c, mask=c < channels, other=0.0)[None, :]
            value = _activate(value, ACT, slope) * gain
            if CLAMP:
                value = tl.where(value > clamp, clamp, value)
                value = tl.where(value < -clamp, -clamp, value)
            tl.store(y_ptr + index, value.to(y_ptr.dtype.element_ty), mask=inside)
        if RGB:
            value = tl.where(inside, value, 0.0)
            row = factors_ptr + sample * 3 * channels + c
            red += tl.sum(value * tl.load(row, mask=c < channels, other=0.0)[None, :], axis=1)
            green += tl.sum(value * tl.load(row + channels, mask=c < channels, other=0.0)[None, :], axis=1)
            blue += tl.sum(value * tl.load(row + 2 * channels, mask=c < channels, other=0.0)[None, :], axis=1)
    if RGB:
        plane = rgb_ptr + sample * 3 * pixels + q
        tl.store(plane, red, mask=q < pixels)
        tl.store(plane + pixels, green, mask=q < pixels)
        tl.store(plane + 2 * pixels, blue, mask=q < pixels)


@triton.jit
def backward_kernel(
    grad_ptr, saved_ptr, scale_ptr, noise_ptr, strength_ptr, bias_ptr, factors_ptr, grad_rgb_ptr,
    gx_ptr, scale_sums_ptr, bias_sums_ptr, factor_sums_ptr, rows_ptr,
    channels, pixels, noise_stride, blocks_per_sample, slope, gain, clamp, inverse, inverse_below,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, GRAD: tl.constexpr, SCALE: tl.constexpr, NOISE: tl.constexpr,
    STRENGTH: tl.constexpr, BIAS: tl.constexpr, CLAMP: tl.constexpr, RGB: tl.constexpr, WANT_SCALE: tl.constexpr,
    WANT_BIAS: tl.constexpr, WANT_FACTORS: tl.constexpr, WANT_ROWS: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program per block of pixels of one sample. Its sums over the block go to its own row; nothing is atomic.
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks_per_sample
    q = (program % blocks_per_sample) * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = tl.zeros((BLOCK_P,), dtype=tl.float32)
    if NOISE:
        offset = tl.load(noise_ptr + sample * noise_stride + q, mask=q < pixels, other=0.0)
        if STRENGTH:
            offset = offset * tl.load(strength_ptr)
    if RGB:
        plane = grad_rgb_ptr + sample * 3 * pixels + q
        red = tl.load(plane, mask=q < pixels, other=0.0)
        green = tl.load(plane + pixels, mask=q < pixels, other=0.0)
        blue = tl.load(plane + 2 * pixels, mask=q < pixels, other=0.0)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (q < pixels)[:, None] & (c < channels)[None, :]
        if CHANNELS_LAST:
            index = (sample * pixels + q)[:, None] * channels + c[None, :]
        else:
            index = (sample * channels + c)[None, :] * pixels + q[:, None]
        y = tl.load(saved_ptr + index, mask=inside, other=0.0).to(tl.float32)
        if GRAD:
            grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
        else:
            grad = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
        if RGB:
            row = factors_ptr + sample * 3 * channels + c
            grad += red[:, None] * tl.load(row, mask=c < channels, other=0.0)[None, :]
            grad += green[:, None] * tl.load(row + channels, mask=c < channels, other=0.0)[None, :]
            grad += blue[:, None] * tl.load(row + 2 * channels, mask=c < channels, other=0.0)[None, :]
        derivative = _derivative(y, ACT, slope) * gain
        if CLAMP:
            derivative = tl.where(tl.abs(y) >= clamp, 0.0, derivative)
        gz = tl.where(inside, grad * derivative, 0.0)
        gx = gz
        if SCALE:
            gx = gz * tl.load(scale_ptr + sample * channels + c, mask=c < channels, other=0.0)[None, :]
        tl.store(gx_ptr + index, gx.to(gx_ptr.dtype.element_ty), mask=inside)
        if WANT_BIAS:
            tl.store(bias_sums_ptr + program * channels + c, tl.sum(gz, axis=0), mask=c < channels)
        if WANT_SCALE:
            core = y * inverse
            if ACT == 2:
                core = tl.where(y < 0, y * inverse_below, core)
            if NOISE:
                core = core - offset[:, None]
            if BIAS:
                core = core - tl.load(bias_ptr + c, mask=c < channels, other=0.0)[None, :]
            sums = tl.sum(tl.where(inside, gz * core, 0.0), axis=0)
            tl.store(scale_sums_ptr + program * channels + c, sums, mask=c < channels)
        if WANT_FACTORS:
            sums_row = factor_sums_ptr + program * 3 * channels + c
            tl.store(sums_row, tl.sum(red[:, None] * y, axis=0), mask=c < channels)
            tl.store(sums_row + channels, tl.sum(green[:, None] * y, axis=0), mask=c < channels)
            tl.store(sums_row + 2 * channels, tl.sum(blue[:, None] * y, axis=0), mask=c < channels)
        if WANT_ROWS:
            rows += tl.sum(gz, axis=1)
    if WANT_ROWS:
        tl.store(rows_ptr + sample * pixels + q, rows, mask=q < pixels)


@triton.jit
def style_kernel(
    x_ptr, grad_ptr, gx_ptr, style_ptr, sums_ptr,
    channels, pixels, blocks_per_sample,
    CHANNELS_LAST: tl.constexpr, WANT_SUM: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks_per_sample
    q = (program % blocks_per_sample) * BLOCK_P + tl.arange(0, BLOCK_P)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        inside = (q < pixels)[:, None] & (c < channels)[None, :]
        if CHANNELS_LAST:
            index = (sample * pixels + q)[:, None] * channels + c[None, :]
        else:
            index = (sample * channels + c)[None, :] * pixels + q[:, None]
        grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
        if WANT_SUM:
            x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
            tl.store(sums_ptr + program * channels + c, tl.sum(grad * x, axis=0), mask=c < channels)
        style = tl.load(style_ptr + sample * channels + c, mask=c < channels, other=0.0)
        tl.store(gx_ptr + index, (grad * style[None, :]).to(gx_ptr.dtype.element_ty), mask=inside)


def _blocks(x: Tensor) -> int:
    return triton.cdiv(x.shape[2] * x.shape[3], BLOCK_P)


def _noise_stride(x: Tensor, noise: Tensor | None) -> int:
    return x.shape[2] * x.shape[3] if noise is not None and noise.shape[0] == x.shape[0] else 0


def _launch_forward(
    x: Tensor,
    y: Tensor | None,
    vectors: tuple[Tensor | None, ...],
    factors: Tensor | None,
    settings: tuple[str, float, float, float],
) -> Tensor | None:
    scale, noise, strength, bias = vectors
    act, slope, gain, clamp = settings
    n, c, h, w = x.shape
    rgb = None if factors is None else empty_float(x, n, 3, h, w)
    forward_kernel[(n * _blocks(x),)](
        x, x if y is None else y, *(x if t is None else t for t in (scale, noise, strength, bias, factors, rgb)),
        c, h * w, _noise_stride(x, noise), _blocks(x), slope, gain, clamp,
        ACT=ACT_CODES[act], CHANNELS_LAST=memory_format(x) is torch.channels_last, SCALE=scale is not None,
        NOISE=noise is not None, STRENGTH=strength is not None, BIAS=bias is not None, CLAMP=clamp >= 0,
        WRITE=y is not None, RGB=rgb is not None, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return rgb


def scale(x: Tensor, style: Tensor) -> Tensor:
    """Return x * style; see modulated_conv2d_native for each of these functions."""
    y = empty_like(x, memory_format(x))
    _launch_forward(x, y, (style, None, None, None), None, ("linear", 1.0, 1.0, -1.0))
    return y


def epilogue(
    core: Tensor,
    y: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    factors: Tensor | None,
    settings: tuple[str, float, float, float],
) -> Tensor | None:
    return _launch_forward(core, y, vectors, factors, settings)


def dots(x: Tensor, factors: Tensor) -> Tensor:
    rgb = _launch_forward(x, None, (None, None, None, None), factors, ("linear", 1.0, 1.0, -1.0))
    assert rgb is not None
    return rgb


def epilogue_backward(
    grad: Tensor | None,
    saved: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    factors: Tensor | None,
    grad_rgb: Tensor | None,
    settings: tuple[str, float, float, float],
    wanted: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    scale, noise, strength, bias = vectors
    act, slope, gain, clamp = settings
    want_scale, want_noise, want_strength, want_bias, want_factors = wanted
    n, c, h, w = saved.shape
    blocks = _blocks(saved)
    core_grad = empty_like(saved, memory_format(saved))
    scale_sums = empty_float(saved, n, blocks, c) if want_scale else None
    bias_sums = empty_float(saved, n * blocks, c) if want_bias else None
    factor_sums = empty_float(saved, n, blocks, 3, c) if want_factors else None
    rows = empty_float(saved, n, 1, h, w) if want_noise or want_strength else None
    if clamp >= 0:
        clamp = float(torch.tensor(clamp, dtype=saved.dtype))  # the output was rounded; so was its limit
    backward_kernel[(n * blocks,)](
        *(saved if t is None else t for t in (grad, saved, scale, noise, strength, bias, factors, grad_rgb)),
        core_grad, *(core_grad if t is None else t for t in (scale_sums, bias_sums, factor_sums, rows)),
        c, h * w, _noise_stride(saved, noise), blocks, slope, gain, clamp, 1 / gain, 1 / (gain * slope or 1.0),
        ACT=ACT_CODES[act], CHANNELS_LAST=memory_format(saved) is torch.channels_last, GRAD=grad is not None,
        SCALE=scale is not None, NOISE=noise is not None, STRENGTH=strength is not None, BIAS=bias is not None,
        CLAMP=clamp >= 0, RGB=grad_rgb is not None, WANT_SCALE=want_scale, WANT_BIAS=want_bias,
        WANT_FACTORS=want_factors, WANT_ROWS=rows is not None, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    grad_scale = None if scale_sums is None else scale_sums.sum(1)
    if grad_scale is not None and scale is not None:
        grad_scale = grad_scale / scale
    grad_noise = grad_strength = None
    if rows is not None and want_noise:
        grad_noise = rows if strength is None else rows * strength
    if rows is not None and want_strength and noise is not None:
        grad_strength = (rows * noise).sum()
    grad_bias = None if bias_sums is None else bias_sums.sum(0)
    grad_factors = None if factor_sums is None else factor_sums.sum(1)
    return core_grad, (grad_scale, grad_noise, grad_strength, grad_bias, grad_factors)


def style_backward(x: Tensor, grad: Tensor, style: Tensor, wanted: bool) -> Tensor | None:
    n, c, h, w = x.shape
    blocks = _blocks(x)
    sums = empty_float(x, n, blocks, c) if wanted else None
    style_kernel[(n * blocks,)](
        x, grad, grad, style, grad if sums is None else sums, c, h * w, blocks,
        CHANNELS_LAST=memory_format(x) is torch.channels_last, WANT_SUM=wanted, BLOCK_P=BLOCK_P, BLOCK_C=BLOCK_C,
    )  # fmt: skip
    return None if sums is None else sums.sum(1)
