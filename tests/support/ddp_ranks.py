# SPDX-License-Identifier: Apache-2.0
"""Two processes that train together on the CPU, what they do in `test_ddp.py`, and one process that does it alone."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.fabric.plugins.environments.lightning import find_free_network_port
from support.toy_task import ToyTask
from torch import Tensor

from faceedit import training
from faceedit.training.adaptive_augmentation import Augmentation
from faceedit.training.stylegan2 import StyleGAN2Task, Unrounded
from faceedit.training.task import TASKS, Task, TrainingContext, TrainingDivergedError, derive_seed
from faceedit.training.trainer import make_fabric, seed_step

RANKS = 2
STEPS = 4
_PRELOADED = ["faceedit.training.trainer", "faceedit.training.stylegan2", "lightning.fabric", "torch.utils.tensorboard"]
_HANGS_S = 300

Scenario = Callable[[int, Path], None]


def run_pair(scenario: Scenario, folder: Path) -> list[int | None]:
    """Call `scenario(rank, folder)` in two processes, which find each other as those of `torchrun` do.

    Returns: their exit codes. They are forks of a process that has imported torch, once, and done nothing else.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    port = find_free_network_port()
    processes = [context.Process(target=_enter, args=(scenario, rank, port, folder)) for rank in range(RANKS)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(_HANGS_S)
    codes = [process.exitcode for process in processes]  # None: hangs
    for process in processes:
        process.kill()
    return codes


def _enter(scenario: Scenario, rank: int, port: int, folder: Path) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    scenario(rank, folder)


class RecordedTask(ToyTask):
    """The toy, which keeps what it was given and can be made to fail or to be interrupted at a step of one rank."""

    latest: ClassVar[RecordedTask]
    at: ClassVar[dict[str, int]] = {}

    def __init__(self, recipe: Any, context: TrainingContext) -> None:
        super().__init__(recipe, context)
        self.given: dict[int, Tensor] = {}
        type(self).latest = self

    def training_step(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        self.given[step] = batch["x"]
        if step == self.at.get("failure"):
            raise ValueError("this process fails")
        if step == self.at.get("interruption"):
            os.kill(os.getpid(), signal.SIGINT)
        scalars = super().training_step(batch, step)
        if step == self.at.get("nan"):
            scalars["fit"] = scalars["fit"] / 0
        if step == self.at.get("poison"):
            next(self.context.networks["generator"].parameters()).data.fill_(float("nan"))
        return scalars


class JoinedToyTask(ToyTask):
    """The toy in one process, which is given the batches of both ranks as one."""

    def batch(self, step: int) -> dict[str, Tensor]:
        halves = []
        for rank in range(RANKS):
            _draw_as(self.context, rank)
            halves.append(super().batch(step)["x"])
        return {"x": torch.cat(halves)}


class JoinedStyleGAN2Task(StyleGAN2Task):
    """StyleGAN2 in one process, which is given what both ranks draw; `recipe.batch_size` is that of both."""

    def _of_both(self, draw: Callable[[], tuple[Tensor, ...]]) -> list[Tensor]:
        """Rank 0's and rank 1's images in turns: groups of the minibatch deviation are then those of either rank."""
        whole, halves = self.recipe, []
        self.recipe = replace(whole, batch_size=whole.batch_size // RANKS)
        for rank in range(RANKS):
            _draw_as(self.context, rank)
            halves.append(draw())
        self.recipe = whole
        return [torch.stack(parts, 1).flatten(0, 1) for parts in zip(*halves, strict=True)]

    def batch(self, step: int) -> dict[str, Tensor]:
        own = super().batch
        return {"image": self._of_both(lambda: (own(step)["image"],))[0]}

    def _latents(self, stream: str, step: int, count: int) -> Unrounded:
        own = super()._latents
        return Unrounded(*self._of_both(lambda: own(stream, step, count // RANKS).tensors))

    def _directions(self, step: int, count: int) -> Tensor:
        own = super()._directions
        return self._of_both(lambda: (own(step, count // RANKS),))[0]

    def _augment(self, stream: str, step: int) -> Augmentation:
        own = super()._augment

        def draw() -> tuple[Tensor, ...]:
            drawn = own(stream, step)
            return drawn.geometry, drawn.colour, drawn.moved, drawn.recoloured

        return Augmentation(*self._of_both(draw))


def _draw_as(context: TrainingContext, rank: int) -> None:
    def generator(stream: str, step: int) -> torch.Generator:
        return torch.Generator().manual_seed(derive_seed(context.config.seed, stream, step, rank))

    context.generator = generator  # type: ignore[method-assign]


def stylegan2_steps(task_type: type[StyleGAN2Task], recipe: Any) -> dict[str, Any]:
    """A few steps of StyleGAN2 with all its terms; what is the same on every rank, if they train together."""
    lines: list[str] = []
    task_type.prepare(recipe, report=lines.append)
    fabric = make_fabric(recipe.trainer)
    fabric.launch()
    seed_step(recipe.trainer, -1, 0)
    context = TrainingContext(fabric, recipe.trainer)
    task = task_type(recipe, context)
    synthesis = task.bare_generator.network.synthesis
    plain = synthesis.forward
    # One process of both ranks can't draw the noise of either: here every image has the stored maps.
    synthesis.forward = lambda ws, noise: plain(ws, noise=None)  # type: ignore[method-assign]
    scalars = []
    for step in range(STEPS):
        seed_step(recipe.trainer, step, fabric.global_rank)
        context.set_rates(step, 0.0)
        seen = context.mean_of_scalars({k: v.item() for k, v in task.training_step(task.batch(step), step).items()})
        scalars.append(seen)
        context.update_averages()
    return {"state": context.state_dict(), "scalars": scalars, "image": task.batch(0)["image"], "lines": lines}


def train_together(rank: int, folder: Path) -> None:
    """Several runs of the toy, then StyleGAN2; writes what this rank saw to rank_<rank>.pt."""
    TASKS["toy"] = "support.ddp_ranks:RecordedTask"
    lines: list[str] = []
    seen: dict[str, Any] = {}

    def run(name: str, *overrides: str, resume: Path | None = None, **at: int) -> None:
        RecordedTask.at = at
        # As with a folder named by the clock, the ranks do not mean the same one.
        output = folder / f"{name}-{rank}"
        done = training.run(folder / "toy.yaml", overrides, output_dir=output, resume=resume, report=lines.append)
        assert done is not None
        seen[name] = {
            "result": (done.reason, done.step, done.directory.name, done.metrics, done.rank),
            "state": RecordedTask.latest.context.state_dict(),
            "given": RecordedTask.latest.given,
        }

    run("whole", "trainer.checkpoint_every=2", "trainer.keep_checkpoints=9")
    run("resumed", resume=folder / "whole-0" / "checkpoints" / "step_00000002.pt")
    run("plain", "is_plain=true")
    clock = ["trainer.progress_by=time", "trainer.max_minutes=0.5", "adam.decay_from=0.0", "trainer.steps=1000000"]
    run("interrupted", *clock, **({"interruption": 3} if rank == 0 else {}))
    unlogged = ["trainer.log_every=100", "trainer.checkpoint_every=2", "trainer.steps=3"]
    for name, overrides, cause in (
        ("diverged", ["trainer.log_every=1"], {"nan": 2}),
        ("unlogged", unlogged, {"nan": 1}),
        ("poisoned", unlogged, {"poison": 1}),
    ):
        try:
            run(name, *overrides, **(cause if rank == 1 else {}))
        except TrainingDivergedError as error:
            seen[name] = str(error)
    seen["lines"] = lines
    seen["stylegan2"] = stylegan2_steps(StyleGAN2Task, training.resolve(folder / "stylegan2.yaml"))
    torch.save(seen, folder / f"rank_{rank}.pt")


def fail_on_rank_1(rank: int, folder: Path) -> None:
    """A run that one rank leaves by an error, without a word to the other."""
    TASKS["toy"] = "support.ddp_ranks:RecordedTask"
    RecordedTask.at = {"failure": 2} if rank == 1 else {}
    try:
        training.run(folder / "toy.yaml", output_dir=folder / "failed", report=lambda line: None)
    except Exception as error:
        (folder / f"failure_{rank}.txt").write_text(type(error).__name__)
        sys.exit(1)


def train_alone(task: type[Task[Any]], recipe: Path, folder: Path, *overrides: str) -> dict[str, Any]:
    """The final state of a run on one device."""
    kept: list[TrainingContext] = []

    class Kept(task):  # type: ignore[misc,valid-type]
        def __init__(self, recipe: Any, context: TrainingContext) -> None:
            super().__init__(recipe, context)
            kept.append(context)

    from faceedit.training.trainer import train

    train(Kept, training.resolve(recipe, overrides), folder, report=lambda line: None)
    return kept[0].state_dict()
