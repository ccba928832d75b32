# SPDX-License-Identifier: Apache-2.0
"""Attributes painted on the parts they concern: MagGAN's spatial condition, or folded into a convolution."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels import native
from faceedit.kernels.dispatch import dispatcher, requested_backend, without_autocast
from faceedit.kernels.operator import define_op, mapped_slices, register_onnx_decomposition
from faceedit.kernels.tensors import (
    as_float,
    check_floating,
    check_image,
    check_shape,
    check_tensor,
    describe,
    empty,
    empty_float,
    flat_planes,
    in_format,
    memory_format,
)


def attribute_maps(attr: Tensor, probs: Tensor, relation: Tensor) -> Tensor:
    """Paint each attribute's value on the parts it concerns.

    out[n,a,h,w] = attr[n,a] * sum over k of relation[n,a,k] * probs[n,k,h,w]

    Args:     attr (N,A); probs (N,K,H,W) fp64|fp32|fp16|bf16, NCHW or channels_last; relation (A,K) or (N,A,K), the
              weight of part k for attribute a, floating point.
    Returns:  (N,A,H,W) with probs' dtype and memory format; computed in fp32 (fp64 for fp64).
    Grad:     every tensor to second order; relation's is PyTorch's product of matrices on every backend. 0 * NaN is
              NaN: a NaN in any part shows in every attribute of its pixel.
    Backends: eager (any device), cpu, cuda, triton. Against fp64 eager: fp32 2e-6, fp16 and bf16 1 ulp.
    Raises:   TypeError on a dtype; ValueError on shape or device.
    Source:   MagGAN (Wei et al. 2020), eq. 12. See conv_attribute_maps for a convolution that comes next.
    """
    _check("attribute_maps", attr, probs, relation)
    return _op(probs, attr, relation)


def conv_attribute_maps(
    attr: Tensor,
    probs: Tensor,
    relation: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: int = 0,
) -> Tensor:
    """Return conv2d(attribute_maps(attr, probs, relation), weight, bias), without making the maps where K <= A.

    The maps are linear in probs, so they fold into the weight, tap by tap: sample n is convolved with
    sum over a of weight[o,a] * attr[n,a] * relation[n,a,k], which reads K channels in place of A, each sample with a
    weight of its own. With more parts than attributes that is the longer way, and the maps are made.

    Args:     as attribute_maps; weight (O,A,kh,kw) and bias (O) of any dtype; stride and padding as conv2d's.
    Returns:  (N,O,H',W') of probs' dtype, which the convolution runs in, inside autocast too; the weight is folded in
              fp32 (fp64 for fp64). Equal to the unfolded form up to rounding.
    Grad:     every tensor, to second order; folded, to any order: it is made of PyTorch operators then.
    Raises:   TypeError on a dtype; ValueError on shape or device.
    """
    _check("conv_attribute_maps", attr, probs, relation)
    check_tensor("conv_attribute_maps", "weight", weight)
    if weight.dim() != 4 or weight.shape[1] != attr.shape[1]:
        raise ValueError(
            f"conv_attribute_maps: weight must be of shape (O, {attr.shape[1]}, kh, kw), got {describe(weight)}; "
            "its inputs are the attributes"
        )
    for name, tensor, shape in (("weight", weight, tuple(weight.shape)), ("bias", bias, (weight.shape[0],))):
        if tensor is not None:
            check_shape("conv_attribute_maps", name, tensor, probs, shape)
    inside = torch.is_autocast_enabled(probs.device.type)
    with without_autocast(probs):
        y = _convolved(attr, probs, relation, weight, stride, padding, inside)
        return y if bias is None else y + bias.to(y.dtype)[None, :, None, None]


def _convolved(
    attr: Tensor, probs: Tensor, relation: Tensor, weight: Tensor, stride: int, padding: int, autocast: bool
) -> Tensor:
    n, parts = probs.shape[:2]
    outputs, _, *taps = weight.shape
    if n == 0 or parts > attr.shape[1]:
        return F.conv2d(attribute_maps(attr, probs, relation), weight.to(probs.dtype), None, stride, padding)
    dtype = _compute_dtype(probs)
    scaled = attr.to(dtype)[:, :, None] * relation.to(dtype)  # (N,A,K)
    if autocast:
        # A convolution over taps: its backward pass keeps fp32 inside autocast, that of a product of matrices does not.
        folded = F.conv1d(weight.to(dtype).flatten(2), scaled.mT.reshape(n * parts, -1, 1))  # (O, N*K, kh*kw)
        folded = folded.unflatten(1, (n, parts)).movedim(1, 0)
    else:
        folded = torch.einsum("oaij,nak->nokij", weight.to(dtype), scaled)
    folded = folded.reshape(n * outputs, parts, *taps).to(probs.dtype)
    joined = probs.reshape(1, n * parts, *probs.shape[2:])
    y = F.conv2d(joined, folded, None, stride, padding, groups=n)
    return y.unflatten(1, (n, outputs)).squeeze(0)


def _check(op: str, attr: Tensor, probs: Tensor, relation: Tensor) -> None:
    check_image(op, "probs", probs)
    n, parts = probs.shape[:2]
    for name, tensor in (("attr", attr), ("relation", relation)):
        check_floating(op, name, tensor)
    if attr.dim() != 2:
        raise ValueError(f"{op}: attr must be of shape ({n}, A), got {describe(attr)}; one row a sample")
    check_shape(op, "attr", attr, probs, (n, attr.shape[1]))
    check_shape(op, "relation", relation, probs, (attr.shape[1], parts), (n, attr.shape[1], parts))


def _compute_dtype(probs: Tensor) -> torch.dtype:
    return torch.float64 if probs.dtype == torch.float64 else torch.float32


def _regions(probs: Tensor, relation: Tensor) -> Tensor:
    """The sum over parts, (N,A,H,W): a product of matrices, which every backend and exporter knows."""
    dtype = _compute_dtype(probs)
    n, _, h, w = probs.shape
    return torch.matmul(relation.to(dtype), probs.to(dtype).flatten(2)).view(n, relation.shape[-2], h, w)


def reference(probs: Tensor, attr: Tensor, relation: Tensor) -> Tensor:
    """Compute attribute_maps in plain PyTorch: the oracle in fp64, and what ONNX export writes."""
    factor = attr.to(_compute_dtype(probs))[:, :, None, None]
    return (factor * _regions(probs, relation)).to(probs.dtype)


def _eager(probs: Tensor, *arguments: Any) -> Tensor:
    return reference(probs, *arguments).contiguous(memory_format=memory_format(probs))


def _sizes(probs: Tensor, attr: Tensor, relation: Tensor) -> dict[str, int]:
    n, parts, h, w = probs.shape
    return {
        "batch": n,
        "attributes": attr.shape[1],
        "parts": parts,
        "pixels": h * w,
        "relation_stride": attr.shape[1] * parts if relation.dim() == 3 else 0,
        "dtype": native.DTYPE_CODES[probs.dtype],
    }


def _native(probs: Tensor, attr: Tensor, relation: Tensor) -> Tensor:
    if not attr.shape[1]:  # no attributes, no maps: nothing that a kernel could write
        return _eager(probs, attr, relation)
    fmt, planes = memory_format(probs), probs.contiguous()
    attr_f, relation_f = as_float(attr), as_float(relation)
    n, _, h, w = probs.shape
    out = empty((n, attr.shape[1], h, w), probs, probs.dtype, torch.contiguous_format)
    native.module().attribute_maps_fwd(
        native.target(probs, 16384),
        probs=planes.data_ptr(),
        attr=native.address(attr_f),
        relation=native.address(relation_f),
        out=out.data_ptr(),
        **_sizes(probs, attr, relation),
    )
    return out.contiguous(memory_format=fmt)


def _triton(probs: Tensor, *arguments: Any) -> Tensor:
    from faceedit.kernels import attribute_maps_triton

    return attribute_maps_triton.forward(probs, *arguments) if arguments[0].shape[1] else _eager(probs, *arguments)


_forward = dispatcher("attribute_maps", eager=_eager, cpu=_native, cuda=_native, triton=_triton)


def _fake(probs: Tensor, attr: Tensor, relation: Tensor) -> Tensor:
    shape = (probs.shape[0], attr.shape[1], *probs.shape[2:])
    return torch.empty(shape, dtype=probs.dtype, device=probs.device, memory_format=memory_format(probs))


_op = define_op("attribute_maps(Tensor probs, Tensor attr, Tensor relation) -> Tensor", _forward, _fake)


def backward_reference(
    probs: Tensor, grad: Tensor, attr: Tensor, relation: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    """Compute the gradients to probs and attr in plain PyTorch; one that is not wanted is an empty tensor."""
    dtype = _compute_dtype(probs)
    g, gprobs, gattr = grad.to(dtype), probs.new_empty(0), attr.new_empty(0)
    if wanted[0]:
        weights = attr.to(dtype)[:, :, None] * relation.to(dtype)
        gprobs = torch.matmul(weights.mT, flat_planes(g)).reshape(probs.shape).to(probs.dtype)
    if wanted[1]:
        gattr = (g * _regions(probs, relation)).sum((2, 3)).to(attr.dtype)
    return gprobs, gattr


def relation_gradient(probs: Tensor, grad: Tensor, attr: Tensor, relation: Tensor) -> Tensor:
    """Return the gradient to relation, (A,K) or (N,A,K): a product over pixels, differentiable again."""
    dtype = _compute_dtype(probs)
    found = attr.to(dtype)[:, :, None] * torch.matmul(flat_planes(grad.to(dtype)), flat_planes(probs.to(dtype)).mT)
    return (found.sum(0) if relation.dim() == 2 else found).to(relation.dtype)


def _backward_eager(probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    gprobs, gattr = backward_reference(probs, *arguments)
    return gprobs.contiguous(memory_format=memory_format(probs)) if gprobs.dim() == 4 else gprobs, gattr


def _backward_native(
    probs: Tensor, grad: Tensor, attr: Tensor, relation: Tensor, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    if not attr.shape[1]:
        return _backward_eager(probs, grad, attr, relation, wanted)
    planes, grad = probs.contiguous(), grad.to(probs.dtype).contiguous()
    attr_f, relation_f = (in_format(t, torch.float32, torch.contiguous_format) for t in (attr, relation))
    transposed = (attr_f[:, :, None] * relation_f).mT.contiguous()
    gprobs = empty(tuple(probs.shape), probs, probs.dtype, torch.contiguous_format) if wanted[0] else None
    gattr = empty_float(probs, *attr.shape) if wanted[1] else None
    module, target = native.module(), native.target(probs, 16384)
    call = {
        "probs": planes.data_ptr(),
        "relation": relation_f.data_ptr(),
        "transposed": transposed.data_ptr(),
        "grad": grad.data_ptr(),
        "grad_probs": native.address(gprobs),
        "grad_attr": native.address(gattr),
        **_sizes(probs, attr, relation),
    }
    workspace = empty_float(probs, module.attribute_maps_bwd_workspace(target, **call))
    module.attribute_maps_bwd(target, **call, workspace=workspace.data_ptr())
    return (
        probs.new_empty(0) if gprobs is None else gprobs.contiguous(memory_format=memory_format(probs)),
        attr.new_empty(0) if gattr is None else gattr.to(attr.dtype),
    )


def _backward_triton(probs: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from faceedit.kernels import attribute_maps_triton

    attributes = arguments[1].shape[1]
    return attribute_maps_triton.backward(probs, *arguments) if attributes else _backward_eager(probs, *arguments)


_backward = dispatcher(
    "attribute_maps_backward",
    eager=_backward_eager,
    cpu=_backward_native,
    cuda=_backward_native,
    triton=_backward_triton,
)


def _backward_fake(
    probs: Tensor, grad: Tensor, attr: Tensor, relation: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor]:
    gprobs = torch.empty_like(probs, memory_format=memory_format(probs)) if wanted[0] else probs.new_empty(0)
    return gprobs, attr.new_empty(attr.shape) if wanted[1] else attr.new_empty(0)


_backward_op = define_op(
    "attribute_maps_backward(Tensor probs, Tensor grad, Tensor attr, Tensor relation, bool[] wanted, str backend) -> "
    "(Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.backend = requested_backend()
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    probs, attr, relation = ctx.saved_tensors
    wanted = list(ctx.needs_input_grad[:2])
    if torch.is_grad_enabled():  # create_graph=True: the gradient is itself differentiated
        gradients = backward_reference(probs, grad, attr, relation, wanted)
    else:
        gradients = _backward_op(probs, grad, attr, relation, wanted, ctx.backend)
    grelation = relation_gradient(probs, grad, attr, relation) if ctx.needs_input_grad[2] else None
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), grelation


_op.register_autograd(_autograd, setup_context=_setup_context)
register_onnx_decomposition(_op, reference)


@_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return mapped_slices(_op, info, in_dims, arguments)
