# SPDX-License-Identifier: Apache-2.0
"""norm_modulate in plain PyTorch: its forward and backward pass, and how operands of several shapes are told apart.

The steps are numbered in kernels/norm_modulate.py.
"""

import torch
from torch import Tensor

from faceedit.kernels.activations import activate, activation_slope

ABSENT, PER_CHANNEL, PER_PIXEL, PER_ELEMENT = range(4)  # what a gamma or beta is; the codes of csrc/norm_modulate.h

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # of x, gamma, beta, mean, rstd; empty where not wanted


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that x is computed in: fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def kind_of(operand: Tensor | None, x: Tensor) -> int:
    """Return which of the kinds above an operand of x is."""
    if operand is None:
        return ABSENT
    if operand.dim() < 4:
        return PER_CHANNEL
    return PER_PIXEL if operand.shape[1] == 1 and x.shape[1] != 1 else PER_ELEMENT


def _spread(operand: Tensor, dtype: torch.dtype) -> Tensor:
    """Return an operand of any of its shapes as one that broadcasts against (N,C,H,W)."""
    return operand.to(dtype) if operand.dim() == 4 else operand.to(dtype)[..., None, None]


def _statistics(
    x: Tensor, mean: Tensor | None, rstd: Tensor | None, norm: str, eps: float
) -> tuple[Tensor, Tensor] | None:
    """Return mean and rstd, broadcastable against x, which is in the dtype they are computed in."""
    if norm == "none":
        return None
    if mean is not None and rstd is not None:
        return _spread(mean, x.dtype), _spread(rstd, x.dtype)
    found = x.mean((2, 3), keepdim=True)
    variance = (x - found).square().mean((2, 3), keepdim=True)
    return found, (variance + eps).rsqrt()


def _modulate(u: Tensor, gamma: Tensor | None, beta: Tensor | None, one_plus: bool) -> Tensor:
    if gamma is not None:
        factor = _spread(gamma, u.dtype)
        u = u * (1 + factor if one_plus else factor)
    return u if beta is None else u + _spread(beta, u.dtype)


def reference(
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
    """Compute norm_modulate in plain PyTorch: the oracle in fp64, and what ONNX export writes.

    Returns: y, and what an instance norm found, (3,N,C): mean, rstd, and rstd times what rounding took off the mean
             (0 here); empty for another norm.
    """
    u = x.to(compute_dtype(x))
    statistics = _statistics(u, mean, rstd, norm, eps)
    found = u.new_empty(0)
    if statistics is not None:
        u = (u - statistics[0]) * statistics[1]
        if norm == "instance":
            centre, scale = (t.flatten(1) for t in statistics)
            found = torch.stack([centre, scale, torch.zeros_like(scale)])
    return activate(_modulate(u, gamma, beta, one_plus), act, slope).to(x.dtype), found


def _reduce(gradient: Tensor, operand: Tensor) -> Tensor:
    """Sum an element-wise gradient (N,C,H,W) down to an operand's shape, in its dtype."""
    if operand.dim() == 1:
        gradient = gradient.sum((0, 2, 3))
    elif operand.dim() == 2:
        gradient = gradient.sum((2, 3))
    elif operand.shape[1] != gradient.shape[1]:
        gradient = gradient.sum(1, keepdim=True)
    return gradient.to(operand.dtype)


def backward_reference(
    x: Tensor,
    grad: Tensor,
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
) -> Gradients:
    """Compute the gradients in plain PyTorch: the oracle, the eager backend, and the path that is differentiated again.

    wanted: for x, gamma, beta, mean and rstd. A gradient that is not wanted is an empty tensor.
    """
    dtype = compute_dtype(x)
    wide = x.to(dtype)
    statistics = _statistics(wide, mean, rstd, norm, eps)
    u = wide if statistics is None else (wide - statistics[0]) * statistics[1]
    gz = grad.to(dtype) * activation_slope(_modulate(u, gamma, beta, one_plus), act, slope)
    gu = gz
    if gamma is not None:
        factor = _spread(gamma, dtype)
        gu = gz * (1 + factor if one_plus else factor)
    gx, ggamma, gbeta, gmean, grstd = (grad.new_empty(0) for _ in range(5))
    if wanted[0]:
        wide_gx = gu
        if norm == "instance":
            wide_gx = gu - gu.mean((2, 3), keepdim=True) - u * (gu * u).mean((2, 3), keepdim=True)
        gx = (wide_gx if statistics is None else wide_gx * statistics[1]).to(x.dtype)
    if wanted[1] and gamma is not None:
        ggamma = _reduce(gz * u, gamma)
    if wanted[2] and beta is not None:
        gbeta = _reduce(gz, beta)
    if mean is not None and rstd is not None:
        if wanted[3]:
            gmean = _reduce(-gu * _spread(rstd, dtype), mean)
        if wanted[4]:
            grstd = _reduce(gu * (wide - _spread(mean, dtype)), rstd)
    return gx, ggamma, gbeta, gmean, grstd
