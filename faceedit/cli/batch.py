# SPDX-License-Identifier: Apache-2.0
"""`faceedit batch`: the same edit over a folder. Resumable; one photo's failure does not stop the rest."""

from __future__ import annotations

import hashlib
import json as json_format
import os
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from faceedit.cli import options
from faceedit.cli.editing import compare_path, write_outputs
from faceedit.cli.output import print_json, print_note, progress_bar
from faceedit.config import from_dict
from faceedit.errors import INTERRUPTED, FaceEditError, ImageReadError, ImageWriteError, OutOfRangeError, UsageError

if TYPE_CHECKING:
    from faceedit.editors.base import Editor, EditRequest
    from faceedit.parsing import FaceParser

MANIFEST = ".faceedit-batch.jsonl"
READABLE = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp", ".gif", ".ppm", ".avif"})
WRITABLE = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class Entry:
    """What happened to one photo: a line of the manifest."""

    photo: str
    size: int
    modified_ns: int
    options: str
    output: str
    output_size: int
    status: str
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Job:
    """What is done to every photo; `digest` changes when any of it would change a result."""

    out_dir: Path
    request: EditRequest
    editor: Editor
    parser: FaceParser
    face: int
    compare: bool
    seed: int
    digest: str


class Manifest:
    """The outcomes of earlier runs in an output folder, one JSON line a photo; the last line of a photo wins.

    Lines are appended as photos finish, so an interruption at any moment loses at most the photo in hand.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / MANIFEST
        self.entries: dict[str, Entry] = {}
        text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
        self._separator = "" if not text or text.endswith("\n") else "\n"  # a torn last line stays by itself
        for line in text.splitlines():
            try:
                entry = from_dict(Entry, json_format.loads(line), where=MANIFEST)
            except (ValueError, RecursionError):
                continue  # a line torn by a crash, or another version's: that photo is simply done again
            self.entries[entry.photo] = entry

    def is_done(self, name: str, source: Path, digest: str, compare: bool = False) -> bool:
        """Was this very photo already edited with these very options, and is the result (with `compare` also its
        sheet) still there?"""
        entry = self.entries.get(name)
        if entry is None or entry.status != "edited" or entry.options != digest:
            return False
        if not source.exists():
            return False  # it vanished since the folder was listed; editing it says so
        state = source.stat()
        output = self.folder / entry.output
        return (
            (entry.size, entry.modified_ns) == (state.st_size, state.st_mtime_ns)
            and output.is_file()
            and output.stat().st_size == entry.output_size
            and (not compare or compare_path(output).is_file())
        )

    def add(self, entry: Entry) -> None:
        """Append one outcome. Raises ImageWriteError when the folder takes no more."""
        self.entries[entry.photo] = entry
        try:
            with self.path.open("a", encoding="utf-8") as lines:
                lines.write(f"{self._separator}{json_format.dumps(asdict(entry))}\n")
            self._separator = ""
        except OSError as error:
            raise ImageWriteError(
                f"batch: OUT_DIR must stay writable, got {self.path} ({error.strerror}); free some space and go on"
            ) from error


def find_photos(in_dir: Path, out_dir: Path) -> list[Path]:
    """Every file below `in_dir` with a photo's suffix, sorted, leaving out `out_dir` when it lies inside."""
    inside = out_dir.resolve()
    return sorted(
        path
        for path in in_dir.rglob("*")
        if path.suffix.lower() in READABLE and path.is_file() and inside not in path.resolve().parents
    )


def output_name(name: Path) -> Path:
    """The output's name below OUT_DIR: the photo's own; formats that are read but not written become PNG."""
    return name if name.suffix.lower() in WRITABLE else name.with_name(name.name + ".png")


def check_outputs(photos: list[Path], in_dir: Path, compare: bool) -> None:
    """Raise UsageError where one photo's result would overwrite another's, before anything is edited."""
    written: dict[Path, Path] = {}
    for photo in photos:
        output = output_name(photo.relative_to(in_dir))
        for path in [output, compare_path(output)] if compare else [output]:
            other = written.setdefault(path, photo)
            if other != photo:
                raise UsageError(
                    f"batch: IN_DIR must give every photo a result of its own, got {other.relative_to(in_dir)} and "
                    f"{photo.relative_to(in_dir)}, which would both write {path}; rename one"
                )


def batch(
    in_dir: Annotated[Path, typer.Argument(help="Folder of photos, searched with its subfolders.", show_default=False)],
    out_dir: Annotated[Path, typer.Argument(help="Folder of results, made when missing.", show_default=False)],
    settings: options.Settings = [],  # noqa: B006 - typer reads the default; it is never mutated
    editor: options.Editor = "maggan",
    weights: options.Weights = "starter",
    face: options.Face = 0,
    size: options.Size = "",
    keep: options.Keep = [],  # noqa: B006 - as above
    preset: options.Preset = "",
    compare: Annotated[bool, typer.Option("--compare", help="Also write NAME_compare: before | mask | after.")] = False,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Edit every photo of a folder. Run it again to continue: finished photos are skipped unless an option changed.

    Example: faceedit batch photos/ edited/ --set Blond_Hair=1
    """
    options.parse_settings(settings)  # refuses what is malformed before anything heavy is imported
    if not in_dir.is_dir():
        raise UsageError(f"batch: IN_DIR must be a folder, got {in_dir}; name a folder of photos")
    if in_dir.resolve() == out_dir.resolve():
        raise UsageError("batch: OUT_DIR must differ from IN_DIR, got the same folder; originals are never overwritten")

    from faceedit.detection import YUNET_VARIABLE
    from faceedit.editors import load_editor
    from faceedit.editors.base import Watchable, check_preset, check_request, editor_spec, weight_files
    from faceedit.parsing import load_parser
    from faceedit.registry import find, sha256_of

    request, spec = options.parse_request(settings, size, keep), editor_spec(editor)
    if face < 0:
        raise OutOfRangeError(f"batch: --face must not be negative, got {face}; 0 is the largest")
    check_request(spec, request)
    check_preset(spec, preset)
    photos = find_photos(in_dir, out_dir)
    if not photos:
        raise ImageReadError(
            f"batch: IN_DIR must contain photos, got none in {in_dir}; supported: {', '.join(sorted(READABLE))}"
        )
    check_outputs(photos, in_dir, compare)
    try:
        out_dir.mkdir(parents=True, exist_ok=True)
        manifest = Manifest(out_dir)
        manifest.path.touch()
    except OSError as error:
        raise ImageWriteError(
            f"batch: OUT_DIR must be writable, got {out_dir} ({error.strerror}); choose another"
        ) from error

    loaded = load_editor(editor, weights, device, preset)
    if isinstance(loaded, Watchable) and (caution := loaded.caution(request)):  # refuses what it cannot do
        print_note(caution)
    parser = load_parser(device)
    # The weights' own checksums, not their names: a retrained file of the same name edits everything again.
    files = [sha256_of(path) for path in (*weight_files(loaded), find(parser.weights).path)]
    if os.path.isfile(detector := os.environ.get(YUNET_VARIABLE, "")):
        files.append(sha256_of(Path(detector)))
    choices = [editor, files, repr(request), face, compare, seed, preset]
    digest = hashlib.sha256(json_format.dumps(choices).encode()).hexdigest()[:16]
    job = Job(out_dir, request, loaded, parser, face, compare, seed, digest)
    counts: Counter[str] = Counter()
    failures: list[Entry] = []
    try:
        with progress_bar() as progress:
            task = progress.add_task("editing", total=len(photos))
            for source in photos:
                name = source.relative_to(in_dir)
                if manifest.is_done(name.as_posix(), source, job.digest, compare):
                    counts["skipped"] += 1
                else:
                    entry = _edit_one(job, source, name)
                    manifest.add(entry)
                    counts[entry.status] += 1
                    if entry.status == "failed":
                        failures.append(entry)
                        progress.console.print(
                            f"failed: {entry.photo}: {entry.reason}: {entry.message}",
                            style=None,
                            markup=False,
                            highlight=False,
                            soft_wrap=True,
                        )
                progress.advance(task)
    except KeyboardInterrupt:
        done = sum(counts.values())
        typer.echo(
            f"error: interrupted after {done} of {len(photos)} photos; run the same command to continue", err=True
        )
        raise typer.Exit(INTERRUPTED) from None
    _summarise(counts, failures, len(photos), json)
    if failures:
        raise typer.Exit(1)


def _edit_one(job: Job, source: Path, name: Path) -> Entry:
    """Edit one photo and say what happened, whatever happened."""
    from faceedit.pipeline import edit as edit_photo

    target = output_name(name)
    output = job.out_dir / target
    reason, message = "", ""
    size, modified_ns, output_size = 0, 0, 0
    try:
        state = source.stat()  # before it is read: a photo that changes meanwhile is then done again
        size, modified_ns = state.st_size, state.st_mtime_ns
        output.parent.mkdir(parents=True, exist_ok=True)
        result = edit_photo(
            source, request=job.request, editor=job.editor, parser=job.parser, face=job.face, seed=job.seed
        )
        write_outputs(result, output, job.compare)
        output_size = output.stat().st_size
    except FaceEditError as error:
        reason, message = type(error).__name__, str(error)
    except Exception as error:  # a fault of this one photo must not lose the folder; its type is reported
        reason, message = type(error).__name__, " ".join(str(error).split()) or "no message"
    return Entry(
        photo=name.as_posix(),
        size=size,
        modified_ns=modified_ns,
        options=job.digest,
        output=target.as_posix(),
        output_size=output_size,
        status="failed" if reason else "edited",
        reason=reason,
        message=message,
    )


def _summarise(counts: Counter[str], failures: list[Entry], total: int, as_json: bool) -> None:
    reasons = Counter(entry.reason for entry in failures)
    if as_json:
        print_json(
            {
                "photos": total,
                "edited": counts["edited"],
                "skipped": counts["skipped"],
                "failed": counts["failed"],
                "reasons": dict(reasons.most_common()),
                "failures": [{"photo": e.photo, "reason": e.reason, "message": e.message} for e in failures],
            }
        )
        return
    line = f"{counts['edited']} edited, {counts['skipped']} skipped, {counts['failed']} failed of {total} photos"
    if reasons:
        line += f" ({', '.join(f'{reason} {count}' for reason, count in reasons.most_common())})"
    typer.echo(line)
