# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton bodies of noise_regularizer and normalize_noise_. Imported only when the triton backend runs.

One launch takes a map through up to four levels, tile by tile; the map of the level after goes to memory and starts the
next launch. A neighbour at level l is the tile read 2^l pixels aside and averaged l times: no value crosses programs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.noise_regularizer import pyramid_levels
from faceedit.kernels.tensors import empty, empty_float, empty_like

TILE = 64
TILE_LEVELS = 4
BLOCK = 4096


@triton.jit
def _read(x_ptr, first_row, first_column, side, SIZE: tl.constexpr):
    # Wrapping around; the caller's shift is at most 8, and a side at least 1.
    row = (first_row + tl.arange(0, SIZE) + 8 * side) % side
    column = (first_column + tl.arange(0, SIZE) + 8 * side) % side
    return tl.load(x_ptr + row.to(tl.int64)[:, None] * side + column[None, :]).to(tl.float32)


@triton.jit
def _halve(x, SIZE: tl.constexpr):
    return tl.sum(tl.sum(tl.reshape(x, (SIZE // 2, 2, SIZE // 2, 2)), axis=3), axis=1) * 0.25


@triton.jit
def _halved(x, TIMES: tl.constexpr, SIZE: tl.constexpr):
    y = x
    if TIMES > 0:
        y = _halve(y, SIZE)
    if TIMES > 1:
        y = _halve(y, SIZE // 2)
    if TIMES > 2:
        y = _halve(y, SIZE // 4)
    if TIMES > 3:
        y = _halve(y, SIZE // 8)
    return y


@triton.jit
def _doubled(x, SIZE: tl.constexpr):
    wide = tl.broadcast_to(tl.reshape(x, (SIZE, 1, SIZE, 1)), (SIZE, 2, SIZE, 2))
    return tl.reshape(wide, (2 * SIZE, 2 * SIZE))


@triton.jit
def sums_kernel(
    x_ptr, coarse_ptr, sums_ptr, side, across,
    LEVELS: tl.constexpr, SUMS: tl.constexpr, COARSE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    y = (tile // across) * SIZE
    x = (tile % across) * SIZE
    map_ptr = x_ptr + sample * side * side
    here = _read(map_ptr, y, x, side, SIZE)
    if SUMS:
        for level in tl.static_range(LEVELS):
            row = (y >> level) + tl.arange(0, SIZE >> level)
            column = (x >> level) + tl.arange(0, SIZE >> level)
            inside = (row < (side >> level))[:, None] & (column < (side >> level))[None, :]
            own = tl.where(inside, _halved(here, level, SIZE), 0.0)
            left = tl.where(inside, _halved(_read(map_ptr, y, x - (1 << level), side, SIZE), level, SIZE), 0.0)
            above = tl.where(inside, _halved(_read(map_ptr, y - (1 << level), x, side, SIZE), level, SIZE), 0.0)
            out_ptr = sums_ptr + ((sample * tl.num_programs(0) + tile) * LEVELS + level) * 2
            tl.store(out_ptr, tl.sum(tl.sum(own * left, axis=1), axis=0))
            tl.store(out_ptr + 1, tl.sum(tl.sum(own * above, axis=1), axis=0))
    if COARSE:
        half = side >> LEVELS
        row = (y >> LEVELS) + tl.arange(0, SIZE >> LEVELS)
        column = (x >> LEVELS) + tl.arange(0, SIZE >> LEVELS)
        inside = (row < half)[:, None] & (column < half)[None, :]
        out = coarse_ptr + sample * half * half + row[:, None] * half + column[None, :]
        tl.store(out, _halved(here, LEVELS, SIZE), mask=inside)


@triton.jit
def gradient_kernel(
    x_ptr, next_ptr, moments_ptr, grad_ptr, out_ptr, side, across, first_level, all_levels,
    LEVELS: tl.constexpr, NEXT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    y = (tile // across) * SIZE
    x = (tile % across) * SIZE
    map_ptr = x_ptr + sample * side * side
    grad = tl.load(grad_ptr + sample)
    found = tl.zeros((SIZE >> LEVELS, SIZE >> LEVELS), dtype=tl.float32)
    if NEXT:
        half = side >> LEVELS
        row = (y >> LEVELS) + tl.arange(0, SIZE >> LEVELS)
        column = (x >> LEVELS) + tl.arange(0, SIZE >> LEVELS)
        inside = (row < half)[:, None] & (column < half)[None, :]
        found = tl.load(next_ptr + sample * half * half + row[:, None] * half + column[None, :], mask=inside, other=0.0)
    for level in tl.static_range(LEVELS - 1, -1, -1):
        width = 1.0 * (side >> level)  # a side of 1 arrives as a constant
        area = width * width
        moment_ptr = moments_ptr + (sample * all_levels + first_level + level) * 2
        along_x = 2.0 * grad * tl.load(moment_ptr) / area
        along_y = 2.0 * grad * tl.load(moment_ptr + 1) / area
        beside = _read(map_ptr, y, x - (1 << level), side, SIZE) + _read(map_ptr, y, x + (1 << level), side, SIZE)
        stacked = _read(map_ptr, y - (1 << level), x, side, SIZE) + _read(map_ptr, y + (1 << level), x, side, SIZE)
        own = _halved(along_x * beside + along_y * stacked, level, SIZE)
        found = own + _doubled(found, SIZE >> (level + 1)) * 0.25
    row = y + tl.arange(0, SIZE)
    column = x + tl.arange(0, SIZE)
    inside = (row < side)[:, None] & (column < side)[None, :]
    out = out_ptr + sample * side * side + row.to(tl.int64)[:, None] * side + column[None, :]
    tl.store(out, found.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def moments_kernel(x_ptr, moments_ptr, origin_ptr, pixels, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    map_ptr = x_ptr + sample * pixels
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < pixels
    origin = tl.load(map_ptr).to(tl.float32)
    values = tl.where(inside, tl.load(map_ptr + index, mask=inside, other=0.0).to(tl.float32) - origin, 0.0)
    count = tl.minimum(pixels - block * BLOCK, BLOCK).to(tl.float32)
    mean = tl.sum(values, axis=0) / count
    centred = tl.where(inside, values - mean, 0.0)
    out_ptr = moments_ptr + (sample * tl.num_programs(0) + block) * 2
    tl.store(out_ptr, mean)
    tl.store(out_ptr + 1, tl.sum(centred * centred, axis=0))
    tl.store(origin_ptr + sample, origin, mask=block == 0)


@triton.jit
def apply_kernel(x_ptr, moments_ptr, origin_ptr, pixels, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0)
    sample = tl.program_id(1).to(tl.int64)
    blocks = tl.num_programs(0)
    each = tl.arange(0, BLOCKS)
    there = each < blocks
    count = tl.where(there, tl.minimum(pixels - each * BLOCK, BLOCK), 0).to(tl.float64)
    means = tl.load(moments_ptr + (sample * blocks + each) * 2, mask=there, other=0.0).to(tl.float64)
    squares = tl.load(moments_ptr + (sample * blocks + each) * 2 + 1, mask=there, other=0.0).to(tl.float64)
    mean = tl.sum(means * count, axis=0) / pixels
    spread = tl.sum(squares + count * (means - mean) * (means - mean), axis=0)
    freedom = tl.maximum(pixels - 1, 1).to(tl.float64)
    factor = tl.where(spread == 0.0, 0.0, tl.sqrt(freedom / tl.where(spread == 0.0, 1.0, spread))).to(tl.float32)
    map_ptr = x_ptr + sample * pixels
    index = block * BLOCK + tl.arange(0, BLOCK)
    inside = index < pixels
    values = tl.load(map_ptr + index, mask=inside, other=0.0).to(tl.float32) - tl.load(origin_ptr + sample)
    y = (values - mean.to(tl.float32)) * factor
    tl.store(map_ptr + index, y.to(x_ptr.dtype.element_ty), mask=inside)


def _steps(side: int, stop: int) -> list[tuple[int, int, int, bool]]:
    """Return (first level, side, levels, whether levels follow) of each launch of a map."""
    levels, steps = pyramid_levels(side, stop), []
    for first in range(0, levels, TILE_LEVELS):
        here = min(TILE_LEVELS, levels - first)
        steps.append((first, side >> first, here, first + here < levels))
    return steps


def _sums(x: Tensor, side: int, levels: int, follows: bool, wants_sums: bool) -> tuple[Tensor, Tensor]:
    """Run one launch: the sums (N, tiles, levels, 2) and the map of the level after."""
    n, across = x.shape[0], triton.cdiv(side, TILE)
    sums = empty_float(x, n, across * across, levels, 2) if wants_sums else x
    half = side >> levels
    coarse = empty((n, 1, half, half), x, torch.float32, torch.contiguous_format) if follows else x
    sums_kernel[(across * across, n)](
        x, coarse, sums, side, across, LEVELS=levels, SUMS=wants_sums, COARSE=follows, SIZE=TILE, num_warps=8
    )
    return sums, coarse


def forward(noises: list[Tensor], stop: int) -> tuple[Tensor, Tensor]:
    """Run the penalty; arguments as the op's."""
    moments = []
    for noise in noises:
        x = noise.contiguous()
        for _, side, levels, follows in _steps(noise.shape[2], stop):
            sums, x = _sums(x, side, levels, follows, True)
            totals = sums.sum(1, dtype=torch.float64)
            means = [totals[:, level] / (side >> level) ** 2 for level in range(levels)]  # a list would be copied over
            moments.append(torch.stack(means, 1).float())
    found = torch.cat(moments, 1)
    return found.double().square().sum((1, 2)).float(), found


def backward(noises: list[Tensor], grad: Tensor, moments: Tensor, stop: int) -> list[Tensor]:
    """Run the gradient kernels; arguments as the backward op's."""
    grad, all_levels, gradients, first_of_map = grad.float().contiguous(), moments.shape[1], [], 0
    for noise in noises:
        steps, pyramid = _steps(noise.shape[2], stop), [noise.contiguous()]
        for _, side, levels, follows in steps[:-1]:
            pyramid.append(_sums(pyramid[-1], side, levels, follows, False)[1])
        above: Tensor | None = None
        for (first, side, levels, follows), x in zip(reversed(steps), reversed(pyramid), strict=True):
            out, across = empty_like(x, torch.contiguous_format), triton.cdiv(side, TILE)
            gradient_kernel[(across * across, x.shape[0])](
                x, x if above is None else above, moments, grad, out, side, across, first_of_map + first, all_levels,
                LEVELS=levels, NEXT=follows, SIZE=TILE, num_warps=8,
            )  # fmt: skip
            above = out
        assert above is not None
        gradients.append(above)
        first_of_map += pyramid_levels(noise.shape[2], stop)
    return gradients


def normalize(noises: list[Tensor]) -> None:
    """Normalise contiguous maps in place."""
    for noise in noises:
        n, pixels = noise.shape[0], noise.shape[2] * noise.shape[3]
        blocks = triton.cdiv(pixels, BLOCK)
        moments, origin = empty_float(noise, n, blocks, 2), empty_float(noise, n)
        moments_kernel[(blocks, n)](noise, moments, origin, pixels, BLOCK=BLOCK)
        apply_kernel[(blocks, n)](noise, moments, origin, pixels, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(blocks))
