# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels.attribute_maps import attribute_maps, conv_attribute_maps
from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of

HALF = (2e-2, 2e-2)  # the frame would go by attr, which stays fp32
ATTRIBUTES, PARTS = 13, 19  # MagGAN's; a relation is 0 or 1, mostly 0


def _eager(attr: Tensor, probs: Tensor, relation: Tensor) -> Tensor:
    return torch.einsum("ak,nkhw->nahw", relation, probs) * attr.to(probs.dtype)[:, :, None, None]


def _inputs(side: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    probs = draw(1, PARTS, side, side).softmax(1).to(dtype)
    relation = (draw(ATTRIBUTES, PARTS, seed=1) > 0.5).to(dtype)
    return draw(1, ATTRIBUTES, seed=2), probs, relation


def _build(side: int, dtype: torch.dtype) -> Case:
    attr, probs, relation = _inputs(side, dtype)
    maps = size_of(probs) * ATTRIBUTES // PARTS
    # Backward reads probs and the gradient, and writes the gradient to probs.
    moved = (size_of(probs) + maps, 3 * size_of(probs) + 2 * maps)
    tolerance = None if dtype == torch.float32 else HALF
    return Case((attr, probs, relation), attribute_maps, _eager, moved, wanted=(0, 1), tolerance=tolerance)


def _convolved(attr: Tensor, probs: Tensor, relation: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(_eager(attr, probs, relation), weight, padding=1)


def _folded(attr: Tensor, probs: Tensor, relation: Tensor, weight: Tensor) -> Tensor:
    return conv_attribute_maps(attr, probs, relation, weight, padding=1)


def _build_conv(outputs: int, side: int, dtype: torch.dtype) -> Case:
    attr, probs, relation = _inputs(side, dtype)
    weight = draw(outputs, ATTRIBUTES, 3, 3, seed=3).to(dtype)
    written = size_of(probs) * outputs // PARTS
    moved = (size_of(probs) + written, 3 * size_of(probs) + 2 * written)
    inputs, tolerance = (attr, probs, relation, weight), None if dtype == torch.float32 else HALF
    return Case(inputs, _folded, _convolved, moved, wanted=(0, 1), tolerance=tolerance)


# Half the side of a 256, 512 and 128 px MagGAN: where its condition is made.
LAYERS = {f"{ATTRIBUTES}@{side}": (side,) for side in (128, 256, 64)}
BENCHMARKS = [
    Benchmark("attribute_maps", _build, LAYERS, (12,), {"forward": 3.0}),
    Benchmark("conv_attribute_maps", _build_conv, {"64@128": (64, 128)}, (8, 12)),
]
