# SPDX-License-Identifier: Apache-2.0
"""`import faceedit.kernels` costs what importing torch costs."""

import os
import subprocess
import sys
from pathlib import Path

import faceedit
from faceedit import kernels

PROGRAM = """
import sys, torch
before = set(sys.modules)
import faceedit.kernels
print(*sorted(set(sys.modules) - before))
"""


def test_importing_adds_nothing_but_its_own_modules() -> None:
    """No compiler, no Triton, no ONNX, no benchmark: those come when something asks for them."""
    environment = os.environ | {"PYTHONPATH": str(Path(faceedit.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, check=True)
    added = done.stdout.split()
    assert "faceedit.kernels.noise_bias_act" in added
    assert [name for name in added if not name.startswith("faceedit")] == []
    assert [name for name in added if name.endswith("_triton") or "benchmarking" in name] == []
    assert len(added) <= 12 + 2 * len(kernels.__all__)
