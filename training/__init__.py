# SPDX-License-Identifier: Apache-2.0
"""Training: data sets, synthetic portraits, losses, one task per system, metrics, recipes.

`resolve` reads a recipe, `run` trains it; both take the names of `recipes/*.yaml` or the path of a YAML file.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faceedit.training.task import Recipe
    from faceedit.training.trainer import TrainingResult

__all__ = ["list_recipes", "resolve", "run"]

_RECIPES = Path(__file__).resolve().parent / "recipes"


def list_recipes() -> list[str]:
    """Names of the recipes that ship with the package."""
    return sorted(path.stem for path in _RECIPES.glob("*.yaml"))


def resolve(recipe: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe as its task's dataclass, with every default filled in.

    Args:   recipe is a shipped name ("maggan-starter") or a YAML file; overrides are "trainer.steps=100"-like.
    Raises: UnknownNameError (recipe, task or key; names the nearest), UsageError (missing or mistyped value).
    """
    from faceedit.config import from_dict
    from faceedit.errors import UnknownNameError, UsageError, suggestion
    from faceedit.training.config import read_recipe
    from faceedit.training.task import task_class

    source = Path(recipe) if str(recipe).endswith((".yaml", ".yml")) else _RECIPES / f"{recipe}.yaml"
    if not source.is_file():
        name = str(recipe)
        raise UnknownNameError(
            f"train: recipe must be a name or a YAML file, got {name}; {suggestion(name, list_recipes())}"
        )
    values = read_recipe(source, overrides)
    task = values.get("task")
    if not isinstance(task, str):
        raise UsageError(f"train: recipe must name its task, got none in {source}; start it with `task: NAME`")
    resolved: Recipe = from_dict(task_class(task).recipe_class, values, where="recipe")
    return resolved


def run(
    recipe: str | Path,
    overrides: Sequence[str] = (),
    *,
    dry_run: bool = False,
    output_dir: str | Path | None = None,
    resume: str | Path | None = None,
    report: Callable[[str], Any] = print,
) -> TrainingResult | None:
    """Train a recipe, or with `dry_run` only report its resolved YAML (and return None).

    Args:   output_dir defaults to the resumed run's directory, else runs/<recipe>-<date>-<time> (-2, … where that
            exists); resume is a run directory or one of its checkpoints; report receives a line of progress at a time.
    Raises: as `resolve`; UsageError when output_dir holds a run that is not being resumed, or one that is going on.
    """
    from faceedit.training.config import to_yaml

    resolved = resolve(recipe, overrides)
    if dry_run:
        report(to_yaml(resolved).rstrip("\n"))
        return None
    from faceedit.training.checkpoint import run_directory_of
    from faceedit.training.task import task_class
    from faceedit.training.trainer import train

    resume_path = Path(resume) if resume is not None else None
    if output_dir is not None:
        directory = Path(output_dir)
    elif resume_path is not None:
        directory = run_directory_of(resume_path)
    else:
        directory = _new_directory(Path("runs") / f"{Path(recipe).stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    return train(task_class(resolved.task), resolved, directory, resume=resume_path, report=report)


def _new_directory(named: Path) -> Path:
    """`named`, or the first of `named`-2, `named`-3, … that is not there."""
    others = (named.with_name(f"{named.name}-{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([named], others) if not path.exists())
