# SPDX-License-Identifier: Apache-2.0
"""Portraits sampled in FFHQ's frame agree with the runtime's alignment of the same landmarks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from faceedit.alignment import align_ffhq
from faceedit.errors import FaceError
from faceedit.training.framing import ffhq_frames, framed
from faceedit.training.synthetic import render, sample_parameters

SIDE = 96


@pytest.fixture(scope="module")
def landmarks() -> torch.Tensor:
    points = render(sample_parameters(3, seed=8), SIDE).landmarks
    turn = torch.tensor([[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]], dtype=torch.float32)
    points[2] = (points[2] - SIDE / 2) @ turn.T + SIDE / 2  # a head that leans
    return points


def test_frames_are_the_runtimes_alignment(landmarks: torch.Tensor) -> None:
    size = 40
    line = torch.arange(SIDE).float()
    where = torch.stack(torch.meshgrid(line, line, indexing="xy"))[None].expand(3, -1, -1, -1)  # x and y of each pixel
    grid = F.affine_grid(ffhq_frames(landmarks, SIDE), [3, 2, size, size], align_corners=False)
    seen = F.grid_sample(where, grid, align_corners=False).permute(0, 2, 3, 1).numpy()
    pixels = np.stack(np.meshgrid(np.arange(size), np.arange(size)), -1)
    for row in range(3):
        alignment = align_ffhq(landmarks[row].numpy(), (SIDE, SIDE), size)
        expected = alignment.to_photo(pixels)
        inside = ((expected > 0) & (expected < SIDE - 1)).all(-1)
        assert inside.mean() > 0.9
        np.testing.assert_allclose(seen[row][inside], expected[inside], atol=1e-3)


def test_framed_grids_are_grids_of_the_portrait(landmarks: torch.Tensor) -> None:
    frames = ffhq_frames(landmarks, SIDE)
    own = F.affine_grid(torch.eye(2, 3).expand(3, 2, 3), [3, 1, 8, 8], align_corners=False)
    torch.testing.assert_close(framed(own, frames), F.affine_grid(frames, [3, 1, 8, 8], align_corners=False))
    once = framed(own, frames)
    assert (once[0] - once[2]).abs().max() > 0.1


def test_points_that_make_no_square_are_refused() -> None:
    with pytest.raises(FaceError, match="landmarks"):
        ffhq_frames(torch.zeros(1, 5, 2), SIDE)
