# SPDX-License-Identifier: Apache-2.0
"""The tasks `deeplab`, `fcn` and `region-unet`: parsers that guide MaskFaceGAN's edits.

Portraits with exact labels, recoloured, framed as FFHQ's alignment frames them, turned, covered and photographed; the
nineteen classes of CelebAMask-HQ become those of the network's scheme at the end. Paper: synthetic
pictures too, DatasetGAN's, with flips and affine transforms, Adam at 3e-4.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ, convert_labels, scheme
from faceedit.networks import network_kind
from faceedit.networks.deeplab import DeepLabConfig
from faceedit.networks.fcn import FCNConfig
from faceedit.networks.region_unet import RegionUNetConfig
from faceedit.training.config import AdamConfig, require
from faceedit.training.degradation import (
    flip_some,
    occlude,
    photograph,
    random_warp,
    recolour_regions,
    warp_image,
    warp_labels,
)
from faceedit.training.framing import ffhq_frames, framed
from faceedit.training.labelled_portraits import LabelledPortraits, labelled_portraits
from faceedit.training.segmentation import (
    SegmentationRecipe,
    class_weights,
    dice_loss,
    overlay_sheet,
    segmentation_scores,
)
from faceedit.training.synthetic.geometry import face_points
from faceedit.training.task import Report, Task, TrainingContext, start_from

# Cross-entropy weight by class: thin parts would otherwise be bought off by hair and ground.
_WEIGHTS = {"eyebrows": 2.0, "eyes": 2.5, "mouth": 2.0, "nose": 1.2}


@dataclass(frozen=True, slots=True)
class RegionParserRecipe(SegmentationRecipe):
    """What every recipe of a region parser has.

    `render_px` is the side of the rendered portraits, of which FFHQ's square is about 0.8 wide; `warp_strength` that of
    `random_warp`: how far an aligner may be off.
    """

    optimizer: AdamConfig = field(default_factory=lambda: AdamConfig(rate=3e-4, beta1=0.9))
    render_px: int = 640
    warp_strength: float = 0.5

    def __post_init__(self) -> None:
        SegmentationRecipe.__post_init__(self)
        require(self.batch > 1, "batch", "above 1: normalisation needs more than one sample", self.batch)
        require(self.render_px >= 16, "render_px", "at least 16", self.render_px)
        require(self.warp_strength >= 0, "warp_strength", "not negative", self.warp_strength)


@dataclass(frozen=True, slots=True)
class DeepLabRecipe(RegionParserRecipe):
    """A `task: deeplab` recipe."""

    network: DeepLabConfig = field(default_factory=DeepLabConfig)


@dataclass(frozen=True, slots=True)
class FCNRecipe(RegionParserRecipe):
    """A `task: fcn` recipe."""

    network: FCNConfig = field(default_factory=FCNConfig)


@dataclass(frozen=True, slots=True)
class RegionUNetRecipe(RegionParserRecipe):
    """A `task: region-unet` recipe."""

    network: RegionUNetConfig = field(default_factory=RegionUNetConfig)


P = TypeVar("P", bound=RegionParserRecipe)


class RegionParserTask(Task[P], Generic[P]):
    """Network "parser" (averaged, exported), of the weights kind `kind`."""

    kind: ClassVar[str]

    def __init__(self, recipe: P, context: TrainingContext) -> None:
        super().__init__(recipe, context)
        network = network_kind(self.kind).classes()[1](recipe.network)
        start_from(network, recipe.initial_weights)
        self.net = context.add_network("parser", network, recipe.optimizer, average=True)
        self.scheme = scheme(recipe.network.label_scheme)
        self.people, self.test = _load_data(recipe, lambda line: None)
        self.frames, self.test_frames = (
            ffhq_frames(face_points(data.people, recipe.render_px), recipe.render_px)
            for data in (self.people, self.test)
        )
        self.class_weights = class_weights(self.scheme, _WEIGHTS).to(context.device)

    @classmethod
    def prepare(cls, recipe: P, *, report: Report = print) -> None:
        _load_data(recipe, report)

    def batch(self, step: int) -> dict[str, Tensor]:
        recipe, generator = self.recipe, self.context.generator("parser", step)
        rows = torch.randint(len(self.people), (recipe.batch,), generator=generator).tolist()
        image, labels = self.people.read(rows)
        image = recolour_regions((image + 1) / 2, labels, generator)
        grid = random_warp(recipe.batch, recipe.network.size_px, generator, recipe.warp_strength)
        grid = framed(grid, self.frames[rows])
        image, labels = flip_some(warp_image(image, grid), generator, warp_labels(labels, grid))
        image, labels = occlude(image, labels, generator)
        labels = convert_labels(labels, CELEBAMASK_HQ, self.scheme)
        return {"image": photograph(image, generator) * 2 - 1, "labels": labels}

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        self.net.train()
        logits = self.net(batch["image"]).float().contiguous()
        entropy = F.cross_entropy(logits, batch["labels"], self.class_weights)
        overlap = dice_loss(logits, batch["labels"])
        self.context.minimise("parser", entropy + self.recipe.overlap * overlap, clip_norm=5.0)
        right = (logits.detach().argmax(1) == batch["labels"]).float().mean()
        return {"loss": entropy.detach(), "overlap": overlap.detach(), "accuracy": right}

    def test_batch(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Unseen people in FFHQ's frame, as rendered: images N×3×S×S and labels N×S×S of the network's scheme."""
        side = self.recipe.network.size_px
        image, labels = self.test.read(rows)
        grid = F.affine_grid(self.test_frames[rows], [len(rows), 3, side, side], align_corners=False)
        return warp_image(image, grid), convert_labels(warp_labels(labels, grid), CELEBAMASK_HQ, self.scheme)

    def validate(self) -> dict[str, float]:
        """`mean_iou` and `iou_<class>` on unseen people, as rendered."""
        batches = (self.test_batch(rows) for rows in self.test.chunks(8))
        return segmentation_scores(self.context.best("parser").eval(), batches, self.scheme, self.context.device)

    def sample_sheet(self) -> Tensor:
        """Degraded people and unseen ones, each above its parse."""
        count = min(8, self.recipe.batch, len(self.test))
        images = [self.batch(0)["image"][:count].cpu(), self.test_batch(list(range(count)))[0]]
        return overlay_sheet(self.context.best("parser").eval(), images, self.scheme, self.context.device)

    def export(self, path: Path, metrics: dict[str, float]) -> None:
        self.write_weights(
            path,
            self.kind,
            self.recipe.network,
            self.context.best("parser"),
            training_data="synthetic portraits rendered by this project",
            label_scheme=self.scheme.name,
            metrics=metrics,
        )


class DeepLabTask(RegionParserTask[DeepLabRecipe]):
    """MaskFaceGAN's own parser."""

    recipe_class = DeepLabRecipe
    kind = "deeplab-parser"


class FCNTask(RegionParserTask[FCNRecipe]):
    """The FCN of its component analysis."""

    recipe_class = FCNRecipe
    kind = "fcn-parser"


class RegionUNetTask(RegionParserTask[RegionUNetRecipe]):
    """The U-Net of its component analysis."""

    recipe_class = RegionUNetRecipe
    kind = "region-unet-parser"


def _load_data(recipe: RegionParserRecipe, report: Report) -> tuple[LabelledPortraits, LabelledPortraits]:
    def load(split: str, people: int) -> LabelledPortraits:
        return labelled_portraits(split, people, recipe.render_px, recipe.cache_dir, report)

    return load("train", recipe.people), load("test", recipe.test_people)
