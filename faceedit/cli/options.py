# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several commands share, stated once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from faceedit.errors import UsageError

Photo = Annotated[Path, typer.Argument(help="The photo: JPEG, PNG, WebP or TIFF.", show_default=False)]
Editor = Annotated[str, typer.Option("--editor", "-e", help="The editing system.")]
Weights = Annotated[str, typer.Option("--weights", "-w", help="Weights: a registry name, a tag or a file.")]
Settings = Annotated[
    list[str],
    typer.Option(
        "--set",
        "-s",
        metavar="NAME=VALUE",
        help="An attribute and its intensity, 0 to 1. Repeatable.",
        show_default=False,
    ),
]
Face = Annotated[int, typer.Option("--face", "-f", metavar="N", help="Which face: 0 is the largest, 1 the next.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", "-d", help="cpu, cuda, cuda:N or auto.")]
Scheme = Annotated[str, typer.Option("--scheme", help="Label scheme of the mask file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]


def parse_settings(settings: Iterable[str]) -> dict[str, float]:
    """Read `NAME=VALUE` pairs. Raises UsageError on a missing `=`, a value that is no number, or a repeated name."""
    values: dict[str, float] = {}
    for setting in settings:
        name, separator, text = setting.partition("=")
        name = name.strip()
        if not separator or not name:
            raise UsageError(f"--set: must be NAME=VALUE, got {setting!r}; write e.g. --set Blond_Hair=1")
        if name in values:
            raise UsageError(f"--set: must name each attribute once, got {name} twice; keep one of them")
        try:
            values[name] = float(text)
        except ValueError:
            raise UsageError(f"--set: {name} must be a number between 0 and 1, got {text!r}; try {name}=1") from None
    return values
