# SPDX-License-Identifier: Apache-2.0
"""Rims whose mixture is known, and strands that a coarse mask cannot hold."""

from __future__ import annotations

import cv2
import numpy as np
import pytest

from faceedit.matting import CORE, FAR, refine_mask

RNG = np.random.default_rng(0)


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


def test_strands_are_recovered() -> None:
    photo, alpha, coarse = strands()
    refined = refine_mask(photo, coarse)
    before, after = np.abs(coarse - alpha).mean(), np.abs(refined - alpha).mean()
    assert after < 0.3 * before
    assert refined.min() >= 0
    assert refined.max() <= 1


def test_where_hair_and_background_look_alike_the_mask_stays() -> None:
    _, _, coarse = strands()
    dark = np.clip(50 + 3 * RNG.standard_normal((320, 320, 3)), 0, 255).astype(np.uint8)
    assert np.abs(refine_mask(dark, coarse) - coarse).mean() < 0.02


@pytest.mark.parametrize("size", [96, 320, 900])
def test_a_sure_mask_a_pixel_off_gets_the_rim_that_the_photo_shows(size: int) -> None:
    """A white disc on dark, seen through soft optics; the mask is hard and a little too large."""
    unit = max(size / 256, 1)
    y, x = np.mgrid[:size, :size]
    radius = np.hypot(x - 0.5 * size, y - 0.48 * size)
    alpha = np.clip((0.3 * size - radius) / (1.5 * unit) + 0.5, 0, 1)
    photo = np.rint(np.outer(alpha, [225, 220, 215]) + np.outer(1 - alpha, [40, 50, 60])).astype(np.uint8)
    coarse = (radius < 0.3 * size + 0.5 * unit).astype(np.float32)
    refined = refine_mask(photo.reshape(size, size, 3), coarse)
    assert np.abs(refined - alpha).sum() < 0.5 * np.abs(coarse - alpha).sum()
    far = np.abs(radius - 0.3 * size) > 5 * unit
    np.testing.assert_array_equal(refined[far], coarse[far])


def test_away_from_the_outline_what_is_sure_stays_as_it_is() -> None:
    photo, _, coarse = strands()
    refined = refine_mask(photo, coarse)
    inside = (coarse > 0.5).astype(np.uint8)
    rim = cv2.dilate(inside, np.ones((9, 9))) != cv2.erode(inside, np.ones((9, 9)))
    sure = ((coarse >= CORE) | (coarse <= FAR)) & ~rim
    assert sure.mean() > 0.2
    np.testing.assert_array_equal(refined[sure], coarse[sure])


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5])
def test_a_mask_without_an_outline_tells_nothing_to_refine(value: float) -> None:
    photo, _, _ = strands()
    flat = np.full((320, 320), value, np.float32)
    np.testing.assert_allclose(refine_mask(photo, flat), flat, atol=1e-6)


def test_what_is_far_does_not_matter() -> None:
    photo, _, coarse = strands()
    whole = refine_mask(photo[:, :256], coarse[:, :256])
    changed = photo.copy()
    changed[:, 250:] = RNG.integers(0, 256, changed[:, 250:].shape)
    np.testing.assert_allclose(refine_mask(changed[:, :256], coarse[:, :256])[:, :190], whole[:, :190], atol=0.03)


def test_channels_are_refined_one_by_one() -> None:
    photo, _, coarse = strands()
    both = refine_mask(photo, np.stack([coarse, 1 - coarse]))
    np.testing.assert_array_equal(both[0], refine_mask(photo, coarse))
    assert both.shape == (2, 320, 320)


def test_wrong_shapes_and_values_are_refused() -> None:
    photo, _, coarse = strands()
    with pytest.raises(ValueError, match="unwarp the mask first"):
        refine_mask(photo, coarse[::2, ::2])
    assert refine_mask(photo[:0], coarse[:0]).shape == (0, 320)
