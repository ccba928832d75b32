# SPDX-License-Identifier: Apache-2.0
"""The passes around modulated_conv2d's convolution, in C++ and CUDA."""

from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import native
from faceedit.kernels.modulated_conv2d_parts import EPSILON
from faceedit.kernels.noise_bias_act import ACTIVATIONS
from faceedit.kernels.tensors import empty, empty_float, empty_like, memory_format


def _geometry(x: Tensor, noise: Tensor | None = None) -> dict[str, Any]:
    n, c, h, w = x.shape
    shape = {
        "batch": n,
        "channels": c,
        "pixels": h * w,
        "dtype": native.DTYPE_CODES[x.dtype],
        "channels_last": memory_format(x) is torch.channels_last,
    }
    return shape if noise is None else shape | {"noise_stride": h * w if noise.shape[0] == n else 0}


def scale(x: Tensor, style: Tensor) -> Tensor:
    """Return x * style, x contiguous in its format."""
    y = empty_like(x, memory_format(x))
    native.module().noise_bias_act_fwd(
        native.target(x), x=x.data_ptr(), y=y.data_ptr(), scale=style.data_ptr(), gain=1.0, clamp=-1.0, **_geometry(x)
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
    module, target = native.module(), native.target(core)
    call = {
        "x": core.data_ptr(),
        "y": y.data_ptr(),
        "noise": native.address(noise),
        "strength": native.address(strength),
        "act": ACTIVATIONS.index(act),
        "slope": slope,
        "gain": gain,
        "clamp": clamp,
        **_geometry(core, noise),
    }
    if factors is None:
        module.noise_bias_act_fwd(target, **call, scale=native.address(scale), bias=native.address(bias))
        return None
    scale = core.new_ones(n, c, dtype=torch.float32) if scale is None else scale
    bias = core.new_zeros(c, dtype=torch.float32) if bias is None else bias
    rgb = empty_float(core, n, 3, h, w)
    module.modulated_epilogue_fwd(
        target,
        **call,
        scale=scale.data_ptr(),
        bias=bias.data_ptr(),
        rgb_factors=factors.data_ptr(),
        rgb=rgb.data_ptr(),
    )
    return rgb


def dots(x: Tensor, factors: Tensor) -> Tensor:
    """Return sum_c factors[n,k,c] * x[n,c,h,w], (N,3,H,W), float32 and planar."""
    n, _, h, w = x.shape
    rgb = empty_float(x, n, 3, h, w)
    native.module().modulated_epilogue_fwd(
        native.target(x), x=x.data_ptr(), rgb_factors=factors.data_ptr(), rgb=rgb.data_ptr(), **_geometry(x)
    )
    return rgb


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
    core_grad = empty_like(saved, memory_format(saved))
    shapes: tuple[tuple[int, ...], ...] = ((n, c), (n, 1, h, w), (), (c,), (n, 3, c))
    found = tuple(empty_float(saved, *shape) if want else None for want, shape in zip(wanted, shapes, strict=True))
    module, target = native.module(), native.target(saved)
    call = {
        "grad": native.address(grad),
        "saved": saved.data_ptr(),
        "grad_x": core_grad.data_ptr(),
        "scale": native.address(scale),
        "noise": native.address(noise),
        "strength": native.address(strength),
        "bias": native.address(bias),
        "rgb_factors": native.address(factors),
        "grad_rgb": native.address(grad_rgb),
        "grad_scale": native.address(found[0]),
        "grad_noise": native.address(found[1]),
        "grad_strength": native.address(found[2]),
        "grad_bias": native.address(found[3]),
        "grad_factors": native.address(found[4]),
        "act": ACTIVATIONS.index(act),
        "slope": slope,
        "gain": gain,
        "clamp": clamp,
        **_geometry(saved, noise),
    }
    workspace = empty_float(saved, module.modulated_epilogue_bwd_workspace(target, **call))
    module.modulated_epilogue_bwd(target, **call, workspace=workspace.data_ptr())
    return core_grad, found


def style_backward(x: Tensor, grad: Tensor, style: Tensor, wanted: bool) -> Tensor | None:
    """Multiply `grad` by style, in place; return the sum over pixels of grad * x, (N,C), where wanted."""
    n, c = style.shape
    grad_style = empty_float(x, n, c) if wanted else None
    module, target = native.module(), native.target(x)
    call = {
        "x": x.data_ptr(),
        "grad": grad.data_ptr(),
        "grad_x": grad.data_ptr(),
        "style": style.data_ptr(),
        "grad_style": native.address(grad_style),
        **_geometry(x),
    }
    workspace = empty_float(x, module.modulated_style_bwd_workspace(target, **call))
    module.modulated_style_bwd(target, **call, workspace=workspace.data_ptr())
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
