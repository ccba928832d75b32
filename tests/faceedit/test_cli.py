# SPDX-License-Identifier: Apache-2.0
"""The command line end to end: what it writes, what it says, and that a failure is one line and leaves no file."""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from support.command_line import BAD_FILES, PACKAGE_ROOT, SET, Outcome, Run, read, subprocess_run
from support.drawn_faces import DrawnFace

from faceedit.atomic import replacing
from faceedit.cli import bench
from faceedit.cli.memory import keep_freed_memory
from faceedit.config import to_dict
from faceedit.kernels.benchmarking import machine
from faceedit.labels import CELEBAMASK_HQ, HELEN, convert_labels
from faceedit.networks.classifier import AttributeClassifier, AttributeClassifierConfig
from faceedit.registry import DIRECTORY_VARIABLE, METADATA_KEY, read_header, save_weights
from faceedit.training.trainer import TrainingResult

COMMANDS = (
    "edit",
    "batch",
    "parse",
    "align",
    "project",
    "sample",
    "synth",
    "train",
    "weights",
    "weights list",
    "weights show",
    "bench",
    "bench kernels",
    "bench maskfacegan",
    "doctor",
)


# Help and start-up


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command: str, run: Run) -> None:
    outcome = run(*command.split(), "--help")
    assert outcome.code == 0
    assert f"Example: faceedit {command}" in " ".join(outcome.out.split())


def test_help_and_usage_errors_do_not_import_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from faceedit.cli import main; code = main(sys.argv[1:]);"
        " print(code, 'torch' in sys.modules, 'cv2' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}
    for arguments in (["--help"], ["edit", "--help"], ["edit", "x.jpg"], ["edit", "x.jpg", "-o", "y", "--set", "Bald"]):
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert done.stdout.splitlines()[-1].endswith("False False"), arguments


@pytest.mark.parametrize("group", [(), ("weights",), ("bench",)])
def test_no_command_at_all_is_answered_with_the_help(run: Run, group: tuple[str, ...]) -> None:
    outcome = run(*group)
    assert (outcome.code, outcome.out) == (2, "")
    assert "Usage: faceedit" in outcome.err


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "20000", "THP_MEM_ALLOC_ENABLE": "1"}),
        ({"GOMP_SPINCOUNT": "7"}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active", "GOMP_SPINCOUNT": None}),
        ({"OMP_WAIT_POLICY": "passive"}, {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": None}),
        ({"THP_MEM_ALLOC_ENABLE": "0"}, {"THP_MEM_ALLOC_ENABLE": "0"}),
    ],
)
def test_the_environment_is_set_where_nothing_else_is_asked_for(
    given: dict[str, str], wanted: dict[str, str | None], monkeypatch: pytest.MonkeyPatch, run: Run
) -> None:
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "THP_MEM_ALLOC_ENABLE"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    run("--version")
    assert {name: os.environ.get(name) for name in wanted} == wanted


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="freed memory is kept with glibc's malloc only")
@pytest.mark.parametrize(
    ("given", "keeps"),
    [
        ({}, True),
        ({"MALLOC_TRIM_THRESHOLD_": "131072"}, False),
        ({"GLIBC_TUNABLES": "glibc.malloc.tcache_count=7"}, False),
    ],
)
def test_freed_memory_is_kept_where_no_allocator_is_configured(given: dict[str, str], keeps: bool) -> None:
    # A block of 64 MB is resident after it was freed, or is not.
    program = (
        "import ctypes, resource; from faceedit.cli.memory import keep_freed_memory; kept = keep_freed_memory();"
        " libc = ctypes.CDLL(None); libc.malloc.restype = ctypes.c_void_p; libc.malloc.argtypes = [ctypes.c_size_t];"
        " libc.free.argtypes = [ctypes.c_void_p]; size = 1 << 26;"
        " resident = lambda: int(open('/proc/self/statm').read().split()[1]) * resource.getpagesize();"
        " before = resident(); block = libc.malloc(size); ctypes.memset(block, 1, size); libc.free(block);"
        " print(kept, resident() - before > size // 2)"
    )
    configured = {name for name in os.environ if name.startswith("MALLOC_")} | {"LD_PRELOAD", "GLIBC_TUNABLES"}
    environment = {name: value for name, value in os.environ.items() if name not in configured}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"PYTHONPATH": str(PACKAGE_ROOT)} | given, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == [str(keeps)] * 2


def test_another_allocator_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "another.so")
    assert not keep_freed_memory()


def test_only_commands_that_make_the_same_tensors_over_and_over_keep_freed_memory(
    run: Run, photo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(sys.modules["faceedit.cli.app"], "keep_freed_memory", lambda: calls.append("kept"))
    run("bench", "kernels", "--op", "none").refused(2, "none")
    assert not calls
    run("edit", photo).refused(2, "--output")
    assert calls == ["kept"]


# edit


def test_edit_changes_the_region_only_and_reports(run: Run, photo: Path, drawn: DrawnFace, tmp_path: Path) -> None:
    out, report = tmp_path / "out.png", tmp_path / "report.json"
    outcome = run("edit", photo, "-o", out, *SET, "--compare", "--report", report, "--json")
    assert outcome.code == 0, outcome.err
    before, after = drawn.pixels, read(out)
    assert after.shape == before.shape
    changed = (before != after).any(-1)
    assert changed.any()
    hair = drawn.labels == CELEBAMASK_HQ.id("hair")
    reach = cv2.dilate(hair.astype(np.uint8), np.ones((15, 15), np.uint8)) > 0
    # Where two other colours blend at an edge, the palette parser reads hair: 2.3 % of the changed pixels here.
    assert (changed & ~reach).sum() < 0.05 * changed.sum()
    sheet = read(tmp_path / "out_compare.png")
    assert sheet.shape[1] == 3 * sheet.shape[0]
    written = json.loads(report.read_text())
    assert written["requested"] == {"Blond_Hair": 1.0}
    assert written["region"]["parts"] == ["hair"]
    assert written["region"]["changed_px"] == int(changed.sum())
    assert set(written["seconds"]) >= {"read", "find", "parse", "edit", "composite"}
    printed = outcome.json()
    assert printed["written"] == [str(out), str(tmp_path / "out_compare.png")]


def test_edit_is_silent_without_json(run: Run, photo: Path, tmp_path: Path) -> None:
    assert run("edit", photo, "-o", tmp_path / "out.png", *SET) == Outcome(0, "", "")


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_a_lossy_format_is_noted(run: Run, photo: Path, tmp_path: Path, suffix: str) -> None:
    outcome = run("edit", photo, "-o", tmp_path / f"out{suffix}", *SET)
    assert (outcome.code, outcome.out) == (0, "")
    assert outcome.err.startswith(f"note: {suffix} is lossy everywhere")


@pytest.mark.parametrize(
    ("command", "arguments", "words"),
    [
        ("edit", "{photo} -o {photo}", "--output must be a file of its own"),
        ("edit", "{photo} -o {out}/../{out.name}/o.png --report {out}/o.png", "--report must be a file of its own"),
        ("edit", "{photo} -o {out}/o.png --save-trajectory {out}/o.png -e maskfacegan", "which is --output too"),
        (
            "edit",
            "{photo} -o {out}/o.png --save-trajectory {out}/t.png --report {out}/t.csv -e maskfacegan",
            "its .csv",
        ),
        ("edit", "{out}/o_compare.png -o {out}/o.png --compare", "--compare must be a file of its own"),
        ("parse", "{photo} -o {photo}", "which is PHOTO too"),
        ("parse", "{photo} -o {out}/m.png --overlay {out}/m.png", "--overlay must be a file of its own"),
        ("align", "{photo} -o {photo}", "which is PHOTO too"),
        ("project", "{photo} -o {photo}", "which is PHOTO too"),
        ("weights", "import stylegan2 {photo} -o {photo}", "which is FILE too"),
    ],
)
def test_no_result_replaces_the_photo_or_another_result(
    run: Run, photo: Path, tmp_path: Path, command: str, arguments: str, words: str
) -> None:
    before = photo.read_bytes()
    (tmp_path / "o_compare.png").write_bytes(before)
    settings = SET if command == "edit" else ()
    run(command, *arguments.format(photo=photo, out=tmp_path).split(), *settings).refused(2, words)
    assert photo.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "o_compare.png"]


def test_names_too_long_are_one_line(run: Run, photo: Path, tmp_path: Path) -> None:
    long = "x" * 300
    for arguments in (
        ("-o", tmp_path / f"{long}.png"),
        ("-o", tmp_path / f"{'x' * 250}.png", "--compare"),
        ("-o", tmp_path / "o.png", "--report", tmp_path / long),
        ("-o", tmp_path / "o.png", "--weights", f"{long}.safetensors"),
    ):
        run("edit", photo, *arguments, *SET).refused(1, "File name too long")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_full_disk_under_stdout_is_one_line() -> None:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "faceedit", "weights", "list", "--json"],
            env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "error: No space left on device"
    assert "Traceback" not in done.stderr


def test_same_seed_same_bytes(run: Run, photo: Path, tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        assert run("edit", photo, "-o", tmp_path / name, *SET, "--seed", 7).code == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("Blonde_Hair=1", ("Blond_Hair", "did you mean")),
        ("Blond_Hair=1.5", ("between 0 and 1", "1.5")),
        ("Blond_Hair=-1", ("between 0 and 1", "-1")),
        ("Blond_Hair=nan", ("between 0 and 1", "nan")),
        ("Blond_Hair=yes", ("number", "'yes'")),
        ("Blond_Hair", ("NAME=VALUE",)),
        ("=1", ("NAME=VALUE",)),
    ],
)
def test_wrong_settings_are_usage_errors(
    run: Run, photo: Path, tmp_path: Path, setting: str, words: tuple[str]
) -> None:
    run("edit", photo, "-o", tmp_path / "out.png", f"--set={setting}").refused(2, *words)
    assert not (tmp_path / "out.png").exists()


def test_no_attribute_at_all_is_a_usage_error(run: Run, photo: Path, tmp_path: Path) -> None:
    run("edit", photo, "-o", tmp_path / "out.png").refused(2, "at least one attribute")


def test_contradictions_are_usage_errors(run: Run, photo: Path, tmp_path: Path) -> None:
    out = ("edit", photo, "-o", tmp_path / "out.png", *SET)
    run(*out, "--keep", "Blond_Hair").refused(2, "--keep: must not name what --set changes, got Blond_Hair")
    run(*out, "--size", "=1.5", "-e", "maskfacegan").refused(2, "--size: must be PART=SCALE, got '=1.5'")


def test_conflicting_attributes_are_a_usage_error(run: Run, photo: Path, tmp_path: Path) -> None:
    run("edit", photo, "-o", tmp_path / "o.png", *SET, "--set", "Black_Hair=1").refused(2, "exclude each other")


def test_click_errors_are_one_line_too(run: Run) -> None:
    run("edit").refused(2, "Missing")
    run("edit", "x.jpg", "-o", "o.png", "--face", "two").refused(2, "--face")
    run("edti").refused(2, "edti")


@pytest.mark.parametrize(
    ("option", "value", "code", "word"),
    [
        ("--editor", "magan", 2, "maggan"),
        ("--weights", "startr", 2, "starter"),
        ("--weights", "none.safetensors", 1, "none.safetensors"),
        ("--device", "gpu", 2, "cpu"),
        ("--face", "-1", 2, "0 is the largest"),
        ("--face", "5", 1, "number of faces, 1"),
        ("--seed", "99999999999999999999", 2, "--seed"),
        ("--report", "nowhere/report.json", 1, "report.json"),
        ("--report", "in/me.png/report.json", 1, "report.json"),
    ],
)
def test_wrong_options(run: Run, photo: Path, tmp_path: Path, option: str, value: str, code: int, word: str) -> None:
    if option == "--report":
        value = str(tmp_path / value)
    run("edit", photo, "-o", tmp_path / "out.png", *SET, option, value).refused(code, word)
    assert not (tmp_path / "out.png").exists()


# Bad input


@pytest.mark.parametrize("command", ["edit", "parse", "align"])
@pytest.mark.parametrize("name", [*BAD_FILES, "missing.jpg", "folder"])
def test_bad_photos_are_refused_in_one_line(run: Run, tmp_path: Path, command: str, name: str) -> None:
    bad, out = tmp_path / name, tmp_path / "out.png"
    word = name
    if name == "folder":
        bad.mkdir()
    elif name in BAD_FILES:
        make, word = BAD_FILES[name]
        make(bad)
    run(command, bad, "-o", out, *(SET if command == "edit" else ())).refused(1, word)
    assert [path.name for path in tmp_path.iterdir() if path != bad] == []


@pytest.mark.parametrize("command", ["edit", "parse", "align"])
@pytest.mark.parametrize(
    ("target", "code"), [("nowhere/out.png", 1), ("in.png", 1), ("in", 2), ("out.xyz", 2), ("pipe.png", 1)]
)
def test_unwritable_output_is_refused_in_one_line(
    run: Run, photo: Path, tmp_path: Path, command: str, target: str, code: int
) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "in.png").mkdir()
    before = sorted(tmp_path.rglob("*"))
    run(command, photo, "-o", tmp_path / target, *(SET if command == "edit" else ())).refused(code, "got")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "pipe.png").is_fifo()


@pytest.mark.parametrize("through_a_link", [False, True])
@pytest.mark.parametrize(
    "command", ["edit {photo} -o {out}/o.png --set Bald=1 --report", "bench kernels --json", "bench maskfacegan --json"]
)
def test_a_pipe_is_not_replaced_by_a_report(
    run: Run, photo: Path, tmp_path: Path, command: str, through_a_link: bool
) -> None:
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(pipe)
    target = link if through_a_link else pipe
    run(*command.format(photo=photo, out=tmp_path).split(), target).refused(1, "a device, pipe or socket", str(target))
    with pytest.raises(OSError, match="pipe"), replacing(target):  # nor by what asks nobody before
        pass
    assert pipe.is_fifo()
    assert link.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "link", "pipe"]


def test_a_full_disk_leaves_no_file(run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    for command, options in (("edit", SET), ("parse", ()), ("align", ())):
        run(command, photo, "-o", tmp_path / "out.png", *options).refused(1, "No space left")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_memory_that_torch_cannot_get_is_one_line(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*_: object, **__: object) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes.")

    monkeypatch.setattr("faceedit.pipeline.edit", starved)
    run("edit", photo, "-o", tmp_path / "out.png", *SET).refused(1, "out of memory")


def test_errors_are_one_line_in_a_real_process(tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("no picture")
    subprocess_run("edit", "text.jpg", "-o", "out.png", *SET, cwd=tmp_path).refused(1, "text.jpg")
    subprocess_run("edit", "text.jpg", "-o", "out.png", "--set", "Blond=1", cwd=tmp_path).refused(2, "Blond_Hair")
    assert [path.name for path in tmp_path.iterdir()] == ["text.jpg"]


# parse, align, synth, sample, weights, doctor


@pytest.mark.parametrize("scheme", ["celebamask-hq", "helen"])
def test_parse_writes_an_indexed_png_of_class_ids(
    run: Run, photo: Path, drawn: DrawnFace, tmp_path: Path, scheme: str
) -> None:
    out, overlay = tmp_path / "mask.png", tmp_path / "overlay.png"
    outcome = run("parse", photo, "-o", out, "--overlay", overlay, "--scheme", scheme, "--json")
    assert outcome.code == 0, outcome.err
    with Image.open(out) as mask:
        assert mask.mode == "P"
        assert mask.size == drawn.pixels.shape[1::-1]
        palette = mask.getpalette() or []
    wanted = {"celebamask-hq": CELEBAMASK_HQ, "helen": HELEN}[scheme]
    assert palette[: 3 * wanted.num_classes] == wanted.png_palette()[: 3 * wanted.num_classes]
    truth = convert_labels(drawn.labels, CELEBAMASK_HQ, wanted)
    assert (read(out) == truth).mean() > 0.97
    assert read(overlay).shape == drawn.pixels.shape
    assert outcome.json()["area_px"]["hair"] > 0


def test_align_writes_a_square_of_the_face(run: Run, photo: Path, tmp_path: Path) -> None:
    outcome = run("align", photo, "-o", tmp_path / "face.png", "--size", 96, "--json")
    assert outcome.code == 0, outcome.err
    assert read(tmp_path / "face.png").shape == (96, 96, 3)
    assert len(outcome.json()["landmarks"]) == 5
    run("align", photo, "-o", tmp_path / "big.png", "--size", 9999).refused(2, "between 16 and 4096")


def test_synth_writes_images_masks_and_a_listing(run: Run, tmp_path: Path) -> None:
    outcome = run("synth", tmp_path / "s", "--count", 3, "--size", 48, "--seed", 5, "--json")
    assert outcome.code == 0, outcome.err
    listing = json.loads((tmp_path / "s" / "portraits.json").read_text())
    assert [row["file"] for row in listing["portraits"]] == ["000000.png", "000001.png", "000002.png"]
    for row in listing["portraits"]:
        assert read(tmp_path / "s" / "images" / row["file"]).shape == (48, 48, 3)
        mask = read(tmp_path / "s" / "masks" / row["file"])
        assert mask.shape == (48, 48)
        assert CELEBAMASK_HQ.id("skin") in mask
        assert np.asarray(row["landmarks"]).shape == (5, 2)
    run("synth", tmp_path / "more", "--count", 1, "--size", 48, "--seed", 5)
    first = (tmp_path / "s" / "images" / "000000.png").read_bytes()
    assert first == (tmp_path / "more" / "images" / "000000.png").read_bytes()


def test_synth_mixes_no_two_runs(run: Run, tmp_path: Path) -> None:
    """The same pictures are written again; older ones that would stay beside new ones are a refusal."""
    for count in (2, 3):
        assert run("synth", tmp_path, "--count", count, "--size", 32).code == 0
    run("synth", tmp_path, "--count", 1, "--size", 16, "--seed", 2).refused(2, "OUT_DIR", "000001.png and 1 more")
    listing = json.loads((tmp_path / "portraits.json").read_text())
    assert (len(listing["portraits"]), listing["size_px"]) == (3, 32)
    assert read(tmp_path / "images" / "000000.png").shape == (32, 32, 3)


@pytest.mark.parametrize(("option", "value"), [("--count", 0), ("--size", 8), ("--seed", -1)])
def test_synth_refuses_numbers_out_of_range(run: Run, tmp_path: Path, option: str, value: int) -> None:
    run("synth", tmp_path / "s", option, value).refused(2, option)
    assert not (tmp_path / "s").exists()


def test_weights_show_refuses_what_is_no_network(run: Run, weights_dir: Path, tmp_path: Path) -> None:
    path = tmp_path / "hostile.safetensors"
    header = json.dumps(to_dict(read_header(weights_dir / "p.safetensors")) | {"metrics": {"x": 10**400}})
    for text in ("[" * 100_000, header, header.replace("256", "-4").replace(str(10**400), "1")):
        save_file({"a": np.zeros(1, np.float32)}, path, metadata={METADATA_KEY: text})
        run("weights", "show", path).refused(1, "hostile.safetensors")


def test_weights_list_and_show(run: Run) -> None:
    listed = run("weights", "list", "--json").json()
    assert {"maggan-starter", "parser-starter"} <= {row["name"] for row in listed}
    assert "maggan-starter" in run("weights", "list").out
    shown = run("weights", "show", "maggan-starter", "--json").json()
    assert shown["kind"] == "maggan"
    assert shown["licence"] == "Apache-2.0"
    text = run("weights", "show", "maggan-starter").out
    assert "training_data" in text
    assert not re.search(r"^\w+: *$", text, re.MULTILINE), "a field without a value is left out"
    run("weights", "show", "magan-starter").refused(2, "maggan-starter")


def test_a_missing_file_is_listed_as_unusable_among_the_others(
    run: Run, weights_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in weights_dir.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "m.safetensors").unlink()
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    outcome = run("weights", "list")
    assert outcome.code == 0, outcome.err
    assert re.search(r"maggan-starter +UNUSABLE: read_header: .*m\.safetensors", outcome.out)
    assert re.search(r"parser-starter +parser .*Apache-2\.0", outcome.out)
    rows = {row["name"]: row for row in run("weights", "list", "--json").json()}
    assert "m.safetensors" in rows["maggan-starter"]["problem"]
    assert (rows["parser-starter"]["kind"], rows["parser-starter"]["problem"]) == ("parser", "")


def test_documents_hold_null_for_numbers_that_json_lacks(run: Run, tmp_path: Path) -> None:
    config = AttributeClassifierConfig(("Smiling",), size_px=16, base_width=2, stages=2, hidden_width=4)
    network, path = AttributeClassifier(config), tmp_path / "c.safetensors"
    facts = {"licence": "MIT", "training_data": "none", "source": "tests", "metrics": {"accuracy": float("nan")}}
    save_weights(path, "attribute-classifier", config, network.state_dict(), **facts)
    outcome = run("weights", "show", path, "--json")
    assert json.loads(outcome.out, parse_constant=pytest.fail)["metrics"] == {"accuracy": None}


def test_train_dry_run_prints_the_recipe(run: Run, tmp_path: Path) -> None:
    outcome = run("train", "maggan-starter", "trainer.steps=7", "--dry-run")
    assert outcome.code == 0, outcome.err
    assert "steps: 7" in outcome.out
    run("train", "magan-starter", "--dry-run").refused(2, "maggan-starter")
    run("train", "maggan-starter", "trainer.stesp=7", "--dry-run").refused(2, "steps")


def test_an_interrupted_training_ends_with_130(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rank in (0, 1):  # one that prints the result, and one of another device
        result = TrainingResult("interrupted", 3, 0.1, tmp_path, tmp_path / "x.pt", None, {}, rank)
        monkeypatch.setattr("faceedit.training.run", lambda *_, result=result, **__: result)
        outcome = run("train", "maggan-starter", "--json")
        assert (outcome.code, outcome.err) == (130, "")
        assert (outcome.json()["reason"] == "interrupted") if rank == 0 else outcome.out == ""


@pytest.fixture
def heeds_sigint() -> Iterator[None]:
    """Also where these tests run in the background of a script, whose commands ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_sigint")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_commands_end_with_130_and_one_line(
    run: Run, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    for name in ("images.check_writable", "registry.list_weights"):
        with monkeypatch.context() as patch:
            patch.setattr(f"faceedit.{name}", lambda *_: signal.raise_signal(number))
            command = ("weights", "list") if "weights" in name else ("sample", "-o", tmp_path / "out.png")
            run(*command).refused(130, "error: interrupted\n")
    monkeypatch.setattr("faceedit.cli.batch._edit_one", lambda *_: signal.raise_signal(number))
    run("batch", photo.parent, tmp_path / "out", *SET).refused(130, "interrupted after 0 of 1 photos")


# bench


def test_bench_compares_every_provider_and_says_what_is_missing(run: Run) -> None:
    outcome = run("bench", "kernels", "--check", "--device", "cpu", "--op", "masked_mse", "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    rows = [line.split() for line in outcome.out.splitlines() if line.startswith("masked_mse ")]
    assert {row[3] for row in rows} == {"forward", "forward+backward"}
    assert all("agrees" in row for row in rows)
    assert "no triton: " in outcome.out


@pytest.mark.parametrize("check", [("--check",), ()])
def test_bench_refuses_providers_that_cannot_run(run: Run, check: tuple[str, ...]) -> None:
    named = ("bench", "kernels", *check, "--op", "masked_mse", "--device", "cpu", "--provider", "cuda")
    run(*named).refused(1, "--provider", "cuda")
    run(*named, "--provider", "triton").refused(1, "cuda (", "triton (")


def test_bench_checks_the_layers_that_were_named(run: Run) -> None:
    outcome = run(
        "bench", "kernels", "--check", "--op", "bernoulli_kl", "--op", "gaussian_kl", "--layer", "1x40",
        "--dtype", "float32", "--provider", "eager", "--device", "cpu",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    rows = [line.split() for line in outcome.out.splitlines() if "agrees to" in line]
    assert {tuple(row[:2]) for row in rows} == {("bernoulli_kl", "1x40")}


def test_bench_refuses_unknown_names_and_files_it_could_not_write(run: Run, tmp_path: Path) -> None:
    run("bench", "kernels", "--check", "--op", "masked_msee").refused(2, "--op", "did you mean masked_mse")
    run("bench", "kernels", "--check", "--json", str(tmp_path / "no" / "file")).refused(1, "writable folder")


def test_bench_writes_its_file_after_every_layer(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[dict] = []
    write_text = bench.write_text

    def watched(path: Path, text: str) -> None:
        write_text(path, text)
        written.append(json.loads(path.read_text()))

    monkeypatch.setattr(bench, "write_text", watched)
    rates = machine.measure_rates("cpu", [torch.float32, torch.bfloat16], small=True)
    monkeypatch.setattr(machine, "measure_rates", lambda *_, **__: rates)
    outcome = run(
        "bench", "kernels", "--op", "bernoulli_kl", "--layer", "1x40", "--provider", "eager", "--provider", "cpp",
        "--rounds", 1, "--seconds", 0, "--device", "cpu", "--json", tmp_path / "rows.json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    assert [document["complete"] for document in written] == [False, False, True]  # a layer in two dtypes, then the end
    assert 0 < len(written[0]["rows"]) < len(written[1]["rows"]) == len(written[2]["rows"])
    assert {line["dtype"] for line in written[0]["summary"]} == {"float32"}
    assert {line["dtype"] for line in written[2]["summary"]} == {"float32", "bfloat16"}
    assert written[2]["settings"]["seconds"] == 0
