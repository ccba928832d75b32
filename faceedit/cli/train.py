# SPDX-License-Identifier: Apache-2.0
"""`faceedit train`: run a recipe. Training lives in `faceedit.training` and is imported only when asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from faceedit.cli import options
from faceedit.cli.output import print_json
from faceedit.errors import INTERRUPTED, MissingExtraError


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name or a YAML file.", show_default=False)],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Fields to change.", show_default=False)
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the resolved recipe and stop.")] = False,
    output_dir: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run's folder; default runs/RECIPE-DATE.")
    ] = None,
    resume: Annotated[Path | None, typer.Option("--resume", help="A run's folder or checkpoint to go on from.")] = None,
    json: options.Json = False,
) -> None:
    """Train a recipe; every field of it can be changed on the command line.

    Example: faceedit train maggan-starter trainer.steps=100 --dry-run
    """
    try:
        from faceedit.training import run
    except ImportError as error:
        raise MissingExtraError(
            f"train: the extra `train` must be installed, got no {error.name}; run pip install 'faceedit[train]'"
        ) from error

    def report(line: object) -> None:
        # With --json, stdout carries the one JSON document and nothing else.
        typer.echo(str(line), err=json and not dry_run)

    result = run(recipe, overrides or [], dry_run=dry_run, output_dir=output_dir, resume=resume, report=report)
    # On several devices every process comes to this point.
    if json and result is not None and result.rank == 0:
        print_json(result.__dict__ if hasattr(result, "__dict__") else {})
    if result is not None and result.reason == "interrupted":
        raise typer.Exit(INTERRUPTED)
