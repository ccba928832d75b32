# SPDX-License-Identifier: Apache-2.0
"""Portraits seen as FFHQ's alignment crops them.

Rendered portraits, like the crops that editors parse, show that square enlarged. Sampling the one from the other keeps
true pixels beyond the border of a crop that is turned or shifted.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from faceedit.alignment import align_ffhq


def ffhq_frames(landmarks: Tensor, size_px: int) -> Tensor:
    """Where FFHQ's square lies in each portrait: affine maps N×2×3 from points of the square to points of the portrait,
    both in `grid_sample`'s coordinates (−1 … 1 from edge to edge).

    Args:    landmarks N×5×2 in pixels of portraits size_px wide.
    Raises:  FaceError on landmarks that no square fits.
    """
    frames = np.zeros((len(landmarks), 2, 3))
    for row, points in enumerate(landmarks.double().cpu().numpy()):
        to_portrait = align_ffhq(points, (size_px, size_px), size_px).inverse
        linear, middle = to_portrait[:, :2], (size_px - 1) / 2
        # Pixel centres p and points n of equal squares: p = (n + 1) size / 2 − 1/2.
        frames[row, :, :2] = linear
        frames[row, :, 2] = (linear @ (middle, middle) + to_portrait[:, 2] + 0.5) * 2 / size_px - 1
    return torch.from_numpy(frames).float()


def framed(grid: Tensor, frames: Tensor) -> Tensor:
    """A sampling grid N×S×S×2 of FFHQ's square as one of the portrait around it."""
    moved = grid.flatten(1, 2) @ frames[:, :, :2].transpose(1, 2) + frames[:, None, :, 2]
    return moved.view_as(grid)
