# SPDX-License-Identifier: Apache-2.0
"""The `e4e` task: an encoder (Tov et al. 2021) for one generator, on its own images and on faces it has never made.

Of its own images the styles are known, so a latent term joins the paper's image and delta terms. What is left out: the
adversarial term on styles, for which the known styles stand in, and the identity term, which needs a network of faces'
identity. Differences between layers come in one by one, from coarse to fine (progressive training).
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from faceedit.errors import UsageError
from faceedit.networks.e4e import E4EConfig, E4EEncoder
from faceedit.networks.resizing import resize_square
from faceedit.networks.stylegan2 import StyleGAN2Generator
from faceedit.projection import face_embedding, squared_distance
from faceedit.training.aligned import AlignedConfig, AlignedFaces
from faceedit.training.config import AdamConfig, Recipe, require
from faceedit.training.sheets import image_sheet
from faceedit.training.task import Report, Task, TrainingContext

_SHEET_ROWS = 6
_VALIDATION_SEED = 2**31  # latents that no step draws
_CHUNK = 16


@dataclass(frozen=True, slots=True)
class EncoderBatchConfig:
    """Images of one step: the generator's own, truncated by `truncation`, and faces without known styles."""

    made: int = 6
    faces: int = 2
    truncation: float = 0.8

    def __post_init__(self) -> None:
        require(self.made >= 0, "batch.made", "0 or more", self.made)
        require(self.faces >= 0, "batch.faces", "0 or more", self.faces)
        require(self.made + self.faces > 1, "batch.made + batch.faces", "two or more", self.made + self.faces)
        require(0 < self.truncation <= 1, "batch.truncation", "in (0, 1]", self.truncation)


@dataclass(frozen=True, slots=True)
class EncoderLossConfig:
    """Weights: `latent`, squared error of known styles as a share of the spread of w; `image`, distance of the image
    from its reconstruction in the embedding that ships, whose pixels weigh `pixels`; `delta`, squared differences of
    layers from w_0. With `image` 0 nothing is reconstructed."""

    latent: float = 1.0
    image: float = 1.0
    pixels: float = 4.0
    delta: float = 2e-4

    def __post_init__(self) -> None:
        for name in ("latent", "image", "pixels", "delta"):
            weight = getattr(self, name)
            require(0 <= weight < math.inf, f"losses.{name}", "0 or more", weight)


@dataclass(frozen=True, slots=True)
class ProgressiveConfig:
    """Until step `start` all layers have the style w_0; then one more gets a difference every `every` steps."""

    start: int = 0
    every: int = 1

    def __post_init__(self) -> None:
        require(self.start >= 0, "progressive.start", "0 or more", self.start)
        require(self.every > 0, "progressive.every", "positive", self.every)

    def stage_at(self, step: int, num_ws: int) -> int:
        """The last layer with a difference of its own at a step (0-based)."""
        return 0 if step < self.start else min(num_ws - 1, 1 + (step - self.start) // self.every)


@dataclass(frozen=True, slots=True)
class E4ERecipe(Recipe):
    """A `task: e4e` recipe. `generator` names stylegan2 weights, or their path; `images` are the faces."""

    generator: str
    network: E4EConfig = field(default_factory=E4EConfig)
    images: AlignedConfig = field(default_factory=AlignedConfig)
    batch: EncoderBatchConfig = field(default_factory=EncoderBatchConfig)
    losses: EncoderLossConfig = field(default_factory=EncoderLossConfig)
    progressive: ProgressiveConfig = field(default_factory=ProgressiveConfig)
    adam: AdamConfig = field(default_factory=lambda: AdamConfig(rate=1e-3, beta1=0.9))
    validation_images: int = 64

    def __post_init__(self) -> None:
        require(self.validation_images > 0, "validation_images", "positive", self.validation_images)


class E4ETask(Task[E4ERecipe]):
    """Network "encoder" (averaged, exported)."""

    recipe_class = E4ERecipe

    def __init__(self, recipe: E4ERecipe, context: TrainingContext) -> None:
        super().__init__(recipe, context)
        self.synthesiser = load_generator(recipe).to(context.device)
        self.faces = AlignedFaces(recipe.images, lambda line: None)
        self.embedding = face_embedding(context.device, recipe.losses.pixels)
        encoder = E4EEncoder(recipe.network)
        encoder.average.copy_(self.synthesiser.mapping.average.cpu().expand_as(encoder.average))
        self.encoder = context.add_network("encoder", encoder, recipe.adam, average=True)
        self.stage = 0  # of the last step that was trained: what validation and export show
        with torch.no_grad():
            z = torch.randn(10_000, self.synthesiser.config.z_width, generator=torch.Generator().manual_seed(0))
            self.variance = self.synthesiser.mapping.w(z.to(context.device)).var(0).mean()

    @classmethod
    def prepare(cls, recipe: E4ERecipe, *, report: Report = print) -> None:
        load_generator(recipe)
        AlignedFaces(recipe.images, report)

    def batch(self, step: int) -> dict[str, Tensor]:
        sizes = self.recipe.batch
        z = torch.randn(sizes.made, self.synthesiser.config.z_width, generator=self.context.generator("latents", step))
        batch = {"z": z}
        if sizes.faces:
            batch["face"] = self.faces.sample(sizes.faces, self.context.generator("faces", step))
        return batch

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        weights, made = self.recipe.losses, len(batch["z"])
        wanted, image = self._known(batch["z"])
        if "face" in batch:
            image = torch.cat([image, batch["face"]])
        self.stage = self.recipe.progressive.stage_at(step, self.recipe.network.num_ws)
        ws = self.encoder(self._seen(image), self.stage).float()
        encoder = cast(E4EEncoder, self.context.networks["encoder"])
        differences = ws - encoder.average
        terms = {"delta": (differences - differences[:, :1]).square().sum((1, 2)).mean()}
        if weights.image:
            with torch.no_grad():
                target = self.embedding(image)
            terms["image"] = squared_distance(self.embedding(self.synthesiser.synthesis(ws)), target).mean()
        if made:
            terms["latent"] = (ws[:made] - wanted).square().mean() / self.variance
        # Data-parallel training wants a gradient of every weight, of heads that wait for their stage too.
        loss = 0 * torch.stack([parameter.sum() for parameter in encoder.parameters()]).sum()
        for name, value in terms.items():
            loss = loss + getattr(weights, name) * value
        self.context.minimise("encoder", loss)
        return {name: value.detach() for name, value in {**terms, "loss": loss}.items()}

    def resume_at(self, step: int) -> None:
        self.stage = self.recipe.progressive.stage_at(step - 1, self.recipe.network.num_ws)

    @torch.no_grad()
    def _known(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Styles (N,L,W) of latents, and their images with the stored noise."""
        ws = self.synthesiser.mapping(z, self.recipe.batch.truncation)
        side = self.synthesiser.config.size_px
        return ws, self.synthesiser.synthesis(ws) if len(z) else z.new_zeros(0, 3, side, side)

    def _seen(self, image: Tensor) -> Tensor:
        """Images at the encoder's size."""
        return resize_square(image, self.recipe.network.size_px, "e4e")

    def _encode(self, image: Tensor) -> Tensor:
        with torch.no_grad():
            encoder = cast(E4EEncoder, self.context.best("encoder").eval())
            return encoder(self._seen(image.to(self.context.device)), self.stage)

    def sample_sheet(self) -> Tensor:
        """Rows: images of the generator, then faces. Columns: image and reconstruction."""
        z = torch.randn(_SHEET_ROWS, self.synthesiser.config.z_width, generator=self.context.generator("sheet", 0))
        _, image = self._known(z.to(self.context.device))
        faces = next(iter(self.faces.batches(_SHEET_ROWS, _SHEET_ROWS)))
        rows = torch.cat([image, faces.to(self.context.device)])
        with torch.no_grad():
            return image_sheet([rows, self.synthesiser.synthesis(self._encode(rows))])

    def validate(self) -> dict[str, float]:
        """On images of unseen latents: `latent`, squared error of styles as a share of that of the average w, and
        `psnr_db` of the reconstruction."""
        draws = torch.Generator().manual_seed(_VALIDATION_SEED)
        errors, of_average, squares = [], [], []
        for start in range(0, self.recipe.validation_images, _CHUNK):
            count = min(_CHUNK, self.recipe.validation_images - start)
            z = torch.randn(count, self.synthesiser.config.z_width, generator=draws)
            wanted, image = self._known(z.to(self.context.device))
            ws = self._encode(image)
            errors.append((ws - wanted).square().mean((1, 2)))
            of_average.append((self.synthesiser.mapping.average - wanted).square().mean((1, 2)))
            with torch.no_grad():
                squares.append((self.synthesiser.synthesis(ws) - image).square().mean((1, 2, 3)))
        share = torch.cat(errors).mean() / torch.cat(of_average).mean()
        psnr = 10 * torch.log10(4 / torch.cat(squares)).mean()
        return {"latent": share.item(), "psnr_db": psnr.item()}

    def export(self, path: Path, metrics: dict[str, float]) -> None:
        encoder = copy.deepcopy(cast(E4EEncoder, self.context.best("encoder")))
        # A run that ended early has heads that never had a turn: they add nothing, instead of what chance gave them.
        encoder.silence_after(self.stage)
        self.write_weights(
            path,
            "e4e",
            self.recipe.network,
            encoder,
            training_data=f"images of {Path(self.recipe.generator).stem}; {self.faces.description}",
            metrics=metrics,
        )


def load_generator(recipe: E4ERecipe) -> StyleGAN2Generator:
    """The recipe's generator. Raises WeightsError without it; UsageError when the encoder or the images do not fit."""
    from faceedit.registry import load_network

    generator = cast(StyleGAN2Generator, load_network(recipe.generator, kind="stylegan2"))
    config = generator.config
    for key, here, there in (
        ("network.num_ws", recipe.network.num_ws, config.num_ws),
        ("network.w_width", recipe.network.w_width, config.w_width),
        ("images.size_px", recipe.images.size_px, config.size_px),
    ):
        if here != there:
            raise UsageError(f"train: {key} must be the generator's {there}, got {here}; change it in the recipe")
    require(
        recipe.network.size_px <= config.size_px,
        "network.size_px",
        f"at most the generator's {config.size_px}",
        recipe.network.size_px,
    )
    return generator
