# SPDX-License-Identifier: Apache-2.0
"""What the training of every attribute classifier shares: families of counterfactuals, losses, scores, export.

Synthetic portraits give exact labels for free; counterfactual families give every attribute as often present as absent
on otherwise equal people, so a classifier cannot lean on what attributes happen to go together.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faceedit.attributes import attribute_index
from faceedit.networks import network_kind
from faceedit.training import cache, losses
from faceedit.training.config import AdamConfig, Recipe, require
from faceedit.training.data import SyntheticConfig, SyntheticPortraits
from faceedit.training.sheets import image_sheet
from faceedit.training.synthetic import SUPPORTED_ATTRIBUTES
from faceedit.training.task import Report, Task, TrainingContext, start_from

# What a region of random colour no longer says.
_COLOUR_ATTRIBUTES = frozenset(
    {"Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair", "Pale_Skin", "Wearing_Lipstick", "Rosy_Cheeks", "Young"}
    | {"Heavy_Makeup"}
)


@dataclass(frozen=True, slots=True)
class AttributeRecipe(Recipe):
    """What every recipe of an attribute classifier has; `network` is each one's own configuration, whose `attributes`
    have to be ones that synthetic portraits show. `initial_weights` goes on from an exported or registered classifier.
    """

    network: Any = None
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)
    adam: AdamConfig = field(default_factory=AdamConfig)
    batch_size: int = 32
    validation_people: int = 100
    initial_weights: str | None = None

    def __post_init__(self) -> None:
        require(self.batch_size > 0, "batch_size", "positive", self.batch_size)
        require(self.validation_people > 0, "validation_people", "positive", self.validation_people)
        names = self.network.attributes
        require(len(names) > 0, "network.attributes", "one or more names", list(names))
        require(len(set(names)) == len(names), "network.attributes", "names that differ", list(names))
        # Always absent in drawings: a network that never finds them would be reported as perfect.
        unseen = [name for name in names if name not in SUPPORTED_ATTRIBUTES]
        require(not unseen, "network.attributes", "ones that synthetic portraits show", unseen)


A = TypeVar("A", bound=AttributeRecipe)


class AttributeTask(Task[A], Generic[A]):
    """Network "classifier" (averaged, exported), of the weights kind `kind`."""

    kind: ClassVar[str]

    def __init__(self, recipe: A, context: TrainingContext) -> None:
        super().__init__(recipe, context)
        self.data, self.validation = _load_data(recipe, lambda line: None)
        self.columns = [attribute_index(name) for name in recipe.network.attributes]
        self.readable_when_tinted = torch.tensor(
            [float(name not in _COLOUR_ATTRIBUTES) for name in recipe.network.attributes]
        )
        network = network_kind(self.kind).classes()[1](recipe.network)
        start_from(network, recipe.initial_weights)
        self.network = context.add_network("classifier", network, recipe.adam, average=True)

    @classmethod
    def prepare(cls, recipe: A, *, report: Report = print) -> None:
        _load_data(recipe, report)

    @abstractmethod
    def look(self, image: Tensor, person: NDArray[Any], generator: torch.Generator) -> Tensor:
        """Rendered images N×3×R×R of these training people as the network sees them in training: changed at random."""

    def plain_look(self, image: Tensor, person: NDArray[Any]) -> Tensor:
        """Rendered images N×3×R×R of these validation people as the network is to see them, unchanged."""
        del person
        return image

    def attribute_weight(self, attributes: Tensor) -> Tensor:
        """How much each answer N×A counts."""
        return torch.ones_like(attributes)

    def batch(self, step: int) -> dict[str, Tensor]:
        recipe, generator = self.recipe, self.context.generator("batch", step)
        count = recipe.batch_size
        # Whole families: members that differ in one bit stand side by side, so only that bit explains the difference.
        members = recipe.synthetic.variants + 1
        family = torch.randint(len(self.data), (-(-count // members),), generator=generator).numpy()
        person, member = family.repeat(members)[:count], np.tile(np.arange(members), len(family))[:count]
        pixels = np.stack([self.data.images[p, m] for p, m in zip(person, member, strict=True)])
        image = self.look(cache.unpack_image(pixels), person, generator)
        attributes = torch.from_numpy(self.data.attributes[person, member][:, self.columns]).float()
        tinted = torch.from_numpy(self.data.tinted[person]).float()
        weight = self.attribute_weight(attributes) * (1 - tinted * (1 - self.readable_when_tinted))
        return {"image": image, "attributes": attributes, "weight": weight}

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        logits = self.network(batch["image"]).float()
        loss = losses.attribute_bce(logits, batch["attributes"], batch["weight"])
        self.context.minimise("classifier", loss)
        right = ((logits > 0) == (batch["attributes"] > 0.5)).float()
        return {"loss": loss.detach(), "accuracy": (right * batch["weight"]).sum() / batch["weight"].sum()}

    def sample_sheet(self) -> Tensor:
        """Five people, each as rendered and as training sees them five times."""
        count = min(5, len(self.data))
        generator = self.context.generator("sheet", 0)
        image, person = cache.unpack_image(self.data.images[:count, 0]), np.arange(count)
        looks = [self.look(image.clone(), person, generator) for _ in range(5)]
        side = looks[0].shape[-1]
        return image_sheet([torch.nn.functional.interpolate(image, (side, side), mode="area"), *looks])

    def validate(self) -> dict[str, float]:
        """`accuracy` over all members, mean over attributes; `accuracy_<attribute>`; and `flip`, the share of
        counterfactual pairs whose changed bit is read right on both sides."""
        predicted, truth = [], []
        for start in range(0, len(self.validation), 16):
            images = self.validation.images[start : start + 16]
            members = images.shape[1]
            flat = cache.unpack_image(images.reshape(-1, *images.shape[2:]))
            seen = self.plain_look(flat, np.arange(start, start + len(images)).repeat(members))
            predicted.append(self._probabilities(seen).reshape(len(images), members, -1) > 0.5)
            truth.append(torch.from_numpy(self.validation.attributes[start : start + 16][..., self.columns]) > 0)
        seen, known = torch.cat(predicted), torch.cat(truth)
        right = seen == known
        accuracy = right.float().mean(dim=(0, 1))
        result = {"accuracy": accuracy.mean().item()}
        result |= {f"accuracy_{name}": accuracy[i].item() for i, name in enumerate(self.recipe.network.attributes)}
        changed = known[:, 1:] != known[:, :1]
        if changed.any():
            both = right[:, 1:] & right[:, :1]
            result["flip"] = both[changed].float().mean().item()
        return result

    def _probabilities(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            return self.context.best("classifier").eval()(image.to(self.context.device)).float().sigmoid().cpu()

    def export(self, path: Path, metrics: dict[str, float]) -> None:
        self.write_weights(
            path,
            self.kind,
            self.recipe.network,
            self.context.best("classifier"),
            training_data=f"families of {len(self.data)} synthetic people",
            attributes=self.recipe.network.attributes,
            metrics=metrics,
        )


def _load_data(recipe: AttributeRecipe, report: Report) -> tuple[SyntheticPortraits, SyntheticPortraits]:
    data = SyntheticPortraits(recipe.synthetic, "train", report)
    held_out = replace(recipe.synthetic, people=recipe.validation_people, tinted_share=0.0, seed_offset=0)
    return data, SyntheticPortraits(held_out, "validation", report)
