# SPDX-License-Identifier: Apache-2.0
"""Masked LPIPS: how different two images look inside a mask, by the features of a network.

For every level: features normalised to unit length over channels, squared difference, times the mask brought to the
level's size (from level to level, by area), weighted over channels, averaged over pixels; summed over levels.

Source: Zhang et al. 2018 (LPIPS v0.1) with the mask of MaskFaceGAN's released code. Its VGG-16 and
linear heads may not be shipped; what ships is the starter attribute classifier, whose levels all weigh alike. Anything
that maps an image to a list of feature maps can take its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.networks.resizing import resize

_EPS = 1e-10


class Features(Protocol):
    """Feature maps of an image, and how much each channel of each level counts (None: 1/C, a plain mean)."""

    weights: Sequence[Tensor] | None

    def __call__(self, image: Tensor) -> list[Tensor]:
        """(N,3,S,S) in [-1, 1] to maps (N,C,h,w), fine to coarse; differentiable."""


def masked_lpips(features: Features, image: Tensor, source: Sequence[Tensor], mask: Tensor) -> Tensor:
    """The distance (N) of images (N,3,S,S) from the features of others, inside masks (N,1,S,S) in [0, 1].

    Args: source, `features(other)`, computed once where the other image does not change. Gradients reach the image.
    """
    total: Tensor | None = None
    for level, (made, wanted) in enumerate(zip(features(image), source, strict=True)):
        mask = F.interpolate(mask, made.shape[-2:], mode="area")
        squares = (_unit(made) - _unit(wanted)).square()
        if features.weights is None:
            distance = squares.mean(1, keepdim=True)
        else:
            distance = (squares * features.weights[level].view(1, -1, 1, 1)).sum(1, keepdim=True)
        term = (distance * mask).mean((1, 2, 3))
        total = term if total is None else total + term
    assert total is not None
    return total


class StageFeatures:
    """Features of a sequential network: what enters each of its pooling layers.

    Args: layers, e.g. `AttributeClassifier.features` or torchvision's `vgg16().features`; size_px, the side images are
          brought to (None: their own); weights, per level.
    """

    def __init__(
        self,
        layers: nn.Sequential,
        size_px: int | None = None,
        weights: Sequence[Tensor] | None = None,
    ) -> None:
        self.layers = layers.eval().requires_grad_(False)
        self.size_px, self.weights = size_px, weights

    def __call__(self, image: Tensor) -> list[Tensor]:
        x = image if self.size_px is None else resize(image, self.size_px)
        maps = []
        for layer in self.layers:
            if isinstance(layer, nn.MaxPool2d):
                maps.append(x)
            x = layer(x)
        return maps


class LPIPSScale(nn.Module):
    """[-1, 1] to the input of LPIPS' VGG-16."""

    shift: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1))
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1))

    def forward(self, image: Tensor) -> Tensor:
        return (image - self.shift) / self.scale


def lpips_vgg16(vgg16: dict[str, Tensor], heads: dict[str, Tensor]) -> StageFeatures:
    """LPIPS v0.1 as published, from state dicts of your own copies.

    Args: vgg16, of torchvision's `vgg16` (`features.*`); heads, of LPIPS' `vgg.pth` (`lin0.model.1.weight`, …).
    """
    from torchvision.models import vgg16 as build

    with torch.device("meta"):
        layers = build(weights=None).features
    prefix = "features."
    layers.load_state_dict({k.removeprefix(prefix): v for k, v in vgg16.items() if k.startswith(prefix)}, assign=True)
    weights = [heads[f"lin{level}.model.1.weight"].flatten().clone() for level in range(5)]
    return StageFeatures(nn.Sequential(LPIPSScale(), *layers), weights=weights)


def _unit(features: Tensor) -> Tensor:
    return features * (features.square().sum(1, keepdim=True) + _EPS).rsqrt()
