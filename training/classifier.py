# SPDX-License-Identifier: Apache-2.0
"""The `classifier` task: the attribute classifier that judges edits, trained apart from every editor.

Domain randomisation (colour, light, noise, blur, placement, and people whose regions have random colours) carries it
over to photos.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from faceedit.attributes import MAGGAN
from faceedit.networks.classifier import AttributeClassifierConfig
from faceedit.training.attribute_task import AttributeRecipe, AttributeTask
from faceedit.training.config import require
from faceedit.training.data import AugmentConfig, augment_images
from faceedit.training.synthetic import SUPPORTED_ATTRIBUTES


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """Random placement and sharpness, as other aligners and cameras give: shares of the side, degrees, shares."""

    shift: float = 0.04
    scale: float = 0.08
    degrees: float = 5.0
    blur_share: float = 0.3

    def __post_init__(self) -> None:
        for name in ("shift", "scale", "degrees"):
            require(getattr(self, name) >= 0, name, "not negative", getattr(self, name))
        require(0 <= self.blur_share <= 1, "blur_share", "in [0, 1]", self.blur_share)


@dataclass(frozen=True, slots=True)
class ClassifierRecipe(AttributeRecipe):
    """A `task: classifier` recipe."""

    network: AttributeClassifierConfig = field(
        default_factory=lambda: AttributeClassifierConfig(attributes=SUPPORTED_ATTRIBUTES)
    )
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)

    def __post_init__(self) -> None:
        AttributeRecipe.__post_init__(self)
        require(
            self.synthetic.size_px == self.network.size_px,
            "synthetic.size_px",
            f"network.size_px = {self.network.size_px}",
            self.synthetic.size_px,
        )


class ClassifierTask(AttributeTask[ClassifierRecipe]):
    """The judge of the feed-forward editors: portraits framed as editors parse them."""

    recipe_class = ClassifierRecipe
    kind = "attribute-classifier"

    def look(self, image: Tensor, person: NDArray[Any], generator: torch.Generator) -> Tensor:
        del person
        mirrored = (torch.rand(len(image), generator=generator) < 0.5) & self.recipe.augment.flip
        image[mirrored] = image[mirrored].flip(-1)
        image = augment_images([image], self.recipe.augment, generator)[0]
        return place_at_random(image, self.recipe.placement, generator)

    def validate(self) -> dict[str, float]:
        """As every classifier, and `accuracy_maggan`, the mean over those of MagGAN's 13 that it has."""
        result = super().validate()
        thirteen = [result[f"accuracy_{name}"] for name in self.recipe.network.attributes if name in MAGGAN]
        return result | ({"accuracy_maggan": sum(thirteen) / len(thirteen)} if thirteen else {})


def place_at_random(image: Tensor, config: PlacementConfig, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shift (edges repeat) and blur a share of N×3×S×S images."""
    count, side = image.shape[0], image.shape[-1]

    def draw(spread: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * spread

    angle, scale = draw(math.radians(config.degrees)), torch.exp(draw(config.scale))
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    rows = [cos, -sin, 2 * draw(config.shift), sin, cos, 2 * draw(config.shift)]
    grid = F.affine_grid(torch.stack(rows, dim=-1).view(count, 2, 3), list(image.shape), align_corners=False)
    moved = F.grid_sample(image, grid.to(image), mode="bilinear", padding_mode="border", align_corners=False)
    blurred = (torch.rand(count, generator=generator) < config.blur_share).to(image.device).view(-1, 1, 1, 1)
    small = F.interpolate(moved, size=(side // 2, side // 2), mode="area")
    return torch.where(blurred, F.interpolate(small, size=(side, side), mode="bilinear", align_corners=False), moved)
