# SPDX-License-Identifier: Apache-2.0
"""The `classifier` task: the attribute classifier that judges edits, trained apart from every editor.

Synthetic portraits give exact labels for free; counterfactual families give every attribute as often present as absent
on otherwise equal people, so the classifier cannot lean on what attributes happen to go together. Domain randomisation
(colour, light, noise, blur, placement, and people whose regions have random colours) carries it over to photos.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.attributes import MAGGAN, attribute_index
from faceedit.networks.classifier import AttributeClassifier, AttributeClassifierConfig
from faceedit.training import cache, losses
from faceedit.training.config import AdamConfig, TrainerConfig, require
from faceedit.training.data import AugmentConfig, SyntheticConfig, SyntheticPortraits, augment_images
from faceedit.training.sheets import image_sheet
from faceedit.training.task import Report, Task, TrainingContext, start_from

# What a region of random colour no longer says.
_COLOUR_ATTRIBUTES = frozenset(
    {"Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Pale_Skin", "Wearing_Lipstick", "Rosy_Cheeks", "Young"}
    | {"Heavy_Makeup"}
)


@dataclass(frozen=True, slots=True)
class PlacementConfig:
    """Random placement and sharpness, as other aligners and cameras give: shares of the side, degrees, shares."""

    shift: float = 0.04
    scale: float = 0.08
    degrees: float = 5.0
    blur_share: float = 0.3


@dataclass(frozen=True, slots=True)
class ClassifierRecipe:
    """A `task: classifier` recipe. `initial_weights` goes on from an exported or registered classifier."""

    task: str
    trainer: TrainerConfig
    description: str = ""
    network: AttributeClassifierConfig = field(default_factory=AttributeClassifierConfig)
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    placement: PlacementConfig = field(default_factory=PlacementConfig)
    adam: AdamConfig = field(default_factory=AdamConfig)
    batch_size: int = 32
    validation_people: int = 100
    initial_weights: str | None = None

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "batch_size", "positive", self.batch_size)
        require(
            self.synthetic.size_px == self.network.size_px,
            "synthetic.size_px",
            f"network.size_px = {self.network.size_px}",
            self.synthetic.size_px,
        )


class ClassifierTask(Task[ClassifierRecipe]):
    """Network "classifier" (averaged, exported)."""

    recipe_class = ClassifierRecipe

    def __init__(self, recipe: ClassifierRecipe, context: TrainingContext) -> None:
        super().__init__(recipe, context)
        self.data, self.validation = _load_data(recipe, lambda line: None)
        self.columns = [attribute_index(name) for name in recipe.network.attributes]
        self.readable_when_tinted = torch.tensor(
            [float(name not in _COLOUR_ATTRIBUTES) for name in recipe.network.attributes]
        )
        network = AttributeClassifier(recipe.network)
        start_from(network, recipe.initial_weights)
        self.network = context.add_network("classifier", network, recipe.adam, average=True)

    @classmethod
    def prepare(cls, recipe: ClassifierRecipe, *, report: Report = print) -> None:
        _load_data(recipe, report)

    def batch(self, step: int) -> dict[str, Tensor]:
        recipe, generator = self.recipe, self.context.generator("batch", step)
        count = recipe.batch_size
        # Whole families: members that differ in one bit stand side by side, so only that bit explains the difference.
        members = recipe.synthetic.variants + 1
        family = torch.randint(len(self.data), (-(-count // members),), generator=generator).numpy()
        person, member = family.repeat(members)[:count], np.tile(np.arange(members), len(family))[:count]
        pixels = np.stack([self.data.images[p, m] for p, m in zip(person, member, strict=True)])
        mirrored = (torch.rand(count, generator=generator) < 0.5).numpy() & recipe.augment.flip
        pixels[mirrored] = pixels[mirrored][..., ::-1, :]
        image = augment_images([cache.unpack_image(pixels)], recipe.augment, generator)[0]
        image = place_at_random(image, recipe.placement, generator)
        attributes = torch.from_numpy(self.data.attributes[person, member][:, self.columns]).float()
        tinted = torch.from_numpy(self.data.tinted[person]).float()
        weight = 1 - tinted * (1 - self.readable_when_tinted)
        return self.context.to_device({"image": image, "attributes": attributes, "weight": weight})

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        logits = self.network(batch["image"]).float()
        loss = losses.attribute_bce(logits, batch["attributes"], batch["weight"])
        self.context.minimise("classifier", loss)
        right = ((logits > 0) == (batch["attributes"] > 0.5)).float()
        return {"loss": loss.detach(), "accuracy": (right * batch["weight"]).sum() / batch["weight"].sum()}

    def _probabilities(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            return self.context.best("classifier").eval()(image.to(self.context.device)).float().sigmoid().cpu()

    def sample_sheet(self) -> Tensor:
        """Five people, each under five random placements and colours: what the classifier learns from."""
        count = min(5, len(self.data))
        generator = self.context.generator("sheet", 0)
        image = cache.unpack_image(self.data.images[:count, 0])
        columns = [image]
        for _ in range(5):
            changed = augment_images([image], self.recipe.augment, generator)[0]
            columns.append(place_at_random(changed, self.recipe.placement, generator))
        return image_sheet(columns)

    def validate(self) -> dict[str, float]:
        """Accuracy over all members, mean over attributes; over the 13 of MagGAN; and `flip`, the share of
        counterfactual pairs whose changed bit is read right on both sides."""
        predicted, truth = [], []
        for start in range(0, len(self.validation), 16):
            images = self.validation.images[start : start + 16]
            flat = cache.unpack_image(images.reshape(-1, *images.shape[2:]))
            predicted.append(self._probabilities(flat).reshape(len(images), -1, len(self.columns)) > 0.5)
            truth.append(torch.from_numpy(self.validation.attributes[start : start + 16][..., self.columns]) > 0)
        seen, known = torch.cat(predicted), torch.cat(truth)
        right = seen == known
        accuracy = right.float().mean(dim=(0, 1))
        names = self.recipe.network.attributes
        thirteen = [accuracy[i].item() for i, name in enumerate(names) if name in MAGGAN]
        result = {"accuracy": accuracy.mean().item()}
        result |= {f"accuracy_{name}": accuracy[i].item() for i, name in enumerate(names) if name in MAGGAN}
        if thirteen:
            result["accuracy_maggan"] = sum(thirteen) / len(thirteen)
        changed = known[:, 1:] != known[:, :1]
        if changed.any():
            both = right[:, 1:] & right[:, :1]
            result["flip"] = both[changed].float().mean().item()
        return result

    def export(self, path: Path, metrics: dict[str, float]) -> None:
        from faceedit.registry import save_weights

        save_weights(
            path,
            "attribute-classifier",
            self.recipe.network,
            self.context.best("classifier").state_dict(),
            licence="Apache-2.0",
            training_data=f"families of {len(self.data)} synthetic people",
            source="faceedit",
            recipe=self.recipe.description or self.recipe.task,
            attributes=self.recipe.network.attributes,
            metrics=metrics,
        )


def place_at_random(image: Tensor, config: PlacementConfig, generator: torch.Generator) -> Tensor:
    """Rotate, scale, shift (edges repeat) and blur a share of N×3×S×S images."""
    count, side = image.shape[0], image.shape[-1]

    def draw(spread: float) -> Tensor:
        return (torch.rand(count, generator=generator) * 2 - 1) * spread

    angle, scale = draw(math.radians(config.degrees)), torch.exp(draw(config.scale))
    cos, sin = scale * torch.cos(angle), scale * torch.sin(angle)
    rows = [cos, -sin, 2 * draw(config.shift), sin, cos, 2 * draw(config.shift)]
    grid = F.affine_grid(torch.stack(rows, dim=-1).view(count, 2, 3), list(image.shape), align_corners=False)
    moved = F.grid_sample(image, grid, mode="bilinear", padding_mode="border", align_corners=False)
    blurred = torch.rand(count, generator=generator) < config.blur_share
    if blurred.any():
        small = F.interpolate(moved[blurred], size=(side // 2, side // 2), mode="area")
        moved[blurred] = F.interpolate(small, size=(side, side), mode="bilinear", align_corners=False)
    return moved


def _load_data(recipe: ClassifierRecipe, report: Callable[[str], Any]) -> tuple[SyntheticPortraits, SyntheticPortraits]:
    data = SyntheticPortraits(recipe.synthetic, "train", report)
    held_out = replace(recipe.synthetic, people=recipe.validation_people, tinted_share=0.0, seed_offset=0)
    return data, SyntheticPortraits(held_out, "validation", report)
