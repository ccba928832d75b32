# SPDX-License-Identifier: Apache-2.0
"""A 3x3 convolution that nothing trains, by modulated_conv2d with styles of 1, where that is quicker than PyTorch's."""

import sys
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import native
from faceedit.kernels.dispatch import requested_backend
from faceedit.kernels.modulated_conv2d import modulated_conv2d
from faceedit.kernels.tensors import memory_format


def pays(x: Tensor, weight: Tensor) -> bool:
    """Return whether `conv3x3` is faster than a convolution by PyTorch: float32 in channels_last, of enough pixels.

    Never while a tracer records, so that graphs hold an ordinary convolution.
    """
    if not x.is_cpu or not x.dtype is weight.dtype is torch.float32 or weight.requires_grad:
        return False
    if requested_backend() not in ("auto", "cpu") or native.MISSING_REASON or torch.is_autocast_enabled("cpu"):
        return False
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or _is_made_a_graph():
        return False
    from faceedit.kernels import winograd_native

    return memory_format(x) is torch.channels_last and winograd_native.fits(x, weight, 1)


def _is_made_a_graph() -> bool:
    """Return whether make_fx records; its module takes a while to import, and has been where it does."""
    tracer: Any = sys.modules.get("torch.fx.experimental.proxy_tensor")
    return tracer is not None and tracer.get_proxy_mode() is not None


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, act: str) -> Tensor:
    """Return act(conv(x) + bias), (N,O,H,W), padding 1; x (N,I,H,W), weight (O,I,3,3), bias (O), act relu or linear.

    What is made of the weight is kept with it, as modulated_conv2d does: writes through `weight.data` go unseen.
    """
    ones = x.new_ones(x.shape[:2])
    return modulated_conv2d(x, weight, ones, bias=bias, demodulate=False, act=act, gain=1.0)  # type: ignore[return-value]
