# SPDX-License-Identifier: Apache-2.0
"""The training loop: one for every task, over Lightning Fabric."""

from __future__ import annotations

import math
import random
import signal
import subprocess
import threading
import time
from collections.abc import Generator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from faceedit.errors import DeviceError, FaceEditError, MissingExtraError, UsageError
from faceedit.training.batches import batches
from faceedit.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from faceedit.training.config import Recipe, TrainerConfig, recipe_changes, to_yaml
from faceedit.training.run_directory import RunDirectory, check_unused, describe_environment
from faceedit.training.task import PATIENCE, Report, Task, TrainingContext, TrainingDivergedError, derive_seed

_GRACE_S = 10.0  # for a process that failed to leave, so that its exit code can be read
StopReason = Literal["finished", "time limit", "interrupted"]


class ProcessFailedError(FaceEditError):
    """A process of another device ended early and has said why; the checkpoints before it are intact."""


@dataclass(frozen=True)
class TrainingResult:
    """How a run ended, the same in every process but for its `rank`. `weights` is None after an interruption, when only
    the checkpoint is written."""

    reason: StopReason
    step: int
    minutes: float
    directory: Path
    checkpoint: Path
    weights: Path | None
    metrics: dict[str, float]
    rank: int = 0


class _StopSignals:
    """While active, the first SIGINT or SIGTERM asks the loop to stop after its step; a second one acts as usual."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> _StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        signal.signal(number, self._previous[number])

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


class _Averager:
    """Means of scalars since the last flush; values stay on their device until then, so no step waits for a GPU."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, scalars: dict[str, Tensor]) -> None:
        for name, value in scalars.items():
            total = value.detach().float()
            self._sums[name] = self._sums[name] + total if name in self._sums else total
            self._counts[name] = self._counts.get(name, 0) + 1

    def not_finite(self) -> list[str]:
        """Names of scalars that were not finite since the last flush; waits for a GPU."""
        return [name for name, total in self._sums.items() if not math.isfinite(total.item())]

    def flush(self) -> dict[str, float]:
        means = {name: total.item() / self._counts[name] for name, total in self._sums.items()}
        self._sums, self._counts = {}, {}
        return means


def make_fabric(config: TrainerConfig) -> Any:
    """A Fabric for `config`. Raises MissingExtraError without the `train` extra, DeviceError for an absent device."""
    try:
        from lightning.fabric import Fabric
        from lightning.fabric.strategies import DDPStrategy
        from lightning.fabric.utilities.exceptions import MisconfigurationException
    except ImportError as error:
        raise MissingExtraError("train: lightning must be installed; run pip install 'faceedit[train]'") from error
    strategy = "auto" if config.devices == 1 else DDPStrategy(timeout=PATIENCE)
    try:
        return Fabric(
            accelerator=config.accelerator, devices=config.devices, precision=config.precision, strategy=strategy
        )
    except (RuntimeError, ValueError, MisconfigurationException) as error:
        reason = " ".join(str(error).split())
        raise DeviceError(
            f"train: trainer.accelerator and devices must exist here, got {config.accelerator} x {config.devices} "
            f"({reason}); try trainer.accelerator=auto"
        ) from error


def seed_step(config: TrainerConfig, step: int, rank: int) -> None:
    """Seed every global generator for one step, so that code which draws from them resumes exactly too."""
    seed = derive_seed(config.seed, "step", step, rank)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def train(
    task_type: type[Task[Any]],
    recipe: Recipe,
    directory: Path,
    *,
    resume: Path | None = None,
    report: Report = print,
) -> TrainingResult:
    """Run `recipe` until its steps or minutes are used up, or until interrupted.

    Args:    directory is created; resume is a run directory or a checkpoint file of the same task.
    Returns: TrainingResult; the run directory holds everything it refers to.
    Raises:  UsageError on a checkpoint of another recipe or a used directory; TrainingDivergedError on losses,
             gradients or weights that are not finite; ProcessFailedError when another device's process ended; whatever
             the task raises.
    """
    config = recipe.trainer
    threads = torch.get_num_threads()
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)
    try:
        return _train(task_type, recipe, directory, resume, report)
    finally:
        torch.set_num_threads(threads)


def _train(
    task_type: type[Task[Any]], recipe: Recipe, directory: Path, resume: Path | None, report: Report
) -> TrainingResult:
    config = recipe.trainer
    checkpoint = find_checkpoint(resume) if resume is not None else None
    check_unused(directory, checkpoint)
    state = load_checkpoint(checkpoint) if checkpoint is not None else None
    if state is not None and state["task"] != recipe.task:
        raise UsageError(f"train: checkpoint must be of task {recipe.task}, got {state['task']}; resume another run")
    if state is not None:
        for change in recipe_changes(state["recipe"], to_yaml(recipe)):
            report(f"resumed with another recipe: {change}")
    fabric = make_fabric(config)  # before the caches: an absent device is known at once
    task_type.prepare(recipe, report=report)
    try:
        fabric.launch()
        return _train_here(task_type, recipe, directory, checkpoint, state, fabric, report)
    except BaseException as error:
        code = _end_others(fabric, failed_here=not isinstance(error, RuntimeError))
        if code is None:
            raise
        raise ProcessFailedError(
            f"train: every process must finish, got one of {config.devices} that ended with code {code}; "
            f"see its own message, then resume from {directory}"
        ) from error


def _end_others(fabric: Any, *, failed_here: bool) -> int | None:
    """End the processes that this one started, since they would wait for it.

    Returns: the exit code of one that had failed by itself. Unless `failed_here`, which says that none had, they are
             given time to leave: what is seen first of a process that fails is its lost connection.
    """
    processes = _unwatched(fabric)
    deadline = time.monotonic() + (0 if failed_here else _GRACE_S)
    failed = None
    for process in processes:
        with suppress(subprocess.TimeoutExpired):
            failed = process.wait(max(0.0, deadline - time.monotonic())) or failed
    for process in processes:
        process.kill()  # a process that waits for another one hears no milder signal; only this one holds files
        process.wait()
    return failed


def _unwatched(fabric: Any) -> list[subprocess.Popen[bytes]]:
    """The processes that this one started. Fabric watches them no longer: if one of them ended with another code than
    0, it would kill this process."""
    launched: list[subprocess.Popen[bytes]] = getattr(fabric.strategy.launcher, "procs", [])
    processes = launched.copy()
    launched.clear()
    return processes


def _train_here(
    task_type: type[Task[Any]],
    recipe: Recipe,
    directory: Path,
    checkpoint: Path | None,
    state: dict[str, Any] | None,
    fabric: Any,
    report: Report,
) -> TrainingResult:
    """The part of a run that every process has."""
    config = recipe.trainer
    if config.cpu_threads is not None:
        torch.set_num_threads(config.cpu_threads)  # launching shares the cores out between the processes
    seed_step(config, -1, 0)  # the same initial weights on every rank
    context = TrainingContext(fabric, config)
    directory = context.agree(directory)  # a folder named by the clock
    task = task_type(recipe, context)
    step, elapsed = 0, 0.0
    if state is not None:
        context.load_state_dict(state["context"])
        step, elapsed = int(state["step"]), float(state["elapsed_s"])
        task.resume_at(step)
    files: RunDirectory | None = None
    if fabric.is_global_zero:
        files = RunDirectory(directory, resumed=checkpoint, resume_step=None if state is None else step)
    try:
        if files is not None:
            files.write_text("recipe.yaml", to_yaml(recipe))
            files.write_json("environment.json", {"seed": config.seed, **describe_environment()})
        return _Loop(task, recipe, context, files, directory, report).run(step, elapsed)
    finally:
        if files is not None:
            files.close()


class _Loop:
    def __init__(
        self,
        task: Task[Any],
        recipe: Recipe,
        context: TrainingContext,
        files: RunDirectory | None,
        directory: Path,
        report: Report,
    ) -> None:
        self.task = task
        self.recipe = recipe
        self.config = recipe.trainer
        self.context = context
        self.files = files
        self.directory = directory
        self.report = report if files is not None else (lambda line: None)

    def run(self, step: int, elapsed: float) -> TrainingResult:
        config, context = self.config, self.context
        limit_s = math.inf if config.max_minutes is None else config.max_minutes * 60
        started = time.monotonic() - elapsed
        averager = _Averager()
        logged_step, logged_s = step, elapsed
        saved_step = -1
        reason: StopReason = "finished"
        source = self._batches(step)
        with closing(source), _StopSignals() as signals:
            while step < config.steps:
                elapsed = time.monotonic() - started
                # Rank 0 says for all when to stop, or some would wait for ever, and what time it is, or rates differ.
                stop, elapsed = context.agree((_stop_reason(signals.received, elapsed >= limit_s), elapsed))
                if stop is not None:
                    reason = stop
                    break
                progress = step / config.steps
                if config.progress_by == "time":
                    progress = max(progress, elapsed / limit_s)
                context.set_rates(step, progress)
                batch = context.to_device(next(source))
                seed_step(config, step, context.fabric.global_rank)
                averager.add(self.task.training_step(batch, step))
                context.update_averages()
                step += 1
                elapsed = time.monotonic() - started
                if step == config.steps or _due(step, config.log_every):
                    scalars = context.mean_of_scalars(averager.flush())
                    scalars["steps_per_s"] = (step - logged_step) / max(elapsed - logged_s, 1e-9)
                    scalars["minutes"] = elapsed / 60
                    logged_step, logged_s = step, elapsed
                    self._log(step, "train", scalars)
                if _due(step, config.checkpoint_every):
                    self._check_finite(averager, step)
                    self._save(step, elapsed)
                    saved_step = step
                if step < config.steps and _due(step, config.sample_every):
                    self._look(step)
                if step < config.steps and _due(step, config.validate_every):
                    self._validate(step)
            self._check_finite(averager, step)
            checkpoint = self._save(step, elapsed) if saved_step != step else self._path(step)
        weights: Path | None = None
        metrics: dict[str, float] = {}
        if reason != "interrupted":
            self._look(step)
            metrics = self._validate(step)  # empty but on rank 0
            weights = self.directory / "weights.safetensors"
            if self.files is not None:
                self.task.export(weights, metrics)
        result = TrainingResult(reason, step, elapsed / 60, self.directory, checkpoint, weights, metrics)
        if self.files is not None:
            summary = {"reason": reason, "step": step, "minutes": round(elapsed / 60, 3), "metrics": metrics}
            self.files.write_json("summary.json", summary)
        if reason == "interrupted":
            _unwatched(context.fabric)  # before the others know: the command ends with 130 in each of them
        self.report(f"{reason} at step {step} after {elapsed / 60:.1f} min: {self.directory}")
        return replace(context.agree(result), rank=context.fabric.global_rank)

    def _batches(self, start: int) -> Generator[dict[str, Tensor], None, None]:
        config, rank = self.config, self.context.fabric.global_rank
        return batches(
            self.task.batch,
            range(start, config.steps),
            workers=config.workers,
            seed=lambda step: seed_step(config, step, rank),
            pinned=self.context.device.type == "cuda",
        )

    def _check_finite(self, averager: _Averager, step: int) -> None:
        """Raise TrainingDivergedError before what has diverged takes the place of a checkpoint that has not."""
        self._refuse(self.context.not_finite(averager.not_finite()), step)

    def _refuse(self, bad: list[str], step: int) -> None:
        if bad:
            raise TrainingDivergedError(
                f"train: {', '.join(bad)} must be finite, got nan or inf by step {step}; lower the learning rate or "
                f"resume from {self.directory / 'checkpoints'} with another seed"
            )

    def _log(self, step: int, split: str, scalars: dict[str, float]) -> None:
        if split == "train":
            self._refuse([name for name, value in scalars.items() if not math.isfinite(value)], step)
        if self.files is not None:
            self.files.log(step, split, scalars)
        self.report(f"step {step} {split} " + " ".join(f"{name}={value:.4g}" for name, value in scalars.items()))

    @torch.no_grad()
    def _look(self, step: int) -> None:
        if self.files is not None:
            self.files.write_sheet(step, self.task.sample_sheet())

    @torch.no_grad()
    def _validate(self, step: int) -> dict[str, float]:
        """Scores on rank 0 only: validation sets are small, and an average over ranks would hide how they were cut."""
        if self.files is None:
            return {}
        metrics = self.task.validate()
        self._log(step, "validation", metrics)
        return metrics

    def _path(self, step: int) -> Path:
        return self.directory / "checkpoints" / f"step_{step:08d}.pt"

    def _save(self, step: int, elapsed: float) -> Path:
        if self.files is not None:
            state = {
                "task": self.recipe.task,
                "step": step,
                "elapsed_s": elapsed,
                "recipe": to_yaml(self.recipe),
                "context": self.context.state_dict(),
            }
            save_checkpoint(self.files.checkpoints, state, self.config.keep_checkpoints)
        self.context.fabric.barrier()
        return self._path(step)


def _stop_reason(interrupted: bool, timed_out: bool) -> StopReason | None:
    return "interrupted" if interrupted else "time limit" if timed_out else None


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0
