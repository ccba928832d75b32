# SPDX-License-Identifier: Apache-2.0
"""Sharpening a coarse mask against the photo: hair strands, at the photo's own resolution.

At the rim of a mask a pixel is a mixture. How much of it belongs inside tells its place on the line between the colours
of the inside and of the outside nearby (Ruzon, Tomasi 2000, "Alpha Estimation in Natural Images"), which are averaged
where the mask is sure (normalised convolution: Knutsson, Westin 1993).
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

CORE, FAR = 0.95, 0.02
"""Of a coarse mask, only the band between the two and the rim of its outline are refined."""

_PARSED_PX = 256  # a photo's side is so many pixels of its parse
_REACH = 1.2  # of the average over nearby colours: standard deviation, in such pixels
_FARTHER = ((1, 1.0), (4, 1e-2), (16, 1e-5))  # multiples of that reach, and what they count where nothing is nearer
_ALIKE, _APART = 0.06, 0.2  # distances of the two colours, in [0, 1], at which the photo tells nothing, and all
_BAND_RAMP = 0.08  # of the coarse mask's values over which refinement fades in
_PIXELS = 1_000_000  # solved at a time, which bounds memory on photos of any size


def refine_mask(photo_rgb: NDArray[np.uint8], soft: NDArray[Any]) -> NDArray[np.float32]:
    """Refine a soft mask (H,W) or (C,H,W) in [0, 1] against the photo uint8 (H,W,3); returns the same shape, float32.

    Away from its outline the mask is returned unchanged where it is sure (above 0.95 or below 0.02). Elsewhere it
    follows the photo's colours, as far as inside and outside differ: where hair and background look alike it stays as
    it was. Pass the region of the face, of which a parse is about 256 pixels across, not the whole photo.
    Raises ValueError on shapes.
    """
    if photo_rgb.ndim != 3 or photo_rgb.shape[2] != 3 or photo_rgb.shape[:2] != soft.shape[-2:] or soft.ndim > 3:
        raise ValueError(
            "refine_mask: soft must be (H, W) or (C, H, W) of photo_rgb's height and width,"
            f" got {soft.shape} and {photo_rgb.shape}; unwarp the mask first"
        )
    if soft.ndim == 3:
        return np.stack([refine_mask(photo_rgb, plane) for plane in soft])
    refined = np.clip(soft, 0, 1).astype(np.float32)
    unit = max(min(soft.shape) / _PARSED_PX, 1.0)
    if not (refined > FAR).any() or not (refined < CORE).any():
        return refined
    # What is averaged is smooth: of large photos it is computed at about twice the parse's resolution.
    step = max(int(unit / 2), 1)
    size = (max(soft.shape[1] // step, 1), max(soft.shape[0] // step, 1))
    photo, coarse = (cv2.resize(image, size, interpolation=cv2.INTER_AREA) for image in (photo_rgb, refined))
    unit /= step
    depth = _depth(coarse > 0.5)
    rim = np.clip((unit + 1 - np.abs(depth)) / 1.5, 0, 1)
    doubtful = np.clip(np.minimum((refined - FAR) / _BAND_RAMP, (CORE - refined) / _BAND_RAMP), 0, 1)
    weight = np.maximum(doubtful, cv2.resize(rim, refined.shape[::-1]))
    sides = [_nearby(photo, sure, unit) for sure in _sure_sides(coarse, depth, unit)]
    rows, columns = np.nonzero(weight)
    for start in range(0, len(rows), _PIXELS):
        at = rows[start : start + _PIXELS], columns[start : start + _PIXELS]
        inner, outer = (_sampled(side, at, refined.shape) for side in sides)
        alpha, told = _on_colour_line(photo_rgb[at].astype(np.float32) / 255, inner, outer)
        refined[at] += weight[at] * told * (alpha - refined[at])
    return refined


def _depth(inside: NDArray[np.bool_]) -> NDArray[np.float32]:
    """Pixels from the outline, positive inside."""
    inner, outer = (cv2.distanceTransform(part.astype(np.uint8), cv2.DIST_L2, 5) for part in (inside, ~inside))
    return np.asarray(np.minimum(inner, inside.size) - np.minimum(outer, inside.size), dtype=np.float32)


def _sure_sides(
    coarse: NDArray[Any], depth: NDArray[np.float32], unit: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """How surely a pixel lies inside, and outside: away from the outline, and the mask says so."""
    inside = np.clip(depth - 0.7 * unit, 0, 1) * np.clip((coarse - 0.6) / 0.35, 0, 1)
    outside = np.clip(-depth - 0.7 * unit, 0, 1) * np.clip((0.4 - coarse) / 0.35, 0, 1)
    return inside, outside


def _nearby(photo: NDArray[Any], sure: NDArray[np.float32], unit: float) -> NDArray[np.float32]:
    """The photo's colour (H,W,3) in [0, 1] where the weight (H,W) is, spread over everything around it."""
    weighted = np.dstack([photo.astype(np.float32) / 255 * sure[..., None], sure])
    sigma, side = _REACH * max(unit, 1.2), sure.shape[::-1]
    total = np.zeros_like(weighted)
    for times, share in _FARTHER:
        # A wide average of a smaller picture looks the same, and is quicker.
        small = cv2.resize(weighted, (-(-side[0] // times), -(-side[1] // times)), interpolation=cv2.INTER_AREA)
        total += share * cv2.resize(cv2.GaussianBlur(small, (0, 0), sigma), side)
    return np.asarray(total[..., :3] / np.maximum(total[..., 3:], 1e-9), dtype=np.float32)


def _sampled(
    image: NDArray[np.float32], at: tuple[NDArray[np.intp], NDArray[np.intp]], size: tuple[int, ...]
) -> NDArray[np.float32]:
    """Colours (N,3) of an image at N pixels (rows, columns) of a larger one of `size`, bilinear."""
    y, x = (
        ((where + 0.5) * (small / large) - 0.5).astype(np.float32)
        for where, small, large in zip(at, image.shape, size, strict=False)
    )
    # remap's pictures may not be longer than 32,767.
    wide = 1024
    padding = -len(x) % wide
    x, y = (np.pad(values, (0, padding)).reshape(-1, wide) for values in (x, y))
    colours = cv2.remap(image, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
    return np.asarray(colours.reshape(-1, 3)[: len(at[0])], dtype=np.float32)


def _on_colour_line(
    colours: NDArray[Any], inner: NDArray[np.float32], outer: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Places (N,) of colours (N,3) between the outer ones (0) and the inner ones (1), and how far they can be told."""
    across = inner - outer
    distance = np.einsum("nc,nc->n", across, across)
    alpha = np.clip(np.einsum("nc,nc->n", colours - outer, across) / np.maximum(distance, 1e-6), 0, 1)
    return alpha, np.clip((np.sqrt(distance) - _ALIKE) / (_APART - _ALIKE), 0, 1)
