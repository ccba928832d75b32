# SPDX-License-Identifier: Apache-2.0
"""The doctor tells the truth about weights, kernels and extras."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest
from support.command_line import Run

from faceedit import doctor, kernels
from faceedit.registry import DIRECTORY_VARIABLE


def test_report_is_json_and_covers_every_op(run: Run) -> None:
    outcome = run("doctor", "--json")
    report = outcome.json()
    assert report["kernels"] == kernels.backends_report()
    assert set(report["kernels"]["ops"]) >= {"masked_mse", "noise_bias_act"}
    assert set(report["extras"]) == set(doctor.EXTRAS)
    assert report["packages"]["torch"]


def test_text_names_what_the_json_reports(run: Run) -> None:
    report, text = run("doctor", "--json").json(), run("doctor").out
    for op, backends in report["kernels"]["ops"].items():
        assert op in text
        for state in backends.values():
            assert state["reason"] in text
    assert ("C++ kernels: yes" in text) == report["kernels"]["build"]["cpp"]
    assert ("CUDA kernels: yes" in text) == report["kernels"]["build"]["cuda"]
    for row in report["weights"]:
        assert row["name"] in text


def test_a_damaged_weights_file_is_named_and_fails_the_check(
    weights_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    for file in weights_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    damaged = bytearray((tmp_path / "m.safetensors").read_bytes())
    damaged[-1] ^= 1
    (tmp_path / "m.safetensors").write_bytes(damaged)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    outcome = run("doctor", "--json")
    rows = {row["name"]: row for row in outcome.json()["weights"]}
    assert outcome.code == 1
    assert not rows["maggan-starter"]["verified"]
    assert "SHA-256" in rows["maggan-starter"]["problem"]
    assert rows["parser-starter"]["verified"]
    assert "UNUSABLE" in run("doctor").out


def test_a_missing_extra_is_named_with_what_it_gives(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    extra = doctor.Extra(("json", "surely_not_installed"), "wings")
    monkeypatch.setattr(doctor, "EXTRAS", {"wings": extra})
    outcome = run("doctor")
    assert "missing surely_not_installed; pip install 'faceedit[wings]' (gives wings)" in outcome.out


def test_a_damaged_index_is_reported_and_not_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    (tmp_path / "index.json").write_text("[")
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    outcome = run("doctor")
    assert outcome.code == 1
    assert "UNUSABLE" in outcome.out
    assert "index.json" in outcome.out


def test_the_folder_of_the_users_weights_is_shown(
    weights_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    """Also what lies there without being registered, which does not make the installation worse."""
    assert f"weights, of {weights_dir}, then " in run("doctor").out
    (tmp_path / "foreign.safetensors").write_text("nothing of ours")
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    outcome = run("doctor", "--json")
    rows = {row["name"]: row for row in outcome.json()["weights"]}
    assert (rows["foreign"]["verified"], rows["foreign"]["pinned"], outcome.code) == (False, False, 0)
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "absent"))
    outcome = run("doctor")
    assert outcome.code == 1
    assert f"FACEEDIT_WEIGHTS must name a folder, got {tmp_path / 'absent'}" in outcome.out


def test_health_rests_on_the_weights_of_the_default_editor() -> None:
    def row(name: str, verified: bool = True) -> dict[str, object]:
        return {"name": name, "verified": verified}

    needed = [row(name) for name in doctor.NEEDED_WEIGHTS]
    assert not doctor.is_healthy({"unusable": {}, "weights": []})
    assert not doctor.is_healthy({"unusable": {}, "weights": needed[1:]})
    assert doctor.is_healthy({"unusable": {}, "weights": [*needed, row("another", verified=False)]})


def test_a_package_that_cannot_be_imported_is_named_and_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # an import of it fails
    outcome = run("doctor")
    assert outcome.code == 1
    assert "UNUSABLE: cv2: " in outcome.out


MODULES = {
    "import-linter": "importlinter", "pytest-benchmark": "pytest_benchmark", "pytest-xdist": "xdist",
    "scikit-image": "skimage", "types-PyYAML": None,
}  # fmt: skip


def test_extras_are_those_of_the_package() -> None:
    pyproject = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    declared = pyproject["project"]["optional-dependencies"]
    assert declared.keys() == doctor.EXTRAS.keys()
    for extra, requirements in declared.items():
        names = [re.match(r"[\w-]+", requirement)[0] for requirement in requirements if "[" not in requirement]
        modules = [MODULES.get(name, name) for name in names]
        assert set(modules) - {None} == set(doctor.EXTRAS[extra].modules), extra
