# SPDX-License-Identifier: Apache-2.0
"""What the training of every face parser shares: fields of its recipe, a loss, scores and pictures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from faceedit.labels import LabelScheme
from faceedit.training import cache
from faceedit.training.config import AdamConfig, Recipe, require

TEST_PEOPLE = 96
"""Synthetic people that a parser is judged on."""


@dataclass(frozen=True, slots=True)
class SegmentationRecipe(Recipe):
    """What every recipe of a face parser has; `network` is each one's own configuration.

    `overlap` weighs the Dice term; `initial_weights` goes on from an exported or registered parser.
    """

    network: Any = None
    optimizer: AdamConfig = field(default_factory=AdamConfig)
    people: int = 7200
    batch: int = 12
    test_people: int = TEST_PEOPLE
    overlap: float = 0.5
    initial_weights: str | None = None
    cache_dir: Path | None = None

    def __post_init__(self) -> None:
        require(self.batch > 0, "batch", "positive", self.batch)
        require(self.people > 0 and self.test_people > 0, "people", "positive", (self.people, self.test_people))
        require(self.overlap >= 0, "overlap", "not negative", self.overlap)


def class_weights(scheme: LabelScheme, weights: Mapping[str, float]) -> Tensor:
    """Weights of classes by id; those that are not named weigh 1."""
    return torch.tensor([weights.get(name, 1.0) for name in scheme.classes])


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 − 2|P∩T|/(|P|+|T|), mean over the classes that a batch shows (Milletari et al. 2016): an ear-ring counts as
    much as the hair.

    Args: logits N×C×H×W, labels N×H×W int64.
    """
    probability = logits.softmax(1)
    shown = torch.zeros_like(probability).scatter_(1, labels[:, None], 1)
    truth = shown.sum((0, 2, 3))
    dice = 2 * (probability * shown).sum((0, 2, 3)) / (probability.sum((0, 2, 3)) + truth).clamp_min(1)
    return 1 - (dice * (truth > 0)).sum() / (truth > 0).sum()  # no index: a GPU would be waited for


@torch.no_grad()
def segmentation_scores(
    network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], scheme: LabelScheme, device: torch.device
) -> dict[str, float]:
    """IoU of each class that occurs (`iou_<class>`) and their mean (`mean_iou`), over all pixels of all batches.

    Args:    network maps images N×3×S×S to logits N×C×S×S; batches of such images and int64 labels N×S×S in scheme.
    """
    count = scheme.num_classes
    matrix = torch.zeros(count, count, dtype=torch.int64)
    for image, truth in batches:
        predicted = network(image.to(device)).argmax(1).cpu()
        matrix += torch.bincount((truth * count + predicted).flatten(), minlength=count**2).view(count, count)
    scores, present = intersection_over_union(matrix), matrix.sum(1) > 0
    named = {f"iou_{name}": scores[i].item() for i, name in enumerate(scheme.classes) if present[i]}
    return {"mean_iou": scores[present].mean().item(), **named}


def intersection_over_union(matrix: Tensor) -> Tensor:
    """IoU by class of a confusion matrix K×K (rows are the truth)."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - matrix.diagonal()).clamp(min=1)


@torch.no_grad()
def overlay_sheet(network: nn.Module, batches: Iterable[Tensor], scheme: LabelScheme, device: torch.device) -> Tensor:
    """Rows of (image, image under the colours of its parse), uint8 H×W×3, from batches N×3×S×S of one N and S."""
    rows = []
    for image in batches:
        labels = network(image.to(device)).argmax(1).cpu().numpy()
        colours = torch.from_numpy(np.stack([scheme.colorize(one) for one in labels]))
        pixels = torch.from_numpy(cache.pack_image(image))
        mixed = (pixels.float() * 0.45 + colours.float() * 0.55).to(torch.uint8)
        rows += [torch.cat(list(pixels), 1), torch.cat(list(mixed), 1)]
    return torch.cat(rows, 0)
