# SPDX-License-Identifier: Apache-2.0
"""Files are replaced whole; a fault leaves what was there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from faceedit.atomic import replacing, write_text


def test_the_new_content_takes_the_old_ones_place(tmp_path: Path) -> None:
    write_text(tmp_path / "a.txt", "old")
    write_text(tmp_path / "a.txt", "größer")
    assert (tmp_path / "a.txt").read_bytes() == "größer".encode()
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("fault", [ValueError, KeyboardInterrupt])
def test_a_fault_half_way_leaves_the_old_content_and_nothing_else(tmp_path: Path, fault: type[BaseException]) -> None:
    write_text(tmp_path / "a.txt", "old")

    def torn() -> None:
        with replacing(tmp_path / "a.txt") as file:
            file.write(b"ha")
            raise fault

    with pytest.raises(fault):
        torn()
    assert (tmp_path / "a.txt").read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_reason_is_not_hidden_by_the_cleaning_up(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError), replacing(tmp_path / "file" / "a.txt"):
        pass
