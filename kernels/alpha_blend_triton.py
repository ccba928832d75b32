# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton body of alpha_blend. Imported only when the triton backend runs: importing triton takes a second."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.alpha_blend import mask_gradient
from faceedit.kernels.tensors import empty, empty_float, empty_like, memory_format


@triton.jit
def _value(pointer, index, inside, IS_UINT8: tl.constexpr, LEVELS: tl.constexpr):
    v = tl.load(pointer + index, mask=inside, other=0).to(tl.float32)
    if LEVELS and not IS_UINT8:
        v = v * 127.5 + 127.5
    elif IS_UINT8 and not LEVELS:
        v = v / 127.5 - 1.0
    return v


@triton.jit
def forward_kernel(
    fg_ptr, bg_ptr, mask_ptr, y_ptr, elements, channels, pixels, mask_stride,
    CHANNELS_LAST: tl.constexpr, FG_UINT8: tl.constexpr, BG_UINT8: tl.constexpr, LEVELS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    q = i // channels % pixels if CHANNELS_LAST else i % pixels
    m = tl.load(mask_ptr + (i // channels // pixels) * mask_stride + q, mask=inside, other=0).to(tl.float32)
    f = _value(fg_ptr, i, inside, FG_UINT8, LEVELS)
    b = _value(bg_ptr, i, inside, BG_UINT8, LEVELS)
    y = tl.where(m == 1.0, f, tl.where(m == 0.0, b, b + m * (f - b)))
    if LEVELS:
        # The comparisons are false for NaN, which becomes 0. Adding 1.5 * 2^23 rounds half to even.
        y = tl.where(y > 0.0, tl.where(y < 255.0, y, 255.0), 0.0)
        y = (y + 12582912.0) - 12582912.0
        tl.store(y_ptr + i, y.to(tl.int32).to(tl.uint8), mask=inside)
    else:
        tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def backward_kernel(
    grad_ptr, mask_ptr, fg_ptr, bg_ptr, gfg_ptr, gbg_ptr, rows_ptr, pixels_in_all, channels, pixels, mask_stride,
    CHANNELS_LAST: tl.constexpr, BG_UINT8: tl.constexpr, WANT_FG: tl.constexpr, WANT_BG: tl.constexpr,
    WANT_MASK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < pixels_in_all
    sample, q = i // pixels, i % pixels
    m = tl.load(mask_ptr + sample * mask_stride + q, mask=inside, other=0).to(tl.float32)
    rows = tl.zeros((BLOCK,), dtype=tl.float32)
    for c in range(channels):
        e = i * channels + c if CHANNELS_LAST else (sample * channels + c) * pixels + q
        g = tl.load(grad_ptr + e, mask=inside, other=0.0).to(tl.float32)
        if WANT_FG:
            tl.store(gfg_ptr + e, (m * g).to(gfg_ptr.dtype.element_ty), mask=inside)
        if WANT_BG:
            tl.store(gbg_ptr + e, ((1.0 - m) * g).to(gbg_ptr.dtype.element_ty), mask=inside)
        if WANT_MASK:
            f = tl.load(fg_ptr + e, mask=inside, other=0.0).to(tl.float32)
            rows += g * (f - _value(bg_ptr, e, inside, BG_UINT8, False))
    if WANT_MASK:
        tl.store(rows_ptr + i, rows, mask=inside)


def _mask(mask: Tensor, batch: int) -> tuple[Tensor, int]:
    """Return what the kernels read and its sample stride."""
    m = mask.contiguous()
    m = m.view(torch.uint8) if m.dtype == torch.bool else m
    return m, (m.shape[2] * m.shape[3] if m.shape[0] == batch else 0)


def forward(fg: Tensor, bg: Tensor, mask: Tensor, quantize: bool) -> Tensor:
    """Run the forward kernel; arguments as the op's."""
    fmt = memory_format(fg)
    fg, bg = fg.contiguous(memory_format=fmt), bg.contiguous(memory_format=fmt)
    n, c, h, w = fg.shape
    y = empty((n, c, h, w), fg, torch.uint8 if quantize else fg.dtype, fmt)
    m, stride = _mask(mask, n)
    block = 1024
    forward_kernel[(triton.cdiv(fg.numel(), block),)](
        fg, bg, m, y, fg.numel(), c, h * w, stride,
        CHANNELS_LAST=fmt is torch.channels_last, FG_UINT8=fg.dtype == torch.uint8, BG_UINT8=bg.dtype == torch.uint8,
        LEVELS=y.dtype == torch.uint8, BLOCK=block,
    )  # fmt: skip
    return y


def backward(
    grad: Tensor, mask: Tensor, fg: Tensor | None, bg: Tensor | None, wanted: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the backward kernel; arguments as the backward op's."""
    fmt = memory_format(grad)
    grad = grad.contiguous(memory_format=fmt)
    fg, bg = (None if t is None else t.contiguous(memory_format=fmt) for t in (fg, bg))
    n, c, h, w = grad.shape
    gfg = empty_like(grad, fmt) if wanted[0] else None
    gbg = empty_like(grad, fmt) if wanted[1] else None
    rows = empty_float(grad, n, 1, h, w) if wanted[2] else None
    m, stride = _mask(mask, n)
    block = 256
    backward_kernel[(triton.cdiv(n * h * w, block),)](
        grad, m, *(grad if t is None else t for t in (fg, bg, gfg, gbg, rows)), n * h * w, c, h * w, stride,
        CHANNELS_LAST=fmt is torch.channels_last, BG_UINT8=bg is not None and bg.dtype == torch.uint8,
        WANT_FG=wanted[0], WANT_BG=wanted[1], WANT_MASK=wanted[2], BLOCK=block,
    )  # fmt: skip
    return (
        grad.new_empty(0) if gfg is None else gfg,
        grad.new_empty(0) if gbg is None else gbg,
        grad.new_empty(0) if rows is None else mask_gradient(rows, mask),
    )
