# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2's noise maps kept noise-like: a penalty on neighbouring values that resemble each other, and normalisation.

Steps of the penalty, numbered alike in the reference, csrc/noise_regularizer.cpp and .cu and the Triton body, for every
level of every map: 1. h = mean(x * x one column on), v = mean(x * x one row on), both wrapping around
2. the next level is x averaged over 2x2, until its side is at most `stop`    3. loss = sum of h^2 + v^2
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels import native
from faceedit.kernels.direct import holds_many
from faceedit.kernels.dispatch import dispatcher, requested_backend
from faceedit.kernels.operator import define_in_place_op, define_op, mapped_first, register_onnx_decomposition
from faceedit.kernels.tensors import (
    as_integer,
    as_list,
    check_image,
    check_shape,
    describe,
    empty_float,
    empty_like,
    in_format,
)

MAX_MAPS = 24  # what a kernel's parameters hold; a generator of 1024 px has 17


def noise_regularizer(noises: Sequence[Tensor], stop: int = 8) -> Tensor:
    """Return how far noise maps are from independent noise: the autocorrelation of neighbours, at every scale.

    loss[n] = sum over maps and levels of mean(x * roll(x, 1, columns))^2 + mean(x * roll(x, 1, rows))^2

    Args:     noises, 1 to 24 maps (N,1,S,S) of one dtype, fp64|fp32|fp16|bf16. A map's levels are itself and its 2x2
              averages down to a side of at most `stop`; S must halve evenly on the way.
    Returns:  (N) fp32 (fp64 for fp64); in expectation near 0 for white noise, 2 a level for a constant map of ones.
    Grad:     every map, to first order; differentiating the gradient again raises RuntimeError. Many gradients
              at a time (is_grads_batched) are PyTorch's own operators, to any order.
    Backends: eager (any device), cpu, cuda, triton. Relative to fp64 eager: 2e-6 where the products do not cancel.
    Raises:   TypeError on a dtype; ValueError on a shape, device, number of maps, or stop.
    Source:   Karras et al. 2020 (StyleGAN2), appendix D; MaskFaceGAN (Pernus et al. 2023), eq. 11, squared as released.
    """
    noises = _checked_maps("noise_regularizer", noises)
    stop = as_integer("noise_regularizer", "stop", stop, "the usual value is 8")
    if stop < 1:
        raise ValueError(f"noise_regularizer: stop must be 1 or more, got {stop}; the usual value is 8")
    for index, noise in enumerate(noises):
        side = noise.shape[2]
        if noise.shape[3] != side or side < 1 or side % (1 << (pyramid_levels(side, stop) - 1)):
            raise ValueError(
                f"noise_regularizer: noises[{index}] must be square and halve evenly down to stop={stop}, got "
                f"{describe(noise)}; crop it or raise stop"
            )
    return _op(noises, stop)[0]


@torch.no_grad()
def normalize_noise_(noises: Sequence[Tensor]) -> None:
    """Give every map of every sample mean 0 and standard deviation 1 (n - 1 in its divisor), in place.

    A map whose values are all equal becomes, or stays, zeros. Like an optimiser's step it is no part of the graph: it
    runs without gradients, and a backward pass that still needs the old values raises.

    Args:     noises, 1 to 24 maps (N,1,H,W) of one dtype, fp64|fp32|fp16|bf16, none sharing memory with another.
    Backends: eager (any device), cpu, cuda, triton. Mean and deviation of an fp32 map are right to 1e-6.
    Raises:   TypeError on a dtype; ValueError on a shape, device or number of maps.
    Source:   MaskFaceGAN's released optimisation, which divides by 0 where all values are equal.
    """
    torch.ops.faceedit.normalize_noise_(_checked_maps("normalize_noise_", noises))


def _checked_maps(op: str, noises: Sequence[Tensor]) -> list[Tensor]:
    noises = as_list(op, "noises", noises)
    if not 1 <= len(noises) <= MAX_MAPS:
        raise ValueError(f"{op}: noises must hold 1 to {MAX_MAPS} maps, got {len(noises)}; split them over calls")
    first = noises[0]
    for index, noise in enumerate(noises):
        name = f"noises[{index}]"
        check_image(op, name, noise)
        if noise.dtype != first.dtype:
            raise TypeError(f"{op}: {name} must be of noises[0]'s dtype, got {describe(noise)}; cast it first")
        check_shape(op, name, noise, first, (first.shape[0], 1, *noise.shape[2:]))
    return noises


def pyramid_levels(side: int, stop: int) -> int:
    """Return how many levels a map of this side has, itself included."""
    levels = 1
    while side > stop:
        side //= 2
        levels += 1
    return levels


def _compute_dtype(noise: Tensor) -> torch.dtype:
    return torch.float64 if noise.dtype == torch.float64 else torch.float32


def reference(noises: list[Tensor], stop: int) -> tuple[Tensor, Tensor]:
    """Compute the penalty and the mean products (N, levels, 2): the oracle in fp64, and what ONNX export writes."""
    moments = []
    for noise in noises:
        x = noise.to(_compute_dtype(noise))
        levels = pyramid_levels(x.shape[2], stop)
        for level in range(levels):
            x = F.avg_pool2d(x, 2) if level else x
            moments += [(x * torch.roll(x, 1, axis)).mean((1, 2, 3)) for axis in (3, 2)]
    stacked = torch.stack(moments, 1).unflatten(1, (-1, 2))
    return stacked.square().sum((1, 2)), stacked


def _eager(noises: list[Tensor], stop: int) -> tuple[Tensor, Tensor]:
    return reference(noises, stop)


def _maps(noises: list[Tensor], stop: int) -> dict[str, Any]:
    return {
        "maps": [noise.data_ptr() for noise in noises],
        "sides": [noise.shape[2] for noise in noises],
        "count": len(noises),
        "batch": noises[0].shape[0],
        "stop": stop,
        "dtype": native.DTYPE_CODES[noises[0].dtype],
    }


def _largest(noises: list[Tensor]) -> Tensor:
    return max(noises, key=Tensor.numel)


def _native(noises: list[Tensor], stop: int) -> tuple[Tensor, Tensor]:
    noises = [noise.contiguous() for noise in noises]
    first, module, target = noises[0], native.module(), native.target(_largest(noises))
    loss, moments = _results(noises, stop)
    call = _maps(noises, stop) | {"loss": loss.data_ptr(), "moments": moments.data_ptr()}
    partials = empty_float(first, module.noise_regularizer_fwd_partials(target, **call), dtype=torch.float64)
    coarse = empty_float(first, module.noise_regularizer_fwd_coarse(target, **call))
    module.noise_regularizer_fwd(target, **call, partials=partials.data_ptr(), coarse=coarse.data_ptr())
    return loss, moments


def _results(noises: list[Tensor], stop: int) -> tuple[Tensor, Tensor]:
    n, levels = noises[0].shape[0], sum(pyramid_levels(noise.shape[2], stop) for noise in noises)
    return empty_float(noises[0], n), empty_float(noises[0], n, levels, 2)


def _triton(noises: list[Tensor], stop: int) -> tuple[Tensor, Tensor]:
    from faceedit.kernels import noise_regularizer_triton

    return noise_regularizer_triton.forward(noises, stop)


_forward = dispatcher("noise_regularizer", eager=_eager, cpu=_native, cuda=_native, triton=_triton)


def _fake(noises: list[Tensor], stop: int) -> tuple[Tensor, Tensor]:
    first, levels = noises[0], sum(pyramid_levels(noise.shape[2], stop) for noise in noises)
    dtype = _compute_dtype(first)
    return first.new_empty(first.shape[0], dtype=dtype), first.new_empty(first.shape[0], levels, 2, dtype=dtype)


_op = define_op("noise_regularizer(Tensor[] noises, int stop) -> (Tensor loss, Tensor moments)", _forward, _fake)


def backward_reference(noises: list[Tensor], grad: Tensor, moments: Tensor, stop: int) -> list[Tensor]:
    """Compute the gradient of every map in plain PyTorch: the oracle, and the eager backend."""
    gradients, first = [], 0
    for noise in noises:
        levels = pyramid_levels(noise.shape[2], stop)
        pyramid = [noise.to(_compute_dtype(noise))]
        for _ in range(levels - 1):
            pyramid.append(F.avg_pool2d(pyramid[-1], 2))
        found: Tensor | None = None
        for level in reversed(range(levels)):
            x = pyramid[level]
            factor = (2 * grad / x.shape[2] ** 2)[:, None] * moments[:, first + level]
            beside, stacked = (torch.roll(x, 1, axis) + torch.roll(x, -1, axis) for axis in (3, 2))
            own = factor[:, 0, None, None, None] * beside + factor[:, 1, None, None, None] * stacked
            found = own if found is None else own + F.interpolate(found, scale_factor=2.0) / 4
        assert found is not None
        gradients.append(found.to(noise.dtype))
        first += levels
    return gradients


def _backward_eager(noises: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [gradient.contiguous() for gradient in backward_reference(noises, *arguments)]


def _backward_native(noises: list[Tensor], grad: Tensor, moments: Tensor, stop: int) -> list[Tensor]:
    noises = [noise.contiguous() for noise in noises]
    module, target = native.module(), native.target(_largest(noises))
    grad = in_format(grad, torch.float32, torch.contiguous_format)
    gradients = [empty_like(noise, torch.contiguous_format) for noise in noises]
    call = _maps(noises, stop) | {
        "grad_maps": [gradient.data_ptr() for gradient in gradients],
        "moments": moments.data_ptr(),
        "grad": grad.data_ptr(),
    }
    coarse = empty_float(noises[0], module.noise_regularizer_bwd_coarse(target, **call))
    module.noise_regularizer_bwd(target, **call, coarse=coarse.data_ptr())
    return gradients


def _backward_triton(noises: list[Tensor], *arguments: Any) -> list[Tensor]:
    from faceedit.kernels import noise_regularizer_triton

    return noise_regularizer_triton.backward(noises, *arguments)


_backward = dispatcher(
    "noise_regularizer_backward",
    eager=_backward_eager,
    cpu=_backward_native,
    cuda=_backward_native,
    triton=_backward_triton,
)


def _backward_fake(noises: list[Tensor], *arguments: Any) -> list[Tensor]:
    return [torch.empty_like(noise, memory_format=torch.contiguous_format) for noise in noises]


_backward_op = define_op(
    "noise_regularizer_backward(Tensor[] noises, Tensor grad, Tensor moments, int stop, str backend) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    noises, ctx.stop = inputs
    ctx.backend = requested_backend()
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1], *noises)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[list[Tensor | None], None]:
    moments, *noises = ctx.saved_tensors
    if holds_many(grad):
        if torch.is_grad_enabled():  # create_graph=True: the moments depend on the maps too
            moments = reference(noises, ctx.stop)[1]
        gradients = backward_reference(noises, grad, moments, ctx.stop)
    else:
        gradients = _backward_op(noises, grad, moments, ctx.stop, ctx.backend)
    return [g if want else None for g, want in zip(gradients, ctx.needs_input_grad[0], strict=True)], None


def _double_backward(ctx: Any, *grads: Any) -> None:
    raise RuntimeError(
        "noise_regularizer: the gradient must be used to first order, got a second differentiation; "
        "detach it, or differentiate faceedit.kernels.noise_regularizer.reference"
    )


_op.register_autograd(_autograd, setup_context=_setup_context)
_backward_op.register_autograd(_double_backward)
register_onnx_decomposition(_op, reference)


@_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], noises: list[Tensor], stop: int) -> Any:
    """Fold the mapped axis into N."""
    size = info.batch_size
    mapped = [mapped_first(noise, dim, size) for noise, dim in zip(noises, in_dims[0], strict=True)]
    loss, moments = _op([noise.flatten(0, 1) for noise in mapped if noise is not None], stop)
    return (loss.unflatten(0, (size, -1)), moments.unflatten(0, (size, -1))), (0, 0)


@_backward_op.register_vmap
def _backward_vmap(info: Any, in_dims: tuple[Any, ...], noises: list[Tensor], *arguments: Any) -> Any:
    """Fold the mapped axis into N."""
    size, (grad, moments, *settings) = info.batch_size, arguments
    dims = [None] * len(noises) if in_dims[0] is None else in_dims[0]
    mapped = [mapped_first(noise, dim, size) for noise, dim in zip(noises, dims, strict=True)]
    folded = [noise.flatten(0, 1) for noise in mapped if noise is not None]
    sums = (mapped_first(value, dim, size) for value, dim in zip((grad, moments), in_dims[1:3], strict=True))
    found = _backward_op(folded, *(value.flatten(0, 1) for value in sums if value is not None), *settings)
    return [gradient.unflatten(0, (size, -1)) for gradient in found], [0] * len(found)


# Normalisation.


def normalized(noise: Tensor) -> Tensor:
    """Return what normalize_noise_ makes of one map: its oracle in fp64."""
    x = noise.to(_compute_dtype(noise))
    x = x - x[:, :, :1, :1]  # a constant map is then exactly 0, whatever the constant
    x = x - x.mean((1, 2, 3), keepdim=True)
    squares = x.square().sum((1, 2, 3), keepdim=True)
    freedom = max(x.shape[2] * x.shape[3] - 1, 1)
    factor = torch.where(squares == 0, 0.0, torch.rsqrt(squares / freedom))
    return (x * factor).to(noise.dtype)


def _normalize_eager(noises: list[Tensor]) -> None:
    for noise in noises:
        if noise.numel():
            noise.copy_(normalized(noise))


def _written_back(noises: list[Tensor], normalize: Any) -> None:
    """Run `normalize` on contiguous maps: copies of those that are not, copied back."""
    contiguous = [noise.contiguous() for noise in noises]
    normalize(contiguous)
    for noise, values in zip(noises, contiguous, strict=True):
        if values.data_ptr() != noise.data_ptr() or not noise.is_contiguous():
            noise.copy_(values)


def _normalize_contiguous(noises: list[Tensor]) -> None:
    first, module, target = noises[0], native.module(), native.target(_largest(noises), 16384)
    call = {
        "maps": [noise.data_ptr() for noise in noises],
        "pixels": [noise.shape[2] * noise.shape[3] for noise in noises],
        "count": len(noises),
        "batch": first.shape[0],
        "dtype": native.DTYPE_CODES[first.dtype],
    }
    workspace = empty_float(first, module.normalize_noise_workspace(target, **call), dtype=torch.float64)
    module.normalize_noise(target, **call, workspace=workspace.data_ptr())


def _normalize_native(noises: list[Tensor]) -> None:
    _written_back(noises, _normalize_contiguous)


def _normalize_triton(noises: list[Tensor]) -> None:
    from faceedit.kernels import noise_regularizer_triton

    _written_back(noises, noise_regularizer_triton.normalize)


_normalize = dispatcher(
    "normalize_noise_",
    eager=_normalize_eager,
    cpu=_normalize_native,
    cuda=_normalize_native,
    triton=_normalize_triton,
)

_normalize_op = define_in_place_op("normalize_noise_(Tensor(a!)[] noises) -> ()", _normalize, mutates=("noises",))


@_normalize_op.register_vmap
def _normalize_vmap(info: Any, in_dims: tuple[Any, ...], noises: list[Tensor]) -> tuple[None, None]:
    """Fold the mapped axis into N; a map that has none is normalised once."""
    pairs = list(zip(noises, in_dims[0], strict=True))
    if once := [noise for noise, dim in pairs if dim is None]:
        _normalize_op(once)
    mapped = [noise.movedim(dim, 0) for noise, dim in pairs if dim is not None]
    folded = [noise.flatten(0, 1) for noise in mapped]
    _normalize_op(folded)
    for noise, values in zip(mapped, folded, strict=True):
        if values.data_ptr() != noise.data_ptr():  # else `folded` is a view, and written already
            noise.copy_(values.unflatten(0, (info.batch_size, -1)))
    return None, None
