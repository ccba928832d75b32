# SPDX-License-Identifier: Apache-2.0
"""What MaskFaceGAN's noise stage and shape term are worth: the paper's Table VI in shape, on synthetic portraits.

python -m faceedit.training.maskfacegan_ablation bundle.json --people 48 --output report/

Three variants edit the same people: the latent code alone without the shape term, with noise optimisation, with the
shape term as well. Each local attribute is inverted where a person has it, as in the paper. FID is between the edited
and the unedited pictures of one attribute, averaged over attributes, in the features of the network that the report
names; the paper's is Inception's, so with another only the order of the rows compares.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faceedit.alignment import PORTRAIT_SCALE
from faceedit.attributes import MASKFACEGAN_LOCAL
from faceedit.config import without_infinities
from faceedit.errors import UsageError
from faceedit.labels import MASKFACEGAN
from faceedit.maskfacegan.bundle import load_networks, read_bundle
from faceedit.maskfacegan.config import PRESETS, MaskFaceGANConfig
from faceedit.maskfacegan.masks import MissingRegionError, check_regions
from faceedit.maskfacegan.networks import Networks
from faceedit.maskfacegan.optimizer import optimize
from faceedit.maskfacegan.outcome import EditOutcome
from faceedit.maskfacegan.plan import EditPlan, make_plan
from faceedit.networks.resizing import resize
from faceedit.training import cache
from faceedit.training.aligned import framed_portraits
from faceedit.training.command import progress, require_folder, require_option, run_command
from faceedit.training.data import SPLIT_SEEDS
from faceedit.training.fid import FID, FeatureNetwork, feature_network
from faceedit.training.synthetic import sample_parameters

VARIANTS = ("latent code alone", "+ noise optimisation", "+ shape term")
_MIN_PEOPLE = 2  # a covariance needs two
_FEATURE_BATCH = 32


@dataclass(frozen=True, slots=True)
class VariantScore:
    """One row of the table: means over attributes.

    fid: lower is better.  success: share of edits whose attribute the editing classifier sees as asked.
    skin_psnr_db: I_G against the input where skin is kept.  hair_iou: outline of the hair of I_G against the input's,
    over hair edits; nan without one.
    """

    variant: str
    fid: float
    success: float
    skin_psnr_db: float
    hair_iou: float
    edits: int


@dataclass(frozen=True, slots=True)
class AblationReport:
    """Rows in the paper's order, and what they were measured with. fid_by_attribute: one list a variant; features: the
    network that FID compares images by."""

    rows: tuple[VariantScore, ...]
    attributes: tuple[str, ...]
    fid_by_attribute: dict[str, list[float]]
    people: int
    skipped: int
    features: str

    def markdown(self) -> str:
        """The table, as in the paper, with what else was measured."""
        lines = [
            "| MaskFaceGAN variant | FID | edit success | kept skin (dB) | hair outline (IoU) |",
            "|---|---|---|---|---|",
        ]
        for row in self.rows:
            hair = "–" if math.isnan(row.hair_iou) else f"{row.hair_iou:.3f}"
            lines.append(f"| {row.variant} | {row.fid:.2f} | {row.success:.1%} | {row.skin_psnr_db:.2f} | {hair} |")
        lines += [
            "",
            f"{self.people} synthetic people, {', '.join(self.attributes)}; {self.skipped} edits skipped because their "
            f"region is not in the picture. FID in the features of {self.features}.",
        ]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> None:
        """ablation.json, with null for nan, and ablation.md."""
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps(without_infinities(asdict(self)), indent=1, allow_nan=False)
        (folder / "ablation.json").write_text(text + "\n")
        (folder / "ablation.md").write_text(self.markdown())


def variant_configs(config: MaskFaceGANConfig) -> dict[str, MaskFaceGANConfig]:
    """The three variants of Table VI of a configuration: its last row is the configuration itself."""
    no_shape = replace(config, shape_weight=0.0)
    return dict(
        zip(
            VARIANTS,
            (replace(no_shape, noise_start=config.latent_steps, noise_steps=0), no_shape, config),
            strict=True,
        )
    )


def run_ablation(
    networks: Networks,
    images: Tensor,
    attributes: Sequence[str],
    config: MaskFaceGANConfig,
    features: FeatureNetwork,
    *,
    batch: int = 8,
    seed: int = 0,
    report: Callable[[str], Any] = print,
) -> AblationReport:
    """Edit images (N,3,S,S) in [-1, 1] at the generator's size with every variant.

    Args:   attributes, local ones that the classifier knows; features, what FID compares images by; batch, edits that
            run together.
    Raises: UsageError for fewer than two images, or when no attribute is left to edit.
    """
    if len(images) < _MIN_PEOPLE:
        raise UsageError(f"run_ablation: images must be two or more, got {len(images)}; a covariance needs them")
    images = images.to(networks.device)
    with torch.no_grad():
        parsed = torch.cat([networks.parser(image) for image in images.split(1)])
        has = torch.cat([networks.classifier.select(attributes)(image) for image in images.split(1)]) > 0
    wanted = ~has  # inverted: what a person has is taken away
    fids: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    scores: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    edited_names: list[str] = []
    skipped = 0
    for column, name in enumerate(attributes):
        people = [p for p in range(len(images)) if _has_region(parsed[p : p + 1], name, config)]
        skipped += len(images) - len(people)
        if len(people) < _MIN_PEOPLE:
            continue
        edited_names.append(name)
        distance = FID(features, images[people].split(_FEATURE_BATCH))
        for variant, chosen in variant_configs(config).items():
            plans = [make_plan({name: float(wanted[p, column])}, config=chosen) for p in people]
            outcomes = optimize(networks, images[people], plans, chosen, seed=seed, batch=batch)
            kept = [
                (p, plan, o) for p, plan, o in zip(people, plans, outcomes, strict=True) if isinstance(o, EditOutcome)
            ]
            if len(kept) < _MIN_PEOPLE:
                raise UsageError(f"run_ablation: {name} must be editable, got NaN for most people; check the weights")
            made = torch.cat([o.image for _, _, o in kept])
            fids[variant].append(distance.of(made.split(_FEATURE_BATCH)).value)
            scores[variant] += [_score(networks, images[p : p + 1], parsed[p : p + 1], plan, o) for p, plan, o in kept]
            report(f"{name}, {variant}: FID {fids[variant][-1]:.2f}")
    if not edited_names:
        raise UsageError(
            f"run_ablation: attributes must have a region in the pictures, got {', '.join(attributes)}; "
            "use other people"
        )
    rows = tuple(
        VariantScore(
            variant,
            fid=_mean(fids[variant]),
            success=_mean([s["success"] for s in scores[variant]]),
            skin_psnr_db=_mean([s["psnr"] for s in scores[variant]]),
            hair_iou=_mean([s["iou"] for s in scores[variant] if not math.isnan(s["iou"])]),
            edits=len(scores[variant]),
        )
        for variant in VARIANTS
    )
    return AblationReport(rows, tuple(edited_names), fids, len(images), skipped, features.name)


def _has_region(parsed: Tensor, name: str, config: MaskFaceGANConfig) -> bool:
    try:
        check_regions(parsed, [make_plan({name: 1.0}, config=config)], config)
    except MissingRegionError:
        return False
    return True


@torch.no_grad()
def _score(networks: Networks, image: Tensor, parsed: Tensor, plan: EditPlan, outcome: EditOutcome) -> dict[str, float]:
    (name, asked), *_ = plan.values.items()
    seen = networks.classifier.select([name])(outcome.image)[0, 0] > 0
    now = networks.parser(outcome.generated)
    skin, hair = MASKFACEGAN.id("skin"), MASKFACEGAN.id("hair")
    kept = resize(torch.minimum(parsed, now)[:, skin : skin + 1], image.shape[-1])
    error = (kept * (outcome.generated - image).square()).sum() / (3 * kept.sum()).clamp_min(1e-6)
    before, after = parsed[:, hair], now[:, hair]
    union = torch.maximum(before, after).sum()
    is_hair = "hair" in plan.target
    return {
        "success": float(bool(seen) == (asked > 0.5)),
        "psnr": float(10 * torch.log10(4 / error.clamp_min(1e-10))),
        "iou": float(torch.minimum(before, after).sum() / union.clamp_min(1e-6)) if is_hair else math.nan,
    }


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: see the module's first lines. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m faceedit.training.maskfacegan_ablation", description=__doc__)
    parser.add_argument("weights", nargs="?", default="starter", help="starter, a bundle (.json) or a generator")
    parser.add_argument("--preset", default="default", choices=sorted(PRESETS))
    parser.add_argument("--people", type=int, default=16)
    parser.add_argument(
        "--attributes", default="", help="comma separated; default: every local one the classifier knows"
    )
    parser.add_argument("--network", default="auto", help='of FID: "auto", "inception-v3" or classifier weights')
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    chosen = parser.parse_args(arguments)
    return run_command(lambda: _evaluate(chosen))


def _evaluate(chosen: argparse.Namespace) -> str:
    from faceedit.devices import resolve_device

    require_option("maskfacegan_ablation", "--people", chosen.people, _MIN_PEOPLE, "a covariance needs them")
    require_option("maskfacegan_ablation", "--batch", chosen.batch, 1, "it is how many edits run together")
    require_folder("maskfacegan_ablation", "--output", chosen.output)
    device = resolve_device(chosen.device)
    bundle = read_bundle(chosen.weights)
    networks, config = load_networks(bundle, device), bundle.configuration(chosen.preset)
    features = feature_network(chosen.network, device)
    known = [name for name in MASKFACEGAN_LOCAL if name in networks.classifier.known]
    names = chosen.attributes.split(",") if chosen.attributes else known
    people = sample_parameters(chosen.people, SPLIT_SEEDS["test"] + chosen.seed)
    enlarged = 1.0 if bundle.framing == "ffhq" else PORTRAIT_SCALE
    images = cache.unpack_image(framed_portraits(people, networks.generator.config.size_px, enlarged))
    report = run_ablation(
        networks, images, names, config, features, batch=chosen.batch, seed=chosen.seed, report=progress
    )
    report.write(chosen.output)
    return report.markdown()


if __name__ == "__main__":
    sys.exit(main())
