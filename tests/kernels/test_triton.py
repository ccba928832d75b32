# SPDX-License-Identifier: Apache-2.0
"""Triton without a GPU: numbers under its interpreter, and compilation for sm_80 and sm_90.

Both need a process of their own: TRITON_INTERPRET is read when a kernel is decorated, and it excludes compiling.
"""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import op_cases
from support.command_line import PACKAGE_ROOT
from support.triton_cases import CASES

from faceedit import kernels

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

TESTS = Path(__file__).parents[1]


def run_cases(what: str, **environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", "support.triton_cases", what],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": f"{PACKAGE_ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def test_every_triton_op_has_its_cases() -> None:
    ops = [path.stem.removesuffix("_triton") for path in Path(kernels.__file__).parent.glob("*_triton.py")]
    assert sorted(ops) == CASES


def test_interpreter_matches_the_oracle() -> None:
    lines = run_cases("numbers", TRITON_INTERPRET="1")
    assert [line.split()[1] for line in lines if line.startswith("ran ")] == CASES


def test_interpreter_matches_the_oracle_at_drawn_sizes() -> None:
    lines = run_cases("drawn", TRITON_INTERPRET="1")
    drawn = [line.removeprefix("drew ") for line in lines if line.startswith("drew ")]
    assert drawn == [case.name for case in op_cases.CASES if not case.composed]


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """Every jitted function of every Triton module is compiled."""
    lines = run_cases("compile", TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0")
    compiled = {tuple(line.split()[1:]) for line in lines if line.startswith("compiled ")}
    for op in CASES:
        module = Path(kernels.__file__).parent / f"{op}_triton.py"
        for name in re.findall(r"^@triton\.jit\ndef (\w*kernel)\(", module.read_text(), re.MULTILINE):
            assert {(name, "80"), (name, "90")} <= compiled, f"{op}: {name} was not compiled"
