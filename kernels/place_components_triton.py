# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton bodies of place_components. Imported only when the triton backend runs: importing triton takes a second."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.tensors import empty, memory_format

BLOCK = 1024


@triton.jit
def _position(i, channels, height, width, CHANNELS_LAST: tl.constexpr):
    # Sample, channel, row and column of element i of a (n, channels, height, width) map: products may pass 32 bits.
    if CHANNELS_LAST:
        c = i % channels
        x = (i // channels) % width
        y = (i // channels // width) % height
    else:
        x = i % width
        y = (i // width) % height
        c = (i // width // height) % channels
    return i // channels // height // width, c, y, x


@triton.jit
def _index(n, c, y, x, channels, height, width, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        index = ((n * height + y) * width + x) * channels + c
    else:
        index = ((n * channels + c) * height + y) * width + x
    return index


@triton.jit
def _start(centres_ptr, n, inside, parts, part, axis: tl.constexpr, size, CENTRED: tl.constexpr):
    if CENTRED:
        start = tl.load(centres_ptr + (n * parts + part) * 2 + axis, mask=inside, other=0).to(tl.int64) - size // 2
    else:
        start = n * 0
    return start


@triton.jit
def place_kernel(
    source_ptr, centres_ptr, out_ptr, elements, parts, part, channels, height, width, first, all_channels,
    out_height, out_width, CENTRED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # One source's channels of the whole canvas.
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = i < elements
    n, c, y, x = _position(i, channels, out_height, out_width, CHANNELS_LAST)
    row = y - _start(centres_ptr, n, exists, parts, part, 0, height, CENTRED)
    column = x - _start(centres_ptr, n, exists, parts, part, 1, width, CENTRED)
    inside = exists & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    values = tl.load(
        source_ptr + _index(n, c, row, column, channels, height, width, CHANNELS_LAST), mask=inside, other=0.0
    )
    out = _index(n, first + c, y, x, all_channels, out_height, out_width, CHANNELS_LAST)
    tl.store(out_ptr + out, values, mask=exists)


@triton.jit
def crop_kernel(
    grad_ptr, centres_ptr, found_ptr, elements, parts, part, channels, height, width, first, all_channels,
    out_height, out_width, CENTRED: tl.constexpr, CHANNELS_LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = i < elements
    n, c, row, column = _position(i, channels, height, width, CHANNELS_LAST)
    y = row + _start(centres_ptr, n, exists, parts, part, 0, height, CENTRED)
    x = column + _start(centres_ptr, n, exists, parts, part, 1, width, CENTRED)
    inside = exists & (y >= 0) & (y < out_height) & (x >= 0) & (x < out_width)
    index = _index(n, first + c, y, x, all_channels, out_height, out_width, CHANNELS_LAST)
    tl.store(found_ptr + i, tl.load(grad_ptr + index, mask=inside, other=0.0), mask=exists)


@triton.jit
def centres_kernel(mask_ptr, centres_ptr, pixels, width, BLOCK: tl.constexpr):
    plane = tl.program_id(0).to(tl.int64)
    weight = tl.zeros((BLOCK,), dtype=tl.int64)
    down = tl.zeros((BLOCK,), dtype=tl.int64)
    across = tl.zeros((BLOCK,), dtype=tl.int64)
    for first in range(0, pixels, BLOCK):
        i = first + tl.arange(0, BLOCK)
        m = tl.load(mask_ptr + plane * pixels + i, mask=i < pixels, other=0).to(tl.float32)
        # The comparisons are false for NaN. Adding 1.5 * 2^23 rounds half to even.
        m = tl.where(m > 0.0, tl.where(m < 1.0, m, 1.0), 0.0)
        units = ((m * 1048576.0 + 12582912.0) - 12582912.0).to(tl.int64)
        weight += units
        down += units * (i // width)
        across += units * (i % width)
    total = tl.sum(weight, axis=0)
    share = tl.where(total == 0, 1, total).to(tl.float64)
    # Adding 1.5 * 2^52 rounds half to even.
    y = (tl.sum(down, axis=0).to(tl.float64) / share + 6755399441055744.0) - 6755399441055744.0
    x = (tl.sum(across, axis=0).to(tl.float64) / share + 6755399441055744.0) - 6755399441055744.0
    tl.store(centres_ptr + 2 * plane, tl.where(total == 0, -1073741824.0, y).to(tl.int32))
    tl.store(centres_ptr + 2 * plane + 1, tl.where(total == 0, -1073741824.0, x).to(tl.int32))


def _launch(kernel: Any, source: Tensor, centres: Tensor, out: Tensor, part: int, first: int, forward: bool) -> None:
    """Run `kernel` between one map and the canvas; part -1: a map as large as the canvas."""
    piece, canvas = (source, out) if forward else (out, source)
    elements = piece.shape[0] * piece.shape[1] * (canvas if forward else piece).shape[2:].numel()
    if elements:
        kernel[(triton.cdiv(elements, BLOCK),)](
            source, centres, out, elements, centres.shape[1], max(part, 0), *piece.shape[1:], first, canvas.shape[1],
            *canvas.shape[2:], CENTRED=part >= 0, CHANNELS_LAST=memory_format(canvas) is torch.channels_last,
            BLOCK=BLOCK,
        )  # fmt: skip


def place(components: list[Tensor], centres: Tensor, mask_features: Tensor | None, height: int, width: int) -> Tensor:
    """Run the forward kernel once a source; arguments as the op's."""
    fmt = memory_format(components[0])
    pieces = [*components, *([] if mask_features is None else [mask_features])]
    shape = (components[0].shape[0], sum(p.shape[1] for p in pieces), height, width)
    out = empty(shape, components[0], components[0].dtype, fmt)
    centres, first = centres.contiguous(), 0
    for part, piece in enumerate(pieces):
        index = part if part < len(components) else -1
        _launch(place_kernel, piece.contiguous(memory_format=memory_format(out)), centres, out, index, first, True)
        first += piece.shape[1]
    return out


def crop(grad: Tensor, centres: Tensor, sizes: list[int], features: int) -> list[Tensor]:
    """Run the backward kernel once a result; arguments as the backward op's."""
    fmt, found, first = memory_format(grad), [], 0
    grad, centres = grad.contiguous(memory_format=fmt), centres.contiguous()
    count = len(sizes) // 3
    shapes = [sizes[i : i + 3] for i in range(0, len(sizes), 3)]
    shapes += [[features, *grad.shape[2:]]] if features else []
    for part, shape in enumerate(shapes):
        out = empty((grad.shape[0], *shape), grad, grad.dtype, fmt)
        _launch(crop_kernel, grad, centres, out, part if part < count else -1, first, False)
        found.append(out)
        first += shape[0]
    return found


def centres(mask: Tensor) -> Tensor:
    """Run the centres kernel; argument as the op's."""
    mask = mask.contiguous()
    mask = mask.view(torch.uint8) if mask.dtype == torch.bool else mask
    n, parts, height, width = mask.shape
    found = empty((n, parts, 2), mask, torch.int32, torch.contiguous_format)
    centres_kernel[(n * parts,)](mask, found, height * width, width, BLOCK=BLOCK)
    return found
