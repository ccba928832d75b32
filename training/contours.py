# SPDX-License-Identifier: Apache-2.0
"""What face-mesh landmarks say about a photo's labels: eyes, brows, nose and lips, drawn as polygons.

Self-training keeps what the teacher believes, right or wrong: eyes that start a little too large stay so. A landmark
model that saw real faces (training/face_mesh.py) does not draw hair, glasses or ears, but it knows where an eye ends.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from faceedit.errors import UsageError
from faceedit.labels import CELEBAMASK_HQ

UNKNOWN = 255
"""Nothing is said about this pixel."""

BARE = 254
"""Inside the face and in none of the drawn parts."""

DRAWN = ("r_eye", "l_eye", "r_brow", "l_brow", "nose", "u_lip", "mouth", "l_lip")

# Vertices of the 478-point mesh around each part. "Right" is the person's.
_OVAL = (
    10, 338, 297, 332, 284, 251, 389, 356, 454, 323, 361, 288, 397, 365, 379, 378, 400, 377,
    152, 148, 176, 149, 150, 136, 172, 58, 132, 93, 234, 127, 162, 21, 54, 103, 67, 109,
)  # fmt: skip
_RIGHT_EYE = (33, 246, 161, 160, 159, 158, 157, 173, 133, 155, 154, 153, 145, 144, 163, 7)
_LEFT_EYE = (263, 466, 388, 387, 386, 385, 384, 398, 362, 382, 381, 380, 374, 373, 390, 249)
_RIGHT_BROW = (70, 63, 105, 66, 107, 55, 65, 52, 53, 46)
_LEFT_BROW = (300, 293, 334, 296, 336, 285, 295, 282, 283, 276)
_NOSE = (193, 122, 196, 236, 198, 209, 49, 48, 64, 98, 97, 2, 326, 327, 294, 278, 279, 429, 420, 456, 419, 351, 417)
_OUTER_TOP = (61, 185, 40, 39, 37, 0, 267, 269, 270, 409, 291)
_OUTER_LOW = (61, 146, 91, 181, 84, 17, 314, 405, 321, 375, 291)
_INNER_TOP = (78, 191, 80, 81, 82, 13, 312, 311, 310, 415, 308)
_INNER_LOW = (78, 95, 88, 178, 87, 14, 317, 402, 318, 324, 308)
_POLYGONS = {
    "nose": _NOSE,
    "r_brow": _RIGHT_BROW,
    "l_brow": _LEFT_BROW,
    "r_eye": _RIGHT_EYE,
    "l_eye": _LEFT_EYE,
    "u_lip": _OUTER_TOP + _INNER_TOP[::-1],
    "l_lip": _OUTER_LOW + _INNER_LOW[::-1],
    "mouth": _INNER_TOP + _INNER_LOW[::-1],
}
_NOSE_TIP = 1
_VAGUE = {"r_brow": 1.5, "l_brow": 1.5, "nose": 1.5}  # px at 256²: the mesh knows these edges less well
_SUBPIXELS = 4


def read_contours(path: Path) -> dict[str, NDArray[np.float32]]:
    """Path below the photos' folder, from "./" on → landmarks 478×2 (x, y), photo pixels. Older files have bare names.

    Raises: UsageError for a file of another kind, or none.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            contours = {name: np.asarray(stored[name]) for name in stored.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile):  # TypeError: a single array
        contours = {}
    if not contours:
        raise UsageError(
            f"read_contours: photo_contours must be a file that training/face_mesh.py wrote, got {path}; name another"
        )
    for name, points in contours.items():
        if points.shape != (478, 2):
            raise UsageError(
                f"read_contours: photo_contours[{name}] must be 478 points (x, y), got {points.shape} in {path}; "
                "write it with training/face_mesh.py"
            )
    return contours


def contours_of(files: Sequence[Path], folder: Path, contours: Mapping[str, NDArray[Any]]) -> dict[Path, NDArray[Any]]:
    """Which of the `folder`'s files have which of `read_contours`; the others are left out.

    Raises: UsageError where a bare name is that of several files.
    """
    named: dict[str, list[Path]] = {}
    for path in files:
        named.setdefault(f"./{path.relative_to(folder).as_posix()}", []).append(path)
        named.setdefault(path.name, []).append(path)
    for name in contours:
        if len(bearers := named.get(name, [])) > 1:
            raise UsageError(
                f"contours_of: photo_contours must tell photos apart, got the name {name} of {len(bearers)} photos, "
                f"{bearers[0]} and others; write them again with training/face_mesh.py, which has paths"
            )
    return {named[name][0]: points for name, points in contours.items() if name in named}


def five_points(mesh: NDArray[Any]) -> NDArray[np.float64]:
    """The project's five landmarks 5×2 of a mesh 478×2: image-left eye, image-right eye, nose tip, mouth corners."""
    eyes = [mesh[list(ids)].mean(0) for ids in (_RIGHT_EYE, _LEFT_EYE)]
    return np.array([*eyes, mesh[_NOSE_TIP], mesh[_OUTER_TOP[0]], mesh[_OUTER_TOP[-1]]], dtype=np.float64)


def contour_labels(mesh: NDArray[Any], size_px: int) -> NDArray[np.uint8]:
    """Draw a mesh 478×2 (x, y in pixels of a crop of size_px²) as labels, uint8 size_px×size_px.

    A drawn part's pixels carry its CelebAMask-HQ id, the rest of the face BARE, everything else (and a rim around parts
    whose edge the mesh only guesses) UNKNOWN.
    """
    labels = np.full((size_px, size_px), UNKNOWN, np.uint8)
    labels[_filled(mesh, _OVAL, size_px)] = BARE
    for name, ids in _POLYGONS.items():
        inside = _filled(mesh, ids, size_px)
        reach = _VAGUE.get(name, 0.0) * size_px / 256
        if reach:
            line = np.zeros((size_px * _SUBPIXELS,) * 2, np.uint8)
            cv2.polylines(line, [_subpixel(mesh, ids)], True, 255, max(1, round(2 * reach * _SUBPIXELS)))
            labels[cv2.resize(line, (size_px, size_px), interpolation=cv2.INTER_AREA) > 127] = UNKNOWN
        labels[inside] = CELEBAMASK_HQ.id(name)
    return labels


def _subpixel(mesh: NDArray[Any], ids: tuple[int, ...]) -> NDArray[np.int32]:
    return np.round((mesh[list(ids)] + 0.5) * _SUBPIXELS - 0.5).astype(np.int32)


def _filled(mesh: NDArray[Any], ids: tuple[int, ...], size_px: int) -> NDArray[np.bool_]:
    """Pixels at least half inside the polygon."""
    canvas = np.zeros((size_px * _SUBPIXELS,) * 2, np.uint8)
    cv2.fillPoly(canvas, [_subpixel(mesh, ids)], 255)
    return np.asarray(cv2.resize(canvas, (size_px, size_px), interpolation=cv2.INTER_AREA) > 127)
