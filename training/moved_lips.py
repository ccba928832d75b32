# SPDX-License-Identifier: Apache-2.0
"""A photo with its own closed mouth opened, or its open one closed: the lips move along its mask, the rest gives way.

An opened mouth shows one typical row of teeth, since a photo of closed lips does not tell what is behind them. Mouths
of other photos would differ from one another in all that an editor cannot know, and it would learn their mean.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.face_frame import (
    LIPS,
    LUMINANCE,
    along_the_eyes,
    centre,
    edge,
    eye_line,
    mean_colour,
    quantile,
    share_of,
)

# In halves of the mouth's width, about as the 698 open mouths among a thousand official portraits: a third.
_OPENING = 0.34
_UPWARDS = 0.2  # share of the opening by which the upper lip moves; the lower lip and the jaw move by the rest
_TEETH, _INSIDE = 1.3, 0.3  # luminance, of the skin's
_TEETH_TINT, _INSIDE_TINT = 0.3, 1.6  # power of the skin's ratios of colours
_ROW = 0.8  # share of the opening that the teeth fill
_BETWEEN = ((0.0, 0.14), (0.27, 0.1), (0.5, 0.1), (0.69, 0.1))  # teeth: where, and how dark


class _Mouth(NamedTuple):
    """Of one mask: across and down of every pixel 1×S×S, across in halves of the mouth's width from its middle; half
    in [-1, 1] of the image; and, below the line between the lips, how far nose and chin are."""

    across: Tensor
    down: Tensor
    half: float
    nose: float
    chin: float


def open_mouth(photo: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The photo with parted lips and a row of teeth between them, and its mask.

    Args:    photo 1×3×S×S in [-1, 1], mask 1×19×S×S that shows the eyes, the nose, skin and closed lips.
    Returns: image 1×3×S×S in [-1, 1], mask 1×19×S×S.
    """
    light = ((photo + 1) / 2).clamp(0, 1)
    face = _mouth_of(mask)
    u = face.across
    line = (edge(share_of(mask, "u_lip"), u, face.down, 0.9) + edge(share_of(mask, "l_lip"), u, face.down, 0.1)) / 2
    below = face.down - line
    gap = _OPENING * face.half * (1 - u.square()).clamp_min(0) ** 0.75
    up, low = _UPWARDS * gap, (1 - _UPWARDS) * gap
    # The lips move as they are; the skin between them and the nose or the chin gives way evenly.
    middle = (low - up) / 2
    above = below < middle
    shift = torch.where(
        above,
        up * _fading(-below, up + _thickness(mask, face, line, upper=True), face.nose),
        -low * _fading(below, low + _thickness(mask, face, line, upper=False), face.chin),
    )
    made, made_mask = _shifted(light, mask, shift), _shifted(mask, mask, shift, mode="bilinear")  # shares sum to 1
    pixel = 2 / photo.shape[-1]
    inside = (torch.minimum(below + up, low - below) / (1.5 * pixel) + 0.5).clamp(0, 1) * (gap > 0.5 * pixel)
    inside = inside[:, None]
    made = torch.lerp(made, _teeth(light, mask, face, (below + up) / gap.clamp_min(pixel)), inside)
    between = torch.zeros_like(mask)
    between[:, CELEBAMASK_HQ.id("mouth")] = 1
    return made * 2 - 1, torch.lerp(made_mask, between, inside)


def close_mouth(photo: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The photo with its lips together, and its mask.

    Args:    photo 1×3×S×S in [-1, 1], mask 1×19×S×S that shows the eyes, the nose, skin and parted lips.
    Returns: image 1×3×S×S in [-1, 1], mask 1×19×S×S.
    """
    light = ((photo + 1) / 2).clamp(0, 1)
    face = _mouth_of(mask)
    u, pixel = face.across, 2 / photo.shape[-1]
    between = share_of(mask, "mouth")
    # A little over the rim, where lips and teeth mix.
    top, bottom = edge(between, u, face.down, 0.03) - pixel / 2, edge(between, u, face.down, 0.97) + pixel / 2
    gap = (bottom - top).clamp_min(0) * ((1.1 - u.abs()) / 0.1).clamp(0, 1)
    line = top + _UPWARDS * gap
    below = face.down - line
    above = below < 0
    # Lips that close are no longer stretched: they take up some of the gap.
    up, fuller_up = _UPWARDS * gap, 0.15 * gap
    low, fuller_low = (1 - _UPWARDS) * gap, 0.3 * gap
    upper_lip = _thickness(mask, face, top, upper=True) + fuller_up
    lower_lip = _thickness(mask, face, line + low, upper=False) + fuller_low
    shift = torch.where(
        above,
        -((up - fuller_up) * _fading(-below, upper_lip, face.nose) + fuller_up * (1 + below / upper_lip).clamp(0, 1)),
        (low - fuller_low) * _fading(below, lower_lip, face.chin) + fuller_low * (1 - below / lower_lip).clamp(0, 1),
    )
    made, made_mask = _shifted(light, mask, shift), _shifted(mask, mask, shift, mode="bilinear")  # shares sum to 1
    lips = mean_colour(light, share_of(mask, "u_lip", "l_lip").square())
    seam = (1 - below.abs() / (1.2 * pixel)).clamp(0, 1) * ((0.96 - u.abs()) / 0.15).clamp(0, 1)
    made = torch.lerp(made, lips * 0.5, (0.6 * seam)[:, None])
    upper, gone, lower = (CELEBAMASK_HQ.id(part) for part in LIPS)
    made_mask[:, upper] += made_mask[:, gone] * above
    made_mask[:, lower] += made_mask[:, gone] * ~above
    made_mask[:, gone] = 0
    return made * 2 - 1, made_mask


def _mouth_of(mask: Tensor) -> _Mouth:
    lips = share_of(mask, *LIPS)
    across, down = along_the_eyes(mask, centre(lips))
    left, right = quantile(across, lips, 0.01), quantile(across, lips, 0.99)
    half = max((right - left) / 2, 4 / mask.shape[-1])
    across = (across - (left + right) / 2) / half
    nose = max(-quantile(down, share_of(mask, "nose"), 0.97), 0.3 * half)
    beneath = share_of(mask, "skin") * (across.abs() < 0.5) * (down > 0)
    return _Mouth(across, down, half, nose, max(quantile(down, beneath, 0.97), 0.8 * half))


def _thickness(mask: Tensor, face: _Mouth, line: Tensor, upper: bool) -> Tensor:
    """How far the lips reach above or below a line, 1×S×S."""
    rim = edge(share_of(mask, *LIPS), face.across, face.down, 0.03 if upper else 0.97)
    return ((line - rim) if upper else (rim - line)).clamp_min(2 / mask.shape[-1])


def _fading(distance: Tensor, start: Tensor, end: float) -> Tensor:
    """1 up to `start`, then evenly down to 0 at `end`."""
    return 1 - ((distance - start) / (end - start).clamp_min(0.02)).clamp(0, 1)


def _shifted(x: Tensor, mask: Tensor, down: Tensor, mode: str = "bicubic") -> Tensor:
    """1×C×S×S resampled from this much farther down the face, 1×S×S."""
    along = eye_line(mask)
    axis = (torch.arange(x.shape[-1]) + 0.5) / x.shape[-1] * 2 - 1
    grid = torch.stack([axis[None, None, :] - along[1] * down, axis[None, :, None] + along[0] * down], dim=-1)
    return F.grid_sample(x, grid, mode=mode, padding_mode="border", align_corners=False).clamp(0, 1)


def _teeth(light: Tensor, mask: Tensor, face: _Mouth, depth: Tensor) -> Tensor:
    """1×3×S×S: what shows between the lips, by how deep below the upper lip, 0 to 1."""
    skin = mean_colour(light, share_of(mask, "skin") * (face.across.abs() < 1.5) * (face.down.abs() < face.half))
    brightness = (skin[0, :, 0, 0] * torch.tensor(LUMINANCE)).sum().clamp_min(0.02)
    tint = (skin / brightness).clamp(0.2, 3)
    u = face.across.abs()
    shade = 0.72 + 0.28 * (depth / 0.3).clamp(0, 1)  # of the upper lip
    shade = shade * (1 - 0.75 * ((u - 0.5) / 0.4).clamp(0, 1).square())
    for place, dark in _BETWEEN:
        shade = shade * (1 - dark * (1 - (u - place).abs() / 0.07).clamp(0, 1))
    teeth = _TEETH * brightness * tint**_TEETH_TINT * shade[:, None]
    inside = _INSIDE * brightness * tint**_INSIDE_TINT
    row = _ROW * (1 - 0.3 * u.square())
    return torch.lerp(teeth, inside.expand_as(teeth), ((depth - row) / 0.15 + 0.5).clamp(0, 1)[:, None]).clamp(0, 1)
