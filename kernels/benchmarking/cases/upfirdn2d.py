# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from faceedit.kernels.benchmarking import stylegan2
from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of
from faceedit.kernels.upfirdn2d import reference, setup_filter, upfirdn2d


def _build(channels: int, side: int, up: int, down: int, channels_last: bool, dtype: torch.dtype) -> Case:
    pad = [2, 1, 2, 1] if up == 2 else [1, 1, 1, 1]
    size = side * down // up + (1 if up == down else 0)
    x = draw(1, channels, size, size, channels_last=channels_last).to(dtype)

    def ours(x: Tensor, fir: Tensor) -> Tensor:
        return upfirdn2d(x, fir, up, down, pad, up**2)

    def eager(x: Tensor, fir: Tensor) -> Tensor:
        return reference(x, fir, up, down, pad, up**2, False)

    # Forward reads x and writes y; backward reads the gradient to y and writes the gradient to x.
    once = size_of(x) + channels * side * side * x.element_size()
    return Case((x, setup_filter([1, 3, 3, 1])), ours, eager, (once, 2 * once), wanted=(0,))


# The filter after every transposed convolution of a 256 and of a 1024 px StyleGAN2, the skip image of its last size,
# and a discriminator's downsampling. Eager's depthwise convolution is faster in NCHW.
LAYERS = {f"{channels}@{side}": (channels, side, 1, 1, True) for channels, side in stylegan2.maps(8)} | {
    "128@256 nchw": (128, 256, 1, 1, False),
    "3@1024 up": (3, 1024, 2, 1, False),
    "3@256 up": (3, 256, 2, 1, False),
    "64@256 down": (64, 256, 1, 2, True),
}
BENCHMARKS = [Benchmark("upfirdn2d", _build, LAYERS, (5, 12, 2, 1, True), {"forward": 8.0, "forward+backward": 8.0})]
