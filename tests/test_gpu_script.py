# SPDX-License-Identifier: Apache-2.0
"""tests/gpu.sh itself, without a GPU: what it refuses, and that an interrupted run keeps what it measured."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("gpu.sh")

# Finds a GPU, passes the tests, and ends the script in the middle of the benchmark; in place of the JSON it writes down
# which stages it would have been made of.
PYTHON = """#!/bin/sh
case "$1 $3" in
  "-c "*) echo "Some GPU" ;;
  "-m -q") echo passed ;;
  "-m bench") kill -TERM $PPID ;;
  *) cd "$2" && echo *.stage > "$3" ;;
esac
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tests", "benchmrk"], "a stage must be tests, memcheck, racecheck, benchmark or edit, got 'benchmrk'"),
        (["tests", "--", "--quick"], "options after -- must belong to one stage, benchmark or edit, got tests"),
        (["benchmark", "edit", "--", "--quick"], "options after -- must belong to one stage"),
    ],
)
def test_a_wrong_request_is_refused_before_anything_runs(arguments: list[str], message: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHON": str(tmp_path / "none")}
    done = subprocess.run(["bash", SCRIPT, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_an_interrupted_run_keeps_what_it_measured(tmp_path: Path) -> None:
    stand_in, record = tmp_path / "python", tmp_path / "record"
    stand_in.write_text(PYTHON)
    stand_in.chmod(0o755)
    environment = os.environ | {"PYTHON": str(stand_in), "FACEEDIT_GPU_JSON": str(record)}
    command = ["bash", SCRIPT, "tests", "benchmark"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert record.read_text() == "tests.stage\n"
