# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of
from faceedit.kernels.norm_modulate import norm_modulate


def _eager(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    if gamma.dim() == 2:
        gamma, beta = (t[..., None, None].to(x.dtype) for t in (gamma, beta))
    return F.leaky_relu(F.instance_norm(x) * (1 + gamma) + beta, 0.2)


def _ours(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return norm_modulate(x, gamma, beta, act="lrelu")


def _build(kind: str, channels: int, side: int, dtype: torch.dtype) -> Case:
    x = draw(1, channels, side, side).to(dtype)
    shape = (1, channels) if kind == "adain" else (1, channels, side, side)
    gamma, beta = (0.3 * draw(*shape, seed=seed) for seed in (1, 2))
    if kind == "sft":
        gamma, beta = gamma.to(dtype), beta.to(dtype)
    # Forward reads x (and the maps) and writes y. Backward reads the gradient, x and the maps again and writes a
    # gradient to each; x is in the cache the second time that a plane is read.
    maps = size_of(gamma, beta)
    moved = (2 * size_of(x) + maps, 5 * size_of(x) + 3 * maps)
    # The eager code rounds every intermediate result of a half type.
    return Case((x, gamma, beta), _ours, _eager, moved, tolerance=None if dtype == torch.float32 else (2e-2, 4e-2))


LAYERS = {
    f"{kind} {channels}@{side}": (kind, channels, side)
    for channels, side in ((128, 128), (512, 32), (64, 256))
    for kind in ("sft", "adain")
}
BENCHMARKS = [Benchmark("norm_modulate", _build, LAYERS, ("sft", 5, 12), {"forward": 7.0})]
