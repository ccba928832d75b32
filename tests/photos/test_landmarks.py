# SPDX-License-Identifier: Apache-2.0
"""Five points from drawn parses: sub-pixel where parts are visible, inferred where hidden, none for noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from faceedit.landmarks import MIN_SCORE, landmarks_from_mask, measure_landmarks
from tests.photos.parses import face_parse


@settings(deadline=None, max_examples=40)
@given(st.floats(-35, 35), st.floats(30, 70), st.floats(118, 138), st.floats(105, 125), st.sampled_from([1.0, 2.5]))
def test_points_follow_rotation_scale_and_shift(
    angle: float, distance: float, x: float, y: float, softness: float
) -> None:
    mask, truth = face_parse(eye_distance=distance, angle_deg=angle, centre=(x, y), softness=softness)
    found = measure_landmarks(mask)
    assert found is not None
    assert found.points.dtype == np.float32
    errors = np.hypot(*(found.points - truth).T)
    assert errors[:2].max() < 0.3, "eyes"
    assert errors[2] < 0.06 * distance, "nose tip: its place within the nose is a convention"
    # A soft lip thins out before it ends, which pulls the half-way crossing inwards.
    assert errors[3:].max() < 1.0 + softness, "mouth corners"
    assert found.score > 0.9


def test_moving_by_a_fraction_of_a_pixel_moves_the_points_by_it() -> None:
    base = landmarks_from_mask(face_parse(angle_deg=7)[0])
    moved = landmarks_from_mask(face_parse(angle_deg=7, centre=(128.4, 117.7))[0])
    assert base is not None
    assert moved is not None
    np.testing.assert_allclose(moved - base, np.tile([0.4, -0.3], (5, 1)), atol=0.25)
    np.testing.assert_allclose((moved - base)[:2], np.tile([0.4, -0.3], (2, 1)), atol=0.03)


def test_a_tensor_and_another_crop_size_give_the_same_points() -> None:
    mask, truth = face_parse(size=128, eye_distance=26, centre=(64, 58))
    found = landmarks_from_mask(torch.from_numpy(mask).double().requires_grad_())
    assert found is not None
    assert np.hypot(*(found - truth).T).max() < 1.8


@pytest.mark.parametrize("angle", [-20.0, 0.0, 20.0])
@pytest.mark.parametrize(
    ("hidden", "sunglasses", "tolerance"),
    [
        (("l_eye",), False, 0.05),
        (("r_eye",), False, 0.05),
        (("r_eye", "r_brow"), False, 0.05),
        (("l_eye", "r_eye"), False, 0.12),
        ((), True, 0.08),
        (("l_brow", "r_brow"), True, 0.08),
        (("nose",), False, 0.16),
        (("u_lip", "l_lip", "mouth"), False, 0.30),
    ],
)
def test_hidden_parts_are_inferred_at_a_price(
    hidden: tuple[str, ...], sunglasses: bool, tolerance: float, angle: float
) -> None:
    mask, truth = face_parse(hidden=hidden, sunglasses=sunglasses, angle_deg=angle)
    found, whole = measure_landmarks(mask), measure_landmarks(face_parse(angle_deg=angle)[0])
    assert found is not None
    assert whole is not None
    assert np.hypot(*(found.points - truth).T).max() < tolerance * 51
    assert MIN_SCORE < found.score < whole.score


def test_a_parser_that_confuses_left_and_right_still_finds_both_eyes() -> None:
    mask, truth = face_parse()
    mask[4] += 0.9 * mask[5]
    mask[5] *= 0.1
    found = landmarks_from_mask(mask)
    assert found is not None
    np.testing.assert_allclose(found[:2], truth[:2], atol=0.1)


def test_stray_blobs_do_not_pull() -> None:
    mask, _ = face_parse()
    clean = landmarks_from_mask(mask)
    for part in (2, 4, 10):
        mask[part, 20:26, 220:226] = 1.0
    dirty = landmarks_from_mask(mask)
    assert clean is not None
    assert dirty is not None
    np.testing.assert_allclose(dirty, clean, atol=1e-4)


def test_what_is_no_face_is_rejected() -> None:
    rng = np.random.default_rng(0)
    background = np.zeros((19, 256, 256), np.float32)
    background[0] = 1
    noise = rng.random((19, 64, 64)).astype(np.float32) ** 8
    only_skin = face_parse(hidden=("r_eye", "l_eye", "r_brow", "l_brow", "nose", "u_lip", "l_lip", "mouth"))[0]
    upside_down = face_parse(angle_deg=180)[0]
    for mask in (background, noise / noise.sum(0), only_skin, upside_down):
        assert landmarks_from_mask(mask) is None


@pytest.mark.parametrize("part", ["nose", "mouth"])
def test_parts_in_the_wrong_place_are_rejected(part: str) -> None:
    """A nose beside the face, or a mouth above the eyes: each part is sure, together they are no face."""
    mask, _ = face_parse()
    ids = [2] if part == "nose" else [10, 11, 12]
    shift = (0, 90) if part == "nose" else (-80, 0)
    mask[ids] = np.roll(mask[ids], shift, axis=(1, 2))
    assert landmarks_from_mask(mask) is None


def test_a_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(19, S, S\)"):
        landmarks_from_mask(np.zeros((1, 19, 64, 64), np.float32))
