# SPDX-License-Identifier: Apache-2.0
"""A layer of modulated_conv2d with few channels in one CUDA kernel each way: csrc/modulated_layer.cu."""

from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import native
from faceedit.kernels.modulated_conv2d_parts import Vectors, ready, turned
from faceedit.kernels.noise_bias_act import ACTIVATIONS
from faceedit.kernels.tensors import empty_float, empty_like

DTYPES = (torch.bfloat16, torch.float16)
LEAST_MULTIPROCESSORS = {32: 1, 64: 132}
"""By channels. With 64 a multiprocessor has one block of threads, and the backward pass always 132 of them."""


def fits(x: Tensor, weight: Tensor) -> bool:
    """Return whether `forward` and `backward` are what is fastest for a plain convolution of x, channels_last.

    They are where a half type's layer has so few channels that the passes around a convolution take as long as it does.
    """
    outputs, inputs, size, _ = weight.shape
    if not x.is_cuda or x.dtype not in DTYPES or inputs != outputs or size != 3 or inputs not in LEAST_MULTIPROCESSORS:
        return False
    # Positions inside a sample are 32 bits wide, and copies 16 bytes.
    small = x.shape[2] * x.shape[3] * inputs < 2**31 and x.data_ptr() % 16 == 0
    return small and gpu_holds(x.device.index, inputs)


@cache
def gpu_holds(index: int, channels: int) -> bool:
    """Return whether a GPU has the tensor cores, shared memory and multiprocessors for layers of so many channels."""
    gpu: Any = torch.cuda.get_device_properties(index)
    memory = native.module().modulated_layer_shared_bytes(channels)
    enough = (
        gpu.multi_processor_count >= LEAST_MULTIPROCESSORS[channels] and gpu.shared_memory_per_block_optin >= memory
    )
    return gpu.major >= 8 and enough


def forward(
    x: Tensor,
    weight: Tensor,
    v: Vectors,
    vectors: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    factors: Tensor | None,
    settings: tuple[str, float, float, float],
) -> tuple[Tensor, Tensor | None]:
    """Return y = epilogue(conv(x * style)) and ToRGB's sums, in one kernel; see `fits`.

    x is channels_last; vectors, factors and settings are those of the epilogue.
    """
    weight, style = ready(weight, x.dtype, torch.channels_last, False, v.lengths), v.inner
    scale, noise, strength, bias = vectors
    act, slope, gain, clamp = settings
    n, c, h, w = x.shape
    if weight.data_ptr() % 16:  # a view of the caller's
        weight = weight.clone(memory_format=torch.channels_last)
    y = empty_like(x, torch.channels_last)
    rgb = None if factors is None else empty_float(x, n, 3, h, w)
    native.module().modulated_layer_fwd(
        native.target(x),
        x=x.data_ptr(),
        y=y.data_ptr(),
        weight=weight.data_ptr(),
        style=style.data_ptr(),
        scale=native.address(scale),
        noise=native.address(noise),
        strength=native.address(strength),
        bias=native.address(bias),
        rgb_factors=native.address(factors),
        rgb=native.address(rgb),
        batch=n,
        channels=c,
        height=h,
        width=w,
        noise_stride=h * w if noise is not None and noise.shape[0] == n else 0,
        dtype=native.DTYPE_CODES[x.dtype],
        act=ACTIVATIONS.index(act),
        slope=slope,
        gain=gain,
        clamp=clamp,
    )
    return y, rgb


@lru_cache(maxsize=1024)
def _sums_size(on_cpu: bool, shape: torch.Size, wanted: bool) -> int:
    """Return how many floats `backward` needs for the sums of a gradient to style."""
    n, c, h, w = shape
    return native.module().modulated_layer_bwd_workspace(
        native.place(on_cpu), grad_style=wanted, batch=n, channels=c, height=h, width=w
    )


def backward(
    grad: Tensor, weight: Tensor, v: Vectors, x: Tensor, style: Tensor, wanted: bool
) -> tuple[Tensor, Tensor | None]:
    """Return data * style, and the sum over pixels of data * x, (N,C), where wanted; data is the convolution's.

    grad and x are channels_last; see `fits`.
    """
    weight = turned(weight, x.dtype, torch.channels_last, v.lengths)
    grad_x = empty_like(x, torch.channels_last)
    grad_style = empty_float(x, *style.shape) if wanted else None
    n, c, h, w = x.shape
    size = _sums_size(x.is_cpu, x.shape, wanted)
    workspace = empty_float(x, size) if size else None
    native.module().modulated_layer_bwd(
        native.target(x),
        grad=grad.data_ptr(),
        weight=weight.data_ptr(),
        x=x.data_ptr(),
        style=style.data_ptr(),
        grad_x=grad_x.data_ptr(),
        grad_style=native.address(grad_style),
        workspace=native.address(workspace),
        batch=n,
        channels=c,
        height=h,
        width=w,
        dtype=native.DTYPE_CODES[x.dtype],
    )
    return grad_x, grad_style
