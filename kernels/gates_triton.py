# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton bodies of gru_gate and reset_gate. Imported only when the triton backend runs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.tensors import as_float, empty_like, memory_format

BLOCK = 1024


@triton.jit
def _tanh(z):
    # 2 * sigmoid(2z) - 1 cancels near zero: the odd series takes over there, exact to fp32 below 0.04.
    square = z * z
    series = z * (1.0 + square * (-0.3333333333 + square * (0.1333333333 - square * 0.0539682540)))
    return tl.where(tl.abs(z) < 0.04, series, 2.0 * tl.sigmoid(2.0 * z) - 1.0)


@triton.jit
def _tanh_slope(z):
    return 4.0 * tl.sigmoid(2.0 * z) * tl.sigmoid(-2.0 * z)  # 1 - tanh^2 without the subtraction


@triton.jit
def _affine(value, scale_ptr, shift_ptr, channel, inside, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    out = value
    if SCALE:
        out = out * tl.load(scale_ptr + channel, mask=inside, other=0.0)
    if SHIFT:
        out = out + tl.load(shift_ptr + channel, mask=inside, other=0.0)
    return out


@triton.jit
def forward_kernel(
    h_ptr, z_ptr, c_ptr, y_ptr, z_scale_ptr, z_shift_ptr, c_scale_ptr, c_shift_ptr, total, channels, pixels,
    RESET: tl.constexpr, CHANNELS_LAST: tl.constexpr, Z_SCALE: tl.constexpr, Z_SHIFT: tl.constexpr,
    C_SCALE: tl.constexpr, C_SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    channel = index % channels if CHANNELS_LAST else (index // pixels) % channels
    h = tl.load(h_ptr + index, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + index, mask=inside, other=0.0).to(tl.float32)
    z = _affine(z, z_scale_ptr, z_shift_ptr, channel, inside, Z_SCALE, Z_SHIFT)
    u = tl.sigmoid(z)
    y = u * h
    if not RESET:
        c = tl.load(c_ptr + index, mask=inside, other=0.0).to(tl.float32)
        t = _tanh(_affine(c, c_scale_ptr, c_shift_ptr, channel, inside, C_SCALE, C_SHIFT))
        y = tl.sigmoid(-z) * h + u * t
    tl.store(y_ptr + index, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    h_ptr, z_ptr, c_ptr, grad_ptr, gh_ptr, gz_ptr, gc_ptr, z_scale_ptr, z_shift_ptr, c_scale_ptr, c_shift_ptr,
    total, channels, pixels,
    RESET: tl.constexpr, CHANNELS_LAST: tl.constexpr, Z_SCALE: tl.constexpr, Z_SHIFT: tl.constexpr,
    C_SCALE: tl.constexpr, C_SHIFT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    channel = index % channels if CHANNELS_LAST else (index // pixels) % channels
    h = tl.load(h_ptr + index, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + index, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
    z = _affine(z, z_scale_ptr, z_shift_ptr, channel, inside, Z_SCALE, Z_SHIFT)
    u, shut = tl.sigmoid(z), tl.sigmoid(-z)
    gh = grad * u
    gz = grad * h * (u * shut)
    if not RESET:
        c = tl.load(c_ptr + index, mask=inside, other=0.0).to(tl.float32)
        c = _affine(c, c_scale_ptr, c_shift_ptr, channel, inside, C_SCALE, C_SHIFT)
        gh = grad * shut
        gz = grad * (_tanh(c) - h) * (u * shut)
        gc = _affine(grad * u * _tanh_slope(c), c_scale_ptr, c_shift_ptr, channel, inside, C_SCALE, False)
        tl.store(gc_ptr + index, gc.to(gc_ptr.dtype.element_ty), mask=inside)
    gz = _affine(gz, z_scale_ptr, z_shift_ptr, channel, inside, Z_SCALE, False)
    tl.store(gh_ptr + index, gh.to(gh_ptr.dtype.element_ty), mask=inside)
    tl.store(gz_ptr + index, gz.to(gz_ptr.dtype.element_ty), mask=inside)


def forward(h: Tensor, z: Tensor, c: Tensor | None, *vectors: Tensor | None) -> Tensor:
    """Run the forward kernel; arguments as the op's."""
    fmt = memory_format(h)
    h, z = h.contiguous(memory_format=fmt), z.contiguous(memory_format=fmt)
    c = None if c is None else c.contiguous(memory_format=fmt)
    floats = [as_float(vector) for vector in vectors]
    y = empty_like(h, fmt)
    forward_kernel[(triton.cdiv(h.numel(), BLOCK),)](
        h, z, h if c is None else c, y, *(h if t is None else t for t in floats),
        h.numel(), h.shape[1], h.shape[2] * h.shape[3],
        RESET=c is None, CHANNELS_LAST=fmt is torch.channels_last, Z_SCALE=floats[0] is not None,
        Z_SHIFT=floats[1] is not None, C_SCALE=floats[2] is not None, C_SHIFT=floats[3] is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return y


def backward(
    h: Tensor, grad: Tensor, z: Tensor, c: Tensor | None, *vectors: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel; arguments as the backward op's."""
    fmt = memory_format(h)
    h, z = h.contiguous(memory_format=fmt), z.contiguous(memory_format=fmt)
    c = None if c is None else c.contiguous(memory_format=fmt)
    grad = grad.to(h.dtype).contiguous(memory_format=fmt)
    floats = [as_float(vector) for vector in vectors]
    gh, gz, gc = empty_like(h, fmt), empty_like(h, fmt), None if c is None else empty_like(h, fmt)
    backward_kernel[(triton.cdiv(h.numel(), BLOCK),)](
        h, z, h if c is None else c, grad, gh, gz, gh if gc is None else gc, *(h if t is None else t for t in floats),
        h.numel(), h.shape[1], h.shape[2] * h.shape[3],
        RESET=c is None, CHANNELS_LAST=fmt is torch.channels_last, Z_SCALE=floats[0] is not None,
        Z_SHIFT=floats[1] is not None, C_SCALE=floats[2] is not None, C_SHIFT=floats[3] is not None, BLOCK=BLOCK,
    )  # fmt: skip
    return gh, gz, h.new_empty(0) if gc is None else gc
