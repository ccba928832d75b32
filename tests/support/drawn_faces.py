# SPDX-License-Identifier: Apache-2.0
"""A face that a few lines of arithmetic can parse: drawn in the label palette, read back by its colours.

Whatever finds, aligns, edits and composites faces can so be tested against an exact truth and without trained weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from faceedit.detection import FaceBox, Proposals
from faceedit.editors.maggan import MagGANEditor
from faceedit.labels import CELEBAMASK_HQ
from faceedit.networks.maggan import MagGANConfig, MagGANGenerator
from faceedit.parsing import FaceParser
from faceedit.training.synthetic import render, sample_parameters

# Left and right parts share a colour, as they do in a photo; the parser tells them apart by their side of the crop.
SHARED = {"l_eye": "r_eye", "l_brow": "r_brow", "l_ear": "r_ear"}


class PaletteParser(nn.Module):
    """Logits of the class whose palette colour is nearest; left parts lie in the right half of the crop."""

    def __init__(self) -> None:
        super().__init__()
        colours = torch.tensor(CELEBAMASK_HQ.palette).float() / 127.5 - 1
        for left, right in SHARED.items():
            colours[CELEBAMASK_HQ.id(left)] = colours[CELEBAMASK_HQ.id(right)]
        self.register_buffer("colours", colours)

    def forward(self, image: Tensor) -> Tensor:
        colours: Tensor = self.colours  # type: ignore[assignment]
        distance = (image[:, None] - colours[None, :, :, None, None]).square().sum(2)
        logits = -40.0 * distance
        half = image.shape[-1] // 2
        for left, right in SHARED.items():
            logits[:, CELEBAMASK_HQ.id(left), :, :half] -= 50
            logits[:, CELEBAMASK_HQ.id(right), :, half:] -= 50
        return logits


@dataclass(frozen=True)
class DrawnFace:
    """A flat-coloured photo uint8 H×W×3, where its face was pasted, and the truth in photo pixels."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    landmarks: NDArray[np.float64]
    box: FaceBox


def draw_face(
    seed: int = 3, size: int = 256, height: int = 420, width: int = 380, x: int = 60, y: int = 80
) -> DrawnFace:
    """One synthetic person in palette colours, on an empty photo."""
    portrait = render(sample_parameters(1, seed), size)
    labels = np.zeros((height, width), np.uint8)
    labels[y : y + size, x : x + size] = portrait.labels[0].numpy()
    merged = labels.copy()
    for left, right in SHARED.items():
        merged[labels == CELEBAMASK_HQ.id(left)] = CELEBAMASK_HQ.id(right)
    landmarks = portrait.landmarks[0].double().numpy() + np.array([x, y])
    eyes, mouth = landmarks[:2].mean(0), landmarks[3:].mean(0)
    side = 2.5 * float(np.linalg.norm(landmarks[1] - landmarks[0]))
    centre = eyes + 0.15 * (mouth - eyes) * side / max(float(np.linalg.norm(mouth - eyes)), 1.0)
    box = FaceBox(centre[0] - side / 2, centre[1] - side / 2, side, side, 0.9)
    return DrawnFace(CELEBAMASK_HQ.colorize(merged), labels, landmarks, box)


def palette_parser(*boxes: FaceBox) -> FaceParser:
    """A parser of drawn faces whose detector always proposes these boxes."""
    return FaceParser(PaletteParser(), weights="palette", detect=lambda _pixels: Proposals(boxes))


def small_editor(seed: int = 0) -> MagGANEditor:
    """MagGAN's real architecture, tiny and untrained, but loud enough that an edit shows."""
    torch.manual_seed(seed)
    config = MagGANConfig(
        size_px=64, base_width=8, max_width=32, encoder_stages=4, stu_units=2, spade_width=8, output="residual"
    )
    generator = MagGANGenerator(config)
    nn.init.normal_(generator.to_rgb.weight, std=0.5)
    return MagGANEditor(generator, weights="small")
