# SPDX-License-Identifier: Apache-2.0
"""A frozen 3x3 convolution by the kernel library: its values, and where PyTorch's stays."""

from collections.abc import Callable

import pytest
import torch
from support.modulated_conv2d_cases import needs_cpp
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from faceedit import kernels
from faceedit.kernels import frozen_conv, native

pytestmark = needs_cpp
quick = pytest.mark.skipif(native.build_report()["isa"] == "baseline", reason="this processor's vectors are too short")


def operands() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    x = torch.randn(2, 32, 16, 24).contiguous(memory_format=torch.channels_last)
    return x, torch.nn.Parameter(torch.randn(64, 32, 3, 3) / 17, requires_grad=False), torch.randn(64)


@quick
@pytest.mark.parametrize("act", ["relu", "linear"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradient_are_a_convolutions(act: str, has_bias: bool) -> None:
    x, weight, bias = operands()
    given = bias if has_bias else None
    assert frozen_conv.pays(x, weight)
    leaf, wide = x.clone().requires_grad_(), x.double().requires_grad_()
    found = frozen_conv.conv3x3(leaf, weight, given, act)
    wanted = F.conv2d(wide, weight.double(), None if given is None else given.double(), padding=1)
    wanted = wanted.relu() if act == "relu" else wanted
    # Its sign is a matter of rounding where the result is next to 0.
    seed = torch.randn(wanted.shape, dtype=torch.float64) * (wanted.detach().abs() > 1e-4)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-5)
    assert found.is_contiguous(memory_format=torch.channels_last)
    (gradient,) = torch.autograd.grad(found, leaf, seed.float())
    (expected,) = torch.autograd.grad(wanted, wide, seed)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-4)


@quick
def test_pytorchs_convolution_stays_where_it_is_better_or_expected() -> None:
    x, weight, _ = operands()
    refused = [
        frozen_conv.pays(x, torch.nn.Parameter(weight)),
        frozen_conv.pays(x.contiguous(), weight),
        frozen_conv.pays(x.bfloat16(), weight.bfloat16()),
        frozen_conv.pays(x.double(), weight.double()),
        frozen_conv.pays(x[:, :, :4, :4].contiguous(memory_format=torch.channels_last), weight),
        frozen_conv.pays(x, torch.nn.Parameter(weight[:24], requires_grad=False)),
        frozen_conv.pays(x, torch.nn.Parameter(weight.bfloat16(), requires_grad=False)),
    ]
    with torch.autocast("cpu", torch.bfloat16):
        refused.append(frozen_conv.pays(x, weight))
    with kernels.backend("eager"):
        refused.append(frozen_conv.pays(x, weight))
    assert not any(refused)
    assert frozen_conv.pays(x, weight)


def _either(x: Tensor, weight: Tensor) -> Tensor:
    return frozen_conv.conv3x3(x, weight, None, "relu") if frozen_conv.pays(x, weight) else F.conv2d(x, weight)


@pytest.mark.parametrize("trace", ["compile", "export", "make_fx", "jit"])
def test_a_graph_holds_an_ordinary_convolution(trace: str) -> None:
    x, weight, _ = operands()

    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            return _either(x, weight)

    kinds: list[str] = []
    if trace == "jit":
        kinds += [node.kind() for node in torch.jit.trace(Layer(), (x, weight)).inlined_graph.nodes()]
    elif trace == "make_fx":
        graph = make_fx(_either)(x, weight).graph
        kinds += [str(node.target) for node in graph.nodes if node.op == "call_function"]
    elif trace == "export":
        graph = torch.export.export(Layer(), (x, weight)).graph
        kinds += [str(node.target) for node in graph.nodes if node.op == "call_function"]
    else:

        def backend(module: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
            kinds.extend(str(node.target) for node in module.graph.nodes if node.op == "call_function")
            return module.forward

        torch.compile(Layer(), backend=backend, fullgraph=True)(x, weight)
    assert any("conv" in kind for kind in kinds)
    assert not any("faceedit" in kind for kind in kinds)
