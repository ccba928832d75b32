# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton bodies of the divergences. Imported only when the triton backend runs: importing triton takes a second."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.tensors import as_float, empty_float, empty_like


@triton.jit
def _smoothed(target_ptr, index, inside, smoothing):
    t = tl.load(target_ptr + index, mask=inside, other=0).to(tl.float64)
    return tl.abs(t - smoothing)


@triton.jit
def _x_log_x(x):
    # Where x is not 0 the inner choice is x itself, NaN included.
    return tl.where(x == 0.0, 0.0, x * tl.log(tl.where(x == 0.0, 1.0, x)))


@triton.jit
def _log1p(e):
    # For e in [0, 1]: log(u) / (u - 1) is smooth at u = 1 + e, so the rounding of u cancels.
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * e / tl.where(u == 1.0, 1.0, u - 1.0))


@triton.jit
def bernoulli_forward_kernel(
    logits_ptr, target_ptr, weight_ptr, loss_ptr, attributes, smoothing_ptr, WEIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    smoothing = tl.load(smoothing_ptr)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, attributes, BLOCK):
        a = first + tl.arange(0, BLOCK)
        inside = a < attributes
        x = tl.load(logits_ptr + n * attributes + a, mask=inside, other=0.0).to(tl.float64)
        t = _smoothed(target_ptr, n * attributes + a, inside, smoothing)
        cross = tl.where(x < 0.0, -t, 1.0 - t) * x + _log1p(tl.exp(-tl.abs(x)))
        divergence = _x_log_x(t) + _x_log_x(1.0 - t) + cross
        if WEIGHT:
            divergence = divergence * tl.load(weight_ptr + a, mask=inside, other=0.0).to(tl.float64)
        total += tl.where(inside, divergence, 0.0)
    tl.store(loss_ptr + n, (tl.sum(total, axis=0) / attributes).to(tl.float32))


@triton.jit
def bernoulli_backward_kernel(
    logits_ptr, target_ptr, weight_ptr, grad_ptr, found_ptr, elements, attributes, smoothing_ptr,
    WEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    x = tl.load(logits_ptr + i, mask=inside, other=0.0).to(tl.float64)
    e = tl.exp(-tl.abs(x))
    slope = tl.where(x < 0.0, e, 1.0) / (1.0 + e) - _smoothed(target_ptr, i, inside, tl.load(smoothing_ptr))
    if WEIGHT:
        slope = slope * tl.load(weight_ptr + i % attributes, mask=inside, other=0.0).to(tl.float64)
    grad = tl.load(grad_ptr + i // attributes, mask=inside, other=0.0).to(tl.float64)
    tl.store(found_ptr + i, (grad * slope / attributes).to(tl.float32).to(found_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _series(x):
    # (e^x - 1 - x) / x^2, exact to fp32 for |x| < 1.
    s = 2.7557319e-7 + x * 2.5052108e-8
    s = 2.4801587e-5 + x * (2.7557319e-6 + x * s)
    s = 1.3888889e-3 + x * (1.9841270e-4 + x * s)
    s = 4.1666667e-2 + x * (8.3333333e-3 + x * s)
    return 0.5 + x * (1.6666667e-1 + x * s)


@triton.jit
def gaussian_forward_kernel(mu_ptr, logvar_ptr, loss_ptr, elements, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(0, elements, BLOCK):
        i = first + tl.arange(0, BLOCK)
        inside = i < elements
        m = tl.load(mu_ptr + n * elements + i, mask=inside, other=0.0).to(tl.float32)
        v = tl.load(logvar_ptr + n * elements + i, mask=inside, other=0.0).to(tl.float32)
        excess = tl.where(tl.abs(v) < 1.0, v * v * _series(v), tl.exp(v) - 1.0 - v)
        total += (m * m + excess).to(tl.float64)
    tl.store(loss_ptr + n, (0.5 * tl.sum(total, axis=0)).to(tl.float32))


@triton.jit
def gaussian_backward_kernel(
    mu_ptr, logvar_ptr, grad_ptr, gmu_ptr, glogvar_ptr, all_elements, elements,
    WANT_MU: tl.constexpr, WANT_LOGVAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < all_elements
    grad = tl.load(grad_ptr + i // elements, mask=inside, other=0.0)
    if WANT_MU:
        m = tl.load(mu_ptr + i, mask=inside, other=0.0).to(tl.float32)
        tl.store(gmu_ptr + i, (grad * m).to(gmu_ptr.dtype.element_ty), mask=inside)
    if WANT_LOGVAR:
        v = tl.load(logvar_ptr + i, mask=inside, other=0.0).to(tl.float32)
        slope = tl.where(tl.abs(v) < 1.0, v + v * v * _series(v), tl.exp(v) - 1.0)
        tl.store(glogvar_ptr + i, (0.5 * grad * slope).to(glogvar_ptr.dtype.element_ty), mask=inside)


def _operands(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> tuple[Tensor, ...]:
    """Return what the kernels read; `smoothing` as a double, since a Python number would arrive as fp32."""
    target = target.contiguous()
    target = target.view(torch.uint8) if target.dtype == torch.bool else target
    weight = as_float(weight)
    number = torch.full((1,), smoothing, dtype=torch.float64, device=logits.device)
    return target, (logits if weight is None else weight), number


def bernoulli_forward(logits: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """Run the forward kernel; arguments as the op's."""
    logits = logits.contiguous()
    t, w, number = _operands(logits, target, weight, smoothing)
    loss = empty_float(logits, logits.shape[0])
    bernoulli_forward_kernel[(logits.shape[0],)](
        logits, t, w, loss, logits.shape[1], number, WEIGHT=weight is not None, BLOCK=64
    )
    return loss


def bernoulli_backward(logits: Tensor, grad: Tensor, target: Tensor, weight: Tensor | None, smoothing: float) -> Tensor:
    """Run the backward kernel; arguments as the backward op's."""
    logits = logits.contiguous()
    t, w, number = _operands(logits, target, weight, smoothing)
    found = empty_like(logits, torch.contiguous_format)
    block = 256
    bernoulli_backward_kernel[(triton.cdiv(logits.numel(), block),)](
        logits, t, w, grad.float().contiguous(), found, logits.numel(), logits.shape[1], number,
        WEIGHT=weight is not None, BLOCK=block,
    )  # fmt: skip
    return found


def gaussian_forward(mu: Tensor, logvar: Tensor) -> Tensor:
    """Run the forward kernel; arguments as the op's."""
    mu, logvar = mu.contiguous(), logvar.contiguous()
    loss = empty_float(mu, mu.shape[0])
    gaussian_forward_kernel[(mu.shape[0],)](mu, logvar, loss, mu[0].numel(), BLOCK=512)
    return loss


def gaussian_backward(mu: Tensor, logvar: Tensor, grad: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Run the backward kernel; arguments as the backward op's."""
    mu, logvar = mu.contiguous(), logvar.contiguous()
    gmu, glogvar = (empty_like(mu, torch.contiguous_format) if want else None for want in wanted)
    block = 512
    gaussian_backward_kernel[(triton.cdiv(mu.numel(), block),)](
        mu, logvar, grad.float().contiguous(), *(mu if t is None else t for t in (gmu, glogvar)),
        mu.numel(), mu[0].numel(), WANT_MU=wanted[0], WANT_LOGVAR=wanted[1], BLOCK=block,
    )  # fmt: skip
    return (mu.new_empty(0) if gmu is None else gmu), (mu.new_empty(0) if glogvar is None else glogvar)
