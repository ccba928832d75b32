# SPDX-License-Identifier: Apache-2.0
"""One step of MaskFaceGAN's optimisation: losses and the gradient that Adam is given, all weights frozen.

Latent step: generator, masked error, classifier branch and KL, gradient to ws. Noise step: generator, masked error and
regulariser, gradient to every map. The baseline is the public implementations' formulation in fp32, in the bf16 rows
too: grouped modulated convolution, the FIR filter by itself, NCHW, one pass a term, the noise pyramid map by map.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels.benchmarking import stylegan2
from faceedit.kernels.benchmarking.case import PASSES, Benchmark, Case, draw, frozen
from faceedit.kernels.benchmarking.cases.noise_regularizer import _pyramid
from faceedit.kernels.frozen_conv import conv3x3, pays
from faceedit.kernels.kl import bernoulli_kl
from faceedit.kernels.masked_mse import masked_mse
from faceedit.kernels.noise_regularizer import noise_regularizer

# One branch of the attribute tree: convolutions and poolings in order.
BRANCH = "ccMccMcc" + "cMcccMc" + "c" + "cM"
# Far from what the random branch says: a divergence near its minimum is all rounding, and would compare as such.
TARGET_PROBABILITY = 0.05
# Of losses and gradients against the baseline's fp32; see the generator's case.
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (5e-2, 0.4)}


Layer = Callable[[Tensor, Tensor], Tensor]


def _layer(x: Tensor, weight: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, weight, padding=1))


def _our_layer(x: Tensor, weight: Tensor) -> Tensor:
    return conv3x3(x, weight, None, "relu") if pays(x, weight) else _layer(x, weight)


@dataclass(frozen=True, slots=True)
class Branch:
    """A classifier branch with random weights: images of side_px, weights of its convolutions, head of its logit."""

    side_px: int
    weights: tuple[Tensor, ...]
    head: Tensor

    def to(self, device: torch.device, dtype: torch.dtype, memory_format: torch.memory_format) -> "Branch":
        """Return it on a device, its convolutions in `dtype` and that memory format."""
        weights = (frozen(weight.to(device, dtype).contiguous(memory_format=memory_format)) for weight in self.weights)
        return Branch(self.side_px, tuple(weights), self.head.to(device))

    def logits(self, image: Tensor, layer: Layer) -> Tensor:
        """Return (N,1) fp32 of images (N,3,S,S). layer: a convolution and its ReLU."""
        x = F.interpolate(image, (self.side_px, self.side_px), mode="area")
        weights = iter(self.weights)
        fmt = torch.channels_last if self.weights[0].is_contiguous(memory_format=torch.channels_last) else None
        x = x.to(self.weights[0].dtype)
        x = x if fmt is None else x.contiguous(memory_format=fmt)
        for kind in BRANCH:
            # Batch normalisation is a scale and a shift after the ReLU; with unit statistics it is left out in both.
            x = F.max_pool2d(x, 2) if kind == "M" else layer(x, next(weights))
        return F.linear(x.float().flatten(1), self.head)


def branch(side_px: int, width: int) -> Branch:
    """Return a branch whose activations keep their size."""
    inputs, weights = 3, []
    for index in range(BRANCH.count("c")):
        weights.append(draw(width, inputs, 3, 3, seed=100 + index) * (2 / (9 * inputs)) ** 0.5)
        inputs = width
    features = width * (side_px >> BRANCH.count("M")) ** 2
    return Branch(side_px, tuple(weights), draw(1, features, seed=99) / features**0.5)


def branch_flops(network: Branch) -> int:
    """Return the arithmetic of its forward convolutions for one image."""
    total, side, weights = 0, network.side_px, iter(network.weights)
    for kind in BRANCH:
        if kind == "M":
            side //= 2
        else:
            total += 2 * next(weights).numel() * side**2
    return total


def _public_terms(image: Tensor, source: Tensor, mask: Tensor) -> Tensor:
    return (mask * (image - source).square()).mean((1, 2, 3))


def _public_kl(logits: Tensor) -> Tensor:
    p = torch.sigmoid(logits[:, 0])
    predicted = torch.stack([p, 1 - p], 1)
    asked = torch.full_like(p, TARGET_PROBABILITY)
    wanted = torch.stack([asked, 1 - asked], 1)
    return (wanted * (wanted / predicted).log()).sum(1)


def _build(side: int, base: int, width: int, branch_px: int, branch_width: int, stage: str, dtype: torch.dtype) -> Case:
    generator, classifier = stylegan2.build(side, base, width), branch(branch_px, branch_width)
    placed: dict[tuple[torch.device, torch.dtype, bool], tuple[stylegan2.Network, Branch]] = {}

    def networks(like: Tensor, kind: torch.dtype, planar: bool) -> tuple[stylegan2.Network, Branch]:
        key = (like.device, kind, planar)
        if key not in placed:
            fmt = torch.contiguous_format if planar else torch.channels_last
            placed[key] = (generator.to(like.device, kind), classifier.to(like.device, kind, fmt))
        return placed[key]

    def ours(ws: Tensor, source: Tensor, mask: Tensor, *noises: Tensor) -> tuple[Tensor, Tensor]:
        g, c = networks(ws, dtype, False)
        image = stylegan2.our_form(g, ws, noises)
        appearance = masked_mse(image, source, mask)
        if stage == "noise":
            return appearance, noise_regularizer(noises)
        logits = c.logits(image, _our_layer)
        return appearance, bernoulli_kl(logits, torch.full_like(logits, TARGET_PROBABILITY))

    def public(ws: Tensor, source: Tensor, mask: Tensor, *noises: Tensor) -> tuple[Tensor, Tensor]:
        g, c = networks(ws, torch.float32, True)
        image = stylegan2.nvlabs_form(g, ws, noises, True, torch.float32)
        appearance = _public_terms(image, source, mask)
        if stage == "noise":
            return appearance, _pyramid(*noises)
        return appearance, _public_kl(c.logits(image, _layer))

    ws, *maps = stylegan2.inputs(generator, 1)
    source, mask = draw(1, 3, side, side, seed=4), draw(1, 1, side, side, seed=5).sigmoid()
    inputs: Sequence[Tensor] = (ws, source, mask, *(noise_map + 0.2 for noise_map in maps))
    moved = stylegan2.moved_bytes(generator, 1, dtype.itemsize)
    flops = stylegan2.flops(generator, 1) + (branch_flops(classifier) if stage == "latent" else 0)
    return Case(
        inputs, ours, ours, (moved, 2 * moved), (flops, 2 * flops),
        wanted=(0,) if stage == "latent" else tuple(range(3, len(inputs))),
        others={"public-form": public}, baseline="public-form", tolerance=TOLERANCE[dtype], passes=PASSES[1:],
    )  # fmt: skip


def _bare(
    side: int, base: int, width: int, branch_px: int, branch_width: int, stage: str
) -> list[tuple[tuple[object, ...], float]]:
    """Steps of 16 and 64 px with a few channels: every doubling of the side adds the same calls."""
    doublings = (side.bit_length() - (64).bit_length()) / 2
    return [((64, 256, 8, 32, 4, stage), 1 + doublings), ((16, 64, 8, 32, 4, stage), -doublings)]


SIZES = {"256": (256, 16384, 512, 224, 64), "1024": (1024, 32768, 512, 224, 64)}
LAYERS = {f"{size} {stage}": (*values, stage) for size, values in SIZES.items() for stage in ("latent", "noise")}
TARGET = {"forward+backward float32": 3.0, "forward+backward bfloat16": 4.5}
BENCHMARKS = [Benchmark("optimization_step", _build, LAYERS, (32, 64, 8, 32, 4, "latent"), TARGET, bare=_bare)]
