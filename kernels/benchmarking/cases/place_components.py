# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of
from faceedit.kernels.place_components import mask_centres, place_components

# Eyes, nose, mouth and brows at a quarter of the image's scale: height and width per 128 px of canvas.
PARTS = ((12, 8), (12, 8), (20, 20), (36, 20), (8, 16))


def _place(*tensors: Tensor) -> Tensor:
    *parts, features, centres = tensors
    return place_components(parts, centres, features)


def _place_eager(*tensors: Tensor) -> Tensor:
    """A canvas a component, filled by slicing, and a concatenation: the centres are known to lie inside."""
    *parts, features, centres = tensors
    height, width = features.shape[2:]
    canvases = []
    for part, (y, x) in zip(parts, centres[0].tolist(), strict=True):
        top, left = y - part.shape[2] // 2, x - part.shape[3] // 2
        canvas = part.new_zeros(part.shape[0], part.shape[1], height, width)
        canvas[:, :, top : top + part.shape[2], left : left + part.shape[3]] = part
        canvases.append(canvas)
    return torch.cat([*canvases, features], 1)


def _build_place(channels: int, side: int, dtype: torch.dtype) -> Case:
    parts = [draw(1, channels, h * side // 128, w * side // 128, seed=k).to(dtype) for k, (h, w) in enumerate(PARTS)]
    features = draw(1, channels, side, side, seed=9).to(dtype)
    centres = torch.tensor([[[50, 40], [50, 88], [70, 64], [90, 64], [40, 64]]]) * side // 128
    canvas, read = 6 * size_of(features), size_of(*parts, features)
    # Backward reads the gradient where parts lie, and writes a gradient of every source.
    return Case((*parts, features, centres.int()), _place, _place_eager, (canvas + read, canvas + 3 * read))


def _centres_eager(mask: Tensor) -> Tensor:
    m = mask.float()
    weight = m.sum((2, 3))
    y = (m * torch.arange(m.shape[2], device=m.device)[:, None]).sum((2, 3)) / weight
    x = (m * torch.arange(m.shape[3], device=m.device)).sum((2, 3)) / weight
    return torch.stack([y, x], 2).round().int()


def _build_centres(parts: int, side: int, dtype: torch.dtype) -> Case:
    mask = (draw(1, parts, side, side) > 1).to(dtype)
    return Case((mask,), mask_centres, _centres_eager, (size_of(mask), 0), wanted=())


BENCHMARKS = [
    Benchmark("place_components", _build_place, {"64@128": (64, 128), "64@64": (64, 64)}, (2, 64), {"forward": 1.6}),
    Benchmark("mask_centres", _build_centres, {"5@512": (5, 512), "5@256": (5, 256)}, (3, 16)),
]
