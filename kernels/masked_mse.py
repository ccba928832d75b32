# SPDX-License-Identifier: Apache-2.0
"""Mean squared error under a soft mask, per sample, with no difference and no combined mask in memory.

Steps, numbered alike in the reference, csrc/masked_mse.cpp, csrc/masked_mse.cu and the Triton body:
1. m = mask or 1    2. m = relax(m, exclude)    3. m = relax(m, include)    4. loss = sum(m * (a - b)^2) / divisor
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels import native
from faceedit.kernels.dispatch import dispatcher, requested_backend
from faceedit.kernels.operator import define_op, mapped_first, register_onnx_decomposition
from faceedit.kernels.tensors import (
    check_image,
    check_mask,
    check_shape,
    empty_float,
    empty_like,
    in_format,
    memory_format,
)

RELAX = ("clamp", "minmax")
NORMALIZE = ("all", "mask")


def masked_mse(
    a: Tensor,
    b: Tensor,
    mask: Tensor | None = None,
    *,
    exclude: Tensor | None = None,
    include: Tensor | None = None,
    relax: str = "clamp",
    normalize: str = "all",
) -> Tensor:
    """Return the squared error of a against b, weighted per pixel and averaged per sample.

    loss[n] = sum_chw m * (a - b)^2 / divisor, with m from `mask`, less `exclude`, plus `include`:
    relax "clamp":  m = clamp(m - exclude, 0, 1), then m = clamp(m + include, 0, 1)
    relax "minmax": m = min(m, 1 - exclude),      then m = max(m, include)
    normalize "all" divides by C*H*W; "mask" by C * sum(m), and gives 0 with zero gradient where that sum is 0.

    Args:     a, b (N,C,H,W) fp64|fp32|fp16|bf16, NCHW or channels_last; of two dtypes the wider is used. mask, exclude,
              include (N,1,H,W) or (1,1,H,W), floating point, uint8 (a number: 1 is full weight) or bool; None: absent.
              Where H and W are even each may be of half the size, (N,1,H/2,W/2) or (1,1,H/2,W/2), such as a parser's
              probabilities: it is read through bilinear interpolation, never written at full size.
    Returns:  (N) fp32 (fp64 for fp64). Images in [-1, 1] give four times the loss of images in [0, 1].
    Grad:     a and b to second order. A mask that requires grad is differentiated too, through the eager composition.
              0 * NaN is NaN: a NaN in a or b shows in the loss, under any mask.
    Backends: eager (any device), cpu, cuda, triton. Relative to fp64 eager: 1e-6 on cpu, 1e-5 on a GPU.
    Raises:   TypeError on a dtype; ValueError on shape, device, relax or normalize.
    Source:   MaskFaceGAN (Pernus et al. 2023), eq. 3 and 9; its released code is relax="clamp", normalize="all".
    """
    check_image("masked_mse", "a", a)
    check_image("masked_mse", "b", b)
    check_shape("masked_mse", "b", b, a, tuple(a.shape))
    for name, operand in (("mask", mask), ("exclude", exclude), ("include", include)):
        if operand is not None:
            check_mask("masked_mse", name, operand, a, halved=True)
    if relax not in RELAX:
        raise ValueError(f"masked_mse: relax must be one of {RELAX}, got {relax!r}; choose one of these")
    if normalize not in NORMALIZE:
        raise ValueError(f"masked_mse: normalize must be one of {NORMALIZE}, got {normalize!r}; choose one of these")
    if a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        a, b = a.to(dtype), b.to(dtype)
    if torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in (mask, exclude, include)):
        return reference(a, b, mask, exclude, include, relax, normalize)[0]
    return _op(a, b, mask, exclude, include, relax, normalize)[0]


def _compute_dtype(a: Tensor) -> torch.dtype:
    return torch.float64 if a.dtype == torch.float64 else torch.float32


def _full_size(a: Tensor, mask: Tensor) -> Tensor:
    """Return a mask in the computing dtype, of a's size."""
    mask = mask.to(_compute_dtype(a))
    if mask.shape[2:] == a.shape[2:]:
        return mask
    return F.interpolate(mask, scale_factor=2.0, mode="bilinear", align_corners=False)


def effective_mask(
    a: Tensor, mask: Tensor | None, exclude: Tensor | None, include: Tensor | None, relax: str
) -> Tensor | None:
    """Return the weight of each pixel, (N|1,1,H,W), or None when every pixel counts fully."""
    if mask is None and exclude is None and include is None:
        return None
    m = a.new_ones((1, 1, *a.shape[2:]), dtype=_compute_dtype(a)) if mask is None else _full_size(a, mask)
    if exclude is not None:
        e = _full_size(a, exclude)
        m = (m - e).clamp(0, 1) if relax == "clamp" else torch.minimum(m, 1 - e)
    if include is not None:
        i = _full_size(a, include)
        m = (m + i).clamp(0, 1) if relax == "clamp" else torch.maximum(m, i)
    return m


def reference(
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    include: Tensor | None,
    relax: str,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    """Compute masked_mse and 1 / divisor (N) in plain PyTorch: the oracle in fp64, and what ONNX export writes."""
    dtype = _compute_dtype(a)
    n, c, h, w = a.shape
    difference = a.to(dtype) - b.to(dtype)
    squares = difference * difference
    m = effective_mask(a, mask, exclude, include, relax)
    if m is not None:
        squares = squares * m
    if normalize == "mask" and m is not None:
        weight = c * m.sum((1, 2, 3)).expand(n)
        empty = weight == 0
        inverse = torch.where(empty, 0.0, 1.0 / torch.where(empty, 1.0, weight))
    else:
        # An image without pixels has no mean: 0, as with an empty mask.
        inverse = a.new_full((n,), 1.0 / (c * h * w) if c * h * w else 0.0, dtype=dtype)
    return squares.sum((1, 2, 3)) * inverse, inverse


def _eager(a: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    loss, inverse = reference(a, *arguments)
    return loss, inverse.contiguous()


def _readable(*masks: Tensor | None) -> list[Tensor | None]:
    return [None if m is None else native.readable_mask(m) for m in masks]


def _is_halved(mask: Tensor | None, a: Tensor) -> bool:
    return mask is not None and mask.shape[2] != a.shape[2]


@lru_cache(maxsize=1024)
def _workspace_size(on_cpu: bool, shape: torch.Size) -> int:
    """Return how many doubles the forward pass needs for its sums."""
    n, c, h, w = shape
    return native.module().masked_mse_fwd_workspace(native.place(on_cpu), batch=n, channels=c, pixels=h * w)


def _native(
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    include: Tensor | None,
    relax: str,
    normalize: str,
) -> tuple[Tensor, Tensor]:
    fmt = memory_format(a)
    a, b = a.contiguous(memory_format=fmt), b.contiguous(memory_format=fmt)
    mask, exclude, include = _readable(mask, exclude, include)
    n, c, h, w = a.shape
    loss, inverse = empty_float(a, n), empty_float(a, n)
    workspace = empty_float(a, _workspace_size(a.is_cpu, a.shape), dtype=torch.float64)
    native.module().masked_mse_fwd(
        native.target(a),
        a=a.data_ptr(),
        b=b.data_ptr(),
        mask=native.mask_operand(mask, n),
        exclude=native.mask_operand(exclude, n),
        include=native.mask_operand(include, n),
        loss=loss.data_ptr(),
        inverse_weight=inverse.data_ptr(),
        workspace=workspace.data_ptr(),
        batch=n,
        channels=c,
        pixels=h * w,
        dtype=native.DTYPE_CODES[a.dtype],
        relax=RELAX.index(relax),
        channels_last=fmt is torch.channels_last,
        normalize_by_mask=normalize == "mask",
        width=w,
        mask_halved=_is_halved(mask, a),
        exclude_halved=_is_halved(exclude, a),
        include_halved=_is_halved(include, a),
    )
    return loss, inverse


def _triton(a: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from faceedit.kernels import masked_mse_triton

    return masked_mse_triton.forward(a, *arguments)


_forward = dispatcher("masked_mse", eager=_eager, cpu=_native, cuda=_native, triton=_triton)


def _fake(a: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    dtype = _compute_dtype(a)
    return a.new_empty(a.shape[0], dtype=dtype), a.new_empty(a.shape[0], dtype=dtype)


_op = define_op(
    "masked_mse(Tensor a, Tensor b, Tensor? mask, Tensor? exclude, Tensor? include, str relax, str normalize) "
    "-> (Tensor loss, Tensor inverse_weight)",
    _forward,
    _fake,
)


def backward_reference(
    grad: Tensor,
    inverse: Tensor,
    a: Tensor,
    b: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    include: Tensor | None,
    relax: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor]:
    """Compute the gradients to a and b in plain PyTorch; one that is not wanted is an empty tensor."""
    dtype = _compute_dtype(a)
    m = effective_mask(a, mask, exclude, include, relax)
    factor = (2 * grad.to(dtype) * inverse)[:, None, None, None]
    ga = factor * (a.to(dtype) - b.to(dtype)) * (1 if m is None else m)
    return (ga.to(a.dtype) if wanted[0] else a.new_empty(0)), ((-ga).to(b.dtype) if wanted[1] else a.new_empty(0))


def _backward_eager(a: Tensor, grad: Tensor, inverse: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    ga, gb = backward_reference(grad, inverse, a, *arguments)
    fmt = memory_format(a)
    ga, gb = (g.contiguous(memory_format=fmt) if g.dim() == 4 else g for g in (ga, gb))
    return ga, gb


def _backward_native(
    a: Tensor,
    grad: Tensor,
    inverse: Tensor,
    b: Tensor,
    mask: Tensor | None,
    exclude: Tensor | None,
    include: Tensor | None,
    relax: str,
    wanted: list[bool],
) -> tuple[Tensor | None, Tensor | None]:
    fmt = memory_format(a)
    a, b = a.contiguous(memory_format=fmt), b.contiguous(memory_format=fmt)
    mask, exclude, include = _readable(mask, exclude, include)
    grad = in_format(grad, torch.float32, torch.contiguous_format)
    ga = empty_like(a, fmt) if wanted[0] else None
    gb = empty_like(a, fmt) if wanted[1] else None
    n, c, h, w = a.shape
    native.module().masked_mse_bwd(
        native.target(a),
        a=a.data_ptr(),
        b=b.data_ptr(),
        mask=native.mask_operand(mask, n),
        exclude=native.mask_operand(exclude, n),
        include=native.mask_operand(include, n),
        inverse_weight=inverse.data_ptr(),
        grad=grad.data_ptr(),
        grad_a=native.address(ga),
        grad_b=native.address(gb),
        batch=n,
        channels=c,
        pixels=h * w,
        dtype=native.DTYPE_CODES[a.dtype],
        relax=RELAX.index(relax),
        channels_last=fmt is torch.channels_last,
        width=w,
        mask_halved=_is_halved(mask, a),
        exclude_halved=_is_halved(exclude, a),
        include_halved=_is_halved(include, a),
    )
    return ga, gb


def _backward_triton(a: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from faceedit.kernels import masked_mse_triton

    return masked_mse_triton.backward(a, *arguments)


_backward = dispatcher(
    "masked_mse_backward", eager=_backward_eager, cpu=_backward_native, cuda=_backward_native, triton=_backward_triton
)


def _backward_fake(a: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    wanted: list[bool] = arguments[-2]
    fmt = memory_format(a)
    ga, gb = (torch.empty_like(a, memory_format=fmt) if want else a.new_empty(0) for want in wanted)
    return ga, gb


_backward_op = define_op(
    "masked_mse_backward(Tensor a, Tensor grad, Tensor inverse_weight, Tensor b, Tensor? mask, Tensor? exclude, "
    "Tensor? include, str relax, bool[] wanted, str backend) -> (Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    a, b, mask, exclude, include, ctx.relax, _ = inputs
    ctx.backend = requested_backend()
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], a, b, mask, exclude, include)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[2:5]):
        raise RuntimeError(
            "masked_mse: a mask that requires grad must go through faceedit.kernels.masked_mse, got a direct call "
            "of the op; call the function"
        )
    inverse, a, b, *masks = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():  # create_graph=True: the gradient is itself differentiated
        arguments = (grad, inverse, a, b, *masks, ctx.relax, wanted)
        gradients = backward_reference(*arguments)
    else:
        gradients = _backward_op(a, grad, inverse, b, *masks, ctx.relax, wanted, ctx.backend)
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), *(None,) * 5


_op.register_autograd(_autograd, setup_context=_setup_context)
register_onnx_decomposition(_op, reference)


@_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Fold the mapped axis into N."""
    *tensors, relax, normalize = arguments
    size = info.batch_size
    samples = tensors[0].shape[0] if in_dims[0] is None else tensors[0].movedim(in_dims[0], 0).shape[1]
    folded: list[Tensor | None] = []
    for tensor, dim in zip(tensors, in_dims[:5], strict=True):
        t = mapped_first(tensor, dim, size)
        folded.append(None if t is None else t.expand(size, samples, *t.shape[2:]).flatten(0, 1))
    loss, inverse = _op(*folded, relax, normalize)
    return (loss.unflatten(0, (size, -1)), inverse.unflatten(0, (size, -1))), (0, 0)
