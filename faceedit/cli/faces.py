# SPDX-License-Identifier: Apache-2.0
"""`faceedit parse` and `faceedit align`: what the editors see of a photo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from faceedit.cli import options
from faceedit.cli.files import check_distinct, write_mask
from faceedit.cli.output import print_json
from faceedit.errors import OutOfRangeError, UsageError


def parse(
    photo: options.Photo,
    output: Annotated[Path, typer.Option("--output", "-o", help="The mask: an indexed PNG of the photo's size.")],
    overlay: Annotated[Path | None, typer.Option("--overlay", help="Also write the mask laid over the photo.")] = None,
    scheme: options.Scheme = "celebamask-hq",
    face: options.Face = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Write the semantic mask of a face: pixel value = class id, 0 outside the face's region.

    Example: faceedit parse me.jpg -o mask.png --overlay overlay.png
    """
    from faceedit.images import check_writable, read_image, write_image
    from faceedit.labels import CELEBAMASK_HQ, convert_labels
    from faceedit.labels import scheme as find_scheme
    from faceedit.parsing import load_parser
    from faceedit.pipeline import overlay as lay_over

    wanted = find_scheme(scheme)
    if output.suffix.lower() != ".png":
        raise UsageError(f"parse: OUT must end in .png, got {output}; masks are indexed PNGs")
    check_distinct("parse", {"PHOTO": photo, "--output": output, "--overlay": overlay})
    for path in [output] if overlay is None else [output, overlay]:
        check_writable(path)
    source = read_image(photo)
    record = load_parser(device).find_face(source.pixels, face)
    labels = record.photo_labels()
    converted = convert_labels(labels, CELEBAMASK_HQ, wanted)
    write_mask(output, converted, wanted)
    if overlay is not None:
        write_image(overlay, lay_over(source.pixels, labels), source)
    if json:
        ids, counts = _count(converted)
        print_json(
            {
                "mask": str(output),
                "scheme": wanted.name,
                "landmarks": record.landmarks.round(2).tolist(),
                "area_px": {wanted.classes[i]: count for i, count in zip(ids, counts, strict=True)},
            }
        )


def align(
    photo: options.Photo,
    output: Annotated[Path, typer.Option("--output", "-o", help="The aligned face; its suffix is the format.")],
    size: Annotated[int, typer.Option("--size", help="Side of the square crop in pixels.")] = 256,
    face: options.Face = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Cut out one face, upright and centred: FFHQ's square enlarged 1.25 times, as the editors see it.

    Example: faceedit align me.jpg -o face.png --size 512
    """
    if not 16 <= size <= 4096:
        raise OutOfRangeError(f"align: --size must be between 16 and 4096, got {size}; 256 is what the editors use")
    from faceedit.images import check_writable, read_image, write_image
    from faceedit.parsing import load_parser

    check_distinct("align", {"PHOTO": photo, "--output": output})
    check_writable(output)
    source = read_image(photo)
    record = load_parser(device).find_face(source.pixels, face)
    alignment = record.alignment.resized(size)
    # Cropping and resampling invent nothing, so the crop carries no claim that a trained model made part of it.
    write_image(output, alignment.warp_image(source.pixels), provenance=False)
    if json:
        print_json(
            {
                "face": str(output),
                "landmarks": record.landmarks.round(2).tolist(),
                "matrix": alignment.matrix.round(6).tolist(),
                "in_photo_share": round(alignment.in_photo_fraction(), 4),
            }
        )


def _count(labels: Any) -> tuple[list[int], list[int]]:
    import numpy as np

    ids, counts = np.unique(labels, return_counts=True)
    return ids.tolist(), counts.tolist()
