# SPDX-License-Identifier: Apache-2.0
"""Run cases and return plain records, one a provider and row."""

import json
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels.benchmarking.case import PASSES, Benchmark, Case
from faceedit.kernels.benchmarking.providers import (
    BACKEND,
    Step,
    WrongResultError,
    check,
    missing,
    step,
    without_tf32,
)
from faceedit.kernels.benchmarking.timing import CpuClock, CudaClock, Spread, graph_of, interleave, ratio
from faceedit.kernels.tensors import reused


@dataclass(frozen=True, slots=True)
class Settings:
    """What to measure, and how long. `rounds` 0 only compares results and times nothing."""

    device: str = "cpu"
    providers: Sequence[str] = ("eager", "compile", "cpp", "cuda", "triton")
    passes: Sequence[str] = PASSES
    rounds: int = 15
    seconds: float = 1.0

    def runnable(self) -> list[str]:
        """Return the providers that can run here."""
        return [name for name in self.providers if not missing(name, self.device)]


def run_layer(benchmark: Benchmark, layer: str, dtype: torch.dtype, settings: Settings) -> Iterator[dict[str, Any]]:
    """Yield a record a pass and provider: the baseline first, then its challengers."""
    case = benchmark.case(layer, dtype)
    for index, name in enumerate(PASSES):
        if name not in settings.passes or name not in case.passes or (index and not case.differentiable()):
            continue
        row = {"op": benchmark.op, "layer": layer, "dtype": str(dtype).removeprefix("torch."), "pass": name}
        for record in _run_pass(case, index, settings):
            if benchmark.bare and "median_s" in record and settings.device == "cpu" and record["provider"] in BACKEND:
                bare = _bare_seconds(benchmark, layer, dtype, record["provider"], bool(index), settings)
                record["overhead_share"] = bare / record["median_s"]
            yield row | record


def _bare_seconds(
    benchmark: Benchmark, layer: str, dtype: torch.dtype, provider: str, backward: bool, settings: Settings
) -> float:
    """What a step of the layer takes without arithmetic: Python, dispatch, autograd's bookkeeping.

    From above, since the small layers multiply a little too.
    """
    assert benchmark.bare is not None
    parts = benchmark.bare(*benchmark.arguments(layer))
    steps = {
        str(i): step(benchmark.build(*arguments, dtype), provider, settings.device, backward)
        for i, (arguments, _) in enumerate(parts)
    }
    times = interleave(steps, CpuClock(), settings.rounds, min(settings.seconds, 1.0))
    return sum(factor * statistics.median(times[str(i)]) for i, (_, factor) in enumerate(parts))


def _run_pass(case: Case, index: int, settings: Settings) -> Iterator[dict[str, Any]]:
    backward = bool(index)
    names = [case.baseline, *case.others, *settings.runnable()]
    names = [name for i, name in enumerate(names) if name not in names[:i]]
    steps: dict[str, Step] = {}
    records: dict[str, dict[str, Any]] = {}
    with without_tf32():
        expected = step(case, case.baseline, settings.device, backward)()
    for name in names:
        made = step(case, name, settings.device, backward)
        try:
            with without_tf32():
                error = check(case, name, made, expected)
        except WrongResultError as failure:
            records[name] = {"status": "wrong", "reason": str(failure)}
        except Exception as failure:  # a provider that fails is a row that says so; the others are still measured
            reason = f"{type(failure).__name__}: {' '.join(str(failure).split())[:300]}"
            records[name] = {"status": "failed", "reason": reason}
        else:
            steps[name] = made
            records[name] = {"status": "ok", "relative_error": error}
    if settings.rounds and case.baseline in steps:
        _time(case, index, settings, steps, records)
    for name in names:
        yield {"provider": name, "is_baseline": name == case.baseline} | records[name]


def _time(
    case: Case, index: int, settings: Settings, steps: dict[str, Step], records: dict[str, dict[str, Any]]
) -> None:
    for _ in range(2):  # compiled code may still specialise in its second call
        for call in steps.values():
            call()
    clock = CudaClock() if settings.device == "cuda" else CpuClock()
    times = interleave(steps, clock, settings.rounds, settings.seconds)
    for name, seconds in times.items():
        spread = Spread.of(seconds)
        records[name] |= {
            "rounds": len(seconds),
            "median_s": spread.median,
            "q1_s": spread.q1,
            "q3_s": spread.q3,
            "min_s": min(seconds),
            "p90_s": sorted(seconds)[int(0.9 * (len(seconds) - 1))],
            "ratio": ratio(times[case.baseline], seconds),
            "ratio_to_compile": ratio(times["compile"], seconds) if "compile" in times else None,
            "moved_bytes": case.moved[index],
            "flops": case.flops[index],
            "bytes_per_s": case.moved[index] / spread.median,
            "flops_per_s": case.flops[index] / spread.median,
            "peak_bytes": peak_memory(steps[name], settings.device),
        }
        if settings.device == "cuda":
            records[name] |= _other_columns(steps[name])
        elif name in BACKEND:
            records[name]["reused_s"] = _reused(steps[name])


def _reused(call: Step) -> float:
    """Time one provider on the CPU whose ops write where their last call wrote: no page is new to the process."""
    clock = CpuClock()
    kept: list[Tensor] = []

    def repeated() -> object:
        with reused(kept):
            return call()

    repeats = clock.repeats(repeated)
    return statistics.median(clock.sample(repeated, repeats) for _ in range(5))


def _other_columns(call: Step) -> dict[str, Any]:
    """Time one provider with warm caches, and as a CUDA graph with warm and with flushed ones."""
    warm, cold = CudaClock(cold=False), CudaClock()
    columns: dict[str, Any] = {"warm_s": statistics.median(warm.sample(call, warm.LAUNCHES) for _ in range(5))}
    try:
        replay = graph_of(call)
    except Exception as failure:  # what cannot be captured has no such column; the record says why
        torch.cuda.synchronize()
        return columns | {"graph_s": None, "graph_cold_s": None, "graph_reason": str(failure).splitlines()[0]}
    columns["graph_s"] = statistics.median(warm.sample(replay, warm.LAUNCHES) for _ in range(5))
    columns["graph_cold_s"] = statistics.median(cold.sample(replay, cold.LAUNCHES) for _ in range(5))
    return columns


def peak_memory(call: Step, device: str) -> int:
    """Return the most tensor memory that one call holds at once beyond its inputs, its results included."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        results = call()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    del results
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def summarise(records: Sequence[dict[str, Any]], benchmarks: dict[str, Benchmark]) -> list[dict[str, Any]]:
    """Return the median ratio over the layers, by op, dtype, pass and provider, beside the op's target."""
    groups: dict[tuple[str, str, str, str], list[dict[str, Any]]] = {}
    for record in records:
        if "ratio" in record and not record["is_baseline"]:
            key = (record["op"], record["dtype"], record["pass"], record["provider"])
            groups.setdefault(key, []).append(record)
    lines = []
    for (op, dtype, name, provider), rows in groups.items():
        target = benchmarks[op].target
        to_compile = [row["ratio_to_compile"]["median"] for row in rows if row["ratio_to_compile"]]
        lines.append({
            "op": op,
            "dtype": dtype,
            "pass": name,
            "provider": provider,
            "layers": len(rows),
            "ratio": statistics.median(row["ratio"]["median"] for row in rows),
            "ratio_of_minima": statistics.median(row["ratio"]["minima"] for row in rows),
            "ratio_to_compile": statistics.median(to_compile) if to_compile else None,
            "noisy_layers": sum(row["ratio"]["noisy"] for row in rows),
            "target": target.get(f"{name} {dtype}", target.get(name)) if provider == "cpp" else None,
        })  # fmt: skip
    return lines
