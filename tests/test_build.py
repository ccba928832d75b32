# SPDX-License-Identifier: Apache-2.0
"""setup.py: what it says of a build that fails, and what it leaves behind. Nothing is compiled here."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
setuptools = pytest.importorskip("setuptools")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("faceedit_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (
            "[1/9] c++ -Wall -Werror=return-type -c csrc/gates.cpp\nFAILED: gates.o \n"
            "c++ -Wall -Werror=return-type -c csrc/gates.cpp\ncsrc/gates.cpp:5:1: error: 'x' was not declared\n",
            "csrc/gates.cpp:5:1: error: 'x' was not declared",
        ),
        (
            "nvcc -Werror=all-warnings -c a.cu\na.cu(3): error #20011-D: calling a host function\n",
            "a.cu(3): error #20011-D: calling a host function",
        ),
        ("c++ -Werror=return-type -c a.cpp\nKilled\n", "Killed"),
        ("a.cpp:1:10: fatal error: omp.h: No such file\n", "a.cpp:1:10: fatal error: omp.h: No such file"),
        (
            "CMake Error at CMakeLists.txt:4 (project):\n  No CMAKE_CXX_COMPILER could be found.\n\n"
            "Call Stack (most recent call first):\n  CMakeLists.txt:4\n",
            "No CMAKE_CXX_COMPILER could be found.",
        ),
        ("CMake Error: The source is missing\nCMake Generate step failed.\n", "CMake Error: The source is missing"),
        ("", "no output"),
    ],
)
def test_the_reason_is_the_line_with_the_error(build: ModuleType, output: str, reason: str) -> None:
    assert build.failure(output) == reason


def test_a_tree_without_its_links_is_refused(build: ModuleType, tmp_path: Path) -> None:
    for name in ("kernels", "training"):
        (tmp_path / "faceedit" / name).mkdir(parents=True)
        (tmp_path / "faceedit" / name / "__init__.py").touch()
    build.check_links(tmp_path)
    (tmp_path / "faceedit" / "kernels" / "__init__.py").unlink()
    (tmp_path / "faceedit" / "kernels").rmdir()
    (tmp_path / "faceedit" / "kernels").write_text("../kernels")  # what git leaves where links are off
    with pytest.raises(SystemExit, match=r"faceedit/kernels must be a link to .* core\.symlinks=true"):
        build.check_links(tmp_path)


def test_other_compilers_get_another_folder(build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is named behind another (ccache), and the host compiler that nvcc shall take."""
    for name in ("CXX", "CUDACXX", "CUDAHOSTCXX", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    keys = {build.toolchain(with_cuda=True)}
    for name, value in (
        ("CXX", "env g++"),
        ("CXX", "env clang++"),
        ("CUDAHOSTCXX", "g++-12"),
        ("NVCC_APPEND_FLAGS", "-g"),
    ):
        with monkeypatch.context() as patch:
            patch.setenv(name, value)
            keys.add(build.toolchain(with_cuda=True))
            assert build.toolchain(with_cuda=True) in keys
    assert len(keys) == 5


def test_an_nvcc_that_cannot_compile_is_not_called_missing(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDACXX", str(tmp_path / "nvcc"))
    assert build.why_no_cuda() == "no CUDA compiler (nvcc) was found"
    (tmp_path / "nvcc").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    assert build.why_no_cuda().startswith(f"{tmp_path / 'nvcc'} is there but cannot compile; set CUDAHOSTCXX")


def test_a_failed_build_in_place_takes_the_older_module_away(
    build: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FACEEDIT_NATIVE", "off")
    monkeypatch.delenv("FACEEDIT_CUDA", raising=False)
    package = tmp_path / "faceedit" / "kernels"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    extension = setuptools.Extension(build.MODULE, sources=[], optional=True)
    distribution = setuptools.Distribution({"packages": ["faceedit.kernels"], "ext_modules": [extension]})
    command = build.CMakeBuild(distribution)
    command.inplace = True
    command.ensure_finalized()
    older = package / Path(command.get_ext_filename(build.MODULE)).name
    older.touch()
    command.run()
    assert not older.exists()
    assert json.loads((package / "build_info.json").read_text())["reason"] == "FACEEDIT_NATIVE=off"
