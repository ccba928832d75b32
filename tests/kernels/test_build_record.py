# SPDX-License-Identifier: Apache-2.0
"""`build_info.json`: what it says of a build counts for more than a module that lies beside it."""

import inspect
import json
from pathlib import Path

import pytest

from faceedit.kernels import native


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package's folder, where the record is looked for, afresh each time."""
    folder = tmp_path / "faceedit" / "kernels"
    folder.mkdir(parents=True)
    monkeypatch.setattr(native, "__file__", str(folder / "native.py"))
    monkeypatch.setattr(native, "_build_info", inspect.unwrap(native._build_info))
    return folder


def missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise ImportError(f"no {name}")

    monkeypatch.setattr(native.importlib, "import_module", refuse)


def test_a_module_whose_record_says_it_was_not_built_is_not_loaded(package: Path) -> None:
    record = {"native": False, "cuda": False, "reason": "cmake was not found", "cuda_reason": ""}
    (package / "build_info.json").write_text(json.dumps(record))
    assert native._load() == (None, "cmake was not found")


def test_a_module_without_a_record_is_loaded(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native.importlib, "import_module", lambda name: name)
    assert native._load() == ("faceedit.kernels._C", "")


@pytest.mark.parametrize("text", ["", '{"native": tr'])
def test_half_a_record_is_none(package: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    (package / "build_info.json").write_text(text)
    missing(monkeypatch)
    module, reason = native._load()
    assert module is None
    assert reason.startswith("never built")


def test_the_source_tree_says_what_it_is(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package.parent / "pyproject.toml").touch()
    missing(monkeypatch)
    assert "this is the source tree, not the installed package" in native._load()[1]
