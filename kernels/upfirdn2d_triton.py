# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton body of upfirdn2d and fir_epilogue: a gather of the samples that each output meets."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.noise_bias_act_triton import ACT_CODES, _activate
from faceedit.kernels.tensors import as_float, empty, memory_format
from faceedit.kernels.upfirdn2d import output_shape


@triton.jit
def forward_kernel(
    x_ptr, y_ptr, fir_ptr, scale_ptr, noise_ptr, strength_ptr, bias_ptr, add_ptr,
    total, channels, in_height, in_width, out_height, out_width, pad_x, pad_y, noise_stride,
    fir_gain, slope, gain, clamp,
    KH: tl.constexpr, KW: tl.constexpr, UP: tl.constexpr, DOWN: tl.constexpr, ONE_AXIS: tl.constexpr,
    FLIP: tl.constexpr, CHANNELS_LAST: tl.constexpr, EPILOGUE: tl.constexpr, ACT: tl.constexpr, SCALE: tl.constexpr,
    NOISE: tl.constexpr, STRENGTH: tl.constexpr, BIAS: tl.constexpr, CLAMP: tl.constexpr, ADD: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < total
    pixels = tl.cast(out_height, tl.int64) * out_width
    sample = index // channels // pixels  # their product may pass 32 bits
    if CHANNELS_LAST:
        c = index % channels
        q = (index // channels) % pixels
        step = channels
        plane = sample * in_height * in_width * channels + c
    else:
        q = index % pixels
        c = (index // pixels) % channels
        step = 1
        plane = (sample * channels + c) * in_height * in_width
    # The first tap lies at `top`, `left` of the upsampled image, where every UP-th place holds a sample. Places below
    # zero are masked: what integer division makes of them does not matter.
    top = (q // out_width) * DOWN - pad_y
    left = (q % out_width) * DOWN - pad_x
    z = tl.zeros((BLOCK,), dtype=tl.float32)
    for a in tl.static_range(KH):
        y = top + a
        row_inside = inside & (y >= 0) & (y < in_height * UP) & (y % UP == 0)
        ky = a if FLIP else KH - 1 - a
        row = tl.zeros((BLOCK,), dtype=tl.float32)
        for b in tl.static_range(KW):
            x = left + b
            found = row_inside & (x >= 0) & (x < in_width * UP) & (x % UP == 0)
            kx = b if FLIP else KW - 1 - b
            tap = tl.load(fir_ptr + (kx if ONE_AXIS else ky * KW + kx))
            value = tl.load(x_ptr + plane + ((y // UP) * in_width + x // UP) * step, mask=found, other=0.0)
            row += tap * value.to(tl.float32)
        z += row * tl.load(fir_ptr + ky) if ONE_AXIS else row
    z = z * fir_gain
    if EPILOGUE:
        if SCALE:
            z = z * tl.load(scale_ptr + sample * channels + c, mask=inside, other=0.0)
        if NOISE:
            noise = tl.load(noise_ptr + sample * noise_stride + q, mask=inside, other=0.0)
            z = z + (noise * tl.load(strength_ptr) if STRENGTH else noise)
        if BIAS:
            z = z + tl.load(bias_ptr + c, mask=inside, other=0.0)
        z = _activate(z, ACT, slope) * gain
        if CLAMP:
            z = tl.where(z > clamp, clamp, z)
            z = tl.where(z < -clamp, -clamp, z)
        if ADD:
            z = z + tl.load(add_ptr + index, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + index, z.to(y_ptr.dtype.element_ty), mask=inside)


def forward(
    x: Tensor,
    fir: Tensor,
    up: int,
    down: int,
    pad: list[int],
    fir_gain: float,
    flip: bool,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    act: str = "",
    slope: float = 0.0,
    gain: float = 1.0,
    clamp: float = -1.0,
) -> Tensor:
    """Run the kernel; arguments as the ops'. Without `act` there is no epilogue."""
    fmt = memory_format(x)
    x = x.contiguous(memory_format=fmt)
    taps = fir.detach().to(torch.float32).contiguous()
    scale, noise, strength, bias = map(as_float, (scale, noise, strength, bias))
    y = empty(output_shape(x, fir, up, down, pad), x, x.dtype, fmt)
    if add is not None:
        add = add.detach().to(x.dtype).contiguous(memory_format=fmt)
    noise_stride = y.shape[2] * y.shape[3] if noise is not None and noise.shape[0] == x.shape[0] else 0
    block = 512
    forward_kernel[(triton.cdiv(y.numel(), block),)](
        x, y, taps, *(x if t is None else t for t in (scale, noise, strength, bias, add)),
        y.numel(), x.shape[1], x.shape[2], x.shape[3], y.shape[2], y.shape[3], pad[0], pad[2], noise_stride,
        fir_gain, slope, gain, clamp,
        KH=fir.shape[0], KW=fir.shape[-1], UP=up, DOWN=down, ONE_AXIS=fir.dim() == 1, FLIP=flip,
        CHANNELS_LAST=fmt is torch.channels_last, EPILOGUE=bool(act), ACT=ACT_CODES.get(act, 0),
        SCALE=scale is not None, NOISE=noise is not None, STRENGTH=strength is not None, BIAS=bias is not None,
        CLAMP=clamp >= 0, ADD=add is not None, BLOCK=block,
    )  # fmt: skip
    return y
