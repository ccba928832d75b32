# SPDX-License-Identifier: Apache-2.0
"""An upsampling convolution in four phases: the transposed convolution, and where it takes that one's place."""

import pytest
import torch
from support.compare import assert_close
from support.modulated_conv2d_cases import TOLERANCE, needs_cpp
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels import modulated_conv2d_parts as parts
from faceedit.kernels import modulated_conv2d_phases as phases
from faceedit.kernels.modulated_conv2d import modulated_conv2d

UP = parts.Geometry(3, 2, 1)


@pytest.mark.parametrize("size", [(1, 1), (1, 4), (5, 3)], ids=str)
def test_phases_are_the_transposed_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(2, 5, *size, dtype=torch.float64), torch.randn(4, 5, 3, 3, dtype=torch.float64)

    def convolve(row: int, column: int) -> Tensor:
        return F.conv2d(x, phases.part(weight, row, column), padding=phases.padding(row, column))

    y = phases.upsample(x, 4, convolve)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close("y", y, F.conv_transpose2d(x, weight.transpose(0, 1), stride=2), relative_l2=1e-14)


def _everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phases, "_has_amx", lambda: True)
    monkeypatch.setattr(phases, "LEAST_INPUTS", 1)
    monkeypatch.setattr(phases, "LEAST_OUTPUTS", 1)


@needs_cpp
@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("kind", ["style on x", "style on the weight"])
def test_layers_match_the_reference(kind: str, is_trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    _everywhere(monkeypatch)
    batch, side = (1, 33) if kind == "style on the weight" else (2, 3)
    torch.manual_seed(1)
    x = torch.randn(batch, 24, side, side).to(torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, styles = torch.randn(16, 24, 3, 3), torch.randn(batch, 24) + 1
    assert phases.pays(x, weight, UP, torch.channels_last)

    def found(*tensors: Tensor) -> tuple[Tensor, ...]:
        x, weight, styles = (t.detach().requires_grad_() for t in tensors)
        wanted = (x, weight, styles) if is_trained else (x, styles)
        y = modulated_conv2d(x, weight if is_trained else weight.detach(), styles, up=2)
        assert isinstance(y, Tensor)
        y_weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(2)) + 0.5
        return y, *torch.autograd.grad((y.double() * y_weights).sum(), wanted)

    bounds = (TOLERANCE[torch.bfloat16][0], *[TOLERANCE[torch.bfloat16][1]] * 3)
    for name, actual, expected, bound in zip(
        ("y", "x", "weight or styles", "styles"),
        found(x, weight, styles),
        found(x.double(), weight.double(), styles.double()),
        bounds,
        strict=False,
    ):
        assert_close(name, actual, expected, relative_l2=bound)


def test_only_layers_that_gain_take_phases(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 128, 2, 2, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    weight, last = torch.zeros(64, 128, 3, 3), torch.channels_last
    monkeypatch.setattr(phases, "_has_amx", lambda: False)
    assert not phases.pays(x, weight, UP, last)
    monkeypatch.setattr(phases, "_has_amx", lambda: True)
    assert phases.pays(x, weight, UP, last)
    assert not phases.pays(x.float(), weight, UP, last)
    assert not phases.pays(x, weight, UP, torch.contiguous_format)
    assert not phases.pays(x, weight[:63], UP, last)
    assert not phases.pays(x, weight[:, :127], UP, last)
    assert not phases.pays(x, weight, parts.Geometry(3, 1, 1), last)
    assert not phases.pays(x, weight, parts.Geometry(1, 2, 1), last)
