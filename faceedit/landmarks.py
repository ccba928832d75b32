# SPDX-License-Identifier: Apache-2.0
"""The five FFHQ landmarks, read off a soft face parse.

A parse knows eyes, nose and lips as areas, and five points are all that alignment needs, so no landmark network is
shipped. Each part is taken from its largest connected blob, which keeps stray probability elsewhere from pulling at it.
Parts that are hidden are inferred from the others, and every inference costs plausibility.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ

Points: TypeAlias = NDArray[np.float64]
Plane: TypeAlias = NDArray[np.float32]

MIN_SCORE = 0.35
"""Below this the five points are not those of a face that can be aligned."""

_NOSE_TIP = 0.88  # share of the way from the bridge to the lower edge of the nose's region
_BROW_TO_EYE = 0.29  # distances as shares of eyes-to-mouth, of a mean face
_NOSE_TO_MOUTH = 0.45
_MIN_AREA = 1.0e-4  # of the crop: a blob smaller than this (6 px at 256 x 256) is noise


@dataclass(frozen=True, eq=False)
class FaceLandmarks:
    """Five points float32 (5,2) in crop pixels, and how much the parse looks like a face around them, in [0, 1]."""

    points: NDArray[np.float32]
    score: float


@dataclass(frozen=True, eq=False)
class _Part:
    """The main blob of one part: probabilities (zero elsewhere), their centroid, sum, and highest value."""

    weights: Plane
    centre: Points
    area: float
    peak: float


def landmarks_from_mask(soft_mask: Tensor | NDArray[Any], min_score: float = MIN_SCORE) -> NDArray[np.float32] | None:
    """Image-left eye, image-right eye, nose tip, image-left and -right mouth corner, float32 (5,2) x, y in crop pixels.

    soft_mask (19,S,S) in [0, 1], CelebAMask-HQ scheme. None when the mask does not look like a face.
    """
    found = measure_landmarks(soft_mask)
    return found.points if found is not None and found.score >= min_score else None


def measure_landmarks(soft_mask: Tensor | NDArray[Any]) -> FaceLandmarks | None:
    """The same points with their plausibility; None when too few parts are visible to infer them at all.

    Needed are at least two of: an eye (or glasses, or both brows), the nose, the mouth; one of them on the eye line.
    """
    array = soft_mask.detach().float().cpu().numpy() if isinstance(soft_mask, Tensor) else soft_mask
    mask: NDArray[np.float32] = np.asarray(array, dtype=np.float32)
    if mask.ndim != 3 or mask.shape[0] != CELEBAMASK_HQ.num_classes or mask.shape[1] != mask.shape[2]:
        raise ValueError(
            f"measure_landmarks: soft_mask must be of shape ({CELEBAMASK_HQ.num_classes}, S, S), got {mask.shape};"
            " pass one sample of a CelebAMask-HQ parse"
        )
    nose = _main_part(_plane(mask, "nose"))
    mouth = _main_part(_plane(mask, "mouth", "u_lip", "l_lip"))
    brows = (_main_part(_plane(mask, "r_brow")), _main_part(_plane(mask, "l_brow")))
    glasses = _joined(_blobs(_plane(mask, "eye_g")))
    measured = _eyes(mask)
    down = _downwards(measured, brows, glasses, nose, mouth)
    if down is None:
        return None
    eyes = _complete_eyes(measured, brows, glasses, nose, mouth, down)
    if eyes is None:
        return None
    middle = (eyes[0] + eyes[1]) / 2
    across = eyes[1] - eyes[0]
    if mouth is not None:
        corners = _mouth_corners(mouth, across)
    else:
        assert nose is not None  # _downwards needs one of the two
        drop = _nose_tip(nose, down) - middle
        corners = middle + drop / (1 - _NOSE_TO_MOUTH) + np.stack([-0.4 * across, 0.4 * across])
    tip = _nose_tip(nose, down) if nose is not None else middle + (1 - _NOSE_TO_MOUTH) * (corners.mean(0) - middle)
    points = np.stack([eyes[0], eyes[1], tip, corners[0], corners[1]])
    score = _shape_score(points) * _evidence(measured, glasses, nose, mouth) * _support(mask, points)
    return FaceLandmarks(points.astype(np.float32), float(score))


def _plane(mask: NDArray[np.float32], *parts: str) -> Plane:
    return np.asarray(mask[[CELEBAMASK_HQ.id(part) for part in parts]].sum(0), dtype=np.float32)


def _blobs(plane: Plane) -> list[_Part]:
    """Connected blobs of a probability plane, largest first; blobs of noise size are dropped."""
    peak = float(plane.max())
    if peak < 0.15:
        return []
    threshold = 0.4 * min(peak, 1.0)
    count, labels = cv2.connectedComponents((plane > threshold).astype(np.uint8), connectivity=8)
    parts: list[_Part] = []
    for index in range(1, count):
        # The soft rim belongs to the blob: without it the centroid would be quantised by the threshold.
        near = cv2.dilate((labels == index).astype(np.uint8), np.ones((3, 3), np.uint8))
        weights = plane * near
        area = float(weights.sum())
        if area >= _MIN_AREA * plane.size:
            parts.append(_Part(weights, _centroid(weights), area, float(weights.max())))
    return sorted(parts, key=lambda part: -part.area)


def _main_part(plane: Plane) -> _Part | None:
    blobs = _blobs(plane)
    return blobs[0] if blobs else None


def _joined(blobs: list[_Part]) -> _Part | None:
    """Glasses: the bridge between the lenses is often too thin to be parsed, so both lenses together are the part."""
    lenses = [blob for blob in blobs[:2] if blob.area > 0.25 * blobs[0].area]
    if not lenses:
        return None
    weights = np.maximum.reduce([lens.weights for lens in lenses])
    return _Part(weights, _centroid(weights), float(weights.sum()), lenses[0].peak)


def _centroid(weights: Plane) -> Points:
    total = float(weights.sum())
    x = float((weights.sum(0) * np.arange(weights.shape[1])).sum()) / total
    y = float((weights.sum(1) * np.arange(weights.shape[0])).sum()) / total
    return np.array([x, y])


def _eyes(mask: NDArray[np.float32]) -> tuple[_Part | None, _Part | None]:
    """(image-left, image-right) eye.

    Blobs are found in the sum of both classes, since a parser that confuses left with right still finds the eyes. Two
    blobs are told apart by position; the class decides only which side a single one belongs to.
    """
    right_class, left_class = _plane(mask, "r_eye"), _plane(mask, "l_eye")
    blobs = _blobs(right_class + left_class)[:2]
    if len(blobs) == 2 and blobs[1].area > 0.12 * blobs[0].area:
        first, second = sorted(blobs, key=lambda part: float(part.centre[0]))
        return first, second
    if not blobs:
        return None, None
    weights = blobs[0].weights > 0
    is_left_in_image = float((right_class * weights).sum()) >= float((left_class * weights).sum())
    return (blobs[0], None) if is_left_in_image else (None, blobs[0])


def _downwards(
    eyes: tuple[_Part | None, _Part | None],
    brows: tuple[_Part | None, _Part | None],
    glasses: _Part | None,
    nose: _Part | None,
    mouth: _Part | None,
) -> Points | None:
    """Unit vector from forehead to chin, from the most symmetric pair of parts that is visible."""
    upper: Points | None = None
    for pair in (eyes, brows):
        if upper is None and pair[0] is not None and pair[1] is not None:
            upper = (pair[0].centre + pair[1].centre) / 2
    if upper is None and glasses is not None:
        upper = glasses.centre
    if upper is not None and (mouth is not None or nose is not None):
        lower = mouth if mouth is not None else nose
        assert lower is not None
        return _unit(lower.centre - upper)
    if nose is not None and mouth is not None and any(part is not None for part in (*eyes, *brows)):
        return _unit(mouth.centre - nose.centre)
    return None


def _complete_eyes(
    eyes: tuple[_Part | None, _Part | None],
    brows: tuple[_Part | None, _Part | None],
    glasses: _Part | None,
    nose: _Part | None,
    mouth: _Part | None,
    down: Points,
) -> tuple[Points, Points] | None:
    """Both eye centres: measured, else the lens on that side, else below the brow, else the other eye mirrored."""
    axis_parts = [part for part in (nose, mouth) if part is not None]
    origin = axis_parts[0].centre
    across = np.array([down[1], -down[0]])  # towards the image's right on an upright face
    centres: list[Points | None] = [None if part is None else part.centre for part in eyes]
    for side in (0, 1):
        if centres[side] is None and glasses is not None:
            centres[side] = _lens(glasses, origin, across * (1 if side else -1))
    for side in (0, 1):
        brow, other, other_brow = brows[side], eyes[1 - side], brows[1 - side]
        if centres[side] is not None or brow is None:
            continue
        if other is not None and other_brow is not None:
            drop = float((other.centre - other_brow.centre) @ down)
        elif mouth is not None:
            drop = _BROW_TO_EYE / (1 + _BROW_TO_EYE) * float((mouth.centre - brow.centre) @ down)
        else:
            continue
        centres[side] = brow.centre + drop * down
    for side in (0, 1):
        other_centre = centres[1 - side]
        if centres[side] is None and other_centre is not None:
            centres[side] = other_centre - 2 * float((other_centre - origin) @ across) * across
    left, right = centres
    return None if left is None or right is None else (left, right)


def _lens(glasses: _Part, origin: Points, outwards: Points) -> Points | None:
    """Centre of the half of the glasses that lies outwards of the nose's axis."""
    y, x = np.mgrid[: glasses.weights.shape[0], : glasses.weights.shape[1]]
    offset = (x - origin[0]) * outwards[0] + (y - origin[1]) * outwards[1]
    half = np.where(offset > 0, glasses.weights, 0).astype(np.float32)
    return _centroid(half) if float(half.sum()) > 0.15 * glasses.area else None


def _nose_tip(nose: _Part, down: Points) -> Points:
    y, x = np.mgrid[: nose.weights.shape[0], : nose.weights.shape[1]]
    along = (x - nose.centre[0]) * down[0] + (y - nose.centre[1]) * down[1]
    inside = nose.weights > 0.5 * nose.peak
    order = np.argsort(along[inside])
    heights, mass = along[inside][order], np.cumsum(nose.weights[inside][order])
    top, bottom = np.interp([0.02 * mass[-1], 0.98 * mass[-1]], mass, heights)
    # The lower half is the symmetric part; the bridge leans with the light and with the parser's doubts.
    lower = np.where(along > (top + bottom) / 2, nose.weights, 0).astype(np.float32)
    level = top + _NOSE_TIP * (bottom - top)
    base = _centroid(lower)
    return base + (level - float((base - nose.centre) @ down)) * down


def _mouth_corners(mouth: _Part, across: Points) -> Points:
    """Where the mouth ends along its own long axis, to a fraction of a pixel, (2,2) image-left first."""
    axis = _unit(across)
    y, x = np.nonzero(mouth.weights > 0.3 * mouth.peak)
    offsets = np.stack([x, y], -1) - mouth.centre
    covariance = np.cov(offsets.T, aweights=mouth.weights[y, x]) if len(x) > 3 else np.eye(2)
    spread, vectors = np.linalg.eigh(covariance)
    if spread[1] > 2.0 * spread[0]:  # an open mouth can be rounder than that; then the eye line tells the direction
        axis = vectors[:, 1] * (1.0 if vectors[:, 1] @ axis >= 0 else -1.0)
    # Turn the mouth level, so that its profile along the axis is a row of column maxima.
    reach = int(np.ceil(2.2 * np.sqrt(spread[1]))) + 4
    turn = np.array([[axis[0], -axis[1], 0.0], [axis[1], axis[0], 0.0]])
    turn[:, 2] = mouth.centre - turn[:, :2] @ np.array([reach, reach])
    side = 2 * reach + 1
    level = cv2.warpAffine(mouth.weights, turn, (side, side), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
    profile = level.max(0)
    half = 0.5 * float(profile.max())
    inside = np.nonzero(profile >= half)[0]
    first, last = int(inside[0]), int(inside[-1])
    ends = (_crossing(profile, first, -1, half), _crossing(profile, last, 1, half))
    depth = max((last - first) // 12, 1)
    corners = []
    for end, columns in zip(ends, (slice(first, first + depth), slice(last - depth + 1, last + 1)), strict=True):
        rows = level[:, columns].sum(1)
        corners.append([end, float((rows * np.arange(side)).sum() / rows.sum())])
    return np.asarray(np.array(corners) @ turn[:, :2].T + turn[:, 2])


def _crossing(profile: NDArray[Any], index: int, step: int, level: float) -> float:
    """Position between index and index + step at which the profile falls to level."""
    beyond = index + step
    if not 0 <= beyond < len(profile) or profile[index] == profile[beyond]:
        return float(index)
    return index + step * float((profile[index] - level) / (profile[index] - profile[beyond]))


def _unit(v: Points) -> Points:
    return v / max(float(np.hypot(*v)), 1e-9)


def _within(value: float, low: float, high: float, slack: float) -> float:
    """1 inside [low, high], falling linearly to 0 at `slack` outside."""
    return float(np.clip(1 - max(low - value, value - high, 0.0) / slack, 0.0, 1.0))


def _shape_score(points: Points) -> float:
    """How face-like five points are, in [0, 1]: bounds hold for heads turned up to about 45 degrees."""
    eyes, mouth = points[:2].mean(0), points[3:].mean(0)
    across = points[1] - points[0]
    width = float(np.hypot(*across))
    height = float(np.hypot(*(mouth - eyes)))
    if width < 1.0 or height < 1.0:
        return 0.0
    down = (mouth - eyes) / height
    side = np.array([down[1], -down[0]])
    tilt = abs(float(across @ down)) / width  # sine of the angle between the eye line and the perpendicular of the axis
    tip_along = float((points[2] - eyes) @ down) / height
    tip_aside = abs(float((points[2] - eyes) @ side)) / width
    mouth_width = float((points[4] - points[3]) @ across) / width**2
    return min(
        _within(height / width, 0.75, 1.9, 0.4),
        _within(tilt, 0.0, 0.25, 0.3),
        _within(tip_along, 0.3, 0.85, 0.25),
        _within(tip_aside, 0.0, 0.45, 0.4),
        _within(mouth_width, 0.35, 1.5, 0.3),
        float(across @ side > 0),
    )


def _evidence(
    eyes: tuple[_Part | None, _Part | None], glasses: _Part | None, nose: _Part | None, mouth: _Part | None
) -> float:
    """Mean certainty of the parts the points rest on; a part inferred from others counts little."""
    inferred_eye = 0.7 if glasses is not None else 0.4
    found = [inferred_eye if part is None else min(part.peak, 1.0) for part in eyes]
    found += [0.2 if part is None else min(part.peak, 1.0) for part in (nose, mouth)]
    return float(np.mean(found))


def _support(mask: NDArray[np.float32], points: Points) -> float:
    """Share of the pentagon between the points that the parse calls face, scaled so that 60 % is full support."""
    face = _plane(
        mask, "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "mouth", "u_lip", "l_lip"
    )  # fmt: skip
    outline = np.rint(points[[0, 1, 4, 3]]).astype(np.int32)
    inside = cv2.fillConvexPoly(np.zeros(face.shape, np.uint8), cv2.convexHull(outline), (1,))
    count = int(inside.sum())
    return min(float((face * inside).sum()) / count / 0.6, 1.0) if count else 0.0
