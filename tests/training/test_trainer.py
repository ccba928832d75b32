# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from lightning.fabric import Fabric
from lightning.fabric.plugins import MixedPrecision
from PIL import Image
from safetensors.torch import load_file
from support.toy_task import ToyTask
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from faceedit import training
from faceedit.errors import DeviceError, UsageError, WeightsError
from faceedit.training import trainer
from faceedit.training.checkpoint import find_checkpoint, list_checkpoints, load_checkpoint, save_checkpoint
from faceedit.training.task import TrainingContext, TrainingDivergedError


def quiet(line: str) -> None:
    """A report that keeps test output readable."""


def assert_same(one: Any, other: Any) -> None:
    """Equality of nested checkpoints, tensors bit for bit."""
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    else:
        assert one == other


def test_batches_made_ahead_are_the_same(toy_recipe: Path, tmp_path: Path) -> None:
    ends = []
    for workers in (0, 2):
        changes = [f"trainer.workers={workers}", "trainer.log_every=1"]
        result = training.run(toy_recipe, changes, output_dir=tmp_path / str(workers), report=quiet)
        assert result is not None
        ends.append(load_checkpoint(result.checkpoint)["context"])
    assert_same(*ends)


def test_a_worker_says_what_was_wrong(toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: ToyTask, step: int) -> dict[str, torch.Tensor]:
        raise UsageError(f"no data for step {step}")

    monkeypatch.setattr(ToyTask, "batch", fail)
    with pytest.raises(UsageError, match="no data for step 0"):
        training.run(toy_recipe, ["trainer.workers=1"], output_dir=tmp_path / "run", report=quiet)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resume_equals_the_uninterrupted_run(toy_recipe: Path, tmp_path: Path, precision: str) -> None:
    common = [f"trainer.precision={precision}", "trainer.channels_last=true", "trainer.log_every=1"]
    whole = training.run(toy_recipe, common, output_dir=tmp_path / "whole", report=quiet)
    # The learning rate depends on the planned steps, so the first part is the same plan, cut by its checkpoint.
    every = [*common, "trainer.checkpoint_every=5", "trainer.keep_checkpoints=5"]
    first = training.run(toy_recipe, every, output_dir=tmp_path / "parts", report=quiet)
    assert whole is not None
    assert first is not None
    middle = tmp_path / "parts" / "checkpoints" / "step_00000005.pt"
    resumed = training.run(toy_recipe, common, output_dir=tmp_path / "resumed", resume=middle, report=quiet)
    assert resumed is not None
    assert (resumed.step, resumed.reason) == (12, "finished")
    assert_same(load_checkpoint(resumed.checkpoint)["context"], load_checkpoint(whole.checkpoint)["context"])
    assert resumed.metrics == whole.metrics


class Scaled(MixedPrecision):
    """16-mixed's loss scaling without its fp16, which not every CPU has; three steps without overflow double it."""

    def __init__(self, scale: float = 2.0**10) -> None:
        super().__init__("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3))
        self._desired_input_dtype = torch.float32

    def forward_context(self) -> AbstractContextManager[None]:
        return nullcontext()


def test_a_resumed_run_goes_on_with_the_loss_scale(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trainer, "make_fabric", lambda config: Fabric(accelerator="cpu", devices=1, plugins=Scaled()))
    every = ["trainer.checkpoint_every=5", "trainer.keep_checkpoints=5"]
    whole = training.run(toy_recipe, every, output_dir=tmp_path / "whole", report=quiet)
    middle = tmp_path / "whole" / "checkpoints" / "step_00000005.pt"
    resumed = training.run(toy_recipe, output_dir=tmp_path / "resumed", resume=middle, report=quiet)
    assert whole is not None
    assert resumed is not None
    # Two optimisers: ten steps until the checkpoint, one of them since the scale was last doubled.
    stored = load_checkpoint(middle)["context"]["precision"]
    assert (stored["scale"], stored["_growth_tracker"]) == (2.0**13, 1)
    state = load_checkpoint(whole.checkpoint)["context"]
    assert state["precision"]["scale"] == 2.0**18
    assert_same(load_checkpoint(resumed.checkpoint)["context"], state)


def test_a_checkpoint_without_a_loss_scale_starts_one(toy_recipe: Path, tmp_path: Path) -> None:
    state = training_context(toy_recipe, Scaled(2.0**20)).state_dict()
    assert state["precision"]["scale"] == 2.0**20
    other = training_context(toy_recipe, Scaled())
    other.load_state_dict({key: value for key, value in state.items() if key != "precision"})
    assert other.state_dict()["precision"]["scale"] == 2.0**10
    other.load_state_dict(state)
    assert other.state_dict()["precision"]["scale"] == 2.0**20
    plain = training_context(toy_recipe, None)  # resumed in another precision: the scale has no use
    plain.load_state_dict(state)
    assert plain.state_dict()["precision"] == {}


def test_a_step_that_overflows_is_left_out_and_lowers_the_scale(toy_recipe: Path) -> None:
    context = training_context(toy_recipe, Scaled(2.0**100))
    weight = next(context.networks["critic"].parameters())
    before = weight.detach().clone()
    for factor, scale in ((2.0**60, 2.0**99), (1.0, 2.0**99)):
        context.minimise("critic", factor * weight.square().sum(), clip_norm=1.0)
        assert context.state_dict()["precision"]["scale"] == scale
        assert torch.equal(weight, before) == (factor > 1)
    plain = training_context(toy_recipe, None)
    weight = next(plain.networks["critic"].parameters())
    with pytest.raises(TrainingDivergedError, match="gradients of critic must be finite, got a norm of nan or inf"):
        plain.minimise("critic", weight.sum() / 0, clip_norm=1.0)


def training_context(recipe: Path, plugin: MixedPrecision | None) -> TrainingContext:
    """The context of the toy task before its first step."""
    resolved: Any = training.resolve(recipe)
    fabric = Fabric(accelerator="cpu", devices=1, plugins=plugin)
    return ToyTask(resolved, TrainingContext(fabric, resolved.trainer)).context


def test_seed_decides_the_result(toy_recipe: Path, tmp_path: Path) -> None:
    results = [
        training.run(toy_recipe, [f"trainer.seed={seed}"], output_dir=tmp_path / name, report=quiet)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    errors = [result.metrics["error"] for result in results if result is not None]
    assert errors[0] == errors[1] != errors[2]


def test_run_directory_holds_the_run(toy_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = training.run(toy_recipe, ["trainer.seed=7", "trainer.sample_every=5"], output_dir=run, report=quiet)
    assert result is not None
    assert training.resolve(run / "recipe.yaml") == training.resolve(
        toy_recipe, ["trainer.seed=7", "trainer.sample_every=5"]
    )
    environment = json.loads((run / "environment.json").read_text())
    assert environment["seed"] == 7
    assert environment["packages"]["torch"] == torch.__version__
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "train"] == [4, 8, 12]
    assert {"fit", "critic", "steps_per_s", "minutes"} <= lines[0].keys()
    assert [path.name for path in sorted((run / "samples").iterdir())] == [
        "step_00000005.png",
        "step_00000010.png",
        "step_00000012.png",
    ]
    assert Image.open(run / "samples" / "step_00000012.png").size == (2 * 10, 2 * 10)
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))
    assert result.weights is not None
    average = load_checkpoint(result.checkpoint)["context"]["averages"]["generator"]["weights"]
    assert_same(load_file(result.weights), dict(sorted(average.items())))
    assert not list(run.rglob("*.part*"))


def test_training_lowers_the_loss(toy_recipe: Path, tmp_path: Path) -> None:
    overrides = ["trainer.steps=150", "trainer.log_every=10", "trainer.ema_decay=0.9"]
    training.run(toy_recipe, overrides, output_dir=tmp_path / "run", report=quiet)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    fits = [line["fit"] for line in lines if line["split"] == "train"]
    assert fits[-1] < 0.5 * fits[0]


def test_time_limit_ends_with_checkpoint_and_weights(toy_recipe: Path, tmp_path: Path) -> None:
    overrides = ["trainer.max_minutes=0.000001", "trainer.steps=100000"]
    result = training.run(toy_recipe, overrides, output_dir=tmp_path / "run", report=quiet)
    assert result is not None
    assert result.reason == "time limit"
    assert result.step < 100
    assert result.checkpoint.is_file()
    assert result.weights is not None
    assert result.weights.is_file()


def test_interrupt_saves_and_can_be_resumed(toy_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sent = []

    def interrupt(line: str) -> None:
        if line.startswith("step 4 train") and not sent:
            sent.append(line)
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    result = training.run(toy_recipe, output_dir=run, report=interrupt)
    assert result is not None
    assert (result.reason, result.step, result.weights) == ("interrupted", 4, None)
    assert signal.getsignal(signal.SIGINT) is handler
    resumed = training.run(toy_recipe, resume=run, report=quiet)
    assert resumed is not None
    assert (resumed.reason, resumed.step, resumed.directory) == ("finished", 12, run)
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == [4, 8, 12, 12]


def test_non_finite_loss_is_refused(toy_recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match=r"fit must be finite"):
        training.run(toy_recipe, ["explode_at=6"], output_dir=tmp_path / "run", report=quiet)


def test_used_directory_is_refused(toy_recipe: Path, tmp_path: Path) -> None:
    training.run(toy_recipe, output_dir=tmp_path / "run", report=quiet)
    with pytest.raises(UsageError, match="output_dir must hold no earlier run"):
        training.run(toy_recipe, output_dir=tmp_path / "run", report=quiet)


def test_another_runs_directory_is_refused_for_resuming_too(toy_recipe: Path, tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for run in (one, other):
        training.run(toy_recipe, output_dir=run, report=quiet)
    before = {path: path.read_bytes() for path in other.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match=r"output_dir must hold no earlier run, got .*other; .* is not of it"):
        training.run(toy_recipe, ["trainer.steps=16"], resume=one, output_dir=other, report=quiet)
    assert {path: path.read_bytes() for path in other.rglob("*") if path.is_file()} == before
    # A checkpoint by itself has no run to go on in.
    alone = tmp_path / "downloads" / "x.pt"
    alone.parent.mkdir()
    shutil.copy(list_checkpoints(one / "checkpoints")[-1], alone)
    with pytest.raises(UsageError, match="resume must lie in the checkpoints of a run"):
        training.run(toy_recipe, ["trainer.steps=16"], resume=alone, report=quiet)
    moved = training.run(toy_recipe, ["trainer.steps=16"], resume=alone, output_dir=tmp_path / "new", report=quiet)
    assert moved is not None
    assert (moved.step, moved.directory) == (16, tmp_path / "new")


def test_going_back_sets_later_checkpoints_aside(toy_recipe: Path, tmp_path: Path) -> None:
    run, often = tmp_path / "run", ["trainer.checkpoint_every=4", "trainer.keep_checkpoints=3"]
    training.run(toy_recipe, often, output_dir=run, report=quiet)
    earlier = run / "checkpoints" / "step_00000004.pt"
    resumed = training.run(toy_recipe, [*often, "trainer.steps=7"], resume=earlier, report=quiet)
    assert resumed is not None
    assert resumed.checkpoint.is_file()
    assert resumed.directory.resolve() == run.resolve()
    assert [path.name for path in list_checkpoints(run / "checkpoints")] == ["step_00000004.pt", "step_00000007.pt"]
    aside = run / "checkpoints" / "abandoned"
    assert [path.name for path in list_checkpoints(aside)] == ["step_00000008.pt", "step_00000012.pt"]
    assert find_checkpoint(run) == find_checkpoint(run / "checkpoints") == resumed.checkpoint


def test_going_back_sets_what_the_abandoned_run_ended_with_aside(toy_recipe: Path, tmp_path: Path) -> None:
    run, often = (
        tmp_path / "run",
        ["trainer.checkpoint_every=4", "trainer.sample_every=4", "trainer.keep_checkpoints=3"],
    )
    training.run(toy_recipe, often, output_dir=run, report=quiet)
    ends = ["weights.safetensors", "summary.json"]
    before = {name: (run / name).read_bytes() for name in ends}
    training.run(toy_recipe, often, resume=run, report=quiet)  # at its end: nothing is abandoned
    assert not (run / "abandoned").exists()

    def interrupt(line: str) -> None:
        if line.startswith("step 5 train"):
            os.kill(os.getpid(), signal.SIGINT)

    earlier = run / "checkpoints" / "step_00000004.pt"
    training.run(toy_recipe, [*often, "trainer.log_every=1"], resume=earlier, report=interrupt)
    assert {name: (run / "abandoned" / name).read_bytes() for name in ends} == before
    assert not (run / "weights.safetensors").exists()
    assert json.loads((run / "summary.json").read_text())["step"] == 5
    assert [path.name for path in sorted((run / "samples").glob("*.png"))] == ["step_00000004.png"]
    aside = sorted((run / "samples" / "abandoned").iterdir())
    assert [path.name for path in aside] == ["step_00000008.png", "step_00000012.png"]


def test_a_run_that_goes_on_keeps_others_out(toy_recipe: Path, tmp_path: Path) -> None:
    """Before it logs anything, and from its own checkpoint; once it has ended, however, it can be resumed."""
    run, said = tmp_path / "run", []

    def join(line: str) -> None:
        if not said and (run / "checkpoints").exists():
            for resume in (None, run):
                with pytest.raises(UsageError, match="output_dir must ") as refusal:
                    training.run(toy_recipe, output_dir=run, resume=resume, report=quiet)
                said.append(str(refusal.value))

    training.run(toy_recipe, ["trainer.checkpoint_every=2", "trainer.log_every=3"], output_dir=run, report=join)
    assert "must hold no earlier run" in said[0]
    assert "must be of no run that is going on" in said[1]
    with FileLock(run / "run.lock"), pytest.raises(UsageError, match="must be of no run that is going on"):
        training.run(toy_recipe, resume=run, report=quiet)
    resumed = training.run(toy_recipe, ["trainer.steps=16"], resume=run, report=quiet)
    assert resumed is not None
    assert resumed.step == 16


def test_a_run_that_was_made_while_caches_were_built_is_not_joined(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_another(recipe: Any, *, report: Any) -> None:
        monkeypatch.setattr(ToyTask, "prepare", lambda recipe, *, report: None)
        training.run(toy_recipe, output_dir=tmp_path / "run", report=quiet)

    monkeypatch.setattr(ToyTask, "prepare", run_another)
    with pytest.raises(UsageError, match="output_dir must hold no earlier run"):
        training.run(toy_recipe, output_dir=tmp_path / "run", report=quiet)


def test_two_runs_of_one_second_have_two_folders(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training.time, "strftime", lambda form: "now")
    made = [training.run(toy_recipe, ["trainer.steps=1"], report=quiet) for _ in range(3)]
    assert [str(one.directory) for one in made if one] == ["runs/toy-now", "runs/toy-now-2", "runs/toy-now-3"]


def test_another_recipe_is_said_when_resuming(toy_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training.run(toy_recipe, output_dir=run, report=quiet)
    lines: list[str] = []
    more = ["trainer.steps=16", "trainer.log_every=1", "adam.rate=0.5", "trainer.seed=9"]
    training.run(toy_recipe, more, resume=run, report=lines.append)
    said = [line for line in lines if "another recipe" in line]
    seed = training.resolve(toy_recipe).trainer.seed
    assert said == [
        f"resumed with another recipe: trainer.seed: {seed} -> 9",
        "resumed with another recipe: adam.rate: 0.01 -> 0.5",
    ]


def test_what_diverged_takes_no_checkpoints_place(toy_recipe: Path, tmp_path: Path) -> None:
    """Between two logged steps, and when the time is up."""
    often = ["trainer.checkpoint_every=2", "trainer.log_every=100", "explode_at=5"]
    with pytest.raises(TrainingDivergedError, match=r"fit must be finite, got nan or inf by step 6; .*checkpoints"):
        training.run(toy_recipe, often, output_dir=tmp_path / "run", report=quiet)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == [2, 4]
    timed = ["trainer.max_minutes=0.005", "trainer.steps=100000", "trainer.log_every=0", "explode_at=0"]
    timed += ["trainer.checkpoint_every=0"]
    with pytest.raises(TrainingDivergedError, match="fit must be finite"):
        training.run(toy_recipe, timed, output_dir=tmp_path / "timed", report=quiet)
    assert not (tmp_path / "timed" / "weights.safetensors").exists()


def test_weights_that_diverged_under_a_finite_loss_are_not_saved(toy_recipe: Path, tmp_path: Path) -> None:
    """Where the loss is computed, the weights are those before the step."""
    steep = ["is_clipped=false", "steep_at=3", "trainer.steps=4", "trainer.log_every=100"]
    with pytest.raises(TrainingDivergedError, match=r"weights of generator must be finite, got nan or inf by step 4"):
        training.run(toy_recipe, [*steep, "trainer.checkpoint_every=2"], output_dir=tmp_path / "a", report=quiet)
    assert [load_checkpoint(path)["step"] for path in list_checkpoints(tmp_path / "a" / "checkpoints")] == [2]
    with pytest.raises(TrainingDivergedError, match="weights of generator must be finite"):
        training.run(toy_recipe, steep, output_dir=tmp_path / "b", report=quiet)
    assert not (tmp_path / "b" / "weights.safetensors").exists()
    context = training_context(toy_recipe, None)
    assert context.not_finite([]) == []
    next(context.averages["generator"].module.buffers()).fill_(float("inf"))
    assert context.not_finite(["fit"]) == ["fit", "averaged weights of generator"]


def test_a_resumed_run_has_its_recipes_adam(toy_recipe: Path, tmp_path: Path) -> None:
    training.run(toy_recipe, ["trainer.steps=6"], output_dir=tmp_path / "run", report=quiet)
    changed = ["adam.beta1=0.9", "adam.beta2=0.99", "adam.weight_decay=0.1"]
    resumed = training.run(toy_recipe, changed, resume=tmp_path / "run", report=quiet)
    assert resumed is not None
    for optimizer in load_checkpoint(resumed.checkpoint)["context"]["optimizers"].values():
        (group,) = optimizer["param_groups"]
        assert (group["betas"], group["weight_decay"]) == ((0.9, 0.99), 0.1)


def test_a_metrics_line_torn_by_a_crash_does_not_keep_a_run_from_resuming(toy_recipe: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    training.run(toy_recipe, output_dir=run, report=quiet)
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"step": 1')
    resumed = training.run(toy_recipe, ["trainer.steps=16"], resume=run, report=quiet)
    assert resumed is not None
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()][-1] == 16


def test_tensorboard_keeps_the_step_that_a_run_is_resumed_from(toy_recipe: Path, tmp_path: Path) -> None:
    """And each step once, when a run is resumed at its end too."""
    run, often = tmp_path / "run", ["trainer.checkpoint_every=4", "trainer.validate_every=4"]
    training.run(toy_recipe, [*often, "trainer.steps=8"], output_dir=run, report=quiet)
    for _ in range(2):
        training.run(toy_recipe, often, resume=run, report=quiet)
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    for name in ("train/fit", "validation/error"):
        assert [event.step for event in board.Scalars(name)] == [4, 8, 12], name
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [4, 4, 8, 8, 12, 12]


def test_absent_devices_and_unusable_folders_are_typed_errors(
    toy_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[Any] = []
    monkeypatch.setattr(ToyTask, "prepare", lambda recipe, *, report: prepared.append(recipe))
    with pytest.raises(DeviceError, match="accelerator=auto"):
        training.run(toy_recipe, ["trainer.accelerator=abacus"], output_dir=tmp_path / "run", report=quiet)
    with pytest.raises(DeviceError, match="must exist here, got cuda x 1000"):
        training.run(
            toy_recipe, ["trainer.accelerator=cuda", "trainer.devices=1000"], output_dir=tmp_path / "run", report=quiet
        )
    assert not prepared, "caches are built for a device that is there"
    with pytest.raises(UsageError, match="must be creatable"):
        training.run(toy_recipe, output_dir=toy_recipe / "run", report=quiet)


def test_checkpoint_of_another_shape_is_refused(toy_recipe: Path, tmp_path: Path) -> None:
    training.run(toy_recipe, output_dir=tmp_path / "run", report=quiet)
    with pytest.raises(UsageError, match="must fit the recipe's networks"):
        training.run(toy_recipe, ["width=4"], resume=tmp_path / "run", output_dir=tmp_path / "b", report=quiet)


@pytest.mark.skipif(sys.platform == "win32", reason="a limit of the file size stands in for a full disk")
def test_a_full_disk_is_one_line_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    program = """
import resource, signal, sys, torch
from pathlib import Path
from faceedit.errors import FaceEditError
from faceedit.training.checkpoint import save_checkpoint
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
save_checkpoint(Path(sys.argv[1]), {"step": 1}, 2)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(Path(sys.argv[1]), {"step": 2, "weights": torch.zeros(100_000)}, 2)
except FaceEditError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    (line,) = done.stdout.splitlines()
    assert line.startswith(f"train: checkpoint must be writable, got {tmp_path / 'step_00000002.pt'} (")
    assert line.endswith("make room on the disk, then resume from the one before")
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000001.pt"]


def test_checkpoints_rotate_and_refuse_damage(tmp_path: Path) -> None:
    whole = {"task": "toy", "recipe": "", "context": {}, "elapsed_s": 0.0}
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, {**whole, "step": step, "value": torch.ones(2)}, keep=2)
    kept = list_checkpoints(tmp_path)
    assert [load_checkpoint(path)["step"] for path in kept] == [2, 3]
    assert save_checkpoint(tmp_path / "one", {"step": 5}, keep=1).is_file()
    assert save_checkpoint(tmp_path / "one", {"step": 4}, keep=1).is_file(), "what was just written stays"
    kept[0].write_bytes(kept[0].read_bytes()[:50])
    with pytest.raises(WeightsError, match="checkpoint must be readable"):
        load_checkpoint(kept[0])
    # What the unpickler raises on these has no common base.
    for other in (b"hello there", b"\x80\x02.", b"h\x01", b"c\n" * 10, pickle.dumps([1], 2), b"\x80\x02]q\x00K\x01a."):
        kept[0].write_bytes(other)
        with pytest.raises(WeightsError, match="checkpoint must "):
            load_checkpoint(kept[0])
    torch.save({"format": 1, "code": Path("x")}, kept[1])
    with pytest.raises(WeightsError, match="checkpoint must be readable"):
        load_checkpoint(kept[1])
    torch.save({"format": 1, **whole, "context": None}, kept[1])
    with pytest.raises(WeightsError, match=r"hold task, recipe, context, step, elapsed_s, got .* without step; use"):
        load_checkpoint(kept[1])
