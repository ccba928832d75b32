# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of
from faceedit.kernels.noise_regularizer import noise_regularizer, normalize_noise_


def _maps(px: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The noise of a generator of `px` pixels: one map of 4, and two of every size above."""
    sides = [4] + [side for power in range(3, 11) if (side := 2**power) <= px for _ in range(2)]
    # Not quite white, so that the loss is no sum of cancelled products.
    return tuple((draw(1, 1, side, side, seed=i) + 0.2).to(dtype) for i, side in enumerate(sides))


def _pyramid(*noises: Tensor) -> Tensor:
    """Map by map and level by level, as projectors write it."""
    loss = noises[0].new_zeros(noises[0].shape[0])
    for noise in noises:
        x, side = noise, noise.shape[2]
        while True:
            for axis in (3, 2):
                loss = loss + (x * torch.roll(x, 1, axis)).mean((1, 2, 3)).square()
            if side <= 8:
                break
            x = x.reshape(-1, 1, side // 2, 2, side // 2, 2).mean((3, 5))
            side //= 2
    return loss


def _ours(*noises: Tensor) -> Tensor:
    return noise_regularizer(noises)


def _build(px: int, dtype: torch.dtype) -> Case:
    noises = _maps(px, dtype)
    # Forward reads the maps; backward reads them and writes their gradients.
    return Case(noises, _ours, _pyramid, (size_of(*noises), 3 * size_of(*noises)))


def _normalize_pyramid(*noises: Tensor) -> Tensor:
    for noise in noises:
        mean, deviation = noise.mean((1, 2, 3), keepdim=True), noise.std((1, 2, 3), keepdim=True)
        noise.sub_(mean).div_(deviation)
    return noises[-1]


def _normalize(*noises: Tensor) -> Tensor:
    normalize_noise_(noises)
    return noises[-1]


def _build_normalize(px: int, dtype: torch.dtype) -> Case:
    noises = _maps(px, dtype)
    # Read for the mean and deviation, then, where the maps fit no cache, again; and written.
    return Case(noises, _normalize, _normalize_pyramid, (3 * size_of(*noises),) * 2, wanted=())


LAYERS = {f"maps@{px}": (px,) for px in (1024, 512, 256)}
FP32 = (torch.float32,)  # what optimised noise is kept in
BENCHMARKS = [
    Benchmark("noise_regularizer", _build, LAYERS, (32,), {"forward": 25.0}, FP32),
    Benchmark("normalize_noise_", _build_normalize, LAYERS, (32,), {"forward": 6.9}, FP32),
]
