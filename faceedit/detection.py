# SPDX-License-Identifier: Apache-2.0
"""Face boxes in a photo, with nothing to download: OpenCV's bundled cascades, or YuNet where its model file is at hand.

Boxes are proposals. The cascades are set to miss little and therefore also box things that are no face; whoever uses
a box parses it and drops what does not look like one.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import cv2.data
import numpy as np
from numpy.typing import NDArray

from faceedit.errors import WeightsError

YUNET_VARIABLE = "FACEEDIT_YUNET"
"""Environment variable with the path of YuNet's ONNX file (OpenCV Zoo, face_detection_yunet)."""

MIN_FACE_PX = 24
"""Smallest side of a box, photo pixels; it is also the side of the cascades' own window."""

CONFIDENT = 0.5
"""Boxes that score at least this come first; a photo without one is searched again for tilted heads."""

MOST_PROPOSALS = 64
"""The best-scored proposals that one search gives at most, which bounds the time that a hostile photo can take. Photos
without a face gave up to 20."""

_CASCADES = ("haarcascade_frontalface_default.xml", "haarcascade_frontalface_alt2.xml")
_WORK_PX = 512  # long side that is searched; a portrait's face is still some 100 px there, and time stays bounded
_FINE_PX = 1280  # long side for the second look at a large photo in which no face stands out
_SMALL_PX = 320  # photos below this are enlarged up to twice, since the cascades' window is 24 px
_MIN_SHARE = 0.05  # smallest face searched for, as a share of the photo's short side
_TILTS_DEG = (-30.0, 30.0)  # the cascades bear about 15 degrees themselves
_HALF_TRUST = 15.0  # hits at which a box is trusted by half: faces gather 24 and more, other things rarely 10
_OVERLAP = 0.35  # intersection over union above which two boxes are one face

_local = threading.local()  # OpenCV's classifiers keep their scale pyramid inside and cannot be shared by threads


@dataclass(frozen=True)
class FaceBox:
    """A face proposal: upper left corner, width and height in photo pixels, and a score in [0, 1].

    angle_deg is the head's roll where known, positive clockwise; the box is then turned by it about its own centre.
    landmarks, where the detector gives them, are five (x, y): image-left eye, image-right eye, nose tip, left and
    right mouth corner.
    """

    x: float
    y: float
    w: float
    h: float
    score: float
    angle_deg: float = 0.0
    landmarks: tuple[tuple[float, float], ...] | None = None

    @property
    def side(self) -> float:
        """Side of the square of equal area, photo pixels."""
        return float(np.sqrt(self.w * self.h))

    def overlap(self, other: FaceBox) -> float:
        """Intersection over union with another box, both taken as upright."""
        width = min(self.x + self.w, other.x + other.w) - max(self.x, other.x)
        height = min(self.y + self.h, other.y + other.h) - max(self.y, other.y)
        shared = max(width, 0.0) * max(height, 0.0)
        return shared / (self.w * self.h + other.w * other.h - shared)


def detect_faces(
    pixels: NDArray[np.uint8], max_faces: int = 6, yunet: str | os.PathLike[str] | None = None
) -> list[FaceBox]:
    """At most max_faces proposals in a photo uint8 (H,W,3) RGB: confident ones first, each group largest first.

    With `yunet`, or the environment variable FACEEDIT_YUNET, naming YuNet's ONNX file, that network is asked instead
    of the cascades. Raises WeightsError when the named file is missing or unusable.
    """
    return FaceSearch(pixels, yunet).first()[:max_faces]


class Proposals:
    """The boxes of a photo as a search gives them, the likely and the cheap ones first; here boxes that are known."""

    def __init__(self, boxes: Sequence[FaceBox]) -> None:
        self._boxes = list(boxes)

    def first(self) -> list[FaceBox]:
        """What the usual search finds: confident boxes first, each group largest first."""
        return self._boxes

    def larger(self, side_px: float) -> list[FaceBox]:
        """Confident boxes of at least side_px that the usual search cannot see: tilted heads. Cheap where side_px is a
        good part of the photo."""
        return []

    def rest(self) -> list[FaceBox]:
        """Everything else that can be found at all; no box comes twice, but a face may."""
        return []


class FaceSearch(Proposals):
    """Proposals in one photo uint8 (H,W,3) RGB, found as they are asked for; the arguments of `detect_faces`.

    The cascades see upright heads at the size of a portrait. Small faces of large photos, and tilted heads, take
    searches that cost several times as much and wait until a photo without a confident box, or `rest`, needs them.
    """

    def __init__(self, pixels: NDArray[np.uint8], yunet: str | os.PathLike[str] | None = None) -> None:
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise ValueError(
                f"detect_faces: pixels must be uint8 of shape (H, W, 3), got {pixels.dtype} {pixels.shape}; use "
                "read_image"
            )
        self._pixels = pixels
        model = yunet or os.environ.get(YUNET_VARIABLE)
        self._yunet = Path(model) if model else None
        # Searches that are still to be made, in this order; YuNet sees tilted heads by itself.
        self._left = [self._fine] if self._yunet else [self._fine, self._tilted]

    def first(self) -> list[FaceBox]:
        boxes = self._look(_WORK_PX)
        while self._yunet is None and self._left and not any(box.score >= CONFIDENT for box in boxes):
            boxes = _distinct(boxes + self._left.pop(0)())
        return _ordered(boxes)

    def larger(self, side_px: float) -> list[FaceBox]:
        if self._tilted not in self._left:
            return []
        return _ordered([box for box in self._tilted(side_px) if box.score >= CONFIDENT])

    def rest(self) -> list[FaceBox]:
        boxes: list[FaceBox] = []
        while self._left:
            boxes += self._left.pop(0)()
        return _ordered(_distinct(boxes))

    def _look(self, work_px: int) -> list[FaceBox]:
        """Upright proposals at one size of the photo."""
        small, scale = _working_copy(self._pixels, work_px)
        return _yunet(small, scale, self._yunet) if self._yunet else _cascades(_equalised(small), scale)

    def _fine(self) -> list[FaceBox]:
        return self._look(_FINE_PX) if max(self._pixels.shape) > _WORK_PX else []

    def _tilted(self, side_px: float = 0.0) -> list[FaceBox]:
        small, scale = _working_copy(self._pixels, _WORK_PX)
        grey = _equalised(small)
        return [box for angle in _TILTS_DEG for box in _tilted(grey, scale, angle, side_px)]


def _ordered(boxes: list[FaceBox]) -> list[FaceBox]:
    """Those large enough to be faces, of these the best-scored; confident ones first, each group largest first."""
    best = sorted((box for box in boxes if min(box.w, box.h) >= MIN_FACE_PX), key=lambda box: -box.score)
    return sorted(best[:MOST_PROPOSALS], key=lambda box: (box.score < CONFIDENT, -box.w * box.h))


def _equalised(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.asarray(cv2.equalizeHist(cv2.cvtColor(pixels, cv2.COLOR_RGB2GRAY)), dtype=np.uint8)


def _working_copy(pixels: NDArray[np.uint8], work_px: int) -> tuple[NDArray[np.uint8], float]:
    """The photo at the size that is searched, and working pixels per photo pixel."""
    height, width = pixels.shape[:2]
    long_side = max(height, width)
    scale = work_px / long_side if long_side > work_px else min(max(_SMALL_PX / long_side, 1.0), 2.0)
    if scale == 1.0:
        return pixels, scale
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(pixels, size, interpolation=interpolation), dtype=np.uint8), scale


def _cascades(grey: NDArray[np.uint8], scale: float, side_px: float = 0.0) -> list[FaceBox]:
    """Proposals of all cascades on an equalised grey image, in photo pixels, of at least side_px; agreeing cascades add
    their hits up."""
    side = max(round(MIN_FACE_PX * min(scale, 1.0)), 24, round(_MIN_SHARE * min(grey.shape)), round(side_px * scale))
    boxes: list[FaceBox] = []
    for cascade in _classifiers():
        found, hits = cascade.detectMultiScale2(grey, scaleFactor=1.1, minNeighbors=1, minSize=(side, side))
        for (x, y, w, h), count in zip(found, np.ravel(hits), strict=True):
            corner, size = (float(x) / scale, float(y) / scale), (float(w) / scale, float(h) / scale)
            boxes.append(FaceBox(*corner, *size, float(count) / (float(count) + _HALF_TRUST)))
    return _distinct(boxes)


def _classifiers() -> list[Any]:
    if not hasattr(_local, "cascades"):
        _local.cascades = [cv2.CascadeClassifier(cv2.data.haarcascades + name) for name in _CASCADES]
    cascades: list[Any] = _local.cascades
    return cascades


def _distinct(boxes: list[FaceBox]) -> list[FaceBox]:
    """One box per face: the best-scored of each overlapping group, its score raised by those it stands for."""
    kept: list[FaceBox] = []
    for box in sorted(boxes, key=lambda box: -box.score):
        twin = next((i for i, other in enumerate(kept) if box.overlap(other) > _OVERLAP), None)
        if twin is None:
            kept.append(box)
            continue
        best = kept[twin]
        hits = sum(_HALF_TRUST * b.score / (1.0 - b.score) for b in (best, box))
        score = hits / (hits + _HALF_TRUST)
        kept[twin] = FaceBox(best.x, best.y, best.w, best.h, score, best.angle_deg, best.landmarks)
    return kept


def _tilted(grey: NDArray[np.uint8], scale: float, angle_deg: float, side_px: float) -> list[FaceBox]:
    """Proposals for heads rolled by angle_deg: the image is turned back, searched, and the boxes mapped."""
    height, width = grey.shape
    # OpenCV's positive angle is counter-clockwise, which is what rights a head rolled clockwise.
    turn = cv2.getRotationMatrix2D(((width - 1) / 2, (height - 1) / 2), angle_deg, 1.0)
    cosine, sine = abs(turn[0, 0]), abs(turn[0, 1])
    wide, high = int(np.ceil(width * cosine + height * sine)), int(np.ceil(width * sine + height * cosine))
    turn[:, 2] += ((wide - width) / 2, (high - height) / 2)
    turned = cv2.warpAffine(grey, turn, (wide, high), flags=cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    back = cv2.invertAffineTransform(turn)
    boxes: list[FaceBox] = []
    for box in _cascades(np.asarray(turned, dtype=np.uint8), 1.0, side_px * scale):
        x, y = (back[:, :2] @ np.array([box.x + box.w / 2, box.y + box.h / 2]) + back[:, 2]).tolist()
        if 0 <= x < width and 0 <= y < height:
            w, h = box.w / scale, box.h / scale
            boxes.append(FaceBox(x / scale - w / 2, y / scale - h / 2, w, h, box.score, angle_deg))
    return boxes


def _yunet(small: NDArray[np.uint8], scale: float, model: Path) -> list[FaceBox]:
    """YuNet's faces in photo pixels. Source: Wu et al. 2023, "YuNet: a tiny millisecond-level face detector"."""
    if not model.is_file():
        raise WeightsError(f"detect_faces: yunet must be an ONNX file, got {model}, which is missing; check the path")
    try:
        detector = cv2.FaceDetectorYN.create(str(model), "", (small.shape[1], small.shape[0]), 0.6, 0.3)
        _, rows = detector.detect(cv2.cvtColor(small, cv2.COLOR_RGB2BGR))
    except cv2.error as error:
        raise WeightsError(
            f"detect_faces: yunet must be YuNet's ONNX file, got {model}, which OpenCV cannot run; download it again"
        ) from error
    boxes: list[FaceBox] = []
    for row in np.zeros((0, 15)) if rows is None else np.asarray(rows, dtype=np.float64):
        x, y, w, h = (float(v) for v in row[:4] / scale)
        # The network's points are edge-based in its own raster; ours are pixel centres of the photo.
        points = (row[4:14].reshape(5, 2) + 0.5) / scale - 0.5
        eyes = points[1] - points[0]
        roll = float(np.degrees(np.arctan2(eyes[1], eyes[0])))
        boxes.append(FaceBox(x, y, w, h, float(row[14]), roll, tuple((float(a), float(b)) for a, b in points)))
    return boxes
