# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: recipe, environment, metrics, TensorBoard events, sample sheets, checkpoints, weights."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faceedit.atomic import write_text
from faceedit.errors import MissingExtraError, UsageError
from faceedit.training.checkpoint import checkpoint_path, list_checkpoints, set_aside
from faceedit.training.sheets import write_png


def describe_environment() -> dict[str, Any]:
    """Versions, machine, threads and (in a git checkout) the commit that a run was made with."""
    packages: dict[str, str] = {
        "torch": str(torch.__version__)
    }  # with its CUDA build, which the package metadata leaves out
    for name in ("faceedit", "lightning", "numpy"):
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": packages,
        "cpu_threads": torch.get_num_threads(),
        "cpu_count": os.cpu_count(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        **_git_state(Path(__file__).resolve().parent),
    }


def _git_state(folder: Path) -> dict[str, Any]:
    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    changes = git("status", "--porcelain", "--untracked-files=no") if commit else None
    return {"commit": commit, "commit_has_local_changes": bool(changes)}


def check_unused(root: Path, resumed: Path | None) -> None:
    """Raise UsageError where `root` holds a run other than that of the checkpoint `resumed`."""
    used = (root / "metrics.jsonl").exists() or bool(list_checkpoints(root / "checkpoints"))
    if used and (resumed is None or resumed.resolve().parent != (root / "checkpoints").resolve()):
        advice = "pass resume or another directory" if resumed is None else f"{resumed} is not of it; pass another"
        raise UsageError(f"train: output_dir must hold no earlier run, got {root}; {advice}")


class RunDirectory:
    """Layout and writers of one run.

    recipe.yaml, environment.json, metrics.jsonl, tensorboard/, samples/step_*.png, checkpoints/step_*.pt,
    weights.safetensors (exported at the end), summary.json; run.lock, which is held while the run goes on.
    """

    def __init__(self, root: Path, *, resumed: Path | None, resume_step: int | None) -> None:
        """Open `root` for the run of the checkpoint `resumed`, or for a new one; with `resume_step` what came later is
        forgotten or set aside.

        Raises: UsageError where another run is or was; MissingExtraError without the `train` extra.
        """
        self.root = root
        self.checkpoints = root / "checkpoints"
        self._metrics = root / "metrics.jsonl"
        self._logged: set[tuple[int, str]] = set()
        try:
            from filelock import FileLock
            from filelock import Timeout as Held
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise MissingExtraError(
                "train: tensorboard and filelock must be installed; run pip install 'faceedit[train]'"
            ) from error
        try:
            root.mkdir(parents=True, exist_ok=True)
            self._lock = FileLock(root / "run.lock", timeout=0)
            self._lock.acquire()  # the system gives it back however the process ends
        except Held as error:
            raise UsageError(
                f"train: output_dir must be of no run that is going on, got {root}; wait for its end or pass another"
            ) from error
        except OSError as error:
            raise UsageError(
                f"train: output_dir must be creatable, got {root} ({error.strerror or error}); choose another place"
            ) from error
        try:
            check_unused(root, resumed)  # again: one may have run there while this one built its caches
            if resume_step is not None:
                self._go_back_to(resume_step)
            # Events of `purge_step` itself are purged too; the checkpoint's step is behind the run.
            self._board = SummaryWriter(
                str(root / "tensorboard"), purge_step=None if resume_step is None else resume_step + 1
            )
        except BaseException:
            self._lock.release()
            raise

    def _go_back_to(self, step: int) -> None:
        """Forget the metrics past `step`, which the resumed run writes again, and set aside what else came later."""
        later = [path for path in list_checkpoints(self.checkpoints) if path > checkpoint_path(self.checkpoints, step)]
        is_earlier = self._keep_metrics(lambda logged, split: logged <= step) or bool(later)
        set_aside(later, self.checkpoints)
        sheets = self.root / "samples"
        set_aside([path for path in sheets.glob("step_*.png") if path.name > _sheet_name(step)], sheets)
        if is_earlier:
            set_aside([self.root / "weights.safetensors", self.root / "summary.json"], self.root)

    def _keep_metrics(self, is_kept: Callable[[int, str], bool]) -> bool:
        """Drop the metric lines whose step and split are not to be kept. Returns whether there were such lines."""
        if not self._metrics.exists():
            return False
        kept, dropped = {}, False
        for line in self._metrics.read_text().splitlines():
            with suppress(ValueError):  # a line torn by a crash came after the checkpoint
                found = json.loads(line)
                if is_kept(found["step"], found["split"]):
                    kept[found["step"], found["split"]] = line + "\n"
                else:
                    dropped = True
        self._logged = set(kept)
        self.write_text("metrics.jsonl", "".join(kept.values()))
        return dropped

    def write_text(self, name: str, text: str) -> None:
        """Write a file of the run atomically."""
        write_text(self.root / name, text)

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        self.write_text(name, json.dumps(value, indent=2) + "\n")

    def log(self, step: int, split: str, scalars: dict[str, float]) -> None:
        """Append one line to metrics.jsonl and the same numbers to TensorBoard.

        A step that was logged already (a run that is resumed at its end validates again) keeps one line, the new one;
        TensorBoard keeps its old point, which it cannot take back.
        """
        is_new = (step, split) not in self._logged
        if not is_new:
            self._keep_metrics(lambda *logged: logged != (step, split))
        self._logged.add((step, split))
        with self._metrics.open("a") as stream:
            stream.write(json.dumps({"step": step, "split": split, **scalars}) + "\n")
        for name, value in scalars.items() if is_new else ():
            self._board.add_scalar(f"{split}/{name}", value, step)

    def write_sheet(self, step: int, pixels: Tensor) -> None:
        write_png(self.root / "samples" / _sheet_name(step), pixels)
        self._board.add_image("samples", pixels, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()
        self._lock.release()


def _sheet_name(step: int) -> str:
    return f"step_{step:08d}.png"
