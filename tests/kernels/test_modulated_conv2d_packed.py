# SPDX-License-Identifier: Apache-2.0
"""Convolutions with a frozen weight kept in oneDNN's layout: the same values, when they are made, and when not."""

import pytest
import torch
from support.compare import assert_close
from support.modulated_conv2d_cases import TOLERANCE, needs_cpp
from torch import Tensor

from faceedit.kernels import modulated_conv2d_packed as packed
from faceedit.kernels import modulated_conv2d_parts as parts
from faceedit.kernels.modulated_conv2d import modulated_conv2d

pytestmark = [
    needs_cpp,
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN"),
]


@pytest.fixture(autouse=True)
def small_weights_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "LEAST_WEIGHTS", 1)


def _layer(kernel: int, dtype: torch.dtype = torch.float32, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(kernel)
    x = torch.randn(batch, 24, 3, 5).to(dtype).contiguous(memory_format=torch.channels_last)
    return x, torch.randn(40, 24, kernel, kernel), torch.randn(batch, 24) + 1


def _gradients(x: Tensor, weight: Tensor, styles: Tensor, up: int) -> tuple[Tensor, ...]:
    x, styles = x.clone(memory_format=torch.preserve_format).requires_grad_(), styles.clone().requires_grad_()
    y = modulated_conv2d(x, weight, styles, up=up)
    assert isinstance(y, Tensor)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y_weights = torch.rand(y.shape, generator=torch.Generator().manual_seed(1)) + 0.5
    return y, *torch.autograd.grad((y.double() * y_weights).sum(), (x, styles))


def _uses(weight: Tensor) -> set[str]:
    return {key[0] for key in parts._made[id(weight)].tensors if key[0] in ("plain", "up", "back")}


@pytest.mark.parametrize("up", [1, 2])
@pytest.mark.parametrize("kernel", [3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_and_gradients_match_the_reference(dtype: torch.dtype, kernel: int, up: int) -> None:
    if dtype not in packed._dtypes():
        pytest.skip("this processor's oneDNN has no bf16")
    x, weight, styles = _layer(kernel, dtype)
    found = _gradients(x, weight, styles, up)
    assert _uses(weight) == {"plain" if up == 1 else "up", "back"}
    expected = _gradients(x.double(), weight.double(), styles.double(), up)
    for name, a, e, bound in zip(
        ("y", "x", "styles"), found, expected, (TOLERANCE[dtype][0], *[TOLERANCE[dtype][1]] * 2), strict=True
    ):
        assert_close(name, a, e, relative_l2=bound)


@pytest.mark.parametrize("up", [1, 2])
def test_a_write_to_the_weight_is_seen(up: int) -> None:
    x, weight, styles = _layer(3)
    before = _gradients(x, weight, styles, up)
    weight.mul_(torch.linspace(0.5, 2, 3))
    after = _gradients(x, weight, styles, up)
    for name, a, e, b in zip(
        ("y", "x", "styles"), after, _gradients(x, weight.clone(), styles, up), before, strict=True
    ):
        assert_close(name, a, e, relative_l2=1e-6)
        assert not torch.allclose(a, b)


def test_one_packing_serves_other_batches_sizes_and_thread_counts() -> None:
    _, weight, _ = _layer(3)
    threads = torch.get_num_threads()
    try:
        for batch, side, count in ((1, 4, 1), (3, 7, 2), (2, 9, 1)):
            torch.set_num_threads(count)
            x = torch.randn(batch, 24, side, side).contiguous(memory_format=torch.channels_last)
            styles = torch.randn(batch, 24)
            y, wide = (
                modulated_conv2d(x, weight, styles),
                modulated_conv2d(x.double(), weight.double(), styles.double()),
            )
            assert isinstance(y, Tensor)
            assert isinstance(wide, Tensor)
            assert_close("y", y, wide, relative_l2=TOLERANCE[torch.float32][0])
    finally:
        torch.set_num_threads(threads)
    assert sum(key[0] == "plain" for key in parts._made[id(weight)].tensors) == 1


@pytest.mark.parametrize("case", ["trained", "inference", "planar", "off", "absent", "light", "downsampled"])
def test_what_is_left_to_pytorch(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, _ = _layer(3)
    fmt = torch.channels_last
    assert packed.pays(x, weight, parts.Geometry(3, 1, 1), fmt)
    if case == "trained":
        weight.requires_grad_()
    elif case == "inference":
        with torch.inference_mode():
            weight = torch.randn(40, 24, 3, 3)
    elif case == "planar":
        fmt = torch.contiguous_format
    elif case == "absent":
        monkeypatch.setattr(packed, "_operators", tuple)
    elif case == "light":
        x = torch.randn(1, 24, 64, 64).contiguous(memory_format=fmt)
    elif case == "off":
        monkeypatch.setattr(packed, "_is_on", lambda: False)
    geometry = parts.Geometry(3, 1, 2 if case == "downsampled" else 1)
    assert not packed.pays(x, weight, geometry, fmt)


def test_pytorch_without_onednn_is_asked() -> None:
    before = torch._C._get_mkldnn_enabled()
    try:
        torch._C._set_mkldnn_enabled(False)
        assert not packed._is_on()
    finally:
        torch._C._set_mkldnn_enabled(before)


def test_operators_that_pytorch_lacks_are_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lacking:
        _convolution_pointwise = torch.ops.mkldnn._convolution_pointwise

    monkeypatch.setattr(torch.ops, "mkldnn", Lacking)
    packed._operators.cache_clear()
    try:
        assert packed._operators() == ()
    finally:
        monkeypatch.undo()
        packed._operators.cache_clear()
    assert len(packed._operators()) == 4
