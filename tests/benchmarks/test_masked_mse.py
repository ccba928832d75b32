# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from faceedit.kernels.masked_mse import masked_mse, reference

SIDES = [1024, 512, 256]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_masked_mse(row: Callable[..., None], full_size: bool, side: int, dtype: torch.dtype, backward: bool) -> None:
    px = side if full_size else side // 32
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(1, 3, px, px, generator=generator).to(dtype) for _ in range(2))
    mask = torch.rand(1, 1, px, px, generator=generator)

    def eager(a: Tensor) -> Tensor:
        return reference(a, b.to(a.device), mask.to(a.device), None, None, "clamp", "all")[0]

    def op(a: Tensor) -> Tensor:
        return masked_mse(a, b.to(a.device), mask.to(a.device))

    # forward reads a, b and the mask; backward reads them again and writes the gradient to a
    image, plane = a.numel() * a.element_size(), mask.numel() * 4
    row(
        f"masked_mse/3@{side}/{dtype}",
        op,
        eager,
        [a],
        (5 if backward else 2) * image + (1 + backward) * plane,
        backward,
    )
