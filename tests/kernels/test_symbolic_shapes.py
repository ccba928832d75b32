# SPDX-License-Identifier: Apache-2.0
"""What a compiler is told of an op's results holds where sizes are symbols too: shape, dtype and strides.

A compiled graph checks the strides that it was told; at the second input size sizes become symbols.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from faceedit.kernels import (
    adain,
    alpha_blend,
    attribute_maps,
    gru_gate,
    instance_norm_act,
    modulated_conv2d,
    noise_bias_act,
    norm_modulate,
    place_components,
    reset_gate,
    setup_filter,
    sft,
    spade,
    upfirdn2d,
    upsample2d,
)

FIR = setup_filter([1, 3, 3, 1])
WEIGHT = torch.randn(6, 4, 3, 3)
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "nchw": lambda x: x.contiguous(),
    "nhwc": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}
CALLS: dict[str, Callable[[Tensor], Any]] = {
    "adain": lambda x: adain(x, x[:, :, 0, 0], x[:, :, 0, 1]),
    "alpha_blend": lambda x: alpha_blend(x, x + 1, x[:, :1]),
    "attribute_maps": lambda x: attribute_maps(x[:, :3, 0, 0], x, torch.ones(3, 4)),
    "gru_gate": lambda x: gru_gate(x, x + 1, x * 2),
    "instance_norm_act": lambda x: instance_norm_act(x),
    "modulated_conv2d": lambda x: modulated_conv2d(x, WEIGHT, x[:, :, 0, 0]),
    "modulated_conv2d up": lambda x: modulated_conv2d(x, WEIGHT, x[:, :, 0, 0], up=2),
    "modulated_conv2d down": lambda x: modulated_conv2d(x, WEIGHT, x[:, :, 0, 0], down=2),
    "modulated_conv2d rgb": lambda x: modulated_conv2d(
        x, WEIGHT, x[:, :, 0, 0], rgb_weight=WEIGHT[:3, :1, 0, 0].expand(3, 6), rgb_styles=x[:, :1, 0, 0].expand(-1, 6)
    ),
    "noise_bias_act": lambda x: noise_bias_act(x, bias=x[0, :, 0, 0]),
    "norm_modulate": lambda x: norm_modulate(x),
    "place_components": lambda x: place_components([x], torch.tensor([[[3, 3]]] * 2, dtype=torch.int32), x),
    "reset_gate": lambda x: reset_gate(x, x + 1),
    "sft": lambda x: sft(x, x + 1, x * 2),
    "spade": lambda x: spade(x, x + 1, x * 2),
    "upfirdn2d": lambda x: upfirdn2d(x, FIR, pad=(2, 1, 2, 1)),
    "upsample2d": lambda x: upsample2d(x, FIR),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", CALLS)
def test_fake_results_are_laid_out_as_real_ones(name: str, layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(2, 4, 8, 6))
    with torch.no_grad():
        real = CALLS[name](x)
        with FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True) as mode:
            fake = CALLS[name](mode.from_tensor(x, static_shapes=False))
    for told, is_ in zip(*(pair if isinstance(pair, tuple) else (pair,) for pair in (fake, real)), strict=True):
        assert [int(size) for size in told.shape] == list(is_.shape)
        assert [int(step) for step in told.stride()] == list(is_.stride())
        assert told.dtype == is_.dtype
