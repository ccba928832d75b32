# SPDX-License-Identifier: Apache-2.0
"""How an edit came about: one strip of pictures, the input, I_G along the stages, the blended result (figure 16), and a
table of the losses on the way.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from torch import Tensor

from faceedit.maskfacegan.outcome import TERMS, Progress
from faceedit.networks.resizing import resize

TILE_PX = 256
_CAPTION_PX = 18


@dataclass
class Trajectory:
    """An observer that keeps about `count` pictures between the input and the result of one edit of a batch, and its
    losses whenever it is called.

    Args: count, how many pictures, spread evenly over the iterations (never more often than it is called); edit, the
          position of its plan.
    losses: stage, iteration, and the unweighted value of each term that acted in it, in order. Called every iteration
          (`watch(…, every=1)`), that is the whole curve.
    """

    count: int = 8
    edit: int = 0
    frames: list[tuple[str, NDArray[np.uint8]]] = field(default_factory=list)
    losses: list[tuple[str, int, dict[str, float]]] = field(default_factory=list)
    _due: float = 0.0

    def __call__(self, progress: Progress) -> None:
        if self.edit not in progress.edits:
            return
        row = progress.edits.index(self.edit)
        if progress.stage in ("latent", "noise"):
            values = {name: term[row].item() for name, term in progress.losses.items()}
            self.losses.append((progress.stage, progress.iteration, values))
            if progress.done < min(self._due, progress.total):
                return
            self._due = progress.done + progress.total / max(self.count - 1, 1)
        self.frames.append((_caption(progress), _tile(progress.image[row : row + 1])))

    def strip(self) -> NDArray[np.uint8]:
        """uint8 (H,W,3): the pictures from left to right, each with its stage and iteration below it."""
        tiles = [_captioned(pixels, caption) for caption, pixels in self.frames]
        return np.concatenate(tiles, axis=1)

    def table(self) -> str:
        """The losses as CSV: stage, iteration in it, a column for each term that ever acted, empty where it did not."""
        acted = [name for name in TERMS if any(name in values for _, _, values in self.losses)]
        text = io.StringIO()
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(("stage", "iteration", *acted))
        for stage, iteration, values in self.losses:
            rows.writerow((stage, iteration, *(values.get(name, "") for name in acted)))
        return text.getvalue()


def _caption(progress: Progress) -> str:
    ends = {"source": "input", "blend": "result"}
    letter = {"latent": "w", "noise": "n"}
    if progress.stage in ends:
        return ends[progress.stage]
    return f"{letter[progress.stage]} {progress.iteration}"


def _tile(image: Tensor) -> NDArray[np.uint8]:
    small = resize(image.float(), min(image.shape[-1], TILE_PX))
    levels = ((small.clamp(-1, 1) + 1) * 127.5).round().byte()
    return np.asarray(levels[0].permute(1, 2, 0).cpu())


def _captioned(pixels: NDArray[np.uint8], caption: str) -> NDArray[np.uint8]:
    height, width = pixels.shape[:2]
    tile = Image.new("RGB", (width, height + _CAPTION_PX), "white")
    tile.paste(Image.fromarray(pixels), (0, 0))
    ImageDraw.Draw(tile).text((width / 2, height + 3), caption, fill="black", anchor="ma")
    return np.asarray(tile)
