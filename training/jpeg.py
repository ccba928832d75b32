# SPDX-License-Identifier: Apache-2.0
"""What JPEG coding loses, on batches and on any device: a GPU that trains need not wait for a CPU that codes."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# ITU-T T.81, tables K.1 (luminance) and K.2 (chrominance).
LUMINANCE = [
    [16, 11, 10, 16, 24, 40, 51, 61],
    [12, 12, 14, 19, 26, 58, 60, 55],
    [14, 13, 16, 24, 40, 57, 69, 56],
    [14, 17, 22, 29, 51, 87, 80, 62],
    [18, 22, 37, 56, 68, 109, 103, 77],
    [24, 35, 55, 64, 81, 104, 113, 92],
    [49, 64, 78, 87, 103, 121, 120, 101],
    [72, 92, 95, 98, 112, 100, 103, 99],
]
CHROMINANCE = [
    [17, 18, 24, 47, 99, 99, 99, 99],
    [18, 21, 26, 66, 99, 99, 99, 99],
    [24, 26, 56, 99, 99, 99, 99, 99],
    [47, 66, 99, 99, 99, 99, 99, 99],
    *[[99] * 8] * 4,
]
# ITU-R BT.601 at full range, as in JFIF: rows Y, Cb, Cr of columns R, G, B.
_YCBCR = [[0.299, 0.587, 0.114], [-0.168736, -0.331264, 0.5], [0.5, -0.418688, -0.081312]]
_RGB = [[1.0, 0.0, 1.402], [1.0, -0.344136, -0.714136], [1.0, 1.772, 0.0]]
_DCT = [
    [math.cos((2 * place + 1) * wave * math.pi / 16) * (math.sqrt(1 / 8) if wave == 0 else 0.5) for place in range(8)]
    for wave in range(8)
]


def jpeg(image: Tensor, quality: Tensor) -> Tensor:
    """Images as baseline JPEG with halved chroma gives them back, without coding anything.

    Args:    image N×3×H×W in [0, 1]; quality N, 1 to 100 as libjpeg counts it (IJG's scaling of T.81's tables).
    Returns: N×3×H×W in [0, 1], of 256 levels. Not differentiable: what is rounded has no slope.
    """
    height, width = image.shape[-2:]
    edges = (0, -width % 16, 0, -height % 16)
    planes = torch.einsum("ij,njhw->nihw", image.new_tensor(_YCBCR), F.pad(image, edges, mode="replicate") * 255)
    scale = scale_of(quality.to(image)).view(-1, 1, 1, 1)
    luma = _coded(planes[:, :1] - 128, image.new_tensor(LUMINANCE), scale) + 128
    chroma = _coded(F.avg_pool2d(planes[:, 1:], 2), image.new_tensor(CHROMINANCE), scale)
    chroma = F.interpolate(chroma, scale_factor=2.0, mode="bilinear", align_corners=False)
    pixels = torch.einsum("ij,njhw->nihw", image.new_tensor(_RGB), torch.cat([luma, chroma], 1))
    return pixels[..., :height, :width].round().clamp(0, 255) / 255


def scaled_table(table: Tensor, scale: Tensor) -> Tensor:
    """Quantisation steps of a table 8×8 at scales N×1×1×1 in percent, N×1×8×8."""
    return ((table * scale + 50) / 100).floor().clamp(1, 255)


def scale_of(quality: Tensor) -> Tensor:
    """Percent of T.81's tables for IJG's qualities 1 to 100, whole numbers as libjpeg has them."""
    return torch.where(quality < 50, (5000 / quality).floor(), 200 - 2 * quality)


def _coded(planes: Tensor, table: Tensor, scale: Tensor) -> Tensor:
    """Planes N×C×H×W of 8×8 blocks, transformed, rounded to multiples of the scaled table, and transformed back."""
    count, channels, height, width = planes.shape
    dct = planes.new_tensor(_DCT)
    both = torch.kron(dct, dct)  # one product of 64 × 64; two of 8 × 8 a block take a CPU far longer
    step = scaled_table(table, scale).view(count, 1, 1, 1, 64)
    blocks = planes.view(count, channels, height // 8, 8, width // 8, 8).transpose(3, 4)
    waves = blocks.reshape(*blocks.shape[:4], 64) @ both.T
    waves = (waves / step).round() * step
    return (waves @ both).view(blocks.shape).transpose(3, 4).reshape(planes.shape)
