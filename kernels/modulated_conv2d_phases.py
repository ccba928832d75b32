# SPDX-License-Identifier: Apache-2.0
"""An upsampling convolution of 3x3 as four plain ones, where a CPU's bf16 is slow at the transposed one.

Every second row and column of the result sees the same taps: two of them on even ones, one on odd ones.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from faceedit.kernels.modulated_conv2d_parts import Geometry
from faceedit.kernels.tensors import empty

LEAST_INPUTS, LEAST_OUTPUTS = 128, 64  # below, writing every second pixel takes longer than what is won


@cache
def _has_amx() -> bool:
    """Return whether the processor multiplies bf16 matrices; False where Linux does not say so."""
    try:
        return "amx_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def pays(x: Tensor, weight: Tensor, geometry: Geometry, fmt: torch.memory_format) -> bool:
    """Return whether the upsampling convolution of x with a weight (O,I,k,k) is faster in phases."""
    return (
        geometry.up == 2
        and geometry.kernel == 3
        and x.dtype is torch.bfloat16
        and x.is_cpu
        and fmt is torch.channels_last
        and weight.shape[0] >= LEAST_OUTPUTS
        and weight.shape[1] >= LEAST_INPUTS
        and _has_amx()
    )


def part(weight: Tensor, row: int, column: int) -> Tensor:
    """Return the taps (O,I,1|2,1|2) that rows and columns of this parity see, of the weight (O,I,3,3)."""
    weight = weight[:, :, 1:2] if row else weight.flip(2)[:, :, ::2]
    return weight[..., 1:2] if column else weight.flip(3)[..., ::2]


def padding(row: int, column: int) -> list[int]:
    """Return the padding of the convolution with `part`."""
    return [1 - row, 1 - column]


def upsample(x: Tensor, outputs: int, convolve: Callable[[int, int], Tensor]) -> Tensor:
    """Return the transposed convolution of x, (N,O,2H+1,2W+1), of its phases: convolve(row, column) gives one."""
    n, _, h, w = x.shape
    y = empty((n, outputs, 2 * h + 1, 2 * w + 1), x, x.dtype, torch.channels_last)
    for row in (0, 1):
        for column in (0, 1):
            y[:, :, row::2, column::2] = convolve(row, column)
    return y
