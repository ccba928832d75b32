# SPDX-License-Identifier: Apache-2.0
"""A float32 layer of modulated_conv2d on a CPU in one call, with a quarter of the multiplications: csrc/winograd.cpp.

Upsampling of few channels: convolution and FIR together are four 3x3 convolutions of the input, one for each pixel of a
2x2 square. Of more: the transposed convolution with 49 multiplications in place of 81, then the FIR with the epilogue.
Source: Lavin and Gray 2016, "Fast Algorithms for Convolutional Neural Networks", F(4x4, 3x3), at other points; F(3, 2).
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from faceedit.kernels import modulated_conv2d_native, native
from faceedit.kernels.fir_epilogue import fir_epilogue_op
from faceedit.kernels.modulated_conv2d_parts import Geometry, Vectors, fir_taps, from_weight
from faceedit.kernels.noise_bias_act import ACTIVATIONS
from faceedit.kernels.tensors import empty, empty_float, scratch
from faceedit.kernels.upfirdn2d import upfirdn2d_op

Operands = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # scale, noise, strength, bias

LEAST_TILES = 16  # of 4 x 4 pixels: with fewer, reading the transformed weight takes as long as is won
LEAST_TILES_CHANGING = 256  # where the weight may be another one at each call, and is transformed at each
FOLD_LEAST_TILES, FOLD_INPUTS = 256, 64  # upsampling with the FIR in the weight; more channels: apart from it
UP_LEAST_PIXELS = 900  # of the input; with fewer, reading the transformed weight takes as long as is won
UPSAMPLING = Geometry(3, 2, 1)
UP_TAPS = (0.125, 0.375, 0.375, 0.125)  # what is part of the weight; exact in float32
SLOW = "baseline"  # the instruction set whose vectors are too short to win anything


def fits(x: Tensor, weight: Tensor, up: int) -> bool:
    """Return whether `forward` and `backward` are what is fastest for a convolution of x, channels_last, without down.

    The answer depends on shapes and kinds alone: a second call of the same has the first one's bits.
    """
    outputs, inputs, size, _ = weight.shape
    if not x.is_cpu or x.dtype is not torch.float32 or size != 3 or inputs % 32 or outputs % 32:
        return False
    n, _, h, w = x.shape
    tiles = _tiles(x)
    # Other tensors without gradient are often new ones: a parameter's detached self, or times its gain.
    stays = isinstance(weight, Parameter) and not weight.requires_grad and not weight.is_inference()
    if up == 2:
        pays = stays and n * h * w >= UP_LEAST_PIXELS
    else:
        pays = tiles >= (LEAST_TILES if stays else LEAST_TILES_CHANGING)
    # Tiles that an edge cuts are computed whole.
    return pays and n * h * w >= 12 * tiles and native.module().isa() != SLOW


def _tiles(x: Tensor) -> int:
    """Return how many tiles of 4 x 4 pixels cover the batch."""
    n, _, h, w = x.shape
    return n * ((h + 3) // 4) * ((w + 3) // 4)


def _folds(x: Tensor, weight: Tensor, fir: Tensor | None) -> bool:
    """Return whether the FIR of an upsampling layer is part of its weight."""
    outputs, inputs = weight.shape[:2]
    few = outputs <= inputs <= FOLD_INPUTS and _tiles(x) >= FOLD_LEAST_TILES
    return few and (fir is None or tuple(fir.tolist()) == UP_TAPS)


def _transformed(weight: Tensor, split: bool) -> Tensor:
    """Return a weight (O,I,3,3) as the kernel reads it: four times as large, or split 25/9 times."""
    weight = weight.float().contiguous()
    outputs, inputs = weight.shape[:2]
    transformed = empty_float(weight, (25 if split else 36) * outputs * inputs)
    native.module().winograd_weight(
        native.target(weight),
        weight=weight.data_ptr(),
        transformed=transformed.data_ptr(),
        outputs=outputs,
        inputs=inputs,
        split=split,
    )
    return transformed


def _with_fir(weight: Tensor) -> Tensor:
    """Return the weights (4O,I,3,3) of the four convolutions, rows of the 2x2 square first, of a weight (O,I,3,3)."""
    outputs, inputs = weight.shape[:2]
    # y[2q + p] = sum_j x[q + j] c[p - 2j], c[d] = sum_k 2 taps[k] weight[d - 1 + k] for d = -2 .. 3. Upsampling halves.
    c = weight.new_zeros(outputs, inputs, 6, 6)
    for k, row in enumerate(UP_TAPS):
        for m, column in enumerate(UP_TAPS):
            c[:, :, 3 - k : 6 - k, 3 - m : 6 - m] += 4.0 * row * column * weight
    c = c.flip(2, 3)
    return torch.cat([c[:, :, 1 - p :: 2, 1 - q :: 2] for p in (0, 1) for q in (0, 1)])


def _weight(weight: Tensor, folded: bool, split: bool, turned: bool) -> Tensor:
    """Return the kernel's weight, remembered; turned: of the data gradient."""

    def make(w: Tensor) -> Tensor:
        w = _with_fir(w.float()) if folded else w
        w = w.transpose(0, 1) if turned else w
        # A transposed convolution's taps run the other way.
        return _transformed(w.flip(2, 3) if turned != split else w, split)

    return from_weight(weight, ("winograd", folded, split, turned), make)


@lru_cache(maxsize=1024)
def _workspace(shape: torch.Size, inputs: int, outputs: int, sums: bool, threads: int, split: bool, up: int) -> int:
    """Return how many floats the kernel needs for its transformed values and sums; shape: the convolution's grid."""
    n, _, h, w = shape
    return native.module().winograd_workspace(
        native.place(True),
        grad_style=sums,
        batch=n,
        inputs=inputs,
        outputs=outputs,
        height=h,
        width=w,
        split=split,
        up=up,
        buffers=threads,
    )


def _run(
    x: Tensor,
    y: Tensor,
    transformed: Tensor,
    grid: torch.Size,
    inputs: int,
    outputs: int,
    *,
    down: int = 1,
    up: int = 1,
    split: bool = False,
    act: str = "linear",
    gain: float = 1.0,
    clamp: float = -1.0,
    grad_style: Tensor | None = None,
    **others: Any,
) -> bool:
    """Write y and what else the kernel makes; return False where a NaN or an infinity would have spread.

    grid: the shape of the convolution's input or result, whichever is smaller; others: fields of WinogradParams.
    """
    n, _, h, w = grid
    unbounded = empty_float(x)
    device, threads, stream = native.target(x, 0)
    sums = grad_style is not None
    workspace = scratch(x, _workspace(grid, inputs, outputs, sums, threads, split, up))
    native.module().winograd(
        (device, threads, stream),
        x=x.data_ptr(),
        y=y.data_ptr(),
        transformed=transformed.data_ptr(),
        grad_style=native.address(grad_style),
        unbounded=unbounded.data_ptr(),
        workspace=workspace.data_ptr(),
        batch=n,
        inputs=inputs,
        outputs=outputs,
        height=h,
        width=w,
        down=down,
        up=up,
        split=split,
        buffers=threads,
        act=ACTIVATIONS.index(act),
        gain=gain,
        clamp=clamp,
        **others,
    )
    return unbounded.item() == 0.0


def forward(
    x: Tensor,
    weight: Tensor,
    v: Vectors,
    operands: Operands,
    factors: Tensor | None,
    settings: tuple[str, float, float, float],
    *,
    up: int,
    fir: Tensor | None,
) -> tuple[Tensor, Tensor | None] | None:
    """Return y = epilogue(conv(x * style)) and ToRGB's sums; None where a NaN or an infinity would have spread.

    x is channels_last; operands, factors and settings are those of the epilogue.
    """
    n, inputs, h, w = x.shape
    outputs = weight.shape[0]
    if up == 2 and not _folds(x, weight, fir):
        transformed = _weight(weight, False, True, False)
        core = empty((n, outputs, 2 * h + 1, 2 * w + 1), x, x.dtype, torch.channels_last)
        if not _run(x, core, transformed, x.shape, inputs, outputs, up=2, split=True, style=v.inner.data_ptr()):
            return None
        pad = [UPSAMPLING.fir_pad] * 4
        y = fir_epilogue_op(core, fir_taps(fir, x), 1, 1, pad, 4.0, False, *operands, None, *settings)
        return y, None if factors is None else modulated_conv2d_native.dots(y, factors)
    scale, noise, strength, bias = operands
    act, slope, gain, clamp = settings
    transformed = _weight(weight, up == 2, False, False)
    y = empty((n, outputs, up * h, up * w), x, x.dtype, torch.channels_last)
    rgb = None if factors is None else empty_float(x, n, 3, up * h, up * w)
    finite = _run(
        x, y, transformed, x.shape, inputs, outputs * up * up, up=up,
        style=v.inner.data_ptr(), scale=native.address(scale),
        noise=native.address(noise), strength=native.address(strength), bias=native.address(bias),
        noise_stride=up * up * h * w if noise is not None and noise.shape[0] == n else 0,
        rgb_factors=native.address(factors), rgb=native.address(rgb),
        act=act, slope=slope, gain=gain, clamp=clamp,
    )  # fmt: skip
    return (y, rgb) if finite else None


def backward(
    grad: Tensor,
    weight: Tensor,
    v: Vectors,
    x: Tensor,
    style: Tensor,
    wanted: bool,
    *,
    up: int,
    fir: Tensor | None,
) -> tuple[Tensor, Tensor | None] | None:
    """Return data * style, and the sum over pixels of data * x, (N,C), where wanted; data is a convolution of grad.

    None where a NaN or an infinity would have spread.

    grad and x are channels_last; see `fits`.
    """
    n, inputs, _, _ = x.shape
    folded = up == 2 and _folds(x, weight, fir)
    split = up == 2 and not folded
    if split:
        grad = upfirdn2d_op(grad, fir_taps(fir, x), 1, 1, [UPSAMPLING.fir_pad_back] * 4, 4.0, True)
    outputs = weight.shape[0] * (up * up if folded else 1)
    data = empty(tuple(x.shape), x, x.dtype, torch.channels_last)
    grad_style = empty_float(x, n, inputs) if wanted else None
    finite = _run(
        grad, data, _weight(weight, folded, split, True), x.shape, outputs, inputs, down=up, split=split,
        scale=style.data_ptr(), other=x.data_ptr(), grad_style=grad_style,
    )  # fmt: skip
    return (data, grad_style) if finite else None
