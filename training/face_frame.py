# SPDX-License-Identifier: Apache-2.0
"""Where the parts of one photo's face lie, by its soft mask, in coordinates that follow the line of its eyes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ

LIPS = ("u_lip", "mouth", "l_lip")
LUMINANCE = (0.2126, 0.7152, 0.0722)
"""Of red, green and blue: Rec. 709."""


def share_of(mask: Tensor, *parts: str) -> Tensor:
    """Of every pixel N×S×S, how much these parts of a mask N×19×S×S are."""
    return mask[:, [CELEBAMASK_HQ.id(part) for part in parts]].sum(1)


def centre(weight: Tensor) -> tuple[float, float]:
    """Of a weight 1×S×S: x and y in [-1, 1]."""
    axis = (torch.arange(weight.shape[-1], dtype=weight.dtype) + 0.5) / weight.shape[-1] * 2 - 1
    total = weight.sum().clamp_min(1e-6)
    return float((weight.sum((0, 1)) * axis).sum() / total), float((weight.sum((0, 2)) * axis).sum() / total)


def eye_line(mask: Tensor) -> Tensor:
    """The direction of the line of the eyes, to the right: x and y of length 1."""
    left, right = centre(share_of(mask, "l_eye")), centre(share_of(mask, "r_eye"))
    along = torch.tensor([right[0] - left[0], right[1] - left[1]])
    return F.normalize(along * (1 if along[0] >= 0 else -1), dim=0)


def along_the_eyes(mask: Tensor, origin: tuple[float, float]) -> tuple[Tensor, Tensor]:
    """Coordinates 1×S×S from the origin, along the line of the eyes and down across it; the side is 2 long."""
    along = eye_line(mask)
    axis = (torch.arange(mask.shape[-1]) + 0.5) / mask.shape[-1] * 2 - 1
    x, y = axis[None, None, :] - origin[0], axis[None, :, None] - origin[1]
    return x * along[0] + y * along[1], y * along[0] - x * along[1]


def spread(position: Tensor, weight: Tensor) -> float:
    """The standard deviation of positions 1×S×S by weight."""
    total = weight.sum().clamp_min(1e-6)
    mean = (position * weight).sum() / total
    return float(((position - mean).square() * weight).sum().div(total).sqrt().clamp_min(1e-3))


def quantile(position: Tensor, weight: Tensor, share: float) -> float:
    """The position 1×S×S below which this share of the weight lies."""
    shown = weight.flatten() > 1e-3
    if not shown.any():
        return float(position.mean())
    ordered, order = position.flatten()[shown].sort()
    reached = weight.flatten()[shown][order].cumsum(0)
    return float(ordered[int((reached < share * reached[-1]).sum().clamp(max=len(order) - 1))])


def edge(weight: Tensor, u: Tensor, down: Tensor, share: float) -> Tensor:
    """Where the share of every column's weight lies, between -1 and 1 of `u`: a parabola through them, 1×S×S."""
    bins = 12
    column = ((u + 1) / 2 * bins).floor()
    places, values = [], []
    for at in range(bins):
        chosen = weight * (column == at)
        if chosen.sum() > 0.5:
            places.append((at + 0.5) / bins * 2 - 1)
            values.append(quantile(down, chosen, share))
    if not places:
        return torch.full_like(u, quantile(down, weight, share))
    powers = torch.tensor(places)[:, None] ** torch.arange(min(3, len(places)))
    factors = torch.linalg.lstsq(powers, torch.tensor(values)[:, None]).solution[:, 0]
    u = u.clamp(-1.1, 1.1)
    return torch.stack([factor * u**power for power, factor in enumerate(factors)]).sum(0)


def mean_colour(light: Tensor, weight: Tensor) -> Tensor:
    """1×3×1×1, of an image 1×3×S×S by a weight 1×S×S."""
    return (light * weight[:, None]).sum((2, 3), keepdim=True) / weight.sum().clamp_min(1e-6)


def luminance_of(light: Tensor, weight: Tensor) -> float:
    """Of the mean colour of an image 1×3×S×S by a weight 1×S×S."""
    return float((mean_colour(light, weight)[0, :, 0, 0] * torch.tensor(LUMINANCE)).sum())
