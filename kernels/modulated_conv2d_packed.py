# SPDX-License-Identifier: Apache-2.0
"""Convolutions of modulated_conv2d with a frozen weight that is kept in oneDNN's own layout.

PyTorch's convolution brings a weight to that layout at every call, which takes a third of the time for 512 channels at
8 px. The operators here are those that PyTorch's compiler calls; without them the weight stays as it is.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import modulated_conv2d_phases
from faceedit.kernels.modulated_conv2d_parts import Geometry, from_weight, is_remembered

LEAST_WEIGHTS = 1 << 19  # of fewer, the reorder costs no more than these operators' longer way


@cache
def _operators() -> tuple[Any, ...]:
    """Return what reorders and convolves, plain and transposed; empty where PyTorch lacks one of them."""
    names = (
        "_reorder_convolution_weight",
        "_convolution_pointwise",
        "_reorder_convolution_transpose_weight",
        "_convolution_transpose_pointwise",
    )
    try:
        return tuple(getattr(torch.ops.mkldnn, name).default for name in names)
    except (AttributeError, RuntimeError):
        return ()


@cache
def _dtypes() -> tuple[torch.dtype, ...]:
    has_bf16 = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return (torch.float32, torch.bfloat16) if has_bf16 is not None and has_bf16() else (torch.float32,)


def _is_on() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


def pays(x: Tensor, weight: Tensor, geometry: Geometry, fmt: torch.memory_format) -> bool:
    """Return whether the convolution of x takes a packed weight: one that nothing trains and that outweighs x."""
    return (
        weight.numel() >= LEAST_WEIGHTS
        and weight.numel() > x.numel()
        and x.is_cpu
        and fmt is torch.channels_last
        and geometry.down == 1
        and is_remembered(weight)
        and x.dtype in _dtypes()
        and _is_on()
        and bool(_operators())
    )


def convolve(x: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Convolve as `Geometry.convolve` does, with a weight (O,I,k,k)."""
    plain, transposed = _operators()[1], _operators()[3]
    if geometry.up == 2:
        w = _packed(x, weight, geometry, "up")
        return transposed(x, w, None, [0, 0], [0, 0], [2, 2], [1, 1], 1, "none", [], "")
    padding = [geometry.padding] * 2
    return plain(x, _packed(x, weight, geometry, "plain"), None, padding, [1, 1], [1, 1], 1, "none", [], "")


def convolve_phase(x: Tensor, weight: Tensor, row: int, column: int) -> Tensor:
    """Return a phase of the upsampling convolution; see modulated_conv2d_phases."""
    padding = modulated_conv2d_phases.padding(row, column)

    def pack(w: Tensor) -> Tensor:
        w = modulated_conv2d_phases.part(w, row, column).to(x.dtype).contiguous(memory_format=torch.channels_last)
        return _operators()[0](w, padding, [1, 1], [1, 1], 1, list(x.shape))

    w = from_weight(weight, ("phase", row, column, x.dtype, "packed"), pack)
    return _operators()[1](x, w, None, padding, [1, 1], [1, 1], 1, "none", [], "")


def convolve_backward(grad: Tensor, weight: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of `convolve` to x: the transpose of either convolution is a convolution."""
    w = _packed(grad, weight, geometry, "back")
    stride = [geometry.up] * 2
    return _operators()[1](grad, w, None, [geometry.padding] * 2, stride, [1, 1], 1, "none", [], "")


def _packed(x: Tensor, weight: Tensor, geometry: Geometry, use: str) -> Tensor:
    """Return the weight packed for inputs like the first x. One that wants another layout gets it at its call."""

    def pack(w: Tensor) -> Tensor:
        if use == "back" and geometry.up == 1:
            w = w.flip(2, 3)
        w = w if use == "plain" else w.transpose(0, 1)
        w = w.to(x.dtype).contiguous(memory_format=torch.channels_last)
        pad, size = [geometry.padding] * 2, list(x.shape)
        if use == "up":
            return _operators()[2](w, pad, [0, 0], [2, 2], [1, 1], 1, size)
        return _operators()[0](w, pad, [geometry.up if use == "back" else 1] * 2, [1, 1], 1, size)

    return from_weight(weight, (use, geometry, x.dtype), pack)
