# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of
from faceedit.kernels.masked_mse import masked_mse, reference


def _eager(a: Tensor, b: Tensor, mask: Tensor) -> Tensor:
    return reference(a, b, mask, None, None, "clamp", "all")[0]


def _build(side: int, dtype: torch.dtype) -> Case:
    a, b = (draw(1, 3, side, side, seed=seed).to(dtype) for seed in range(2))
    mask = draw(1, 1, side, side, seed=2).sigmoid()
    # Forward reads a, b and the mask; backward reads them again and writes the gradient to a.
    moved = (2 * size_of(a) + size_of(mask), 5 * size_of(a) + 2 * size_of(mask))
    return Case((a, b, mask), masked_mse, _eager, moved, wanted=(0,))


LAYERS = {f"3@{side}": (side,) for side in (1024, 512, 256)}
BENCHMARKS = [Benchmark("masked_mse", _build, LAYERS, (13,), {"forward": 6.0, "forward+backward": 4.0})]
