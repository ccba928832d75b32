# SPDX-License-Identifier: Apache-2.0
"""The README's commands and Python blocks, executed in order in one empty folder.

What installs (`pip install ...`) and what would run these tests inside themselves (`pytest`) is done by .ci/run.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import faceedit

ROOT = Path(__file__).parents[1]
PACKAGE_ROOT = Path(faceedit.__file__).parents[1]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LEFT_TO_CI = re.compile(r"^(pip install \S+|pytest)$")


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall((ROOT / "README.md").read_text(encoding="utf-8"))


def shell_commands(block: str) -> list[str]:
    """The commands of a block one by one, without those that are left to .ci/run."""
    commands = (command.strip() for line in block.splitlines() for command in line.split("&&"))
    return [command for command in commands if command and not LEFT_TO_CI.match(command)]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment whose `faceedit` and `python` are the ones under test."""
    programs = tmp_path_factory.mktemp("bin")
    for name, arguments in (("faceedit", "-m faceedit "), ("python", "")):
        script = programs / name
        script.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} {arguments}"$@"\n')
        script.chmod(0o755)
    path = f"{programs}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"PATH": path, "PYTHONPATH": str(PACKAGE_ROOT), "OMP_NUM_THREADS": "2"}


@pytest.mark.slow
def test_every_block_runs(environment: dict[str, str], tmp_path: Path) -> None:
    ran: list[str] = []
    for language, block in blocks():
        programs = [["python", "-c", block]] if language == "python" else [
            ["sh", "-ec", command] for command in shell_commands(block)
        ]  # fmt: skip
        for program in programs:
            done = subprocess.run(
                program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
            )
            assert done.returncode == 0, f"{program[-1]}\n{done.stdout}{done.stderr}"
            ran.append(program[-1])
    assert any("--set Blond_Hair=1" in command for command in ran)
    assert (tmp_path / "out.png").is_file()
    assert (tmp_path / "out_compare.png").is_file()


def test_the_two_commands_are_there() -> None:
    bash = [block for language, block in blocks() if language == "bash"]
    assert any("pip install ." in block and "faceedit edit" in block for block in bash), "one sets up and edits"
    assert any(block.rstrip().endswith("pytest") for block in bash), "one runs the tests"
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert re.search(r"^stage 'tests' pytest$", ci, re.MULTILINE), ".ci/run ends with the README's test command"


def test_links_lead_somewhere() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (ROOT / target).is_file(), target


def test_readme_fits_two_screens() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 120
