# SPDX-License-Identifier: Apache-2.0
"""The kernels' cases, measured one provider at a time by pytest-benchmark, or once on small shapes without times.

OMP_WAIT_POLICY=passive THP_MEM_ALLOC_ENABLE=1 pytest tests/benchmarks --benchmark-enable -k noise_bias_act
`faceedit bench kernels` measures the same cases interleaved, which ratios need; this suite keeps histories.
"""

from typing import Any

import pytest
import torch

from faceedit.kernels.benchmarking import SMALL, benchmarks
from faceedit.kernels.benchmarking.case import PASSES
from faceedit.kernels.benchmarking.providers import PROVIDERS, check, missing, step, without_tf32
from faceedit.kernels.benchmarking.suite import Settings, run_layer

BENCHMARKS = benchmarks()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = [(op, dtype) for op, benchmark in BENCHMARKS.items() for dtype in benchmark.dtypes]
# torch.compile takes a minute a case.
QUICK_PROVIDERS = tuple(name for name in PROVIDERS if name != "compile")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    timing = metafunc.config.getoption("benchmark_enable")
    if metafunc.function is test_small_shapes_agree:
        metafunc.parametrize(("op", "dtype"), [] if timing else CASES, ids=str)
    elif metafunc.function is test_speed:
        rows = [
            pytest.param(op, layer, dtype, name, provider, id=f"{op}/{layer}/{dtype}/{name}-{provider}")
            for op, dtype in (CASES if timing else ())
            for layer in BENCHMARKS[op].layers
            for name in PASSES
            for provider in PROVIDERS
        ]
        metafunc.parametrize(("op", "layer", "dtype", "name", "provider"), rows)


def test_small_shapes_agree(op: str, dtype: torch.dtype) -> None:
    """Every provider that runs here gives the baseline's results, in every pass."""
    settings = Settings(DEVICE, QUICK_PROVIDERS, rounds=0)
    records = list(run_layer(BENCHMARKS[op], SMALL, dtype, settings))
    assert {record["provider"] for record in records} >= set(settings.runnable())
    assert {r["provider"]: r["reason"] for r in records if r["status"] != "ok"} == {}


def test_speed(op: str, layer: str, dtype: torch.dtype, name: str, provider: str, benchmark: Any) -> None:
    if reason := missing(provider, DEVICE):
        pytest.skip(reason)
    case = BENCHMARKS[op].case(layer, dtype)
    backward = name != PASSES[0]
    if name not in case.passes or (backward and not case.differentiable()):
        pytest.skip("this case has no such pass")
    call = step(case, provider, DEVICE, backward)
    with without_tf32():
        check(case, provider, call, step(case, case.baseline, DEVICE, backward)())
    benchmark.group = f"{op}/{layer}/{dtype}/{name}"
    benchmark.extra_info |= {"provider": provider, "moved_bytes": case.moved[backward], "flops": case.flops[backward]}

    def timed() -> None:
        call()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(timed)
