# SPDX-License-Identifier: Apache-2.0
"""The guided filter against a direct regression, and strands that a coarse mask cannot hold."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from faceedit.matting import CORE, FAR, guided_filter, refine_mask

RNG = np.random.default_rng(0)


def reference(guide: np.ndarray, mask: np.ndarray, radius: int, eps: float) -> np.ndarray:
    """He et al. 2013, eqs. 14, 19-21, window by window in float64."""
    height, width = mask.shape
    pad = ((radius, radius), (radius, radius))
    colours = np.pad(guide.astype(np.float64), (*pad, (0, 0)), mode="symmetric")
    target = np.pad(mask.astype(np.float64), pad, mode="symmetric")
    slope, offset = np.zeros((height, width, 3)), np.zeros((height, width))
    side = 2 * radius + 1
    for y in range(height):
        for x in range(width):
            c = colours[y : y + side, x : x + side].reshape(-1, 3)
            t = target[y : y + side, x : x + side].ravel()
            centred = c - c.mean(0)
            covariance = centred.T @ centred / len(c) + eps * np.eye(3)
            slope[y, x] = np.linalg.solve(covariance, centred.T @ (t - t.mean()) / len(c))
            offset[y, x] = t.mean() - slope[y, x] @ c.mean(0)
    blur = lambda v: cv2.blur(v, (side, side), borderType=cv2.BORDER_REFLECT)  # noqa: E731
    return (blur(slope) * guide).sum(-1) + blur(offset)


@pytest.mark.parametrize(("radius", "eps"), [(1, 1e-2), (3, 1e-4)])
def test_guided_filter_matches_the_regression_it_stands_for(radius: int, eps: float) -> None:
    guide = RNG.random((17, 23, 3)).astype(np.float32)
    mask = RNG.random((17, 23)).astype(np.float32)
    np.testing.assert_allclose(guided_filter(guide, mask, radius, eps), reference(guide, mask, radius, eps), atol=2e-4)


def test_an_affine_function_of_colour_is_reproduced() -> None:
    guide = RNG.integers(0, 256, (40, 50, 3), dtype=np.uint8)
    mask = (guide / 255.0) @ np.array([0.2, 0.5, -0.1]) + 0.3
    np.testing.assert_allclose(guided_filter(guide, mask, 4, 1e-7), mask, atol=1e-3)


def test_constants_pass_even_on_a_flat_guide() -> None:
    for subsample in (1, 3):
        out = guided_filter(np.full((20, 31, 3), 77, np.uint8), np.full((20, 31), 0.4), 5, 1e-4, subsample)
        np.testing.assert_allclose(out, 0.4, atol=1e-5)


def strands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Photo, true alpha and the coarse mask of a dark head of hair whose edge breaks up into strands."""
    size = 320
    y, x = np.mgrid[:size, :size]
    solid = np.clip(150 - x, 0, 1)
    waves = np.sin(2 * np.pi * (y + 4 * np.sin(x / 25)) / 11)
    alpha = np.maximum(solid, np.clip((waves - 0.2 - (x - 150) / 30) * 2.5, 0, 1)).astype(np.float32)
    hair = np.array([60, 45, 35]) + 8 * RNG.standard_normal((size, size, 1))
    wall = np.array([190, 180, 165]) + 4 * RNG.standard_normal((size, size, 1))
    photo = np.clip(alpha[..., None] * hair + (1 - alpha[..., None]) * wall, 0, 255).astype(np.uint8)
    small = cv2.resize(alpha, (40, 40), interpolation=cv2.INTER_AREA)
    coarse = cv2.resize(cv2.GaussianBlur(small, (0, 0), 0.8), (size, size), interpolation=cv2.INTER_LINEAR)
    return photo, alpha, coarse


@pytest.mark.parametrize("radius", [None, 16, 32])
def test_strands_are_recovered(radius: int | None) -> None:
    photo, alpha, coarse = strands()
    refined = refine_mask(photo, coarse, radius)
    before, after = np.abs(coarse - alpha).mean(), np.abs(refined - alpha).mean()
    assert after < 0.6 * before
    assert refined.min() >= 0
    assert refined.max() <= 1


def test_where_hair_and_background_look_alike_the_mask_stays() -> None:
    _, _, coarse = strands()
    dark = np.clip(50 + 3 * RNG.standard_normal((320, 320, 3)), 0, 255).astype(np.uint8)
    assert np.abs(refine_mask(dark, coarse) - coarse).mean() < 0.02


def test_sure_core_and_far_background_stay_as_they_are() -> None:
    photo, _, coarse = strands()
    refined = refine_mask(photo, coarse)
    sure = (coarse >= CORE) | (coarse <= FAR)
    assert sure.any()
    assert not sure.all()
    np.testing.assert_array_equal(refined[sure], coarse[sure])
    certain = np.round(coarse)
    np.testing.assert_array_equal(refine_mask(photo, certain), certain)


def test_only_the_doubtful_band_is_filtered_and_the_rest_does_not_matter() -> None:
    photo, _, coarse = strands()
    whole = refine_mask(photo, coarse, 6)
    part = refine_mask(photo[:, 60:300], coarse[:, 60:300], 6)
    np.testing.assert_allclose(part[:, 40:200], whole[:, 100:260], atol=1e-4)


def test_channels_are_refined_one_by_one() -> None:
    photo, _, coarse = strands()
    both = refine_mask(photo, np.stack([coarse, 1 - coarse]), 8)
    np.testing.assert_array_equal(both[0], refine_mask(photo, coarse, 8))
    assert both.shape == (2, 320, 320)


def test_wrong_shapes_and_values_are_refused() -> None:
    photo, _, coarse = strands()
    with pytest.raises(ValueError, match="unwarp the mask first"):
        refine_mask(photo, coarse[::2, ::2])
    with pytest.raises(ValueError, match="guided_filter"):
        guided_filter(photo, coarse[1:], 4, 1e-4)
    with pytest.raises(ValueError, match="eps positive"):
        guided_filter(photo, coarse, 4, 0.0)
    assert refine_mask(photo[:0], coarse[:0]).shape == (0, 320)
