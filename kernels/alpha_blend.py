# SPDX-License-Identifier: Apache-2.0
"""Paste one image over another under a soft mask, optionally straight to uint8, in one pass.

Steps, numbered alike in the reference, csrc/alpha_blend.cpp, csrc/alpha_blend.cu and the Triton body:
1. f, b = values of fg and bg    2. y = b + mask * (f - b)    3. y = b where mask = 0, f where mask = 1    4. store y
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels import native
from faceedit.kernels.dispatch import NATIVE_DTYPES, dispatcher, requested_backend
from faceedit.kernels.operator import define_op, mapped_first, register_onnx_decomposition
from faceedit.kernels.tensors import (
    as_integer,
    check_mask,
    check_shape,
    check_tensor,
    describe,
    empty,
    empty_float,
    empty_like,
    memory_format,
)

Gradients = tuple[Tensor, Tensor, Tensor]  # of fg, bg, mask; empty where not wanted


def alpha_blend(fg: Tensor, bg: Tensor, mask: Tensor, *, feather: int = 0, quantize: bool = False) -> Tensor:
    """Return bg + mask * (fg - bg), with exactly bg where the mask is 0 and exactly fg where it is 1.

    There the other image is not looked at: its NaN does not leak. A uint8 image stands for value / 127.5 - 1.

    Args:     fg, bg (N,C,H,W) fp64|fp32|fp16|bf16|uint8, NCHW or channels_last; a floating bg is cast to fg's dtype
              (fp32 where fg is uint8). mask (N,1,H,W) or (1,1,H,W) in [0,1], floating point, bool, or uint8 (a number:
              1 is all fg).
              feather: a radius in pixels. The mask is first averaged over squares of side 2 * feather + 1, its edge
              pixels repeated outside: a straight edge becomes a linear ramp of that width, centred on it; what lies
              farther than feather inside stays exactly 1, and what lies farther outside exactly 0.
              quantize: answer in uint8, clamp(round(y * 127.5 + 127.5), 0, 255), halves to even, NaN to 0.
    Returns:  y with fg's shape, dtype (or uint8) and memory format; computed in fp32 (fp64 for fp64).
    Grad:     floating fg, bg and mask, to second order, of the straight line between bg and fg, also at 0 and 1.
              A uint8 result has none.
    Backends: eager (any device), cpu, cuda, triton. Against fp64 eager: fp32 2e-6, fp16 and bf16 1 ulp, uint8 the same
              level but where the value lies within 1e-4 of a half. `feather` is a pass of PyTorch operators.
    Raises:   TypeError on a dtype; ValueError on shape, device or a negative feather.
    Source:   Porter & Duff 1984, "over" with an opaque background.
    """
    for name, image in (("fg", fg), ("bg", bg)):
        check_tensor("alpha_blend", name, image)
        if image.dim() != 4:
            raise ValueError(
                f"alpha_blend: {name} must be of shape (N, C, H, W), got {describe(image)}; add the missing axes"
            )
        if not image.is_floating_point() and image.dtype != torch.uint8:
            raise TypeError(f"alpha_blend: {name} must be floating point or uint8, got {describe(image)}; cast it")
    check_shape("alpha_blend", "bg", bg, fg, tuple(fg.shape), any_dtype=True)
    check_mask("alpha_blend", "mask", mask, fg)
    feather = as_integer("alpha_blend", "feather", feather, "a radius is whole pixels, 0 is none")
    if feather < 0:
        raise ValueError(f"alpha_blend: feather must be a number of pixels >= 0, got {feather}; pass 0 for none")
    if bg.is_floating_point():
        bg = bg.to(fg.dtype if fg.is_floating_point() else torch.float32)
    if feather:
        mask = soften(mask, feather)
    return _op(fg, bg, mask, quantize)


def soften(mask: Tensor, radius: int) -> Tensor:
    """Average a mask over squares of side 2 * radius + 1, rows and columns in turn. Means of ones are exactly 1."""
    m = mask.to(torch.float64 if mask.dtype == torch.float64 else torch.float32)
    side = 2 * radius + 1
    for axis, window in ((3, (1, side)), (2, (side, 1))):
        # Not F.pad's "replicate", whose gradient on a GPU is summed in an order of chance.
        first, last = m.narrow(axis, 0, 1), m.narrow(axis, m.shape[axis] - 1, 1)
        m = torch.cat([*[first] * radius, m, *[last] * radius], axis)
        m = F.avg_pool2d(m, window, stride=1)
    return m


def _compute_dtype(*images: Tensor) -> torch.dtype:
    return torch.float64 if any(image.dtype == torch.float64 for image in images) else torch.float32


def _result_dtype(fg: Tensor, quantize: bool) -> torch.dtype:
    return torch.uint8 if quantize else fg.dtype


def _value(image: Tensor, levels: bool, dtype: torch.dtype) -> Tensor:
    """Return what is computed with: levels 0..255 where the result is uint8, else values in [-1, 1]."""
    v = image.to(dtype)
    if levels:
        return v if image.dtype == torch.uint8 else v * 127.5 + 127.5
    return v / 127.5 - 1 if image.dtype == torch.uint8 else v


def reference(fg: Tensor, bg: Tensor, mask: Tensor, quantize: bool) -> Tensor:
    """Compute alpha_blend in plain PyTorch: the oracle in fp64, and what ONNX export writes."""
    dtype, result = _compute_dtype(fg, bg), _result_dtype(fg, quantize)
    levels = result == torch.uint8
    f, b, m = _value(fg, levels, dtype), _value(bg, levels, dtype), mask.to(dtype)
    y = torch.where(m == 1, f, torch.where(m == 0, b, b + m * (f - b)))
    if levels:
        y = torch.where(y > 0, y, 0.0).clamp(max=255).round()
    return y.to(result)


def _eager(fg: Tensor, *arguments: Any) -> Tensor:
    return reference(fg, *arguments).contiguous(memory_format=memory_format(fg))


def _geometry(image: Tensor, fmt: torch.memory_format) -> dict[str, Any]:
    return {
        "batch": image.shape[0],
        "channels": image.shape[1],
        "pixels": image.shape[2] * image.shape[3],
        "channels_last": fmt is torch.channels_last,
    }


def _native(fg: Tensor, bg: Tensor, mask: Tensor, quantize: bool) -> Tensor:
    fmt = memory_format(fg)
    fg, bg = fg.contiguous(memory_format=fmt), bg.contiguous(memory_format=fmt)
    y = empty(tuple(fg.shape), fg, _result_dtype(fg, quantize), fmt)
    mask = native.readable_mask(mask)
    native.module().alpha_blend_fwd(
        native.target(fg),
        fg=fg.data_ptr(),
        bg=bg.data_ptr(),
        mask=native.mask_operand(mask, fg.shape[0]),
        y=y.data_ptr(),
        fg_dtype=native.DTYPE_CODES[fg.dtype],
        bg_dtype=native.DTYPE_CODES[bg.dtype],
        y_dtype=native.DTYPE_CODES[y.dtype],
        **_geometry(fg, fmt),
    )
    return y


def _triton(fg: Tensor, *arguments: Any) -> Tensor:
    from faceedit.kernels import alpha_blend_triton

    return alpha_blend_triton.forward(fg, *arguments)


_forward = dispatcher(
    "alpha_blend", dtypes=(*NATIVE_DTYPES, torch.uint8), eager=_eager, cpu=_native, cuda=_native, triton=_triton
)


def _fake(fg: Tensor, bg: Tensor, mask: Tensor, quantize: bool) -> Tensor:
    return torch.empty_like(fg, dtype=_result_dtype(fg, quantize), memory_format=memory_format(fg))


_op = define_op("alpha_blend(Tensor fg, Tensor bg, Tensor mask, bool quantize) -> Tensor", _forward, _fake)


# Backward: fg and bg are kept only for the gradient to the mask.


def backward_reference(
    grad: Tensor, mask: Tensor, fg: Tensor | None, bg: Tensor | None, wanted: list[bool]
) -> Gradients:
    """Compute the gradients in plain PyTorch; one that is not wanted is an empty tensor."""
    dtype = _compute_dtype(grad)
    g, m = grad.to(dtype), mask.to(dtype)
    gfg, gbg, gmask = (grad.new_empty(0) for _ in range(3))
    if wanted[0]:
        gfg = (m * g).to(grad.dtype)
    if wanted[1]:
        gbg = ((1 - m) * g).to(grad.dtype)
    if wanted[2] and fg is not None and bg is not None:
        rows = (g * (_value(fg, False, dtype) - _value(bg, False, dtype))).sum(1, keepdim=True)
        gmask = mask_gradient(rows, mask)
    return gfg, gbg, gmask


def mask_gradient(rows: Tensor, mask: Tensor) -> Tensor:
    """Return per-sample sums (N,1,H,W) as the gradient of a mask that may serve the whole batch."""
    return (rows if mask.shape[0] == rows.shape[0] else rows.sum(0, keepdim=True)).to(mask.dtype)


def _backward_eager(grad: Tensor, *arguments: Any) -> Gradients:
    fmt = memory_format(grad)
    gfg, gbg, gmask = (
        g.contiguous(memory_format=fmt) if g.dim() == 4 else g for g in backward_reference(grad, *arguments)
    )
    return gfg, gbg, gmask.contiguous()


def _backward_native(grad: Tensor, mask: Tensor, fg: Tensor | None, bg: Tensor | None, wanted: list[bool]) -> Gradients:
    fmt = memory_format(grad)
    grad = grad.contiguous(memory_format=fmt)
    n, _, h, w = grad.shape
    gfg = empty_like(grad, fmt) if wanted[0] else None
    gbg = empty_like(grad, fmt) if wanted[1] else None
    rows = empty_float(grad, n, 1, h, w) if wanted[2] else None
    fg, bg = (None if t is None else t.contiguous(memory_format=fmt) for t in (fg, bg))
    readable = native.readable_mask(mask)
    code = native.DTYPE_CODES[grad.dtype]
    native.module().alpha_blend_bwd(
        native.target(grad),
        grad=grad.data_ptr(),
        mask=native.mask_operand(readable, n),
        fg=native.address(fg),
        bg=native.address(bg),
        grad_fg=native.address(gfg),
        grad_bg=native.address(gbg),
        grad_mask=native.address(rows),
        fg_dtype=code,
        bg_dtype=code if bg is None else native.DTYPE_CODES[bg.dtype],
        y_dtype=code,
        **_geometry(grad, fmt),
    )
    return (
        grad.new_empty(0) if gfg is None else gfg,
        grad.new_empty(0) if gbg is None else gbg,
        grad.new_empty(0) if rows is None else mask_gradient(rows, mask),
    )


def _backward_triton(grad: Tensor, *arguments: Any) -> Gradients:
    from faceedit.kernels import alpha_blend_triton

    return alpha_blend_triton.backward(grad, *arguments)


_backward = dispatcher(
    "alpha_blend_backward",
    eager=_backward_eager,
    cpu=_backward_native,
    cuda=_backward_native,
    triton=_backward_triton,
)


def _backward_fake(grad: Tensor, mask: Tensor, fg: Any, bg: Any, wanted: list[bool], backend: str) -> Gradients:
    fmt = memory_format(grad)
    gfg, gbg = (torch.empty_like(grad, memory_format=fmt) if want else grad.new_empty(0) for want in wanted[:2])
    return gfg, gbg, mask.new_empty(mask.shape) if wanted[2] else grad.new_empty(0)


_backward_op = define_op(
    "alpha_blend_backward(Tensor grad, Tensor mask, Tensor? fg, Tensor? bg, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    fg, bg, mask, _ = inputs
    ctx.backend = requested_backend()
    if not output.is_floating_point():
        ctx.mark_non_differentiable(output)
    images = (fg, bg) if ctx.needs_input_grad[2] else (None, None)
    ctx.save_for_backward(mask, *images)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    mask, fg, bg = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient is itself differentiated
        gradients = backward_reference(grad, mask, fg, bg, wanted)
    else:
        gradients = _backward_op(grad, mask, fg, bg, wanted, ctx.backend)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None


_op.register_autograd(_autograd, setup_context=_setup_context)
register_onnx_decomposition(_op, reference)


@_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Fold the mapped axis into N."""
    *tensors, quantize = arguments
    fg, bg, mask = (mapped_first(t, dim, info.batch_size) for t, dim in zip(tensors, in_dims[:3], strict=True))
    assert fg is not None and bg is not None and mask is not None  # noqa: PT018
    mask = mask.expand(*fg.shape[:2], *mask.shape[2:])
    y = _op(fg.flatten(0, 1), bg.flatten(0, 1), mask.flatten(0, 1), quantize)
    return y.unflatten(0, (info.batch_size, -1)), 0
