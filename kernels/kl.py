# SPDX-License-Identifier: Apache-2.0
"""Kullback-Leibler divergences per sample: of two-point distributions given by logits, of a normal one from N(0, 1).

Backward passes recompute from the inputs: they live on anyway, and nothing else is kept.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels import native
from faceedit.kernels.dispatch import dispatcher, requested_backend
from faceedit.kernels.operator import define_op, mapped_first, mapped_slices, register_onnx_decomposition
from faceedit.kernels.tensors import (
    as_float,
    as_number,
    check_floating,
    check_number,
    check_shape,
    check_tensor,
    describe,
    empty_float,
    empty_like,
    in_format,
)


def bernoulli_kl(logits: Tensor, target: Tensor, weight: Tensor | None = None, smoothing: float = 0.0) -> Tensor:
    """Return KL(t || sigmoid(logits)) averaged over the attributes, with t = |target - smoothing|.

    loss[n] = sum_a weight[a] * (t log(t / s) + (1 - t) log((1 - t) / (1 - s))) / A, s = sigmoid(logits), 0 log 0 = 0

    Args:     logits (N,A) fp64|fp32|fp16|bf16. target (N,A) in [0,1]: floating point, bool, or uint8 (a number). weight
              (A), None = ones; the divisor is A whatever the weights are. smoothing in [0, 1]: 0.05 turns the targets
              0 and 1 into 0.05 and 0.95.
    Returns:  (N) fp32 (fp64 for fp64). Finite for every finite logit: no logarithm of a saturated sigmoid is taken.
    Grad:     logits to second order, (s - t) * weight / A. A target or weight that requires grad is differentiated too,
              through the eager composition.
    Backends: eager (any device), cpu, cuda, triton. Relative to fp64 eager: 1e-6, also for nearly equal distributions
              (eager in fp32 loses digits there).
    Raises:   TypeError on a dtype; ValueError on shape, device or smoothing.
    Source:   MaskFaceGAN (Pernus et al. 2023), eq. 3 in the direction of its released code, KL(target || prediction).
    """
    _check_matrix("bernoulli_kl", logits)
    check_shape("bernoulli_kl", "target", target, logits, tuple(logits.shape), any_dtype=True)
    if not target.is_floating_point() and target.dtype not in (torch.uint8, torch.bool):
        raise TypeError(
            f"bernoulli_kl: target must be floating point, uint8 or bool, got {describe(target)}; cast it first"
        )
    if weight is not None:
        check_shape("bernoulli_kl", "weight", weight, logits, (logits.shape[1],))
    check_number("bernoulli_kl", "smoothing", smoothing)
    if not 0 <= smoothing <= 1:
        raise ValueError(f"bernoulli_kl: smoothing must be in [0, 1], got {smoothing}; 0 is none")
    if torch.is_grad_enabled() and (target.requires_grad or (weight is not None and weight.requires_grad)):
        return bernoulli_reference(logits, target, weight, smoothing)
    return _bernoulli(logits, target, weight, as_number(smoothing))


def gaussian_kl(mu: Tensor, logvar: Tensor) -> Tensor:
    """Return KL(N(mu, exp(logvar)) || N(0, 1)), summed over everything but the batch.

    loss[n] = sum_i (mu^2 + exp(logvar) - 1 - logvar) / 2

    Args:     mu, logvar (N, ...) fp64|fp32|fp16|bf16, at least two axes; of two dtypes the wider is used.
    Returns:  (N) fp32 (fp64 for fp64). Small log-variances keep their digits.
    Grad:     mu and logvar to second order: mu and (exp(logvar) - 1) / 2.
    Backends: eager (any device), cpu, cuda, triton. Relative to fp64 eager: 1e-6.
    Raises:   TypeError on a dtype; ValueError on shape or device.
    Source:   Kingma & Welling 2014 (auto-encoding variational Bayes), appendix B.
    """
    check_floating("gaussian_kl", "mu", mu)
    check_floating("gaussian_kl", "logvar", logvar)
    if mu.dim() < 2:
        raise ValueError(f"gaussian_kl: mu must be of shape (N, ...), got {describe(mu)}; add the missing axes")
    check_shape("gaussian_kl", "logvar", logvar, mu, tuple(mu.shape))
    if mu.dtype != logvar.dtype:
        dtype = torch.promote_types(mu.dtype, logvar.dtype)
        mu, logvar = mu.to(dtype), logvar.to(dtype)
    return _gaussian(mu, logvar)


def _check_matrix(op: str, logits: Tensor) -> None:
    check_tensor(op, "logits", logits)
    if logits.dim() != 2:
        raise ValueError(f"{op}: logits must be of shape (N, A), got {describe(logits)}; reshape them")
    check_floating(op, "logits", logits)


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


# Of two-point distributions.


def bernoulli_reference(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """Compute bernoulli_kl in plain PyTorch: the oracle in fp64, and what ONNX export writes."""
    dtype = _compute_dtype(logits)
    x, t = logits.to(dtype), (target.to(dtype) - smoothing).abs()
    # softplus(-x) and softplus(x) are the negative logarithms of both probabilities. Above 40 x is softplus(x) in fp64.
    cross = t * F.softplus(-x, threshold=40) + (1 - t) * F.softplus(x, threshold=40)
    divergence = torch.xlogy(t, t) + torch.xlogy(1 - t, 1 - t) + cross
    if weight is not None:
        divergence = divergence * weight.to(dtype)
    return divergence.sum(1) / max(logits.shape[1], 1)


def _bernoulli_call(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> dict[str, Any]:
    return {
        "logits": logits.data_ptr(),
        "target": target.data_ptr(),
        "weight": native.address(weight),
        "batch": logits.shape[0],
        "attributes": logits.shape[1],
        "dtype": native.DTYPE_CODES[logits.dtype],
        "target_dtype": native.DTYPE_CODES[target.dtype],
        "smoothing": smoothing,
    }


def _bernoulli_native(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    logits, target, weight = logits.contiguous(), native.readable_mask(target), as_float(weight)
    loss = empty_float(logits, logits.shape[0])
    call = _bernoulli_call(logits, target, weight, smoothing)
    native.module().bernoulli_kl_fwd(native.target(logits), loss=loss.data_ptr(), **call)
    return loss


def _bernoulli_triton(logits: Tensor, *arguments: Any) -> Tensor:
    from faceedit.kernels import kl_triton

    return kl_triton.bernoulli_forward(logits, *arguments)


_bernoulli_forward = dispatcher(
    "bernoulli_kl",
    eager=bernoulli_reference,
    cpu=_bernoulli_native,
    cuda=_bernoulli_native,
    triton=_bernoulli_triton,
)


def _fake(x: Tensor, *arguments: Any) -> Tensor:
    return x.new_empty(x.shape[0], dtype=_compute_dtype(x))


_bernoulli = define_op(
    "bernoulli_kl(Tensor logits, Tensor target, Tensor? weight, float smoothing) -> Tensor", _bernoulli_forward, _fake
)


def bernoulli_backward_reference(
    logits: Tensor, grad: Tensor, target: Tensor, weight: Tensor | None, smoothing: float
) -> Tensor:
    """Compute the gradient to the logits in plain PyTorch, differentiable again."""
    dtype = _compute_dtype(logits)
    slope = torch.sigmoid(logits.to(dtype)) - (target.to(dtype) - smoothing).abs()
    if weight is not None:
        slope = slope * weight.to(dtype)
    return (slope * (grad.to(dtype) / max(logits.shape[1], 1))[:, None]).to(logits.dtype)


def _bernoulli_backward_eager(logits: Tensor, *arguments: Any) -> Tensor:
    return bernoulli_backward_reference(logits, *arguments).contiguous()


def _bernoulli_backward_native(
    logits: Tensor, grad: Tensor, target: Tensor, weight: Tensor | None, smoothing: float
) -> Tensor:
    logits, target, weight = logits.contiguous(), native.readable_mask(target), as_float(weight)
    grad = in_format(grad, torch.float32, torch.contiguous_format)
    found = empty_like(logits, torch.contiguous_format)
    call = _bernoulli_call(logits, target, weight, smoothing)
    native.module().bernoulli_kl_bwd(native.target(logits), grad=grad.data_ptr(), grad_logits=found.data_ptr(), **call)
    return found


def _bernoulli_backward_triton(logits: Tensor, *arguments: Any) -> Tensor:
    from faceedit.kernels import kl_triton

    return kl_triton.bernoulli_backward(logits, *arguments)


_bernoulli_backward = dispatcher(
    "bernoulli_kl_backward",
    eager=_bernoulli_backward_eager,
    cpu=_bernoulli_backward_native,
    cuda=_bernoulli_backward_native,
    triton=_bernoulli_backward_triton,
)

_bernoulli_backward_op = define_op(
    "bernoulli_kl_backward(Tensor logits, Tensor grad, Tensor target, Tensor? weight, float smoothing, str backend)"
    " -> Tensor",
    _bernoulli_backward,
    lambda logits, *arguments: logits.new_empty(logits.shape),
)


def _bernoulli_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    logits, target, weight, ctx.smoothing = inputs
    ctx.backend = requested_backend()
    ctx.save_for_backward(logits, target, weight)


def _bernoulli_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[1:3]):
        raise RuntimeError(
            "bernoulli_kl: a target or weight that requires grad must go through faceedit.kernels.bernoulli_kl, got a "
            "direct call of the op; call the function"
        )
    logits, target, weight = ctx.saved_tensors
    arguments = (logits, grad, target, weight, ctx.smoothing)
    if torch.is_grad_enabled():  # create_graph=True: the gradient is itself differentiated
        found = bernoulli_backward_reference(*arguments)
    else:
        found = _bernoulli_backward_op(*arguments, ctx.backend)
    return found, None, None, None


_bernoulli.register_autograd(_bernoulli_autograd, setup_context=_bernoulli_setup)
register_onnx_decomposition(_bernoulli, bernoulli_reference)


@_bernoulli.register_vmap
def _bernoulli_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Fold the mapped axis into N; one call a slice where the weight is mapped itself."""
    logits, target, weight, smoothing = arguments
    if in_dims[2] is not None:
        return mapped_slices(_bernoulli, info, in_dims, arguments)
    folded = [mapped_first(t, dim, info.batch_size) for t, dim in zip((logits, target), in_dims[:2], strict=True)]
    loss = _bernoulli(*(None if t is None else t.flatten(0, 1) for t in folded), weight, smoothing)
    return loss.unflatten(0, (info.batch_size, -1)), 0


# Of a normal distribution from N(0, 1).


def gaussian_reference(mu: Tensor, logvar: Tensor) -> Tensor:
    """Compute gaussian_kl in plain PyTorch: the oracle in fp64, and what ONNX export writes."""
    dtype = _compute_dtype(mu)
    m, v = mu.to(dtype), logvar.to(dtype)
    return 0.5 * (m * m + (torch.expm1(v) - v)).sum(tuple(range(1, mu.dim())))


def _gaussian_call(mu: Tensor, logvar: Tensor) -> dict[str, Any]:
    return {
        "mu": mu.data_ptr(),
        "logvar": logvar.data_ptr(),
        "batch": mu.shape[0],
        "elements": mu.numel() // mu.shape[0],
        "dtype": native.DTYPE_CODES[mu.dtype],
    }


def _gaussian_native(mu: Tensor, logvar: Tensor) -> Tensor:
    mu, logvar = mu.contiguous(), logvar.contiguous()
    module, target, call = native.module(), native.target(mu), _gaussian_call(mu, logvar)
    loss = empty_float(mu, mu.shape[0])
    workspace = empty_float(mu, module.gaussian_kl_fwd_workspace(target, **call), dtype=torch.float64)
    module.gaussian_kl_fwd(target, loss=loss.data_ptr(), workspace=workspace.data_ptr(), **call)
    return loss


def _gaussian_triton(mu: Tensor, logvar: Tensor) -> Tensor:
    from faceedit.kernels import kl_triton

    return kl_triton.gaussian_forward(mu, logvar)


_gaussian_forward = dispatcher(
    "gaussian_kl", eager=gaussian_reference, cpu=_gaussian_native, cuda=_gaussian_native, triton=_gaussian_triton
)

_gaussian = define_op("gaussian_kl(Tensor mu, Tensor logvar) -> Tensor", _gaussian_forward, _fake)


def gaussian_backward_reference(mu: Tensor, logvar: Tensor, grad: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Compute both gradients in plain PyTorch, differentiable again; one that is not wanted is an empty tensor."""
    dtype = _compute_dtype(mu)
    g = grad.to(dtype).reshape(-1, *(1,) * (mu.dim() - 1))
    gmu = (g * mu.to(dtype)).to(mu.dtype) if wanted[0] else mu.new_empty(0)
    glogvar = (0.5 * g * torch.expm1(logvar.to(dtype))).to(mu.dtype) if wanted[1] else mu.new_empty(0)
    return gmu, glogvar


def _gaussian_backward_eager(mu: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    gmu, glogvar = gaussian_backward_reference(mu, *arguments)
    return gmu.contiguous(), glogvar.contiguous()


def _gaussian_backward_native(mu: Tensor, logvar: Tensor, grad: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    mu, logvar = mu.contiguous(), logvar.contiguous()
    grad = in_format(grad, torch.float32, torch.contiguous_format)
    gmu, glogvar = (empty_like(mu, torch.contiguous_format) if want else None for want in wanted)
    native.module().gaussian_kl_bwd(
        native.target(mu),
        grad=grad.data_ptr(),
        grad_mu=native.address(gmu),
        grad_logvar=native.address(glogvar),
        **_gaussian_call(mu, logvar),
    )
    return (mu.new_empty(0) if gmu is None else gmu), (mu.new_empty(0) if glogvar is None else glogvar)


def _gaussian_backward_triton(mu: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    from faceedit.kernels import kl_triton

    return kl_triton.gaussian_backward(mu, *arguments)


_gaussian_backward = dispatcher(
    "gaussian_kl_backward",
    eager=_gaussian_backward_eager,
    cpu=_gaussian_backward_native,
    cuda=_gaussian_backward_native,
    triton=_gaussian_backward_triton,
)


def _gaussian_backward_fake(
    mu: Tensor, logvar: Tensor, grad: Tensor, wanted: list[bool], backend: str
) -> tuple[Tensor, Tensor]:
    gmu, glogvar = (mu.new_empty(mu.shape if want else (0,)) for want in wanted)
    return gmu, glogvar


_gaussian_backward_op = define_op(
    "gaussian_kl_backward(Tensor mu, Tensor logvar, Tensor grad, bool[] wanted, str backend) -> (Tensor, Tensor)",
    _gaussian_backward,
    _gaussian_backward_fake,
)


def _gaussian_setup(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.backend = requested_backend()
    ctx.save_for_backward(*inputs)


def _gaussian_autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    wanted = list(ctx.needs_input_grad[:2])
    arguments = (*ctx.saved_tensors, grad, wanted)
    if torch.is_grad_enabled():  # create_graph=True: the gradient is itself differentiated
        gradients = gaussian_backward_reference(*arguments)
    else:
        gradients = _gaussian_backward_op(*arguments, ctx.backend)
    return tuple(g if want else None for g, want in zip(gradients, wanted, strict=True))


_gaussian.register_autograd(_gaussian_autograd, setup_context=_gaussian_setup)
register_onnx_decomposition(_gaussian, gaussian_reference)


@_gaussian.register_vmap
def _gaussian_vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Fold the mapped axis into N."""
    folded = [mapped_first(t, dim, info.batch_size) for t, dim in zip(arguments, in_dims, strict=True)]
    loss = _gaussian(*(None if t is None else t.flatten(0, 1) for t in folded))
    return loss.unflatten(0, (info.batch_size, -1)), 0
