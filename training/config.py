# SPDX-License-Identifier: Apache-2.0
"""Recipes: typed frozen dataclasses filled from YAML and `key=value` overrides, and from nothing else.

A recipe file states its task on the first line (`task: maggan`); the task names the dataclass that the rest of the
file must match exactly. Defaults live in the dataclasses alone.
"""

from __future__ import annotations

import copy
import math
import typing
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from faceedit.config import OwnKeyError, to_dict
from faceedit.errors import OutOfRangeError, UsageError

Precision = Literal["32-true", "bf16-mixed", "bf16-true", "16-mixed", "64-true"]


@dataclass(frozen=True, slots=True)
class TrainerConfig:
    """How long, on what, and how often to look. Shared by every task.

    `progress_by` decides what drives learning-rate schedules: "steps" (reproducible) or "time" (the larger of the
    shares of `steps` and of `max_minutes` that are used up, so that a time-limited run still finishes its decay).
    `every` fields count steps; 0 switches that action off until the end of the run. `workers` processes make batches
    ahead of the loop, the same ones as without; worth it beside a GPU, which otherwise waits for them.
    """

    steps: int
    seed: int = 0
    max_minutes: float | None = None
    progress_by: Literal["steps", "time"] = "steps"
    accelerator: str = "auto"
    devices: int = 1
    precision: Precision = "32-true"
    channels_last: bool = False
    cpu_threads: int | None = None
    workers: int = 0
    ema_decay: float = 0.999
    log_every: int = 50
    sample_every: int = 500
    validate_every: int = 1000
    checkpoint_every: int = 500
    keep_checkpoints: int = 2

    def __post_init__(self) -> None:
        require(self.steps > 0, "trainer.steps", "positive", self.steps)
        require(self.max_minutes is None or self.max_minutes > 0, "trainer.max_minutes", "positive", self.max_minutes)
        require(0 <= self.ema_decay < 1, "trainer.ema_decay", "in [0, 1)", self.ema_decay)
        require(self.keep_checkpoints > 0, "trainer.keep_checkpoints", "positive", self.keep_checkpoints)
        require(self.devices > 0, "trainer.devices", "positive", self.devices)
        require(self.cpu_threads is None or self.cpu_threads > 0, "trainer.cpu_threads", "positive", self.cpu_threads)
        require(self.workers >= 0, "trainer.workers", "0 or more", self.workers)
        require(
            self.progress_by == "steps" or self.max_minutes is not None,
            "trainer.progress_by",
            '"steps" when max_minutes is not set',
            self.progress_by,
        )


@dataclass(frozen=True, slots=True)
class AdamConfig:
    """Adam with a constant rate that decays linearly to `final_rate_share` of itself over the last part of a run."""

    rate: float = 2e-4
    beta1: float = 0.5
    beta2: float = 0.999
    weight_decay: float = 0.0
    warmup_steps: int = 0
    decay_from: float = 0.5
    final_rate_share: float = 0.1

    def __post_init__(self) -> None:
        require(0 < self.rate < math.inf, "rate", "positive", self.rate)
        require(0 <= self.beta1 < 1, "beta1", "in [0, 1)", self.beta1)
        require(0 <= self.beta2 < 1, "beta2", "in [0, 1)", self.beta2)
        require(0 <= self.weight_decay < math.inf, "weight_decay", "0 or more", self.weight_decay)
        require(self.warmup_steps >= 0, "warmup_steps", "0 or more", self.warmup_steps)
        require(0 <= self.decay_from <= 1, "decay_from", "in [0, 1]", self.decay_from)
        require(0 <= self.final_rate_share < math.inf, "final_rate_share", "0 or more", self.final_rate_share)

    def rate_at(self, step: int, progress: float) -> float:
        """Learning rate before update `step` (0-based) when `progress` in [0, 1] of the run is behind."""
        warmup = min(1.0, (step + 1) / (self.warmup_steps + 1))
        late = max(0.0, progress - self.decay_from) / max(1e-9, 1 - self.decay_from)
        return self.rate * warmup * (1 - min(1.0, late) * (1 - self.final_rate_share))


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What every recipe has; the rest belongs to its task. `description` names the recipe in the weights' header."""

    task: str
    trainer: TrainerConfig
    description: str = ""


def require(condition: bool, key: str, expected: str, actual: object) -> None:
    """Raise OutOfRangeError about a recipe key unless `condition` holds.

    A key without a dot is the dataclass's own; in a recipe the error names the path that leads to it.
    """
    if condition:
        return
    reason = f"must be {expected}, got {actual!r}; change it in the recipe or override"
    raise OutOfRangeError(f"recipe: {key} {reason}") if "." in key else OwnKeyError("recipe", key, reason)


def require_float32_weights(trainer: TrainerConfig) -> None:
    """Raise OutOfRangeError for a precision that changes the weights themselves, in recipes of tasks that compute some
    of their terms on bare networks, in float32."""
    accepted = ("32-true", "bf16-mixed", "16-mixed")
    require(
        trainer.precision in accepted, "trainer.precision", f"{' or '.join(accepted)} in this task", trainer.precision
    )


def read_recipe(source: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The YAML file `source` with dotted `key=value` overrides applied, as plain nested dictionaries.

    Raises: UsageError when the file is not a YAML mapping, or an override has no `=` or a value that is not YAML.
    """
    file = (f"recipe must be readable YAML, got {source}", "correct the file")
    with _blamed(*file):
        loaded = OmegaConf.load(source)
    if not isinstance(loaded, DictConfig):
        raise UsageError(f"train: recipe must be a YAML mapping, got a list in {source}; start it with `task: NAME`")
    merged = copy.deepcopy(loaded)
    for override in overrides:
        if "=" not in override:
            raise UsageError(f"train: override must be key=value, got {override!r}; write e.g. trainer.steps=100")
        with _blamed(*_override(override)):
            merged.merge_with_dotlist([override])
    # Resolved as a whole, since a reference may be to what comes later; who is to blame is asked afterwards.
    references = [override for override in overrides if "${" in override]
    with _blamed(*(_override(" ".join(references)) if references and _resolves(loaded) else file)):
        values = typing.cast(dict[Any, Any], OmegaConf.to_container(merged, resolve=True))
    return {str(key): value for key, value in values.items()}


def _override(text: str) -> tuple[str, str]:
    return f"override must be key=value of the recipe, got {text!r}", "write e.g. trainer.steps=100, with a YAML value"


@contextmanager
def _blamed(what: str, advice: str) -> Iterator[None]:
    """One line for whatever the YAML reader and omegaconf find wrong."""
    try:
        yield
    except Exception as error:
        # PyYAML's errors share no base class that omegaconf re-exports.
        is_known = isinstance(error, OmegaConfBaseException | ValueError | TypeError | OSError)
        if not is_known and type(error).__module__.split(".")[0] != "yaml":
            raise
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UsageError(f"train: {what}: {reason}; {advice}") from error


def _resolves(loaded: DictConfig) -> bool:
    try:
        OmegaConf.to_container(loaded, resolve=True)
    except OmegaConfBaseException:
        return False
    return True


# How long, on what and how often: changing these does not make another run of it.
_FREE = {
    f"trainer.{name}"
    for name in (
        *("steps", "max_minutes", "accelerator", "devices", "cpu_threads", "workers", "keep_checkpoints"),
        *("log_every", "sample_every", "validate_every", "checkpoint_every"),
    )
}


def recipe_changes(before: str, after: str) -> list[str]:
    """One line `key: old -> new` for each value in which two recipes as YAML differ, but for how long and on what."""
    old, new = (_flat("", OmegaConf.to_container(OmegaConf.create(text))) for text in (before, after))
    keys = [key for key in {**old, **new} if key not in _FREE and old.get(key) != new.get(key)]
    return [f"{key}: {old.get(key)} -> {new.get(key)}" for key in keys]


def _flat(prefix: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    joined = (_flat(f"{prefix}.{key}" if prefix else str(key), item) for key, item in value.items())
    return {key: item for part in joined for key, item in part.items()}


def to_yaml(recipe: Any) -> str:
    """The fully resolved recipe as YAML that `read_recipe` reads back to the same values."""
    return OmegaConf.to_yaml(OmegaConf.create(to_dict(recipe)))
