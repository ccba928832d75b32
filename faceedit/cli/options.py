# SPDX-License-Identifier: Apache-2.0
"""Arguments and options that several commands share, stated once."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from faceedit.errors import UsageError

if TYPE_CHECKING:
    from faceedit.editors.base import EditRequest

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
Size = Annotated[
    str,
    typer.Option(
        "--size",
        metavar="PART=SCALE",
        help="How large a part shall be, 0.5 to 2: mouth, eyebrows, eyes, hair, nose or ears (maskfacegan).",
        show_default=False,
    ),
]
Keep = Annotated[
    list[str],
    typer.Option(
        "--keep",
        metavar="NAME",
        help="An attribute that must not change along; `hair`: the hair's own. Repeatable.",
        show_default=False,
    ),
]
Preset = Annotated[str, typer.Option("--preset", help="The editor's configuration (maskfacegan: default, code, fast).")]
Face = Annotated[int, typer.Option("--face", "-f", metavar="N", help="Which face: 0 is the largest, 1 the next.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**32 - 1, help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", "-d", help="cpu, cuda, cuda:N or auto.")]
Scheme = Annotated[str, typer.Option("--scheme", help="Label scheme of the mask file.")]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout.")]


def parse_request(settings: Iterable[str], size: str = "", keep: Iterable[str] = ()) -> EditRequest:
    """The request of `--set`, `--size` and `--keep`. Raises UsageError and its kin."""
    from faceedit.editors.base import AttributeEdit, ComponentSize

    values, kept = parse_settings(settings), tuple(keep)
    if both := [name for name in kept if name in values]:
        raise UsageError(f"--keep: must not name what --set changes, got {both[0]} in both; leave one of them out")
    if not size:
        return AttributeEdit(values, kept)
    component, separator, text = size.partition("=")
    try:
        scale = float(text)
    except ValueError:
        separator = ""
    if not separator or not component.strip():
        raise UsageError(f"--size: must be PART=SCALE, got {size!r}; write e.g. --size mouth=1.5")
    if kept and not values:
        raise UsageError("--keep: must go with --set, got --size alone; a size changes no attribute by itself")
    return ComponentSize(component.strip(), scale, AttributeEdit(values, kept) if values else None)


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
