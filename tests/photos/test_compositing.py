# SPDX-License-Identifier: Apache-2.0
"""Outside the composited region a photo keeps every byte, whatever its size; inside, detail survives the edit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from skimage import data

from faceedit.alignment import Alignment, PhotoRegion, portrait_alignment
from faceedit.compositing import feather, paste_back
from faceedit.matting import refine_mask
from tests.photos.parses import face_parse

ASTRONAUT = data.astronaut()
FIVE = np.array([(196.0, 118.0), (248.0, 112.0), (226.0, 145.0), (206.0, 166.0), (246.0, 162.0)])


def alignment(size: tuple[int, int], side: int, angle: float, scale: float, x: float, y: float) -> Alignment:
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    matrix = np.array([[c, -s, 0], [s, c, 0]])
    matrix[:, 2] = (side - 1) / 2 - matrix[:, :2] @ np.array([x * size[1], y * size[0]])
    return Alignment(matrix, side, size)


@settings(deadline=None, max_examples=60)
@example((1, 1), 16, 0.0, 1.5859052130742979, (0.0, 0.0), 0, True)  # a weight of one and a rounding
@given(
    st.tuples(st.integers(1, 150), st.integers(1, 150)),
    st.sampled_from([16, 48]),
    st.floats(-3.1, 3.1),
    st.floats(0.2, 5.0),
    st.tuples(st.floats(-0.3, 1.3), st.floats(-0.3, 1.3)),
    st.integers(0, 2**32 - 1),
    st.booleans(),
)
def test_pixels_outside_the_region_are_byte_identical(
    size: tuple[int, int],
    side: int,
    angle: float,
    scale: float,
    place: tuple[float, float],
    seed: int,
    has_detail: bool,
) -> None:
    """Photos smaller than the crop, faces partly or wholly outside, any rotation and scale."""
    rng = np.random.default_rng(seed)
    photo = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
    crop = alignment(size, side, angle, scale, *place)
    before = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    mask = (rng.random((side, side)) > 0.5).astype(np.float32)
    mask[: side // 3] = 0
    detail = PhotoRegion(rng.random(size).round().astype(np.float32), (0, 0, size[1], size[0]), size)
    result = paste_back(photo, before, 255 - before, crop, mask, 2.0, detail if has_detail else None)
    region = result.mask()
    assert region.shape == size
    assert region.min() >= 0
    assert region.max() <= 1
    outside = region == 0
    np.testing.assert_array_equal(result.pixels[outside], photo[outside])
    inside_crop = crop.unwarp_soft(np.ones((side, side), np.float32)).full() > 0
    assert outside[~inside_crop].all()
    assert result.pixels.shape == photo.shape
    assert result.pixels.dtype == np.uint8


def test_opacity_hides_the_detail_that_the_crop_cannot_resolve() -> None:
    """A photo four times the crop's size with stripes too fine for the crop, under an edit to plain grey."""
    rows = np.arange(256) // 2 % 2 * 120
    photo = np.broadcast_to(rows[:, None, None] + 60, (256, 256, 3)).astype(np.uint8)
    crop = alignment((256, 256), 64, 0.0, 0.25, 0.5, 0.5)
    before, after = (np.full((64, 64, 3), level, np.uint8) for level in (120, 150))
    mask, middle = np.ones((64, 64), np.float32), (slice(64, 192), slice(64, 192))
    opacity = np.zeros((64, 64), np.float32)
    opacity[:, 32:] = 1
    result = paste_back(photo, before, after, crop, mask, opacity=opacity).pixels[middle].astype(float)
    assert result[:, :56].std() > 50
    assert result[:, 72:].std() < 1
    assert result.mean() == pytest.approx(150, abs=1)
    with pytest.raises(ValueError, match="opacity must be of side 64"):
        paste_back(photo, before, after, crop, mask, opacity=opacity[:32])


def test_the_photo_is_not_changed_in_place_and_no_change_changes_nothing() -> None:
    crop = portrait_alignment(FIVE, (512, 512))
    face = crop.warp_image(ASTRONAUT)
    photo = ASTRONAUT.copy()
    result = paste_back(photo, face, face, crop, np.ones((256, 256), np.float32))
    np.testing.assert_array_equal(result.pixels, ASTRONAUT)
    paste_back(photo, face, 255 - face, crop, np.ones((256, 256), np.float32))
    np.testing.assert_array_equal(photo, ASTRONAUT)
    nothing = paste_back(photo, face, 255 - face, crop, np.zeros((256, 256), np.float32))
    np.testing.assert_array_equal(nothing.pixels, ASTRONAUT)
    assert not nothing.mask().any()


@pytest.mark.parametrize("as_float", [False, True])
def test_a_uniform_change_arrives_whole_and_detail_survives(as_float: bool) -> None:
    """A crop at a third of the photo's resolution cannot hold its noise; 20 levels are added and the noise stays."""
    rng = np.random.default_rng(0)
    photo = rng.integers(60, 180, (300, 300, 3), dtype=np.uint8)
    crop = alignment((300, 300), 96, 0.3, 0.33, 0.5, 0.5)
    before = crop.warp_image(photo)
    after = before + np.uint8(20)
    if as_float:
        before, after = (v.astype(np.float32) / 127.5 - 1 for v in (before, after))
    result = paste_back(photo, before, after, crop, np.ones((96, 96), np.float32))
    full = result.mask() == 1
    assert full.sum() > 20_000
    np.testing.assert_array_equal(result.pixels[full], photo[full] + 20)


def test_values_saturate_instead_of_wrapping() -> None:
    photo = np.full((80, 80, 3), 250, np.uint8)
    crop = alignment((80, 80), 64, 0.0, 1.0, 0.5, 0.5)
    dark, bright = np.zeros((64, 64, 3), np.uint8), np.full((64, 64, 3), 255, np.uint8)
    assert paste_back(photo, dark, bright, crop, np.ones((64, 64))).pixels.min() == 250
    assert paste_back(photo, bright, dark, crop, np.ones((64, 64))).pixels.min() == 0


def test_strips_leave_no_seams(monkeypatch: pytest.MonkeyPatch) -> None:
    crop = portrait_alignment(FIVE, (512, 512))
    face = crop.warp_image(ASTRONAUT)
    mask = face_parse()[0][13]
    whole = paste_back(ASTRONAUT, face, 255 - face, crop, mask)
    monkeypatch.setattr("faceedit.compositing._STRIP_PIXELS", 5000)
    strips = paste_back(ASTRONAUT, face, 255 - face, crop, mask)
    assert np.abs(whole.pixels.astype(int) - strips.pixels).max() <= 1
    np.testing.assert_allclose(whole.mask(), strips.mask(), atol=2e-3)


def test_feather_is_soft_bounded_and_zero_at_the_border() -> None:
    ones = feather(np.ones((64, 64)), 4.0)
    assert ones[32, 32] == pytest.approx(1.0)
    for edge in (ones[0], ones[-1], ones[:, 0], ones[:, -1]):
        assert not edge.any()
    half = np.zeros((64, 64))
    half[:, 32:] = 1
    profile = feather(half, 4.0)[32]
    assert (np.diff(profile[:50]) >= -1e-6).all()
    assert 0.05 < profile[30] < 0.45
    assert profile[20] == 0
    np.testing.assert_array_equal(feather(half, 0.0)[32, 20:44], half[32, 20:44])


def test_a_refined_mask_gives_strands_their_whole_change() -> None:
    """Bright strands on a dark ground: recoloured by a coarse edit, they change whole, the ground hardly."""
    size, side = 256, 64
    y, x = np.mgrid[:size, :size]
    alpha = np.where(x < 128, 1.0, ((y % 16) < 8) & (x < 160)).astype(np.float32)
    photo = (30 + 170 * alpha[..., None] * np.ones(3)).astype(np.uint8)
    crop = alignment((size, size), side, 0.0, 0.25, 0.5, 0.5)
    before = crop.warp_image(photo).astype(np.float32) / 127.5 - 1
    coarse = np.asarray(crop.warp_soft(alpha))
    after = before - 0.6 * coarse[..., None]
    region = crop.unwarp_soft(coarse)
    refined = PhotoRegion(refine_mask(photo[region.slices()], region.values), region.box, region.photo_size)
    plain = paste_back(photo, before, after, crop, coarse, 1.0).pixels.astype(int)
    sharp = paste_back(photo, before, after, crop, coarse, 1.0, refined).pixels.astype(int)
    band = (x > 136) & (x < 152) & (y > 64) & (y < 192)
    strand, gap = band & (y % 16 > 1) & (y % 16 < 6), band & (y % 16 > 9) & (y % 16 < 14)
    wanted = 0.6 * 127.5
    drop = lambda out, where: (photo.astype(int) - out)[where].mean()  # noqa: E731
    assert abs(drop(sharp, strand) - wanted) < 0.6 * abs(drop(plain, strand) - wanted)
    assert drop(sharp, gap) < 0.2 * wanted
    assert drop(sharp, strand) - drop(sharp, gap) > 1.2 * (drop(plain, strand) - drop(plain, gap))


def test_mismatched_arrays_are_refused() -> None:
    crop = alignment((80, 90), 32, 0.0, 1.0, 0.5, 0.5)
    photo, face, mask = np.zeros((80, 90, 3), np.uint8), np.zeros((32, 32, 3), np.uint8), np.zeros((32, 32))
    for arguments in (
        (photo[:70], face, face, crop, mask),
        (photo.astype(np.float32), face, face, crop, mask),
        (photo, face[:30], face, crop, mask),
        (photo, face, face, crop, mask[None]),
        (photo, face, face.astype(np.float32), crop, mask),
    ):
        with pytest.raises(ValueError, match="paste_back"):
            paste_back(*arguments)
    with pytest.raises(ValueError, match="feather_px"):
        feather(mask, -1.0)
