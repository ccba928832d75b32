# SPDX-License-Identifier: Apache-2.0
"""Images of any size as the one size that a network works at."""

from torch import Tensor
from torch.nn import functional as F


def resize_square(image: Tensor, size_px: int, owner: str) -> Tensor:
    """Square images (N,3,S,S) at another side: area average downwards, bilinear upwards; differentiable.

    Raises ValueError, in the name of `owner`, when the image is not square with three channels.
    """
    if image.ndim != 4 or image.shape[1] != 3 or image.shape[2] != image.shape[3] or not image.shape[3]:
        raise ValueError(
            f"{owner}: image must be (N,3,S,S), got {tuple(image.shape)}; crop an aligned square from the photo"
        )
    side = image.shape[-1]
    if side == size_px:
        return image
    if side > size_px:
        return F.interpolate(image, (size_px, size_px), mode="area")
    return F.interpolate(image, (size_px, size_px), mode="bilinear", align_corners=False)
