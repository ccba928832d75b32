# SPDX-License-Identifier: Apache-2.0
"""Normalise, modulate and activate in one op: instance norm, AdaIN, SFT and SPADE are cases of it.

Steps of the reference, of csrc/norm_modulate_*.cpp and *.cu, and of the Triton body:
1. mean and rstd of every plane    2. u = (x - mean) * rstd    3. z = u * gamma + beta    4. y = act(z)
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import native
from faceedit.kernels.activations import ACTIVATIONS, check_activation
from faceedit.kernels.dispatch import dispatcher, requested_backend
from faceedit.kernels.norm_modulate_reference import (
    PER_CHANNEL,
    PER_ELEMENT,
    PER_PIXEL,
    Gradients,
    backward_reference,
    compute_dtype,
    kind_of,
    reference,
)
from faceedit.kernels.operator import define_op, mapped_first, mapped_slices, register_onnx_decomposition
from faceedit.kernels.tensors import (
    apart_from,
    as_float,
    as_number,
    check_image,
    check_number,
    check_shape,
    empty_float,
    empty_like,
    in_dtype,
    in_format,
    memory_format,
)

NORMS = ("instance", "none", "given")


def norm_modulate(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    norm: str = "instance",
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    one_plus: bool = True,
    eps: float = 1e-5,
    act: str = "linear",
    slope: float = 0.2,
) -> Tensor:
    """Normalise every plane of x, scale and shift it, and activate.

    y = act((x - mean) * rstd * (1 + gamma) + beta)

    Args:     x (N,C,H,W) fp64|fp32|fp16|bf16, NCHW or channels_last; gamma, beta (C) or (N,C), one value a channel;
              (N,1,H,W), one a pixel; or x's shape; None: absent. norm "instance": mean and rstd = (variance + eps)^-1/2
              of each plane, biased; "given": `mean` and `rstd`, (C) or (N,C), such as batch norm's; "none": 0 and 1.
              one_plus=False scales by gamma itself. act: linear, relu, lrelu (`slope` below zero), tanh, sigmoid, silu.
    Returns:  y with x's shape, dtype and memory format; computed in fp32 (fp64 for fp64). Maps are read in x's dtype.
    Grad:     every tensor, to second order. At z = 0 lrelu takes the positive side and relu the flat one. A plane
              that is constant, or one pixel, normalises to 0 without a gradient; NaN or inf spoils its own plane only.
    Backends: eager (any device), cpu, cuda, triton. Relative L2 to fp64 eager: fp32 2e-6, fp16 and bf16 the rounding of
              maps and output. Statistics are summed from differences, never as E[x^2] - E[x]^2: no offset hurts them.
    Raises:   TypeError on a dtype; ValueError on shape, device, norm, act or eps, and on mean, rstd without "given".
    Source:   Huang and Belongie 2017 (AdaIN), eq. 8; Wang et al. 2018 (SFT), eq. 4; Park et al. 2019 (SPADE), eq. 1.
    """
    check_image("norm_modulate", "x", x)
    n, c, h, w = x.shape
    check_activation("norm_modulate", act, slope)
    if norm not in NORMS:
        raise ValueError(f"norm_modulate: norm must be one of {NORMS}, got {norm!r}; choose one of these")
    check_number("norm_modulate", "eps", eps)
    if not eps > 0:
        raise ValueError(f"norm_modulate: eps must be positive, got {eps}; a constant plane has variance 0")
    if gamma is not None:
        check_shape("norm_modulate", "gamma", gamma, x, (c,), (n, c), (n, 1, h, w), (n, c, h, w))
    if beta is not None:
        check_shape("norm_modulate", "beta", beta, x, (c,), (n, c), (n, 1, h, w), (n, c, h, w))
    if norm == "given" or mean is not None or rstd is not None:
        _check_statistics(x, mean, rstd, norm)
    return _op(x, gamma, beta, mean, rstd, norm, one_plus, as_number(eps), act, as_number(slope))[0]


def _check_statistics(x: Tensor, mean: Tensor | None, rstd: Tensor | None, norm: str) -> None:
    for name, operand in (("mean", mean), ("rstd", rstd)):
        if (operand is None) == (norm == "given"):
            state = "absent" if operand is None else "present"
            raise ValueError(
                f"norm_modulate: {name} must come with norm='given' and only with it, got norm={norm!r} with {name} "
                f"{state}; pass both or neither"
            )
        if operand is not None:
            check_shape("norm_modulate", name, operand, x, x.shape[1:2], x.shape[:2])


def _eager(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    y, statistics = reference(x, *arguments)
    y = y.contiguous(memory_format=memory_format(x))
    return apart_from(y, x), statistics


def _operand(operand: Tensor | None, x: Tensor, fmt: torch.memory_format) -> Tensor | None:
    """Make gamma or beta readable by kernels: fp32 rows; maps in x's dtype and memory format."""
    if operand is None or operand.dim() < 4:
        return as_float(operand)
    return in_format(operand, x.dtype, torch.contiguous_format if kind_of(operand, x) == PER_PIXEL else fmt)


def _row_stride(operand: Tensor | None) -> int:
    return operand.shape[1] if operand is not None and operand.dim() == 2 else 0


@lru_cache(maxsize=1024)
def _forward_size(on_cpu: bool, shape: torch.Size, is_channels_last: bool) -> int:
    """Return how many doubles an instance norm's statistics need on their way."""
    n, c, h, w = shape
    return native.module().norm_modulate_fwd_workspace(
        native.place(on_cpu), batch=n, channels=c, pixels=h * w, norm=0, channels_last=is_channels_last
    )


@lru_cache(maxsize=1024)
def _backward_size(on_cpu: bool, shape: torch.Size, is_channels_last: bool) -> int:
    """Return how many doubles a backward pass needs that sums over planes."""
    n, c, h, w = shape
    return native.module().norm_modulate_bwd_workspace(
        native.place(on_cpu), grad_x=1, batch=n, channels=c, pixels=h * w, norm=0, channels_last=is_channels_last
    )


def _workspace(x: Tensor, size: int) -> Tensor | None:
    return empty_float(x, size, dtype=torch.float64) if size else None


def _native(
    x: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm: str,
    one_plus: bool,
    eps: float,
    act: str,
    slope: float,
) -> tuple[Tensor, Tensor]:
    fmt = memory_format(x)
    x = x.contiguous(memory_format=fmt)
    n, c, h, w = x.shape
    # Held by name until the call returns: the parameters carry addresses only.
    gamma, beta, mean, rstd = _operand(gamma, x, fmt), _operand(beta, x, fmt), as_float(mean), as_float(rstd)
    y = empty_like(x, fmt)
    is_channels_last, workspace = fmt is torch.channels_last, None
    if norm == "instance":
        statistics = empty_float(x, 3, n, c)
        workspace = _workspace(x, _forward_size(x.is_cpu, x.shape, is_channels_last))
    else:
        statistics = empty_float(x, 0)
    native.module().norm_modulate_fwd(
        native.target(x),
        x=x.data_ptr(),
        y=y.data_ptr(),
        statistics=statistics.data_ptr(),
        gamma=native.address(gamma),
        beta=native.address(beta),
        mean=native.address(mean),
        rstd=native.address(rstd),
        workspace=native.address(workspace),
        batch=n,
        channels=c,
        pixels=h * w,
        gamma_stride=_row_stride(gamma),
        beta_stride=_row_stride(beta),
        mean_stride=_row_stride(mean),
        rstd_stride=_row_stride(rstd),
        gamma_kind=kind_of(gamma, x),
        beta_kind=kind_of(beta, x),
        dtype=native.DTYPE_CODES[x.dtype],
        norm=NORMS.index(norm),
        act=ACTIVATIONS.index(act),
        channels_last=is_channels_last,
        one_plus=one_plus,
        eps=eps,
        slope=slope,
    )
    return y, statistics


def _triton(
    x: Tensor, gamma: Tensor | None, beta: Tensor | None, mean: Tensor | None, rstd: Tensor | None, *settings: Any
) -> tuple[Tensor, Tensor]:
    from faceedit.kernels import norm_modulate_triton

    fmt = memory_format(x)
    x, norm = x.contiguous(memory_format=fmt), NORMS.index(settings[0])
    maps, kinds = (_operand(gamma, x, fmt), _operand(beta, x, fmt)), (kind_of(gamma, x), kind_of(beta, x))
    return norm_modulate_triton.forward(x, *maps, as_float(mean), as_float(rstd), kinds, norm, *settings[1:])


_forward = dispatcher("norm_modulate", eager=_eager, cpu=_native, cuda=_native, triton=_triton)


def _fake(x: Tensor, gamma: Any, beta: Any, mean: Any, rstd: Any, norm: str, *settings: Any) -> tuple[Tensor, Tensor]:
    shape = (3, *x.shape[:2]) if norm == "instance" else (0,)
    return torch.empty_like(x, memory_format=memory_format(x)), x.new_empty(shape, dtype=compute_dtype(x))


_op = define_op(
    "norm_modulate(Tensor x, Tensor? gamma, Tensor? beta, Tensor? mean, Tensor? rstd, str norm, bool one_plus, "
    "float eps, str act, float slope) -> (Tensor y, Tensor statistics)",
    _forward,
    _fake,
)


# Backward. With gz = dL/dz and gu = gz * gamma, an instance norm passes on rstd * (gu - mean(gu) - u * mean(gu * u)).


def _backward_eager(x: Tensor, grad: Tensor, statistics: Tensor, *arguments: Any) -> Gradients:
    # An op returns neither an input nor one tensor twice; every gradient has its fake's strides.
    found = backward_reference(x, grad, *arguments)
    operands = (x, *arguments[:4])
    gx, ggamma, gbeta, gmean, grstd = (
        torch.empty_like(operand, memory_format=_gradient_format(operand, x)).copy_(g) if want else g
        for g, operand, want in zip(found, operands, arguments[-1], strict=True)
    )
    return gx, ggamma, gbeta, gmean, grstd


def _gradient_format(operand: Tensor, x: Tensor) -> torch.memory_format:
    """Return the format of a gradient: x's for x and maps of its shape, contiguous for all others."""
    return memory_format(x) if kind_of(operand, x) == PER_ELEMENT else torch.contiguous_format


def _backward_native(
    x: Tensor,
    grad: Tensor,
    statistics: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    norm: str,
    one_plus: bool,
    eps: float,
    act: str,
    slope: float,
    wanted: list[bool],
) -> tuple[Tensor | None, ...]:
    fmt = memory_format(x)
    operands = (gamma, beta, mean, rstd)
    x, grad = x.contiguous(memory_format=fmt), in_format(grad, x.dtype, fmt)
    n, c, h, w = x.shape
    gamma_k, beta_k, mean_k, rstd_k = _operand(gamma, x, fmt), _operand(beta, x, fmt), as_float(mean), as_float(rstd)
    gx = empty_like(x, fmt) if wanted[0] else None
    ggamma, gbeta, gmean, grstd = found = [
        None if not want or o is None else empty_float(x, n, c) if o.dim() < 4 else empty_like(x, fmt)
        for want, o in zip(wanted[1:], operands, strict=True)
    ]
    gamma_kind, beta_kind, is_channels_last = kind_of(gamma_k, x), kind_of(beta_k, x), fmt is torch.channels_last
    workspace = None
    sums_gamma, sums_beta = gamma_kind == PER_CHANNEL and wanted[1], beta_kind == PER_CHANNEL and wanted[2]
    if (norm == "instance" and wanted[0]) or sums_gamma or sums_beta or gmean is not None or grstd is not None:
        workspace = _workspace(x, _backward_size(x.is_cpu, x.shape, is_channels_last))
    native.module().norm_modulate_bwd(
        native.target(x),
        x=x.data_ptr(),
        grad=grad.data_ptr(),
        grad_x=native.address(gx),
        statistics=statistics.data_ptr(),
        gamma=native.address(gamma_k),
        beta=native.address(beta_k),
        mean=native.address(mean_k),
        rstd=native.address(rstd_k),
        grad_gamma=native.address(ggamma),
        grad_beta=native.address(gbeta),
        grad_mean=native.address(gmean),
        grad_rstd=native.address(grstd),
        workspace=native.address(workspace),
        batch=n,
        channels=c,
        pixels=h * w,
        gamma_stride=_row_stride(gamma_k),
        beta_stride=_row_stride(beta_k),
        mean_stride=_row_stride(mean_k),
        rstd_stride=_row_stride(rstd_k),
        gamma_kind=gamma_kind,
        beta_kind=beta_kind,
        dtype=native.DTYPE_CODES[x.dtype],
        norm=NORMS.index(norm),
        act=ACTIVATIONS.index(act),
        channels_last=is_channels_last,
        one_plus=one_plus,
        eps=eps,
        slope=slope,
    )
    return gx, *_as_operands(x, found, operands)


def _as_operands(x: Tensor, found: list[Tensor | None], operands: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    """Bring what kernels write, (N,C) or x's shape, to the operands' shapes and dtypes."""
    result: list[Tensor | None] = []
    for g, operand in zip(found, operands, strict=True):
        if g is None or operand is None:
            result.append(None)
            continue
        if operand.dim() == 1:
            g = g.sum(0)
        elif operand.dim() == 4 and kind_of(operand, x) == PER_PIXEL:
            g = g.sum(1, keepdim=True).contiguous()
        result.append(in_dtype(g, operand.dtype))
    return result


def _backward_triton(
    x: Tensor,
    grad: Tensor,
    statistics: Tensor,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    *arguments: Any,
) -> tuple[Tensor | None, ...]:
    from faceedit.kernels import norm_modulate_triton

    norm, one_plus, _, act, slope, wanted = arguments
    fmt = memory_format(x)
    x, grad = x.contiguous(memory_format=fmt), in_format(grad, x.dtype, fmt)
    maps, kinds = (_operand(gamma, x, fmt), _operand(beta, x, fmt)), (kind_of(gamma, x), kind_of(beta, x))
    rows, settings = (as_float(mean), as_float(rstd)), (NORMS.index(norm), one_plus, act, slope, wanted)
    found = norm_modulate_triton.backward(x, grad, statistics, *maps, *rows, kinds, *settings)
    return found[0], *_as_operands(x, found[1:], (gamma, beta, mean, rstd))


_backward = dispatcher(
    "norm_modulate_backward",
    eager=_backward_eager,
    cpu=_backward_native,
    cuda=_backward_native,
    triton=_backward_triton,
)


def _backward_fake(x: Tensor, grad: Tensor, statistics: Tensor, *arguments: Any) -> Gradients:
    operands, wanted = (x, *arguments[:4]), arguments[-2]
    gx, ggamma, gbeta, gmean, grstd = (
        torch.empty_like(operand, memory_format=_gradient_format(operand, x))
        if want and operand is not None
        else x.new_empty(0)
        for operand, want in zip(operands, wanted, strict=True)
    )
    return gx, ggamma, gbeta, gmean, grstd


_backward_op = define_op(
    "norm_modulate_backward(Tensor x, Tensor grad, Tensor statistics, Tensor? gamma, Tensor? beta, Tensor? mean, "
    "Tensor? rstd, str norm, bool one_plus, float eps, str act, float slope, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, *operands = inputs[:5]
    ctx.settings = inputs[5:]
    ctx.backend = requested_backend()
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, output[1], *operands)


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:5])
    x, statistics, *operands = ctx.saved_tensors
    # y = z: what reaches a map beta of y's shape and dtype is the gradient itself, which no pass need write again.
    beta, act = operands[1], ctx.settings[3]
    passed_on = wanted[2] and act == "linear" and beta.shape == grad.shape and beta.dtype == grad.dtype
    arguments = (*operands, *ctx.settings, [want and not (passed_on and i == 2) for i, want in enumerate(wanted)])
    if torch.is_grad_enabled():  # create_graph=True: the gradient is itself differentiated, through the statistics too
        gradients = backward_reference(x, grad, *arguments)
    else:
        gradients = _backward_op(x, grad, statistics, *arguments, ctx.backend)
    gx, ggamma, gbeta, gmean, grstd = gradients
    found = (gx, ggamma, grad if passed_on else gbeta, gmean, grstd)
    return *(g if want else None for g, want in zip(found, wanted, strict=True)), *(None,) * 5


_op.register_autograd(_autograd, setup_context=_setup_context)
register_onnx_decomposition(_op, reference)


@_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """Fold the mapped axis into N; one call a slice where a row that serves the whole batch is mapped itself."""
    size = info.batch_size
    x = mapped_first(arguments[0], in_dims[0], size)
    assert x is not None  # only an absent operand stays absent
    folded: list[Tensor | None] = []
    for operand, dim in zip(arguments[1:5], in_dims[1:5], strict=True):
        if operand is None or (operand.dim() == 1 and dim is None):
            folded.append(operand)
            continue
        if operand.dim() == 2 and dim is not None:
            y, statistics = mapped_slices(_op, info, in_dims, arguments)[0]
            return (y, statistics), (0, 0)
        mapped = mapped_first(operand, dim, size)
        folded.append(None if mapped is None else mapped.flatten(0, 1))
    y, statistics = _op(x.flatten(0, 1), *folded, *arguments[5:])
    if statistics.dim() == 3:
        return (y.unflatten(0, (size, -1)), statistics.unflatten(1, (size, -1))), (0, 1)
    return (y.unflatten(0, (size, -1)), statistics.unsqueeze(0).expand(size, -1)), (0, 0)
