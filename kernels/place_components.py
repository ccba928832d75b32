# SPDX-License-Identifier: Apache-2.0
"""Place the feature maps of face parts on one canvas, written once, and find where parts lie in a mask.

The canvas is gathered, not assembled: each of its elements is either zero or one element of one source.
"""

from collections.abc import Sequence
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import native
from faceedit.kernels.direct import holds_many
from faceedit.kernels.dispatch import NATIVE_DTYPES, dispatcher, requested_backend
from faceedit.kernels.operator import define_op, mapped_slices, register_onnx_decomposition
from faceedit.kernels.tensors import (
    as_integer,
    as_list,
    check_image,
    check_shape,
    check_tensor,
    describe,
    empty,
    memory_format,
)

ABSENT = -(2**30)  # both coordinates of the centre of a part that is not there
MOST = 24  # components a call: their addresses travel by value


def place_components(
    components: Sequence[Tensor],
    centres: Tensor,
    mask_features: Tensor | None = None,
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Place each component's map in its own channels of one canvas, zero elsewhere, and append mask_features.

    Component k covers rows centre_y - h_k // 2 up to + h_k, and columns alike; what falls outside is cut off.

    Args:     components 1 to 24 maps (N,C_k,h_k,w_k) of one dtype, fp64|fp32|fp16|bf16, NCHW or channels_last. centres
              (N,K,2) int32, (y, x) in canvas pixels; any value is safe, and `ABSENT` (-2^30) leaves the part out.
              mask_features (N,C,H,W) or None. size (H, W); None: that of mask_features.
    Returns:  (N, sum C_k + C, H, W) in the dtype and memory format of the first component.
    Grad:     components and mask_features, to any order; zero where a component was cut off or absent.
    Backends: eager (any device), cpu, cuda, triton. All exact: elements are copied.
    Raises:   TypeError on a dtype; ValueError on shape, device, size or the number of components.
    """
    components = as_list("place_components", "components", components)
    if not 1 <= len(components) <= MOST:
        raise ValueError(
            f"place_components: components must be 1 to {MOST} maps, got {len(components)}; place in several calls"
        )
    for k, component in enumerate(components):
        _check_map(f"components[{k}]", component, components[0])
    first = components[0]
    check_shape("place_components", "centres", centres, first, (first.shape[0], len(components), 2), any_dtype=True)
    if centres.dtype != torch.int32:
        raise TypeError(f"place_components: centres must be int32, got {describe(centres)}; round and cast them")
    if size is not None:
        size = _size(size)
    if mask_features is not None:
        _check_map("mask_features", mask_features, first)
        size = size or (mask_features.shape[2], mask_features.shape[3])
        if tuple(mask_features.shape[2:]) != tuple(size):
            raise ValueError(
                f"place_components: mask_features must be of size {tuple(size)}, got {describe(mask_features)}; "
                "resize them"
            )
    if size is None:
        raise ValueError("place_components: size must be (H, W) without mask_features, got None; pass it")
    if min(size) < 0:
        raise ValueError(f"place_components: size must not be negative, got {tuple(size)}; pass (H, W)")
    return _op(components, centres, mask_features, size[0], size[1])


def mask_centres(mask: Tensor) -> Tensor:
    """Return the centre of each part of a mask, where place_components puts that part's features.

    centre = sum of m * (y, x) / sum of m, rounded half to even; `ABSENT` (-2^30) twice where the sum of m is 0.

    Args:     mask (N,K,H,W) in [0,1], floating point, bool, or uint8 (a number). Values are clamped to [0,1] and
              rounded to multiples of 2^-20; NaN is 0.
    Returns:  (N,K,2) int32 (y, x), on mask's device.
    Grad:     none: the result is whole numbers.
    Backends: eager (any device), cpu, cuda, triton. All exact: the sums are of integers.
    Raises:   TypeError on a dtype; ValueError on shape.
    """
    check_tensor("mask_centres", "mask", mask)
    if mask.dim() != 4:
        raise ValueError(
            f"mask_centres: mask must be of shape (N, K, H, W), got {describe(mask)}; add the missing axes"
        )
    if not mask.is_floating_point() and mask.dtype not in (torch.uint8, torch.bool):
        raise TypeError(f"mask_centres: mask must be floating point, uint8 or bool, got {describe(mask)}; cast it")
    return _centres(mask.detach())


def _size(size: tuple[int, int]) -> tuple[int, int]:
    try:
        height, width = size
    except (TypeError, ValueError) as error:
        raise type(error)(f"place_components: size must be (H, W), got {short(size)}; pass two integers") from None
    height = as_integer("place_components", "size", height, "pass (H, W)")
    return height, as_integer("place_components", "size", width, "pass (H, W)")


def _check_map(name: str, x: Tensor, first: Tensor) -> None:
    check_image("place_components", name, x)
    if x.dtype != first.dtype:
        raise TypeError(
            f"place_components: {name} must be {str(first.dtype).removeprefix('torch.')} like components[0], got "
            f"{describe(x)}; cast it"
        )
    check_shape("place_components", name, x, first, (first.shape[0], *x.shape[1:]))


def _indices(centres: Tensor, k: int, axis: int, size: int, limit: int) -> tuple[Tensor, Tensor]:
    """Return for each canvas coordinate the component's, (N,limit), clamped into it, and whether it lies inside."""
    start = centres[:, k, axis].long() - size // 2
    index = torch.arange(limit, device=centres.device) - start[:, None]
    return index.clamp(0, max(size - 1, 0)), (index >= 0) & (index < size)


def reference(
    components: list[Tensor], centres: Tensor, mask_features: Tensor | None, height: int, width: int
) -> Tensor:
    """Compute place_components in plain PyTorch: the oracle, and what ONNX export writes."""
    parts = []
    for k, component in enumerate(components):
        n, c, h, w = component.shape
        if h * w == 0:
            parts.append(component.new_zeros(n, c, height, width))
            continue
        y, inside_y = _indices(centres, k, 0, h, height)
        x, inside_x = _indices(centres, k, 1, w, width)
        rows = component.gather(2, y[:, None, :, None].expand(n, c, height, w))
        values = rows.gather(3, x[:, None, None, :].expand(n, c, height, width))
        inside = inside_y[:, None, :, None] & inside_x[:, None, None, :]
        parts.append(torch.where(inside, values, 0.0))
    return torch.cat([*parts, *([] if mask_features is None else [mask_features])], 1)


def _eager(components: list[Tensor], *arguments: Any) -> Tensor:
    return reference(components, *arguments).contiguous(memory_format=memory_format(components[0]))


def _call(
    components: Sequence[Tensor | tuple[int, ...]], centres: Tensor, features: int, size: tuple[int, int], like: Tensor
) -> dict[str, Any]:
    """Return what both entry points take; components as tensors or shapes, `features` as their channels."""
    shapes = [tuple(c.shape) if isinstance(c, Tensor) else c for c in components]
    return {
        "channels": [shape[1] for shape in shapes],
        "heights": [shape[2] for shape in shapes],
        "widths": [shape[3] for shape in shapes],
        "centres": centres.data_ptr(),
        "batch": centres.shape[0],
        "count": len(shapes),
        "feature_channels": features,
        "height": size[0],
        "width": size[1],
        "item_size": like.element_size(),
    }


def _native(components: list[Tensor], centres: Tensor, mask_features: Tensor | None, height: int, width: int) -> Tensor:
    fmt = memory_format(components[0])
    components = [c.contiguous(memory_format=fmt) for c in components]
    if mask_features is not None:
        mask_features = mask_features.contiguous(memory_format=fmt)
    centres = centres.contiguous()
    y = _canvas(components, mask_features, height, width)
    if y.numel():
        native.module().place_components_fwd(
            native.target(y),
            components=[c.data_ptr() for c in components],
            features=native.address(mask_features),
            out=y.data_ptr(),
            channels_last=fmt is torch.channels_last,
            **_call(components, centres, _channels(mask_features), (height, width), y),
        )
    return y


def _channels(mask_features: Tensor | None) -> int:
    return 0 if mask_features is None else mask_features.shape[1]


def _canvas(components: list[Tensor], mask_features: Tensor | None, height: int, width: int) -> Tensor:
    first, channels = components[0], sum(c.shape[1] for c in components) + _channels(mask_features)
    return empty((first.shape[0], channels, height, width), first, first.dtype, memory_format(first))


def _triton(components: list[Tensor], *arguments: Any) -> Tensor:
    from faceedit.kernels import place_components_triton

    return place_components_triton.place(components, *arguments)


_forward = dispatcher("place_components", eager=_eager, cpu=_native, cuda=_native, triton=_triton)


def _fake(components: list[Tensor], centres: Tensor, mask_features: Tensor | None, height: int, width: int) -> Tensor:
    first, channels = components[0], sum(c.shape[1] for c in components) + _channels(mask_features)
    shape = (first.shape[0], channels, height, width)
    return torch.empty(shape, dtype=first.dtype, device=first.device, memory_format=memory_format(first))


_op = define_op(
    "place_components(Tensor[] components, Tensor centres, Tensor? mask_features, SymInt height, SymInt width)"
    " -> Tensor",
    _forward,
    _fake,
)


# Backward: windows of the gradient, one a component, and its last channels. Sizes travel as one list (C, h, w, ...).


def backward_reference(grad: Tensor, centres: Tensor, sizes: list[int], features: int) -> list[Tensor]:
    """Cut the windows out in plain PyTorch, differentiable again; the features' gradient, if any, comes last."""
    n, _, height, width = grad.shape
    found, first = [], 0
    for k in range(len(sizes) // 3):
        c, h, w = sizes[3 * k : 3 * k + 3]
        # Not by index: a slice of all channels is an alias, which many gradients at a time do not have.
        part, first = grad.narrow(1, first, c), first + c
        if height * width == 0:
            found.append(grad.new_zeros(n, c, h, w))
            continue
        y = centres[:, k, 0].long()[:, None] - h // 2 + torch.arange(h, device=grad.device)
        x = centres[:, k, 1].long()[:, None] - w // 2 + torch.arange(w, device=grad.device)
        inside = ((y >= 0) & (y < height))[:, None, :, None] & ((x >= 0) & (x < width))[:, None, None, :]
        rows = part.gather(2, y.clamp(0, height - 1)[:, None, :, None].expand(n, c, h, width))
        values = rows.gather(3, x.clamp(0, width - 1)[:, None, None, :].expand(n, c, h, w))
        found.append(torch.where(inside, values, 0.0))
    return [*found, *([grad.narrow(1, first, features).clone()] if features else [])]


def _backward_eager(grad: Tensor, *arguments: Any) -> list[Tensor]:
    fmt = memory_format(grad)
    return [g.contiguous(memory_format=fmt) for g in backward_reference(grad, *arguments)]


def _backward_native(grad: Tensor, centres: Tensor, sizes: list[int], features: int) -> list[Tensor]:
    fmt = memory_format(grad)
    grad, centres = grad.contiguous(memory_format=fmt), centres.contiguous()
    n, _, height, width = grad.shape
    shapes = [(n, *sizes[i : i + 3]) for i in range(0, len(sizes), 3)]
    found = [empty(shape, grad, grad.dtype, fmt) for shape in shapes]
    rest = [empty((n, features, height, width), grad, grad.dtype, fmt)] if features else []
    native.module().place_components_bwd(
        native.target(grad),
        grad=grad.data_ptr(),
        grad_components=[g.data_ptr() for g in found],
        grad_features=native.address(rest[0] if rest else None),
        channels_last=fmt is torch.channels_last,
        **_call(shapes, centres, features, (height, width), grad),
    )
    return found + rest


def _backward_triton(grad: Tensor, *arguments: Any) -> list[Tensor]:
    from faceedit.kernels import place_components_triton

    return place_components_triton.crop(grad, *arguments)


_backward = dispatcher(
    "place_components_backward",
    eager=_backward_eager,
    cpu=_backward_native,
    cuda=_backward_native,
    triton=_backward_triton,
)


def _backward_fake(grad: Tensor, centres: Tensor, sizes: list[int], features: int, backend: str) -> list[Tensor]:
    n, fmt = grad.shape[0], memory_format(grad)
    shapes = [(n, *sizes[i : i + 3]) for i in range(0, len(sizes), 3)]
    shapes += [(n, features, grad.shape[2], grad.shape[3])] if features else []
    return [torch.empty(s, dtype=grad.dtype, device=grad.device, memory_format=fmt) for s in shapes]


_backward_op = define_op(
    "place_components_backward(Tensor grad, Tensor centres, SymInt[] sizes, SymInt features, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    components, centres, mask_features, _, _ = inputs
    ctx.backend = requested_backend()
    ctx.sizes = [side for c in components for side in c.shape[1:]]
    ctx.count, ctx.features = len(components), _channels(mask_features)
    ctx.save_for_backward(centres)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (centres,) = ctx.saved_tensors
    # With create_graph=True the gradient is itself differentiated.
    if torch.is_grad_enabled() or holds_many(grad):
        found = backward_reference(grad, centres, ctx.sizes, ctx.features)
    else:
        found = _backward_op(grad, centres, ctx.sizes, ctx.features, ctx.backend)
    rest = found[ctx.count] if ctx.features and ctx.needs_input_grad[2] else None
    return list(found[: ctx.count]), None, rest, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)
register_onnx_decomposition(_op, reference)


@_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """One call a slice: every component would have to be folded on its own."""
    return mapped_slices(_op, info, in_dims, arguments)


@_backward_op.register_vmap
def _backward_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    """As forward; the results as the list that the op returns."""
    found, dims = mapped_slices(_backward_op, info, in_dims, arguments)
    return list(found), list(dims)


# Centres.


def centres_reference(mask: Tensor) -> Tensor:
    """Compute mask_centres in plain PyTorch: the oracle, and what ONNX export writes."""
    height, width = mask.shape[2:]
    m = mask.to(torch.float32)
    units = (torch.where(m > 0, m, 0.0).clamp(max=1) * 2**20).round().long()
    weight = units.sum((2, 3))
    y = (units.sum(3) * torch.arange(height, device=mask.device)).sum(2)
    x = (units.sum(2) * torch.arange(width, device=mask.device)).sum(2)
    mean = torch.stack([y, x], 2).double() / weight.clamp(min=1).double()[:, :, None]
    return torch.where(weight[:, :, None] == 0, float(ABSENT), mean.round()).to(torch.int32)


def _centres_native(mask: Tensor) -> Tensor:
    mask = native.readable_mask(mask)
    n, parts, height, width = mask.shape
    found = empty((n, parts, 2), mask, torch.int32, torch.contiguous_format)
    native.module().mask_centres(
        native.target(mask),
        mask=(mask.data_ptr(), 0, native.DTYPE_CODES[mask.dtype]),
        centres=found.data_ptr(),
        planes=n * parts,
        height=height,
        width=width,
    )
    return found


def _centres_triton(mask: Tensor) -> Tensor:
    from faceedit.kernels import place_components_triton

    return place_components_triton.centres(mask)


_centres_forward = dispatcher(
    "mask_centres",
    dtypes=(*NATIVE_DTYPES, torch.uint8, torch.bool),
    eager=centres_reference,
    cpu=_centres_native,
    cuda=_centres_native,
    triton=_centres_triton,
)

_centres = define_op(
    "mask_centres(Tensor mask) -> Tensor",
    _centres_forward,
    lambda mask: mask.new_empty((*mask.shape[:2], 2), dtype=torch.int32),
)
register_onnx_decomposition(_centres, centres_reference)


@_centres.register_vmap
def _centres_vmap(info: Any, in_dims: tuple[Any, ...], mask: Tensor) -> tuple[Tensor, int]:
    """Fold the mapped axis into N."""
    return _centres(mask.movedim(in_dims[0], 0).flatten(0, 1)).unflatten(0, (info.batch_size, -1)), 0
