# SPDX-License-Identifier: Apache-2.0
"""`faceedit batch`: the same edit over a folder. Resumable; one photo's failure does not stop the rest."""

from __future__ import annotations

import hashlib
import json as json_format
import os
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from faceedit.cli import options
from faceedit.cli.editing import compare_path, unchanged_note, write_outputs
from faceedit.cli.output import print_json, print_note, progress_bar
from faceedit.config import from_dict
from faceedit.errors import INTERRUPTED, FaceEditError, ImageReadError, ImageWriteError, OutOfRangeError, UsageError

if TYPE_CHECKING:
    from faceedit.editors.base import Editor, EditRequest
    from faceedit.parsing import FaceParser

MANIFEST = ".faceedit-batch.jsonl"
_OTHER_PHOTOS = "heic heif hif jxl jp2 avif avifs dng cr2 cr3 nef arw raf orf rw2 psd"
OTHER_PHOTOS = frozenset(f".{suffix}" for suffix in _OTHER_PHOTOS.split())
"""Suffixes of photos that are counted and left out, as far as this installation cannot read them."""
WRITABLE = frozenset({".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff"})


@dataclass(frozen=True, slots=True)
class Entry:
    """What happened to one photo: a line of the manifest.

    status is "begun", "edited", "unchanged" (written, with no pixel changed) or "failed"; folder the IN_DIR, "" in
    manifests of versions that did not record it.
    """

    photo: str
    size: int
    modified_ns: int
    options: str
    output: str
    output_size: int
    status: str
    reason: str = ""
    message: str = ""
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """The photos of a folder, sorted; how many others were left out, by suffix; and linked folders not followed."""

    photos: list[Path]
    left_out: Counter[str]
    links: list[Path]

    def remark(self) -> str:
        """What a person should know of what is not among the photos; "" for nothing."""
        parts = []
        if self.left_out:
            shown = ", ".join(f"{suffix} {count}" for suffix, count in sorted(self.left_out.items()))
            parts.append(f"{sum(self.left_out.values())} images were left out ({shown}); convert them to JPEG or PNG")
        if self.links:
            first = " ".join(str(self.links[0]).split())
            parts.append(
                f"{len(self.links)} links to folders were not followed ({first}); name such a folder as IN_DIR"
            )
        return "; ".join(parts)


@dataclass(frozen=True, slots=True)
class Job:
    """What is done to every photo; `digest` changes when any of it would change a result."""

    in_dir: Path
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
        if entry is None or entry.status not in ("edited", "unchanged") or entry.options != digest:
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


def find_photos(in_dir: Path, out_dir: Path) -> Found:
    """Every file below `in_dir` with the suffix of a format that is read, leaving out `out_dir` when it lies inside.

    Links to files are followed, links to folders are not: they may lead in circles, or to half a disk.
    """
    from faceedit.images import readable_suffixes

    readable = readable_suffixes()
    top, results = os.path.realpath(in_dir), os.path.realpath(out_dir)
    photos, links, left_out = [], [], Counter[str]()
    for folder, subfolders, names in os.walk(in_dir):
        links += [Path(folder, name) for name in subfolders if os.path.islink(os.path.join(folder, name))]
        for path in (Path(folder, name) for name in names if not name.startswith("._")):  # macOS' own, no pictures
            real = os.path.realpath(path)
            if _is_inside(real, results) and (_is_inside(results, top) or not _is_inside(real, top)):
                continue
            if path.suffix.lower() in readable and path.is_file():
                photos.append(path)
            elif path.suffix.lower() in OTHER_PHOTOS:
                left_out[path.suffix.lower()] += 1
    return Found(sorted(photos), left_out, sorted(links))


def _is_inside(path: str, folder: str) -> bool:
    return path != folder and os.path.commonpath([path, folder]) == folder


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


def check_owners(photos: list[Path], in_dir: Path, manifest: Manifest, compare: bool) -> None:
    """Raise UsageError where a result would replace a file that is not this very folder's earlier result.

    A photo of another folder with this one's name, size and time is taken for the same: that folder was moved here.
    """
    here = os.path.realpath(in_dir)
    owners = {entry.output: entry for entry in manifest.entries.values()}
    for photo in photos:
        name = photo.relative_to(in_dir)
        output = output_name(name)
        own = owners.get(output.as_posix())
        for path in [output, compare_path(output)] if compare else [output]:
            target = manifest.folder / path
            if not os.path.lexists(target):
                continue
            owner = owners.get(path.as_posix(), own)
            if owner is None:
                raise UsageError(
                    f"batch: OUT_DIR must hold nothing that a result would replace, got {target}, which no earlier "
                    "batch is known to have written; move it away or name another OUT_DIR"
                )
            if owner.photo != name.as_posix():
                raise UsageError(
                    f"batch: OUT_DIR must have one photo a result, got {target} of {owner.photo} for {name}; "
                    "name another OUT_DIR"
                )
            if owner.folder not in ("", here) and not _is_same(owner, photo):
                raise UsageError(
                    f"batch: OUT_DIR must hold the results of one IN_DIR, got {target}, a result of {owner.folder}; "
                    "name another OUT_DIR (or delete that result, if the folder was moved or copied here)"
                )


def _is_same(entry: Entry, photo: Path) -> bool:
    """Whether a photo, wherever it lies now, is the one of the entry: of the same size and time."""
    try:
        state = photo.stat()
    except OSError:
        return False
    return (entry.size, entry.modified_ns) == (state.st_size, state.st_mtime_ns)


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

    Links to folders are not followed. A file in OUT_DIR that is not this IN_DIR's own result is never replaced.

    Example: faceedit batch photos/ edited/ --set Blond_Hair=1
    """
    options.parse_settings(settings)  # refuses what is malformed before anything heavy is imported
    if not in_dir.is_dir():
        raise UsageError(f"batch: IN_DIR must be a folder, got {in_dir}; name a folder of photos")
    if os.path.realpath(in_dir) == os.path.realpath(out_dir):
        raise UsageError("batch: OUT_DIR must differ from IN_DIR, got the same folder; originals are never overwritten")

    from faceedit.detection import YUNET_VARIABLE
    from faceedit.editors import load_editor
    from faceedit.editors.base import Watchable, check_preset, check_request, editor_spec, weight_files
    from faceedit.images import readable_suffixes
    from faceedit.parsing import load_parser
    from faceedit.registry import find, sha256_of

    request, spec = options.parse_request(settings, size, keep), editor_spec(editor)
    if face < 0:
        raise OutOfRangeError(f"batch: --face must not be negative, got {face}; 0 is the largest")
    check_request(spec, request)
    check_preset(spec, preset)
    found = find_photos(in_dir, out_dir)
    photos = found.photos
    if not photos:
        remark = f" ({found.remark()})" if found.remark() else ""
        raise ImageReadError(
            f"batch: IN_DIR must contain photos, got none in {in_dir}{remark}; supported: "
            f"{', '.join(sorted(readable_suffixes()))}"
        )
    check_outputs(photos, in_dir, compare)
    try:
        manifest = Manifest(out_dir)
        check_owners(photos, in_dir, manifest, compare)
        out_dir.mkdir(parents=True, exist_ok=True)
        manifest.path.touch()
    except OSError as error:
        raise ImageWriteError(
            f"batch: OUT_DIR must be writable, got {out_dir} ({error.strerror}); choose another"
        ) from error

    if remark := found.remark():
        print_note(remark)
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
    job = Job(in_dir, out_dir, request, loaded, parser, face, compare, seed, digest)
    counts: Counter[str] = Counter()
    noted: list[Entry] = []
    try:
        with progress_bar() as progress:
            task = progress.add_task("editing", total=len(photos))
            for source in photos:
                name = source.relative_to(in_dir)
                if manifest.is_done(name.as_posix(), source, job.digest, compare):
                    counts["skipped"] += 1
                else:
                    entry = _edit_one(job, source, name, manifest)
                    counts[entry.status] += 1
                    if entry.status != "edited":
                        noted.append(entry)
                        why = f"{entry.reason}: {entry.message}" if entry.reason else entry.message
                        progress.console.print(
                            " ".join(f"{entry.status}: {entry.photo}: {why}".split()),
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
    _summarise(counts, noted, found, json)
    if counts["failed"]:
        raise typer.Exit(1)


def _edit_one(job: Job, source: Path, name: Path, manifest: Manifest) -> Entry:
    """Edit one photo, write down what happened, whatever happened, and return it."""
    from faceedit.pipeline import edit as edit_photo

    target = output_name(name)
    output = job.out_dir / target
    before = manifest.entries.get(name.as_posix())
    entry = Entry(
        photo=name.as_posix(),
        size=0,
        modified_ns=0,
        options=job.digest,
        output=target.as_posix(),
        output_size=0,
        status="begun",
        folder=os.path.realpath(job.in_dir),
    )
    if before is None or before.folder != entry.folder:
        manifest.add(entry)  # so that a result which a crash leaves without its line has an owner
    try:
        state = source.stat()  # before it is read: a photo that changes meanwhile is then done again
        entry = replace(entry, size=state.st_size, modified_ns=state.st_mtime_ns)
        output.parent.mkdir(parents=True, exist_ok=True)
        result = edit_photo(
            source, request=job.request, editor=job.editor, parser=job.parser, face=job.face, seed=job.seed
        )
        write_outputs(result, output, job.compare)
        note = "" if result.is_changed else f"{unchanged_note(result)}; the result is the photo as it was read"
        entry = replace(
            entry, status="unchanged" if note else "edited", message=note, output_size=output.stat().st_size
        )
    except FaceEditError as error:
        entry = replace(entry, status="failed", reason=type(error).__name__, message=str(error))
    except Exception as error:  # a fault of this one photo must not lose the folder; its type is reported
        message = " ".join(str(error).split()) or "no message"
        entry = replace(entry, status="failed", reason=type(error).__name__, message=message)
    if (
        entry.status == "failed"
        and before is not None
        and before.options != job.digest
        and _removed(output, job.compare)
    ):
        entry = replace(entry, message=f"{entry.message}; its result of other options was removed")
    manifest.add(entry)
    return entry


def _removed(output: Path, compare: bool) -> bool:
    """Whether there was a result to remove; with `compare` its sheet, whose place `check_owners` has looked at then."""
    gone = False
    for path in (output, compare_path(output)) if compare else (output,):
        try:
            path.unlink()
            gone = True
        except OSError:  # never made, or the folder forbids it
            continue
    return gone


def _summarise(counts: Counter[str], noted: list[Entry], found: Found, as_json: bool) -> None:
    failures = [entry for entry in noted if entry.status == "failed"]
    reasons = Counter(entry.reason for entry in failures)
    total = len(found.photos)
    if as_json:
        print_json(
            {
                "photos": total,
                "edited": counts["edited"],
                "unchanged": counts["unchanged"],
                "skipped": counts["skipped"],
                "failed": counts["failed"],
                "left_out": dict(sorted(found.left_out.items())),
                "links_not_followed": [str(path) for path in found.links],
                "reasons": dict(reasons.most_common()),
                "failures": [{"photo": e.photo, "reason": e.reason, "message": e.message} for e in failures],
                "unchanged_photos": [
                    {"photo": e.photo, "message": e.message} for e in noted if e.status == "unchanged"
                ],
            }
        )
        return
    unchanged = f"{counts['unchanged']} unchanged, " if counts["unchanged"] else ""
    line = f"{counts['edited']} edited, {unchanged}{counts['skipped']} skipped, {counts['failed']} failed"
    line += f" of {total} photos"
    if reasons:
        line += f" ({', '.join(f'{reason} {count}' for reason, count in reasons.most_common())})"
    typer.echo(line)
