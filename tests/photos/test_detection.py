# SPDX-License-Identifier: Apache-2.0
"""The astronaut is found at any size, tilt and in company; YuNet's rows are scaled back to the photo."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from skimage import data

from faceedit.detection import CONFIDENT, MIN_FACE_PX, YUNET_VARIABLE, FaceBox, FaceSearch, detect_faces
from faceedit.errors import WeightsError

ASTRONAUT = data.astronaut()
FACE = FaceBox(174.0, 68.0, 104.0, 104.0, 1.0)  # where a person would draw a box about this face


@pytest.fixture(autouse=True)
def _no_yunet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(YUNET_VARIABLE, raising=False)


@pytest.mark.parametrize("size", [140, 256, 512, 1500])
def test_the_face_is_found_at_any_size(size: int) -> None:
    photo = np.asarray(cv2.resize(ASTRONAUT, (size, size), interpolation=cv2.INTER_AREA))
    best = detect_faces(photo)[0]
    k = size / 512
    assert best.overlap(FaceBox(FACE.x * k, FACE.y * k, FACE.w * k, FACE.h * k, 1.0)) > 0.5
    assert best.score >= CONFIDENT


def test_the_larger_of_two_faces_comes_first() -> None:
    photo = np.full((512, 800, 3), 128, np.uint8)
    photo[256:, 544:] = cv2.resize(ASTRONAUT, (256, 256), interpolation=cv2.INTER_AREA)
    photo[:, :512] = ASTRONAUT
    boxes = [box for box in detect_faces(photo) if box.score >= CONFIDENT]
    small = FaceBox(544 + FACE.x / 2, 256 + FACE.y / 2, FACE.w / 2, FACE.h / 2, 1.0)
    places = [next(i for i, box in enumerate(boxes) if box.overlap(face) > 0.5) for face in (FACE, small)]
    assert places == sorted(places)
    assert boxes[0].overlap(FACE) > 0.5


@pytest.mark.parametrize("angle", [-32.0, 32.0])
def test_a_tilted_head_is_found_with_its_angle(angle: float) -> None:
    centre = (FACE.x + FACE.w / 2, FACE.y + FACE.h / 2)
    # OpenCV turns counter-clockwise for a positive angle, the box's roll counts clockwise.
    turn = cv2.getRotationMatrix2D(centre, -angle, 1.0)
    photo = np.asarray(cv2.warpAffine(ASTRONAUT, turn, (512, 512), borderMode=cv2.BORDER_REFLECT_101))
    hits = [box for box in detect_faces(photo) if box.overlap(FACE) > 0.4]
    assert hits
    assert np.sign(hits[0].angle_deg) == np.sign(angle)


def tilted_beside_upright() -> np.ndarray:
    """A head rolled by 30 degrees in 400 px, and beside it an upright one at 0.4 times its size."""
    turn = cv2.getRotationMatrix2D((FACE.x + FACE.w / 2, FACE.y + FACE.h / 2), -30.0, 1.0)
    photo = np.full((400, 560, 3), 110, np.uint8)
    photo[:, :400] = cv2.warpAffine(ASTRONAUT, turn, (512, 512), borderMode=cv2.BORDER_REFLECT_101)[:400, 30:430]
    photo[200:300, 440:540] = cv2.resize(ASTRONAUT[:250, 100:350], (100, 100), interpolation=cv2.INTER_AREA)
    return photo


BIG, SMALL = FaceBox(FACE.x - 30, FACE.y, FACE.w, FACE.h, 1.0), FaceBox(470.0, 227.0, 42.0, 42.0, 1.0)


def test_a_tilted_head_that_is_larger_than_an_upright_one_is_proposed_when_asked_for() -> None:
    search = FaceSearch(tilted_beside_upright())
    first = search.first()
    assert first[0].overlap(SMALL) > 0.5
    assert not any(box.overlap(BIG) > 0.4 and box.score >= CONFIDENT for box in first)
    larger = search.larger(1.25 * first[0].side)
    assert larger[0].overlap(BIG) > 0.4
    assert larger[0].angle_deg == 30.0
    assert all(box.side >= 1.25 * first[0].side and box.score >= CONFIDENT for box in larger)


def test_the_rest_holds_what_a_closer_and_a_tilted_look_find_and_comes_once() -> None:
    photo = np.zeros((800, 1120, 3), np.uint8)
    photo[:] = cv2.resize(tilted_beside_upright(), (1120, 800), interpolation=cv2.INTER_LINEAR)
    photo[650:762, 100:212] = cv2.resize(ASTRONAUT[:250, 100:350], (112, 112), interpolation=cv2.INTER_AREA)
    tiny = FaceBox(100 + 0.45 * (FACE.x - 100), 650 + 0.45 * FACE.y, 0.45 * FACE.w, 0.45 * FACE.h, 1.0)
    search = FaceSearch(photo)
    assert not any(box.overlap(tiny) > 0.4 for box in search.first())
    rest = search.rest()
    big = FaceBox(2 * BIG.x, 2 * BIG.y, 2 * BIG.w, 2 * BIG.h, 1.0)
    for face in (tiny, big):
        assert any(box.overlap(face) > 0.4 for box in rest)
    assert search.rest() == search.larger(10.0) == []


def test_the_best_scored_proposals_remain_of_too_many(monkeypatch: pytest.MonkeyPatch) -> None:
    photo = np.tile(ASTRONAUT[::4, ::4], (2, 3, 1))
    every = FaceSearch(photo).first()
    monkeypatch.setattr("faceedit.detection.MOST_PROPOSALS", 3)
    assert sorted(box.score for box in FaceSearch(photo).first()) == sorted(box.score for box in every)[-3:]


def test_boxes_are_distinct_ordered_limited_and_large_enough() -> None:
    noise = np.random.default_rng(3).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    photo = np.tile(ASTRONAUT[::4, ::4], (3, 5, 1))
    for picture in (photo, cv2.resize(noise, (640, 480), interpolation=cv2.INTER_CUBIC)):
        boxes = detect_faces(picture, max_faces=4)
        assert len(boxes) <= 4
        keys = [(box.score < CONFIDENT, -box.w * box.h) for box in boxes]
        assert keys == sorted(keys)
        assert all(min(box.w, box.h) >= MIN_FACE_PX for box in boxes)
        assert all(a.overlap(b) <= 0.35 for i, a in enumerate(boxes) for b in boxes[:i])
    assert len(detect_faces(photo, max_faces=4)) == 4


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 4000, 3), (4000, 2, 3), (30, 30, 3)])
def test_photos_without_room_for_a_face_give_none(shape: tuple[int, ...]) -> None:
    assert detect_faces(np.full(shape, 200, np.uint8)) == []


def test_detection_is_repeatable_from_several_threads() -> None:
    alone = detect_faces(ASTRONAUT)
    with ThreadPoolExecutor(2) as pool:
        assert all(boxes == alone for boxes in pool.map(detect_faces, [ASTRONAUT] * 4))


def test_other_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="uint8"):
        detect_faces(ASTRONAUT.astype(np.float32))
    with pytest.raises(ValueError, match=r"\(H, W, 3\)"):
        detect_faces(ASTRONAUT[..., 0])


class _YuNet:
    """Stands in for OpenCV's detector: one face, as YuNet lays its rows out."""

    row = np.array([[50.0, 40, 60, 80, 65, 70, 95, 60, 80, 85, 68, 105, 93, 100, 0.9]], np.float32)
    sizes: list[tuple[int, int]]

    def __init__(self, size: tuple[int, int], rows: np.ndarray | None) -> None:
        self.size, self.rows = size, rows

    def detect(self, image: np.ndarray) -> tuple[int, np.ndarray | None]:
        assert image.shape[1::-1] == self.size
        return 1, self.rows


def test_yunet_rows_become_boxes_of_the_photo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "yunet.onnx"
    model.write_bytes(b"x")
    rows: list[Any] = [_YuNet.row]
    monkeypatch.setattr(cv2.FaceDetectorYN, "create", lambda path, config, size, *rest: _YuNet(size, rows[0]))
    photo = np.zeros((768, 1024, 3), np.uint8)  # searched at half size
    (box,) = detect_faces(photo, yunet=model)
    assert (box.x, box.y, box.w, box.h) == (100, 80, 120, 160)
    assert box.score == pytest.approx(0.9)
    assert box.angle_deg == pytest.approx(np.degrees(np.arctan2(-10, 30)), abs=1e-4)
    assert box.landmarks is not None
    np.testing.assert_allclose(box.landmarks[0], (130.5, 140.5))
    monkeypatch.setenv(YUNET_VARIABLE, str(model))
    assert detect_faces(photo) == [box]
    rows[0] = None
    assert detect_faces(photo) == []


def test_a_missing_or_broken_yunet_file_is_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="missing"):
        detect_faces(ASTRONAUT, yunet=tmp_path / "none.onnx")
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a network")
    with pytest.raises(WeightsError, match="cannot run"):
        detect_faces(ASTRONAUT, yunet=broken)
