# SPDX-License-Identifier: Apache-2.0
"""Images of any size as the one size that a network works at."""

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F


def resample(x: Tensor, size_px: int, mode: Literal["area", "bilinear"]) -> Tensor:
    """(N,C,H,W) at size_px², as `F.interpolate` with corners not aligned; differentiable, also twice.

    On a GPU as means or as products with small matrices: PyTorch's own gradients sum in an order of chance there, and
    those of an area average take longer than the convolutions behind it.
    """
    height, width = x.shape[-2:]
    if not x.is_cuda:
        if mode == "area" and height == width and height % size_px == 0:
            return F.avg_pool2d(x, height // size_px)
        corners = None if mode == "area" else False
        return F.interpolate(x, (size_px, size_px), mode=mode, align_corners=corners)
    return resample_by_products(x, size_px, mode)


def resample_by_products(x: Tensor, size_px: int, mode: Literal["area", "bilinear"]) -> Tensor:
    """`resample` as a GPU does it, in fp32."""
    height, width = x.shape[-2:]
    if mode == "area" and height % size_px == width % size_px == 0:
        squares = x.unflatten(-1, (size_px, width // size_px)).unflatten(-3, (size_px, height // size_px))
        return squares.float().mean((-3, -1)).to(x.dtype)
    with torch.autocast(x.device.type, enabled=False):
        # Averages over areas do not reach across what divides both sides: as many small products as there are parts.
        parts = [_common(side, size_px) if mode == "area" else 1 for side in (height, width)]
        rows, columns = (
            _matrix(side // part, size_px // part, mode, x.device)
            for side, part in zip((height, width), parts, strict=True)
        )
        along = (x.float().unflatten(-1, (parts[1], -1)) @ columns.T).flatten(-2)
        return (rows @ along.unflatten(-2, (parts[0], -1))).flatten(-3, -2).to(x.dtype)


def _common(a: int, b: int) -> int:
    """The largest number that divides both; math.gcd would break a compiled graph."""
    while b:
        a, b = b, a % b
    return a


@lru_cache(maxsize=64)
def _matrix(side: int, size_px: int, mode: str, device: torch.device) -> Tensor:
    """What resampling multiplies a line of `side` values by, (size_px, side) fp32."""
    with torch.inference_mode(False), torch.no_grad():
        lines = torch.eye(side)[None]
        made = (
            F.interpolate(lines, size_px, mode="area")
            if mode == "area"
            else F.interpolate(lines, size_px, mode="linear")
        )
        return made[0].T.contiguous().to(device)


def resize(x: Tensor, size_px: int) -> Tensor:
    """(N,C,H,W) at size_px²: itself, averaged over areas where a side shrinks, or bilinear where both grow."""
    if x.shape[-2:] == (size_px, size_px):
        return x
    return resample(x, size_px, "area" if max(x.shape[-2:]) > size_px else "bilinear")


def resize_square(image: Tensor, size_px: int, owner: str) -> Tensor:
    """Square images (N,3,S,S) at another side, as `resize` makes them; differentiable.

    Raises ValueError, in the name of `owner`, when the image is not square with three channels.
    """
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] != image.shape[3] or not image.shape[3]:
        raise ValueError(
            f"{owner}: image must be (N,3,S,S), got {tuple(image.shape)}; crop an aligned square from the photo"
        )
    return resize(image, size_px)
