# SPDX-License-Identifier: Apache-2.0
"""What a camera and a web site do to a portrait: geometry, light, blur, sensor noise, JPEG. Used to randomise the
domain that
the parser sees; every function draws from the generator it is given and from nothing else."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from faceedit.labels import CELEBAMASK_HQ

_FLIP = torch.tensor(CELEBAMASK_HQ.flip_permutation)
_LABEL_FLIP = torch.arange(256).index_copy(0, torch.arange(len(_FLIP)), _FLIP)  # values that are no class stay
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


def _uniform(count: int, low: float, high: float, generator: torch.Generator, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(count, *shape, generator=generator)


def random_warp(count: int, size_px: int, generator: torch.Generator, strength: float = 1.0) -> Tensor:
    """Sampling grids N×S×S×2 of random similarity transforms with a little shear, for `grid_sample`.

    At strength 1: rotation σ 9°, scale 0.78–1.28, shift ±0.12 of the half-width, aspect ±6 %.
    """
    angle = torch.randn(count, generator=generator).clamp(-2.5, 2.5) * 0.16 * strength
    scale = torch.exp(_uniform(count, -0.25, 0.25, generator) * strength)
    aspect = torch.exp(_uniform(count, -0.06, 0.06, generator) * strength)
    shift = _uniform(count, -0.12, 0.12, generator, 2) * strength
    shear = _uniform(count, -0.06, 0.06, generator) * strength
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    theta = torch.stack(
        [torch.stack([cos * aspect, -sin + shear, shift[:, 0]], -1), torch.stack([sin, cos / aspect, shift[:, 1]], -1)],
        1,
    )
    return F.affine_grid(theta, [count, 1, size_px, size_px], align_corners=False)


def warp_image(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


def warp_labels(labels: Tensor, grid: Tensor) -> Tensor:
    """Nearest-neighbour warp of an int64 label map N×S×S."""
    moved = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return moved[:, 0].round().long()


def flip_some(image: Tensor, generator: torch.Generator, *maps: Tensor) -> tuple[Tensor, ...]:
    """Mirror half of the samples, left and right classes exchanged. `maps` are N×S×S int64 or N×19×S×S soft."""
    chosen = torch.rand(image.shape[0], generator=generator) < 0.5
    flipped = [image.clone(), *(one.clone() for one in maps)]
    flipped[0][chosen] = image[chosen].flip(-1)
    for one in flipped[1:]:
        mirrored = one[chosen].flip(-1)
        one[chosen] = _LABEL_FLIP[mirrored] if one.dim() == 3 else mirrored[:, _FLIP]
    return tuple(flipped)


def smooth_field(count: int, cells: int, size_px: int, generator: torch.Generator, channels: int = 1) -> Tensor:
    """Low-frequency noise N×channels×S×S in about [-1, 1]."""
    coarse = torch.randn(count, channels, cells, cells, generator=generator) * 0.5
    return F.interpolate(coarse, size=(size_px, size_px), mode="bicubic", align_corners=False)


def recolour_regions(image: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Move the colour of hair and ground (each with probability 0.3), keeping texture; image N×3×S×S in [0,1]."""
    count, _, size, _ = image.shape
    for name, probability in (("hair", 0.3), ("background", 0.45), ("cloth", 0.3)):
        chosen = torch.rand(count, generator=generator) < probability
        target = _uniform(count, 0.0, 0.9, generator, 3, 1, 1) * _uniform(count, 0.1, 1.0, generator, 1, 1, 1)
        keep = _uniform(count, 0.2, 1.2, generator, 1, 1, 1)
        pattern = smooth_field(count, 5, size, generator, 3) * _uniform(count, 0.0, 0.35, generator, 1, 1, 1)
        if name != "background":
            pattern = pattern * 0.3
        if not chosen.any():
            continue
        region = ((labels == CELEBAMASK_HQ.id(name)) & chosen[:, None, None])[:, None].float()
        region = F.avg_pool2d(F.pad(region, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        area = region.sum((2, 3), keepdim=True).clamp(min=1)
        mean = (image * region).sum((2, 3), keepdim=True) / area
        image = image + region * ((image - mean) * keep + target + pattern - image)
    return image.clamp(0, 1)


def backdrops(photos: Tensor, generator: torch.Generator) -> Tensor:
    """Backgrounds N×3×S×S cut from portrait crops N×3×S×S: an upper corner, beside the head, tiled by mirroring.

    Flags, shelves and picture frames are what a parser that grew up on drawn backgrounds takes for hair.
    """
    count, _, size, _ = photos.shape
    side = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0)
    line = torch.linspace(-1, 1, size)
    turn = torch.rand(count, generator=generator) < 0.35
    across = torch.where(turn[:, None, None], line[None, :, None], line[None, None, :]).expand(count, size, size)
    down = torch.where(turn[:, None, None], line[None, None, :], line[None, :, None]).expand(count, size, size)
    zoom, phase = _uniform(count, 0.6, 3.5, generator, 1, 1), _uniform(count, 0, 4, generator, 2, 1, 1)

    def folded(value: Tensor) -> Tensor:
        return (torch.remainder(value, 2) - 1).abs()  # a triangle wave in [0, 1]

    x = (1 - 0.36 * folded(across * zoom + phase[:, 0])) * side[:, None, None]
    y = -1 + 1.1 * folded(down * zoom * 0.4 + phase[:, 1])
    return F.grid_sample(photos, torch.stack([x, y], -1), padding_mode="border", align_corners=False)


def replace_background(image: Tensor, labels: Tensor, ground: Tensor, chosen: Tensor) -> Tensor:
    """`ground` wherever the label is background, in the `chosen` samples; edges stay antialiased."""
    region = ((labels == CELEBAMASK_HQ.id("background")) & chosen[:, None, None])[:, None].float()
    region = F.avg_pool2d(F.pad(region, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return image + region * (ground - image)


def photograph(image: Tensor, generator: torch.Generator, grey_share: float = 0.2) -> Tensor:
    """Light, tone, blur, noise and JPEG on N×3×S×S in [0,1]; `grey_share` of the pictures lose their colours."""
    count, _, size, _ = image.shape

    def some(probability: float) -> Tensor:
        return (torch.rand(count, 1, 1, 1, generator=generator) < probability).float()

    lamp = 1 + some(0.6) * smooth_field(count, 3, size, generator) * _uniform(count, 0.1, 0.5, generator, 1, 1, 1)
    image = (image * lamp).clamp(1e-4, 1)
    image = image ** torch.exp(_uniform(count, -0.5, 0.5, generator, 1, 1, 1))
    image = image * _uniform(count, 0.75, 1.25, generator, 1, 1, 1) * _uniform(count, 0.88, 1.12, generator, 3, 1, 1)
    grey = (image * _LUMA).sum(1, keepdim=True)
    saturation = torch.where(some(grey_share) > 0, torch.zeros(()), _uniform(count, 0.4, 1.5, generator, 1, 1, 1))
    image = grey + saturation * (image - grey)
    mean = image.mean((1, 2, 3), keepdim=True)
    image = (mean + _uniform(count, 0.7, 1.3, generator, 1, 1, 1) * (image - mean)).clamp(0, 1)
    pixels = (image.permute(0, 2, 3, 1).numpy() * 255).astype(np.uint8)
    choice = torch.rand(count, 5, generator=generator).numpy()
    out = np.stack([_camera(sample, draw) for sample, draw in zip(pixels, choice, strict=True)])
    image = torch.from_numpy(out).permute(0, 3, 1, 2).float() / 255
    noise = (
        torch.randn(count, 3, size, size, generator=generator)
        * some(0.5)
        * _uniform(count, 0, 0.05, generator, 1, 1, 1)
    )
    return (image + noise).clamp(0, 1)


def _camera(pixels: NDArray[Any], draw: NDArray[Any]) -> NDArray[Any]:
    """Blur by resampling (faces in web photos are often 40–120 px), lens blur, then JPEG, each some of the time."""
    size = pixels.shape[0]
    if draw[0] < 0.5:
        small = int(size * (0.16 + 0.6 * draw[1]))
        pixels = cv2.resize(pixels, (small, small), interpolation=cv2.INTER_AREA)
    if draw[2] < 0.5:
        quality = int(25 + 70 * draw[3])
        coded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
        pixels = np.asarray(cv2.imdecode(coded, cv2.IMREAD_COLOR))
    if pixels.shape[0] != size:
        pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_CUBIC if draw[4] < 0.7 else cv2.INTER_LINEAR)
    elif draw[4] < 0.25:
        pixels = cv2.GaussianBlur(pixels, (0, 0), 0.5 + 6 * draw[4])
    return pixels


def occlude(
    image: Tensor, labels: Tensor, generator: torch.Generator, probability: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Cover a random ellipse with another sample's pixels and call it background: hands, microphones, other heads."""
    count, _, size, _ = image.shape
    line = torch.linspace(-1, 1, size)
    centre, radii = _uniform(count, -0.9, 0.9, generator, 2), _uniform(count, 0.08, 0.3, generator, 2)
    inside = ((line[None, None, :] - centre[:, 0, None, None]) / radii[:, 0, None, None]) ** 2
    inside = inside + ((line[None, :, None] - centre[:, 1, None, None]) / radii[:, 1, None, None]) ** 2 < 1
    inside = inside & (torch.rand(count, generator=generator) < probability)[:, None, None]
    colour = _uniform(count, 0, 0.9, generator, 3, 1, 1) + 0.2 * smooth_field(count, 6, size, generator, 3)
    image = torch.where(inside[:, None], colour.clamp(0, 1), image)
    return image, torch.where(inside, torch.zeros((), dtype=labels.dtype), labels)
