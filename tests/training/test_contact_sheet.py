# SPDX-License-Identifier: Apache-2.0
"""The contact sheet puts every tile where its caption says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faceedit.errors import NoFaceError
from faceedit.training import contact_sheet as module
from faceedit.training.contact_sheet import contact_sheet, main


def test_tiles_stand_in_their_places() -> None:
    def flat(value: int) -> np.ndarray:
        return np.full((32, 32, 3), value, dtype=np.uint8)

    rows = [[flat(10), flat(20)], [flat(30), flat(40)], [flat(50), flat(60)]]
    sheet = np.asarray(contact_sheet(rows, ["Blond_Hair"], tile_px=16, columns=2))
    top = sheet.shape[0] - 2 * 16
    middles = [[sheet[top + 8 + 16 * r, 8 + 16 * k + 38 * c, 0] for c in (0, 1) for k in (0, 1)] for r in (0, 1)]
    assert middles[0] == [10, 20, 30, 40]
    assert middles[1] == [50, 60, 255, 255]


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [("Blond_Hiar=1", "Blond_Hair"), ("Young", "Young"), ("Young=old", "old"), ("Young=nan", "nan")],
)
def test_a_wrong_edit_is_refused_before_anything_is_loaded(
    setting: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(tmp_path), "-o", str(tmp_path / "sheet.png"), "--set", setting])
    assert stop.value.code == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "must be NAME=VALUE" in line
    assert complaint in line


def test_mistakes_are_one_line_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*named: object) -> None:
        raise AssertionError("too early")

    monkeypatch.setattr(module, "load_editor", load)
    (tmp_path / "photos").mkdir()
    sheet = ("-o", str(tmp_path / "sheet.png"))
    Image.new("RGB", (8, 8)).save(tmp_path / "photos" / "1.png")
    for folder, more, code, words in (
        ("photos", (*sheet, "--columns", "0"), 2, "--columns must be 1 or more, got 0"),
        ("photos", (*sheet, "--count", "0"), 2, "--count must be 1 or more, got 0"),
        ("photos", (*sheet, "--tile", "0"), 2, "--tile must be 1 or more, got 0"),
        ("photos", ("-o", str(tmp_path / "sheet.xyz")), 2, "path must end in one of"),
        ("photos", ("-o", str(tmp_path / "none" / "sheet.png")), 1, "path must be in an existing folder"),
        ("none", sheet, 2, "folder must hold photos, got none in"),
    ):
        assert main([str(tmp_path / folder), *more]) == code
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert words in line


def test_a_sheet_of_no_photo_is_not_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*given: object) -> None:
        raise NoFaceError("find: no face")

    for name in ("load_editor", "load_parser"):
        monkeypatch.setattr(module, name, lambda *named: None)
    monkeypatch.setattr(module, "edits_of", refuse)
    Image.new("RGB", (8, 8)).save(tmp_path / "1.png")
    assert main([str(tmp_path), "-o", str(tmp_path / "sheet.jpg")]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "1.png: find: no face"
    assert "must hold photos that can be edited, got none of 1" in lines[1]
    assert not (tmp_path / "sheet.jpg").exists()
