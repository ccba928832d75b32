# SPDX-License-Identifier: Apache-2.0
"""The epilogue of a convolution in one pass: scale, noise, bias, activation, gain and clamp.

Steps, numbered alike in the reference, csrc/noise_bias_act.cpp, csrc/noise_bias_act.cu and the Triton body:
1. z = x * scale    2. z += noise * strength    3. z += bias    4. y = act(z) * gain    5. y = clamp(y, -clamp, clamp)
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import native
from faceedit.kernels.activations import ACTIVATIONS, activate, activation_slope, check_activation
from faceedit.kernels.dispatch import dispatcher, requested_backend
from faceedit.kernels.operator import define_op, mapped_first, mapped_slices, register_onnx_decomposition
from faceedit.kernels.tensors import (
    apart_from,
    as_float,
    as_number,
    check_image,
    check_shape,
    empty_float,
    empty_like,
    in_dtype,
    in_format,
    memory_format,
)

PIECEWISE_LINEAR = ("linear", "relu", "lrelu")

Operands = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # scale, noise, strength, bias
Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of x, scale, noise, strength, bias; empty where not wanted


def noise_bias_act(
    x: Tensor,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    act: str = "lrelu",
    slope: float = 0.2,
    gain: float = 1.0,
    clamp: float = -1.0,
) -> Tensor:
    """Scale x per channel, add noise and a bias, activate, and clamp, reading and writing memory once.

    y = clamp(act(x * scale[n,c] + noise[n,h,w] * strength + bias[c]) * gain, -clamp, clamp)

    Args:     x (N,C,H,W) fp64|fp32|fp16|bf16, NCHW or channels_last; scale (N,C); noise (N,1,H,W) or (1,1,H,W);
              strength one value, used with noise, None = 1; bias (C). act: linear, relu, lrelu (`slope` below zero),
              tanh, sigmoid, silu. clamp < 0: none.
    Returns:  y with x's shape, dtype and memory format; computed in fp32 (fp64 for fp64), whatever dtypes come.
    Grad:     every tensor, to second order. Where |y| >= clamp the gradient is 0; at z = 0 lrelu takes the positive
              side and relu the flat one. NaN passes through, the clamp included.
    Backends: eager (any device), cpu, cuda, triton. Against fp64 eager: fp32 2e-6 * max(1, gain), fp16 and bf16 1 ulp.
    Raises:   TypeError on a dtype that is not floating point; ValueError on shape, device or an unknown act.
    Source:   Karras et al. 2020 (StyleGAN2), section 2.2 and appendix B, as one kernel.
    """
    check_image("noise_bias_act", "x", x)
    n, c, h, w = x.shape
    check_activation("noise_bias_act", act, slope, gain, clamp)
    if scale is not None:
        check_shape("noise_bias_act", "scale", scale, x, (n, c))
    if bias is not None:
        check_shape("noise_bias_act", "bias", bias, x, (c,))
    if noise is not None:
        check_shape("noise_bias_act", "noise", noise, x, (n, 1, h, w), (1, 1, h, w))
    if strength is not None:
        if noise is None:
            raise ValueError("noise_bias_act: strength must come with noise, got noise=None; pass both or neither")
        check_shape("noise_bias_act", "strength", strength, x, (), (1,))
        strength = strength.reshape(()) if strength.dim() else strength
    return _op(x, scale, noise, strength, bias, act, *map(as_number, (slope, gain, clamp)))


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _pre_activation(x: Tensor, operands: Operands) -> Tensor:
    scale, noise, strength, bias = operands
    dtype = _compute_dtype(x)
    z = x.to(dtype)
    if scale is not None:
        z = z * scale.to(dtype)[:, :, None, None]
    if noise is not None:
        z = z + (noise.to(dtype) if strength is None else noise.to(dtype) * strength.to(dtype))
    if bias is not None:
        z = z + bias.to(dtype)[None, :, None, None]
    return z


def reference(
    x: Tensor,
    scale: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    slope: float,
    gain: float,
    clamp: float,
) -> Tensor:
    """Compute noise_bias_act in plain PyTorch: the oracle in fp64, and what ONNX export writes."""
    y = activate(_pre_activation(x, (scale, noise, strength, bias)), act, slope)
    if gain != 1.0:
        y = y * gain
    if clamp >= 0:
        y = y.clamp(-clamp, clamp)
    return y.to(x.dtype)


def _eager(x: Tensor, *arguments: Any) -> Tensor:
    # `contiguous` may hand x itself back (act="linear" with nothing to add).
    return apart_from(reference(x, *arguments).contiguous(memory_format=memory_format(x)), x)


def _native(
    x: Tensor,
    scale: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    slope: float,
    gain: float,
    clamp: float,
) -> Tensor:
    fmt = memory_format(x)
    x = x.contiguous(memory_format=fmt)
    scale, noise, strength, bias = as_float(scale), as_float(noise), as_float(strength), as_float(bias)
    y = empty_like(x, fmt)
    n, c, h, w = x.shape
    native.module().noise_bias_act_fwd(
        native.target(x),
        x=x.data_ptr(),
        y=y.data_ptr(),
        scale=native.address(scale),
        noise=native.address(noise),
        strength=native.address(strength),
        bias=native.address(bias),
        batch=n,
        channels=c,
        pixels=h * w,
        noise_stride=h * w if noise is not None and noise.shape[0] == n else 0,
        dtype=native.DTYPE_CODES[x.dtype],
        act=ACTIVATIONS.index(act),
        channels_last=fmt is torch.channels_last,
        slope=slope,
        gain=gain,
        clamp=clamp,
    )
    return y


@lru_cache(maxsize=1024)
def _workspace_size(on_cpu: bool, shape: torch.Size, is_channels_last: bool, wanted: tuple[bool, bool, bool]) -> int:
    """Return how many floats a backward pass needs for its sums; wanted: of scale, strength and bias."""
    n, c, h, w = shape
    return native.module().noise_bias_act_bwd_workspace(
        native.place(on_cpu),
        grad_scale=wanted[0],
        grad_strength=wanted[1],
        grad_bias=wanted[2],
        batch=n,
        channels=c,
        pixels=h * w,
        channels_last=is_channels_last,
    )


def _triton(x: Tensor, *arguments: Any) -> Tensor:
    from faceedit.kernels import noise_bias_act_triton

    return noise_bias_act_triton.forward(x, *arguments)


_forward = dispatcher("noise_bias_act", eager=_eager, cpu=_native, cuda=_native, triton=_triton)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(x, memory_format=memory_format(x))


_op = define_op(
    "noise_bias_act(Tensor x, Tensor? scale, Tensor? noise, Tensor? strength, Tensor? bias, str act, float slope, "
    "float gain, float clamp) -> Tensor",
    _forward,
    _fake,
)


# Backward. The output is saved where it tells everything (piecewise linear, gain and slope positive): it lives on as
# the next layer's input, so the layer keeps nothing of its own. Otherwise the input is saved, and z is computed again.


def _slope(
    saved: Tensor, saved_is_input: bool, operands: Operands, act: str, slope: float, gain: float, clamp: float
) -> Tensor:
    """Return dy/dz: differentiable through `saved` when that is the input, a constant when it is the output."""
    if saved_is_input:
        z = _pre_activation(saved, operands)
        limit = torch.full((), clamp, dtype=z.dtype, device=z.device)
        magnitude = (activate(z, act, slope) * gain).abs()
    else:
        z = saved.detach().to(_compute_dtype(saved))
        # The output was rounded to its dtype, so the limit it was clamped to is the rounded one.
        limit = torch.full((), clamp, dtype=saved.dtype, device=saved.device).to(z.dtype)
        magnitude = z.abs()
    derivative = activation_slope(z, act, slope) * gain
    return torch.where(magnitude >= limit, 0.0, derivative) if clamp >= 0 else derivative


def backward_reference(
    grad: Tensor,
    saved: Tensor,
    saved_is_input: bool,
    scale: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    slope: float,
    gain: float,
    clamp: float,
    wanted: list[bool],
) -> Gradients:
    """Compute the gradients in plain PyTorch: the oracle, the eager backend, and the path that is differentiated again.

    wanted: for x, scale, noise, strength and bias. A gradient that is not wanted is an empty tensor.
    """
    dtype = _compute_dtype(saved)
    operands = (scale, noise, strength, bias)
    gz = grad.to(dtype) * _slope(saved, saved_is_input, operands, act, slope, gain, clamp)
    gx, gscale, gnoise, gstrength, gbias = (grad.new_empty(0) for _ in range(5))
    if wanted[0]:
        gx = (gz if scale is None else gz * scale.to(dtype)[:, :, None, None]).to(saved.dtype)
    if wanted[1] and scale is not None:
        gscale = (gz * saved.to(dtype)).sum((2, 3)).to(scale.dtype)
    if (wanted[2] or wanted[3]) and noise is not None:
        rows = gz.sum(1, keepdim=True)
        if noise.shape[0] != rows.shape[0]:
            rows = rows.sum(0, keepdim=True)
        if wanted[2]:
            gnoise = (rows if strength is None else rows * strength.to(dtype)).to(noise.dtype)
        if wanted[3] and strength is not None:
            gstrength = (rows * noise.to(dtype)).sum().to(strength.dtype)
    if wanted[4] and bias is not None:
        gbias = gz.sum((0, 2, 3)).to(bias.dtype)
    return gx, gscale, gnoise, gstrength, gbias


def _backward_eager(grad: Tensor, saved: Tensor, *arguments: Any) -> Gradients:
    gx, gscale, gnoise, gstrength, gbias = backward_reference(grad, saved, *arguments)
    if gx.dim() == 4:
        gx = gx.contiguous(memory_format=memory_format(saved))
    return gx, gscale, gnoise, gstrength, gbias


def _backward_native(
    grad: Tensor,
    saved: Tensor,
    saved_is_input: bool,
    scale: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    act: str,
    slope: float,
    gain: float,
    clamp: float,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    fmt = memory_format(saved)
    saved = saved.contiguous(memory_format=fmt)
    grad = in_format(grad, saved.dtype, fmt)
    scale_f, noise_f, strength_f, bias_f = as_float(scale), as_float(noise), as_float(strength), as_float(bias)
    n, c, h, w = saved.shape
    gx = empty_like(saved, fmt)
    gscale = empty_float(saved, n, c) if wanted[1] else None
    gnoise = empty_float(saved, n, 1, h, w) if wanted[2] else None
    gstrength = empty_float(saved) if wanted[3] else None
    gbias = empty_float(saved, c) if wanted[4] else None
    workspace = None
    if gscale is not None or gstrength is not None or gbias is not None:
        sums = (gscale is not None, gstrength is not None, gbias is not None)
        size = _workspace_size(saved.is_cpu, saved.shape, fmt is torch.channels_last, sums)
        workspace = empty_float(saved, size)
    native.module().noise_bias_act_bwd(
        native.target(saved),
        grad=grad.data_ptr(),
        saved=saved.data_ptr(),
        grad_x=gx.data_ptr(),
        scale=native.address(scale_f),
        noise=native.address(noise_f),
        strength=native.address(strength_f),
        bias=native.address(bias_f),
        grad_scale=native.address(gscale),
        grad_noise=native.address(gnoise),
        grad_strength=native.address(gstrength),
        grad_bias=native.address(gbias),
        workspace=native.address(workspace),
        batch=n,
        channels=c,
        pixels=h * w,
        noise_stride=h * w if noise_f is not None and noise_f.shape[0] == n else 0,
        dtype=native.DTYPE_CODES[saved.dtype],
        act=ACTIVATIONS.index(act),
        channels_last=fmt is torch.channels_last,
        saved_is_input=saved_is_input,
        slope=slope,
        gain=gain,
        clamp=clamp,
    )
    if gnoise is not None and noise is not None and noise.shape[0] != n:
        gnoise = gnoise.sum(0, keepdim=True)
    return gx, _cast(gscale, scale), _cast(gnoise, noise), _cast(gstrength, strength), _cast(gbias, bias)


def _cast(gradient: Tensor | None, operand: Tensor | None) -> Tensor | None:
    return None if gradient is None or operand is None else in_dtype(gradient, operand.dtype)


def _backward_triton(grad: Tensor, *arguments: Any) -> Gradients:
    from faceedit.kernels import noise_bias_act_triton

    return noise_bias_act_triton.backward(grad, *arguments)


_backward = dispatcher(
    "noise_bias_act_backward",
    eager=_backward_eager,
    cpu=_backward_native,
    cuda=_backward_native,
    triton=_backward_triton,
)


def _backward_fake(
    grad: Tensor, saved: Tensor, saved_is_input: bool, scale: Any, noise: Any, strength: Any, bias: Any, *settings: Any
) -> Gradients:
    wanted: list[bool] = settings[-2]
    gx = torch.empty_like(saved, memory_format=memory_format(saved))
    others = [
        operand.new_empty(operand.shape) if want and operand is not None else grad.new_empty(0)
        for want, operand in zip(wanted[1:], (scale, noise, strength, bias), strict=True)
    ]
    return gx, others[0], others[1], others[2], others[3]


noise_bias_act_backward_op = define_op(
    "noise_bias_act_backward(Tensor grad, Tensor saved, bool saved_is_input, Tensor? scale, Tensor? noise, "
    "Tensor? strength, Tensor? bias, str act, float slope, float gain, float clamp, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, scale, noise, strength, bias, ctx.act, ctx.slope, ctx.gain, ctx.clamp = inputs
    output_tells_all = ctx.act in PIECEWISE_LINEAR and ctx.gain > 0 and (ctx.act != "lrelu" or ctx.slope > 0)
    ctx.saved_is_input = not output_tells_all or ctx.needs_input_grad[1]
    ctx.backend = requested_backend()
    ctx.save_for_backward(x if ctx.saved_is_input else output, scale, noise, strength, bias)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:5])
    saved, *operands = ctx.saved_tensors
    arguments = (grad, saved, ctx.saved_is_input, *operands, ctx.act, ctx.slope, ctx.gain, ctx.clamp, wanted)
    if torch.is_grad_enabled():  # create_graph=True: the gradient is itself differentiated
        gradients = backward_reference(*arguments)
    else:
        gradients = noise_bias_act_backward_op(*arguments, ctx.backend)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)
register_onnx_decomposition(_op, reference)


@_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Fold the mapped axis into N; one call a slice where a per-call operand (strength, bias) is mapped itself."""
    x, scale, noise, strength, bias, *settings = arguments
    size = info.batch_size
    if in_dims[3] is not None or in_dims[4] is not None:
        return mapped_slices(_op, info, in_dims, arguments)
    x = x.unsqueeze(0).expand(size, *x.shape) if in_dims[0] is None else x.movedim(in_dims[0], 0)
    scale, noise = mapped_first(scale, in_dims[1], size), mapped_first(noise, in_dims[2], size)
    if scale is not None:
        scale = scale.flatten(0, 1)
    if noise is not None:
        noise = noise.expand(size, x.shape[1], *noise.shape[2:]).flatten(0, 1)
    y = _op(x.flatten(0, 1), scale, noise, strength, bias, *settings)
    return y.unflatten(0, (size, -1)), 0
