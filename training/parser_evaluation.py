# SPDX-License-Identifier: Apache-2.0
"""Score a face parser on synthetic people it never saw, and against landmarks of photos that were held out.

python -m faceedit.training.parser_evaluation parser-starter --output report/
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.command import progress, require_folder, require_option, run_command
from faceedit.training.contours import UNKNOWN
from faceedit.training.framed_photos import FramedPhotos, framed_photos
from faceedit.training.labelled_portraits import LabelledPortraits, labelled_portraits
from faceedit.training.segmentation import TEST_PEOPLE, overlay_sheet, segmentation_scores
from faceedit.training.sheets import write_png

_BATCH = 8
_COLUMNS = 8

# What contours draw, left and right together.
_PARTS = {
    "eyes": ("l_eye", "r_eye"),
    "brows": ("l_brow", "r_brow"),
    "nose": ("nose",),
    "lips": ("u_lip", "mouth", "l_lip"),
}


@torch.no_grad()
def parser_scores(
    network: nn.Module, people: LabelledPortraits, photos: FramedPhotos | None, device: torch.device
) -> dict[str, float]:
    """IoU of each class (`iou_<class>`) and their mean (`mean_iou`) on people as rendered; `contour_scores` on photos.

    Args: network, in evaluation mode, maps N×3×S×S in [-1, 1] to logits N×19×S×S; people and photos of that size.
    """
    scores = segmentation_scores(network, people.batches(_BATCH), CELEBAMASK_HQ, device)
    return scores if photos is None else scores | contour_scores(network, photos, device)


@torch.no_grad()
def contour_scores(network: nn.Module, photos: FramedPhotos, device: torch.device) -> dict[str, float]:
    """IoU of eyes, brows, nose and lips with what landmarks draw (`photo_iou_<part>`), over all pixels of all photos.

    A part that is found where contours say nothing (a covered face, a vague edge) does not count against the network.
    """
    hits, area = dict.fromkeys(_PARTS, 0), dict.fromkeys(_PARTS, 0)
    ids = {part: torch.tensor([CELEBAMASK_HQ.id(name) for name in names]) for part, names in _PARTS.items()}
    for start in range(0, len(photos), _BATCH):
        rows = list(range(start, min(start + _BATCH, len(photos))))
        predicted, drawn = network(photos.read(rows).to(device)).argmax(1).cpu(), photos.read_contours(rows)
        for part, classes in ids.items():
            found, truth = torch.isin(predicted, classes), torch.isin(drawn, classes)
            hits[part] += int((found & truth).sum())
            area[part] += int(((found & (drawn != UNKNOWN)) | truth).sum())
    return {f"photo_iou_{part}": hits[part] / area[part] for part in _PARTS if area[part]}


def header_metrics(scores: Mapping[str, float]) -> dict[str, float]:
    """What of `parser_scores` stands in a weights file's header, under its name there: the mean, and photos' parts."""
    shown = {"mean_iou": "synthetic_test_mean_iou"} | {f"photo_iou_{part}": f"photo_iou_{part}" for part in _PARTS}
    return {shown[name]: value for name, value in scores.items() if name in shown}


@dataclass(frozen=True, slots=True)
class ParserReport:
    """Scores as `parser_scores` gives them, and the metrics in the weights' own header, to compare with."""

    weights: str
    scores: dict[str, float]
    header: dict[str, float]
    people: int
    photos: int
    size_px: int

    def markdown(self) -> str:
        """What the header claims beside what was measured, then IoU by class."""
        lines = ["| score | measured | in the header |", "|---|---|---|"]
        for name, value in header_metrics(self.scores).items():
            claimed = self.header.get(name)
            lines.append(f"| {name} | {value:.4f} | {'–' if claimed is None else f'{claimed:.4f}'} |")
        lines += ["", "| class | IoU |", "|---|---|"]
        lines += [f"| {name[4:]} | {value:.4f} |" for name, value in self.scores.items() if name.startswith("iou_")]
        photos = f", {self.photos} held-out photos" if self.photos else ""
        about = f"{self.weights} at {self.size_px} px: {self.people} synthetic people of the test split{photos}."
        return "\n".join([*lines, "", about]) + "\n"

    def write(self, folder: Path) -> None:
        """evaluation.json and evaluation.md."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        (folder / "evaluation.md").write_text(self.markdown())


def evaluation_sheet(
    network: nn.Module, people: LabelledPortraits, photos: FramedPhotos | None, device: torch.device
) -> Tensor:
    """Eight people, and up to 24 photos, each above its parse; uint8 H×W×3."""
    columns = min(_COLUMNS, len(people))
    images = [people.read(list(range(columns)))[0]]
    if photos is not None:
        rows = len(photos) // columns
        images += [photos.read(list(range(k, k + columns))) for k in range(0, min(rows, 3) * columns, columns)]
    return overlay_sheet(network, images, CELEBAMASK_HQ, device)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's first lines. Returns the exit code."""
    parse = argparse.ArgumentParser(prog="python -m faceedit.training.parser_evaluation", description=__doc__)
    parse.add_argument("weights", help="face parser: a registry name or a .safetensors file")
    parse.add_argument("--people", type=int, default=TEST_PEOPLE, help="synthetic people; the header's scores have 96")
    parse.add_argument("--photos", type=Path, help="folder of photos; every eighth is measured, as in training")
    parse.add_argument("--photo-contours", type=Path, help="their landmarks, written by training/face_mesh.py")
    parse.add_argument("--device", default="cpu")
    parse.add_argument("--output", type=Path, required=True, help="folder of the report")
    parse.add_argument("--json", action="store_true", help="print the report as JSON")
    options = parse.parse_args(arguments)
    if (options.photos is None) != (options.photo_contours is None):
        parse.error("--photos and --photo-contours must come together: one is measured against the other")
    return run_command(lambda: _evaluate(options))


def _evaluate(options: argparse.Namespace) -> str:
    from faceedit.devices import resolve_device
    from faceedit.registry import load_network

    require_option("parser_evaluation", "--people", options.people, 1, "96 is the header's")
    require_folder("parser_evaluation", "--output", options.output)
    device = resolve_device(options.device)
    network: Any = load_network(options.weights, device, kind="parser")
    size = network.config.size_px
    people = labelled_portraits("test", options.people, size, None, progress)
    photos = None
    if options.photos is not None:
        photos = framed_photos(options.photos, options.photo_contours, size, None, progress).split()[1]
    report = ParserReport(
        options.weights,
        parser_scores(network, people, photos, device),
        dict(network.header.metrics),
        len(people),
        0 if photos is None else len(photos),
        size,
    )
    report.write(options.output)
    write_png(options.output / "sheet.png", evaluation_sheet(network, people, photos, device))
    return json.dumps(asdict(report), indent=2) if options.json else report.markdown()


if __name__ == "__main__":
    sys.exit(main())
