# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""modulated_conv2d's convolution as an implicit matrix product in Triton, styles before it and the epilogue behind it.

The patches are never written: a program gathers a tile of them tap by tap, multiplies it by the styles, and finishes
the outputs in registers, so that a layer reads x and writes y once. channels_last without resampling.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.modulated_conv2d_parts import Vectors, ready
from faceedit.kernels.modulated_conv2d_triton import dots
from faceedit.kernels.noise_bias_act_triton import ACT_CODES, _activate
from faceedit.kernels.tensors import empty, empty_float

BLOCK_I = 32


@triton.jit
def convolution_kernel(
    x_ptr, weight_ptr, y_ptr, style_ptr, scale_ptr, noise_ptr, strength_ptr, bias_ptr, factors_ptr, rgb_ptr,
    height, width, inputs, outputs, noise_stride, blocks_per_sample, slope, gain, clamp,
    KERNEL: tl.constexpr, ACT: tl.constexpr, SCALE: tl.constexpr, NOISE: tl.constexpr, STRENGTH: tl.constexpr,
    BIAS: tl.constexpr, CLAMP: tl.constexpr, RGB: tl.constexpr, PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    # One program per block of one sample's pixels and block of outputs. weight lies as (O, k * k, I). Offsets inside a
    # sample are 32 bits wide: 64 would take the registers that the sums need.
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks_per_sample
    q = ((program % blocks_per_sample) * BLOCK_P).to(tl.int32) + tl.arange(0, BLOCK_P)
    pixels = height * width
    row, column = q // width, q % width
    o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros((BLOCK_P, BLOCK_O), dtype=tl.float32)
    image = x_ptr + sample * pixels * inputs
    for tap in range(KERNEL * KERNEL):
        r = row + tap // KERNEL - KERNEL // 2
        c = column + tap % KERNEL - KERNEL // 2
        inside = (q < pixels) & (r >= 0) & (r < height) & (c >= 0) & (c < width)
        patch = ((r * width + c) * inputs)[:, None]
        taps = ((o * (KERNEL * KERNEL) + tap) * inputs)[None, :]
        for first in range(0, inputs, BLOCK_I):
            i = first + tl.arange(0, BLOCK_I)
            held = inside[:, None] & (i < inputs)[None, :]
            a = tl.load(image + (patch + i[None, :]), mask=held, other=0.0)
            style = tl.load(style_ptr + sample * inputs + i, mask=i < inputs, other=0.0)
            # Padding is zero whatever the style is.
            a = tl.where(held, a.to(tl.float32) * style[None, :], 0.0).to(x_ptr.dtype.element_ty)
            b = tl.load(
                weight_ptr + (taps + i[:, None]), mask=(o < outputs)[None, :] & (i < inputs)[:, None], other=0.0
            )
            if WIDEN:  # the interpreter multiplies bf16 wrongly
                a = a.to(tl.float32)
                b = b.to(tl.float32)
            total = tl.dot(a, b, total, input_precision=PRECISION)
    if SCALE:
        total = total * tl.load(scale_ptr + sample * outputs + o, mask=o < outputs, other=0.0)[None, :]
    if NOISE:
        offset = tl.load(noise_ptr + sample * noise_stride + q, mask=q < pixels, other=0.0)
        if STRENGTH:
            offset = offset * tl.load(strength_ptr)
        total = total + offset[:, None]
    if BIAS:
        total = total + tl.load(bias_ptr + o, mask=o < outputs, other=0.0)[None, :]
    total = _activate(total, ACT, slope) * gain
    if CLAMP:
        total = tl.where(total > clamp, clamp, total)
        total = tl.where(total < -clamp, -clamp, total)
    index = (q * outputs)[:, None] + o[None, :]
    tl.store(
        y_ptr + sample * pixels * outputs + index,
        total.to(y_ptr.dtype.element_ty),
        mask=(q < pixels)[:, None] & (o < outputs)[None, :],
    )
    if RGB:
        total = tl.where((o < outputs)[None, :], total, 0.0)
        for k in range(3):
            factors = tl.load(factors_ptr + (sample * 3 + k) * outputs + o, mask=o < outputs, other=0.0)
            tl.store(rgb_ptr + (sample * 3 + k) * pixels + q, tl.sum(total * factors[None, :], axis=1), mask=q < pixels)


def fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether `layer` can compute a plain convolution of x: its offsets inside a sample are 32 bits wide."""
    return x.shape[2] * x.shape[3] * max(weight.shape[:2]) < 2**31


def tile(outputs: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Return the pixels and outputs of a program's tile, and its warps."""
    # Larger tiles spill registers; fp32's products take more of them than those of the half types.
    most = 64 if dtype == torch.float32 else 128
    block_o = min(max(triton.next_power_of_2(outputs), 16), most)  # 16: the least side of a product
    return most, block_o, 8 if block_o == most else 4


def layer(
    x: Tensor,
    weight: Tensor,
    v: Vectors,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    factors: Tensor | None,
    settings: tuple[str, float, float, float],
) -> tuple[Tensor, Tensor | None]:
    """Return y = epilogue(conv(x * style)) and ToRGB's sums.

    x is channels_last; vectors, factors and settings are those of the epilogue.
    """
    weight, style = ready(weight, x.dtype, torch.channels_last, False, v.lengths), v.inner
    scale, noise, strength, bias = vectors
    act, slope, gain, clamp = settings
    n, inputs, h, w = x.shape
    outputs = weight.shape[0]
    block_p, block_o, warps = tile(outputs, x.dtype)
    y = empty((n, outputs, h, w), x, x.dtype, torch.channels_last)
    # A program that holds all outputs of its pixels has what ToRGB sums.
    rgb = None if factors is None or outputs > block_o else empty_float(x, n, 3, h, w)
    blocks = triton.cdiv(h * w, block_p)
    # fp32 as PyTorch's convolution has it.
    precision = "tf32" if torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"  # type: ignore[attr-defined]
    convolution_kernel[(n * blocks, triton.cdiv(outputs, block_o))](
        x, weight, y, style, *(x if t is None else t for t in (scale, noise, strength, bias, factors, rgb)),
        h, w, inputs, outputs, h * w if noise is not None and noise.shape[0] == n else 0, blocks, slope, gain, clamp,
        KERNEL=weight.shape[2], ACT=ACT_CODES[act], SCALE=scale is not None, NOISE=noise is not None,
        STRENGTH=strength is not None, BIAS=bias is not None, CLAMP=clamp >= 0, RGB=rgb is not None,
        PRECISION=precision, WIDEN=x.device.type == "cpu" and x.dtype == torch.bfloat16,
        BLOCK_P=block_p, BLOCK_O=block_o, BLOCK_I=BLOCK_I, num_warps=warps,
    )  # fmt: skip
    return y, dots(y, factors) if factors is not None and rgb is None else rgb
