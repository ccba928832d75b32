# SPDX-License-Identifier: Apache-2.0
"""Training on two devices, both of them this CPU: two processes equal one that is given what both are given."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from support.command_line import subprocess_run
from support.ddp_ranks import (
    RANKS,
    STEPS,
    JoinedStyleGAN2Task,
    JoinedToyTask,
    fail_on_rank_1,
    run_pair,
    stylegan2_steps,
    train_alone,
    train_together,
)

from faceedit import training
from faceedit.registry import load_network
from faceedit.training import trainer
from faceedit.training.task import TASKS
from faceedit.training.trainer import _end_others

TOY = f"""task: toy
trainer: {{steps: {STEPS}, accelerator: cpu, devices: {RANKS}, cpu_threads: 1, log_every: 2, checkpoint_every: 0}}
"""
STYLEGAN2 = f"""task: stylegan2
trainer: {{steps: {STEPS}, accelerator: cpu, devices: {RANKS}, cpu_threads: 1, log_every: 2, checkpoint_every: 0}}
generator: {{size_px: 8, channel_base: 64, channel_max: 8, z_width: 8, w_width: 8, mapping_layers: 2}}
critic: {{size_px: 8, channel_base: 64, channel_max: 8, group_size: 2}}
images: {{size_px: 8, people: 64, cache_dir: CACHE}}
batch_size: 4
r1: {{gamma: 3.0, every: 2}}
path_length: {{weight: 2.0, every: 3, batch_share: 0.5}}
augmentation: {{start: 0.5, every: 3, kimg: 0.1}}
fid: {{images: 16, network: attribute-classifier-starter}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    (folder / "toy.yaml").write_text(TOY)
    (folder / "stylegan2.yaml").write_text(STYLEGAN2.replace("CACHE", str(folder / "cache")))
    return folder


@pytest.fixture(scope="module")
def pair(folder: Path) -> list[dict[str, Any]]:
    """What `train_together` kept on either rank."""
    assert run_pair(train_together, folder) == [0] * RANKS
    return [torch.load(folder / f"rank_{rank}.pt", weights_only=True) for rank in range(RANKS)]


def leaves(state: Any, name: str = "") -> dict[str, Any]:
    """Every tensor and value of nested dictionaries, lists and tuples, by its path."""
    if not isinstance(state, dict | list | tuple):
        return {name: state}
    pairs = state.items() if isinstance(state, dict) else enumerate(state)
    return {key: leaf for part, value in pairs for key, leaf in leaves(value, f"{name}.{part}").items()}


def assert_same_bits(one: Any, other: Any) -> None:
    found, expected = leaves(one), leaves(other)
    assert found.keys() == expected.keys()
    for name, value in found.items():
        same = torch.equal(value, expected[name]) if isinstance(value, torch.Tensor) else value == expected[name]
        assert same, name


@pytest.mark.parametrize("run", ["whole", "resumed", "plain", "interrupted", "stylegan2"])
def test_ranks_agree_bit_for_bit(pair: list[dict[str, Any]], run: str) -> None:
    """Weights, optimisers with their rates, averages with batch norm's statistics, and augmentation."""
    assert len(leaves(pair[0][run]["state"])) > 20
    assert_same_bits(pair[0][run]["state"], pair[1][run]["state"])


def test_ranks_see_different_data(pair: list[dict[str, Any]]) -> None:
    given = [rank["whole"]["given"] for rank in pair]
    assert given[0].keys() == given[1].keys() == set(range(STEPS))
    assert all((given[0][step] != given[1][step]).float().mean() > 0.9 for step in range(STEPS))
    assert not torch.equal(*(rank["stylegan2"]["image"] for rank in pair))


def test_two_processes_equal_one_with_both_batches(pair: list[dict[str, Any]], folder: Path) -> None:
    TASKS["toy"] = "support.ddp_ranks:JoinedToyTask"
    one_device = ["is_plain=true", "trainer.devices=1"]
    try:
        alone = train_alone(JoinedToyTask, folder / "toy.yaml", folder / "alone", *one_device)
    finally:
        del TASKS["toy"]
    assert_close(pair[0]["plain"]["state"], alone, atol=2e-6)


def test_stylegan2_on_two_processes_equals_one_with_both_batches(pair: list[dict[str, Any]], folder: Path) -> None:
    """With R1, path lengths and augmentation, whose probability and mean length are of all images."""
    recipe = training.resolve(folder / "stylegan2.yaml", ["trainer.devices=1", "batch_size=8"])
    alone = stylegan2_steps(JoinedStyleGAN2Task, recipe)
    for seen, expected in zip(pair[0]["stylegan2"]["scalars"], alone["scalars"], strict=True):
        assert seen == pytest.approx(expected, rel=1e-3, abs=1e-5)
    assert {"r1", "path_penalty", "sign_real"} <= {name for scalars in alone["scalars"] for name in scalars}
    assert_close(pair[0]["stylegan2"]["state"], alone["state"], atol=2e-5)


def assert_close(state: dict[str, Any], expected: dict[str, Any], atol: float) -> None:
    """Networks and averages; float32 sums in another order, through Adam."""
    for kind in ("networks", "averages"):
        found, wanted = leaves(state[kind]), leaves(expected[kind])
        assert found.keys() == wanted.keys()
        for name, value in found.items():
            torch.testing.assert_close(value, wanted[name], atol=atol, rtol=1e-4, msg=lambda text, at=name: at + text)


def test_resumed_run_equals_the_uninterrupted_one(pair: list[dict[str, Any]]) -> None:
    for rank in pair:
        assert_same_bits(rank["resumed"]["state"], rank["whole"]["state"])


def test_rank_0_decides_when_to_stop(pair: list[dict[str, Any]]) -> None:
    results = [rank["interrupted"]["result"] for rank in pair]
    assert results[0][:2] == ("interrupted", 4)  # by a signal that only rank 0 received
    assert results[1] == (*results[0][:4], 1)


def test_one_rank_without_a_finite_loss_stops_all(pair: list[dict[str, Any]]) -> None:
    assert "fit must be finite, got nan or inf by step 3" in pair[0]["diverged"]
    assert pair[0]["diverged"] == pair[1]["diverged"]  # names rank 0's folder


def test_what_one_rank_alone_has_is_looked_for_before_rank_0_saves(pair: list[dict[str, Any]], folder: Path) -> None:
    """Between two logged steps: a loss, and weights."""
    for run, what in (("unlogged", "fit"), ("poisoned", "weights of generator")):
        assert f"train: {what} must be finite, got nan or inf by step 2" in pair[0][run]
        assert pair[0][run] == pair[1][run]
        assert not list((folder / f"{run}-0").glob("checkpoints/*.pt"))


def test_one_set_of_files_is_written(pair: list[dict[str, Any]], folder: Path) -> None:
    assert sorted(path.name for path in folder.glob("whole-*")) == ["whole-0"]
    run = folder / "whole-0"
    names = {"recipe.yaml", "environment.json", "metrics.jsonl", "tensorboard", "samples", "checkpoints"}
    assert {path.name for path in run.iterdir()} == names | {"weights.safetensors", "summary.json", "run.lock"}
    assert len(list((run / "tensorboard").iterdir())) == 1
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["split"]) for line in lines] == [(2, "train"), (4, "train"), (4, "validation")]
    assert pair[0]["whole"]["result"] == ("finished", STEPS, "whole-0", {"error": lines[2]["error"]}, 0)
    assert pair[1]["whole"]["result"] == (*pair[0]["whole"]["result"][:4], 1)
    assert pair[0]["lines"]
    assert pair[1]["lines"] == []


def test_one_rank_builds_the_cache(pair: list[dict[str, Any]]) -> None:
    """Both asked for it at once."""
    assert sorted(len(rank["stylegan2"]["lines"]) for rank in pair)[0] == 0
    assert sum(line.endswith("64 of 64") for rank in pair for line in rank["stylegan2"]["lines"]) == 1


def test_a_rank_that_fails_does_not_leave_the_other_waiting(folder: Path) -> None:
    assert run_pair(fail_on_rank_1, folder) == [1, 1]
    assert (folder / "failure_1.txt").read_text() == "ValueError"
    assert (folder / "failure_0.txt").read_text() == "RuntimeError"  # the connection was lost


@pytest.mark.parametrize(("failed_here", "code"), [(True, None), (False, 3)])
def test_processes_of_other_devices_end_with_rank_0(failed_here: bool, code: int | None) -> None:
    program = "input()" if failed_here else "raise SystemExit(3)"
    other = subprocess.Popen([sys.executable, "-S", "-c", program], stdin=subprocess.PIPE)
    watched = [other]
    fabric = SimpleNamespace(strategy=SimpleNamespace(launcher=SimpleNamespace(procs=watched)))
    assert _end_others(fabric, failed_here=failed_here) == code
    assert other.poll() is not None
    assert watched == []  # by Fabric, which would kill this process


def test_processes_of_an_interrupted_run_end_as_they_like(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fabric would kill this process because the others end with 130."""
    fabric = Fabric(accelerator="cpu", devices=1)
    watched = [object()]
    fabric.strategy._launcher = SimpleNamespace(procs=watched, launch=lambda function, *given: function(*given))
    monkeypatch.setattr(trainer, "make_fabric", lambda config: fabric)

    def interrupt(line: str) -> None:
        if line.startswith("step 4 train"):
            os.kill(os.getpid(), signal.SIGINT)

    result = training.run(toy_recipe, output_dir=tmp_path / "run", report=interrupt)
    assert result is not None
    assert (result.reason, watched) == ("interrupted", [])


def test_command_line_trains_stylegan2_on_two_devices(folder: Path) -> None:
    outcome = subprocess_run(
        "train", "stylegan2.yaml", "-o", "run", "--json", "trainer.steps=2", cwd=folder, timeout_s=600
    )
    assert outcome.code == 0, outcome.err
    result = outcome.json()
    assert (result["reason"], result["step"], result["rank"]) == ("finished", 2, 0)
    assert sum(line.startswith("step 2 train") for line in outcome.err.splitlines()) == 1
    network: Any = load_network(folder / "run" / "weights.safetensors")
    assert network.header.metrics == pytest.approx(result["metrics"])
