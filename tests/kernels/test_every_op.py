# SPDX-License-Identifier: Apache-2.0
"""What holds for every op alike: operands on two devices are refused, and TorchInductor's code calls the kernels."""

import pytest
import torch
from support.compare import assert_close
from support.kernel_cases import draw
from support.op_cases import CASES, Case
from torch import Tensor

from faceedit import kernels


def _inputs(case: Case) -> list[Tensor]:
    trained = [*case.activations, *case.parameters]
    tensors = [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(trained)]
    return tensors + [draw(*shape, seed=40 + i, low=0.0) for i, shape in enumerate(case.constants)]


SEVERAL = [case for case in CASES if len(_inputs(case)) > 1 and case.operation != "normalize_noise_"]
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
    count = len(_inputs(case))
    for moved in range(count):
        inputs = [t.detach().to("meta") if i == moved else t.detach() for i, t in enumerate(_inputs(case))]
        with pytest.raises(ValueError, match=r"^[a-z0-9_]+: .* must be on (cpu|meta), got (cpu|meta); move it there$"):
            case.op(*inputs)


@pytest.mark.slow
@pytest.mark.parametrize("case", [case for case in CASES if case.name in COMPILED], ids=str)
def test_inductor_calls_the_kernel_and_gives_its_values(case: Case) -> None:
    torch._dynamo.reset()
    results = []
    for call in (case.op, torch.compile(case.op, fullgraph=True)):
        inputs = _inputs(case)
        with kernels.backend("cpu"):  # refused where the kernel cannot run
            y = call(*inputs)
            gradients = torch.autograd.grad(y.float().square().sum(), [t for t in inputs if t.requires_grad])
        results.append([y.detach(), *gradients])
    assert kernels.last_backend(case.operation) == "cpu"
    for ours, compiled in zip(*results, strict=True):
        assert_close("compiled", compiled, ours.double(), relative_l2=1e-6)
