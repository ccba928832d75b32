# SPDX-License-Identifier: Apache-2.0
"""Score an attribute editor on synthetic people it never saw, against the counterfactual truth.

python -m faceedit.training.evaluation maggan-starter --output report/
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.attributes import MAGGAN, attribute_index, resolve_conflicts
from faceedit.classification import STARTER
from faceedit.errors import UsageError
from faceedit.relations import Relations, influence_mask
from faceedit.training import cache
from faceedit.training.command import progress, require_folder, require_option, run_command
from faceedit.training.data import SyntheticConfig, SyntheticPortraits
from faceedit.training.losses import moved_pixels

Edit = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(image N×3×S×S in [-1, 1], attribute difference N×13, soft mask N×19×S×S) -> image."""
Classify = Callable[[Tensor], Tensor]
"""image N×3×S×S -> probabilities N×13 in MAGGAN order."""

_MAX_PSNR_DB = 60.0  # an exact copy would be infinite; one grey level off everywhere is 48 dB


@dataclass(frozen=True, slots=True)
class AttributeScore:
    """One row: means over `count` edits of one attribute. `truth_*` is the same measure on the true result.

    psnr_db: inside the influence region, against the truth.  mre: mean |(1 − M_i)(x̂ − x)| as in MagGAN, RGB averaged.
    success: share whose flipped bit the classifier confirms.  unchanged_psnr_db: the unedited source against the truth.
    undone: L1 error over the region's pixels that the truth changes, as a share of that change; 1 is doing nothing.
    """

    attribute: str
    count: int
    psnr_db: float
    unchanged_psnr_db: float
    undone: float
    mre: float
    success: float | None
    truth_success: float | None


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Rows by attribute; means weigh every attribute alike. Reconstruction is the edit that asks for nothing."""

    rows: tuple[AttributeScore, ...]
    psnr_db: float
    undone: float
    mre: float
    success: float | None
    truth_success: float | None
    reconstruction_psnr_db: float
    people: int
    size_px: int
    skipped: int

    def scalars(self) -> dict[str, float]:
        """The headline numbers, for logs and weight headers."""
        values = {
            "psnr_db": self.psnr_db,
            "undone": self.undone,
            "mre": self.mre,
            "success": self.success,
            "truth_success": self.truth_success,
            "reconstruction_psnr_db": self.reconstruction_psnr_db,
        }
        return {name: value for name, value in values.items() if value is not None}

    def markdown(self) -> str:
        """The table, with the mean as its last row."""
        lines = [
            "| attribute | edits | PSNR inside (dB) | source as is (dB) | undone | MRE | success | truth's success |",
            "|---|---|---|---|---|---|---|---|",
        ]
        mean = AttributeScore(
            "**mean**",
            sum(row.count for row in self.rows),
            self.psnr_db,
            _mean([row.unchanged_psnr_db for row in self.rows]),
            self.undone,
            self.mre,
            self.success,
            self.truth_success,
        )
        for row in (*self.rows, mean):
            success, truth = (_percent(value) for value in (row.success, row.truth_success))
            decibels = f"{row.psnr_db:.2f} | {row.unchanged_psnr_db:.2f}"
            errors = f"{_percent(row.undone)} | {row.mre:.4f}"
            lines.append(f"| {row.attribute} | {row.count} | {decibels} | {errors} | {success} | {truth} |")
        about = f"{self.people} synthetic people of the test split at {self.size_px} px; {self.skipped} edits skipped"
        lines += ["", f"{about} because the truth changes nothing inside the region.", ""]
        lines.append(f"Reconstruction (no attribute changed): {self.reconstruction_psnr_db:.2f} dB.")
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """evaluation.json and evaluation.md."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "evaluation.json").write_text(json.dumps(asdict(self), indent=2) + "\n")
        (folder / "evaluation.md").write_text(self.markdown())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f} %"


def region_psnr_db(image: Tensor, truth: Tensor, region: Tensor) -> Tensor:
    """10·log10(4 / MSE) inside each sample's soft region, N values, at most 60. Image range [-1, 1]; region N×1×H×W."""
    area = region.sum(dim=(1, 2, 3)).clamp_min(1e-6)
    error = (region * (image - truth).square().mean(dim=1, keepdim=True)).sum(dim=(1, 2, 3)) / area
    return (10 * torch.log10(4 / error.clamp_min(1e-12))).clamp_max(_MAX_PSNR_DB)


def outside_error(image: Tensor, source: Tensor, region: Tensor) -> Tensor:
    """mean |(1 − region)(image − source)| over pixels and RGB, N values: one attribute's share of MRE."""
    return ((1 - region) * (image - source).abs()).mean(dim=(1, 2, 3))


def thirteen_flips(people: int, size_px: int, cache_dir: str | None = None) -> SyntheticConfig:
    """Everyone with each of the 13 attributes flipped once."""
    return SyntheticConfig(size_px=size_px, people=people, variants=len(MAGGAN), cache_dir=cache_dir)


@torch.no_grad()
def evaluate_editor(
    edit: Edit,
    data: SyntheticPortraits,
    classify: Classify | None = None,
    *,
    relations: Relations | None = None,
    batch_size: int = 16,
) -> EvaluationReport:
    """Flip one attribute at a time, for each family member that shows the flip, as MagGAN's MRE does.

    The attribute difference is the flip and, where an attribute is raised, STGAN's conflict rule (`resolve_conflicts`).
    Edits whose truth moves nothing inside the influence region (hair colour under a hat) are skipped and counted.
    `relations` (default: the paper's, which the published MRE uses) bound the influence region.
    """
    columns = [attribute_index(name) for name in MAGGAN]
    scores: dict[str, list[dict[str, float]]] = {name: [] for name in data.config.attributes}
    reconstructions: list[float] = []
    skipped = 0
    for start in range(0, len(data), batch_size):
        people = np.arange(start, min(start + batch_size, len(data)))
        source = cache.unpack_image(data.images[people, 0])
        mask = cache.unpack_mask(data.masks[people, 0])
        attributes = torch.from_numpy(data.attributes[people, 0][:, columns]).float()
        everywhere = torch.ones_like(source[:, :1])
        copies = edit(source, torch.zeros_like(attributes), mask).float().cpu()
        reconstructions += region_psnr_db(copies, source, everywhere).tolist()
        for member in range(1, data.config.variants + 1):
            truth = cache.unpack_image(data.images[people, member])
            names = [data.config.attributes[position] for position in data.flipped[people, member]]
            difference = torch.stack([_flip(row, name) for row, name in zip(attributes, names, strict=True)])
            flip = F.one_hot(torch.tensor([MAGGAN.index(name) for name in names]), len(MAGGAN)) * (1 - 2 * attributes)
            region = influence_mask(flip, mask, relations)
            made = edit(source, difference, mask).float().cpu()
            psnr = region_psnr_db(made, truth, region)
            unchanged = region_psnr_db(source, truth, region)
            outside = outside_error(made, source, region)
            missing = undone(made, source, truth, region)
            visible = (region.sum(dim=(1, 2, 3)) >= 1) & (unchanged < _MAX_PSNR_DB)
            right, truly_right = (_confirmed(classify, image, flip) for image in (made, truth))
            for row, name in enumerate(names):
                if not visible[row]:
                    skipped += 1
                    continue
                score = {"psnr": psnr[row].item(), "unchanged": unchanged[row].item(), "mre": outside[row].item()}
                score["undone"] = missing[row].item()
                if right is not None and truly_right is not None:
                    score |= {"success": float(right[row]), "truth": float(truly_right[row])}
                scores[name].append(score)
    rows = tuple(_row(name, found) for name, found in scores.items() if found)
    with_success = [row for row in rows if row.success is not None]
    return EvaluationReport(
        rows=rows,
        psnr_db=_mean([row.psnr_db for row in rows]),
        undone=_mean([row.undone for row in rows]),
        mre=_mean([row.mre for row in rows]),
        success=_mean([row.success for row in with_success if row.success is not None]) if with_success else None,
        truth_success=_mean([r.truth_success for r in with_success if r.truth_success is not None])
        if with_success
        else None,
        reconstruction_psnr_db=_mean(reconstructions),
        people=len(data),
        size_px=data.config.size_px,
        skipped=skipped,
    )


def _flip(attributes: Tensor, name: str) -> Tensor:
    """Difference (13,) of one flipped attribute and of what it excludes."""
    column = MAGGAN.index(name)
    if attributes[column] > 0.5:
        return -F.one_hot(torch.tensor(column), len(MAGGAN)).float()
    return resolve_conflicts(attributes, name) - attributes


def _confirmed(classify: Classify | None, image: Tensor, flip: Tensor) -> Tensor | None:
    """N booleans: the classifier sees the flipped bit as asked (threshold 0.5)."""
    if classify is None:
        return None
    seen = classify(image).cpu() > 0.5
    return ((seen == (flip > 0)) & (flip != 0)).any(dim=1)


def undone(image: Tensor, source: Tensor, truth: Tensor, region: Tensor) -> Tensor:
    """What of each true change is missing or wrong, N values; see `AttributeScore`."""
    moved = region * moved_pixels(source, truth)
    error, change = ((moved * (other - truth).abs()).sum(dim=(1, 2, 3)) for other in (image, source))
    return error / change.clamp_min(1e-6)


def _row(name: str, found: list[dict[str, float]]) -> AttributeScore:
    means = {key: _mean([score[key] for score in found]) for key in found[0]}
    return AttributeScore(
        attribute=name,
        count=len(found),
        psnr_db=means["psnr"],
        unchanged_psnr_db=means["unchanged"],
        undone=means["undone"],
        mre=means["mre"],
        success=means.get("success"),
        truth_success=means.get("truth"),
    )


def classify_with(network: nn.Module, names: Sequence[str], size_px: int) -> Classify:
    """Probabilities of MAGGAN's 13 attributes by a classifier whose outputs are `names` on size_px² images.

    Raises: UsageError when `names` lack one of the 13.
    """
    if missing := [name for name in MAGGAN if name not in names]:
        raise UsageError(
            f"classify_with: names must hold MagGAN's attributes, got none of {', '.join(missing)}; name another"
        )
    columns = [list(names).index(name) for name in MAGGAN]
    network = network.eval()
    device = next(network.parameters()).device

    @torch.no_grad()
    def classify(image: Tensor) -> Tensor:
        resized = F.interpolate(
            image.to(device), size=(size_px, size_px), mode="bilinear", antialias=True, align_corners=False
        )
        return network(resized).float().sigmoid()[:, columns]

    return classify


def load_classify(weights: str) -> Classify:
    """A classifier of the registry (or a file) for `evaluate_editor`.

    Raises: UnknownNameError or WeightsError without it, or for weights of another kind; UsageError when it does not
            know MagGAN's attributes.
    """
    from faceedit.registry import load_network

    network: Any = load_network(weights, kind="attribute-classifier")
    return classify_with(network, network.config.attributes, network.config.size_px)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's first lines. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m faceedit.training.evaluation", description=__doc__)
    parser.add_argument("weights", help="generator: a registry name or a .safetensors file")
    parser.add_argument("--classifier", default=STARTER, help="judge of edit success, trained apart")
    parser.add_argument("--people", type=int, default=96)
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(chosen))


def _evaluate(chosen: argparse.Namespace) -> str:
    from faceedit.registry import load_network

    require_option("evaluation", "--people", chosen.people, 1, "the published scores have 96")
    require_folder("evaluation", "--output", chosen.output)
    network: Any = load_network(chosen.weights, kind="maggan")
    classify = load_classify(chosen.classifier)
    data = SyntheticPortraits(thirteen_flips(chosen.people, network.config.size_px), "test", progress)
    report = evaluate_editor(network, data, classify)
    report.write(chosen.output)
    return report.markdown()


if __name__ == "__main__":
    sys.exit(main())
