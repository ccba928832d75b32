# SPDX-License-Identifier: Apache-2.0
"""`faceedit batch` goes on past failures, resumes where it stopped, and says what happened."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import BAD_FILES, SET, Run

from faceedit.classification import STARTER, load_classifier
from faceedit.cli.batch import MANIFEST
from faceedit.networks.classifier import AttributeClassifier, AttributeClassifierConfig
from faceedit.registry import DIRECTORY_VARIABLE, pin_weights, save_weights


@pytest.fixture
def folder(photo: Path) -> Path:
    """Three photos of the drawn face, one of them in a subfolder."""
    (photo.parent / "sub").mkdir()
    for name in ("a.png", "sub/b.png"):
        shutil.copy(photo, photo.parent / name)
    return photo.parent


def results(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }


def test_batch_edits_every_photo_and_keeps_names(run: Run, folder: Path, tmp_path: Path) -> None:
    outcome = run("batch", folder, tmp_path / "out", *SET, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.json()["edited"] == 3
    assert sorted(results(tmp_path / "out")) == ["a.png", "me.png", "sub/b.png"]


def test_batch_refuses_results_that_would_overwrite_each_other(run: Run, folder: Path, tmp_path: Path) -> None:
    shutil.copy(folder / "a.png", folder / "a_compare.png")
    outcome = run("batch", folder, tmp_path / "out", *SET, "--compare")
    assert outcome.code == 2
    assert len(outcome.err.splitlines()) == 1
    assert "got a.png and a_compare.png, which would both write a_compare.png; rename one" in outcome.err
    assert not (tmp_path / "out").exists()


def test_batch_goes_on_past_every_kind_of_bad_photo(run: Run, folder: Path, tmp_path: Path) -> None:
    for name, (make, _) in BAD_FILES.items():
        make(folder / name)
    outcome = run("batch", folder, tmp_path / "out", *SET, "--json")
    assert outcome.code == 1
    summary = outcome.json()
    assert (summary["edited"], summary["failed"], summary["photos"]) == (3, len(BAD_FILES), 3 + len(BAD_FILES))
    assert summary["reasons"] == {"ImageReadError": 3, "ImageTooLargeError": 1, "NoFaceError": 1}
    assert {row["photo"] for row in summary["failures"]} == set(BAD_FILES)
    assert sorted(results(tmp_path / "out")) == ["a.png", "me.png", "sub/b.png"]
    assert len(outcome.err.splitlines()) == len(BAD_FILES)
    assert "Traceback" not in outcome.err


def test_an_unexpected_fault_of_one_photo_is_reported_and_the_rest_done(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faceedit.pipeline

    real = faceedit.pipeline.edit

    def faulty(source: Any, *arguments: Any, **options: Any) -> Any:
        if Path(source).name == "a.png":
            raise RuntimeError("a bug\nover two lines")
        return real(source, *arguments, **options)

    monkeypatch.setattr(faceedit.pipeline, "edit", faulty)
    outcome = run("batch", folder, tmp_path / "out", *SET)
    assert outcome.code == 1
    assert "2 edited, 0 skipped, 1 failed of 3 photos (RuntimeError 1)" in outcome.out
    assert outcome.err.splitlines() == ["failed: a.png: RuntimeError: a bug over two lines"]


def test_a_photo_that_vanishes_meanwhile_is_one_failure(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faceedit.cli.batch

    listed = faceedit.cli.batch.find_photos(folder, tmp_path / "out")
    monkeypatch.setattr(faceedit.cli.batch, "find_photos", lambda *_: listed)
    assert run("batch", folder, tmp_path / "out", *SET).code == 0
    (folder / "a.png").unlink()
    outcome = run("batch", folder, tmp_path / "out", *SET, "--json")
    assert outcome.code == 1
    assert [row["photo"] for row in outcome.json()["failures"]] == ["a.png"]


def test_finished_photos_are_skipped_until_something_changes(run: Run, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"

    def counts(*options: str) -> tuple[int, int]:
        summary = run("batch", folder, out, *(options or SET), "--json").json()
        return summary["edited"], summary["skipped"]

    assert counts() == (3, 0)
    assert counts() == (0, 3)
    (out / "a.png").unlink()
    assert counts() == (1, 2)
    (out / "a.png").write_bytes(b"torn")
    assert counts() == (1, 2)
    os.utime(folder / "me.png", (1, 1))
    assert counts() == (1, 2)
    assert counts("--set", "Blond_Hair=0") == (3, 0)


def test_a_missing_sheet_is_made_again(run: Run, folder: Path, tmp_path: Path) -> None:
    command = ("batch", folder, tmp_path / "out", *SET, "--compare", "--json")
    assert run(*command).json()["edited"] == 3
    (tmp_path / "out" / "a_compare.png").unlink()
    again = run(*command).json()
    assert (again["edited"], again["skipped"]) == (1, 2)
    assert (tmp_path / "out" / "a_compare.png").is_file()


def test_other_weights_of_any_network_that_decides_edit_again(
    run: Run, folder: Path, tmp_path: Path, weights_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier tells the editor what a face has, the detector where it is."""
    shutil.copytree(weights_dir, tmp_path / "weights")
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path / "weights"))
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "tests"}
    config = AttributeClassifierConfig(size_px=32, base_width=8, stages=3, hidden_width=32)

    def edited(seed: int) -> int:
        torch.manual_seed(seed)
        network, path = AttributeClassifier(config), tmp_path / "weights" / "c.safetensors"
        path.unlink(missing_ok=True)
        save_weights(path, "attribute-classifier", config, network.state_dict(), **facts)
        pin_weights(STARTER, path)
        load_classifier.cache_clear()
        return int(run("batch", folder, tmp_path / "out", *SET, "--json").json()["edited"])

    try:
        assert [edited(0), edited(0), edited(1)] == [3, 0, 3]
        (tmp_path / "detector.onnx").write_bytes(b"x")
        monkeypatch.setenv("FACEEDIT_YUNET", str(tmp_path / "detector.onnx"))
        assert edited(1) == 3  # the palette parser's own detection: nobody reads the file
    finally:
        load_classifier.cache_clear()


def test_wrong_requests_are_refused_once(run: Run, folder: Path, tmp_path: Path) -> None:
    out = ("batch", folder, tmp_path / "out")
    run(*out, *SET, "--face", "-1").refused(2, "--face must not be negative, got -1; 0 is the largest")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("line", ['{"photo": []}', "[]", "7", "[" * 100_000, "null"])
def test_a_strange_manifest_line_is_another_versions(run: Run, folder: Path, tmp_path: Path, line: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text(line + "\n")
    strange = {"photo": [], "size": 1, "modified_ns": 1, "options": "", "output": "", "output_size": 1, "status": ""}
    with (tmp_path / "out" / MANIFEST).open("a") as lines:
        lines.write(json.dumps(strange) + "\n")
    assert run("batch", folder, tmp_path / "out", *SET, "--json").json()["edited"] == 3


def test_failed_photos_are_tried_again(run: Run, folder: Path, tmp_path: Path) -> None:
    good = (folder / "a.png").read_bytes()
    (folder / "a.png").write_text("no picture")
    assert run("batch", folder, tmp_path / "out", *SET).code == 1
    (folder / "a.png").write_bytes(good)
    outcome = run("batch", folder, tmp_path / "out", *SET)
    assert outcome.code == 0
    assert "1 edited, 2 skipped, 0 failed of 3 photos" in outcome.out


def test_an_interrupted_batch_resumes_to_the_same_files(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faceedit.pipeline

    assert run("batch", folder, tmp_path / "whole", *SET).code == 0
    out, real = tmp_path / "out", faceedit.pipeline.edit
    calls = 0

    def interrupted(source: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(source, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(faceedit.pipeline, "edit", interrupted)
        run("batch", folder, out, *SET).refused(130, "interrupted after 1 of 3")
    assert len(results(out)) == 1
    assert not list(out.rglob("*.part"))
    with (out / MANIFEST).open("a") as manifest:
        manifest.write('{"photo": "torn li')
    outcome = run("batch", folder, out, *SET)
    assert outcome.code == 0
    assert "2 edited, 1 skipped" in outcome.out
    assert results(out) == results(tmp_path / "whole")
    assert "0 edited, 3 skipped" in run("batch", folder, out, *SET).out


def test_batch_does_not_eat_its_own_results(run: Run, folder: Path) -> None:
    for expected in ((3, 0), (0, 3)):
        summary = run("batch", folder, folder / "edited", *SET, "--json").json()
        assert (summary["edited"], summary["skipped"]) == expected


def test_formats_that_cannot_be_written_become_png(run: Run, folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    with Image.open(folder / "a.png") as image:
        image.convert("RGB").save(folder / "c.bmp")
    assert run("batch", folder, tmp_path / "out", *SET).code == 0
    assert (tmp_path / "out" / "c.bmp.png").is_file()


def test_wrong_folders_are_refused(run: Run, folder: Path, photo: Path, tmp_path: Path) -> None:
    run("batch", tmp_path / "nowhere", tmp_path / "out", *SET).refused(2, "nowhere")
    run("batch", folder, folder, *SET).refused(2, "same folder")
    run("batch", folder, photo, *SET).refused(1, "OUT_DIR", "me.png")
    (tmp_path / "empty").mkdir()
    run("batch", tmp_path / "empty", tmp_path / "out", *SET).refused(1, "none")
    run("batch", folder, tmp_path / "out", "--set", "Blond=1").refused(2, "Blond_Hair")
    assert not (tmp_path / "out").exists()


def test_two_folders_do_not_overwrite_each_others_results(run: Run, folder: Path, tmp_path: Path) -> None:
    other, out = tmp_path / "other", tmp_path / "out"
    assert run("batch", folder, out, *SET).code == 0
    before = results(out)
    shutil.copytree(folder, other)
    os.utime(other / "a.png", (1, 1))  # another photo of the same name
    run("batch", other, out, *SET).refused(2, "results of one IN_DIR", str(folder), "name another OUT_DIR")
    assert results(out) == before
    folder.rename(tmp_path / "moved")
    assert "0 edited, 3 skipped" in run("batch", tmp_path / "moved", out, *SET).out


def test_a_file_that_no_batch_wrote_is_not_replaced(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a.png").write_bytes(b"mine")
    run("batch", folder, tmp_path / "out", *SET).refused(2, "OUT_DIR must hold nothing that a result would replace")
    assert (tmp_path / "out" / "a.png").read_bytes() == b"mine"


def test_a_failure_leaves_no_result_of_other_options(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run("batch", folder, tmp_path / "out", *SET, "--compare").code == 0
    outcome = run("batch", folder, tmp_path / "out", *SET, "--compare", "--face", "3")
    assert (outcome.code, results(tmp_path / "out")) == (1, {})
    assert outcome.err.count("its result of other options was removed") == 3


def test_out_dir_may_be_above_in_dir(run: Run, folder: Path) -> None:
    assert "3 edited" in run("batch", folder, folder.parent, *SET).out


def test_what_is_left_out_is_said(run: Run, folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    with Image.open(folder / "a.png") as image:
        image.convert("L").save(folder / "grey.pgm")
    (folder / "b.HEIC").write_bytes(b"x")
    (folder / "._a.png").write_bytes(b"x")
    (folder / "round").symlink_to(folder)
    outcome = run("batch", folder, tmp_path / "out", *SET, "--json")
    summary = outcome.json()
    assert (summary["photos"], summary["left_out"]) == (4, {".heic": 1})
    assert summary["links_not_followed"] == [str(folder / "round")]
    assert "1 images were left out (.heic 1)" in outcome.err


def test_a_loop_of_links_as_out_dir_is_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    run("batch", folder, tmp_path / "loop", *SET).refused(1, "OUT_DIR must be writable")


def test_an_odd_name_fails_in_one_line(run: Run, folder: Path, tmp_path: Path) -> None:
    (folder / "line\nbreak.png").write_bytes(b"no picture")
    assert len(run("batch", folder, tmp_path / "out", *SET).err.splitlines()) == 1


def test_a_photo_left_as_it_is_claims_no_edit(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import faceedit.pipeline
    from faceedit.provenance import read_provenance

    real = faceedit.pipeline.apply

    def nothing(*arguments: Any) -> Any:
        edited = real(*arguments)
        return replace(edited, after=edited.before, opacity=None)

    monkeypatch.setattr(faceedit.pipeline, "apply", nothing)
    outcome = run("batch", folder, tmp_path / "out", *SET, "--json")
    summary = outcome.json()
    assert (outcome.code, summary["edited"], summary["unchanged"]) == (0, 0, 3)
    assert read_provenance(tmp_path / "out" / "a.png") is None
    assert outcome.err.count("no pixel was changed") == 3
