# SPDX-License-Identifier: Apache-2.0
"""What a camera and a web site do to a portrait: geometry, light, blur, sensor noise, JPEG. Used to randomise the
domain that the parsers see.

Every function draws from the CPU generator that it is given and from nothing else, and works on the device of its
images: what is drawn is small, but for the sensor's noise, which a device draws itself, seeded from that generator.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.jpeg import jpeg

_FLIP = torch.tensor(CELEBAMASK_HQ.flip_permutation)
_LABEL_FLIP = torch.arange(256).index_copy(0, torch.arange(len(_FLIP)), _FLIP)  # values that are no class stay
_LUMA = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)


def _uniform(count: int, low: float, high: float, generator: torch.Generator, *shape: int) -> Tensor:
    return low + (high - low) * torch.rand(count, *shape, generator=generator)


def random_warp(
    count: int,
    size_px: int,
    generator: torch.Generator,
    strength: float = 1.0,
    device: torch.device | str = "cpu",
) -> Tensor:
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
    return F.affine_grid(theta.to(device), [count, 1, size_px, size_px], align_corners=False)


def flare(count: int, size_px: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Sampling grids N×S×S×2 that pull what hangs down beside the face outwards, further down further: drawn hair falls
    straight, hair on photos lies on the shoulders. Half of the grids change nothing; the others up to 0.8 of a place's
    distance from the middle at the lower edge."""
    strength = _uniform(count, 0.0, 0.8, generator) * (torch.rand(count, generator=generator) < 0.5)
    line = torch.linspace(-1, 1, size_px, device=device) * (1 - 1 / size_px)
    depth = ((line - 0.3) / 0.7).clamp(0, 1)[None, :, None]
    beside = ((line.abs() - 0.28) / 0.3).clamp(0, 1)[None, None, :]
    x = line[None, None, :] / (1 + strength.to(device)[:, None, None] * depth * beside)
    return torch.stack([x, line[None, :, None].expand_as(x)], -1)


def warp_image(image: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(image, grid, padding_mode="border", align_corners=False)


def warp_labels(labels: Tensor, grid: Tensor) -> Tensor:
    """Nearest-neighbour warp of an int64 label map N×S×S."""
    moved = F.grid_sample(labels[:, None].float(), grid, mode="nearest", padding_mode="border", align_corners=False)
    return moved[:, 0].round().long()


def flip_some(image: Tensor, generator: torch.Generator, *maps: Tensor) -> tuple[Tensor, ...]:
    """Mirror half of the samples, left and right classes exchanged. `maps` are N×S×S int64 or N×19×S×S soft."""
    chosen = (torch.rand(image.shape[0], generator=generator) < 0.5).to(image.device).view(-1, 1, 1)
    flipped = [torch.where(chosen[..., None], image.flip(-1), image)]
    for one in maps:
        mirrored = one.flip(-1)
        if one.dim() == 3:
            flipped.append(torch.where(chosen, _LABEL_FLIP.to(one.device)[mirrored], one))
        else:
            flipped.append(torch.where(chosen[..., None], mirrored[:, _FLIP.to(one.device)], one))
    return tuple(flipped)


def smooth_field(
    count: int,
    cells: int,
    size_px: int,
    generator: torch.Generator,
    channels: int = 1,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Low-frequency noise N×channels×S×S in about [-1, 1]."""
    coarse = torch.randn(count, channels, cells, cells, generator=generator).to(device) * 0.5
    return F.interpolate(coarse, size=(size_px, size_px), mode="bicubic", align_corners=False)


def recolour_regions(image: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Move the colour of hair and ground (each with probability 0.3), keeping texture; image N×3×S×S in [0,1]."""
    count, _, size, _ = image.shape
    place = image.device
    for name, probability in (("hair", 0.3), ("background", 0.45), ("cloth", 0.3)):
        chosen = torch.rand(count, generator=generator) < probability
        target = _uniform(count, 0.0, 0.9, generator, 3, 1, 1) * _uniform(count, 0.1, 1.0, generator, 1, 1, 1)
        target, keep = target.to(place), _uniform(count, 0.2, 1.2, generator, 1, 1, 1).to(place)
        pattern = smooth_field(count, 5, size, generator, 3, place)
        pattern = pattern * _uniform(count, 0.0, 0.35, generator, 1, 1, 1).to(place)
        if name != "background":
            pattern = pattern * 0.3
        if not chosen.any():
            continue
        region = ((labels == CELEBAMASK_HQ.id(name)) & chosen.to(place)[:, None, None])[:, None].float()
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
    place = photos.device
    side = torch.where(torch.rand(count, generator=generator) < 0.5, -1.0, 1.0).to(place)
    line = torch.linspace(-1, 1, size, device=place)
    turn = (torch.rand(count, generator=generator) < 0.35).to(place)
    across = torch.where(turn[:, None, None], line[None, :, None], line[None, None, :]).expand(count, size, size)
    down = torch.where(turn[:, None, None], line[None, None, :], line[None, :, None]).expand(count, size, size)
    zoom = _uniform(count, 0.6, 3.5, generator, 1, 1).to(place)
    phase = _uniform(count, 0, 4, generator, 2, 1, 1).to(place)

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
    """Light, tone, blur, JPEG and noise on N×3×S×S in [0,1]; `grey_share` of the pictures lose their colours."""
    count, _, size, _ = image.shape
    place = image.device

    def some(probability: float) -> Tensor:
        return (torch.rand(count, 1, 1, 1, generator=generator) < probability).float().to(place)

    def each(low: float, high: float, channels: int = 1) -> Tensor:
        return _uniform(count, low, high, generator, channels, 1, 1).to(place)

    image = image * (1 + some(0.6) * smooth_field(count, 3, size, generator, device=place) * each(0.1, 0.5))
    image = image.clamp(1e-4, 1) ** torch.exp(each(-0.5, 0.5)) * each(0.75, 1.25) * each(0.88, 1.12, 3)
    grey = (image * _LUMA.to(place)).sum(1, keepdim=True)
    image = grey + (1 - some(grey_share)) * each(0.4, 1.5) * (image - grey)
    mean = image.mean((1, 2, 3), keepdim=True)
    image = _camera((mean + each(0.7, 1.3) * (image - mean)).clamp(0, 1), generator)
    return (image + _noise(image, generator) * some(0.5) * each(0, 0.05)).clamp(0, 1)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    """Normal values, drawn where they are needed: on a GPU by its own generator, seeded from the CPU's."""
    if like.device.type == "cpu":
        return torch.randn(like.shape, generator=generator)
    seed = int(torch.randint(2**62, (), generator=generator))
    own = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(like.shape, generator=own, device=like.device)


def _camera(image: Tensor, generator: torch.Generator) -> Tensor:
    """Blur by resampling (faces in web photos are often 40–120 px), lens blur, JPEG; each on some of N×3×S×S."""
    count, _, size, _ = image.shape
    draw = torch.rand(count, 5, generator=generator).tolist()
    sides = [int(size * (0.16 + 0.6 * share)) if chance < 0.5 else size for chance, share, *_ in draw]
    small = [row for row in range(count) if sides[row] < size]
    coded = [row for row in range(count) if draw[row][2] < 0.5]
    blurred = [row for row in range(count) if sides[row] == size and draw[row][4] < 0.25]
    image = (image * 255).round() / 255  # a camera gives whole levels, and what differs by rounding is the same again
    for row in small:  # in the upper left corner, so that all are coded at once
        share = _area_shares(size, sides[row], image.device)
        one = share @ image[row : row + 1] @ share.T
        image[row] = F.pad(one, (0, size - sides[row]) * 2, mode="replicate")[0]
    if coded:
        quality = torch.tensor([int(25 + 70 * draw[row][3]) for row in coded], device=image.device)
        rows = torch.tensor(coded, device=image.device)
        image[rows] = jpeg(image[rows], quality)
    for row in small:
        one = image[row : row + 1, :, : sides[row], : sides[row]]
        image[row] = F.interpolate(one, (size, size), mode="bicubic" if draw[row][4] < 0.7 else "bilinear")[0]
    if blurred:
        rows = torch.tensor(blurred, device=image.device)
        image[rows] = _lens_blur(image[rows], torch.tensor([0.5 + 6 * draw[row][4] for row in blurred]))
    return image.clamp(0, 1)


def _area_shares(size: int, side: int, device: torch.device) -> Tensor:
    """How much of each of `side` wider pixels each of `size` pixels covers, side×size: averaging by area."""
    edges = torch.arange(side + 1, device=device) * (size / side)
    pixels = torch.arange(size, device=device)
    overlap = torch.minimum(edges[1:, None], pixels + 1) - torch.maximum(edges[:-1, None], pixels)
    return overlap.clamp(min=0) * (side / size)


def _lens_blur(image: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian blur of images N×3×S×S, sigma (N, on the CPU) in pixels, cut off at three of the largest."""
    count, channels, height, width = image.shape
    reach = int(3 * float(sigma.max()) + 0.5)
    taps = torch.exp(-((torch.arange(-reach, reach + 1) / sigma[:, None]) ** 2) / 2)
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(channels, 0).to(image)
    planes = F.pad(image, (reach,) * 4, mode="reflect").reshape(
        1, count * channels, height + 2 * reach, width + 2 * reach
    )
    planes = F.conv2d(planes, taps[:, None, :, None], groups=count * channels)
    return F.conv2d(planes, taps[:, None, None, :], groups=count * channels).view(image.shape)


def occlude(
    image: Tensor, labels: Tensor, generator: torch.Generator, probability: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Cover a random ellipse with another sample's pixels and call it background: hands, microphones, other heads."""
    count, _, size, _ = image.shape
    place = image.device
    line = torch.linspace(-1, 1, size, device=place)
    centre = _uniform(count, -0.9, 0.9, generator, 2).to(place)
    radii = _uniform(count, 0.08, 0.3, generator, 2).to(place)
    inside = ((line[None, None, :] - centre[:, 0, None, None]) / radii[:, 0, None, None]) ** 2
    inside = inside + ((line[None, :, None] - centre[:, 1, None, None]) / radii[:, 1, None, None]) ** 2 < 1
    inside = inside & (torch.rand(count, generator=generator) < probability).to(place)[:, None, None]
    colour = _uniform(count, 0, 0.9, generator, 3, 1, 1).to(place) + 0.2 * smooth_field(
        count, 6, size, generator, 3, place
    )
    image = torch.where(inside[:, None], colour.clamp(0, 1), image)
    return image, torch.where(inside, 0, labels)
