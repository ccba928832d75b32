# SPDX-License-Identifier: Apache-2.0
"""What holds for every op alike.

Operands on two devices are refused, gradients through a native forward pass may be differentiated again, infinities
come out as in float64, sizes may be any, and compiled graphs call the kernels.
"""

import itertools
from collections.abc import Callable, Sequence

import pytest
import torch
from hypothesis import given, settings
from support.compare import assert_close
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
TWICE = [case for case in CASES if case.has_gradient and not case.composed and case.operation != "noise_regularizer"]
# In fp32: a second gradient adds up what two passes rounded; beside an infinity few values are left to average over.
ROUNDED = 2e-5


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", TWICE, ids=str)
def test_second_gradients_through_a_native_forward_pass_agree_with_float64(case: Case, place: Place) -> None:
    inputs = inputs_of(case)
    expected = _second_gradients(case.op, as_inputs(inputs, torch.float64))
    placed = as_inputs(inputs, place.device)
    with at(place):
        found = _second_gradients(case.op, placed)
    for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_close(f"second gradient of input {index}", actual, wanted, relative_l2=ROUNDED)


FINITE = {"adain of a linear layer": [1], "spade over batch norm": [3, 4]}


def _with(value: float, where: int, element: int, inputs: Sequence[Tensor]) -> list[Tensor]:
    found = as_inputs(inputs)
    with torch.no_grad():
        found[where].view(-1)[element] = value
    return found


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("case", [case for case in CASES if case.result != torch.int32], ids=str)
def test_infinities_come_out_as_in_float64(case: Case, place: Place) -> None:
    """In activations, masks and targets; weights, statistics and the scale that follows them must be finite."""
    trained = range(len(case.activations), len(case.activations) + len(case.parameters))
    finite = [*trained, *FINITE.get(case.name, ())]
    sizes = {index: tensor.numel() for index, tensor in enumerate(inputs_of(case)) if index not in finite}
    values = (float("inf"), -float("inf"))
    for (where, size), value in itertools.product(sizes.items(), values):
        for element in sorted({size // 2, size - 2} & set(range(size))):  # a corner, and inside a row that is not whole
            inputs = _with(value, where, element, inputs_of(case))
            expected = results_of(case, as_inputs(inputs, torch.float64))
            with at(place):
                found = results_of(case, as_inputs(inputs, place.device))
            for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
                name = f"result {index} where input {where} has {value} at {element}"
                made = actual.cpu().isnan() & ~wanted.isnan()
                assert not made.any(), f"{name}: {int(made.sum())} NaN are the kernel's own"
                kept = ~wanted.isnan()
                assert_close(name, actual.cpu()[kept], wanted[kept], relative_l2=ROUNDED)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [case.name for case in CASES])
def test_drawn_sizes_agree_with_float64(name: str, place: Place) -> None:
    @settings(max_examples=8, deadline=None, derandomize=True, database=None)
    @given(drawn_cases(name))
    def check(case: Case) -> None:
        check_drawn(case, place)

    check()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in COMPILED if name != "noise_regularizer"])  # its levels are unrolled
def test_a_graph_compiled_for_sizes_that_are_symbols_serves_others(name: str) -> None:
    torch._dynamo.reset()
    sizes = {"c": 8, "parts": 7, "attributes": 9, "h": 14, "w": 10}  # no two alike: equal ones share a symbol
    small, large = (
        next(case for case in cases(**{key: size + more for key, size in sizes.items()}) if case.name == name)
        for more in (0, 4)
    )
    compiled = torch.compile(small.op, fullgraph=True, dynamic=True, backend="aot_eager")
    for case, may_compile in ((small, True), (large, False)):
        results = []
        for call in (small.op, compiled):
            inputs = inputs_of(case)
            with torch._dynamo.config.patch(error_on_recompile=not may_compile), kernels.backend("cpu"):
                y = call(*inputs)
                gradients = torch.autograd.grad(y.square().sum(), [t for t in inputs if t.requires_grad])
            results.append([y.detach(), *gradients])
        assert kernels.last_backend(case.kernel) == "cpu"
        for ours, traced in zip(*results, strict=True):
            assert_close("compiled", traced, ours.double(), relative_l2=1e-6)
