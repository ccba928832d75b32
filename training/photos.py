# SPDX-License-Identifier: Apache-2.0
"""Unlabelled photos as training data: aligned crops with the parser's soft masks, prepared once."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.errors import FaceEditError, UsageError
from faceedit.training import cache
from faceedit.training.config import require
from faceedit.training.data import AugmentConfig, augment_images

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp"}


class Face(Protocol):
    """What preparation needs of a found face: `faceedit.parsing.FaceRecord` is one."""

    @property
    def crop(self) -> Tensor: ...
    @property
    def mask(self) -> Tensor: ...


FindFace = Callable[[Path], Face]


@dataclass(frozen=True, slots=True)
class PhotosConfig:
    """A folder of photos (searched recursively). `parser` names the weights that align and parse them; every
    `held_out_every`-th photo that shows a face is kept from training, to measure on (0: none)."""

    folder: str
    size_px: int = 128
    parser: str = "parser-starter"
    max_photos: int | None = None
    held_out_every: int = 8
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        require(self.max_photos is None or self.max_photos > 0, "max_photos", "positive", self.max_photos)
        require(self.held_out_every >= 0, "photos.held_out_every", "0 or more", self.held_out_every)


class UnlabelledPhotos:
    """Aligned crops and soft masks of the photos in which a face was found.

    Arrays: images uint8 N×S×S×3, masks (packed) uint8 N×S×S×3. Photos without a usable face are counted in `refused`,
    and their number is reported.

    Raises: UsageError when the folder holds no photo, or none that shows a face; UnknownNameError or WeightsError for
            parser weights that are not there.
    """

    def __init__(
        self, config: PhotosConfig, find_face: FindFace | None = None, report: Callable[[str], Any] = print
    ) -> None:
        root = Path(config.folder)
        files = sorted(path for path in root.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        files = files[: config.max_photos]
        if not files:
            raise UsageError(
                f"train: photos.folder must hold photos, got {config.folder}; pass a folder of image files"
            )
        values = {"size": config.size_px, "parser": _parser_identity(config.parser), "version": 1}
        values["files"] = cache.file_states(files, root)
        name = f"photos-{config.size_px}px-{cache.fingerprint(values, [])}"
        shape = (len(files), config.size_px, config.size_px, 3)
        shapes = {"images": (shape, "uint8"), "masks": (shape, "uint8"), "usable": ((len(files),), "bool")}
        finder: list[FindFace] = [] if find_face is None else [find_face]

        def fill(start: int, stop: int) -> dict[str, np.ndarray[Any, Any]]:
            if not finder:  # loading a parser only for a finished cache would be waste
                finder.append(face_finder(config.parser))
            return _prepare(files[start:stop], finder[0], config.size_px)

        folder = Path(config.cache_dir or cache.default_cache_dir()) / name
        arrays = cache.build_cache(folder, shapes, 16, fill, report)
        self._images, self._masks = arrays["images"], arrays["masks"]
        self.index = np.flatnonzero(arrays["usable"])
        self.refused = len(files) - len(self.index)
        self._held_out_every = config.held_out_every
        if not len(self.index):
            raise UsageError(
                f"train: photos.folder must show faces, got {len(files)} photos without one; check the parser"
            )
        cache.report_refused(config.folder, self.refused, len(files), report)

    def __len__(self) -> int:
        return len(self.index)

    def split(self) -> tuple[UnlabelledPhotos, UnlabelledPhotos]:
        """What is trained on, and what only measures."""
        places = np.arange(len(self))
        held_out = places % self._held_out_every == self._held_out_every - 1 if self._held_out_every else places < 0
        parts = copy.copy(self), copy.copy(self)
        for part, chosen in zip(parts, (~held_out, held_out), strict=True):
            part.index = self.index[chosen]
        return parts

    def read(self, positions: Sequence[int], mirrored: np.ndarray[Any, Any]) -> tuple[Tensor, Tensor]:
        """Crops N×3×S×S and masks N×19×S×S at `positions` (0 … len−1), some mirrored."""
        rows = self.index[list(positions)]
        pixels = np.stack([self._images[row] for row in rows])
        packed = np.stack([self._masks[row] for row in rows])
        pixels[mirrored] = pixels[mirrored][..., ::-1, :]
        packed[mirrored] = cache.flip_packed_mask(packed[mirrored])
        return cache.unpack_image(pixels), cache.unpack_mask(packed)

    def sample(self, count: int, generator: torch.Generator, augment: AugmentConfig) -> dict[str, Tensor]:
        """`count` random photos under light photometric changes: image, mask, position (int64)."""
        positions = torch.randint(len(self), (count,), generator=generator)
        mirrored = (torch.rand(count, generator=generator) < 0.5).numpy() & augment.flip
        image, mask = self.read(positions.tolist(), mirrored)
        return {"image": augment_images([image], augment, generator)[0], "mask": mask, "position": positions}


def face_finder(parser: str) -> FindFace:
    """The runtime's own reading, detection, alignment and parsing, with the named parser weights."""
    from faceedit.images import read_image
    from faceedit.parsing import load_parser

    found = load_parser(weights=parser)
    return lambda path: found.find_face(read_image(path).pixels)


def _parser_identity(parser: str) -> str:
    """Name and checksum, which of a file that is not registered is computed: new parser weights make a new cache."""
    from faceedit.registry import find, sha256_of

    row = find(parser, "parser")
    return f"{parser} {row.sha256 or sha256_of(row.path)}"


def _prepare(files: Sequence[Path], find_face: FindFace, size_px: int) -> dict[str, np.ndarray[Any, Any]]:
    images = np.zeros((len(files), size_px, size_px, 3), dtype=np.uint8)
    masks = np.zeros_like(images)
    usable = np.zeros(len(files), dtype=bool)
    for row, path in enumerate(files):
        try:
            face = find_face(path)
        except FaceEditError:
            continue
        # Area averaging keeps a soft mask summing to 1 and does not alias the crop.
        image = F.interpolate(face.crop, size=(size_px, size_px), mode="area")
        mask = F.interpolate(face.mask, size=(size_px, size_px), mode="area")
        images[row], masks[row], usable[row] = cache.pack_image(image)[0], cache.pack_mask(mask)[0], True
    return {"images": images, "masks": masks, "usable": usable}
