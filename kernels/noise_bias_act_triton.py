# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton body of noise_bias_act. Imported only when the triton backend runs: importing triton takes a second."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.tensors import as_float, empty_float, empty_like, memory_format

ACT_CODES = {"linear": 0, "relu": 1, "lrelu": 2, "tanh": 3, "sigmoid": 4, "silu": 5}


@triton.jit
def _tanh(z):
    # 2 * sigmoid(2z) - 1 cancels near zero: the odd series takes over there, exact to fp32 below 0.04.
    square = z * z
    series = z * (1.0 + square * (-0.3333333333 + square * (0.1333333333 - square * 0.0539682540)))
    return tl.where(tl.abs(z) < 0.04, series, 2.0 * tl.sigmoid(2.0 * z) - 1.0)


@triton.jit
def _activate(z, ACT: tl.constexpr, slope):
    y = z
    if ACT == 1:
        y = tl.where(z < 0.0, 0.0, z)
    elif ACT == 2:
        y = tl.where(z < 0.0, z * slope, z)
    elif ACT == 3:
        y = _tanh(z)
    elif ACT == 4:
        y = tl.sigmoid(z)
    elif ACT == 5:
        y = z * tl.sigmoid(z)
    return y


@triton.jit
def _derivative(z, ACT: tl.constexpr, slope):
    d = tl.full(z.shape, 1.0, tl.float32)
    if ACT == 1:
        d = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACT == 2:
        d = tl.where(z < 0.0, slope, 1.0)
    elif ACT == 3:
        d = 4.0 * tl.sigmoid(2.0 * z) * tl.sigmoid(-2.0 * z)  # 1 - tanh^2 without the subtraction
    elif ACT == 4:
        d = tl.sigmoid(z) * tl.sigmoid(-z)
    elif ACT == 5:
        d = tl.sigmoid(z) * (1.0 + z * tl.sigmoid(-z))
    return d


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, scale_ptr, noise_ptr, strength_ptr, bias_ptr,
    total, channels, pixels, noise_stride, slope, gain, clamp,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, SCALE: tl.constexpr, NOISE: tl.constexpr, STRENGTH: tl.constexpr,
    BIAS: tl.constexpr, CLAMP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    sample = index // channels // pixels  # their product may pass 32 bits
    if CHANNELS_LAST:
        c = index % channels
        q = (index // channels) % pixels
    else:
        q = index % pixels
        c = (index // pixels) % channels
    z = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
    if SCALE:
        z = z * tl.load(scale_ptr + sample * channels + c, mask=inside, other=0.0)
    if NOISE:
        noise = tl.load(noise_ptr + sample * noise_stride + q, mask=inside, other=0.0)
        z = z + (noise * tl.load(strength_ptr) if STRENGTH else noise)
    if BIAS:
        z = z + tl.load(bias_ptr + c, mask=inside, other=0.0)
    y = _activate(z, ACT, slope) * gain
    if CLAMP:
        y = tl.where(y > clamp, clamp, y)
        y = tl.where(y < -clamp, -clamp, y)
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, saved_ptr, scale_ptr, noise_ptr, strength_ptr, bias_ptr,
    gx_ptr, scale_sums_ptr, rows_ptr, bias_sums_ptr,
    channels, pixels, noise_stride, blocks_per_sample, slope, gain, clamp,
    ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr, FROM_INPUT: tl.constexpr, SCALE: tl.constexpr, NOISE: tl.constexpr,
    STRENGTH: tl.constexpr, BIAS: tl.constexpr, CLAMP: tl.constexpr, WANT_SCALE: tl.constexpr, WANT_ROWS: tl.constexpr,
    WANT_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # One program per block of pixels of one sample. Its sums over the block go to its own row; nothing is atomic.
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks_per_sample
    q = (program % blocks_per_sample) * BLOCK_P + tl.arange(0, BLOCK_P)
    rows = tl.zeros((BLOCK_P,), dtype=tl.float32)
    if FROM_INPUT and NOISE:
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
        grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
        saved = tl.load(saved_ptr + index, mask=inside, other=0.0).to(tl.float32)
        if SCALE:
            scale = tl.load(scale_ptr + sample * channels + c, mask=c < channels, other=0.0)
        z = saved
        limited = z
        if FROM_INPUT:
            if SCALE:
                z = z * scale[None, :]
            if NOISE:
                z = z + offset[:, None]
            if BIAS:
                z = z + tl.load(bias_ptr + c, mask=c < channels, other=0.0)[None, :]
            limited = _activate(z, ACT, slope) * gain
        derivative = _derivative(z, ACT, slope) * gain
        if CLAMP:
            derivative = tl.where(tl.abs(limited) >= clamp, 0.0, derivative)
        gz = tl.where(inside, grad * derivative, 0.0)
        gx = gz * scale[None, :] if SCALE else gz
        tl.store(gx_ptr + index, gx.to(gx_ptr.dtype.element_ty), mask=inside)
        if WANT_BIAS:
            tl.store(bias_sums_ptr + program * channels + c, tl.sum(gz, axis=0), mask=c < channels)
        if WANT_SCALE:
            tl.store(scale_sums_ptr + program * channels + c, tl.sum(gz * saved, axis=0), mask=c < channels)
        if WANT_ROWS:
            rows += tl.sum(gz, axis=1)
    if WANT_ROWS:
        tl.store(rows_ptr + sample * pixels + q, rows, mask=q < pixels)


def _noise_stride(x: Tensor, noise: Tensor | None) -> int:
    return x.shape[2] * x.shape[3] if noise is not None and noise.shape[0] == x.shape[0] else 0


def forward(
    x: Tensor,
    scale: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    slope: float,
    gain: float,
    clamp: float,
) -> Tensor:
    """Run the forward kernel; arguments as the op's."""
    fmt = memory_format(x)
    x = x.contiguous(memory_format=fmt)
    scale, noise, strength, bias = map(as_float, (scale, noise, strength, bias))
    y = empty_like(x, fmt)
    block = 1024
    forward_kernel[(triton.cdiv(x.numel(), block),)](
        x, y, *(x if t is None else t for t in (scale, noise, strength, bias)),
        x.numel(), x.shape[1], x.shape[2] * x.shape[3], _noise_stride(x, noise), slope, gain, clamp,
        ACT=ACT_CODES[act], CHANNELS_LAST=fmt is torch.channels_last, SCALE=scale is not None, NOISE=noise is not None,
        STRENGTH=strength is not None, BIAS=bias is not None, CLAMP=clamp >= 0, BLOCK=block,
    )  # fmt: skip
    return y


def backward(
    grad: Tensor,
    saved: Tensor,
    saved_is_input: bool,
    scale: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    slope: float,
    gain: float,
    clamp: float,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Run the backward kernel and add up its partial sums; arguments as the backward op's."""
    fmt = memory_format(saved)
    saved = saved.contiguous(memory_format=fmt)
    grad = grad.to(saved.dtype).contiguous(memory_format=fmt)
    operands = (scale, noise, strength, bias)
    scale_f, noise_f, strength_f, bias_f = map(as_float, operands)
    n, c, h, w = saved.shape
    pixels = h * w
    block_p, block_c = 64, 32
    blocks = triton.cdiv(pixels, block_p)
    gx = empty_like(saved, fmt)
    scale_sums = empty_float(saved, n, blocks, c) if wanted[1] else None
    bias_sums = empty_float(saved, n * blocks, c) if wanted[4] else None
    rows = empty_float(saved, n, 1, h, w) if wanted[2] or wanted[3] else None
    if clamp >= 0 and not saved_is_input:
        # The output was rounded to its dtype; so was the limit it was clamped to.
        clamp = float(torch.tensor(clamp, dtype=saved.dtype))
    backward_kernel[(n * blocks,)](
        grad, saved, *(saved if t is None else t for t in (scale_f, noise_f, strength_f, bias_f)),
        gx, *(gx if t is None else t for t in (scale_sums, rows, bias_sums)),
        c, pixels, _noise_stride(saved, noise), blocks, slope, gain, clamp,
        ACT=ACT_CODES[act], CHANNELS_LAST=fmt is torch.channels_last, FROM_INPUT=saved_is_input,
        SCALE=scale is not None, NOISE=noise is not None, STRENGTH=strength is not None, BIAS=bias is not None,
        CLAMP=clamp >= 0, WANT_SCALE=wanted[1], WANT_ROWS=rows is not None, WANT_BIAS=wanted[4],
        BLOCK_P=block_p, BLOCK_C=block_c,
    )  # fmt: skip
    gscale, gnoise, gstrength, gbias = (grad.new_empty(0) for _ in range(4))
    if scale_sums is not None and scale is not None:
        gscale = scale_sums.sum(1).to(scale.dtype)
    if bias_sums is not None and bias is not None:
        gbias = bias_sums.sum(0).to(bias.dtype)
    if rows is not None and noise is not None and noise_f is not None:
        rows = rows.sum(0, keepdim=True) if noise.shape[0] != n else rows
        if wanted[2]:
            gnoise = (rows if strength_f is None else rows * strength_f).to(noise.dtype)
        if wanted[3] and strength is not None:
            gstrength = (rows * noise_f).sum().to(strength.dtype)
    return gx, gscale, gnoise, gstrength, gbias
