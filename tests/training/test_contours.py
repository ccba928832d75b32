# SPDX-License-Identifier: Apache-2.0
"""Landmarks drawn as labels, and how they overrule a teacher."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from faceedit.errors import UsageError
from faceedit.labels import CELEBAMASK_HQ
from faceedit.training import contours, face_mesh
from faceedit.training.contours import BARE, UNKNOWN, contour_labels, contours_of, five_points, read_contours
from faceedit.training.parser import overrule

SIZE = 128


def mesh_of_ellipses() -> np.ndarray:
    """A mesh of a crop of SIZE whose parts are ellipses; vertices that outline nothing lie at the origin."""
    mesh = np.zeros((478, 2), np.float32)

    def ring(
        ids: tuple[int, ...], centre: tuple[float, float], radii: tuple[float, float], start: float = np.pi
    ) -> None:
        angles = start + 2 * np.pi * np.arange(len(ids)) / len(ids)
        mesh[list(ids)] = np.stack([centre[0] + radii[0] * np.cos(angles), centre[1] + radii[1] * np.sin(angles)], 1)

    def arc(ids: tuple[int, ...], half_width: float, height: float) -> None:
        x = np.linspace(-1, 1, len(ids))
        mesh[list(ids)] = np.stack([64 + half_width * x, 90 + height * (1 - x * x)], 1)

    ring(contours._OVAL, (64, 64), (45, 55))
    ring(contours._RIGHT_EYE, (45, 55), (8, 4))
    ring(contours._LEFT_EYE, (83, 55), (8, 4))
    ring(contours._RIGHT_BROW, (45, 42), (11, 3))
    ring(contours._LEFT_BROW, (83, 42), (11, 3))
    ring(contours._NOSE, (64, 70), (8, 10))
    for ids, half_width, height in (
        (contours._OUTER_TOP, 18, -8),
        (contours._INNER_TOP, 12, -3),
        (contours._INNER_LOW, 12, 3),
        (contours._OUTER_LOW, 18, 8),
    ):
        arc(ids, half_width, height)
    mesh[contours._NOSE_TIP] = (64, 74)
    return mesh


def test_parts_are_drawn_where_the_mesh_has_them() -> None:
    labels = contour_labels(mesh_of_ellipses(), SIZE)

    def at(x: int, y: int) -> int:
        return int(labels[y, x])

    for name, point in {
        "r_eye": (45, 55),
        "l_eye": (83, 55),
        "r_brow": (45, 42),
        "l_brow": (83, 42),
        "nose": (64, 70),
        "u_lip": (64, 85),
        "mouth": (64, 90),
        "l_lip": (64, 96),
    }.items():
        assert at(*point) == CELEBAMASK_HQ.id(name), name
    assert at(64, 30) == BARE
    assert at(2, 2) == UNKNOWN
    finer = contour_labels(mesh_of_ellipses() * 2, 2 * SIZE)
    assert finer[161, 128] == UNKNOWN  # just below the nose, whose edge the mesh guesses
    assert finer[163, 128] == BARE
    eye = (labels == CELEBAMASK_HQ.id("r_eye")).sum()
    assert eye == pytest.approx(np.pi * 8 * 4, rel=0.1)


def test_five_points_are_image_left_first() -> None:
    points = five_points(mesh_of_ellipses())
    np.testing.assert_allclose(points[:2], [[45, 55], [83, 55]], atol=0.1)
    np.testing.assert_allclose(points[2:], [[64, 74], [46, 90], [82, 90]], atol=0.1)


def test_files_of_another_kind_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "bad.npz", **{"one.jpg": np.zeros((68, 2))})
    with pytest.raises(UsageError, match=r"photo_contours\[one.jpg\] must be 478 points"):
        read_contours(tmp_path / "bad.npz")


def test_photos_of_one_name_have_their_own_landmarks() -> None:
    folder = Path("photos")
    files = [folder / name for name in ("1.jpg", "x/1.jpg", "x/2.jpg", "y/3.jpg")]
    one, other = np.zeros((478, 2)), np.ones((478, 2))
    found = contours_of(files, folder, {"./x/1.jpg": one, "./x/2.jpg": other, "./gone.jpg": one})
    assert list(found) == files[1:3]
    assert found[files[1]] is one
    assert list(contours_of(files, folder, {"3.jpg": one, "2.jpg": other, "gone.jpg": one})) == [files[3], files[2]]
    with pytest.raises(
        UsageError, match=r"must tell photos apart, got the name 1\.jpg of 2 photos, .*; write them again"
    ):
        contours_of(files, folder, {"1.jpg": one})


def test_face_mesh_writes_paths_below_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for MediaPipe, which the tests do without."""
    (tmp_path / "x").mkdir()
    for name in ("1.png", "x/1.png"):
        Image.new("RGB", (4, 2)).save(tmp_path / name)
    points = [SimpleNamespace(x=0.5, y=0.5)] * 478
    seen = SimpleNamespace(multi_face_landmarks=[SimpleNamespace(landmark=points)])
    mesh = SimpleNamespace(process=lambda pixels: seen)
    made = SimpleNamespace(FaceMesh=lambda **settings: nullcontext(mesh))
    monkeypatch.setitem(sys.modules, "mediapipe", SimpleNamespace(solutions=SimpleNamespace(face_mesh=made)))
    monkeypatch.setattr(sys, "argv", ["face_mesh.py", str(tmp_path), "-o", str(tmp_path / "contours.npz")])
    face_mesh.main()
    contours = read_contours(tmp_path / "contours.npz")
    assert sorted(contours) == ["./1.png", "./x/1.png"]
    np.testing.assert_allclose(contours["./1.png"][0], [1.5, 0.5])


def test_contours_overrule_the_teacher_but_not_what_covers_a_part() -> None:
    skin, eye, brow, hair = (CELEBAMASK_HQ.id(name) for name in ("skin", "l_eye", "l_brow", "hair"))
    believed = torch.tensor([skin, eye, eye, hair, hair, eye])
    drawn = torch.tensor([eye, BARE, UNKNOWN, brow, BARE, eye])[None, None]
    soft = torch.nn.functional.one_hot(believed, 19).float().T[None, :, None]
    target, weight = overrule(believed[None, None], torch.full((1, 1, 6), 0.5), soft, drawn)
    assert target[0, 0].tolist() == [eye, skin, eye, brow, hair, eye]
    # drawn | misplaced | beside a vague edge | hair hangs over the brow | hair stands | both agree
    assert weight[0, 0].tolist() == [1, 1, 0, 0, 0.5, 1]


def test_without_landmarks_the_teacher_stands() -> None:
    target = torch.full((1, 2, 2), CELEBAMASK_HQ.id("l_eye"))
    weight = torch.full((1, 2, 2), 0.5)
    soft = torch.zeros(1, 19, 2, 2)
    unchanged = overrule(target, weight, soft, torch.full((1, 2, 2), UNKNOWN))
    assert torch.equal(unchanged[0], target)
    assert torch.equal(unchanged[1], weight)
