# SPDX-License-Identifier: Apache-2.0
"""Time whole edits in several formulations on the same weights and images; plain records, one a row.

Every row makes the same edit twice. The first one pays for what a process pays once (algorithms chosen, kernels
compiled), the second one is timed; capturing graphs is part of both, as of every edit. The mean latent is estimated
before the first row.

The public formulation is `PublicGenerator` with parser and classifier as published (batch normalisation by itself,
NCHW) and every loss in its plain PyTorch composition. Schedule and optimiser are this library's: the further parser
passes that the released code makes while masks follow are not made, to that row's advantage.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import torch

from faceedit.kernels import backend
from faceedit.kernels.benchmarking.providers import without_tf32
from faceedit.maskfacegan.benchmark_networks import BenchmarkNetworks, build
from faceedit.maskfacegan.config import MaskFaceGANConfig
from faceedit.maskfacegan.networks import mean_latent
from faceedit.maskfacegan.optimizer import optimize
from faceedit.maskfacegan.outcome import EditOutcome, OptimizationError
from faceedit.maskfacegan.plan import make_plan

Record = dict[str, Any]

DEFAULT = MaskFaceGANConfig()
FULL_STEPS = DEFAULT.latent_steps + DEFAULT.noise_steps
LEAST_STEPS = 4
REFERENCE, PUBLIC = "fp32-eager", "public"


@dataclass(frozen=True, slots=True)
class Formulation:
    """One way to compute an edit. is_strict: without TF32; otherwise as the process has it."""

    about: str
    precision: Literal["float32", "bfloat16"] = "float32"
    graph: bool = False
    is_public: bool = False
    is_strict: bool = False


FORMULATIONS: Mapping[str, Formulation] = MappingProxyType(
    {
        "bf16-graph": Formulation("this library, bfloat16, CUDA graph", "bfloat16", graph=True),
        PUBLIC: Formulation("the public implementations' formulation, float32, no graph", is_public=True),
        REFERENCE: Formulation("this library, float32 without TF32, no graph", is_strict=True),
        "fp32-graph": Formulation("this library, float32, CUDA graph", graph=True),
    }
)
"""By the row's name, in the order of measuring: what a killed run should have comes first."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Which rows to measure. steps, of both stages together; public_steps, of the public formulation's rows."""

    size_px: int = 1024
    batches: Sequence[int] = (1, 8)
    attributes: Sequence[str] = ("Smiling", "Wavy_Hair")
    rows: Sequence[str] = tuple(FORMULATIONS)
    steps: int = FULL_STEPS
    public_steps: int = 150
    seed: int = 0

    def cases(self) -> list[tuple[int, str, str]]:
        """Batch, row and attribute of each record."""
        rows = [name for name in FORMULATIONS if name in self.rows]
        return [(batch, row, name) for batch in self.batches for row in rows for name in self.attributes]


def shortened(steps: int) -> MaskFaceGANConfig:
    """The default schedule with both stages, and every start within them, cut down to `steps` of `FULL_STEPS`."""
    share = steps / FULL_STEPS
    latent_steps = max(1, round(DEFAULT.latent_steps * share))
    return replace(
        DEFAULT,
        latent_steps=latent_steps,
        noise_steps=steps - latent_steps,
        semantic_start=int(DEFAULT.semantic_start * share),
        dynamic_stop=int(DEFAULT.dynamic_stop * share),
        noise_start=int(DEFAULT.noise_start * share),
        encoder_start=int(DEFAULT.encoder_start * share),
    )


def measure(settings: Settings, device: torch.device) -> Iterator[Record]:
    """Yield a record a row. One that fails has the status "failed" and a reason, and the next ones are measured."""
    networks = build(settings.size_px, max(settings.batches), settings.seed, device)
    mean_latent(networks.ours.generator.mapping, DEFAULT.mean_samples)
    for batch, row, attribute in settings.cases():
        form = FORMULATIONS[row]
        steps = settings.public_steps if form.is_public else settings.steps
        record = {
            "attribute": attribute,
            "batch": batch,
            "row": row,
            "about": form.about,
            "precision": form.precision,
            "graph": form.graph and device.type == "cuda",
            "steps": steps,
            "full_steps": FULL_STEPS,
            "is_extrapolated": steps != FULL_STEPS,
        }
        try:
            measured = _measure_row(networks, form, attribute, batch, steps, settings.seed, device)
        except Exception as failure:  # a row that fails says so; the others are still measured
            reason = " ".join(str(failure).split())[:300]
            measured = {"status": "failed", "reason": f"{type(failure).__name__}: {reason}"}
        yield record | measured


def _measure_row(
    networks: BenchmarkNetworks,
    form: Formulation,
    attribute: str,
    batch: int,
    steps: int,
    seed: int,
    device: torch.device,
) -> Record:
    config = replace(shortened(steps), precision=form.precision, cuda_graph=form.graph)
    plans = [make_plan({attribute: 1.0}, config=config)] * batch
    chosen = networks.public if form.is_public else networks.ours
    sources = networks.sources[:batch]
    memory: Record = {}

    def edit() -> tuple[float, list[EditOutcome]]:
        began = time.perf_counter()
        results = optimize(chosen, sources, plans, config, seed=seed, batch=batch)
        _synchronize(device)
        seconds = time.perf_counter() - began
        return seconds, [_made(result) for result in results]

    with contextlib.ExitStack() as stack:
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        if form.is_public:
            stack.enter_context(backend("eager"))
        if form.is_strict:
            stack.enter_context(without_tf32())
        _release(device)
        first_seconds = edit()[0]
        _release(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            memory["held_bytes"] = torch.cuda.memory_allocated(device)
        seconds, outcomes = edit()
        if device.type == "cuda":
            memory["peak_bytes"] = torch.cuda.max_memory_allocated(device)
            memory["reserved_bytes"] = torch.cuda.max_memory_reserved(device)
    one = outcomes[0]
    stages = dict(one.seconds)
    stages["other"] = seconds - sum(stages.values())
    full = {"latent": DEFAULT.latent_steps, "noise": DEFAULT.noise_steps}
    each = {stage: stages[stage] / one.iterations[stage] for stage in full}
    full_seconds = sum(each[stage] * count for stage, count in full.items()) + stages["blend"] + stages["other"]
    return {
        "status": "ok",
        "seconds": seconds,
        "first_seconds": first_seconds,
        "stage_seconds": stages,
        "ms_per_iteration": {stage: 1e3 * value for stage, value in each.items()},
        "seconds_of_full_edit": full_seconds if steps != FULL_STEPS else seconds,
        "held_bytes": None,
        "peak_bytes": None,
        "reserved_bytes": None,
        "losses": {term: [outcome.losses[term] for outcome in outcomes] for term in one.losses},
    } | memory


def _made(result: EditOutcome | OptimizationError) -> EditOutcome:
    if isinstance(result, OptimizationError):
        raise result
    if result.held_from >= 0:
        raise OptimizationError(
            f"maskfacegan: the noise stage must stay finite, got NaN or infinity at iteration {result.held_from}; "
            "the time is not that of an edit"
        )
    return result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release(device: torch.device) -> None:
    """Give memory of rows before back, so that no row is measured with another one's."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def compare(records: Sequence[Record]) -> list[Record]:
    """The records, each with what it is beside the others of its attribute and batch.

    deviation: of the last value of each term from `REFERENCE`'s after as many steps, relative, the worst of the batch;
    None without such a row. ratio_to_public: how many times faster a full edit is than `PUBLIC`'s, or None;
    ratio_is_extrapolated where either of the two was measured over fewer steps.
    """
    return [
        record
        | {"deviation": _deviation(record, _fellow(records, record, REFERENCE))}
        | _ratio(record, _fellow(records, record, PUBLIC))
        for record in records
    ]


def _fellow(records: Iterable[Record], record: Record, row: str) -> Record | None:
    """The row of that name of the same edit, where both were measured."""
    if record["status"] != "ok":
        return None
    key = ("attribute", "batch")
    same = (r for r in records if r["status"] == "ok" and r["row"] == row and all(r[k] == record[k] for k in key))
    return next(same, None)


def _deviation(record: Record, reference: Record | None) -> dict[str, float] | None:
    if reference is None or reference is record or reference["steps"] != record["steps"]:
        return None
    return {
        term: max(abs(a - b) / max(abs(b), 1e-12) for a, b in zip(values, reference["losses"][term], strict=True))
        for term, values in record["losses"].items()
    }


def _ratio(record: Record, public: Record | None) -> Record:
    if public is None or public is record:
        return {"ratio_to_public": None, "ratio_is_extrapolated": False}
    return {
        "ratio_to_public": public["seconds_of_full_edit"] / record["seconds_of_full_edit"],
        "ratio_is_extrapolated": record["is_extrapolated"] or public["is_extrapolated"],
    }


# What a person reads

_HEADER = (
    f"{'attribute':<20} {'batch':>5} {'row':<11} {'graph':<5} {'steps':>5} {'seconds':>8} {'first s':>8} "
    f"{'latent ms':>9} {'noise ms':>9} {'peak MB':>8} {'s a full edit':>13} {'s an image':>10}"
)


def introduction(description: Mapping[str, Any], settings: Settings) -> Iterator[str]:
    """Yield what the table was measured on and what its columns are."""
    machine = description["gpu"].get("name") or description["processor"]
    revision = description["commit"][:12] or "unknown"
    yield f"{machine}, {description['threads']} threads, torch {description['torch']}, commit {revision}"
    if "tf32" in description["gpu"]:
        yield f"TF32 unless a row says otherwise: {description['gpu']['tf32']}"
    yield f"generator of {settings.size_px} px, random weights (seed {settings.seed}); edits of {FULL_STEPS} steps"
    yield from (f"{name}: {FORMULATIONS[name].about}" for name in FORMULATIONS if name in settings.rows)
    if not description["gpu"]:
        yield "no CUDA device: every row runs without a graph, and no peak memory is read"
    yield "seconds: the second edit of a row, all its images; first s: the first one. latent, noise ms: an iteration."
    yield f"extrapolated: fewer than {FULL_STEPS} steps were run; the full edit's seconds follow from an iteration's."
    yield _HEADER


def line(record: Record) -> str:
    """One record as a line of the table."""
    start = (
        f"{record['attribute']:<20} {record['batch']:>5} {record['row']:<11} {'yes' if record['graph'] else 'no':<5} "
        f"{record['steps']:>5}"
    )
    if record["status"] != "ok":
        return f"{start} {record['status'].upper()}: {record['reason']}"
    peak = "-" if record["peak_bytes"] is None else f"{record['peak_bytes'] / 1e6:.0f}"
    each, full = record["ms_per_iteration"], record["seconds_of_full_edit"]
    return (
        f"{start} {record['seconds']:>8.3f} {record['first_seconds']:>8.3f} {each['latent']:>9.3f} "
        f"{each['noise']:>9.3f} {peak:>8} {full:>13.3f} {full / record['batch']:>10.3f}"
        f"{' extrapolated' if record['is_extrapolated'] else ''}"
    )


def summary(records: Iterable[Record]) -> Iterator[str]:
    """Yield what `compare` found, a line a row."""
    yield ""
    yield f"beside the other rows (final losses: relative to {REFERENCE}'s after as many steps, worst of the batch):"
    for record in records:
        if record["status"] != "ok":
            continue
        text = f"{record['attribute']:<20} {record['batch']:>5} {record['row']:<11}"
        if record["ratio_to_public"] is not None:
            text += f" {record['ratio_to_public']:.2f}x {PUBLIC}"
            text += " (extrapolated)" if record["ratio_is_extrapolated"] else ""
        if record["deviation"] is not None:
            text += " losses " + ", ".join(f"{term} {value:.2%}" for term, value in record["deviation"].items())
        yield text
