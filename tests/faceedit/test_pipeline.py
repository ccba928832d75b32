# SPDX-License-Identifier: Apache-2.0
"""A photo edited end to end: what changes, what never does, and what the result says about it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.drawn_faces import DrawnFace, palette_parser

from faceedit import pipeline
from faceedit.attributes import MAGGAN
from faceedit.editors import AttributeEdit
from faceedit.editors.maggan import MagGANEditor
from faceedit.errors import NoFaceError, UsageError, WeightsError
from faceedit.networks.classifier import AttributeClassifier, AttributeClassifierConfig
from faceedit.parsing import FaceParser
from faceedit.provenance import read_provenance


@pytest.fixture(scope="module")
def result(drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor) -> pipeline.EditResult:
    return pipeline.edit(drawn.pixels, {"Blond_Hair": 1.0}, editor=editor, parser=parser)


def test_result_has_the_photo_size_and_the_crop_maps(result: pipeline.EditResult, drawn: DrawnFace) -> None:
    assert result.image.size == drawn.pixels.shape[1::-1]
    assert result.face.size == (256, 256)
    for labels in (result.mask, result.edited_mask):
        assert labels.shape == (256, 256)
        assert labels.dtype == np.uint8
    assert result.mask.max() < 19


@pytest.mark.parametrize("attribute", MAGGAN)
def test_pixels_outside_the_region_are_byte_identical(
    attribute: str, drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor
) -> None:
    value = 0.0 if attribute == "Mouth_Slightly_Open" else 1.0  # the drawn face's mouth is open
    result = pipeline.edit(drawn.pixels, {attribute: value}, editor=editor, parser=parser)
    outside = result.region == 0
    assert outside.any()
    assert (~outside).any()
    assert np.array_equal(result.pixels[outside], drawn.pixels[outside])
    assert not np.array_equal(result.pixels, drawn.pixels)


def test_a_result_saves_what_the_command_writes(
    drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor, tmp_path: Path
) -> None:
    """Exact pixels, the photo's alpha, and a note of what was done to it."""
    alpha = np.tile(np.arange(drawn.pixels.shape[1], dtype=np.uint8), (drawn.pixels.shape[0], 1))
    result = pipeline.edit(np.dstack([drawn.pixels, alpha]), {"Blond_Hair": 1.0}, editor=editor, parser=parser)
    result.save(tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as written:
        assert np.array_equal(np.asarray(written), np.dstack([result.pixels, alpha]))
    assert read_provenance(tmp_path / "out.png") is not None
    assert result.image.mode == "RGB"
    assert result.report["weights"]["classifier"] in (None, "attribute-classifier-starter")


def test_the_report_does_not_name_a_classifier_of_the_callers_own(
    drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor
) -> None:
    own = AttributeClassifier(AttributeClassifierConfig(size_px=32, base_width=8, stages=3, hidden_width=32)).eval()
    result = pipeline.edit(drawn.pixels, {"Blond_Hair": 1.0}, editor=editor, parser=parser, classifier=own)
    assert result.report["weights"]["classifier"] == "custom"


def test_the_input_is_not_written_to(drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor) -> None:
    before = drawn.pixels.copy()
    pipeline.edit(drawn.pixels, {"Pale_Skin": 1.0}, editor=editor, parser=parser)
    assert np.array_equal(before, drawn.pixels)


def test_path_image_and_array_give_the_same_result(
    drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor, tmp_path: Path
) -> None:
    path = tmp_path / "me.png"
    Image.fromarray(drawn.pixels).save(path)
    sources = (path, str(path), Image.fromarray(drawn.pixels), drawn.pixels)
    first, *others = (pipeline.edit(s, {"Bangs": 1.0}, editor=editor, parser=parser).pixels for s in sources)
    assert all(np.array_equal(first, other) for other in others)


def test_the_stages_compose_to_the_whole(
    drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor, result: pipeline.EditResult
) -> None:
    photo = pipeline.read(drawn.pixels)
    record = pipeline.parse(photo, pipeline.find(photo, parser), parser)
    edited = pipeline.apply(record, editor, AttributeEdit({"Blond_Hair": 1.0}))
    composited = pipeline.composite(photo, record, edited, parser)
    assert np.array_equal(composited.pixels, result.pixels)
    assert np.array_equal(composited.mask(), result.region)


@pytest.mark.parametrize("scale", [2, 3])
def test_a_larger_photo_is_edited_at_its_own_resolution(drawn: DrawnFace, editor: MagGANEditor, scale: int) -> None:
    large = np.repeat(np.repeat(drawn.pixels, scale, 0), scale, 1)
    box = type(drawn.box)(*(scale * v for v in (drawn.box.x, drawn.box.y, drawn.box.w, drawn.box.h)), score=0.9)
    result = pipeline.edit(large, {"Blond_Hair": 1.0}, editor=editor, parser=palette_parser(box))
    assert result.pixels.shape == large.shape
    outside = result.region == 0
    assert np.array_equal(result.pixels[outside], large[outside])


@pytest.mark.parametrize("plane", ["after", "opacity"])
def test_an_edit_that_is_not_finite_is_refused(
    plane: str, drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor
) -> None:
    """A layer that overflowed in fp16 would otherwise be a black patch in the photo."""
    photo = pipeline.read(drawn.pixels)
    record = pipeline.parse(photo, pipeline.find(photo, parser), parser)
    edited = pipeline.apply(record, editor, AttributeEdit({"Blond_Hair": 1.0}))
    values = edited.after.clone() if plane == "after" else torch.ones_like(edited.after[:, :1])
    assert pipeline.composite(photo, record, replace(edited, **{plane: values})).pixels.shape == drawn.pixels.shape
    values[0, 0, 20, 20] = (torch.tensor(70000.0).half() - torch.tensor(70000.0).half()).float()
    with pytest.raises(WeightsError, match=f"{plane} of the edited face must be finite"):
        pipeline.composite(photo, record, replace(edited, **{plane: values}))


def test_only_hair_that_stays_is_refined_against_the_photo(
    drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A matte of what goes would leave, at its rim, what mixed with it."""
    calls: list[int] = []

    def refine(pixels: np.ndarray, soft: np.ndarray) -> np.ndarray:
        calls.append(soft.size)
        return soft

    monkeypatch.setattr(pipeline, "refine_mask", refine)
    for request, times in (
        ({"Blond_Hair": 1.0}, 1),
        ({"Black_Hair": 1.0}, 2),
        ({"Bald": 1.0}, 2),
        ({"Pale_Skin": 1.0}, 2),
    ):
        pipeline.edit(drawn.pixels, request, editor=editor, parser=parser)
        assert len(calls) == times, request


def test_report_is_json_and_true(result: pipeline.EditResult, drawn: DrawnFace) -> None:
    report = json.loads(json.dumps(result.report))
    assert report["seed"] == 0
    assert report["editor"] == "maggan"
    assert report["weights"]["parser"] == "palette"
    assert report["requested"] == {"Blond_Hair": 1.0}
    assert report["applied_difference"]["Blond_Hair"] == 1.0
    assert report["region"]["area_px"] == int((result.region > 0).sum())
    assert report["region"]["changed_px"] == int((result.pixels != drawn.pixels).any(-1).sum())
    assert all(seconds >= 0 for seconds in report["seconds"].values())


def test_comparison_sheet_shows_before_mask_after(result: pipeline.EditResult) -> None:
    sheet = pipeline.comparison_sheet(result)
    side = sheet.shape[0]
    assert sheet.shape == (side, 3 * side, 3)
    before, mask, after = (sheet[:, i * side : (i + 1) * side] for i in range(3))
    assert not np.array_equal(before, after)
    assert not np.array_equal(before, mask)


def test_overlay_leaves_the_background_alone() -> None:
    pixels = np.full((4, 4, 3), 200, np.uint8)
    labels = np.zeros((4, 4), np.uint8)
    labels[1, 1] = 13
    laid = pipeline.overlay(pixels, labels)
    assert (laid[labels == 0] == 200).all()
    assert (laid[1, 1] != 200).any()


def test_attributes_and_request_together_are_refused(
    drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor
) -> None:
    with pytest.raises(UsageError, match="both"):
        pipeline.edit(drawn.pixels, {"Bald": 1.0}, request=AttributeEdit({"Bald": 1.0}), editor=editor, parser=parser)


def test_numpy_numbers_are_reported_and_the_callers_randomness_stays(
    drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor
) -> None:
    request = AttributeEdit({"Blond_Hair": np.float32(1)}, keep=("Black_Hair",))  # type: ignore[dict-item]
    torch.manual_seed(4)
    state = torch.get_rng_state()
    result = pipeline.edit(drawn.pixels, request=request, editor=editor, parser=parser, seed=np.int64(3))
    assert torch.equal(torch.get_rng_state(), state)
    report = json.loads(json.dumps(result.report))
    assert (report["seed"], report["requested"], report["keep"]) == (3, {"Blond_Hair": 1.0}, ["Black_Hair"])


@pytest.mark.parametrize("wrong", [{"Black_Hair": "1"}, {"Black_Hair": None}, {1: 1.0}, ["Black_Hair"]])
def test_attributes_of_another_kind_are_refused(
    wrong: object, drawn: DrawnFace, parser: FaceParser, editor: MagGANEditor
) -> None:
    with pytest.raises(UsageError, match="AttributeEdit"):
        pipeline.edit(drawn.pixels, wrong, editor=editor, parser=parser)  # type: ignore[arg-type]


def test_no_face_is_refused(editor: MagGANEditor) -> None:
    with pytest.raises(NoFaceError):
        pipeline.edit(np.full((200, 200, 3), 127, np.uint8), {"Bald": 1.0}, editor=editor, parser=palette_parser())
