# SPDX-License-Identifier: Apache-2.0
"""What the repository tracks, and what importing the package may not do."""

import os
import shutil
import subprocess
import sys
from pathlib import Path, PurePosixPath

import pytest
from support.command_line import PACKAGE_ROOT

ROOT = Path(__file__).parents[1]

# Binary files may be tracked only here. Weights: at most 12 MiB a file and 64 MiB all together.
WEIGHTS = "faceedit/weights/*.safetensors"
BINARIES = [WEIGHTS, "docs/**/*.png", "docs/**/*.jpg", "faceedit/**/*.png", "faceedit/**/*.jpg", "tests/**/data/*"]


def tracked() -> list[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    # A checkout owned by another user, as containers mount them, is one that git refuses to read by default.
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z"]
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    listed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and os.path.lexists(ROOT / name)]


def matches(name: str, pattern: str) -> bool:
    folder, _, last = pattern.partition("/**/")
    if not last:
        return PurePosixPath(name).match(pattern)
    return name.startswith(folder + "/") and PurePosixPath(name).match(last)


def is_binary(path: Path) -> bool:
    return b"\0" in path.read_bytes()[:8192]


def test_binaries_are_only_where_they_are_declared() -> None:
    stray = [
        name
        for name in tracked()
        if not (ROOT / name).is_symlink()
        and is_binary(ROOT / name)
        and not any(matches(name, pattern) for pattern in BINARIES)
    ]
    assert stray == []


def test_weights_keep_to_their_size() -> None:
    sizes = {name: (ROOT / name).stat().st_size for name in tracked() if matches(name, WEIGHTS)}
    assert all(size <= 12 * 2**20 for size in sizes.values()), sizes
    assert sum(sizes.values()) <= 64 * 2**20


def test_symbolic_links_are_relative_and_stay_inside() -> None:
    links = [ROOT / name for name in tracked() if (ROOT / name).is_symlink()]
    assert ROOT / "faceedit" / "kernels" in links
    for link in links:
        target = os.readlink(link)
        assert not os.path.isabs(target), link
        assert link.resolve(strict=True).is_relative_to(ROOT), link


def test_compiled_files_are_not_tracked() -> None:
    assert [name for name in tracked() if name.endswith((".so", ".o", ".pyc", "build_info.json"))] == []


IMPORT = """
import subprocess, sys
import torch
def refuse(*arguments, **options):
    raise AssertionError(f"importing started a process: {arguments[1:]}")
subprocess.Popen.__init__ = refuse
before = set(sys.modules)
import faceedit.kernels
assert not torch.cuda.is_initialized()
assert "triton" not in set(sys.modules) - before, "triton is imported only when it runs"
assert "torch.utils.cpp_extension" not in sys.modules
import logging
assert not logging.getLogger().handlers
"""


def test_importing_the_kernels_compiles_nothing_and_touches_no_gpu(tmp_path: Path) -> None:
    # Away from the source tree, which Python would import in place of what is installed.
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", IMPORT], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
