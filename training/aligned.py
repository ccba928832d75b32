# SPDX-License-Identifier: Apache-2.0
"""Aligned faces without labels, for StyleGAN2: synthetic portraits in FFHQ's framing, or a folder of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faceedit.alignment import PORTRAIT_SCALE, align_ffhq
from faceedit.errors import FaceEditError, UsageError
from faceedit.training import cache
from faceedit.training import synthetic as portraits
from faceedit.training.config import require
from faceedit.training.data import SPLIT_SEEDS, require_other_people
from faceedit.training.photos import IMAGE_SUFFIXES

_CHUNK = 32
_RENDERED_SCALE = PORTRAIT_SCALE  # the renderer's own framing; head size and place vary


@dataclass(frozen=True, slots=True)
class AlignedConfig:
    """Which faces.

    Without `folder`: `people` synthetic portraits, each aligned by its own five landmarks as a photo would be, with
    FFHQ's square enlarged `scale` times (1: FFHQ itself). With `folder`: the images in it and below, which have to be
    aligned already; each is cropped to its central square and shrunk, at most `max_images` of them. `mirror` adds every
    image's mirror image. `seed_offset` (0, or at least people / 32) skips 32 people each: nobody drawn then is among
    the first `people`. Disk: size_px² × 3 bytes an image.
    """

    size_px: int = 128
    folder: str | None = None
    max_images: int | None = None
    people: int = 6000
    scale: float = 1.0
    mirror: bool = True
    seed_offset: int = 0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        require(self.size_px >= 8, "size_px", "8 or more", self.size_px)
        require(self.people > 0, "people", "positive", self.people)
        require(0.5 <= self.scale <= 2, "scale", "in [0.5, 2]", self.scale)
        require(self.max_images is None or self.max_images > 0, "max_images", "positive", self.max_images)
        require_other_people(self.seed_offset, self.people, _CHUNK)


class AlignedFaces:
    """Face images of one size, prepared once into a cache: uint8 N×S×S×3.

    Unreadable ones of a folder are counted in `refused`, and their number is reported.

    Raises: UsageError when the folder holds no image that can be read.
    """

    def __init__(self, config: AlignedConfig, report: Callable[[str], Any] = print) -> None:
        self.config = config
        if config.folder is None:
            self._images, usable = _render_portraits(config, report)
        else:
            self._images, usable = _read_folder(config, config.folder, report)
        self.index = np.flatnonzero(usable)
        self.refused = len(usable) - len(self.index)
        if not len(self.index):
            raise UsageError(
                f"train: images.folder must hold readable images, got none of {self.refused} in {config.folder}; "
                "check the files"
            )
        cache.report_refused(config.folder or "", self.refused, len(usable), report)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def description(self) -> str:
        """What these are, for a weights header."""
        if self.config.folder is not None:
            return f"{len(self)} images of a folder"
        wider = "" if self.config.scale == 1 else f", enlarged {self.config.scale:g} times"
        return f"{len(self)} synthetic portraits in FFHQ's framing{wider}"

    def read(self, positions: Sequence[int], mirrored: NDArray[np.bool_] | None = None) -> Tensor:
        """Images N×3×S×S in [-1, 1] at `positions` (0 … len − 1), some mirrored."""
        pixels = np.stack([self._images[row] for row in self.index[list(positions)]])
        if mirrored is not None:
            pixels[mirrored] = pixels[mirrored][..., ::-1, :]
        return cache.unpack_image(pixels)

    def batches(self, count: int, size: int = 32) -> Iterator[Tensor]:
        """At most `count` images, spread over all of them, each once and not mirrored, in batches of `size`."""
        positions = np.linspace(0, len(self) - 1, min(count, len(self))).round().astype(int).tolist()
        for start in range(0, len(positions), size):
            yield self.read(positions[start : start + size])

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        """`count` random images N×3×S×S, half of them mirrored where the configuration says so."""
        positions = torch.randint(len(self), (count,), generator=generator)
        mirrored = (torch.rand(count, generator=generator) < 0.5).numpy() & self.config.mirror
        return self.read(positions.tolist(), mirrored)


def framed_portraits(people: portraits.PortraitParameters, size_px: int, scale: float = 1.0) -> NDArray[np.uint8]:
    """Synthetic people N as uint8 N×S×S×3, each aligned by its own landmarks: FFHQ's square enlarged `scale` times."""
    # As many pixels as the crop has, and enough for the smallest portrait.
    drawn_px = max(16, math.ceil(size_px * _RENDERED_SCALE / scale))
    batch = portraits.render(people, drawn_px)
    crops = [
        align_ffhq(points, (drawn_px, drawn_px), size_px, scale).warp_image(image)
        for points, image in zip(batch.landmarks.numpy(), cache.pack_image(batch.image), strict=True)
    ]
    return np.stack(crops)


def _render_portraits(config: AlignedConfig, report: Callable[[str], Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    seed = SPLIT_SEEDS["train"] + config.seed_offset

    def fill(start: int, stop: int) -> dict[str, NDArray[Any]]:
        people = portraits.sample_parameters(stop - start, seed + start // _CHUNK)
        return {"images": framed_portraits(people, config.size_px, config.scale)}

    values = {"size": config.size_px, "people": config.people, "scale": config.scale, "seed": seed, "version": 1}
    renderer = Path(portraits.__file__ or "").parent
    key = cache.fingerprint(values, list(renderer.glob("*.py")))
    folder = Path(config.cache_dir or cache.default_cache_dir()) / f"aligned-{config.size_px}px-{key}"
    shapes = {"images": ((config.people, config.size_px, config.size_px, 3), "uint8")}
    images = cache.build_cache(folder, shapes, _CHUNK, fill, report)["images"]
    return images, np.ones(config.people, dtype=bool)


def _read_folder(config: AlignedConfig, folder: str, report: Callable[[str], Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    root = Path(folder)
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)[: config.max_images]
    if not files:
        raise UsageError(f"train: images.folder must hold images, got {folder}; pass a folder of aligned faces")
    values: dict[str, Any] = {"size": config.size_px, "version": 1}
    values["files"] = cache.file_states(files, root)
    name = f"folder-{config.size_px}px-{cache.fingerprint(values, [])}"
    shapes = {
        "images": ((len(files), config.size_px, config.size_px, 3), "uint8"),
        "usable": ((len(files),), "bool"),
    }
    fill = _folder_filler(files, config.size_px)
    arrays = cache.build_cache(Path(config.cache_dir or cache.default_cache_dir()) / name, shapes, _CHUNK, fill, report)
    return arrays["images"], arrays["usable"]


def _folder_filler(files: Sequence[Path], size_px: int) -> Callable[[int, int], dict[str, NDArray[Any]]]:
    from faceedit.images import read_image

    def fill(start: int, stop: int) -> dict[str, NDArray[Any]]:
        images = np.zeros((stop - start, size_px, size_px, 3), dtype=np.uint8)
        usable = np.zeros(stop - start, dtype=bool)
        for row, path in enumerate(files[start:stop]):
            try:
                pixels = read_image(path).pixels
            except FaceEditError:
                continue
            images[row], usable[row] = central_square(pixels, size_px), True
        return {"images": images, "usable": usable}

    return fill


def central_square(pixels: NDArray[np.uint8], size_px: int) -> NDArray[np.uint8]:
    """The largest central square of uint8 H×W×3 pixels, resized with antialiasing."""
    from PIL import Image

    height, width = pixels.shape[:2]
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    square = Image.fromarray(pixels[top : top + side, left : left + side])
    return np.asarray(square.resize((size_px, size_px), Image.Resampling.LANCZOS))
