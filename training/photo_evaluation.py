# SPDX-License-Identifier: Apache-2.0
"""Score an attribute editor on real photos, where the result of an edit is known: pairs of `training.transplants`.

python -m faceedit.training.photo_evaluation maggan-starter --photos FOLDER --output report/

By default on the photos that `photos.held_out_every` keeps out of an editor's training. The truth is what the training
pairs are made of: bangs, moustaches, beards and brows grown from the photo's own mask (`training/grown_hair.py`), its
hair dyed (`training/dyed_hair.py`) or given up for a scalp (`training/bared_scalp.py`), its lips parted or closed
(`training/moved_lips.py`). Glasses and wrinkles are a drawn person's, moved to the photo's own features.
This is near what a person would call the edit, not a second photograph of it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faceedit.attributes import MAGGAN
from faceedit.classification import STARTER
from faceedit.errors import UsageError
from faceedit.training.carry_over import LOOKS
from faceedit.training.command import progress, require_folder, require_option, run_command
from faceedit.training.data import AugmentConfig, SyntheticPortraits
from faceedit.training.evaluation import (
    Classify,
    Edit,
    load_classify,
    outside_error,
    region_psnr_db,
    thirteen_flips,
    undone,
)
from faceedit.training.photos import PhotosConfig, UnlabelledPhotos
from faceedit.training.transplants import TransplantConfig, Transplants

_AS_IT_IS = AugmentConfig(flip=False, gain=0.0, gamma=0.0, tint=0.0, fading=0.0, noise=0.0, soften_mask_share=0.0)
_SEED = 71  # of the pairs: the same photos and lenders for every editor


@dataclass(frozen=True, slots=True)
class PhotoScore:
    """Means over `count` pairs that set one attribute to 1 or to 0; measures as in `evaluation.AttributeScore`.

    success: share in which the judge sees the attribute as asked; truth_success: the same of the true result.
    """

    attribute: str
    value: int
    count: int
    psnr_db: float
    unchanged_psnr_db: float
    undone: float
    outside: float
    success: float
    truth_success: float


@dataclass(frozen=True, slots=True)
class PhotoReport:
    """Rows by attribute and value, over `photos` photos; means weigh every row alike."""

    rows: tuple[PhotoScore, ...]
    photos: int
    held_out: bool

    def mean(self, measure: str) -> float:
        """The mean of a measure over the rows."""
        return sum(getattr(row, measure) for row in self.rows) / len(self.rows)

    def markdown(self) -> str:
        """The table, with the mean as its last row."""
        lines = [
            "| asked for | pairs | PSNR inside (dB) | as is (dB) | undone | outside | success | truth's success |",
            "|---|---|---|---|---|---|---|---|",
        ]
        measures = ("psnr_db", "unchanged_psnr_db", "undone", "outside", "success", "truth_success")
        formats = ("{:.2f}", "{:.2f}", "{:.1%}", "{:.4f}", "{:.1%}", "{:.1%}")
        table = [(f"{row.attribute}={row.value}", row.count, *(getattr(row, m) for m in measures)) for row in self.rows]
        table.append(("**mean**", sum(row.count for row in self.rows), *(self.mean(m) for m in measures)))
        for name, count, *values in table:
            cells = [shape.format(value) for shape, value in zip(formats, values, strict=True)]
            lines.append(f"| {name} | {count} | {' | '.join(cells)} |")
        which = "held out of editors' training" if self.held_out else "an editor may have been trained on"
        lines += ["", f"{self.photos} photos that {'were ' if self.held_out else ''}{which}."]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """photo_evaluation.json and photo_evaluation.md."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "photo_evaluation.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        (folder / "photo_evaluation.md").write_text(self.markdown())


@torch.no_grad()
def evaluate_on_photos(
    edit: Edit,
    photos: UnlabelledPhotos,
    drawings: SyntheticPortraits,
    classify: Classify,
    *,
    attributes: Sequence[str] = TransplantConfig().attributes,
    count: int = 48,
    held_out: bool = True,
) -> PhotoReport:
    """Edit pairs of photos, `count` for each attribute put on and as many taken off (hair is only taken off, or dyed).

    Args:    edit as for `evaluate_editor`; photos; drawings, who lends what is worn; classify tells what the photos
             show, so that nobody is given what they have, and judges.
    Raises:  UsageError where no photo lacks an attribute, or no drawing lends it.
    """
    seen = []
    for start in range(0, len(photos), 32):
        positions = range(start, min(start + 32, len(photos)))
        image, _ = photos.read(positions, torch.zeros(len(positions), dtype=torch.bool).numpy())
        seen.append(classify(image).cpu())
    rows = []
    for name in attributes:
        one_way = LOOKS[name].how in ("dyed", "bared")
        for removal in (0.0,) if one_way else (0.0, 1.0):
            config = TransplantConfig(attributes=(name,), removal_share=removal)
            generator = torch.Generator().manual_seed(_SEED)
            pairs = Transplants(photos, drawings, torch.cat(seen), config).sample(count, generator, _AS_IT_IS)
            rows.append(_score(edit, pairs, name, classify))
    return PhotoReport(tuple(rows), len(photos), held_out)


def _score(edit: Edit, pairs: dict[str, Tensor], name: str, classify: Classify) -> PhotoScore:
    source, truth, region, column = pairs["source"], pairs["target"], pairs["influence"], MAGGAN.index(name)
    asked = pairs["target_attributes"][:, column] > 0.5
    assert bool((asked == asked[0]).all())
    made = torch.cat(
        [
            edit(*(pairs[part][at : at + 16] for part in ("source", "difference", "mask"))).float().cpu()
            for at in range(0, len(source), 16)
        ]
    )

    def confirmed(image: Tensor) -> float:
        return float(((classify(image).cpu()[:, column] > 0.5) == asked).float().mean())

    return PhotoScore(
        attribute=name,
        value=int(asked[0]),
        count=len(source),
        psnr_db=float(region_psnr_db(made, truth, region).mean()),
        unchanged_psnr_db=float(region_psnr_db(source, truth, region).mean()),
        undone=float(undone(made, source, truth, region).mean()),
        outside=float(outside_error(made, source, region).mean()),
        success=confirmed(made),
        truth_success=confirmed(truth),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's first lines. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m faceedit.training.photo_evaluation", description=__doc__)
    parser.add_argument("weights", help="generator: a registry name or a .safetensors file")
    parser.add_argument("--photos", required=True, help="a folder of photos, searched recursively")
    parser.add_argument("--all", action="store_true", help="also photos that an editor is trained on")
    parser.add_argument("--pairs", type=int, default=48, help="for each attribute put on, and taken off")
    parser.add_argument("--people", type=int, default=96, help="drawn people who lend what they wear")
    parser.add_argument("--classifier", default=STARTER, help="tells what photos show, and judges")
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(chosen))


def _evaluate(chosen: argparse.Namespace) -> str:
    from faceedit.registry import load_network

    require_option("photo_evaluation", "--pairs", chosen.pairs, 1, "the published scores have 48")
    require_option("photo_evaluation", "--people", chosen.people, 1, "the published scores have 96")
    require_folder("photo_evaluation", "--output", chosen.output)
    network: Any = load_network(chosen.weights, kind="maggan")
    classify, size = load_classify(chosen.classifier), network.config.size_px
    everyone = UnlabelledPhotos(PhotosConfig(folder=chosen.photos, size_px=size), report=progress)
    photos = everyone if chosen.all else everyone.split()[1]
    if not len(photos):
        raise UsageError(
            f"photo_evaluation: --photos must hold photos that are held out, got {len(everyone)} in all, of which "
            "every eighth is; add photos or pass --all"
        )
    drawings = SyntheticPortraits(thirteen_flips(chosen.people, size), "test", progress)
    report = evaluate_on_photos(network, photos, drawings, classify, count=chosen.pairs, held_out=not chosen.all)
    report.write(chosen.output)
    return report.markdown()


if __name__ == "__main__":
    sys.exit(main())
