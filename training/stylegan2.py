# SPDX-License-Identifier: Apache-2.0
"""The `stylegan2` task: StyleGAN2 (Karras et al. 2020) with adaptive discriminator augmentation.

One step: the generator against the critic (non-saturating logistic loss, mixed styles), its path lengths on every
`path_length.every`-th step; then the critic, and R1 on every `r1.every`-th. Lazy terms are optimiser steps of their own
and weigh `every` times as much; Adam's rate and betas are corrected for these extra steps (appendix B).
What differs from the published code, and why: styles are mixed at a point of each image's own, not of the batch's; the
average w is not tracked while training but measured on the averaged mapping network, where it is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from faceedit.networks.stylegan2 import (
    Precision,
    StyleGAN2Config,
    StyleGAN2Discriminator,
    StyleGAN2DiscriminatorConfig,
    StyleGAN2Generator,
)
from faceedit.training import losses
from faceedit.training.adaptive_augmentation import (
    AdaptiveProbability,
    Augmentation,
    AugmentationConfig,
    count_signs,
    draw_augmentation,
)
from faceedit.training.aligned import AlignedConfig, AlignedFaces
from faceedit.training.config import AdamConfig, Recipe, require, require_float32_weights
from faceedit.training.ema import HalfLife
from faceedit.training.fid import FID, feature_network, generated_images
from faceedit.training.sheets import image_sheet
from faceedit.training.task import Report, Task, TrainingContext

_SHEET_ROWS, _SHEET_COLUMNS = 4, 8
_SHEET_TRUNCATION = 0.7
_AVERAGE_SAMPLES = 50_000
_HALF: dict[str, Literal["bfloat16", "float16"]] = {"bf16-mixed": "bfloat16", "16-mixed": "float16"}


@dataclass(frozen=True, slots=True)
class R1Config:
    """γ/2 · E ‖∇D(x)‖² on real images, on every `every`-th step (0: never)."""

    gamma: float = 10.0
    every: int = 16

    def __post_init__(self) -> None:
        require(self.gamma >= 0, "r1.gamma", "0 or more", self.gamma)
        require(self.every >= 0, "r1.every", "0 or more", self.every)


@dataclass(frozen=True, slots=True)
class PathLengthConfig:
    """weight · E (‖Jᵀy‖ − a)², on every `every`-th step (0: never) and `batch_share` of the batch.

    a follows the mean length by `decay`.
    """

    weight: float = 2.0
    every: int = 4
    batch_share: float = 0.5
    decay: float = 0.01

    def __post_init__(self) -> None:
        require(self.weight >= 0, "path_length.weight", "0 or more", self.weight)
        require(self.every >= 0, "path_length.every", "0 or more", self.every)
        require(0 < self.batch_share <= 1, "path_length.batch_share", "in (0, 1]", self.batch_share)
        require(0 < self.decay <= 1, "path_length.decay", "in (0, 1]", self.decay)


@dataclass(frozen=True, slots=True)
class AverageConfig:
    """The averaged generator: half-life in thousands of images, at most `ramp_up` of the images seen."""

    half_life_kimg: float = 10.0
    ramp_up: float = 0.05

    def __post_init__(self) -> None:
        require(self.half_life_kimg > 0, "average.half_life_kimg", "positive", self.half_life_kimg)
        require(self.ramp_up >= 0, "average.ramp_up", "0 or more", self.ramp_up)


@dataclass(frozen=True, slots=True)
class FIDConfig:
    """Validation: `images` made ones against as many of the training images; network as in fid.feature_network."""

    images: int = 2000
    network: str = "auto"

    def __post_init__(self) -> None:
        require(self.images > 1, "fid.images", "2 or more", self.images)


def _adam() -> AdamConfig:
    return AdamConfig(rate=0.002, beta1=0.0, beta2=0.99, decay_from=1.0)


@dataclass(frozen=True, slots=True)
class StyleGAN2Recipe(Recipe):
    """A `task: stylegan2` recipe; the defaults are config F for FFHQ at 1024 px.

    `batch_size` is one device's. With a mixed `trainer.precision`, layers of `mixed_from_px` and more run in half
    precision. `average` takes the place of `trainer.ema_decay`.
    """

    generator: StyleGAN2Config = field(default_factory=StyleGAN2Config)
    critic: StyleGAN2DiscriminatorConfig = field(default_factory=StyleGAN2DiscriminatorConfig)
    images: AlignedConfig = field(default_factory=AlignedConfig)
    batch_size: int = 32
    style_mixing: float = 0.9
    mixed_from_px: int = 64
    r1: R1Config = field(default_factory=R1Config)
    path_length: PathLengthConfig = field(default_factory=PathLengthConfig)
    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    generator_adam: AdamConfig = field(default_factory=_adam)
    critic_adam: AdamConfig = field(default_factory=_adam)
    fid: FIDConfig = field(default_factory=FIDConfig)

    def __post_init__(self) -> None:
        size, group = self.generator.size_px, self.critic.group_size
        require(self.critic.size_px == size, "critic.size_px", f"generator.size_px = {size}", self.critic.size_px)
        require(self.images.size_px == size, "images.size_px", f"generator.size_px = {size}", self.images.size_px)
        require(self.batch_size > 0, "batch_size", "positive", self.batch_size)
        fits = self.batch_size <= group or self.batch_size % group == 0
        require(fits, "batch_size", f"a multiple of critic.group_size = {group}", self.batch_size)
        require(0 <= self.style_mixing <= 1, "style_mixing", "in [0, 1]", self.style_mixing)
        require_float32_weights(self.trainer)


class Unrounded:
    """Tensors on their way into a forward pass. Under mixed precision Fabric rounds bare ones to half, not these.

    The networks here know which of their layers run in half precision, so that autocast is off inside.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors


class TrainedGenerator(nn.Module):
    """A generator and its mean path length. Every pass of a step is one call, as data-parallel training needs.

    Args:    latents, z (N,Z), other (N,Z) and crossover (N), how many layers have z's style, where the rest have
             other's; path, directions (N,3,S,S) along which path lengths are wanted, or None.
    Returns: images (N,3,S,S) with random noise; with path, the lengths N instead, joined to every weight.
    """

    mean_length: Tensor

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.network = StyleGAN2Generator(config)
        self.register_buffer("mean_length", torch.zeros(()))

    def forward(self, latents: Unrounded, path: Unrounded | None = None) -> Tensor:
        z, other, crossover = latents.tensors
        layers = torch.arange(self.network.config.num_ws, device=z.device)
        with torch.autocast(z.device.type, enabled=False):
            is_first = (layers < crossover[:, None])[:, :, None]
            ws = torch.where(is_first, self.network.mapping(z), self.network.mapping(other))
            image = self.network.synthesis(ws, noise="random")
            if path is None:
                return image
            return losses.path_lengths(image, ws, path.tensors[0]) + 0 * image.flatten(1).mean(1)


class TrainedCritic(nn.Module):
    """A discriminator and the augmentation's state. Every pass of a step is one call.

    Args:    images, real and made ones (N,3,S,S), augmented already; or real ones alone, and what augments them.
    Returns: logits (N,1) of both; of real alone, its logits and their squared slopes N before augmentation.
    """

    def __init__(self, config: StyleGAN2DiscriminatorConfig, augmentation: AugmentationConfig) -> None:
        super().__init__()
        self.network = StyleGAN2Discriminator(config)
        self.probability = AdaptiveProbability(augmentation)

    def forward(self, images: Unrounded, augment: Callable[[Tensor], Tensor] | None = None) -> tuple[Tensor, Tensor]:
        real, *made = images.tensors
        with torch.autocast(real.device.type, enabled=False):
            if augment is None:
                return self.network(real), self.network(made[0])
            return losses.squared_slopes(lambda x: self.network(augment(x)), real)


class StyleGAN2Task(Task[StyleGAN2Recipe]):
    """Networks "generator" (averaged, exported) and "critic"."""

    recipe_class = StyleGAN2Recipe

    def __init__(self, recipe: StyleGAN2Recipe, context: TrainingContext) -> None:
        super().__init__(recipe, context)
        self.faces = AlignedFaces(recipe.images, lambda line: None)
        self.batch_images = recipe.batch_size * context.fabric.world_size
        half_life = HalfLife(recipe.average.half_life_kimg * 1000, self.batch_images, recipe.average.ramp_up)
        generator = TrainedGenerator(recipe.generator)
        critic = TrainedCritic(recipe.critic, recipe.augmentation)
        half = _HALF.get(str(context.fabric.strategy.precision.precision))  # what the device can, not what was asked
        if half is not None:
            precision = Precision(half, recipe.mixed_from_px)
            generator.network.synthesis.precision = critic.network.precision = precision
        adam = lazy_adam(recipe.generator_adam, recipe.path_length.every)
        self.generator = context.add_network("generator", generator, adam, average=half_life)
        self.critic = context.add_network("critic", critic, lazy_adam(recipe.critic_adam, recipe.r1.every))
        self.bare_generator, self.bare_critic = generator, critic
        self._fid: FID | None = None

    @classmethod
    def prepare(cls, recipe: StyleGAN2Recipe, *, report: Report = print) -> None:
        feature_network(recipe.fid.network)  # or validation would miss it hours later
        faces = AlignedFaces(recipe.images, report)
        require(len(faces) > 1, "images", "two or more, as FID needs", len(faces))

    def batch(self, step: int) -> dict[str, Tensor]:
        generator = self.context.generator("images", step)
        return {"image": self.faces.sample(self.recipe.batch_size, generator)}

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        recipe = self.recipe
        scalars = self._train_generator(step)
        if recipe.path_length.every and step % recipe.path_length.every == 0:
            scalars |= self._regularise_generator(step)
        scalars |= self._train_critic(batch["image"], step)
        if recipe.r1.every and step % recipe.r1.every == 0:
            scalars |= self._regularise_critic(batch["image"], step)
        scalars |= self._adapt(step)
        return scalars

    def _latents(self, stream: str, step: int, count: int) -> Unrounded:
        """z, other z, and where styles change over: after all layers, but for a share `style_mixing` of the images."""
        generator = self.context.generator(stream, step)
        layers = self.recipe.generator.num_ws
        z, other = torch.randn(2, count, self.recipe.generator.z_width, generator=generator)
        point = torch.randint(1, layers, (count,), generator=generator)
        is_mixed = torch.rand(count, generator=generator) < self.recipe.style_mixing
        device = self.context.device
        return Unrounded(z.to(device), other.to(device), torch.where(is_mixed, point, layers).to(device))

    def _directions(self, step: int, count: int) -> Tensor:
        side = self.recipe.generator.size_px
        return torch.randn(count, 3, side, side, generator=self.context.generator("path", step))

    def _augment(self, stream: str, step: int) -> Augmentation:
        recipe = self.recipe
        generator = self.context.generator(stream, step)
        probability = self.bare_critic.probability.value
        return draw_augmentation(
            recipe.augmentation, probability, recipe.batch_size, recipe.generator.size_px, generator
        )

    def _train_generator(self, step: int) -> dict[str, Tensor]:
        made = self.generator(self._latents("generator latents", step, self.recipe.batch_size))
        seen = self._augment("generator augmentation", step).apply(made)
        # The bare critic: its weights get no update here, so its gradients need no synchronisation either.
        with _frozen(self.bare_critic), torch.autocast(seen.device.type, enabled=False):
            loss = losses.logistic_generator_loss(self.bare_critic.network(seen))
        self.context.minimise("generator", loss)
        return {"generator": loss.detach()}

    def _regularise_generator(self, step: int) -> dict[str, Tensor]:
        config = self.recipe.path_length
        count = max(1, int(self.recipe.batch_size * config.batch_share))
        latents, directions = self._latents("path latents", step, count), self._directions(step, count)
        lengths = self.generator(latents, Unrounded(directions.to(self.context.device)))
        mean = self.context.mean_over_devices(lengths.mean())
        length = torch.lerp(self.bare_generator.mean_length, mean, config.decay)
        penalty = (lengths - length).square().mean()
        self.context.minimise("generator", config.weight * config.every * penalty)
        self.bare_generator.mean_length.copy_(length)
        return {"path_length": mean, "path_penalty": penalty.detach()}

    def _train_critic(self, image: Tensor, step: int) -> dict[str, Tensor]:
        with torch.no_grad():
            made = self.generator(self._latents("critic latents", step, len(image)))
            made = self._augment("made augmentation", step).apply(made)
            real = self._augment("real augmentation", step).apply(image)
        of_real, of_made = self.critic(Unrounded(real, made))
        loss = losses.logistic_critic_loss(of_real, of_made)
        self.context.minimise("critic", loss)
        self.bare_critic.probability.observe(self.context.sum_over_devices(count_signs(of_real)))
        scalars = {"critic": loss, "logit_real": of_real.mean(), "logit_made": of_made.mean()}
        return {name: value.detach() for name, value in scalars.items()}

    def _regularise_critic(self, image: Tensor, step: int) -> dict[str, Tensor]:
        config = self.recipe.r1
        augment = self._augment("real augmentation", step).apply
        logits, slopes = self.critic(Unrounded(image), augment)
        penalty = slopes.mean()
        # The last bias has no part in a slope; data-parallel training wants a gradient of every weight.
        self.context.minimise("critic", config.gamma / 2 * config.every * penalty + 0 * logits.mean())
        return {"r1": penalty.detach()}

    def _adapt(self, step: int) -> dict[str, Tensor]:
        """Move the augmentation's probability on every `augmentation.every`-th step."""
        adaptive, every = self.bare_critic.probability, self.recipe.augmentation.every
        scalars = {"augmentation": torch.tensor(adaptive.value)}
        if (step + 1) % every == 0:
            scalars["sign_real"] = torch.tensor(adaptive.move(self.batch_images * every))
        return scalars

    def _best(self) -> StyleGAN2Generator:
        """The averaged generator, with the mean of its own mapping network as its average w."""
        network = cast(TrainedGenerator, self.context.best("generator")).network.eval()
        network.mapping.average.copy_(network.mapping.estimate_average(_AVERAGE_SAMPLES))
        return network

    def sample_sheet(self) -> Tensor:
        """Thirty-two fixed latents, truncated by 0.7, with the stored noise."""
        draws = torch.Generator().manual_seed(self.recipe.trainer.seed)
        network, columns = self._best(), []
        for _ in range(_SHEET_COLUMNS):
            z = torch.randn(_SHEET_ROWS, self.recipe.generator.z_width, generator=draws)
            columns.append(network(z.to(self.context.device), truncation=_SHEET_TRUNCATION))
        return image_sheet(columns)

    def validate(self) -> dict[str, float]:
        """FID of the averaged generator, without truncation, against the training images; the key names the network."""
        config = self.recipe.fid
        if self._fid is None:
            network = feature_network(config.network, self.context.device)
            self._fid = FID(network, self.faces.batches(config.images))
        result = self._fid.of(generated_images(self._best(), config.images, self.recipe.trainer.seed))
        return {result.key: result.value}

    def export(self, path: Path, metrics: dict[str, float]) -> None:
        self.write_weights(
            path,
            "stylegan2",
            self.recipe.generator,
            self._best(),
            training_data=self.faces.description,
            metrics=metrics,
        )


def lazy_adam(adam: AdamConfig, every: int) -> AdamConfig:
    """Adam for a network whose regulariser takes a step of its own after every `every`-th step (0: none).

    every + 1 steps are then to do what `every` did: rate · c and beta^c with c = every / (every + 1). Source: Karras et
    al. 2020, appendix B.
    """
    if every == 0:
        return adam
    share = every / (every + 1)
    return replace(adam, rate=adam.rate * share, beta1=adam.beta1**share, beta2=adam.beta2**share)


@contextmanager
def _frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for the module's weights inside the block."""
    module.requires_grad_(False)
    try:
        yield
    finally:
        module.requires_grad_(True)
