# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from faceedit.kernels.benchmarking import stylegan2
from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of
from faceedit.kernels.noise_bias_act import noise_bias_act, reference

# Eager rounds in another order: of millions of elements a few at the leaky ReLU's kink take the other slope.
TOLERANCE = {torch.float32: (1e-5, 1e-3)}


def _eager(x: Tensor, noise: Tensor, strength: Tensor, bias: Tensor) -> Tensor:
    return reference(x, None, noise, strength, bias, "lrelu", 0.2, 2**0.5, 256.0)


def _ours(x: Tensor, noise: Tensor, strength: Tensor, bias: Tensor) -> Tensor:
    return noise_bias_act(x, None, noise, strength, bias, gain=2**0.5, clamp=256.0)


def _build(channels: int, side: int, dtype: torch.dtype) -> Case:
    x = draw(1, channels, side, side, channels_last=True).to(dtype)
    # Forward reads x and writes y; backward reads the gradient and y, and writes the gradient to x.
    moved = (2 * size_of(x), 5 * size_of(x))
    inputs = (x, draw(1, 1, side, side, seed=1), torch.tensor(0.1), draw(channels, seed=2))
    return Case(inputs, _ours, _eager, moved, tolerance=TOLERANCE.get(dtype))


# Every convolution of a 256 and of a 1024 px StyleGAN2, and MagGAN's widest layer.
LAYERS = {f"{channels}@{side}": (channels, side) for channels, side in (*stylegan2.maps(4), (64, 128))}
BENCHMARKS = [Benchmark("noise_bias_act", _build, LAYERS, (5, 12), {"forward": 5.0, "forward+backward": 5.0})]
