# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from faceedit.kernels.benchmarking import stylegan2
from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of
from faceedit.kernels.fir_epilogue import fir_epilogue, reference
from faceedit.kernels.upfirdn2d import setup_filter

# A few elements within rounding of the leaky ReLU's kink take the other slope; see noise_bias_act.
TOLERANCE = {torch.float32: (1e-5, 1e-3)}


def _ours(x: Tensor, fir: Tensor, scale: Tensor, noise: Tensor, strength: Tensor, bias: Tensor) -> Tensor:
    return fir_epilogue(
        *(x, fir), pad=1, fir_gain=4.0, scale=scale, noise=noise, strength=strength, bias=bias, gain=2**0.5, clamp=256.0
    )


def _eager(x: Tensor, fir: Tensor, scale: Tensor, noise: Tensor, strength: Tensor, bias: Tensor) -> Tensor:
    operands = (scale, noise, strength, bias, None)
    return reference(x, fir, 1, 1, [1] * 4, 4.0, False, *operands, "lrelu", 0.2, 2**0.5, 256.0)


def _skip(x: Tensor, fir: Tensor, add: Tensor) -> Tensor:
    return fir_epilogue(x, fir, up=2, pad=(2, 1, 2, 1), fir_gain=4.0, add=add, act="linear")


def _skip_eager(x: Tensor, fir: Tensor, add: Tensor) -> Tensor:
    operands = (None, None, None, None, add)
    return reference(x, fir, 2, 1, [2, 1, 2, 1], 4.0, False, *operands, "linear", 0.2, 1.0, -1.0)


def _build(channels: int, side: int, channels_last: bool, dtype: torch.dtype) -> Case:
    fir = setup_filter([1, 3, 3, 1])
    if channels == 3:
        x, add = draw(1, 3, side // 2, side // 2).to(dtype), draw(1, 3, side, side, seed=1).to(dtype)
        # Forward reads both images and writes y; backward reads the gradient and writes that of x (add's is the same).
        moved = (size_of(x) + 2 * size_of(add), 2 * size_of(x) + 3 * size_of(add))
        return Case((x, fir, add), _skip, _skip_eager, moved, wanted=(0, 2))
    x = draw(1, channels, side + 1, side + 1, channels_last=channels_last).to(dtype)
    operands = (draw(1, channels, seed=1).sigmoid(), draw(1, 1, side, side, seed=2), torch.tensor(0.1))
    # Forward reads x and writes y. Backward reads the gradient and y, and writes the gradient to x; the demodulation's
    # belongs to the layer that made it.
    moved = (2 * size_of(x), 5 * size_of(x))
    inputs = (x, fir, *operands, draw(channels, seed=3))
    return Case(inputs, _ours, _eager, moved, wanted=(0, 3, 4, 5), tolerance=TOLERANCE.get(dtype))


# What follows every transposed convolution of a 256 and of a 1024 px StyleGAN2, and the skip connection of its last
# size. Eager's depthwise convolution is faster in NCHW.
LAYERS = {f"{channels}@{side}": (channels, side, True) for channels, side in stylegan2.maps(8)} | {
    "128@256 nchw": (128, 256, False),
    "3@1024 skip": (3, 1024, False),
    "3@256 skip": (3, 256, False),
}
BENCHMARKS = [Benchmark("fir_epilogue", _build, LAYERS, (5, 12, True), {"forward": 8.0, "forward+backward": 5.0})]
