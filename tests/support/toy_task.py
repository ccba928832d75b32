# SPDX-License-Identifier: Apache-2.0
"""Stand-ins: a task small enough to train in a test, and a face that no parser had to find."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from faceedit.training.config import AdamConfig, Recipe
from faceedit.training.sheets import image_sheet
from faceedit.training.task import Task, TrainingContext


@dataclass(frozen=True, slots=True)
class ToyRecipe(Recipe):
    width: int = 8
    adam: AdamConfig = field(default_factory=lambda: AdamConfig(rate=0.01))
    explode_at: int = -1
    steep_at: int = -1  # the loss is finite then, its slope is not
    is_clipped: bool = True
    is_plain: bool = False  # without batch norm and dropout: a batch of two halves is then the mean of both


class ToyTask(Task[ToyRecipe]):
    """Fit a noisy line with one network while a second one learns to tell its outputs from targets."""

    recipe_class = ToyRecipe

    def __init__(self, recipe: ToyRecipe, context: TrainingContext) -> None:
        super().__init__(recipe, context)
        width = recipe.width
        between = [nn.Tanh()] if recipe.is_plain else [nn.BatchNorm2d(width), nn.Dropout(0.1)]
        layers = [nn.Conv2d(3, width, 3, padding=1), *between, nn.Conv2d(width, 3, 1)]
        self.generator = context.add_network("generator", nn.Sequential(*layers), recipe.adam, average=True)
        critic = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, 1, 1))
        self.critic = context.add_network("critic", critic, recipe.adam)

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = self.context.generator("data", step)
        return {"x": torch.rand(2, 3, 8, 8, generator=generator) * 2 - 1}

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        x = batch["x"]
        target = 0.5 * x.flip(1) - 0.2
        made = self.generator(x)
        of_target = self.critic(target)
        critic_loss = self.critic(made.detach()).mean() - of_target.mean()
        self.context.minimise("critic", critic_loss + 0.1 * of_target.square().mean())
        fit = (made - target).square().mean()
        loss = fit - 0.001 * self.critic(made).mean()
        if step == self.recipe.steep_at:
            loss = loss + (made * 0).square().sum().sqrt()
        self.context.minimise("generator", loss, clip_norm=1.0 if self.recipe.is_clipped else None)
        return {"fit": fit / 0 if step == self.recipe.explode_at else fit, "critic": critic_loss}

    def sample_sheet(self) -> Tensor:
        x = self.batch(0)["x"]
        return image_sheet([x, self.context.best("generator")(x)])

    def validate(self) -> dict[str, float]:
        x = self.batch(10**6)["x"]
        made = self.context.best("generator")(x)
        return {"error": (made - (0.5 * x.flip(1) - 0.2)).square().mean().item()}

    def export(self, path: Path, metrics: dict[str, float]) -> None:
        from safetensors.torch import save_file

        weights = {key: value.contiguous() for key, value in self.context.best("generator").state_dict().items()}
        save_file(weights, path, metadata={"error": str(metrics["error"])})


class FakeFace:
    """A random crop and soft mask in place of what the parser finds."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.crop = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
        self.mask = torch.rand(1, 19, 64, 64, generator=generator).mul(20).softmax(1)
