# SPDX-License-Identifier: Apache-2.0
"""modulated_conv2d's implicit matrix product on Triton without a GPU. Its gradients: modulated_conv2d's cases."""

import itertools
from unittest import mock

import torch
from support.compare import assert_close
from support.kernel_cases import draw
from support.triton_cases import compile_kernel
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import modulated_conv2d_gemm_triton as gemm
from faceedit.kernels.modulated_conv2d import modulated_conv2d, reference
from faceedit.kernels.tensors import memory_format, poison

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 5e-3}
Layer = tuple[int, int, int, int, int, int]
# batch, inputs, outputs, height, width, kernel: tails of every block, edges on each side, more outputs than a tile.
LAYERS: list[Layer] = [(2, 35, 19, 9, 16, 3), (1, 5, 130, 3, 2, 1), (1, 3, 2, 2, 5, 5)]
ONE_PIXEL: Layer = (1, 33, 4, 1, 1, 3)
ROWS = len(TOLERANCE) * (len(LAYERS) + 1) + 4


def _operands(layer: Layer, dtype: torch.dtype) -> list[Tensor]:
    n, i, o, h, w, k = layer
    x = draw(n, i, h, w, seed=1).to(dtype).contiguous(memory_format=torch.channels_last)
    operands = [x, draw(o, i, k, k, seed=2), draw(n, i, seed=3) + 1, draw(n, 1, h, w, seed=4), torch.tensor(0.3)]
    return [*operands, draw(o, seed=5), draw(3, o, seed=6), draw(n, o, seed=7, low=0.5)]


def _compare(operands: list[Tensor | None], dtype: torch.dtype, demodulate: bool, act: str, clamp: float) -> bool:
    """Compare y and ToRGB's sums with the oracle's; return whether the kernel ran."""
    x, weight, styles, noise, strength, bias, rgb_weight, rgb_styles = operands
    assert x is not None
    assert weight is not None
    assert styles is not None
    asked = mock.Mock(wraps=gemm.layer)
    with mock.patch.object(gemm, "layer", asked), kernels.backend("triton"), poison() as guards:
        found = modulated_conv2d(
            x, weight, styles, noise=noise, strength=strength, bias=bias, rgb_weight=rgb_weight, rgb_styles=rgb_styles,
            demodulate=demodulate, act=act, clamp=clamp,
        )  # fmt: skip
        assert guards.untouched()
    wide = [None if t is None else t.double() for t in operands]
    expected = reference(*wide[:6], None, *wide[6:], 1, 1, demodulate, act, 0.2, 2**0.5, clamp)  # type: ignore[arg-type]
    y, *rgb = (found,) if isinstance(found, Tensor) else found
    assert y.is_contiguous(memory_format=memory_format(x))
    assert_close("output", y, expected[0], relative_l2=TOLERANCE[dtype])
    if rgb:
        assert_close("rgb", rgb[0], expected[1], relative_l2=TOLERANCE[dtype])
    return bool(asked.called)


def _row(layer: Layer, dtype: torch.dtype, act: str = "lrelu", clamp: float = 1.5) -> bool:
    return _compare([*_operands(layer, dtype)], dtype, True, act, clamp)


def numbers() -> int:
    rows = sum(_row(layer, dtype) for dtype, layer in itertools.product(TOLERANCE, LAYERS))
    # One pixel is contiguous too, which is the other format: PyTorch's convolution serves it.
    rows += sum(not _row(ONE_PIXEL, dtype) for dtype in TOLERANCE)
    planar: list[Tensor | None] = [t.contiguous() for t in _operands(LAYERS[0], torch.float32)]
    rows += not _compare(planar, torch.float32, True, "lrelu", 1.5)
    # A smooth activation needs its input kept, which one kernel does not write.
    rows += not _row(LAYERS[0], torch.float32, act="silu")
    plain: list[Tensor | None] = [*_operands(LAYERS[0], torch.float32)[:3], *(None,) * 5]
    rows += _compare(plain, torch.float32, False, "linear", -1.0)
    # Padding stays zero where a style is infinite: positive sums are infinite, none is NaN.
    infinite = [None if t is None else t.abs() + 0.5 for t in plain]
    assert infinite[2] is not None
    infinite[2][0, 3] = float("inf")
    return rows + _compare(infinite, torch.float32, False, "linear", -1.0)


def compile_all() -> None:
    operands = dict.fromkeys(("SCALE", "NOISE", "STRENGTH", "BIAS", "CLAMP", "RGB"), True)
    numbers = dict.fromkeys(("slope", "gain", "clamp"), "fp32")
    types = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    for name, outputs, kernel, precision in (
        ("fp32", 32, 3, "ieee"), ("fp32", 32, 3, "tf32"), ("bf16", 512, 3, "ieee"), ("fp16", 32, 1, "ieee"),
    ):  # fmt: skip
        block_p, block_o, warps = gemm.tile(outputs, types[name])
        blocks = {"BLOCK_P": block_p, "BLOCK_O": block_o, "BLOCK_I": gemm.BLOCK_I}
        settings = {"KERNEL": kernel, "ACT": 2, "PRECISION": precision, "WIDEN": False}
        images = dict.fromkeys(("x_ptr", "weight_ptr", "y_ptr"), f"*{name}")
        compile_kernel(gemm.convolution_kernel, operands | settings | blocks, numbers | images, num_warps=warps)
