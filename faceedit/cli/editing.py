# SPDX-License-Identifier: Apache-2.0
"""`faceedit edit`: one photo in, one edited photo out."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from faceedit.cli import options
from faceedit.cli.files import check_folder, write_text
from faceedit.cli.output import print_json

if TYPE_CHECKING:
    from faceedit.pipeline import EditResult


def compare_path(output: Path) -> Path:
    """Where `--compare` writes the sheet of an output: `out.png` -> `out_compare.png`."""
    return output.with_name(f"{output.stem}_compare{output.suffix}")


def write_outputs(result: EditResult, output: Path, compare: bool) -> list[Path]:
    """Write the edited photo, and the before | mask | after sheet when asked. Each file appears whole or not at all."""
    from faceedit.images import write_image
    from faceedit.pipeline import comparison_sheet

    write_image(output, result.pixels, result.photo)
    if not compare:
        return [output]
    sheet = compare_path(output)
    write_image(sheet, comparison_sheet(result))
    return [output, sheet]


def edit(
    photo: options.Photo,
    output: Annotated[Path, typer.Option("--output", "-o", help="The edited photo; its suffix is the format.")],
    settings: options.Settings = [],  # noqa: B006 - typer reads the default; it is never mutated
    editor: options.Editor = "maggan",
    weights: options.Weights = "starter",
    face: options.Face = 0,
    compare: Annotated[bool, typer.Option("--compare", help="Also write OUT_compare: before | mask | after.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write the report as JSON to this file.")] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Edit one face of a photo; everything outside the edited region keeps its exact pixels.

    Example: faceedit edit me.jpg -o out.jpg --set Blond_Hair=1 --set Pale_Skin=0.5 --compare
    """
    values = options.parse_settings(settings)

    from faceedit.editors import AttributeEdit, load_editor
    from faceedit.editors.base import check_request, editor_spec
    from faceedit.images import check_writable, read_image
    from faceedit.pipeline import edit as edit_photo

    # Everything that can be refused without weights is refused before they are read.
    check_request(editor_spec(editor), AttributeEdit(values))
    for path in [output] if not compare else [output, compare_path(output)]:
        check_writable(path)
    if report is not None:
        check_folder(report)
    source = read_image(photo)
    result = edit_photo(source, attributes=values, editor=load_editor(editor, weights, device), face=face, seed=seed)
    written = write_outputs(result, output, compare)
    if report is not None:
        write_text(report, json_format.dumps(result.report, indent=2) + "\n")
    if json:
        print_json({**result.report, "written": [str(path) for path in written]})
