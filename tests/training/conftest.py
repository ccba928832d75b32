# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path

import pytest

from faceedit.training.task import TASKS


@pytest.fixture
def toy_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe file of the toy task, which is registered for the length of one test."""
    monkeypatch.setitem(TASKS, "toy", "support.toy_task:ToyTask")
    path = tmp_path / "toy.yaml"
    path.write_text(
        "task: toy\ntrainer:\n  steps: 12\n  accelerator: cpu\n  cpu_threads: 1\n  log_every: 4\n"
        "  checkpoint_every: 0\n"
    )
    return path
