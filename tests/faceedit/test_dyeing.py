# SPDX-License-Identifier: Apache-2.0
"""A dye goes on to the head's hair outside the editor's square, in its colour inside, and to nothing else."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np
import pytest
from numpy.typing import NDArray
from support.drawn_faces import DrawnFace, palette_parser
from torch import Tensor

from faceedit import pipeline
from faceedit.alignment import Alignment
from faceedit.dyeing import Dye, comes_near
from faceedit.editors import AttributeEdit, EditedFace
from faceedit.editors.maggan import MagGANEditor
from faceedit.labels import CELEBAMASK_HQ
from faceedit.parsing import FaceParser, FaceRecord

HAIR = CELEBAMASK_HQ.palette[CELEBAMASK_HQ.id("hair")]


@dataclass(frozen=True)
class LongHair:
    """A drawn face whose hair hangs below the square, and hair that is not its own beside it: where each lies, H×W."""

    photo: pipeline.Photo
    record: FaceRecord
    hanging: NDArray[np.bool_]
    strangers: NDArray[np.bool_]
    parser: FaceParser


@pytest.fixture(scope="module")
def long_hair(drawn: DrawnFace) -> LongHair:
    rows, columns = np.nonzero(drawn.labels == CELEBAMASK_HQ.id("hair"))
    pixels, middle, left = drawn.pixels.copy(), int(rows.mean()), int(columns.min())
    pixels[middle:400, left : left + 40] = HAIR
    strangers = np.zeros(pixels.shape[:2], bool)
    strangers[370:410, -60:-30] = True
    pixels[strangers] = HAIR
    parser = palette_parser(drawn.box)
    photo = pipeline.read(pixels)
    record = pipeline.parse(photo, pipeline.find(photo, parser), parser)
    bottom = record.alignment.photo_box()[3]
    hanging = np.zeros_like(strangers)
    hanging[bottom + 4 : 380, left + 5 : left + 35] = True
    assert hanging.sum() > 100
    return LongHair(photo, record, hanging, strangers, parser)


def dyed(face: FaceRecord, shade: tuple[float, float, float], **changes: object) -> EditedFace:
    """An edit that gives hair one colour, in [-1, 1], and everything else too: its region is hair alone."""
    hair = face.mask[:, CELEBAMASK_HQ.id("hair")][:, None]
    after = face.crop * 0 + face.crop.new_tensor(shade).view(1, 3, 1, 1)
    edited = EditedFace(face.crop, after, hair, ("hair",), {"Brown_Hair": 1.0}, dyes=True)
    return replace(edited, **changes)  # type: ignore[arg-type]


def test_hair_outside_gets_the_colour_inside_and_nothing_else_changes(long_hair: LongHair) -> None:
    photo, record, parser = long_hair.photo, long_hair.record, long_hair.parser
    edited = dyed(record, (0.2, -0.2, -0.6))
    alone = pipeline.composite(photo, record, edited)
    carried = pipeline.composite(photo, record, edited, parser)
    wanted = np.array([0.2, -0.2, -0.6]) * 127.5 + 127.5
    assert np.abs(carried.pixels[long_hair.hanging] - wanted).max() < 8  # 8-bit levels: Lab and back, and resampling
    assert np.array_equal(alone.pixels[long_hair.hanging], photo.pixels[long_hair.hanging])
    outside = carried.mask() == 0
    assert np.array_equal(carried.pixels[outside], photo.pixels[outside])
    assert outside[long_hair.strangers].all()
    other = (photo.pixels != HAIR).any(-1)
    rim = np.abs(carried.pixels.astype(int) - alone.pixels).max(-1)
    assert (rim[other] > 40).mean() < 0.005  # only pixels that hair's edge passes through


def test_where_the_editor_changed_hair_in_full_its_own_change_stays(long_hair: LongHair, editor: MagGANEditor) -> None:
    edited = pipeline.apply(long_hair.record, editor, AttributeEdit({"Blond_Hair": 1.0}))
    alone = pipeline.composite(long_hair.photo, long_hair.record, edited)
    carried = pipeline.composite(long_hair.photo, long_hair.record, edited, long_hair.parser)
    full = alone.mask() == 1
    assert full.sum() > 300
    assert np.array_equal(carried.pixels[full], alone.pixels[full])
    assert not np.array_equal(carried.pixels, alone.pixels)
    assert carried.mask().max() <= 1.001  # float32, a sum of two shares


@pytest.mark.parametrize(
    ("request_", "dyes"),
    [
        ({"Black_Hair": 1.0}, True),
        ({"Blond_Hair": 0.5, "Pale_Skin": 1.0}, True),
        ({"Brown_Hair": 0.0}, True),
        ({"Bangs": 1.0}, False),
        ({"Young": 0.0}, False),
        ({"Bald": 1.0, "Black_Hair": 1.0}, False),
    ],
)
def test_only_edits_of_a_hair_colour_dye(
    request_: dict[str, float], dyes: bool, long_hair: LongHair, editor: MagGANEditor
) -> None:
    edited = pipeline.apply(long_hair.record, editor, AttributeEdit(request_))
    assert edited.dyes == dyes
    carried = pipeline.composite(long_hair.photo, long_hair.record, edited, long_hair.parser)
    alone = pipeline.composite(long_hair.photo, long_hair.record, edited)
    assert np.array_equal(carried.pixels, alone.pixels) != dyes


@pytest.fixture(scope="module")
def far_from_border(drawn: DrawnFace, parser: FaceParser) -> tuple[pipeline.Photo, FaceRecord]:
    """A face in a square so large that no hair comes near its border."""
    photo = pipeline.read(drawn.pixels)
    record = pipeline.parse(photo, pipeline.find(photo, parser), parser)
    wide = record.alignment.enlarged(1.5, 0.0, 256)
    crop, mask = parser._parse_photo(photo.pixels, wide)
    return photo, replace(record, alignment=wide, crop=crop, mask=mask)


@pytest.fixture
def blind(drawn: DrawnFace, monkeypatch: pytest.MonkeyPatch) -> FaceParser:
    """A parser that must not be asked."""

    def refuse(*_: object, **__: object) -> Tensor:
        raise AssertionError("must not be parsed")

    parser = palette_parser(drawn.box)
    monkeypatch.setattr(parser, "parse_crop", refuse)
    return parser


def test_hair_that_keeps_inside_is_neither_parsed_nor_dyed_twice(
    far_from_border: tuple[pipeline.Photo, FaceRecord], blind: FaceParser
) -> None:
    photo, record = far_from_border
    edited = dyed(record, (0.2, -0.2, -0.6))
    alone = pipeline.composite(photo, record, edited)
    again = pipeline.composite(photo, record, edited, blind)
    away = record.alignment.unwarp_soft(cv2.blur(record.mask[0, 13].numpy(), (7, 7))).full() < 1e-3
    assert np.array_equal(again.pixels[away], alone.pixels[away])
    full = alone.mask() == 1
    assert np.array_equal(again.pixels[full], alone.pixels[full])


def test_hair_beside_what_the_parse_shows_of_it_is_told_by_its_colour(
    far_from_border: tuple[pipeline.Photo, FaceRecord], blind: FaceParser
) -> None:
    photo, record = far_from_border
    hair = CELEBAMASK_HQ.id("hair")
    top = int(np.nonzero((record.mask[0, hair] > 0.5).any(1).numpy())[0].min())
    mask = record.mask.clone()
    mask[0, 0, : top + 10] += mask[0, hair, : top + 10]  # its upper rim, taken for background
    mask[0, hair, : top + 10] = 0
    missing = replace(record, mask=mask)
    rim = record.alignment.unwarp_soft((record.mask - mask)[0, hair].numpy()).full() > 0.99
    edited = dyed(missing, (0.2, -0.2, -0.6))
    alone = pipeline.composite(photo, missing, edited).pixels[rim]
    again = pipeline.composite(photo, missing, edited, blind).pixels[rim]
    wanted = np.array([0.2, -0.2, -0.6]) * 127.5 + 127.5
    assert rim.sum() > 20
    assert np.abs(again - wanted).mean() < 0.5 * np.abs(alone - wanted).mean()


def test_hair_comes_near_at_the_border_inside_the_photo_only() -> None:
    hair = np.zeros((256, 256), np.float32)
    hair[100:150, 100:150] = 1
    whole = Alignment(np.array([[1.0, 0, 0], [0, 1.0, 0]]), 256, (256, 256))
    assert not comes_near(hair, whole)
    hair[:10, 100:150] = 1
    assert comes_near(hair, whole)
    below = Alignment(np.array([[1.0, 0, 0], [0, 1.0, 12]]), 256, (244, 256))  # the photo starts at the crop's row 12
    assert not comes_near(hair, below)


def test_a_dye_keeps_the_order_of_lightness_beyond_what_it_met() -> None:
    """Strands lighter and darker than those that taught it stay apart: texture and gloss are not clipped away."""
    rng = np.random.default_rng(0)
    before = np.repeat(rng.uniform(-0.6, 0.0, (32, 32, 1)), 3, -1)
    weight = np.ones((32, 32))
    after = before * 0.5 - 0.4
    after[:2], weight[:2] = 1.0, 0.6  # a speck of background, parsed as hair, that was left white
    dye = Dye(before, after, weight)
    met = np.abs(dye(before)[4:] - after[4:])
    assert met.max() < 0.08  # of a range of 2: a straight line in Lab is not quite one in sRGB
    ramp = np.repeat(np.linspace(-0.9, 0.6, 16)[:, None, None], 3, -1).astype(np.float32)
    assert (np.diff(dye(ramp)[:, 0, 1]) > 0).all()


def test_a_dye_refuses_crops_without_hair() -> None:
    crop = np.zeros((8, 8, 3))
    for before, weight in ((crop, np.zeros((8, 8))), (crop[:4], np.ones((8, 8))), (crop, np.ones((8, 4)))):
        with pytest.raises(ValueError, match="Dye: before, after and weight must be"):
            Dye(before, crop, weight)
