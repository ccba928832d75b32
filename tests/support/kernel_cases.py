# SPDX-License-Identifier: Apache-2.0
"""Backends, formats and tolerances of the parity matrix, and the fp64 comparison that every op's tests run.

A later op adds its own oracle and inputs and reuses these.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from support.compare import assert_close
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import native
from faceedit.kernels.tensors import poison

# Relative L2 against the float64 oracle: forward, gradients. fp32 differs by rounding alone; the half types by the
# rounding of the stored output, 2^-11 and 2^-8, and a gradient reads that rounded output or input.
TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.float16: (6e-4, 1.5e-3), torch.bfloat16: (4e-3, 8e-3)}
DTYPES = list(TOLERANCE)
FORMATS = [torch.contiguous_format, torch.channels_last]


@dataclass(frozen=True)
class Place:
    """Where a matrix row runs: a backend, its device, and for C++ the instruction set."""

    backend: str
    device: str = "cpu"
    isa: str = ""

    def __str__(self) -> str:
        return f"{self.backend}-{self.isa}" if self.isa else self.backend


def _places() -> list[object]:
    build = native.build_report()
    rows: list[object] = [pytest.param(Place("eager"), id="eager")]
    rows += [pytest.param(p, id=str(p)) for p in (Place("cpu", isa=isa) for isa in build["isas"])]
    if not build["cpp"]:
        skip = pytest.mark.skip(reason=f"native module is missing: {build['cpp_reason']}")
        rows.append(pytest.param(Place("cpu"), id="cpu", marks=skip))
    no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
    for name in ("cuda", "triton"):
        rows.append(pytest.param(Place(name, "cuda"), id=name, marks=[pytest.mark.gpu, no_gpu]))
    return rows


PLACES = _places()


def draw(*shape: int, seed: int, low: float | None = None) -> Tensor:
    """Return standard normal values, or uniform ones in [low, low + 1]."""
    generator = torch.Generator().manual_seed(seed)
    if low is None:
        return torch.randn(shape, generator=generator)
    return torch.rand(shape, generator=generator) + low


def run(
    place: Place, function: Callable[..., Tensor], inputs: Sequence[Tensor | None], seed_gradient: Tensor | None = None
) -> tuple[Tensor, list[Tensor | None]]:
    """Run `function` and its backward pass at `place`, outputs poisoned; return output and gradients."""
    leaves = [
        None if t is None else t.detach().clone(memory_format=torch.preserve_format).to(place.device) for t in inputs
    ]
    leaves = [t if t is None or not t.is_floating_point() else t.requires_grad_() for t in leaves]
    scope = native.isa(place.isa) if place.isa else kernels.backend("auto")
    with scope, kernels.backend(place.backend), poison() as guards:
        y = function(*leaves)
        assert guards.untouched(), "the forward pass wrote outside a buffer"
        wanted = [t for t in leaves if t is not None and t.requires_grad]
        weights = torch.ones_like(y) if seed_gradient is None else seed_gradient.to(y.device, y.dtype)
        found = iter(torch.autograd.grad(y, wanted, weights)) if y.requires_grad else iter(wanted)
        assert guards.untouched(), "the backward pass wrote outside a buffer"
    gradients = [next(found) if t is not None and t.requires_grad else None for t in leaves]
    return y, gradients


def check_against_oracle(
    place: Place,
    function: Callable[..., Tensor],
    oracle: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    names: Sequence[str],
    dtype: torch.dtype,
    seed: int = 99,
) -> Tensor:
    """Compare output and gradients of `function` at `place` with autograd of `oracle` in float64."""
    wide = [t if t is None or not t.is_floating_point() else t.double().requires_grad_() for t in inputs]
    expected = oracle(*wide)
    # Positive, so that no reduction cancels to a value made of rounding errors; rounded to the output's dtype, so that
    # both sides are given the same incoming gradient.
    weights = draw(*expected.shape, seed=seed, low=0.5)
    weights = weights.to(dtype) if expected.dim() == 4 else weights
    leaves = [t for t in wide if t is not None and t.requires_grad]
    found = iter(torch.autograd.grad(expected, leaves, weights.double(), materialize_grads=True))
    expected_gradients = [next(found) if t is not None and t.requires_grad else None for t in wide]
    y, gradients = run(place, function, inputs, weights)
    forward, backward = TOLERANCE[dtype]
    assert_close("output", y, expected, relative_l2=forward)
    for name, actual, wanted in zip(names, gradients, expected_gradients, strict=True):
        if wanted is not None:
            assert actual is not None
            assert_close(f"gradient of {name}", actual, wanted, relative_l2=backward)
    return y
