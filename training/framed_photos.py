# SPDX-License-Identifier: Apache-2.0
"""Unlabelled photos as the face parser sees them, cached on disk, with what landmarks say about their labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faceedit.training import cache
from faceedit.training import contours as contour_module
from faceedit.training.contours import UNKNOWN, contour_labels, contours_of, five_points, read_contours

_HELD_OUT_EVERY = 8


@dataclass(frozen=True, slots=True, eq=False)
class FramedPhotos:
    """crops uint8 N×S×S×3, and contours uint8 N×S×S as `contour_labels` makes them; None without landmarks."""

    crops: NDArray[np.uint8]
    contours: NDArray[np.uint8] | None = None

    def __len__(self) -> int:
        return len(self.crops)

    def read(self, rows: list[int]) -> Tensor:
        """Crops N×3×S×S in [-1, 1]."""
        return cache.unpack_image(self.crops[rows])

    def read_contours(self, rows: list[int]) -> Tensor:
        """Contours, int64 N×S×S; UNKNOWN everywhere without landmarks."""
        if self.contours is None:
            return torch.full((len(rows), *self.crops.shape[1:3]), UNKNOWN, dtype=torch.int64)
        return torch.from_numpy(self.contours[rows].astype(np.int64))

    def split(self) -> tuple[FramedPhotos, FramedPhotos]:
        """What is trained on and what only measures: with landmarks every eighth photo, otherwise none."""
        held_out = np.arange(len(self)) % _HELD_OUT_EVERY == 0
        if self.contours is None:
            held_out[:] = False
        return self._take(~held_out), self._take(held_out)

    def _take(self, chosen: NDArray[np.bool_]) -> FramedPhotos:
        return FramedPhotos(self.crops[chosen], None if self.contours is None else self.contours[chosen])


def framed_photos(
    folder: Path, contours: Path | None, size_px: int, cache_dir: Path | None, report: Callable[[str], Any]
) -> FramedPhotos:
    """The photos of a folder, searched recursively, as crops of size_px², in the order of their names.

    Landmarks (`contours`, a file of training/face_mesh.py) frame a photo as the runtime aligns it; photos that are not
    in the file are left out. Without them the detector alone frames: the parser that would find the eyes is what is
    being trained. How many are left out is reported. Raises UsageError for a folder without photos, or whose photos
    show no face, and as `read_contours` and `contours_of` do.
    """
    from faceedit.alignment import portrait_alignment, rough_alignment
    from faceedit.detection import detect_faces
    from faceedit.errors import FaceEditError, UsageError
    from faceedit.images import read_image

    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not files:
        raise UsageError(f"framed_photos: photos must be a folder of photos, got {folder}; name one that holds some")
    meshes = contours_of(files, folder, read_contours(contours)) if contours is not None else {}

    def fill(start: int, stop: int) -> dict[str, np.ndarray]:
        crops = np.zeros((stop - start, size_px, size_px, 3), dtype=np.uint8)
        drawn = np.full((stop - start, size_px, size_px), UNKNOWN, dtype=np.uint8)
        usable = np.zeros(stop - start, dtype=bool)
        for row, path in enumerate(files[start:stop]):
            try:
                pixels = read_image(path).pixels
            except FaceEditError:
                continue
            height, width = pixels.shape[:2]
            mesh = meshes.get(path)
            if mesh is not None:
                alignment = portrait_alignment(five_points(mesh), (height, width), size_px)
                drawn[row] = contour_labels(alignment.to_crop(mesh), size_px)
            elif contours is None and (boxes := detect_faces(pixels)):
                box = boxes[0]
                alignment = rough_alignment((box.x, box.y, box.w, box.h), (height, width), size_px)
            else:
                continue
            crops[row] = alignment.warp_image(pixels)
            usable[row] = True
        return {"crops": crops, "contours": drawn, "usable": usable}

    values: dict[str, Any] = {
        "size": size_px,
        "files": cache.file_states(files, folder),
        "version": 2,
    }
    if contours is not None:
        values["contours"] = hashlib.sha256(contours.read_bytes()).hexdigest()
    name = f"framed-photos-{size_px}px-{cache.fingerprint(values, [Path(contour_module.__file__)])}"
    shapes = {
        "crops": ((len(files), size_px, size_px, 3), "uint8"),
        "contours": ((len(files), size_px, size_px), "uint8"),
        "usable": ((len(files),), "bool"),
    }
    arrays = cache.build_cache((cache_dir or cache.default_cache_dir()) / name, shapes, 16, fill, report)
    usable = np.asarray(arrays["usable"])
    if not usable.any():
        raise UsageError(
            f"framed_photos: photos must be a folder of photos that show faces, got {folder}; name another, or look at "
            "photo_contours"
        )
    cache.report_refused(folder, int((~usable).sum()), len(files), report)
    crops, drawn = (np.asarray(arrays[part])[usable] for part in ("crops", "contours"))
    return FramedPhotos(crops, drawn if contours is not None else None)
