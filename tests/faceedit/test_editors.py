# SPDX-License-Identifier: Apache-2.0
"""Requests are refused in words that help; MagGAN's editor acts where, and as strongly as, it was asked to."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.drawn_faces import DrawnFace

from faceedit.attributes import MAGGAN
from faceedit.editors import AttributeEdit, ComponentSize, Editor, MaskEdit, load_editor
from faceedit.editors.base import EDITORS, check_request, editor_spec
from faceedit.editors.maggan import MagGANEditor, attribute_difference, taken_away
from faceedit.errors import DeviceError, OutOfRangeError, UnknownAttributeError, UnknownNameError, UsageError
from faceedit.labels import CELEBAMASK_HQ
from faceedit.parsing import FaceParser, FaceRecord


@pytest.fixture(scope="module")
def face(drawn: DrawnFace, parser: FaceParser) -> FaceRecord:
    return parser.find_face(drawn.pixels)


@pytest.mark.parametrize("value", [-0.01, 1.01, 5.0, math.nan, math.inf])
def test_attribute_edit_rejects_values_outside_the_unit_interval(value: float) -> None:
    with pytest.raises(OutOfRangeError, match="Blond_Hair must be between 0 and 1"):
        AttributeEdit({"Blond_Hair": value})


def test_attribute_edit_rejects_an_empty_request() -> None:
    with pytest.raises(UsageError, match="at least one attribute"):
        AttributeEdit({})


@pytest.mark.parametrize("scale", [0.4, 2.1, math.nan])
def test_component_size_rejects_scales_outside_its_range(scale: float) -> None:
    with pytest.raises(OutOfRangeError, match="scale must be between"):
        ComponentSize("nose", scale)


def test_unknown_editor_is_named_with_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="maggan"):
        load_editor("magan")


@pytest.mark.parametrize("name", sorted(EDITORS))
def test_every_editor_refuses_requests_it_does_not_accept(name: str) -> None:
    spec = editor_spec(name)
    refused = [
        request
        for request in (MaskEdit(torch.zeros(1, 8, 8, dtype=torch.int64)), ComponentSize("nose", 1.5))
        if not isinstance(request, spec.accepts)
    ]
    assert refused, "every editor refuses something"
    for request in refused:
        able = [other.name for other in EDITORS.values() if isinstance(request, other.accepts)]
        with pytest.raises(UsageError, match=type(request).__name__) as refusal:
            check_request(spec, request)
        assert all(other in str(refusal.value) for other in able)


def test_unknown_attribute_suggests_the_closest() -> None:
    with pytest.raises(UnknownAttributeError, match="Blond_Hair"):
        check_request(editor_spec("maggan"), AttributeEdit({"Blonde_Hair": 1.0}))


@pytest.mark.parametrize("request_", [AttributeEdit({"Smiling": 1.0}), AttributeEdit({"Bald": 1.0}, keep=("Smiling",))])
def test_an_attribute_of_another_editor_names_that_editor(request_: AttributeEdit) -> None:
    with pytest.raises(UnknownAttributeError, match="Young, got Smiling; the editor maskfacegan knows it") as caught:
        check_request(editor_spec("maggan"), request_)
    assert caught.value.exit_code == 2
    check_request(editor_spec("maskfacegan"), request_)


def test_a_mistyped_attribute_of_another_editor_is_recognised() -> None:
    with pytest.raises(UnknownAttributeError, match="got Smilng; the editor maskfacegan knows Smiling"):
        check_request(editor_spec("maggan"), AttributeEdit({"Smilng": 1.0}))


def test_hair_can_be_kept_and_not_set() -> None:
    check_request(editor_spec("maggan"), AttributeEdit({"Bald": 1.0}, keep=("hair",)))
    with pytest.raises(UnknownAttributeError, match="got 'hair'"):
        check_request(editor_spec("maggan"), AttributeEdit({"hair": 1.0}))


def test_device_that_is_missing_is_refused() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(DeviceError, match="use cpu"):
            load_editor("maggan", device="cuda")
    with pytest.raises(UsageError, match="cpu, cuda"):
        load_editor("maggan", device="gpu9")


@pytest.mark.parametrize("believed", [0.0, 0.49, 0.51, 1.0])
@pytest.mark.parametrize(("value", "expected"), [(1.0, 1.0), (0.0, -1.0)])
def test_the_ends_are_commands_whatever_the_classifier_believes(believed: float, value: float, expected: float) -> None:
    assert attribute_difference({"Pale_Skin": value}, {"Pale_Skin": believed}) == {"Pale_Skin": expected}


def test_values_between_move_from_the_present_state() -> None:
    assert attribute_difference({"Young": 0.25}, {}) == {"Young": 0.25}
    assert attribute_difference({"Young": 0.25}, {"Young": 0.9}) == {"Young": -0.75}


def test_one_hair_colour_takes_away_those_that_are_there() -> None:
    present = {"Black_Hair": 0.9, "Brown_Hair": 0.2}
    assert attribute_difference({"Blond_Hair": 1.0}, present) == {"Blond_Hair": 1.0, "Black_Hair": -1.0}


def test_two_hair_colours_at_once_are_refused() -> None:
    with pytest.raises(UsageError, match="exclude each other"):
        attribute_difference({"Blond_Hair": 1.0, "Black_Hair": 1.0}, {})


def test_maggan_editor_satisfies_the_protocol(editor: MagGANEditor) -> None:
    assert isinstance(editor, Editor)
    assert editor.accepts == EDITORS["maggan"].accepts


def test_region_is_the_parse_of_the_parts_concerned(editor: MagGANEditor, face: FaceRecord) -> None:
    edited = editor.apply(face, AttributeEdit({"Blond_Hair": 1.0}))
    hair = face.mask[:, CELEBAMASK_HQ.id("hair")]
    assert edited.parts == ("hair",)
    torch.testing.assert_close(edited.region[:, 0], hair)
    assert edited.before.shape == edited.after.shape == (1, 3, 64, 64)
    assert edited.after.abs().max() <= 1


def test_both_directions_act_and_differ(editor: MagGANEditor, face: FaceRecord) -> None:
    up, down = (editor.apply(face, AttributeEdit({"Pale_Skin": value})).after for value in (1.0, 0.0))
    assert (up - down).abs().max() > 0.01


def test_intensity_scales_the_condition(editor: MagGANEditor, face: FaceRecord) -> None:
    full, half = (editor.apply(face, AttributeEdit({"Bald": value})) for value in (1.0, 0.5))
    assert full.requested == {"Bald": 1.0}
    assert half.requested == {"Bald": 0.5}
    assert not torch.equal(full.after, half.after)


def test_what_is_taken_away_takes_its_texture_along(editor: MagGANEditor, face: FaceRecord) -> None:
    """A bald head must not keep the photo's strands; an edit that adds or recolours keeps all detail."""
    hair = face.mask[0, CELEBAMASK_HQ.id("hair")]
    edited = editor.apply(face, AttributeEdit({"Bald": 1.0}))
    bald = edited.opacity
    assert bald is not None
    inside = torch.nn.functional.interpolate(face.mask[:, [CELEBAMASK_HQ.id("hair")]], size=(64, 64), mode="area")
    assert hair.any()
    assert (bald[inside > 0.9] > 0.9).all()
    far = torch.nn.functional.max_pool2d(inside, 11, 1, 5) < 0.01
    assert far.any()
    assert (bald[far] < 0.05).all()
    half = editor.apply(face, AttributeEdit({"Bald": 0.5})).opacity
    assert half is not None
    torch.testing.assert_close(half, bald / 2)
    # Hair mixes with the ground at its rim: the change reaches over it, and no matte leaves a part of it behind.
    near = torch.nn.functional.max_pool2d(face.mask[:, [CELEBAMASK_HQ.id("hair")]], 9, 1, 4) > 0.9
    assert (edited.region[near] > 0.85).all()
    assert not edited.refine
    for request in ({"Blond_Hair": 1.0}, {"Bald": 0.0}, {"Eyeglasses": 1.0}):
        other = editor.apply(face, AttributeEdit(request))
        assert other.opacity is None
        assert other.refine
    glasses = torch.zeros(1, 19, 8, 8)
    glasses[:, CELEBAMASK_HQ.id("eye_g"), 3:5, 2:6] = 1
    gone = taken_away({"Eyeglasses": -1.0, "Bald": -1.0}, glasses, 8)
    assert gone[0, 0, 3:5, 2:6].min() == 1
    assert gone[0, 0, 7].max() == 0
    teeth = torch.zeros(1, 19, 8, 8)
    teeth[:, CELEBAMASK_HQ.id("mouth"), 3:5, 2:6] = 1
    assert taken_away({"Mouth_Slightly_Open": -1.0}, teeth, 8)[0, 0, 3:5, 2:6].min() == 1
    assert taken_away({"Mouth_Slightly_Open": 1.0}, teeth, 8).max() == 0


def test_a_size_is_a_number() -> None:
    scale = ComponentSize("mouth", np.float32(1.5)).scale  # type: ignore[arg-type]
    assert (scale, type(scale)) == (1.5, float)
    for other in ("1.5", None, [1.5]):
        with pytest.raises(UsageError, match="ComponentSize: scale must be a number"):
            ComponentSize("mouth", other)  # type: ignore[arg-type]
    with pytest.raises(OutOfRangeError, match="got 3; 1 keeps the size"):
        ComponentSize("mouth", 3)


def test_same_request_gives_the_same_bytes(editor: MagGANEditor, face: FaceRecord) -> None:
    request = AttributeEdit({"Mouth_Slightly_Open": 0.0})
    assert torch.equal(editor.apply(face, request, seed=1).after, editor.apply(face, request, seed=1).after)


def test_an_open_mouth_is_not_opened_again(editor: MagGANEditor, face: FaceRecord) -> None:
    """Lips of four rows with a gap of two (a third) or of one (a fifth) between them."""
    gap, lips = CELEBAMASK_HQ.id("mouth"), CELEBAMASK_HQ.id("u_lip")
    for rows, is_open in ((2, True), (1, False)):
        mask = face.mask.clone()
        mask[:, [gap, lips, CELEBAMASK_HQ.id("l_lip")]] = 0
        mask[:, lips, 100:104, 60:80] = 1
        mask[:, gap, 104 : 104 + rows, 60:80] = 1
        seen = replace(face, mask=mask)
        wanted = {"Mouth_Slightly_Open": 1.0, "Pale_Skin": 1.0}
        edited = editor.apply(seen, AttributeEdit(wanted))
        assert set(edited.requested) == set(wanted) - ({"Mouth_Slightly_Open"} if is_open else set())
        assert edited.details == ({"already_there": ["Mouth_Slightly_Open"]} if is_open else {})
        for other in ({"Mouth_Slightly_Open": 0.0}, {"Mouth_Slightly_Open": 0.5}):
            assert editor.apply(seen, AttributeEdit(other)).requested.keys() == other.keys()
        alone = editor.apply(seen, AttributeEdit({"Mouth_Slightly_Open": 1.0}))
        assert (alone.region.max() == 0) == is_open


@pytest.mark.parametrize("attribute", MAGGAN)
def test_every_attribute_has_a_region_both_ways(attribute: str, editor: MagGANEditor, face: FaceRecord) -> None:
    for value in (0.0, 0.9):  # in full, the drawn face's open mouth would be left as it is
        edited = editor.apply(face, AttributeEdit({attribute: value}))
        assert edited.parts
        assert edited.region.amin() >= 0
        assert edited.region.amax() <= 1
