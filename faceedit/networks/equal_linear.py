# SPDX-License-Identifier: Apache-2.0
"""Linear layers with equalised learning rate, one by one or all in one product."""

import math
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.kernels.direct import is_ordinary

SLOPE = 0.2
MOST_JOINED = 1 << 16  # values of weights that a CPU copies for one product
GAIN = math.sqrt(2)  # keeps the variance of a leaky ReLU's output


class EqualLinear(nn.Module):
    """x @ (W * rate / sqrt(fan-in))ᵀ + b * rate, then a leaky ReLU that keeps variance when `activate`.

    Args: init, the bias that the layer starts with.
    """

    def __init__(
        self, in_width: int, out_width: int, *, rate: float = 1.0, init: float = 0.0, activate: bool = False
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.init.normal_(torch.empty(out_width, in_width), std=1 / rate))
        self.bias = nn.Parameter(torch.full((out_width,), init / rate))
        self.gain, self.rate, self.activate = rate / math.sqrt(in_width), rate, activate

    def forward(self, x: Tensor) -> Tensor:
        y = torch.addmm(self.bias, x, self.weight.t(), beta=self.rate, alpha=self.gain)
        return F.leaky_relu(y, SLOPE) * GAIN if self.activate else y


def styles_of(
    affines: Sequence[EqualLinear], rows: Sequence[int], ws: Tensor, scales: Sequence[float] | None = None
) -> list[Tensor]:
    """What each layer makes of its row of the styles.

    With frozen layers it is one matrix product, every layer of every row, from which theirs are gathered: a few
    launches instead of several a layer, where a launch takes longer than the arithmetic not needed. A traced call, a
    layer with a hook or of another class, heavy weights on a CPU: each layer is called.

    Args:    affines, layers of one input width, rate 1 and no activation; rows, of ws, one a layer; ws (N,L,W);
             scales, what a layer's output is multiplied by (default: 1).
    Returns: styles (N, width of the layer), contiguous.
    """
    if not is_ordinary(ws) or not all(_is_frozen(affine) for affine in affines) or _is_too_much(affines, ws):
        alone = [affine(ws[:, row]) for affine, row in zip(affines, rows, strict=True)]
        return alone if scales is None else [y if c == 1.0 else y * c for y, c in zip(alone, scales, strict=True)]
    weight = torch.cat([affine.weight for affine in affines])
    bias = torch.cat([affine.bias for affine in affines])
    every = torch.addmm(bias, ws.flatten(0, 1), weight.t(), alpha=affines[0].gain)
    widths = tuple(affine.weight.shape[0] for affine in affines)
    sizes = [ws.shape[0] * width for width in widths]
    styles = every.flatten().gather(0, _places(widths, tuple(rows), ws.shape[0], ws.shape[1], ws.device))
    if scales is not None:
        styles = styles * _spread(tuple(scales), tuple(sizes), styles.dtype, ws.device)
    return [part.view(ws.shape[0], width) for part, width in zip(styles.split(sizes), widths, strict=True)]


def _is_too_much(affines: Sequence[EqualLinear], ws: Tensor) -> bool:
    """Whether copying the weights side by side takes a CPU longer than calling each layer."""
    return ws.is_cpu and sum(affine.weight.numel() for affine in affines) > MOST_JOINED


def _is_frozen(affine: nn.Module) -> bool:
    """Whether the layer is nothing but its two constants."""
    hooked = affine._forward_hooks or affine._forward_pre_hooks or "forward" in vars(affine)
    return type(affine) is EqualLinear and not affine.weight.requires_grad and not hooked


# Both are kept for good: a captured CUDA graph knows their addresses only.
@cache
def _places(widths: tuple[int, ...], rows: tuple[int, ...], count: int, levels: int, device: torch.device) -> Tensor:
    """Where the styles of each layer lie in (count·levels, Σ widths), layer after layer, sample after sample; int64."""
    total, first, places = sum(widths), 0, []
    with torch.inference_mode(False), torch.no_grad():
        for width, row in zip(widths, rows, strict=True):
            lines = (torch.arange(count) * levels + row) * total
            places.append((lines[:, None] + torch.arange(first, first + width)).flatten())
            first += width
        return torch.cat(places).to(device)


@cache
def _spread(scales: tuple[float, ...], sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Each scale as often as its layer has outputs, (Σ sizes)."""
    with torch.inference_mode(False), torch.no_grad():
        return (
            torch.tensor(scales, dtype=dtype).repeat_interleave(torch.tensor(sizes), output_size=sum(sizes)).to(device)
        )
