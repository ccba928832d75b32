# SPDX-License-Identifier: Apache-2.0
"""Training checkpoints: tensors and plain values only, written atomically, read with `weights_only=True`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from faceedit.atomic import replacing
from faceedit.errors import FaceEditError, UsageError, WeightsError

FORMAT = 1
_HOLDS = ("task", "recipe", "context", "step", "elapsed_s")  # what a run that goes on reads
_PREFIX, _SUFFIX = "step_", ".pt"


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{_PREFIX}{step:08d}{_SUFFIX}"


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, oldest first."""
    return sorted(folder.glob(f"{_PREFIX}*{_SUFFIX}"))


def find_checkpoint(source: Path) -> Path:
    """`source` itself if it is a file, else the newest checkpoint of the run directory, or of its `checkpoints`."""
    if source.is_file():
        return source
    found = list_checkpoints(source / "checkpoints") or list_checkpoints(source)
    if not found:
        raise UsageError(
            f"train: resume must be a run directory with a checkpoint, got {source}; pass an earlier run's directory"
        )
    return found[-1]


def run_directory_of(source: Path) -> Path:
    """The run directory that a run resumed from `source` goes on in.

    Raises: UsageError for a checkpoint that lies in none.
    """
    folder = source.resolve().parent if source.is_file() else source
    if folder.name == "checkpoints":
        return folder.parent
    if source.is_file():
        raise UsageError(
            f"train: resume must lie in the checkpoints of a run, got {source}; pass output_dir to go on elsewhere"
        )
    return source


def save_checkpoint(folder: Path, state: dict[str, Any], keep: int) -> Path:
    """Write `state` under its step and delete all but it and the newest `keep` - 1 others.

    The file appears under its final name only once it is complete and on disk, so a run that is killed while saving
    leaves the previous checkpoint usable.

    Raises: FaceEditError when the disk does not take it.
    """
    path = checkpoint_path(folder, int(state["step"]))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(path) as stream:
            torch.save({"format": FORMAT, **state}, stream)
    except (OSError, RuntimeError) as error:  # torch tells of a full disk by the latter
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise FaceEditError(
            f"train: checkpoint must be writable, got {path} ({reason}); make room on the disk, then resume from the "
            "one before"
        ) from error
    others = [other for other in list_checkpoints(folder) if other != path]
    for old in others[: max(0, len(others) - keep + 1)]:
        old.unlink()
    return path


def set_aside(files: Iterable[Path], folder: Path) -> None:
    """Move the files that exist into `folder`/abandoned: a run that goes back to a step is another one then."""
    for path in files:
        if path.exists():
            aside = folder / "abandoned"
            aside.mkdir(exist_ok=True)
            path.replace(aside / path.name)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote, on the CPU.

    Raises: WeightsError when the file is damaged or incomplete, holds anything but tensors and plain values, or has
        another format.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # what the unpickler raises on a file of another kind has no common base
        raise WeightsError(f"train: checkpoint must be readable, got {path}; use an earlier one") from error
    found = state.get("format") if isinstance(state, dict) else None
    if found != FORMAT:
        raise WeightsError(f"train: checkpoint must have format {FORMAT}, got {found!r} in {path}; use an earlier one")
    if missing := [name for name in _HOLDS if name not in state]:
        raise WeightsError(
            f"train: checkpoint must hold {', '.join(_HOLDS)}, got {path} without {', '.join(missing)}; use one that "
            "train wrote"
        )
    return state
