# SPDX-License-Identifier: Apache-2.0
"""The contact sheet puts every tile where its caption says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

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
    ("setting", "complaint"), [("Blond_Hiar=1", "Blond_Hair"), ("Young", "Young"), ("Young=old", "old")]
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
