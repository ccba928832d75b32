# SPDX-License-Identifier: Apache-2.0
"""Benchmark rows: op x shape x dtype x pass, one provider a row.

Run: OMP_WAIT_POLICY=passive THP_MEM_ALLOC_ENABLE=1 pytest tests/benchmarks --benchmark-enable
A file supplies inputs and an op; `row` gives every provider the same treatment: it is checked against eager before it
is timed, and a wrong answer is a failure, not a row. Under plain `pytest` each row runs once, on small shapes.
"""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.compare import assert_close
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import native

PROVIDERS = ("eager", "compile", "cpu", "cuda", "triton")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(params=PROVIDERS)
def provider(request: pytest.FixtureRequest, device: str) -> str:
    """A way to run an op; the ones this machine lacks are skipped with the reason."""
    name: str = request.param
    if name == "cpu" and (device != "cpu" or not native.build_report()["cpp"]):
        pytest.skip(native.MISSING_REASON or "the C++ kernels run CPU tensors")
    if name in ("cuda", "triton") and device != "cuda":
        pytest.skip("no CUDA device was found")
    if name == "compile" and not request.config.getoption("benchmark_enable"):
        pytest.skip("torch.compile takes a minute; timed runs only (--benchmark-enable)")
    return name


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def full_size(request: pytest.FixtureRequest) -> bool:
    """Whether to use the shapes of the table, or small ones because nothing is timed."""
    return bool(request.config.getoption("benchmark_enable"))


def _under(provider: str, op: Callable[..., Tensor], reference: Callable[..., Tensor]) -> Callable[..., Tensor]:
    if provider == "eager":
        return reference
    if provider == "compile":
        torch._dynamo.reset()  # past the recompile limit later rows would silently time eager
        return torch.compile(reference, fullgraph=True)

    def run(*tensors: Tensor) -> Tensor:
        with kernels.backend(provider):
            return op(*tensors)

    return run


@pytest.fixture
def row(provider: str, benchmark: Any, device: str) -> Callable[..., None]:
    """Check one provider against eager and time it, forward or forward and backward."""

    def time_row(
        group: str,
        op: Callable[..., Tensor],
        reference: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        moved_bytes: int,
        backward: bool,
    ) -> None:
        leaves = [t.detach().to(device).requires_grad_(backward) for t in inputs]
        weights: list[Tensor] = []

        def step(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
            y = function(*leaves)
            if not backward:
                return (y,)
            weights[:] = weights or [torch.ones_like(y)]
            return y, *torch.autograd.grad(y, leaves, weights[0])

        function = _under(provider, op, reference)
        tolerance = TOLERANCE[inputs[0].dtype]
        for index, (actual, expected) in enumerate(zip(step(function), step(reference), strict=True)):
            assert_close(f"result {index} of {provider}", actual, expected, relative_l2=tolerance)

        def timed() -> None:
            step(function)
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{group}/{'forward+backward' if backward else 'forward'}"
        benchmark.extra_info |= {
            "provider": provider,
            "moved_bytes": moved_bytes,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "isa": native.build_report()["isa"],
        }
        benchmark(timed)

    return time_row
