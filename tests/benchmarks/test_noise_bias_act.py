# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from faceedit.kernels.noise_bias_act import noise_bias_act, reference

# channels, side: the last layers of a 512 and of a 1024 px StyleGAN2, a middle layer, and MagGAN's widest at 128 px.
SHAPES = [(32, 512), (32, 1024), (128, 128), (64, 128)]


def eager(x: Tensor, noise: Tensor, strength: Tensor, bias: Tensor) -> Tensor:
    return reference(x, None, noise, strength, bias, "lrelu", 0.2, 1.4, 256.0)


def op(x: Tensor, noise: Tensor, strength: Tensor, bias: Tensor) -> Tensor:
    return noise_bias_act(x, None, noise, strength, bias, gain=1.4, clamp=256.0)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("channels", "side"), SHAPES)
def test_noise_bias_act(
    row: Callable[..., None], full_size: bool, channels: int, side: int, dtype: torch.dtype, backward: bool
) -> None:
    px = side if full_size else side // 32
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, channels, px, px, generator=generator).to(dtype).contiguous(memory_format=torch.channels_last)
    inputs = [x, torch.randn(1, 1, px, px, generator=generator), torch.tensor(0.1), torch.randn(channels)]
    # forward reads x and writes y; backward reads the gradient and y and writes the gradient to x
    moved = x.numel() * x.element_size() * (5 if backward else 2)
    row(f"noise_bias_act/{channels}@{side}/{dtype}", op, eager, inputs, moved, backward)
