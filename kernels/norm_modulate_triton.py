# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton body of norm_modulate. Imported only when the triton backend runs: importing triton takes a second.

A program handles pixels by channels of one sample: 1024 by 1 in planar layout, 32 by 32 channels last.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.activations import ACTIVATIONS
from faceedit.kernels.noise_bias_act_triton import _activate, _derivative
from faceedit.kernels.tensors import empty_float, empty_like, memory_format


@triton.jit
def _tile_index(sample, c, q, channels, pixels, CHANNELS_LAST: tl.constexpr):
    if CHANNELS_LAST:
        index = (sample * pixels + q)[:, None] * channels + c[None, :]
    else:
        index = (sample * channels + c)[None, :] * pixels + q[:, None]
    return index


@triton.jit
def _operand(pointer, sample, c, q, index, inside, channels, pixels, stride, absent: tl.constexpr, KIND: tl.constexpr):
    # The kinds of norm_modulate.py: absent, one value a channel, one a pixel, one an element.
    if KIND == 1:
        value = tl.load(pointer + sample * stride + c, mask=c < channels, other=0.0)[None, :]
    elif KIND == 2:
        value = tl.load(pointer + sample * pixels + q, mask=q < pixels, other=0.0).to(tl.float32)[:, None]
    elif KIND == 3:
        value = tl.load(pointer + index, mask=inside, other=0.0).to(tl.float32)
    else:
        value = tl.full((1, 1), absent, tl.float32)
    return value


@triton.jit
def _normalised(
    x, mean_ptr, rstd_ptr, rest_ptr, sample, c, channels, mean_stride, rstd_stride, NORM: tl.constexpr
):  # fmt: skip
    # u, what is still to be multiplied to it, and the factor of dL/dx.
    after = tl.full((1, 1), 1.0, tl.float32)
    scale = tl.full((1, 1), 1.0, tl.float32)
    u = x
    if NORM == 0:
        row = sample * channels + c
        scale = tl.load(rstd_ptr + row, mask=c < channels, other=0.0)[None, :]
        mean = tl.load(mean_ptr + row, mask=c < channels, other=0.0)[None, :]
        u = (x - mean) * scale + tl.load(rest_ptr + row, mask=c < channels, other=0.0)[None, :]
    elif NORM == 2:
        u = x - tl.load(mean_ptr + sample * mean_stride + c, mask=c < channels, other=0.0)[None, :]
        after = tl.load(rstd_ptr + sample * rstd_stride + c, mask=c < channels, other=0.0)[None, :]
        scale = after
    return u, after, scale


@triton.jit
def statistics_kernel(
    x_ptr, mean_ptr, rstd_ptr, rest_ptr, channels, pixels, eps,
    CHANNELS_LAST: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Deviations from the first pixels' mean; blocks are joined by their mean and squared deviations.
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    pivot = tl.zeros((BLOCK_C,), dtype=tl.float32)
    mean = tl.zeros((BLOCK_C,), dtype=tl.float32)
    squares = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(0, pixels, BLOCK_P):
        q = first + tl.arange(0, BLOCK_P)
        inside = (q < pixels)[:, None] & (c < channels)[None, :]
        index = _tile_index(sample, c, q, channels, pixels, CHANNELS_LAST)
        x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
        count = tl.sum((q < pixels).to(tl.float32), axis=0)
        pivot = tl.where(first == 0, tl.sum(x, axis=0) / count, pivot)
        deviation = tl.where(inside, x - pivot[None, :], 0.0)
        here = tl.sum(deviation, axis=0) / count
        rest = tl.where(inside, deviation - here[None, :], 0.0)
        delta = here - mean
        share = count / (count + first)
        squares += tl.sum(rest * rest, axis=0) + delta * delta * (first * share)
        mean += delta * share
    rstd = 1.0 / tl.sqrt(squares / pixels + eps)
    rounded = pivot + mean
    row = sample * channels + c
    tl.store(mean_ptr + row, rounded, mask=c < channels)
    tl.store(rstd_ptr + row, rstd, mask=c < channels)
    tl.store(rest_ptr + row, ((rounded - pivot) - mean) * rstd, mask=c < channels)


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, rest_ptr,
    channels, pixels, gamma_stride, beta_stride, mean_stride, rstd_stride, one, slope,
    GAMMA: tl.constexpr, BETA: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    q = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (q < pixels)[:, None] & (c < channels)[None, :]
    index = _tile_index(sample, c, q, channels, pixels, CHANNELS_LAST)
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
    u, after, _ = _normalised(x, mean_ptr, rstd_ptr, rest_ptr, sample, c, channels, mean_stride, rstd_stride, NORM)
    z = u * after
    if GAMMA != 0:
        z *= one + _operand(gamma_ptr, sample, c, q, index, inside, channels, pixels, gamma_stride, 0.0, GAMMA)
    z += _operand(beta_ptr, sample, c, q, index, inside, channels, pixels, beta_stride, 0.0, BETA)
    tl.store(y_ptr + index, _activate(z, ACT, slope).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradients(
    x_ptr, grad_ptr, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, rest_ptr, sample, c, q,
    channels, pixels, gamma_stride, beta_stride, mean_stride, rstd_stride, one, slope,
    GAMMA: tl.constexpr, BETA: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    # u, dL/dz, gamma's factor, what u is still multiplied by, the factor of dL/dx
    inside = (q < pixels)[:, None] & (c < channels)[None, :]
    index = _tile_index(sample, c, q, channels, pixels, CHANNELS_LAST)
    x = tl.load(x_ptr + index, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + index, mask=inside, other=0.0).to(tl.float32)
    u, after, scale = _normalised(x, mean_ptr, rstd_ptr, rest_ptr, sample, c, channels, mean_stride, rstd_stride, NORM)
    factor = _operand(gamma_ptr, sample, c, q, index, inside, channels, pixels, gamma_stride, 1.0, GAMMA)
    if GAMMA != 0:
        factor = one + factor
    z = u * after * factor
    z += _operand(beta_ptr, sample, c, q, index, inside, channels, pixels, beta_stride, 0.0, BETA)
    gz = tl.where(inside, grad * _derivative(z, ACT, slope), 0.0)
    return u, gz, factor, after, scale


@triton.jit
def sums_kernel(
    x_ptr, grad_ptr, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, rest_ptr, sums_ptr,
    channels, pixels, gamma_stride, beta_stride, mean_stride, rstd_stride, one, slope, planes,
    GAMMA: tl.constexpr, BETA: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    # Over each plane: dL/dz; that times gamma, where gamma is a map; that times u.
    sample = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    first_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    second_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    third_sum = tl.zeros((BLOCK_C,), dtype=tl.float32)
    for first in range(0, pixels, BLOCK_P):
        q = first + tl.arange(0, BLOCK_P)
        u, gz, factor, _, _ = _gradients(
            x_ptr, grad_ptr, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, rest_ptr, sample, c, q,
            channels, pixels, gamma_stride, beta_stride, mean_stride, rstd_stride, one, slope,
            GAMMA, BETA, NORM, ACT, CHANNELS_LAST,
        )  # fmt: skip
        gn = gz * factor if GAMMA > 1 else gz
        # A pixel outside the plane has gz = 0, but u may be anything there.
        first_sum += tl.sum(gz, axis=0)
        second_sum += tl.sum(gn, axis=0)
        third_sum += tl.sum(tl.where((q < pixels)[:, None], gn * u, 0.0), axis=0)
    row = sample * channels + c
    tl.store(sums_ptr + row, first_sum, mask=c < channels)
    tl.store(sums_ptr + planes + row, second_sum, mask=c < channels)
    tl.store(sums_ptr + 2 * planes + row, third_sum, mask=c < channels)


@triton.jit
def backward_kernel(
    x_ptr, grad_ptr, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, rest_ptr, sums_ptr, gx_ptr, ggamma_ptr, gbeta_ptr,
    channels, pixels, gamma_stride, beta_stride, mean_stride, rstd_stride, one, slope, planes,
    GAMMA: tl.constexpr, BETA: tl.constexpr, NORM: tl.constexpr, ACT: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    WANT_X: tl.constexpr, WANT_GAMMA: tl.constexpr, WANT_BETA: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    sample = tl.program_id(2).to(tl.int64)
    q = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (q < pixels)[:, None] & (c < channels)[None, :]
    index = _tile_index(sample, c, q, channels, pixels, CHANNELS_LAST)
    u, gz, factor, after, scale = _gradients(
        x_ptr, grad_ptr, gamma_ptr, beta_ptr, mean_ptr, rstd_ptr, rest_ptr, sample, c, q,
        channels, pixels, gamma_stride, beta_stride, mean_stride, rstd_stride, one, slope,
        GAMMA, BETA, NORM, ACT, CHANNELS_LAST,
    )  # fmt: skip
    if WANT_X:
        gx = gz * factor if GAMMA > 1 else gz
        if NORM == 0:
            row = sample * channels + c
            mean_grad = tl.load(sums_ptr + planes + row, mask=c < channels, other=0.0) / pixels
            slope_grad = tl.load(sums_ptr + 2 * planes + row, mask=c < channels, other=0.0) / pixels
            gx = gx - (u * slope_grad[None, :] + mean_grad[None, :])
        if GAMMA == 1:
            scale = scale * factor
        tl.store(gx_ptr + index, (gx * scale).to(gx_ptr.dtype.element_ty), mask=inside)
    if WANT_GAMMA:
        tl.store(ggamma_ptr + index, (gz * (u * after)).to(ggamma_ptr.dtype.element_ty), mask=inside)
    if WANT_BETA:
        tl.store(gbeta_ptr + index, gz.to(gbeta_ptr.dtype.element_ty), mask=inside)


def _tiles(x: Tensor) -> dict[str, Any]:
    last = memory_format(x) is torch.channels_last
    return {"CHANNELS_LAST": last, "BLOCK_P": 32 if last else 1024, "BLOCK_C": 32 if last else 1}


def _by_plane(x: Tensor) -> tuple[int, int]:
    return x.shape[0], triton.cdiv(x.shape[1], _tiles(x)["BLOCK_C"])


def _by_tile(x: Tensor) -> tuple[int, int, int]:
    return triton.cdiv(x.shape[2] * x.shape[3], _tiles(x)["BLOCK_P"]), _by_plane(x)[1], x.shape[0]


def _row_stride(operand: Tensor | None) -> int:
    return operand.shape[1] if operand is not None and operand.dim() == 2 else 0


def forward(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    kinds: tuple[int, int],
    norm: int,
    one_plus: bool,
    eps: float,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    """Run the statistics and the forward kernel. gamma and beta come as kernels read them, with their kinds."""
    y = empty_like(x, memory_format(x))
    n, c, h, w = x.shape
    statistics = empty_float(x, *((3, n, c) if norm == 0 else (0,)))
    found = _statistics(x, statistics, mean, rstd, norm)
    if norm == 0:
        statistics_kernel[_by_plane(x)](x, *found, c, h * w, eps, **_tiles(x))
    forward_kernel[_by_tile(x)](
        x, y, x if gamma is None else gamma, x if beta is None else beta, *found, c, h * w,
        *map(_row_stride, (gamma, beta, mean, rstd)), float(one_plus), slope,
        GAMMA=kinds[0], BETA=kinds[1], NORM=norm, ACT=ACTIVATIONS.index(act), **_tiles(x),
    )  # fmt: skip
    return y, statistics


def _statistics(
    x: Tensor, statistics: Tensor, mean: Tensor | None, rstd: Tensor | None, norm: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, rstd and rest as kernels read them; x stands for what they do not read."""
    if norm == 0:
        return statistics[0], statistics[1], statistics[2]
    return (x if mean is None else mean), (x if rstd is None else rstd), x


def backward(
    x: Tensor,
    grad: Tensor,
    statistics: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    kinds: tuple[int, int],
    norm: int,
    one_plus: bool,
    act: str,
    slope: float,
    wanted: list[bool],
) -> list[Tensor | None]:
    """Return gradients to x, gamma, beta, mean, rstd: (N,C), or x's shape for maps and x; None where not wanted."""
    fmt = memory_format(x)
    n, c, h, w = x.shape
    found = _statistics(x, statistics, mean, rstd, norm)
    maps = [kind >= 2 and want for kind, want in zip(kinds, wanted[1:3], strict=True)]
    arguments = (x, grad, x if gamma is None else gamma, x if beta is None else beta, *found)
    sizes = (c, h * w, *map(_row_stride, (gamma, beta, mean, rstd)), float(one_plus), slope, n * c)
    settings = {"GAMMA": kinds[0], "BETA": kinds[1], "NORM": norm, "ACT": ACTIVATIONS.index(act), **_tiles(x)}
    sums = empty_float(x, 3, n, c)
    sums_kernel[_by_plane(x)](*arguments, sums, *sizes, **settings)
    gx, ggamma, gbeta = (empty_like(x, fmt) if want else None for want in (wanted[0], *maps))
    backward_kernel[_by_tile(x)](
        *arguments, sums, *(x if g is None else g for g in (gx, ggamma, gbeta)), *sizes,
        WANT_X=wanted[0], WANT_GAMMA=maps[0], WANT_BETA=maps[1], **settings,
    )  # fmt: skip
    after = found[1] if norm == 2 else 1.0
    factor = gamma + float(one_plus) if gamma is not None and kinds[0] == 1 else 1.0
    gz, gn, gnu = sums.unbind()
    return [
        gx,
        gnu * after if wanted[1] and kinds[0] == 1 else ggamma,
        gz.clone() if wanted[2] and kinds[1] == 1 else gbeta,
        -gn * factor * after if wanted[3] else None,
        gnu * factor if wanted[4] else None,
    ]
