# SPDX-License-Identifier: Apache-2.0
"""Sharpening a coarse mask against the photo: hair strands, at the photo's own resolution.

The guided filter explains the mask locally as an affine function of the photo's colours, so that the mask's edge moves
to the photo's edge. Source: He, Sun, Tang 2013, "Guided Image Filtering"; He, Sun 2015, "Fast Guided Filter".
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

CORE, FAR = 0.95, 0.02
"""A coarse mask is believed above CORE and below FAR; only the band between them is refined."""

_SUBSAMPLED_RADIUS_PX = 8  # windows larger than this are filtered at reduced size: their sums hardly change


def guided_filter(
    guide: NDArray[Any],
    mask: NDArray[Any],
    radius_px: int,
    eps: float,
    subsample: int = 1,
    weights: NDArray[Any] | None = None,
) -> NDArray[np.float32]:
    """Filter mask (H,W) with a colour guide (H,W,3), uint8 or float in [0, 1]; returns float32 (H,W), not clipped.

    In each window of side 2 radius_px + 1 the mask is fitted as a · colour + b with a ridge of eps (in squared colour
    units of [0, 1]); overlapping fits are averaged. With subsample s > 1 the fits are made at 1/s of the size and
    applied at the full one. weights (H,W) > 0 say how much each pixel counts in the fits. Borders are mirrored.
    Raises ValueError on shapes and ranges.
    """
    if guide.ndim != 3 or guide.shape[2] != 3 or guide.shape[:2] != mask.shape:
        raise ValueError(
            f"guided_filter: guide must be (H, W, 3) with mask (H, W), got {guide.shape} and {mask.shape}; resize one"
        )
    if radius_px < 1 or not eps > 0 or subsample < 1:
        raise ValueError(
            "guided_filter: radius_px and subsample must be at least 1 and eps positive,"
            f" got {radius_px}, {subsample} and {eps}; use for instance 8, 1 and 1e-4"
        )
    size = (max(round(mask.shape[1] / subsample), 1), max(round(mask.shape[0] / subsample), 1))
    trust = np.ones(mask.shape, np.float32) if weights is None else weights.astype(np.float32, copy=False)
    colours = _resized(guide, size, cv2.INTER_AREA).astype(np.float32)
    unit = np.float32(1 / 255 if guide.dtype == np.uint8 else 1)
    # The fit does not depend on the origin of colour space; at the mean, variances lose least to rounding.
    origin = colours.mean((0, 1))
    slope, offset = _local_fit(
        (colours - origin) * unit,
        _resized(mask.astype(np.float32, copy=False), size, cv2.INTER_AREA),
        _resized(trust, size, cv2.INTER_AREA),
        max(round(radius_px / subsample), 1),
        eps,
    )
    full = (mask.shape[1], mask.shape[0])
    filtered = np.array(_resized(offset, full, cv2.INTER_LINEAR), dtype=np.float32)
    for channel in range(3):  # one at a time: at 24 megapixels three planes of floats are what memory is spent on
        plane = (guide[..., channel].astype(np.float32) - origin[channel]) * unit
        filtered += _resized(slope[..., channel], full, cv2.INTER_LINEAR) * plane
    return filtered


def refine_mask(
    photo_rgb: NDArray[np.uint8], soft: NDArray[Any], radius_px: int | None = None, eps: float = 1e-3
) -> NDArray[np.float32]:
    """Refine a soft mask (H,W) or (C,H,W) in [0, 1] against the photo uint8 (H,W,3); returns the same shape, float32.

    Where the mask is sure (above 0.95 or below 0.02) it is returned unchanged; between, it follows the photo's edges.
    The fits rest on sure pixels, so that colours sort the doubtful ones: where hair and background look alike the mask
    stays as it was. radius_px should reach across the doubtful band; by default 1/16 of the shorter side, which is 16
    pixels of a mask parsed at 256. Pass the region of the face, not the whole photo.
    """
    if photo_rgb.ndim != 3 or photo_rgb.shape[2] != 3 or photo_rgb.shape[:2] != soft.shape[-2:] or soft.ndim > 3:
        raise ValueError(
            "refine_mask: soft must be (H, W) or (C, H, W) of photo_rgb's height and width,"
            f" got {soft.shape} and {photo_rgb.shape}; unwarp the mask first"
        )
    if soft.ndim == 3:
        return np.stack([refine_mask(photo_rgb, plane, radius_px, eps) for plane in soft])
    coarse = soft.astype(np.float32, copy=False)
    refined = coarse.copy()
    radius = radius_px if radius_px is not None else max(round(min(coarse.shape) / 16), 2)
    doubtful = (coarse > FAR) & (coarse < CORE)
    rows, columns = np.flatnonzero(doubtful.any(1)), np.flatnonzero(doubtful.any(0))
    if len(rows) == 0:
        return refined
    # Two windows beyond the band every fit that reaches it is complete, so the rest need not be filtered.
    reach = 2 * radius + 1
    window = (
        slice(max(int(rows[0]) - reach, 0), int(rows[-1]) + reach + 1),
        slice(max(int(columns[0]) - reach, 0), int(columns[-1]) + reach + 1),
    )
    subsample = max(radius // _SUBSAMPLED_RADIUS_PX, 1)
    local = coarse[window]
    # Unweighted, the fit would learn the blur itself; the small constant leaves a say where nothing is sure.
    sureness = (2 * local - 1) ** 4 + np.float32(0.01)
    filtered = np.clip(guided_filter(photo_rgb[window], local, radius, eps, subsample, sureness), 0.0, 1.0)
    # Fade to the coarse value where doubt ends: a hard switch would draw the outline of the band.
    trust = np.clip(np.minimum((local - FAR) / 0.08, (CORE - local) / 0.08), 0.0, 1.0)
    refined[window] = local + trust * (filtered - local)
    return refined


def _resized(values: NDArray[Any], size: tuple[int, int], interpolation: int) -> NDArray[Any]:
    if values.shape[1::-1] == size:
        return values
    return np.asarray(cv2.resize(values, size, interpolation=interpolation))


def _local_fit(
    colours: NDArray[np.float32], target: NDArray[np.float32], trust: NDArray[np.float32], radius: int, eps: float
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Averaged slopes (H,W,3) and offsets (H,W) of the windowed ridge regression (He et al. 2013, eqs. 19-21).

    Here every mean is weighted by `trust`, also that of overlapping fits: a window in which little is sure says little.
    """

    def blur(values: NDArray[Any]) -> NDArray[np.float32]:
        side = 2 * radius + 1
        return np.asarray(cv2.blur(values, (side, side), borderType=cv2.BORDER_REFLECT), dtype=np.float32)

    total = blur(trust)

    def mean(values: NDArray[Any]) -> NDArray[np.float32]:
        if values.ndim == 3:
            return np.asarray(blur(values * trust[..., None]) / total[..., None], dtype=np.float32)
        return np.asarray(blur(values * trust) / total, dtype=np.float32)

    colour_mean, target_mean = mean(colours), mean(target)
    r, g, b = (np.ascontiguousarray(colours[..., i]) for i in range(3))
    mr, mg, mb = (colour_mean[..., i] for i in range(3))
    rr, gg, bb = (mean(v * v) - m * m + np.float32(eps) for v, m in ((r, mr), (g, mg), (b, mb)))
    rg, rb, gb = mean(r * g) - mr * mg, mean(r * b) - mr * mb, mean(g * b) - mg * mb
    tr, tg, tb = (mean(target * v) - target_mean * m for v, m in ((r, mr), (g, mg), (b, mb)))
    # The 3 x 3 covariance is symmetric: its inverse is the matrix of cofactors over the determinant.
    crr, cgg, cbb = gg * bb - gb * gb, rr * bb - rb * rb, rr * gg - rg * rg
    crg, crb, cgb = rb * gb - rg * bb, rg * gb - rb * gg, rg * rb - rr * gb
    determinant = np.maximum(rr * crr + rg * crg + rb * crb, np.float32(eps) ** 3)
    slope = np.stack(
        [
            (crr * tr + crg * tg + crb * tb) / determinant,
            (crg * tr + cgg * tg + cgb * tb) / determinant,
            (crb * tr + cgb * tg + cbb * tb) / determinant,
        ],
        axis=-1,
    )
    offset = target_mean - np.einsum("hwc,hwc->hw", slope, colour_mean)
    summed = blur(total)
    return blur(slope * total[..., None]) / summed[..., None], blur(offset * total) / summed
