# SPDX-License-Identifier: Apache-2.0
"""Drawn people as photos, so that what an edit of a photo should give is known."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from faceedit.training import cache
from faceedit.training.data import SyntheticPortraits
from faceedit.training.photos import PhotosConfig, UnlabelledPhotos


@dataclass
class DrawnFace:
    crop: Tensor
    mask: Tensor


def photos_of(families: SyntheticPortraits, folder: Path, **options: int) -> UnlabelledPhotos:
    """The families' first members as a folder of photos; options of PhotosConfig."""
    folder.mkdir(exist_ok=True)
    for number in range(len(families)):
        (folder / f"{number:02}.png").write_bytes(b"x")

    def find(path: Path) -> DrawnFace:
        row = [int(path.stem)]
        return DrawnFace(cache.unpack_image(families.images[row, 0]), cache.unpack_mask(families.masks[row, 0]))

    config = PhotosConfig(str(folder), size_px=families.config.size_px, cache_dir=str(folder), **options)
    return UnlabelledPhotos(config, find, report=lambda line: None)
