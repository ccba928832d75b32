# SPDX-License-Identifier: Apache-2.0
"""What holds for every op alike: operands on two devices are refused, a native first gradient may be differentiated
again, infinities make no NaN of their own, and TorchInductor's code calls the kernels."""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from support.compare import assert_close, compare
from support.kernel_cases import PLACES, Place
from support.op_cases import CASES, Case, as_inputs, at, cases, check_drawn, drawn_cases, inputs_of, results_of, uneven
from torch import Tensor

from faceedit import kernels

SEVERAL = [case for case in CASES if len(inputs_of(case)) > 1 and case.operation != "normalize_noise_"]
# One of each kind: a loss, an elementwise op, one with statistics, a convolution, lists of tensors.
COMPILED = (
    "masked_mse",
    "fir_epilogue",
    "norm_modulate",
    "modulated_conv2d up",
    "noise_regularizer",
    "place_components",
)


@pytest.mark.parametrize("case", SEVERAL, ids=str)
def test_operands_on_two_devices_are_refused_before_anything_runs(case: Case) -> None:
    count = len(inputs_of(case))
    for moved in range(count):
        inputs = [t.detach().to("meta") if i == moved else t.detach() for i, t in enumerate(inputs_of(case))]
        with pytest.raises(ValueError, match=r"^[a-z0-9_]+: .* must be on (cpu|meta), got (cpu|meta); move it there$"):
            case.op(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name in COMPILED], ids=str)
def test_inductor_calls_the_kernel_and_gives_its_values(case: Case) -> None:
    torch._dynamo.reset()
    results = []
    for call in (case.op, torch.compile(case.op, fullgraph=True)):
        inputs = inputs_of(case)
        with kernels.backend("cpu"):  # refused where the kernel cannot run
            y = call(*inputs)
            gradients = torch.autograd.grad(y.float().square().sum(), [t for t in inputs if t.requires_grad])
        results.append([y.detach(), *gradients])
    assert kernels.last_backend(case.operation) == "cpu"
    for ours, compiled in zip(*results, strict=True):
        assert_close("compiled", compiled, ours.double(), relative_l2=1e-6)


def _second_gradients(op: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """The gradients of |first gradients|^2, as a gradient penalty or a path-length regulariser takes them."""
    trained = [t for t in inputs if t.requires_grad]
    first = torch.autograd.grad(uneven(op(*inputs).pow(2)), trained, create_graph=True)
    penalty = torch.stack([g.square().sum() for g in first]).sum()
    return list(torch.autograd.grad(penalty, trained, materialize_grads=True))


# noise_regularizer's gradient is refused a second time, which its own tests hold.
TWICE = [case for case in CASES if case.has_gradient and case.operation != "noise_regularizer"]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", TWICE, ids=str)
def test_second_gradients_of_native_first_ones_agree_with_float64(case: Case, place: Place) -> None:
    inputs = inputs_of(case)
    expected = _second_gradients(case.op, as_inputs(inputs, torch.float64))
    placed = as_inputs(inputs, place.device)
    with at(place):
        found = _second_gradients(case.op, placed)
    for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"second gradient of input {index}", actual, wanted, relative_l2=2e-5)


FINITE = {"adain of a linear layer": [1], "spade over batch norm": [3, 4]}


def _with(value: float, where: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = as_inputs(inputs)
    with torch.no_grad():
        found[where].view(-1)[found[where].numel() // 2] = value
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", [case for case in CASES if case.result != torch.int32], ids=str)
def test_infinities_make_no_nan_that_float64_has_not(case: Case, place: Place) -> None:
    """In activations, masks and targets; weights, statistics and the scale that follows them must be finite."""
    trained = range(len(case.activations), len(case.activations) + len(case.parameters))
    finite = [*trained, *FINITE.get(case.name, ())]
    filled = [index for index, tensor in enumerate(inputs_of(case)) if tensor.numel() and index not in finite]
    for where, value in itertools.product(filled, (float("inf"), -float("inf"))):
        inputs = _with(value, where, inputs_of(case))
        expected = results_of(case, as_inputs(inputs, torch.float64))
        with at(place):
            found = results_of(case, as_inputs(inputs, place.device))
        for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
            name = f"result {index} where input {where} has {value}"
            made = actual.cpu().isnan() & ~wanted.isnan()
            assert not made.any(), f"{name}: {int(made.sum())} NaN are the kernel's own"
            both = actual.cpu().isfinite() & wanted.isfinite()
            assert compare(actual.cpu()[both], wanted[both]).relative_l2 < 2e-5, name


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(case=drawn_cases())
def test_drawn_sizes_agree_with_float64(place: Place, case: Case) -> None:
    check_drawn(case, place)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_a_graph_compiled_for_sizes_that_are_symbols_serves_others(name: str) -> None:
    torch._dynamo.reset()
    small, large = (
        next(case for case in found if case.name == name)
        for found in (CASES, cases(c=6, parts=4, attributes=7, h=12, w=10))
    )
    compiled = torch.compile(small.op, fullgraph=True, dynamic=True, backend="aot_eager")
    for case in (small, large):
        results = []
        for call in (small.op, compiled):
            inputs = inputs_of(case)
            y = call(*inputs)
            gradients = torch.autograd.grad(y.square().sum(), [t for t in inputs if t.requires_grad])
            results.append([y.detach(), *gradients])
        for ours, traced in zip(*results, strict=True):
            assert_close("compiled", traced, ours.double(), relative_l2=1e-6)
