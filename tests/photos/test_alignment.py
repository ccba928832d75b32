# SPDX-License-Identifier: Apache-2.0
"""Pixel-centre rule, similarity estimation, FFHQ framing and resampling both ways."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faceedit.alignment import (
    TEMPLATES,
    Alignment,
    align_ffhq,
    align_to_template,
    portrait_alignment,
    rough_alignment,
    umeyama,
)
from faceedit.errors import FaceError

FIVE = np.array([(196.0, 118.0), (248.0, 112.0), (226.0, 145.0), (206.0, 166.0), (246.0, 162.0)])
angles, scales = st.floats(-3.1, 3.1), st.floats(0.05, 20.0)


def similarity(angle: float, scale: float, tx: float, ty: float) -> np.ndarray:
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    return np.array([[c, -s, tx], [s, c, ty]])


def bump(size: tuple[int, int], centre: tuple[float, float], sigma: float) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return np.exp(-((x - centre[0]) ** 2 + (y - centre[1]) ** 2) / (2 * sigma**2)).astype(np.float32)


def centroid(weights: np.ndarray, around: np.ndarray, radius: float) -> np.ndarray:
    """Centroid of one blob; mirrored copies of it beyond the photo's border are left out."""
    y, x = np.mgrid[: weights.shape[0], : weights.shape[1]]
    weights = weights * (np.hypot(x - around[0], y - around[1]) < radius)
    return np.array([(x * weights).sum(), (y * weights).sum()]) / weights.sum()


@given(angles, scales, st.floats(-500, 500), st.floats(-500, 500))
def test_umeyama_recovers_a_similarity(angle: float, scale: float, tx: float, ty: float) -> None:
    truth = similarity(angle, scale, tx, ty)
    target = FIVE @ truth[:, :2].T + truth[:, 2]
    np.testing.assert_allclose(umeyama(FIVE, target), truth, rtol=1e-7, atol=1e-6)


def test_umeyama_never_reflects_and_is_optimal() -> None:
    mirrored = FIVE * (-1, 1)
    found = umeyama(FIVE, mirrored)
    assert np.linalg.det(found[:, :2]) > 0
    error = lambda m: ((FIVE @ m[:, :2].T + m[:, 2] - mirrored) ** 2).sum()  # noqa: E731
    best = error(found)
    for entry in np.eye(4) * 1e-3:
        a, b, tx, ty = found[0, 0] + entry[0], found[1, 0] + entry[1], found[0, 2] + entry[2], found[1, 2] + entry[3]
        assert error(np.array([[a, -b, tx], [b, a, ty]])) >= best


def test_umeyama_rejects_coinciding_points() -> None:
    with pytest.raises(FaceError, match="umeyama"):
        umeyama(np.ones((5, 2)), FIVE)
    with pytest.raises(ValueError, match=r"\(n, 2\)"):
        umeyama(FIVE[:4], FIVE)


@pytest.mark.parametrize("size_px", [128, 256, 1024])
def test_ffhq_square_follows_the_published_rule(size_px: int) -> None:
    crop = align_ffhq(FIVE, (512, 512), size_px)
    e = FIVE[1] - FIVE[0]
    eyes, mouth = (FIVE[0] + FIVE[1]) / 2, (FIVE[3] + FIVE[4]) / 2
    m = mouth - eyes
    x = e - np.array([-m[1], m[0]])
    x = x / np.hypot(*x) * max(2 * np.hypot(*e), 1.8 * np.hypot(*m))
    y, c = np.array([-x[1], x[0]]), eyes + 0.1 * m
    low, high = -0.5, size_px - 0.5
    corners = crop.to_photo([(low, low), (low, high), (high, high), (high, low)])
    np.testing.assert_allclose(corners, [c - x - y, c - x + y, c + x + y, c + x - y], atol=1e-8)


def test_portrait_framing_is_ffhq_enlarged_about_its_centre() -> None:
    plain, wide = align_ffhq(FIVE, (512, 512), 256), portrait_alignment(FIVE, (512, 512))
    middle = [(127.5, 127.5)]
    np.testing.assert_allclose(plain.to_photo(middle), wide.to_photo(middle), atol=1e-9)
    assert plain.scale / wide.scale == pytest.approx(1.25)
    assert wide.angle_deg == pytest.approx(plain.angle_deg)
    eyes = wide.to_crop(FIVE[:2])
    assert np.hypot(*(eyes[1] - eyes[0])) == pytest.approx(256 / 1.25 / 4, rel=0.1)


@pytest.mark.parametrize("bad", [np.full((5, 2), 3.0), np.full((5, 2), np.nan)])
def test_degenerate_landmarks_are_a_typed_error(bad: np.ndarray) -> None:
    with pytest.raises(FaceError, match="align_ffhq"):
        align_ffhq(bad, (100, 100), 64)
    with pytest.raises(ValueError, match=r"\(5, 2\)"):
        align_ffhq(FIVE[:4], (100, 100), 64)


def test_template_alignment_hits_the_template_at_any_size() -> None:
    side, points = TEMPLATES["portrait"]
    crop = align_to_template(points, (side, side), "portrait", 512)
    np.testing.assert_allclose(crop.to_crop(points), (np.array(points) + 0.5) * 2 - 0.5, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_identity_alignment_is_the_identity(dtype: type) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(dtype)
    identity = Alignment(np.eye(2, 3), 64, (64, 64))
    np.testing.assert_array_equal(identity.warp_image(pixels), pixels)
    np.testing.assert_array_equal(identity.warp_labels(pixels[..., 0]), pixels[..., 0])
    plane = pixels[..., 0].astype(np.float32) / 255
    np.testing.assert_array_equal(identity.warp_soft(plane), plane)
    region = identity.unwarp_soft(plane)
    assert region.box == (0, 0, 64, 64)
    np.testing.assert_array_equal(region.full(), plane)


@settings(deadline=None, max_examples=40)
@given(st.floats(-0.8, 0.8), st.floats(0.15, 6.0), st.floats(-0.5, 0.5), st.floats(-0.5, 0.5))
def test_round_trip_keeps_positions(angle: float, scale: float, dx: float, dy: float) -> None:
    """A blob in the crop lands in the photo where the matrix says, and back again, within 0.05 crop pixels."""
    centre = np.array([63.5 + dx, 63.5 + dy])
    photo_size, middle = (200, 240), np.array([119.5, 99.5])
    matrix = similarity(angle, scale, 0, 0)
    matrix[:, 2] = centre - matrix[:, :2] @ middle
    crop = Alignment(matrix, 128, photo_size)
    # Wide enough to be resolved in whichever raster is the coarser, narrow enough to stay inside both.
    sigma = 2.5 * max(1.0, scale)
    blob = bump((128, 128), (centre[0], centre[1]), sigma)
    in_photo = crop.unwarp_soft(blob).full()
    tolerance = 0.05 / min(scale, 1.0)
    assert np.abs(centroid(in_photo, middle, 5 * sigma / scale) - middle).max() < tolerance
    assert np.abs(centroid(crop.warp_soft(in_photo), centre, 6 * sigma) - centre).max() < 0.05 * max(scale, 1.0)


def test_points_round_trip_and_resized_agrees_with_the_pixel_rule() -> None:
    crop = portrait_alignment(FIVE, (512, 512))
    np.testing.assert_allclose(crop.to_photo(crop.to_crop(FIVE)), FIVE, atol=1e-9)
    np.testing.assert_allclose(crop.resized(64).to_crop(FIVE), (crop.to_crop(FIVE) + 0.5) / 4 - 0.5, atol=1e-9)


def test_shrinking_is_antialiased() -> None:
    """A one-pixel checkerboard averages to grey instead of aliasing to black and white."""
    board = (np.indices((400, 400)).sum(0) % 2 * 255).astype(np.uint8)
    for scale in (1 / 1.9, 1 / 3.3, 1 / 8):
        crop = Alignment(similarity(0.1, scale, 0, 0), 40, (400, 400)).warp_image(np.dstack([board] * 3))
        assert np.abs(crop[5:-5, 5:-5].astype(float) - 127.5).max() < 45
    small = Alignment(similarity(0, 1 / 4, -0.375, -0.375), 100, (400, 400)).warp_image(board)
    assert np.abs(small.astype(float) - 127.5).max() <= 1


def test_shrinking_keeps_position() -> None:
    photo = bump((600, 600), (300.0, 280.0), 25.0)
    for scale in (0.25, 0.17, 0.13):
        matrix = similarity(0.3, scale, 0, 0)
        matrix[:, 2] = np.array([61.3, 66.6]) - matrix[:, :2] @ np.array([300.0, 280.0])
        crop = Alignment(matrix, 128, (600, 600))
        expected = crop.to_crop([(300.0, 280.0)])[0]
        assert np.abs(centroid(crop.warp_soft(photo), expected, 30) - expected).max() < 0.05


def test_photo_border_is_mirrored_even_for_a_photo_smaller_than_the_crop() -> None:
    pixels = np.arange(5 * 4 * 3, dtype=np.uint8).reshape(5, 4, 3)
    crop = Alignment(similarity(0, 1, 12, 12), 32, (5, 4)).warp_image(pixels)
    expected = cv2.copyMakeBorder(pixels, 12, 32 - 5 - 12, 12, 32 - 4 - 12, cv2.BORDER_REFLECT_101)
    np.testing.assert_array_equal(crop, expected)
    labels = Alignment(similarity(0, 1, 12, 12), 32, (5, 4)).warp_labels(pixels[..., 0].astype(np.int64))
    np.testing.assert_array_equal(labels, expected[..., 0])


def test_unwarp_is_confined_to_its_box_and_zero_beyond_the_crop() -> None:
    crop = Alignment(similarity(0, 1, -30, -20), 16, (60, 90))
    region = crop.unwarp_soft(np.ones((2, 16, 16), np.float32))
    assert region.values.shape == (2, region.box[3] - region.box[1], region.box[2] - region.box[0])
    whole = region.full()
    expected = np.zeros((60, 90), np.float32)
    expected[20:36, 30:46] = 1
    np.testing.assert_array_equal(whole[1], expected)
    strip = crop.unwarp_soft(np.ones((16, 16), np.float32), box=(28, 24, 50, 30))
    np.testing.assert_array_equal(strip.values, expected[24:30, 28:50])


def test_a_crop_outside_the_photo_has_an_empty_box() -> None:
    crop = Alignment(similarity(0, 1, -300, 0), 16, (60, 90))
    x0, y0, x1, y1 = crop.photo_box()
    assert (x1 - x0) * (y1 - y0) == 0
    assert crop.unwarp_soft(np.ones((16, 16), np.float32)).full().sum() == 0
    assert crop.in_photo_fraction() == 0


def test_in_photo_fraction_counts_area_and_weights() -> None:
    half = Alignment(similarity(0, 1, 32, 0), 64, (64, 64))
    assert half.in_photo_fraction() == pytest.approx(0.5)
    right = np.zeros((64, 64))
    right[:, 32:] = 1
    assert half.in_photo_fraction(right) == 1.0
    assert half.in_photo_fraction(1 - right) == 0.0


def test_unwarp_classes_is_the_argmax_of_the_resampled_soft_mask() -> None:
    soft = np.random.default_rng(1).random((5, 16, 16)).astype(np.float32)
    crop = Alignment(similarity(0.4, 0.3, 2, 1), 16, (70, 50))
    classes, planes = crop.unwarp_classes(soft), crop.unwarp_soft(soft)
    assert classes.values.dtype == np.uint8
    np.testing.assert_array_equal(classes.values, planes.values.argmax(0))


def test_arrays_of_another_size_are_rejected() -> None:
    crop = Alignment(np.eye(2, 3), 16, (60, 90))
    with pytest.raises(ValueError, match="photo's height and width"):
        crop.warp_image(np.zeros((90, 60, 3), np.uint8))
    with pytest.raises(ValueError, match="crop's height and width"):
        crop.unwarp_soft(np.zeros((17, 16), np.float32))
    with pytest.raises(FaceError, match="invertible"):
        Alignment(np.zeros((2, 3)), 16, (60, 90))


def test_rough_alignment_frames_a_typical_box_as_the_landmarks_would() -> None:
    """Eyes 0.4 w apart at 0.4 w, mouth at 0.78 w of a 100-pixel box: guess and rule agree within a few pixels."""
    points = np.array([(130, 140), (170, 140), (150, 160), (138, 178), (162, 178)], dtype=float) - 0.5
    exact, guess = portrait_alignment(points, (300, 300)), rough_alignment((100, 100, 100, 100), (300, 300))
    assert np.abs(exact.to_crop(points) - guess.to_crop(points)).max() < 8
    turned = rough_alignment((100, 100, 100, 100), (300, 300), angle_deg=30)
    assert turned.angle_deg == pytest.approx(30)
