# SPDX-License-Identifier: Apache-2.0
"""Adaptive discriminator augmentation (Karras et al. 2020, "Training GANs with Limited Data"), its pipeline "bgc".

What the critic sees is moved, scaled, turned and recoloured, real and made images alike, each change with probability
p; p rises while the critic is surer of real images than `target`, and falls otherwise. Every change is an affine
function of the pixels that can be differentiated twice, because R1 goes through it (torch's grid sampling alone cannot
be). Parameters are drawn on the CPU, by the generator of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.kernels import upfirdn2d
from faceedit.training.config import require

# Daubechies' least asymmetric wavelet of six vanishing moments: enlarging twofold with it and shrinking again is exact.
SYM6 = (
    0.015404109327027373,
    0.0034907120842174702,
    -0.11799011114819057,
    -0.048311742585633,
    0.4910559419267466,
    0.787641141030194,
    0.3379294217276218,
    -0.07263752278646252,
    -0.021060292512300564,
    0.04472490177066578,
    0.0017677118642428036,
    -0.007800708325034148,
)
_REACH_PX = len(SYM6) // 4  # pixels beyond the border that the twofold enlargement reads
_TAIL = len(SYM6) // 2 - 1  # samples beyond the border that shrinking reads, at twice the size
# The wavelet's centre of mass is not its middle: at twice the size, samples show what lies so many samples further on.
_LAG = (len(SYM6) - 1) / 2 - sum(i * tap for i, tap in enumerate(SYM6)) / sum(SYM6)


@dataclass(frozen=True, slots=True)
class AugmentationConfig:
    """How the critic's images are changed, and how p follows the critic.

    `target` is that of r_t, the mean sign of the critic's logits of real images. After every `every`-th step p moves,
    at a speed that takes `kimg` thousand images from 0 to 1. `start` is p at first. `blit` flips, turns by quarters and
    shifts by whole pixels; `geometric` scales, rotates, stretches and shifts; `colour` changes brightness, contrast,
    hue and saturation, and inverts lightness.
    """

    target: float = 0.6
    every: int = 4
    kimg: float = 500.0
    start: float = 0.0
    blit: bool = True
    geometric: bool = True
    colour: bool = True

    def __post_init__(self) -> None:
        require(-1 <= self.target <= 1, "augmentation.target", "in [-1, 1]", self.target)
        require(self.every > 0, "augmentation.every", "positive", self.every)
        require(self.kimg > 0, "augmentation.kimg", "positive", self.kimg)
        require(0 <= self.start <= 1, "augmentation.start", "in [0, 1]", self.start)


@dataclass(frozen=True, slots=True)
class Augmentation:
    """One batch's changes, drawn once, so that a penalty can go through the same ones as a loss.

    geometry (N,2,3) takes points of the result to points of the image, both in [-1, 1] from edge to edge, x right, y
    down; colour (N,3,4) takes (R, G, B, 1) to RGB; moved, recoloured: which images are changed at all. The others pass
    unread, bit for bit.
    """

    geometry: Tensor
    colour: Tensor
    moved: Tensor
    recoloured: Tensor

    def apply(self, image: Tensor) -> Tensor:
        """The batch of images (N,3,S,S) as the critic is to see it."""
        if self.moved.any():
            image = _replace(image, self.moved, lambda chosen: warp(chosen, self.geometry[self.moved]))
        if self.recoloured.any():
            image = _replace(image, self.recoloured, lambda chosen: recolour(chosen, self.colour[self.recoloured]))
        return image


def _replace(image: Tensor, chosen: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    if chosen.all():
        return change(image)
    rows = chosen.nonzero()[:, 0].to(image.device)
    return image.index_copy(0, rows, change(image[rows]).to(image.dtype))


def draw_augmentation(
    config: AugmentationConfig, probability: float, count: int, size_px: int, generator: torch.Generator
) -> Augmentation:
    """Changes for `count` square images, each with `probability`. What is drawn does not depend on the probability.

    Source: Karras et al. 2020 (ADA), appendix B, listing order and magnitudes.
    """
    draws = _Draws(count, probability, generator)
    geometry, moved = _geometry(config, draws, size_px)
    colour, recoloured = _colour(config, draws)
    return Augmentation(geometry[:, :2], colour[:, :3], moved, recoloured)


class _Draws:
    """Random numbers for N images, and the gate that lets a change happen to some of them."""

    def __init__(self, count: int, probability: float, generator: torch.Generator) -> None:
        self.count, self.probability, self._generator = count, probability, generator
        self.changed = torch.zeros(count, dtype=torch.bool)

    def uniform(self, low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(self.count, generator=self._generator)

    def integer(self, below: int) -> Tensor:
        return torch.randint(below, (self.count,), generator=self._generator).float()

    def normal(self, spread: float) -> Tensor:
        return torch.randn(self.count, generator=self._generator) * spread

    def gate(self, value: Tensor, neutral: float, probability: float | None = None) -> Tensor:
        """`value` with the probability, else what changes nothing."""
        chosen = self.uniform(0, 1) < (self.probability if probability is None else probability)
        self.changed |= chosen & (value != neutral)
        return torch.where(chosen, value, neutral)


def _geometry(config: AugmentationConfig, draws: _Draws, size_px: int) -> tuple[Tensor, Tensor]:
    """Matrices (N,3,3) from the result's points to the image's, and which of them move anything."""
    matrix = torch.eye(3).expand(draws.count, 3, 3)
    one = torch.ones(draws.count)
    if config.blit:
        matrix = matrix @ _scale(1 - 2 * draws.gate(draws.integer(2), 0), one)
        matrix = matrix @ _rotate(draws.gate(draws.integer(4), 0) * (math.pi / 2))
        whole_px = [(draws.uniform(-0.125, 0.125) * size_px).round() * (2 / size_px) for _ in range(2)]
        matrix = matrix @ _shift(*_gate_pair(draws, whole_px))
    if config.geometric:
        size = torch.exp2(draws.gate(draws.normal(0.2), 0))
        matrix = matrix @ _scale(size, size)
        once = 1 - math.sqrt(1 - draws.probability)  # of two rotations, one happens with probability p
        matrix = matrix @ _rotate(draws.gate(draws.uniform(-math.pi, math.pi), 0, once))
        stretch = torch.exp2(draws.gate(draws.normal(0.2), 0))
        matrix = matrix @ _scale(stretch, 1 / stretch)
        matrix = matrix @ _rotate(draws.gate(draws.uniform(-math.pi, math.pi), 0, once))
        matrix = matrix @ _shift(*_gate_pair(draws, [2 * draws.normal(0.125) for _ in range(2)]))
    moved, draws.changed = draws.changed, torch.zeros_like(draws.changed)
    return matrix, moved


def _gate_pair(draws: _Draws, shift: list[Tensor]) -> list[Tensor]:
    both = draws.gate(torch.ones(draws.count), 0)
    return [both * along for along in shift]


def _colour(config: AugmentationConfig, draws: _Draws) -> tuple[Tensor, Tensor]:
    """Matrices (N,4,4) on (R, G, B, 1), and which of them change anything."""
    matrix = torch.eye(4).expand(draws.count, 4, 4)
    if config.colour:
        grey = torch.zeros(4, 4)
        grey[:3, :3] = 1 / 3  # projection on the lightness axis (1, 1, 1)
        cross = torch.zeros(4, 4)  # the vector product with that axis
        cross[:3, :3] = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
        full = torch.eye(4)
        chroma = torch.diag(torch.tensor([1.0, 1.0, 1.0, 0.0])) - grey
        brighter = torch.zeros(4, 4)
        brighter[:3, 3] = 1
        matrix = (full + _each(draws.gate(draws.normal(0.2), 0)) * brighter) @ matrix
        contrast = torch.exp2(draws.gate(draws.normal(0.5), 0))
        matrix = (full + _each(contrast - 1) * (grey + chroma)) @ matrix  # mid-grey, 0, stays
        matrix = (full - _each(2 * draws.gate(draws.integer(2), 0)) * grey) @ matrix
        hue = _each(draws.gate(draws.uniform(-math.pi, math.pi), 0))
        matrix = (full - chroma + torch.cos(hue) * chroma + torch.sin(hue) * cross) @ matrix
        saturation = torch.exp2(draws.gate(draws.normal(1.0), 0))
        matrix = (full + _each(saturation - 1) * chroma) @ matrix
    recoloured, draws.changed = draws.changed, torch.zeros_like(draws.changed)
    return matrix, recoloured


def _each(values: Tensor) -> Tensor:
    return values[:, None, None]


def _rows(*rows: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    return torch.stack([torch.stack(row, dim=-1) for row in rows], dim=-2)


def _scale(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _rows((x, zero, zero), (zero, y, zero), (zero, zero, one))


def _rotate(angle: Tensor) -> Tensor:
    zero, one = torch.zeros_like(angle), torch.ones_like(angle)
    cos, sin = torch.cos(angle), torch.sin(angle)
    return _rows((cos, -sin, zero), (sin, cos, zero), (zero, zero, one))


def _shift(x: Tensor, y: Tensor) -> Tensor:
    zero, one = torch.zeros_like(x), torch.ones_like(x)
    return _rows((one, zero, x), (zero, one, y), (zero, zero, one))


def recolour(image: Tensor, matrix: Tensor) -> Tensor:
    """RGB (N,3,H,W) under matrices (N,3,4) on (R, G, B, 1)."""
    matrix = matrix.to(image)
    return torch.einsum("nij,njhw->nihw", matrix[:, :, :3], image) + matrix[:, :, 3, None, None]


def warp(image: Tensor, matrix: Tensor) -> Tensor:
    """Square images (N,C,S,S) resampled under matrices (N,2,3) from the result's points to theirs, mirrored beyond.

    Bilinear at twice the size between two passes of an orthogonal wavelet, which keeps detail that bilinear sampling
    alone would blur: the identity and shifts by whole pixels are exact, but for the outermost three pixels.
    """
    side = image.shape[-1]
    fir = torch.tensor(SYM6, dtype=torch.float64).div(math.sqrt(2)).to(image)
    planar = F.pad(image.contiguous(), (_REACH_PX,) * 4, mode="reflect")
    double = upfirdn2d(planar, fir, up=2, pad=(0, -1, 0, -1), gain=4.0)
    steps = (torch.arange(-_TAIL, 2 * side + _TAIL).to(image) + 0.5 + _LAG) / side - 1
    points = torch.stack([steps.expand(len(steps), -1), steps[:, None].expand(-1, len(steps))], dim=-1)
    matrix = matrix.to(image)
    grid = torch.einsum("nij,hwj->nhwi", matrix[:, :, :2], points) + matrix[:, None, None, :, 2] - _LAG / side
    return upfirdn2d(_Sample.apply(double, grid), fir, down=2, flip=True)


class _Sample(torch.autograd.Function):
    """Bilinear sampling of an image on a fixed grid, mirrored beyond the border; differentiable to any order.

    It is linear in the image, so its derivative is the adjoint, and the derivative of that is itself.
    """

    @staticmethod
    def forward(ctx: Any, image: Tensor, grid: Tensor) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.size = image.shape
        return F.grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=False)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return _Spread.apply(gradients[0], ctx.saved_tensors[0], ctx.size), None


class _Spread(torch.autograd.Function):
    """The adjoint of _Sample: values on the grid's points spread back on the image's pixels."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, grid: Tensor, size: torch.Size) -> Tensor:
        ctx.save_for_backward(grid)
        blank = values.new_zeros(size)
        bilinear, reflection = 0, 2
        wanted = [True, False]
        spread = torch.ops.aten.grid_sampler_2d_backward
        return spread(values.contiguous(), blank, grid, bilinear, reflection, False, wanted)[0]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return _Sample.apply(gradients[0], ctx.saved_tensors[0]), None, None


def count_signs(logits: Tensor) -> Tensor:
    """The sum of the signs of logits, and their number: two values on the logits' device."""
    signs = logits.detach().float().sign()
    return torch.stack([signs.sum(), torch.ones_like(signs).sum()])


class AdaptiveProbability(nn.Module):
    """p, and the signs of the critic's logits of real images since p last moved. Part of a checkpoint.

    Given the counts of all devices together, p is the same on each.
    """

    def __init__(self, config: AugmentationConfig) -> None:
        super().__init__()
        self.config = config
        self.value = config.start
        self._signs = torch.zeros(2)  # their sum, and how many

    def observe(self, signs: Tensor) -> None:
        """Add the `count_signs` of one batch of real images, of all devices; they stay on their device."""
        self._signs = self._signs.to(signs.device) + signs

    def move(self, images: int) -> float:
        """Move p by what `images` seen since the last time allow. Returns r_t, the mean sign since then."""
        total, count = self._signs.tolist()
        self._signs = torch.zeros_like(self._signs)
        mean = total / max(count, 1)
        step = images / (self.config.kimg * 1000)
        self.value = min(1.0, max(0.0, self.value + math.copysign(step, mean - self.config.target)))
        return mean

    def get_extra_state(self) -> dict[str, Any]:
        return {"value": self.value, "signs": self._signs.cpu()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.value, self._signs = float(state["value"]), state["signs"]
