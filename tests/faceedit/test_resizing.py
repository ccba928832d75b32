# SPDX-License-Identifier: Apache-2.0
from typing import Literal

import pytest
import torch
from torch.nn import functional as F

from faceedit.networks import resizing

CASES: list[tuple[int, int, Literal["area", "bilinear"]]] = [
    (33, 17, "area"),
    (64, 16, "area"),
    (24, 7, "area"),
    (9, 32, "bilinear"),
    (32, 12, "bilinear"),
    (48, 36, "area"),
]


@pytest.mark.parametrize(("side", "size_px", "mode"), CASES)
def test_products_resample_as_pytorch_does(side: int, size_px: int, mode: Literal["area", "bilinear"]) -> None:
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = torch.rand(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(2))
    found = resizing.resample_by_products(x, size_px, mode), resizing.resample(x, size_px, mode)
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(y, x, weight)[0] for y in found]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


def test_products_of_sides_that_share_other_divisors() -> None:
    x = torch.randn(1, 2, 40, 24, generator=torch.Generator().manual_seed(1))
    for size_px in (16, 8):
        torch.testing.assert_close(
            resizing.resample_by_products(x, size_px, "area"), resizing.resample(x, size_px, "area")
        )


@pytest.mark.parametrize("dynamic", [None, True])
def test_products_compile_without_a_break_for_several_sizes(dynamic: bool | None) -> None:
    compiled = torch.compile(resizing.resample_by_products, backend="eager", fullgraph=True, dynamic=dynamic)
    for side in (48, 50, 52):
        x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(compiled(x, 20, "area"), resizing.resample(x, 20, "area"))


def test_what_shrinks_is_averaged_and_what_grows_is_interpolated() -> None:
    x = torch.arange(16.0).reshape(1, 1, 4, 4)
    assert resizing.resize(x, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]
    assert resizing.resize(x, 4) is x
    assert resizing.resize(x, 3).mean() == pytest.approx(7.5)
    assert torch.equal(resizing.resize(x, 8), F.interpolate(x, (8, 8), mode="bilinear", align_corners=False))
    assert resizing.resize(x[..., :2], 3).shape == (1, 1, 3, 3)


def test_matrices_made_in_inference_mode_can_be_trained_through() -> None:
    with torch.inference_mode():
        matrix = resizing._matrix(21, 10, "area", torch.device("cpu"))
    (torch.ones(21, 21, requires_grad=True) @ matrix.T).sum().backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("side", "size_px", "mode"), CASES)
def test_a_gpu_resamples_alike_and_always_the_same(side: int, size_px: int, mode: Literal["area", "bilinear"]) -> None:
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    weight = torch.rand(2, 3, size_px, size_px, generator=torch.Generator().manual_seed(2))
    found = []
    for device in ("cpu", "cuda", "cuda"):
        leaf = x.to(device).requires_grad_()
        y = resizing.resample(leaf, size_px, mode)
        found.append([t.cpu() for t in (y, *torch.autograd.grad(y, leaf, weight.to(device)))])
    for on_cpu, once, again in zip(*found, strict=True):
        torch.testing.assert_close(once, on_cpu, rtol=1e-5, atol=1e-6)
        assert torch.equal(once, again)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_half_precision_keeps_its_dtype_and_sums_in_fp32() -> None:
    x = torch.randn(1, 9, 16, 16, generator=torch.Generator().manual_seed(1)).bfloat16()
    with torch.autocast("cuda", torch.bfloat16):
        y = resizing.resample(x.cuda(), 64, "bilinear")
    assert y.dtype == torch.bfloat16
    wide = F.interpolate(x.float(), (64, 64), mode="bilinear", align_corners=False)
    torch.testing.assert_close(y.cpu(), wide.bfloat16(), rtol=1e-2, atol=1e-2)
