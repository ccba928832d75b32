# SPDX-License-Identifier: Apache-2.0
"""What commands print: results on stdout, one-line errors and progress on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import typer

from faceedit.config import without_infinities

if TYPE_CHECKING:
    from rich.progress import Progress


def print_error(message: object) -> None:
    """Write `error: <message>` to stderr as exactly one line."""
    typer.echo(f"error: {' '.join(str(message).split())}", err=True)


def print_note(message: str) -> None:
    """Write `note: <message>` to stderr: what a person should know although nothing is wrong."""
    typer.echo(f"note: {message}", err=True)


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    """Write one JSON document to stdout, with null for NaN and infinity."""
    typer.echo(json.dumps(without_infinities(value), indent=2, sort_keys=False, default=str, allow_nan=False))


def progress_bar() -> Progress:
    """A progress bar on stderr; silent when stderr is not a terminal, so logs and pipes stay clean."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(file=sys.stderr),
        disable=not sys.stderr.isatty(),
        transient=True,
    )
