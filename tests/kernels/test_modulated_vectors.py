# SPDX-License-Identifier: Apache-2.0
"""What modulated_conv2d does to styles and weights away from the pixels, in C++ and CUDA against float64."""

from __future__ import annotations

import pytest
import torch
from support.compare import assert_close
from support.kernel_cases import draw

from faceedit.kernels import modulated_conv2d_native as compiled
from faceedit.kernels import modulated_conv2d_parts as plain
from faceedit.kernels import native
from faceedit.kernels.tensors import memory_format, poison

pytestmark = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    ),
]
SIZES = [(1, 512, 512), (1, 3, 5), (2, 33, 130), (3, 130, 36), (9, 1, 1), (1, 700, 4)]


@pytest.mark.parametrize(("count", "outputs", "inputs"), SIZES)
@pytest.mark.parametrize("device", DEVICES)
def test_demodulation(device: str, count: int, outputs: int, inputs: int) -> None:
    style, grad = draw(count, inputs, seed=1).to(device), draw(count, outputs, seed=2).to(device)
    squares, given = draw(outputs, inputs, seed=3, low=0.1).to(device), draw(count, inputs, seed=4).to(device)
    with poison() as guards:
        found = compiled.demodulate(style, squares)
    assert guards.untouched()
    wide = [t.cpu().double() for t in (style, squares)]
    expected = plain.demodulate(*wide)
    assert_close("demodulation", found.cpu(), expected, relative_l2=1e-6)
    assert (found.cpu() - expected).abs().max() <= 2e-6 * expected.abs().max()
    gradient = compiled.demodulate_backward(given.clone(), grad, found, style, squares)
    wanted = plain.demodulate_backward(given.cpu().double(), grad.cpu().double(), expected, *wide)
    assert_close("gradient", gradient.cpu(), wanted, relative_l2=2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_demodulation_is_the_same_beside_others(device: str) -> None:
    style, squares = draw(4, 70, seed=1).to(device), draw(40, 70, seed=3, low=0.1).to(device)
    together = compiled.demodulate(style, squares)
    for row in range(4):
        assert torch.equal(compiled.demodulate(style[row : row + 1].clone(), squares), together[row : row + 1])


@pytest.mark.parametrize("shape", [(8, 12, 3, 3), (5, 7, 3, 3), (6, 4, 1, 1), (16, 8, 2, 2), (3, 1, 3, 3)], ids=str)
@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_modulated_weight_is_the_rounded_product(
    device: str, dtype: torch.dtype, transposed: bool, fmt: torch.memory_format, shape: tuple[int, ...]
) -> None:
    weight = draw(*shape, seed=1).to(memory_format=fmt)
    style = draw(1, shape[0 if transposed else 1], seed=2)
    expected = plain.modulate(weight, style, dtype, transposed)
    with poison() as guards:
        found = compiled.modulate(weight.to(device), style.to(device), dtype, transposed)
    assert guards.buffers
    assert guards.untouched()
    assert found.dtype is dtype
    assert memory_format(found) is memory_format(weight)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_modulated_weight_of_many_elements_and_odd_addresses(device: str) -> None:
    storage = draw(1 + 512 * 130 * 9, seed=1)
    style = draw(1, 131, seed=2)[:, 1:]
    weight = storage[1:].view(512, 130, 3, 3)
    expected = plain.modulate(weight, style, torch.bfloat16, False)
    moved, own = storage.to(device)[1:].view(512, 130, 3, 3), draw(1, 131, seed=2).to(device)[:, 1:]
    assert torch.equal(compiled.modulate(moved, own, torch.bfloat16, False).cpu(), expected)
