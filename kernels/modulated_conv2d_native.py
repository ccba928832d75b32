# SPDX-License-Identifier: Apache-2.0
"""The passes around modulated_conv2d's convolution, in C++ and CUDA."""

from functools import lru_cache

import torch
from torch import Tensor

from faceedit.kernels import native
from faceedit.kernels.modulated_conv2d_parts import EPSILON
from faceedit.kernels.noise_bias_act import ACTIVATIONS
from faceedit.kernels.tensors import empty, empty_float, empty_like, memory_format


def scale(x: Tensor, style: Tensor) -> Tensor:
    """Return x * style, x contiguous in its format."""
    fmt = memory_format(x)
    y = empty_like(x, fmt)
    n, c, h, w = x.shape
    native.module().noise_bias_act_fwd(
        native.target(x),
        x=x.data_ptr(),
        y=y.data_ptr(),
        scale=style.data_ptr(),
        batch=n,
        channels=c,
        pixels=h * w,
        dtype=native.DTYPE_CODES[x.dtype],
        channels_last=fmt is torch.channels_last,
        gain=1.0,
        clamp=-1.0,
    )
    return y


def epilogue(
    core: Tensor,
    y: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    factors: Tensor | None,
    settings: tuple[str, float, float, float],
) -> Tensor | None:
    """Write the epilogue of `core` into y, which may be core; return ToRGB's sums where factors (N,3,C) are given."""
    scale, noise, strength, bias = vectors
    act, slope, gain, clamp = settings
    n, c, h, w = core.shape
    noise_stride = h * w if noise is not None and noise.shape[0] == n else 0
    if factors is None:
        native.module().noise_bias_act_fwd(
            native.target(core),
            x=core.data_ptr(),
            y=y.data_ptr(),
            scale=native.address(scale),
            noise=native.address(noise),
            strength=native.address(strength),
            bias=native.address(bias),
            batch=n,
            channels=c,
            pixels=h * w,
            noise_stride=noise_stride,
            dtype=native.DTYPE_CODES[core.dtype],
            act=ACTIVATIONS.index(act),
            channels_last=memory_format(core) is torch.channels_last,
            slope=slope,
            gain=gain,
            clamp=clamp,
        )
        return None
    scale = core.new_ones(n, c, dtype=torch.float32) if scale is None else scale
    bias = core.new_zeros(c, dtype=torch.float32) if bias is None else bias
    rgb = empty_float(core, n, 3, h, w)
    native.module().modulated_epilogue_fwd(
        native.target(core),
        x=core.data_ptr(),
        y=y.data_ptr(),
        scale=scale.data_ptr(),
        noise=native.address(noise),
        strength=native.address(strength),
        bias=bias.data_ptr(),
        rgb_factors=factors.data_ptr(),
        rgb=rgb.data_ptr(),
        batch=n,
        channels=c,
        pixels=h * w,
        noise_stride=noise_stride,
        dtype=native.DTYPE_CODES[core.dtype],
        act=ACTIVATIONS.index(act),
        channels_last=memory_format(core) is torch.channels_last,
        slope=slope,
        gain=gain,
        clamp=clamp,
    )
    return rgb


def dots(x: Tensor, factors: Tensor) -> Tensor:
    """Return sum_c factors[n,k,c] * x[n,c,h,w], (N,3,H,W), float32 and planar."""
    n, c, h, w = x.shape
    rgb = empty_float(x, n, 3, h, w)
    native.module().modulated_epilogue_fwd(
        native.target(x),
        x=x.data_ptr(),
        rgb_factors=factors.data_ptr(),
        rgb=rgb.data_ptr(),
        batch=n,
        channels=c,
        pixels=h * w,
        dtype=native.DTYPE_CODES[x.dtype],
        channels_last=memory_format(x) is torch.channels_last,
    )
    return rgb


@lru_cache(maxsize=1024)
def _epilogue_size(on_cpu: bool, shape: torch.Size, is_channels_last: bool, wanted: tuple[bool, ...]) -> int:
    """Return how many floats epilogue_backward needs for its sums; wanted: as there."""
    n, c, h, w = shape
    return native.module().modulated_epilogue_bwd_workspace(
        native.place(on_cpu),
        grad_scale=wanted[0],
        grad_strength=wanted[2],
        grad_bias=wanted[3],
        grad_factors=wanted[4],
        batch=n,
        channels=c,
        pixels=h * w,
        channels_last=is_channels_last,
    )


def epilogue_backward(
    grad: Tensor | None,
    saved: Tensor,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    factors: Tensor | None,
    grad_rgb: Tensor | None,
    settings: tuple[str, float, float, float],
    wanted: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """Return dL/dcore, and the gradients to scale, noise (N,1,H,W), strength, bias and factors; None: not wanted."""
    scale, noise, strength, bias = vectors
    act, slope, gain, clamp = settings
    n, c, h, w = saved.shape
    fmt = memory_format(saved)
    core_grad = empty_like(saved, fmt)
    grad_scale = empty_float(saved, n, c) if wanted[0] else None
    grad_noise = empty_float(saved, n, 1, h, w) if wanted[1] else None
    grad_strength = empty_float(saved) if wanted[2] else None
    grad_bias = empty_float(saved, c) if wanted[3] else None
    grad_factors = empty_float(saved, n, 3, c) if wanted[4] else None
    size = _epilogue_size(saved.is_cpu, saved.shape, fmt is torch.channels_last, wanted)
    workspace = empty_float(saved, size) if size else None
    native.module().modulated_epilogue_bwd(
        native.target(saved),
        grad=native.address(grad),
        saved=saved.data_ptr(),
        grad_x=core_grad.data_ptr(),
        scale=native.address(scale),
        noise=native.address(noise),
        strength=native.address(strength),
        bias=native.address(bias),
        rgb_factors=native.address(factors),
        grad_rgb=native.address(grad_rgb),
        grad_scale=native.address(grad_scale),
        grad_noise=native.address(grad_noise),
        grad_strength=native.address(grad_strength),
        grad_bias=native.address(grad_bias),
        grad_factors=native.address(grad_factors),
        workspace=native.address(workspace),
        batch=n,
        channels=c,
        pixels=h * w,
        noise_stride=h * w if noise is not None and noise.shape[0] == n else 0,
        dtype=native.DTYPE_CODES[saved.dtype],
        act=ACTIVATIONS.index(act),
        channels_last=fmt is torch.channels_last,
        slope=slope,
        gain=gain,
        clamp=clamp,
    )
    return core_grad, (grad_scale, grad_noise, grad_strength, grad_bias, grad_factors)


@lru_cache(maxsize=1024)
def _style_size(on_cpu: bool, shape: torch.Size, is_channels_last: bool) -> int:
    """Return how many floats style_backward needs for its sum."""
    n, c, h, w = shape
    return native.module().modulated_style_bwd_workspace(
        native.place(on_cpu), grad_style=1, batch=n, channels=c, pixels=h * w, channels_last=is_channels_last
    )


def style_backward(x: Tensor, grad: Tensor, style: Tensor, wanted: bool) -> Tensor | None:
    """Multiply `grad` by style, in place; return the sum over pixels of grad * x, (N,C), where wanted."""
    n, c, h, w = x.shape
    is_channels_last = memory_format(x) is torch.channels_last
    grad_style = workspace = None
    if wanted:
        grad_style = empty_float(x, n, c)
        workspace = empty_float(x, _style_size(x.is_cpu, x.shape, is_channels_last))
    native.module().modulated_style_bwd(
        native.target(x),
        x=x.data_ptr(),
        grad=grad.data_ptr(),
        grad_x=grad.data_ptr(),
        style=style.data_ptr(),
        grad_style=native.address(grad_style),
        workspace=native.address(workspace),
        batch=n,
        channels=c,
        pixels=h * w,
        dtype=native.DTYPE_CODES[x.dtype],
        channels_last=is_channels_last,
    )
    return grad_style


def demodulate(style: Tensor, squares: Tensor) -> Tensor:
    """Return (sum_i style^2 * squares + EPSILON)^-1/2, (N,O), of contiguous float32 (N,I) and (O,I)."""
    (n, inputs), outputs = style.shape, squares.shape[0]
    found = empty_float(style, n, outputs)
    native.module().demodulation_fwd(
        native.target(squares),
        squares=squares.data_ptr(),
        style=style.data_ptr(),
        demodulation=found.data_ptr(),
        batch=n,
        outputs=outputs,
        inputs=inputs,
        epsilon=EPSILON,
    )
    return found


def demodulate_backward(
    grad_style: Tensor, grad: Tensor, demodulation: Tensor, style: Tensor, squares: Tensor
) -> Tensor:
    """Add what reaches style (N,I) through the demodulation to its gradient, in place; grad (N,O) is that of d."""
    (n, inputs), outputs = style.shape, squares.shape[0]
    native.module().demodulation_bwd(
        native.target(squares),
        squares=squares.data_ptr(),
        style=style.data_ptr(),
        demodulation=demodulation.data_ptr(),
        grad=grad.data_ptr(),
        grad_style=grad_style.data_ptr(),
        batch=n,
        outputs=outputs,
        inputs=inputs,
    )
    return grad_style


def modulate(weight: Tensor, style: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Return weight * style in dtype: (O,I,k,k), or (I,O,k,k) when transposed, times (1,I).

    weight and style are float32; the weight is contiguous in its format, which the result has too.
    """
    y = empty(tuple(weight.shape), weight, dtype, memory_format(weight))
    channels, taps = style.shape[1], weight.shape[2] * weight.shape[3]
    inner = weight.shape[1] * taps if transposed else taps
    if not transposed and memory_format(weight) is torch.channels_last:
        inner = 1
    native.module().modulated_weight(
        native.target(weight),
        weight=weight.data_ptr(),
        style=style.data_ptr(),
        y=y.data_ptr(),
        outer=weight.numel() // (channels * inner),
        channels=channels,
        inner=inner,
        dtype=native.DTYPE_CODES[dtype],
    )
    return y
