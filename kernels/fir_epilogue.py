# SPDX-License-Identifier: Apache-2.0
"""upfirdn2d with the epilogue of a convolution and a skip image behind it, one read and one write.

z = upfirdn2d(x), then the steps of noise_bias_act on z while it is in registers, then `add`.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import native
from faceedit.kernels.activations import ACTIVATIONS, check_activation
from faceedit.kernels.dispatch import backend_again, dispatcher, requested_backend
from faceedit.kernels.noise_bias_act import (
    PIECEWISE_LINEAR,
    backward_reference,
    noise_bias_act_backward_op,
)
from faceedit.kernels.noise_bias_act import reference as epilogue
from faceedit.kernels.operator import define_op, mapped_first, mapped_slices, register_onnx_decomposition
from faceedit.kernels.tensors import as_float, as_number, check_number, check_shape, empty, in_format, memory_format
from faceedit.kernels.upfirdn2d import (
    ONE_THREAD,
    check_geometry,
    filtered,
    native_geometry,
    output_shape,
    refuse_fir_gradient,
    transposed,
    upfirdn2d_op,
)


def fir_epilogue(
    x: Tensor,
    fir: Tensor,
    *,
    up: int = 1,
    down: int = 1,
    pad: int | Sequence[int] = 0,
    fir_gain: float = 1.0,
    flip: bool = False,
    scale: Tensor | None = None,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    add: Tensor | None = None,
    act: str = "lrelu",
    slope: float = 0.2,
    gain: float = 1.0,
    clamp: float = -1.0,
) -> Tensor:
    """Filter, then scale, add noise and a bias, activate, clamp and add a skip image, reading and writing memory once.

    z = upfirdn2d(x, fir, ...)
    y = clamp(act(z * scale[n,c] + noise[n,h,w] * strength + bias[c]) * gain, -clamp, clamp) + add

    Args:     x, fir, up, down, pad, fir_gain, flip as x, fir, up, down, pad, gain, flip of upfirdn2d; scale (N,C),
              noise (N,1,H',W') or (1,1,H',W'), strength, bias (C), act, slope, gain, clamp as in noise_bias_act, where
              (H',W') is the size that comes out; add (N,C,H',W'), read as x's dtype.
    Returns:  y (N,C,H',W') with x's dtype and memory format; computed in fp32 (fp64 for fp64).
    Grad:     every tensor but fir, to second order; kinks as in noise_bias_act. fir: ValueError when it requires grad.
    Backends: eager (any device), cpu, cuda, triton. Against fp64 eager: fp32 2e-6 * max(1, gain), fp16 and bf16 1 ulp.
    Raises:   TypeError on a dtype that is not floating point; ValueError on shape, device or an unknown act.
    Source:   Karras et al. 2020 (StyleGAN2), section 2.2 and appendix B: what follows an upsampling convolution.
    """
    up, down, sides = check_geometry("fir_epilogue", x, fir, up, down, pad)
    n, c, h, w = output_shape(x, fir, up, down, sides)
    check_activation("fir_epilogue", act, slope, gain, clamp)
    check_number("fir_epilogue", "fir_gain", fir_gain)
    if scale is not None:
        check_shape("fir_epilogue", "scale", scale, x, (n, c))
    if bias is not None:
        check_shape("fir_epilogue", "bias", bias, x, (c,))
    if noise is not None:
        check_shape("fir_epilogue", "noise", noise, x, (n, 1, h, w), (1, 1, h, w))
    if add is not None:
        check_shape("fir_epilogue", "add", add, x, (n, c, h, w))
    if strength is not None:
        if noise is None:
            raise ValueError("fir_epilogue: strength must come with noise, got noise=None; pass both or neither")
        check_shape("fir_epilogue", "strength", strength, x, (), (1,))
        strength = strength.reshape(()) if strength.dim() else strength
    return fir_epilogue_op(
        x,
        fir,
        up,
        down,
        sides,
        as_number(fir_gain),
        flip,
        scale,
        noise,
        strength,
        bias,
        add,
        act,
        *map(as_number, (slope, gain, clamp)),
    )


def reference(
    x: Tensor,
    fir: Tensor,
    up: int,
    down: int,
    pad: list[int],
    fir_gain: float,
    flip: bool,
    scale: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    act: str,
    slope: float,
    gain: float,
    clamp: float,
) -> Tensor:
    """Compute fir_epilogue in plain PyTorch: the oracle in fp64, and what ONNX export writes."""
    z = filtered(x, fir, up, down, pad, fir_gain, flip)
    y = epilogue(z, scale, noise, strength, bias, act, slope, gain, clamp)
    if add is not None:
        y = y + add.to(y.dtype)
    return y.to(x.dtype)


def _eager(x: Tensor, *arguments: Any) -> Tensor:
    return reference(x, *arguments).contiguous(memory_format=memory_format(x))


def _native(
    x: Tensor,
    fir: Tensor,
    up: int,
    down: int,
    pad: list[int],
    fir_gain: float,
    flip: bool,
    scale: Tensor | None,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    add: Tensor | None,
    act: str,
    slope: float,
    gain: float,
    clamp: float,
) -> Tensor:
    fmt = memory_format(x)
    x = x.contiguous(memory_format=fmt)
    taps = in_format(fir, torch.float32, torch.contiguous_format)
    scale, noise, strength, bias = map(as_float, (scale, noise, strength, bias))
    y = empty(output_shape(x, fir, up, down, pad), x, x.dtype, fmt)
    if add is not None:
        add = in_format(add, x.dtype, fmt)
    native.module().upfirdn2d_fwd(
        native.target(y, ONE_THREAD),
        **native_geometry(x, taps, up, down, pad, fir_gain, flip, y),
        epilogue=True,
        scale=native.address(scale),
        noise=native.address(noise),
        noise_stride=y.shape[2] * y.shape[3] if noise is not None and noise.shape[0] == x.shape[0] else 0,
        strength=native.address(strength),
        bias=native.address(bias),
        add=native.address(add),
        act=ACTIVATIONS.index(act),
        slope=slope,
        gain=gain,
        clamp=clamp,
    )
    return y


def _triton(x: Tensor, *arguments: Any) -> Tensor:
    from faceedit.kernels import upfirdn2d_triton

    return upfirdn2d_triton.forward(x, *arguments)


_forward = dispatcher("fir_epilogue", eager=_eager, cpu=_native, cuda=_native, triton=_triton)


def _fake(x: Tensor, fir: Tensor, up: int, down: int, pad: list[int], *arguments: Any) -> Tensor:
    return x.new_empty(output_shape(x, fir, up, down, pad)).contiguous(memory_format=memory_format(x))


fir_epilogue_op = define_op(
    "fir_epilogue(Tensor x, Tensor fir, int up, int down, int[] pad, float fir_gain, bool flip, Tensor? scale, "
    "Tensor? noise, Tensor? strength, Tensor? bias, Tensor? add, str act, float slope, float gain, float clamp)"
    " -> Tensor",
    _forward,
    _fake,
)


# Backward: the epilogue's, then the transposed filter; both are ops with kernels of their own. The output is saved
# where it tells the activation's slope: it lives on as the next layer's input. A gradient to scale needs z itself.
# Undoing the epilogue would divide by scale and by slope, and cannot see past the clamp and `add`, so x is saved and
# filtered again instead: one more pass over memory, no more kernels. Where no slope changes, as on the way from one
# size of image to the next, nothing is saved and, without scale and gain, the epilogue's own pass is left out.


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    refuse_fir_gradient("fir_epilogue", ctx)
    x, fir, *geometry = inputs[:7]
    scale, noise, strength, bias, add, ctx.act, ctx.slope, ctx.gain, ctx.clamp = inputs[7:]
    output_tells_all = (
        add is None and ctx.act in PIECEWISE_LINEAR and ctx.gain > 0 and (ctx.act != "lrelu" or ctx.slope > 0)
    )
    ctx.saved_is_input = not output_tells_all or ctx.needs_input_grad[7]
    ctx.has_one_slope = ctx.act == "linear" and ctx.clamp < 0 and not ctx.needs_input_grad[7]
    ctx.geometry = geometry
    ctx.size, ctx.format = x.shape[2:], memory_format(x)
    ctx.add_dtype = None if add is None else add.dtype
    ctx.backend = requested_backend()
    saved = None if ctx.has_one_slope else x if ctx.saved_is_input else output
    ctx.save_for_backward(saved, fir, scale, noise, strength, bias)


def _arranged(grad: Tensor, fmt: torch.memory_format) -> Tensor:
    """Return the gradient in this format; vmap knows of channels_last by its strides alone."""
    if fmt is torch.channels_last:
        return grad.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    return grad.contiguous()


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wants = ctx.needs_input_grad
    wanted = [wants[0], *wants[7:11]]
    saved, fir, *operands = ctx.saved_tensors
    others: list[Tensor | None] = [None] * 4
    if ctx.has_one_slope:
        grad = _arranged(grad, ctx.format)
    with backend_again(ctx.backend):
        if ctx.has_one_slope and ctx.gain == 1.0 and operands[0] is None and not any(wanted[1:]):
            gz = grad
        else:
            # With one slope, any values will do.
            z = grad if ctx.has_one_slope else upfirdn2d_op(saved, fir, *ctx.geometry) if ctx.saved_is_input else saved
            arguments = (grad, z, ctx.saved_is_input, *operands, ctx.act, ctx.slope, ctx.gain, ctx.clamp, wanted)
            if torch.is_grad_enabled():  # create_graph=True: the gradient is itself differentiated
                gz, *others = backward_reference(*arguments)
            else:
                gz, *others = noise_bias_act_backward_op(*arguments, ctx.backend)
        gx = transposed(gz, fir, *ctx.geometry, *ctx.size) if wants[0] else None
    found = [g if want else None for g, want in zip(others, wants[7:11], strict=True)]
    gadd = grad.to(ctx.add_dtype) if wants[11] else None
    return gx, *(None,) * 6, *found, gadd, *(None,) * 4


fir_epilogue_op.register_autograd(_autograd, setup_context=_setup_context)
register_onnx_decomposition(fir_epilogue_op, reference)


@fir_epilogue_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Fold the mapped axis into N; one call a slice where fir, strength or bias, one a call, is mapped itself."""
    size = info.batch_size
    if any(in_dims[i] is not None for i in (1, 9, 10)):
        return mapped_slices(fir_epilogue_op, info, in_dims, arguments)
    folded = list(arguments)
    x = mapped_first(arguments[0], in_dims[0], size)
    scale, noise, add = (mapped_first(arguments[i], in_dims[i], size) for i in (7, 8, 11))
    assert x is not None
    folded[0] = x.flatten(0, 1)
    if scale is not None:
        folded[7] = scale.flatten(0, 1)
    if noise is not None:
        folded[8] = noise.expand(size, x.shape[1], *noise.shape[2:]).flatten(0, 1)
    if add is not None:
        folded[11] = add.flatten(0, 1)
    return fir_epilogue_op(*folded).unflatten(0, (size, -1)), 0
