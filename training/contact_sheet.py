# SPDX-License-Identifier: Apache-2.0
"""A contact sheet to judge an editor by eye: many photos, the same edits on each.

python -m faceedit.training.contact_sheet FOLDER -o docs/images/photo-edits.jpg --count 48
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from faceedit import pipeline
from faceedit.attributes import MAGGAN, check_attribute
from faceedit.editors.base import AttributeEdit, load_editor
from faceedit.errors import FaceEditError, UsageError
from faceedit.images import check_writable
from faceedit.parsing import FaceParser, load_parser
from faceedit.training.command import progress, require_option, run_command

EDITS = {
    **dict.fromkeys(("Blond_Hair", "Black_Hair", "Pale_Skin", "Bushy_Eyebrows", "Eyeglasses", "Bangs"), 1.0),
    "Mouth_Slightly_Open": 0.0,  # most portraits smile
}
_CAPTION_PX, _FONT_PX = 14, 10


def edits_of(
    photo: Path, editor: pipeline.Editor, parser: FaceParser, edits: Mapping[str, float]
) -> list[NDArray[np.uint8]]:
    """The aligned face 256×256×3 before and after each edit, all through the photo, as a user gets them.

    Raises: FaceEditError where a user would get one.
    """
    source = pipeline.read(photo)
    face = pipeline.parse(source, pipeline.find(source, parser), parser)
    tiles = [face.alignment.warp_image(source.pixels)]
    for name, value in edits.items():
        edited = pipeline.apply(face, editor, AttributeEdit({name: value}))
        tiles.append(face.alignment.warp_image(pipeline.composite(source, face, edited, parser).pixels))
    return tiles


def contact_sheet(
    rows: Sequence[Sequence[NDArray[np.uint8]]], names: Sequence[str], tile_px: int, columns: int
) -> Image.Image:
    """Rows of tiles (before, then one an edit), `columns` photos side by side, captions on top."""
    wide = (1 + len(names)) * tile_px
    high = -(-len(rows) // columns)
    sheet = Image.new("RGB", (columns * (wide + 6) - 6, high * tile_px + _CAPTION_PX), "white")
    pen = ImageDraw.Draw(sheet)
    for column in range(columns):
        for k, name in enumerate(("before", *names)):
            caption = name.replace("_", " ")
            fits = min(1.0, (tile_px - 4) / pen.textlength(caption, font=ImageFont.load_default(_FONT_PX)))
            font = ImageFont.load_default(_FONT_PX * fits)  # smaller, where a long name would run into the next one
            pen.text((column * (wide + 6) + k * tile_px + 2, 1), caption, fill="black", font=font)
    for i, tiles in enumerate(rows):
        x, y = i % columns * (wide + 6), i // columns * tile_px + _CAPTION_PX
        for k, tile in enumerate(tiles):
            small = Image.fromarray(tile).resize((tile_px, tile_px), Image.Resampling.LANCZOS)
            sheet.paste(small, (x + k * tile_px, y))
    return sheet


def _setting(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        if not math.isfinite(number := float(value)):
            raise ValueError("a value must be finite")
        return check_attribute(name, MAGGAN), number
    except (FaceEditError, ValueError) as error:
        raise argparse.ArgumentTypeError(f"must be NAME=VALUE, got {text!r} ({error})") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's first lines. Returns the exit code."""
    parse = argparse.ArgumentParser(prog="python -m faceedit.training.contact_sheet", description=__doc__)
    parse.add_argument("folder", type=Path)
    parse.add_argument("-o", "--output", type=Path, required=True)
    parse.add_argument("--count", type=int, default=48)
    parse.add_argument("--seed", type=int, default=0, help="which photos are drawn")
    parse.add_argument("--tile", type=int, default=96, help="side of a tile in pixels")
    parse.add_argument("--columns", type=int, default=2, help="photos side by side")
    parse.add_argument("--weights", default="starter", help="weights of the maggan editor")
    parse.add_argument(
        "--set",
        action="append",
        type=_setting,
        metavar="NAME=VALUE",
        dest="settings",
        help="an edit; repeatable (default: the seven of the sheet in the documentation)",
    )
    options = parse.parse_args(arguments)
    return run_command(lambda: _make(options))


def _make(options: argparse.Namespace) -> str:
    for name, advice in (("count", "it is how many photos"), ("tile", "96 is usual"), ("columns", "2 is usual")):
        require_option("contact_sheet", f"--{name}", getattr(options, name), 1, advice)
    check_writable(options.output)
    edits = dict(options.settings or EDITS)
    files = sorted(path for path in options.folder.rglob("*") if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    if not files:
        raise UsageError(f"contact_sheet: folder must hold photos, got none in {options.folder}; name another")
    random.Random(options.seed).shuffle(files)
    editor, parser = load_editor("maggan", options.weights), load_parser()
    rows: list[list[NDArray[np.uint8]]] = []
    for path in files:
        if len(rows) == options.count:
            break
        try:
            rows.append(edits_of(path, editor, parser, edits))
        except FaceEditError as error:
            progress(f"{path.name}: {error}")
    if not rows:
        raise FaceEditError(
            f"contact_sheet: folder must hold photos that can be edited, got none of {len(files)} in {options.folder}; "
            "see above why, or change --set"
        )
    captions = [name if value == 1 else f"{name} {value:g}" for name, value in edits.items()]
    contact_sheet(rows, captions, options.tile, options.columns).save(options.output, quality=88)
    return f"{len(rows)} photos on {options.output}"


if __name__ == "__main__":
    sys.exit(main())
