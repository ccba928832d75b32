# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from faceedit.kernels.alpha_blend import alpha_blend, reference
from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of


def _eager(fg: Tensor, bg: Tensor, mask: Tensor) -> Tensor:
    return reference(fg, bg, mask, False)


def _line(fg: Tensor, bg: Tensor, mask: Tensor) -> Tensor:
    """Neither end exact, and NaN leaks."""
    return bg + mask.to(fg.dtype) * (fg - bg)


def _build(side: int, dtype: torch.dtype) -> Case:
    fg, bg = (draw(1, 3, side, side, seed=seed).to(dtype) for seed in range(2))
    mask = draw(1, 1, side, side, seed=2).sigmoid()
    # Forward reads fg, bg and the mask and writes y; backward reads the gradient and the mask and writes fg's.
    moved = (3 * size_of(fg) + size_of(mask), 5 * size_of(fg) + 2 * size_of(mask))
    return Case((fg, bg, mask), alpha_blend, _eager, moved, wanted=(0,), others={"straight line": _line})


LAYERS = {f"3@{side}": (side,) for side in (1024, 512, 256)}
BENCHMARKS = [Benchmark("alpha_blend", _build, LAYERS, (13,), {"forward": 3.0, "forward+backward": 3.0})]
