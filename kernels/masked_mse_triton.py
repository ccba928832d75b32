# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton body of masked_mse. Imported only when the triton backend runs: importing triton takes a second."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.tensors import empty_float, empty_like, memory_format


@triton.jit
def _mixed(pointer, low, high, weight, inside, other: tl.constexpr):
    first = tl.load(pointer + low, mask=inside, other=other).to(tl.float32)
    return (1.0 - weight) * first + weight * tl.load(pointer + high, mask=inside, other=other).to(tl.float32)


@triton.jit
def _half_tap(i, size):
    # As half_tap of csrc/masked_mse.h: the two elements of the halved row about pixel i, and the weight of the second.
    low = (i + 1) // 2 - 1
    return tl.maximum(low, 0), tl.minimum(low + 1, size - 1), tl.where(i % 2 == 1, 0.25, 0.75)


@triton.jit
def _load_mask(pointer, sample, q, pixels, width, stride, KIND: tl.constexpr, other: tl.constexpr):
    # KIND: 0 absent, 1 of the images' size, 2 halved.
    if KIND == 1:
        values = tl.load(pointer + sample * stride + q, mask=q < pixels, other=other).to(tl.float32)
    elif KIND == 2:
        columns = width // 2
        top, bottom, down = _half_tap(q // width, pixels // width // 2)
        left, right, along = _half_tap(q % width, columns)
        base = pointer + sample * stride
        near = _mixed(base, top * columns + left, bottom * columns + left, down, q < pixels, other)
        far = _mixed(base, top * columns + right, bottom * columns + right, down, q < pixels, other)
        values = (1.0 - along) * near + along * far
    else:
        values = tl.zeros(q.shape, dtype=tl.float32) + other
    return values


@triton.jit
def _clamp_unit(value):
    # Comparisons, not min and max: those may drop a NaN.
    low = tl.where(value < 0.0, 0.0, value)
    return tl.where(low > 1.0, 1.0, low)


@triton.jit
def _effective_mask(
    mask_ptr, exclude_ptr, include_ptr, mask_stride, exclude_stride, include_stride, sample, q, pixels, width,
    MASK: tl.constexpr, EXCLUDE: tl.constexpr, INCLUDE: tl.constexpr, MINMAX: tl.constexpr,
):  # fmt: skip
    m = _load_mask(mask_ptr, sample, q, pixels, width, mask_stride, MASK, 1.0)
    if EXCLUDE != 0:
        e = _load_mask(exclude_ptr, sample, q, pixels, width, exclude_stride, EXCLUDE, 0.0)
        m = tl.where((m != m) | (m < 1.0 - e), m, 1.0 - e) if MINMAX else _clamp_unit(m - e)
    if INCLUDE != 0:
        i = _load_mask(include_ptr, sample, q, pixels, width, include_stride, INCLUDE, 0.0)
        m = tl.where((m != m) | (m > i), m, i) if MINMAX else _clamp_unit(m + i)
    return tl.where(q < pixels, m, 0.0)


@triton.jit
def forward_kernel(
    a_ptr, b_ptr, mask_ptr, exclude_ptr, include_ptr, squares_ptr, weight_ptr,
    channels, pixels, width, mask_stride, exclude_stride, include_stride, blocks_per_sample,
    CHANNELS_LAST: tl.constexpr, MASK: tl.constexpr, EXCLUDE: tl.constexpr, INCLUDE: tl.constexpr, MINMAX: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks_per_sample
    q = (program % blocks_per_sample) * BLOCK + tl.arange(0, BLOCK)
    m = _effective_mask(
        mask_ptr, exclude_ptr, include_ptr, mask_stride, exclude_stride, include_stride, sample, q, pixels, width,
        MASK, EXCLUDE, INCLUDE, MINMAX,
    )  # fmt: skip
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for c in range(channels):
        index = (sample * pixels + q) * channels + c if CHANNELS_LAST else (sample * channels + c) * pixels + q
        a = tl.load(a_ptr + index, mask=q < pixels, other=0.0).to(tl.float32)
        difference = a - tl.load(b_ptr + index, mask=q < pixels, other=0.0).to(tl.float32)
        total += difference * difference
    tl.store(squares_ptr + program, tl.sum(m * total, axis=0))
    tl.store(weight_ptr + program, tl.sum(m, axis=0))


@triton.jit
def backward_kernel(
    grad_ptr, inverse_ptr, a_ptr, b_ptr, mask_ptr, exclude_ptr, include_ptr, ga_ptr, gb_ptr,
    channels, pixels, width, mask_stride, exclude_stride, include_stride, blocks_per_sample,
    CHANNELS_LAST: tl.constexpr, MASK: tl.constexpr, EXCLUDE: tl.constexpr, INCLUDE: tl.constexpr, MINMAX: tl.constexpr,
    WANT_A: tl.constexpr, WANT_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks_per_sample
    q = (program % blocks_per_sample) * BLOCK + tl.arange(0, BLOCK)
    m = _effective_mask(
        mask_ptr, exclude_ptr, include_ptr, mask_stride, exclude_stride, include_stride, sample, q, pixels, width,
        MASK, EXCLUDE, INCLUDE, MINMAX,
    )  # fmt: skip
    factor = 2.0 * tl.load(grad_ptr + sample) * tl.load(inverse_ptr + sample)
    for c in range(channels):
        index = (sample * pixels + q) * channels + c if CHANNELS_LAST else (sample * channels + c) * pixels + q
        a = tl.load(a_ptr + index, mask=q < pixels, other=0.0).to(tl.float32)
        difference = a - tl.load(b_ptr + index, mask=q < pixels, other=0.0).to(tl.float32)
        gradient = factor * m * difference
        if WANT_A:
            tl.store(ga_ptr + index, gradient.to(ga_ptr.dtype.element_ty), mask=q < pixels)
        if WANT_B:
            tl.store(gb_ptr + index, (-gradient).to(gb_ptr.dtype.element_ty), mask=q < pixels)


BLOCK = 256


def _masks(a: Tensor, *masks: Tensor | None) -> tuple[list[Tensor], list[int]]:
    """Return pointers (a itself for an absent mask) and sample strides."""
    pointers, strides = [], []
    for m in masks:
        m = m.contiguous() if m is not None else None
        if m is not None and m.dtype == torch.bool:
            m = m.view(torch.uint8)
        pointers.append(a if m is None else m)
        strides.append(m.shape[2] * m.shape[3] if m is not None and m.shape[0] == a.shape[0] else 0)
    return pointers, strides


def _kind(a: Tensor, mask: Tensor | None) -> int:
    return 0 if mask is None else 1 if mask.shape[2:] == a.shape[2:] else 2


def forward(
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    include: Tensor | None,
    relax: str,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    """Run the forward kernel and add up its partial sums; arguments as the op's."""
    fmt = memory_format(a)
    a, b = a.contiguous(memory_format=fmt), b.contiguous(memory_format=fmt)
    n, c, h, w = a.shape
    blocks = triton.cdiv(h * w, BLOCK)
    squares, weight = empty_float(a, n, blocks), empty_float(a, n, blocks)
    pointers, strides = _masks(a, mask, exclude, include)
    forward_kernel[(n * blocks,)](
        a, b, *pointers, squares, weight, c, h * w, w, *strides, blocks,
        CHANNELS_LAST=fmt is torch.channels_last, MASK=_kind(a, mask), EXCLUDE=_kind(a, exclude),
        INCLUDE=_kind(a, include), MINMAX=relax == "minmax", BLOCK=BLOCK,
    )  # fmt: skip
    if normalize == "mask":
        total = c * weight.double().sum(1)
        inverse = torch.where(total == 0, 0.0, 1.0 / total)
    else:
        inverse = torch.full((n,), 1.0 / (c * h * w), dtype=torch.float64, device=a.device)
    return (squares.double().sum(1) * inverse).float(), inverse.float()


def backward(
    a: Tensor,
    grad: Tensor,
    inverse: Tensor,
    b: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    include: Tensor | None,
    relax: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Run the backward kernel; arguments as the backward op's."""
    fmt = memory_format(a)
    a, b = a.contiguous(memory_format=fmt), b.contiguous(memory_format=fmt)
    n, c, h, w = a.shape
    blocks = triton.cdiv(h * w, BLOCK)
    pointers, strides = _masks(a, mask, exclude, include)
    ga = empty_like(a, fmt) if wanted[0] else None
    gb = empty_like(a, fmt) if wanted[1] else None
    backward_kernel[(n * blocks,)](
        grad.float().contiguous(), inverse, a, b, *pointers, a if ga is None else ga, a if gb is None else gb,
        c, h * w, w, *strides, blocks,
        CHANNELS_LAST=fmt is torch.channels_last, MASK=_kind(a, mask), EXCLUDE=_kind(a, exclude),
        INCLUDE=_kind(a, include), MINMAX=relax == "minmax", WANT_A=wanted[0], WANT_B=wanted[1], BLOCK=BLOCK,
    )  # fmt: skip
    return (a.new_empty(0) if ga is None else ga), (a.new_empty(0) if gb is None else gb)
