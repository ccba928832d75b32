# SPDX-License-Identifier: Apache-2.0
"""The activations that fused ops end with, in plain PyTorch: values and derivatives."""

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels.tensors import check_number

ACTIVATIONS = ("linear", "relu", "lrelu", "tanh", "sigmoid", "silu")  # the position is the native kernels' code


def check_activation(op: str, act: str, slope: float, gain: float = 1.0, clamp: float = -1.0) -> None:
    """Raise unless `act` names an activation, and what goes with it are numbers."""
    if act not in ACTIVATIONS:
        raise ValueError(f"{op}: act must be one of {ACTIVATIONS}, got {act!r}; choose one of these")
    if not (isinstance(slope, (float, int)) and isinstance(gain, (float, int)) and isinstance(clamp, (float, int))):
        check_number(op, "slope", slope)
        check_number(op, "gain", gain)
        check_number(op, "clamp", clamp, "pass -1 for no clamp")


def activate(z: Tensor, act: str, slope: float) -> Tensor:
    """Return act(z); `slope` is lrelu's below zero. "linear" returns z itself."""
    if act == "lrelu":
        return F.leaky_relu(z, slope)
    if act == "linear":
        return z
    return {"relu": torch.relu, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "silu": F.silu}[act](z)


def tanh_slope(z: Tensor) -> Tensor:
    """Return 1 - tanh(z)^2, precise also where tanh rounds to 1."""
    return 4 * torch.sigmoid(2 * z) * torch.sigmoid(-2 * z)


def activation_slope(z: Tensor, act: str, slope: float) -> Tensor:
    """Return d act(z) / dz, differentiable. At z = 0 lrelu takes the positive side and relu the flat one."""
    if act == "lrelu":
        # Of two numbers, `where` would make fp32: 0.2 there is 1.5e-8 off for fp64.
        return torch.where(z < 0, z.new_full((), slope), 1.0)
    if act == "relu":
        return (~(z <= 0)).to(z.dtype)
    if act == "tanh":
        return tanh_slope(z)
    if act == "sigmoid":
        return torch.sigmoid(z) * torch.sigmoid(-z)
    if act == "silu":
        return torch.sigmoid(z) * (1 + z * torch.sigmoid(-z))
    return torch.ones_like(z)
