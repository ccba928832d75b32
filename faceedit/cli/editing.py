# SPDX-License-Identifier: Apache-2.0
"""`faceedit edit`: one photo in, one edited photo out."""

from __future__ import annotations

import json as json_format
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from faceedit.cli import options
from faceedit.cli.files import check_distinct, check_folder, write_text
from faceedit.cli.output import print_json, print_note, progress_bar
from faceedit.errors import UsageError

if TYPE_CHECKING:
    from faceedit.editors.base import Editor
    from faceedit.maskfacegan.outcome import Progress
    from faceedit.maskfacegan.trajectory import Trajectory
    from faceedit.pipeline import EditResult


def compare_path(output: Path) -> Path:
    """Where `--compare` writes the sheet of an output: `out.png` -> `out_compare.png`."""
    return output.with_name(f"{output.stem}_compare{output.suffix}")


def write_outputs(result: EditResult, output: Path, compare: bool) -> list[Path]:
    """Write the edited photo, and the before | mask | after sheet when asked. Each file appears whole or not at all."""
    from faceedit.images import write_image
    from faceedit.pipeline import comparison_sheet

    result.save(output)
    if not compare:
        return [output]
    sheet = compare_path(output)
    write_image(sheet, comparison_sheet(result), provenance=result.is_changed or result.photo.has_provenance)
    return [output, sheet]


def unchanged_note(result: EditResult) -> str:
    """Why an edit changed nothing, as far as its report knows."""
    there = result.report.get("details", {}).get("already_there", ())
    return f"{' and '.join(there)} is there already, as the mask shows" if there else "no pixel was changed"


def losses_path(trajectory: Path) -> Path:
    """Where `--save-trajectory` writes the losses beside a strip: `strip.png` -> `strip.csv`."""
    return trajectory.with_suffix(".csv")


@contextmanager
def watched(editor: Editor, every: int = 10) -> Iterator[Trajectory | None]:
    """A progress bar with the loss terms on stderr, and pictures and losses every few iterations, while a watchable
    editor works.
    """
    from faceedit.editors.base import Watchable

    if not isinstance(editor, Watchable):
        yield None
        return
    from faceedit.maskfacegan.trajectory import Trajectory

    trajectory = Trajectory()
    with progress_bar() as bar:
        task = bar.add_task("optimising", total=None)

        def show(progress: Progress) -> None:
            trajectory(progress)
            terms = "  ".join(f"{name} {value.mean().item():.4f}" for name, value in progress.losses.items())
            bar.update(task, description=f"{progress.stage}  {terms}", completed=progress.done, total=progress.total)

        editor.watch(show, every)
        try:
            yield trajectory
        finally:
            editor.watch(None)


def edit(
    photo: options.Photo,
    output: Annotated[Path, typer.Option("--output", "-o", help="The edited photo; its suffix is the format.")],
    settings: options.Settings = [],  # noqa: B006 - typer reads the default; it is never mutated
    editor: options.Editor = "maggan",
    weights: options.Weights = "starter",
    face: options.Face = 0,
    size: options.Size = "",
    keep: options.Keep = [],  # noqa: B006 - as above
    preset: options.Preset = "",
    compare: Annotated[bool, typer.Option("--compare", help="Also write OUT_compare: before | mask | after.")] = False,
    report: Annotated[Path | None, typer.Option("--report", help="Write the report as JSON to this file.")] = None,
    save_trajectory: Annotated[
        Path | None,
        typer.Option(
            "--save-trajectory",
            help="Write how the edit evolved: a strip of pictures, and beside it the losses as .csv.",
        ),
    ] = None,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Edit one face of a photo; everything outside the edited region keeps its exact pixels (in a .png or .tif).

    Example: faceedit edit me.jpg -o out.jpg --set Blond_Hair=1 --set Pale_Skin=0.5 --compare

    Example: faceedit edit me.jpg -o out.jpg --editor maskfacegan --weights ffhq.json --set Smiling=1 --size mouth=1.2
    """
    options.parse_settings(settings)  # refuses what is malformed before anything heavy is imported

    from faceedit.editors import load_editor
    from faceedit.editors.base import Watchable, check_preset, check_request, editor_spec
    from faceedit.images import LOSSY, check_writable, read_image, write_image
    from faceedit.pipeline import edit as edit_photo

    # Everything that can be refused without weights is refused before they are read.
    request, spec = options.parse_request(settings, size, keep), editor_spec(editor)
    check_request(spec, request)
    check_preset(spec, preset)
    if save_trajectory is not None and not spec.presets:
        raise UsageError(f"edit: --save-trajectory needs an editor that optimises, got {editor}; use maskfacegan")
    sheet = compare_path(output) if compare else None
    losses = losses_path(save_trajectory) if save_trajectory is not None else None
    named = {"PHOTO": photo, "--output": output, "--compare": sheet, "--report": report}
    check_distinct("edit", named | {"--save-trajectory": save_trajectory, "its .csv": losses})
    for path in (output, sheet, save_trajectory):
        if path is not None:
            check_writable(path)
    for path in (report, losses):
        if path is not None:
            check_folder(path)
    source = read_image(photo)
    loaded = load_editor(editor, weights, device, preset)
    if isinstance(loaded, Watchable) and (caution := loaded.caution(request)):
        print_note(caution)
    with watched(loaded, every=10 if save_trajectory is None else 1) as trajectory:
        result = edit_photo(source, request=request, editor=loaded, face=face, seed=seed)
    for name in result.report.get("details", {}).get("already_there", ()):
        print_note(f"{name} is there already, as the mask shows; nothing was changed for it")
    if not result.is_changed:
        print_note(f"no pixel was changed; {output} is the photo as it was read")
    written = write_outputs(result, output, compare)
    if output.suffix.lower() in LOSSY:
        print_note(f"{output.suffix} is lossy everywhere; write .png or .tif to keep every other pixel exactly")
    if save_trajectory is not None and losses is not None and trajectory is not None:
        write_image(save_trajectory, trajectory.strip())
        write_text(losses, trajectory.table())
        written += [save_trajectory, losses]
    if report is not None:
        write_text(report, json_format.dumps(result.report, indent=2) + "\n")
    if json:
        print_json({**result.report, "written": [str(path) for path in written]})
