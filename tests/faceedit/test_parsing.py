# SPDX-License-Identifier: Apache-2.0
"""Faces are found where they are, numbered by size, and refused with the reason that applies."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data
from support.drawn_faces import DrawnFace, PaletteParser, draw_face, palette_parser

from faceedit.alignment import portrait_alignment, rough_alignment
from faceedit.detection import FaceBox, FaceSearch, Proposals
from faceedit.errors import FaceCutOffError, FaceTooSmallError, NoFaceError, OutOfRangeError, WeightsError
from faceedit.labels import CELEBAMASK_HQ, CELEBAMASK_HQ_ZLL, flip_soft
from faceedit.networks.parser import ParserConfig, ParserNet
from faceedit.parsing import CROP_PX, AlignedFace, FaceParser, image_tensor, inside_photo, label_map, load_parser
from faceedit.registry import load_network, save_weights


def moved(box: FaceBox, dx: float = 0, dy: float = 0, grow: float = 1.0) -> FaceBox:
    w, h = box.w * grow, box.h * grow
    return FaceBox(box.x + dx + (box.w - w) / 2, box.y + dy + (box.h - h) / 2, w, h, box.score)


def eye_distance(drawn: DrawnFace) -> float:
    return float(np.linalg.norm(drawn.landmarks[1] - drawn.landmarks[0]))


@pytest.mark.parametrize("seed", [3, 8, 21])
def test_landmarks_match_the_truth(seed: int) -> None:
    drawn = draw_face(seed)
    face = palette_parser(drawn.box).find_face(drawn.pixels)
    error = np.linalg.norm(face.landmarks - drawn.landmarks, axis=1)
    # A parse gives centroids, the truth gives anatomical points: a seventh of the eye distance covers both.
    assert error.max() < eye_distance(drawn) / 7


def test_record_is_consistent(drawn: DrawnFace, parser: FaceParser) -> None:
    face = parser.find_face(drawn.pixels)
    assert face.crop.shape == (1, 3, CROP_PX, CROP_PX)
    assert face.mask.shape == (1, 19, CROP_PX, CROP_PX)
    torch.testing.assert_close(face.mask.sum(1), torch.ones(1, CROP_PX, CROP_PX))
    assert face.labels.shape == (CROP_PX, CROP_PX)
    assert not face.mask.is_inference()


@pytest.mark.parametrize("shift", [(-12, 0), (12, 9), (0, -12)])
@pytest.mark.parametrize("grow", [0.85, 1.2])
def test_a_rough_box_leads_to_the_same_alignment(
    drawn: DrawnFace, parser: FaceParser, shift: tuple[int, int], grow: float
) -> None:
    exact = parser.find_face(drawn.pixels)
    rough = palette_parser(moved(drawn.box, *shift, grow)).find_face(drawn.pixels)
    corners = np.array([(0.0, 0.0), (255.0, 0.0), (255.0, 255.0), (0.0, 255.0)])
    error = np.linalg.norm(exact.alignment.to_photo(corners) - rough.alignment.to_photo(corners), axis=1)
    assert error.max() < 0.12 * eye_distance(drawn)


def test_photo_labels_agree_with_the_drawing(drawn: DrawnFace, parser: FaceParser) -> None:
    labels = parser.find_face(drawn.pixels).photo_labels()
    assert labels.shape == drawn.labels.shape
    for part in ("hair", "skin", "nose", "l_eye", "r_eye", "l_brow", "r_brow"):
        found, truth = labels == CELEBAMASK_HQ.id(part), drawn.labels == CELEBAMASK_HQ.id(part)
        overlap = (found & truth).sum() / (found | truth).sum()
        assert overlap > 0.8, part


def test_a_mirrored_photo_gives_the_mirrored_mask(drawn: DrawnFace, parser: FaceParser) -> None:
    crop = image_tensor(draw_face().pixels[80:336, 60:316])
    mask = parser.parse_crop(crop)
    torch.testing.assert_close(parser.parse_crop(crop.flip(-1)), flip_soft(mask), atol=1e-5, rtol=0)


def test_flip_average_is_the_mean_of_both_views(drawn: DrawnFace) -> None:
    network = torch.nn.Conv2d(3, 19, 3, padding=1)
    crop = image_tensor(drawn.pixels[:256, :256])
    one, both = (FaceParser(network, flip_average=flag, detect=lambda _: Proposals([])) for flag in (False, True))
    expected = (one.parse_crop(crop) + flip_soft(one.parse_crop(crop.flip(-1)))) / 2
    torch.testing.assert_close(both.parse_crop(crop), expected)


def test_a_face_the_detector_missed_is_found_in_a_portrait(drawn: DrawnFace) -> None:
    face = palette_parser().find_face(drawn.pixels)
    assert np.linalg.norm(face.landmarks - drawn.landmarks, axis=1).max() < eye_distance(drawn) / 7


def two_faces() -> tuple[DrawnFace, DrawnFace, np.ndarray]:
    large, small = draw_face(3, 256, 300, 300, 20, 20), draw_face(8, 128, 300, 300, 86, 86)
    return large, small, np.concatenate([large.pixels, small.pixels], axis=1)


def test_faces_are_numbered_by_size_and_duplicates_counted_once() -> None:
    large, small, pixels = two_faces()
    parser = palette_parser(moved(small.box, 300), large.box, moved(large.box, 4, 3))
    assert parser.find_face(pixels, 0).landmarks[2, 0] < 300
    assert parser.find_face(pixels, 1).landmarks[2, 0] > 300
    with pytest.raises(NoFaceError, match="number of faces, 2, got 2"):
        parser.find_face(pixels, 2)


class StagedSearch(Proposals):
    """Boxes that come at the stage they are given for; it notes what it is asked."""

    def __init__(self, first: list[FaceBox], larger: list[FaceBox], rest: list[FaceBox]) -> None:
        super().__init__(first)
        self.stages, self.asked = {"larger": larger, "rest": rest}, [0.0]

    def larger(self, side_px: float) -> list[FaceBox]:
        self.asked.append(side_px)
        return self.stages["larger"]

    def rest(self) -> list[FaceBox]:
        self.asked.append(-1.0)
        return self.stages["rest"]


def believing(search: Proposals, monkeypatch: pytest.MonkeyPatch) -> FaceParser:
    """A parser that takes every box for a face, whose eyes are a third of its side apart or, at score 0.99, a tenth."""

    alignment = portrait_alignment(draw_face().landmarks, (420, 380), CROP_PX)

    def align(self: FaceParser, pixels: np.ndarray, box: FaceBox) -> AlignedFace:
        eyes = np.array([(-0.5, 0.0), (0.5, 0.0)]) * box.w / (10 if box.score == 0.99 else 3)
        landmarks = np.array([box.x + box.w / 2, box.y + box.h / 2]) + eyes[[0, 1, 0, 1, 0]]
        return AlignedFace(box, landmarks, alignment)

    monkeypatch.setattr(FaceParser, "_align", align)
    return FaceParser(torch.nn.Identity(), detect=lambda _: search)


def square(x: float, side: float, score: float = 0.9) -> FaceBox:
    return FaceBox(x, 0.0, side, side, score)


def test_the_largest_face_is_number_0_wherever_the_search_finds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A doubtful box, one that is three times its face, a larger tilted head, and small faces of a closer look."""
    doubtful, upright, oversized = square(0, 100, 0.1), square(200, 90), square(400, 150, 0.99)
    tilted, near, far = square(600, 130), square(800, 95, 0.2), square(1000, 30)
    search = StagedSearch([oversized, upright, doubtful], [tilted], [far, near])
    pixels = np.zeros((4, 4, 3), np.uint8)
    parser = believing(search, monkeypatch)
    assert parser.find(pixels, 0).box is tilted
    assert search.asked == [0.0, 125.0], "a larger tilted head is asked for, the rest is not"
    ranked = [tilted, doubtful, near, upright, oversized, far]
    assert [parser.find(pixels, i).box for i in range(6)] == ranked
    with pytest.raises(NoFaceError, match="number of faces, 6, got 6"):
        parser.find(pixels, 6)


def test_more_than_six_faces_of_a_photo_can_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = np.tile(data.astronaut()[:256:2, 96:352:2], (2, 4, 1))
    search = FaceSearch(photo)
    centres = [(box.x + box.w / 2, box.y + box.h / 2) for box in search.first()]
    heads = {(x // 128, y // 128) for x, y in centres if abs(x % 128 - 64) < 20 and abs(y % 128 - 60) < 20}
    assert len(heads) == 8
    assert believing(search, monkeypatch).find(photo, 7).landmarks.shape == (5, 2)


def test_a_false_alarm_does_not_hide_the_face(drawn: DrawnFace) -> None:
    alarm = FaceBox(0, 300, 110, 110, 0.9)
    face = palette_parser(alarm, drawn.box).find_face(drawn.pixels)
    assert np.linalg.norm(face.landmarks[2] - drawn.landmarks[2]) < eye_distance(drawn) / 7


@pytest.mark.parametrize("colour", [(0, 0, 0), (204, 0, 0), (0, 0, 204)])
def test_a_photo_of_no_face_is_refused(colour: tuple[int, int, int]) -> None:
    flat = np.full((300, 300, 3), colour, np.uint8)
    with pytest.raises(NoFaceError):
        palette_parser(FaceBox(90, 90, 120, 120, 0.9)).find_face(flat)


def test_a_face_below_the_smallest_size_is_refused_by_name(
    drawn: DrawnFace, parser: FaceParser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("faceedit.parsing.MIN_EYE_DISTANCE_PX", eye_distance(drawn) + 5)
    with pytest.raises(FaceTooSmallError, match="px apart"):
        parser.find_face(drawn.pixels)


def cut(drawn: DrawnFace, left: int = 0, bottom: int | None = None) -> tuple[np.ndarray, FaceParser]:
    return np.ascontiguousarray(drawn.pixels[:bottom, left:]), palette_parser(moved(drawn.box, -left))


def test_a_face_cut_off_is_refused_by_name(drawn: DrawnFace) -> None:
    for pixels, parser in (
        cut(drawn, left=int(drawn.landmarks[0, 0] - 6)),
        cut(drawn, bottom=int(drawn.landmarks[3:, 1].max() + 4)),
    ):
        with pytest.raises(FaceCutOffError, match="inside the photo"):
            parser.find_face(pixels)


def test_a_tight_crop_is_still_parsed_and_nothing_is_invented_outside(drawn: DrawnFace) -> None:
    left = int(drawn.landmarks[0, 0] - 20)
    pixels, parser = cut(drawn, left=left)
    face = parser.find_face(pixels)
    assert (
        np.linalg.norm(face.landmarks + np.array([left, 0]) - drawn.landmarks, axis=1).max() < eye_distance(drawn) / 7
    )
    outside = inside_photo(face.alignment) == 0
    assert outside.mean() > 0.1
    assert (face.labels[outside] == 0).all()


@pytest.mark.parametrize("angle_deg", [0.0, 20.0])
def test_what_lies_inside_the_photo(angle_deg: float) -> None:
    alignment = rough_alignment((50, -10, 120, 120), (150, 240), CROP_PX, angle_deg=angle_deg)
    steps = np.arange(CROP_PX)
    x, y = np.moveaxis(alignment.to_photo(np.stack(np.meshgrid(steps, steps), -1)), -1, 0)
    expected = (x >= -0.5) & (x <= 239.5) & (y >= -0.5) & (y <= 149.5)
    assert 0.1 < expected.mean() < 0.9
    assert np.array_equal(inside_photo(alignment), expected)


def test_of_equally_likely_classes_the_first_is_the_label() -> None:
    mask = torch.randint(0, 3, (1, 19, 40, 40), generator=torch.Generator().manual_seed(0)).float()
    expected = [next(c for c in range(19) if pixel[c] == max(pixel)) for pixel in mask[0].flatten(1).T.tolist()]
    labels = label_map(mask)
    assert labels.dtype == np.uint8
    assert labels.ravel().tolist() == expected
    assert len(set(expected)) > 2


def test_a_negative_index_is_out_of_range(drawn: DrawnFace, parser: FaceParser) -> None:
    with pytest.raises(OutOfRangeError, match="0 is the largest"):
        parser.find_face(drawn.pixels, -1)


def test_the_palette_parser_can_be_wrong() -> None:
    """The oracle these tests lean on reads colours: another colour, another class."""
    crop = image_tensor(np.full((32, 32, 3), CELEBAMASK_HQ.palette[CELEBAMASK_HQ.id("hat")], np.uint8))
    assert (PaletteParser()(crop).argmax(1) == CELEBAMASK_HQ.id("hat")).all()


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 1, 64, 64), (1, 3, 48, 48), (1, 3, 64, 32), (1, 3, 0, 0)])
def test_the_network_refuses_images_that_it_cannot_halve(shape: tuple[int, ...]) -> None:
    network = ParserNet(ParserConfig(widths=(4,) * 5, blocks=(1,) * 5)).eval()
    assert network(torch.zeros(1, 3, 64, 64)).shape == (1, 19, 64, 64)
    with pytest.raises(ValueError, match=r"ParserNet: image must be \(N,3,S,S\) with S a multiple of 32, got \("):
        network(torch.zeros(shape))


@pytest.mark.parametrize(
    ("classes", "named", "got"), [(19, CELEBAMASK_HQ_ZLL.name, f"19 of {CELEBAMASK_HQ_ZLL.name}"), (11, "", "11")]
)
def test_a_parser_of_other_classes_is_refused(classes: int, named: str, got: str, tmp_path: Path) -> None:
    path, config = tmp_path / "p.safetensors", ParserConfig(num_classes=classes, widths=(4,) * 5, blocks=(1,) * 5)
    facts = {"licence": "MIT", "training_data": "none", "source": "tests"}
    save_weights(path, "parser", config, ParserNet(config).state_dict(), label_scheme=named, **facts)
    with pytest.raises(WeightsError, match=f"the 19 classes of celebamask-hq, got {got} in .*p.safetensors"):
        load_parser("cpu", str(path))


def test_the_loaded_parser_is_the_file_in_fewer_passes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path, config = tmp_path / "p.safetensors", ParserConfig(widths=(4,) * 5, blocks=(1,) * 5)
    facts = {"licence": "MIT", "training_data": "none", "source": "tests"}
    save_weights(path, "parser", config, ParserNet(config).state_dict(), **facts)
    with torch.inference_mode():
        network = load_parser("cpu", str(path)).network
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in network.modules())
    assert not any(parameter.is_inference() for parameter in network.parameters())
    assert network.config == config
    image = torch.rand(2, 3, 64, 64) * 2 - 1
    wanted = load_network(path)(image)
    assert wanted.std() > 0.01
    torch.testing.assert_close(network(image), wanted, rtol=1e-4, atol=1e-5)  # float32: rounding
