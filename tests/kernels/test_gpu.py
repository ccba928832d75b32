# SPDX-License-Identifier: Apache-2.0
"""What only a GPU shows: streams, devices, and every op inside a CUDA graph. tests/gpu.sh runs these with the rest."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from faceedit import kernels
from faceedit.kernels.benchmarking import SMALL, benchmarks
from faceedit.kernels.benchmarking.case import PASSES
from faceedit.kernels.benchmarking.providers import Step, missing, step
from faceedit.kernels.benchmarking.timing import graph_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found"),
]

BENCHMARKS = benchmarks()
ROWS = [
    pytest.param(op, dtype, provider, name, id=f"{op}-{str(dtype).removeprefix('torch.')}-{provider}-{name}")
    for op, benchmark in BENCHMARKS.items()
    for dtype in benchmark.dtypes
    for provider in ("cuda", "triton")
    for name in PASSES
]
rows = pytest.mark.parametrize(("op", "dtype", "provider", "name"), ROWS)


def call_of(op: str, dtype: torch.dtype, provider: str, name: str, device: str = "cuda") -> Step:
    if reason := missing(provider, "cuda"):
        pytest.skip(reason)
    case = BENCHMARKS[op].case(SMALL, dtype)
    backward = name != PASSES[0]
    if name not in case.passes or (backward and not case.differentiable()):
        pytest.skip("this case has no such pass")
    return step(case, provider, device, backward)


def same_bits(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> bool:
    """Whether the tensors are equal, wherever they lie. Every kernel is deterministic."""
    return len(actual) == len(expected) and all(
        torch.equal(a.detach().cpu(), e.detach().cpu()) for a, e in zip(actual, expected, strict=True)
    )


@rows
def test_a_captured_graph_follows_its_inputs(op: str, dtype: torch.dtype, provider: str, name: str) -> None:
    """Capture fails on a synchronisation or a copy from the host; a replay must read all but frozen inputs anew."""
    captured, plain = call_of(op, dtype, provider, name), call_of(op, dtype, provider, name)
    replay, frozen = graph_of(captured), BENCHMARKS[op].case(SMALL, dtype).frozen
    for scale in (1.0, 0.5, 0.75):  # targets and masks stay in [0, 1]
        with torch.no_grad():
            # A fresh case's inputs: an op may work in place.
            fresh = call_of(op, dtype, provider, name).inputs
            for index, (source, *targets) in enumerate(zip(fresh, captured.inputs, plain.inputs, strict=True)):
                for target in () if index in frozen else targets:
                    target.copy_(source * scale if source.is_floating_point() else source)
        results = replay()
        torch.cuda.synchronize()
        assert isinstance(results, tuple)
        assert same_bits(results, plain()), f"replay with inputs times {scale}"


@rows
def test_runs_on_the_current_stream(op: str, dtype: torch.dtype, provider: str, name: str) -> None:
    """On a side stream behind a long wait, a kernel launched elsewhere would read its inputs too early."""
    expected = call_of(op, dtype, provider, name)()
    call = call_of(op, dtype, provider, name)
    values = [t.detach().clone() for t in call.inputs]
    with torch.no_grad():
        for t in call.inputs:
            t.zero_()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)  # about ten milliseconds
        with torch.no_grad():
            for t, value in zip(call.inputs, values, strict=True):
                t.copy_(value)
        results = call()
    stream.synchronize()
    assert same_bits(results, expected)


@pytest.mark.parametrize("provider", ["cuda", "triton"])
def test_a_frozen_weight_serves_two_streams(provider: str) -> None:
    """What is made of it on one stream, behind a long wait, is ready on the other."""
    x, styles = torch.randn(1, 64, 32, 32, device="cuda"), torch.randn(1, 64, device="cuda")
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    with kernels.backend(provider):
        expected = kernels.modulated_conv2d(x, torch.ones(64, 64, 3, 3, device="cuda"), styles)
        for _ in range(3):
            weight = torch.ones(64, 64, 3, 3, device="cuda")
            torch.cuda.synchronize()
            with torch.cuda.stream(first):
                torch.cuda._sleep(20_000_000)
                kernels.modulated_conv2d(x, weight, styles)
            with torch.cuda.stream(second):
                found = kernels.modulated_conv2d(x, weight, styles)
            torch.cuda.synchronize()
            assert same_bits([found], [expected])


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="this machine has one CUDA device")
@rows
def test_runs_on_a_second_device(op: str, dtype: torch.dtype, provider: str, name: str) -> None:
    """While the first device is the current one."""
    torch.cuda.set_device(0)
    results = call_of(op, dtype, provider, name, "cuda:1")()
    assert torch.cuda.current_device() == 0
    assert all(t.device == torch.device("cuda", 1) for t in results)
    assert same_bits(results, call_of(op, dtype, provider, name)())
