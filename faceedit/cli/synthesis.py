# SPDX-License-Identifier: Apache-2.0
"""`faceedit synth` and `faceedit sample`: portraits that belong to nobody."""

from __future__ import annotations

import json as json_format
from importlib.resources import files
from pathlib import Path
from typing import Annotated

import typer

from faceedit.cli import options
from faceedit.cli.files import make_folder, write_mask, write_text
from faceedit.cli.output import print_json, progress_bar
from faceedit.errors import OutOfRangeError

BATCH = 8


def sample(
    output: Annotated[Path, typer.Option("--output", "-o", help="Where to put it; its suffix is the format.")] = Path(
        "portrait.png"
    ),
) -> None:
    """Write the bundled sample portrait, one of the project's own synthetic ones, to try the other commands on.

    Example: faceedit sample -o portrait.png
    """
    from faceedit.images import check_writable, read_image, write_image

    check_writable(output)
    portrait = read_image(Path(str(files("faceedit") / "data" / "portrait.png")))
    write_image(output, portrait.pixels, portrait, provenance=False)


def synth(
    out_dir: Annotated[Path, typer.Argument(help="Folder of results, made when missing.", show_default=False)],
    count: Annotated[int, typer.Option("--count", "-n", help="How many portraits.")] = 16,
    size: Annotated[int, typer.Option("--size", help="Side in pixels.")] = 256,
    seed: options.Seed = 0,
    device: options.Device = "cpu",
    json: options.Json = False,
) -> None:
    """Render synthetic portraits with exact masks (images/, masks/), attributes and landmarks (portraits.json).

    Portrait i of a seed is the same whatever the count.
    Example: faceedit synth portraits/ --count 64 --size 256 --seed 1
    """
    if count < 1:
        raise OutOfRangeError(f"synth: --count must be 1 or more, got {count}; ask for at least one portrait")
    if not 16 <= size <= 2048:
        raise OutOfRangeError(f"synth: --size must be between 16 and 2048, got {size}; 256 is what the editors use")
    import numpy as np

    from faceedit.attributes import CELEBA
    from faceedit.devices import resolve_device
    from faceedit.images import write_image
    from faceedit.labels import CELEBAMASK_HQ
    from faceedit.training.synthetic import render, sample_parameters

    where = resolve_device(device)
    _check_room(out_dir, count)
    make_folder(out_dir / "images")
    make_folder(out_dir / "masks")
    people = sample_parameters(count, seed, where)
    portraits: list[dict[str, object]] = []
    with progress_bar() as progress:
        task = progress.add_task("rendering", total=count)
        for chunk in people.chunks(BATCH):
            batch = render(chunk, size)
            images = ((batch.image.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            labels = batch.labels.cpu().numpy().astype(np.uint8)
            for i in range(len(batch)):
                name = f"{len(portraits):06d}.png"
                # A rendering is no photograph that a model changed, so it carries no such claim.
                write_image(out_dir / "images" / name, images[i], provenance=False)
                write_mask(out_dir / "masks" / name, labels[i], CELEBAMASK_HQ)
                portraits.append(
                    {
                        "file": name,
                        "attributes": [CELEBA[a] for a in batch.attributes[i].nonzero().flatten().tolist()],
                        "landmarks": batch.landmarks[i].cpu().double().numpy().round(2).tolist(),
                    }
                )
                progress.advance(task)
    listing = {"seed": seed, "size_px": size, "scheme": CELEBAMASK_HQ.name, "portraits": portraits}
    write_text(out_dir / "portraits.json", json_format.dumps(listing, indent=1) + "\n")
    if json:
        print_json({"folder": str(out_dir), "count": count, "size_px": size, "seed": seed})


def _check_room(folder: Path, count: int) -> None:
    """Refuse a folder with pictures that this run would leave beside its own, of another seed or size perhaps."""
    own = {f"{i:06d}.png" for i in range(count)}
    for part in ("images", "masks"):
        others = sorted(path.name for path in (folder / part).glob("*") if path.name not in own)
        if others:
            raise OutOfRangeError(
                f"synth: OUT_DIR must hold no pictures but those that --count {count} writes over, got {folder / part} "
                f"with {others[0]}{f' and {len(others) - 1} more' if others[1:] else ''}; name another folder"
            )
