# SPDX-License-Identifier: Apache-2.0
"""Putting an edited crop back into its photo, and nothing else.

The edit returns as a residual, after minus before, enlarged and added to the photo: what the crop could not resolve
(pores, hair strands) was in neither of the two and therefore stays, except where the edit says that it hides what was
there. It is confined by a feathered mask, and every pixel where that mask is zero keeps its exact value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from faceedit.alignment import Alignment, Box, PhotoRegion

_STRIP_PIXELS = 1_000_000  # resampled at a time, which bounds memory on photos of any size
_LEAST_WEIGHT = 1.0 / 512.0  # even a change from black to white would move such a pixel by half a level
_BORDER_SHARE = 1.0 / 16.0  # of the crop's side over which the mask fades towards the crop's border


@dataclass(frozen=True, eq=False)
class Composite:
    """A photo with an edit in it.

    pixels uint8 (H,W,3), byte-identical to the input wherever `region` is zero; region float32 in [0, 1] on its box.
    """

    pixels: NDArray[np.uint8]
    region: PhotoRegion

    def mask(self) -> NDArray[np.float32]:
        """The composited region on the whole photo, float32 (H,W)."""
        return self.region.full()


def feather(mask: NDArray[Any], feather_px: float) -> NDArray[np.float32]:
    """Soften a crop mask (S,S) in [0, 1] over feather_px pixels and fade it to exactly zero at the crop's border."""
    if mask.ndim != 2 or not feather_px >= 0:
        raise ValueError(
            f"feather: mask must be (S, S) and feather_px at least 0, got {mask.shape} and {feather_px}; pass one plane"
        )
    soft = np.clip(mask.astype(np.float32), 0.0, 1.0)
    if feather_px > 0:
        soft = np.asarray(cv2.GaussianBlur(soft, (0, 0), feather_px / 2, borderType=cv2.BORDER_REPLICATE))
    return soft * border_fade(mask.shape[0])


def paste_back(
    photo: NDArray[np.uint8],
    face_before: NDArray[Any],
    face_after: NDArray[Any],
    alignment: Alignment,
    mask: NDArray[Any],
    feather_px: float = 3.0,
    detail: PhotoRegion | None = None,
    opacity: NDArray[Any] | None = None,
) -> Composite:
    """Add what changed between two aligned crops to the photo, inside a mask.

    Args: photo uint8 (H,W,3); face_before, face_after (S,S,3), both uint8 or both float in [-1, 1], S = the
          alignment's size; mask (S,S) in [0, 1], where the edit may show; feather_px in crop pixels; detail, a mask of
          the same part refined at the photo's resolution (matting.refine_mask), takes the place of the enlarged mask:
          the residual is then first spread beyond the coarse mask's soft rim, so that strands get their full change;
          opacity (S,S) in [0, 1], how much of the photo's own detail the edit hides: at 1 the enlarged face_after
          stands alone, as skin does where there were strands; None hides nothing.
    Raises: ValueError on shapes and dtypes.
    """
    _check(photo, face_before, face_after, alignment, mask, detail, opacity)
    coarse = feather(mask, feather_px)
    residual = _levels(face_after) - _levels(face_before)
    box = alignment.photo_box()
    x0, y0, x1, y1 = box
    pixels = photo.copy()
    region = np.zeros((y1 - y0, x1 - x0), np.float32)
    if region.size == 0:
        return Composite(pixels, PhotoRegion(region, box, alignment.photo_size))
    fade = border_fade(alignment.size_px)
    if detail is not None:
        residual = _spread(residual, mask)
    rows = max(_STRIP_PIXELS // (x1 - x0), 1)
    for top in range(y0, y1, rows):
        strip: Box = (x0, top, x1, min(top + rows, y1))
        if detail is None:
            weight = alignment.unwarp_soft(coarse, strip).values
        else:
            weight = alignment.unwarp_soft(fade, strip).values * detail.on(strip)
        np.minimum(weight, 1.0, out=weight)  # resampling's rounding may pass 1
        weight[weight < _LEAST_WEIGHT] = 0.0
        region[top - y0 : strip[3] - y0] = weight
        if not weight.any():
            continue
        change = alignment.unwarp_image(residual, strip).values
        view = pixels[top : strip[3], x0:x1]
        if opacity is not None:
            own_detail = view - alignment.unwarp_image(_levels(face_before), strip).values
            change = change - alignment.unwarp_soft(opacity.astype(np.float32), strip).values[..., None] * own_detail
        edited = np.clip(np.rint(view + change * weight[..., None]), 0, 255).astype(np.uint8)
        np.copyto(view, edited, where=weight[..., None] > 0)
    return Composite(pixels, PhotoRegion(region, box, alignment.photo_size))


def _check(
    photo: NDArray[Any],
    before: NDArray[Any],
    after: NDArray[Any],
    alignment: Alignment,
    mask: NDArray[Any],
    detail: PhotoRegion | None,
    opacity: NDArray[Any] | None,
) -> None:
    side = alignment.size_px
    if photo.dtype != np.uint8 or photo.shape != (*alignment.photo_size, 3):
        raise ValueError(
            f"paste_back: photo must be uint8 of shape {(*alignment.photo_size, 3)}, got {photo.dtype} {photo.shape};"
            " pass the photo that was aligned"
        )
    if before.shape != (side, side, 3) or after.shape != before.shape or mask.shape != (side, side):
        raise ValueError(
            f"paste_back: face_before, face_after and mask must be of side {side}, got {before.shape}, {after.shape}"
            f" and {mask.shape}; use alignment.resized() for another crop size"
        )
    if (before.dtype == np.uint8) != (after.dtype == np.uint8):
        raise ValueError(
            f"paste_back: face_before and face_after must have one range, got {before.dtype} and {after.dtype};"
            " pass both as uint8 or both as float in [-1, 1]"
        )
    if detail is not None and detail.photo_size != alignment.photo_size:
        raise ValueError(
            f"paste_back: detail must belong to a photo of size {alignment.photo_size}, got {detail.photo_size};"
            " refine the mask on this photo"
        )
    if opacity is not None and opacity.shape != (side, side):
        raise ValueError(
            f"paste_back: opacity must be of side {side}, got {opacity.shape}; give it the size of the crops"
        )


def _levels(crop: NDArray[Any]) -> NDArray[np.float32]:
    """Crop values in the photo's 0 … 255."""
    if crop.dtype == np.uint8:
        return crop.astype(np.float32)
    return np.asarray(crop, dtype=np.float32) * 127.5 + 127.5


def border_fade(size_px: int) -> NDArray[np.float32]:
    """How far an edit of a square crop shows, (S,S): 0 on its outermost pixels, rising smoothly to 1."""
    distance = np.minimum(np.arange(size_px), np.arange(size_px)[::-1]) / max(size_px * _BORDER_SHARE, 1.0)
    t = np.clip(distance, 0.0, 1.0)
    ramp = (t * t * (3 - 2 * t)).astype(np.float32)
    return np.outer(ramp, ramp)


def _spread(residual: NDArray[np.float32], mask: NDArray[Any]) -> NDArray[np.float32]:
    """Carry the residual of the mask's inside over its soft rim, where a coarse edit fades although strands do not.

    On the rim residual = mask * change; the change is fitted by least squares over a Gaussian neighbourhood in which
    the core counts most (normalised convolution, Knutsson and Westin 1993), and takes over where the mask is weak.
    """
    alpha = np.clip(mask.astype(np.float32), 0.0, 1.0)
    sigma = max(residual.shape[0] / 32.0, 1.0)
    weighted = cv2.GaussianBlur(residual * (alpha**3)[..., None], (0, 0), sigma)
    total = cv2.GaussianBlur(alpha**4, (0, 0), sigma)[..., None]
    change = weighted / np.maximum(total, 1e-3)
    own = (alpha**4)[..., None]
    return np.asarray(residual * own + change * (1 - own), dtype=np.float32)
