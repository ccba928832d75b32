# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of
from faceedit.kernels.gates import gru_gate, reset_gate


def _gru(h: Tensor, z: Tensor, c: Tensor) -> Tensor:
    update = torch.sigmoid(z)
    return (1 - update) * h + update * torch.tanh(c)


def _lerp(h: Tensor, z: Tensor, c: Tensor) -> Tensor:
    return torch.lerp(h, torch.tanh(c), torch.sigmoid(z))


def _reset(h: Tensor, r: Tensor) -> Tensor:
    return torch.sigmoid(r) * h


def _build_gru(channels: int, side: int, dtype: torch.dtype) -> Case:
    h, z, c = (draw(1, channels, side, side, seed=seed, channels_last=True).to(dtype) for seed in range(3))
    # Forward reads three and writes one; backward reads those and the gradient and writes three.
    return Case((h, z, c), gru_gate, _gru, (4 * size_of(h), 11 * size_of(h)), others={"lerp": _lerp})


def _build_reset(channels: int, side: int, dtype: torch.dtype) -> Case:
    h, r = (draw(1, channels, side, side, seed=seed, channels_last=True).to(dtype) for seed in range(2))
    return Case((h, r), reset_gate, _reset, (3 * size_of(h), 8 * size_of(h)))


# The transfer units of a 256 px MagGAN, the widest map first.
LAYERS = {f"{channels}@{side}": (channels, side) for channels, side in ((64, 128), (128, 64), (256, 32), (256, 128))}
BENCHMARKS = [
    Benchmark("gru_gate", _build_gru, LAYERS, (5, 12), {"forward": 4.0}),
    Benchmark("reset_gate", _build_reset, LAYERS, (5, 12), {"forward": 4.0}),
]
