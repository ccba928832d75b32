# SPDX-License-Identifier: Apache-2.0
"""modulated_conv2d on Triton without a GPU: the passes around the convolution, layer by layer."""

import itertools
from typing import Any

import torch
from support.compare import assert_close
from support.kernel_cases import FORMATS, Place, draw, run
from support.triton_cases import compile_kernel
from torch import Tensor

from faceedit import kernels
from faceedit.kernels.modulated_conv2d import modulated_conv2d, reference
from faceedit.kernels.modulated_conv2d_parts import Geometry

NAMES = ("x", "weight", "styles", "noise", "strength", "bias", "rgb_weight", "rgb_styles")
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.bfloat16: (1e-2, 5e-2), torch.float16: (5e-3, 2e-2)}
# up, down, kernel, outputs: a layer each way, and ToRGB.
LAYERS = [(1, 1, 3, 35), (2, 1, 3, 9), (1, 2, 3, 9), (1, 1, 1, 3)]
ROWS = len(FORMATS) * len(TOLERANCE) * len(LAYERS) + 2 + 2 * len(LAYERS)


def _row(
    fmt: torch.memory_format,
    dtype: torch.dtype,
    layer: tuple[int, int, int, int],
    act: str,
    clamp: float,
    filters: float = 1.0,
    incoming: float = 1.0,
) -> bool:
    up, down, k, o = layer
    height, width = Geometry(k, up, down).output_size(9, 8)
    x = draw(2, 5, 9, 8, seed=1).to(dtype).contiguous(memory_format=fmt)
    operands = [filters * draw(o, 5, k, k, seed=2), draw(2, 5, seed=3) + 1, draw(1, 1, height, width, seed=4, low=3.0)]
    operands += [torch.tensor(0.3), draw(o, seed=5), draw(3, o, seed=6), draw(2, o, seed=7, low=0.5)]

    def function(*tensors: Tensor) -> Tensor:
        named: dict[str, Any] = dict(zip(NAMES, tensors, strict=True))
        y, rgb = modulated_conv2d(**named, up=up, down=down, act=act, clamp=clamp)
        return torch.cat([y.flatten().float(), rgb.flatten()])

    wide = [t.double().requires_grad_() for t in (x, *operands)]
    settings = (up, down, True, act, 0.2, 2**0.5, clamp)
    y, rgb, _, _ = reference(*wide[:6], None, *wide[6:], *settings)
    expected = torch.cat([y.flatten(), rgb.flatten()])
    weights = incoming * draw(*expected.shape, seed=99, low=0.5)
    gradients = torch.autograd.grad(expected, wide, weights.double())
    actual, found = run(Place("triton"), function, [x, *operands], weights)
    forward, backward = TOLERANCE[dtype]
    assert_close("output", actual, expected, relative_l2=forward)
    for name, gradient, wanted in zip(NAMES, found, gradients, strict=True):
        assert gradient is not None
        assert_close(f"gradient of {name}", gradient, wanted, relative_l2=backward)
    return kernels.last_backend("modulated_conv2d_backward") == "triton"


def numbers() -> int:
    # Linear: no kink within reach of a half type's rounding.
    rows = sum(_row(*row, "linear", -1.0) for row in itertools.product(FORMATS, TOLERANCE, LAYERS))
    rows += _row(torch.channels_last, torch.float32, LAYERS[0], "lrelu", 4.0)  # inverted, and clamped, from the output
    rows += _row(torch.channels_last, torch.float32, LAYERS[0], "silu", -1.0)  # from the kept input
    # fp16: what demodulation takes out of the result, and what comes back through it, pass the type's range.
    for layer, filters in itertools.product(LAYERS, (1e-4, 1e3)):
        rows += _row(torch.channels_last, torch.float16, layer, "linear", -1.0, filters, 1e3)
    return rows


def compile_all() -> None:
    from faceedit.kernels.modulated_conv2d_triton import backward_kernel, forward_kernel, style_kernel

    operands = dict.fromkeys(("SCALE", "NOISE", "STRENGTH", "BIAS", "CLAMP", "RGB"), True)
    blocks = {"BLOCK_P": 64, "BLOCK_C": 32}
    numbers = dict.fromkeys(("slope", "gain", "clamp"), "fp32")
    for dtype, last in itertools.product(("fp32", "bf16"), (False, True)):
        layout = {"CHANNELS_LAST": last} | blocks
        images = dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}")
        compile_kernel(forward_kernel, operands | layout | {"ACT": 2, "WRITE": True}, numbers | images)
        wants = dict.fromkeys(("GRAD", "WANT_SCALE", "WANT_BIAS", "WANT_FACTORS", "WANT_ROWS"), True)
        images = dict.fromkeys(("grad_ptr", "saved_ptr", "gx_ptr"), f"*{dtype}")
        inverses = dict.fromkeys(("inverse", "inverse_below"), "fp32")
        compile_kernel(backward_kernel, operands | layout | wants | {"ACT": 2}, numbers | inverses | images)
        images = dict.fromkeys(("x_ptr", "grad_ptr", "gx_ptr"), f"*{dtype}")
        compile_kernel(style_kernel, layout | {"WANT_SUM": True}, images)
