# SPDX-License-Identifier: Apache-2.0
"""A generator, parser and classifier for MaskFaceGAN whose every behaviour follows from a few lines.

The image is linear in the latent code: red, green and blue on a 4×4 grid, enlarged. Red is a mouth, green is hair, blue
is skin to the parser; the classifier sees Smiling in the amount of red and Blond_Hair in the amount of green.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.labels import MASKFACEGAN
from faceedit.maskfacegan.networks import AttributeJudge, Networks, RegionParser

SIZE_PX = 16
GRID = 4
COLOURS = {"mouth": 0, "hair": 1, "skin": 2}
ATTRIBUTES = ("Smiling", "Blond_Hair", "Wavy_Hair", "Male", "Black_Hair")
GAIN = 2.0
DETAIL = 0.2


class LinearSynthesis(nn.Module):
    """ws (N,2,48) to GAIN times their mean on a grid, enlarged, plus DETAIL times each noise map, enlarged."""

    def __init__(self) -> None:
        super().__init__()
        self.noise_was: list[str] = []
        self.precision: object = "as loaded"
        self.precision_was: list[object] = []

    def forward(self, ws: Tensor, noise: Sequence[Tensor] | str) -> Tensor:
        self.noise_was.append(noise if isinstance(noise, str) else "maps")
        self.precision_was.append(self.precision)
        grid = GAIN * ws.mean(1).view(-1, 3, GRID, GRID)
        image = F.interpolate(grid, (SIZE_PX, SIZE_PX), mode="bilinear", align_corners=False)
        if not isinstance(noise, str):
            for noise_map in noise:
                image = image + DETAIL * F.interpolate(noise_map, (SIZE_PX, SIZE_PX))
        return image


class LinearGenerator(nn.Module):
    """LinearSynthesis, and a mean latent of zeros: a grey image."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(size_px=SIZE_PX, num_ws=2, w_width=3 * GRID * GRID, noise_px=(8, 16))
        self.synthesis = LinearSynthesis()
        self.mapping = nn.Module()
        self.mapping.register_buffer("average", torch.zeros(self.config.w_width))


class ColourParser(nn.Module):
    """Logits of nine regions: three times a colour for mouth, hair and skin, 0 for the background, -9 for the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.config = SimpleNamespace(size_px=SIZE_PX, num_classes=MASKFACEGAN.num_classes)
        self.calls: list[bool] = []

    def forward(self, image: Tensor) -> Tensor:
        self.calls.append(image.requires_grad and torch.is_grad_enabled())
        logits = image.new_full((len(image), MASKFACEGAN.num_classes, *image.shape[2:]), -9.0)
        logits[:, MASKFACEGAN.id("background")] = 0
        columns = [logits[:, i] for i in range(logits.shape[1])]
        for label, channel in COLOURS.items():
            columns[MASKFACEGAN.id(label)] = 3 * image[:, channel]
        return torch.stack(columns, 1)


class ColourClassifier(nn.Module):
    """Logits of ATTRIBUTES: Smiling from red, both hair colours and waves from green, Male from blue."""

    def __init__(self, names: tuple[str, ...] = ATTRIBUTES) -> None:
        super().__init__()
        self.config = SimpleNamespace(attributes=names)
        self.selected: list[tuple[str, ...]] = []

    def select(self, names: tuple[str, ...]) -> ColourClassifier:
        self.selected.append(tuple(names))
        return ColourClassifier(tuple(names))

    def forward(self, image: Tensor) -> Tensor:
        red, green, blue = image.mean((2, 3)).unbind(1)
        known = {
            "Smiling": 6 * red + 5,
            "Blond_Hair": 6 * green + 1,
            "Wavy_Hair": 4 * green,
            "Male": 5 * blue,
            "Black_Hair": -6 * green - 1,
        }
        return torch.stack([known[name] for name in self.config.attributes], 1)


class ColourFeatures:
    """The image at two sizes, as a feature network."""

    weights = None

    def __call__(self, image: Tensor) -> list[Tensor]:
        return [image, F.avg_pool2d(image, 2)]


def standins() -> Networks:
    """Fresh stand-ins: what they saw is their own."""
    parser, classifier = ColourParser(), ColourClassifier()
    return Networks(LinearGenerator(), RegionParser(parser), AttributeJudge(classifier), features=ColourFeatures())


def portrait(seed: int = 0, count: int = 1) -> Tensor:
    """Images (N,3,16,16): hair above, skin in the middle, a mouth below it, with fine texture."""
    image = torch.full((count, 3, SIZE_PX, SIZE_PX), -1.0)
    image[:, COLOURS["hair"], :5] = 1.0
    image[:, COLOURS["skin"], 5:] = 1.0
    image[:, COLOURS["skin"], 10:13, 5:11] = -1.0
    image[:, COLOURS["mouth"], 10:13, 5:11] = 1.0
    texture = torch.randn(count, 1, SIZE_PX, SIZE_PX, generator=torch.Generator().manual_seed(seed))
    return image + 0.15 * texture
