# SPDX-License-Identifier: Apache-2.0
"""The tasks `attribute-tree` and `attribute-cnn`: classifiers that guide MaskFaceGAN's edits.

They see what MaskFaceGAN shows them: FFHQ's alignment crops, of any sharpness. Paper: weighted binary
cross-entropy, flips and affine transforms, Nesterov momentum on FFHQ; here Adam, as in every recipe of this project, on
families of synthetic portraits under random light, tone, blur, noise and compression.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from faceedit.networks.attribute_cnn import AttributeCNNConfig
from faceedit.networks.attribute_tree import AttributeTreeConfig
from faceedit.training.attribute_task import AttributeRecipe, AttributeTask
from faceedit.training.config import require
from faceedit.training.degradation import photograph, random_warp, warp_image
from faceedit.training.framing import ffhq_frames, framed
from faceedit.training.synthetic import SUPPORTED_ATTRIBUTES
from faceedit.training.task import TrainingContext

_RAREST = 0.05  # an attribute is balanced as if at least this share of the people had it, and lacked it


@dataclass(frozen=True, slots=True)
class FramedAttributeRecipe(AttributeRecipe):
    """`warp_strength` is that of `random_warp`: how far an aligner may be off. FFHQ's square is about 0.8 of a portrait
    wide, so portraits of 1.25 network.size_px keep all the detail that the network can see."""

    warp_strength: float = 0.5

    def __post_init__(self) -> None:
        AttributeRecipe.__post_init__(self)
        require(self.warp_strength >= 0, "warp_strength", "not negative", self.warp_strength)


def _require_samples(batch_size: int) -> None:
    require(batch_size > 1, "batch_size", "above 1: normalisation needs more than one sample", batch_size)


@dataclass(frozen=True, slots=True)
class AttributeTreeRecipe(FramedAttributeRecipe):
    """A `task: attribute-tree` recipe."""

    network: AttributeTreeConfig = field(default_factory=lambda: AttributeTreeConfig(attributes=SUPPORTED_ATTRIBUTES))

    def __post_init__(self) -> None:
        FramedAttributeRecipe.__post_init__(self)
        _require_samples(self.batch_size)


@dataclass(frozen=True, slots=True)
class AttributeCNNRecipe(FramedAttributeRecipe):
    """A `task: attribute-cnn` recipe."""

    network: AttributeCNNConfig = field(default_factory=lambda: AttributeCNNConfig(attributes=SUPPORTED_ATTRIBUTES))

    def __post_init__(self) -> None:
        FramedAttributeRecipe.__post_init__(self)
        if self.network.backbone.startswith("resnet"):  # a VGG has no normalisation
            _require_samples(self.batch_size)


FramedRecipe = TypeVar("FramedRecipe", bound=FramedAttributeRecipe)


class FramedAttributeTask(AttributeTask[FramedRecipe]):
    """An attribute classifier of FFHQ crops; attributes that few have count as much as common ones."""

    def __init__(self, recipe: FramedRecipe, context: TrainingContext) -> None:
        super().__init__(recipe, context)
        self.frames = ffhq_frames(self.data.landmarks(), recipe.synthetic.size_px)
        self.validation_frames = ffhq_frames(self.validation.landmarks(), recipe.synthetic.size_px)
        shown = torch.from_numpy(self.data.attributes[..., self.columns]).float().mean((0, 1))
        self.share = shown.clamp(_RAREST, 1 - _RAREST)

    def look(self, image: Tensor, person: NDArray[Any], generator: torch.Generator) -> Tensor:
        recipe, count = self.recipe, len(image)
        grid = random_warp(count, recipe.network.size_px, generator, recipe.warp_strength)
        image = warp_image(image, framed(grid, self.frames[person]))
        mirrored = torch.rand(count, generator=generator) < 0.5
        image[mirrored] = image[mirrored].flip(-1)
        # No grey pictures: they would teach that a hair colour can be told without its colour.
        return photograph((image + 1) / 2, generator, grey_share=0.0) * 2 - 1

    def plain_look(self, image: Tensor, person: NDArray[Any]) -> Tensor:
        side = self.recipe.network.size_px
        grid = F.affine_grid(self.validation_frames[person], [len(image), 3, side, side], align_corners=False)
        return warp_image(image, grid)

    def attribute_weight(self, attributes: Tensor) -> Tensor:
        return 0.5 / torch.where(attributes > 0.5, self.share, 1 - self.share)


class AttributeTreeTask(FramedAttributeTask[AttributeTreeRecipe]):
    """MaskFaceGAN's own classifier."""

    recipe_class = AttributeTreeRecipe
    kind = "attribute-tree"


class AttributeCNNTask(FramedAttributeTask[AttributeCNNRecipe]):
    """The VGG and ResNet classifiers of its component analysis."""

    recipe_class = AttributeCNNRecipe
    kind = "attribute-cnn"
