# SPDX-License-Identifier: Apache-2.0
"""A photo whose hair is gone: a scalp in the colour of its forehead, and behind it what is beside the hair.

What a head looks like under its hair no photo tells; this one scalp and this smooth ground can be told from the photo
alone, so that an editor learns to draw them whole. The hair of other photos, put on bald heads, left it undecided.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.face_frame import along_the_eyes, centre, quantile, share_of

_TOP = 0.94  # from the eyes to the top of a skull, of the way to the chin
_ROUND = 2.4  # exponent of the skull's outline: 2 is an ellipse
_RIM, _GLOSS = 0.3, 0.06  # how much darker at its outline and lighter where the light falls
_GROUND = ("background", "cloth", "neck", "neck_l")


def bare_scalp(photo: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The photo without hair, and its mask.

    Args:    photo 1×3×S×S in [-1, 1], mask 1×19×S×S that shows hair, the eyes, the brows and skin.
    Returns: image 1×3×S×S in [-1, 1], mask 1×19×S×S.
    """
    light = ((photo + 1) / 2).clamp(0, 1)
    left, right = centre(share_of(mask, "l_eye")), centre(share_of(mask, "r_eye"))
    across, down = along_the_eyes(mask, ((left[0] + right[0]) / 2, (left[1] + right[1]) / 2))
    skin = share_of(mask, "skin")
    apart = ((right[0] - left[0]) ** 2 + (right[1] - left[1]) ** 2) ** 0.5
    chin = max(quantile(down, skin * (across.abs() < 0.3 * apart) * (down > 0), 0.98), 1.2 * apart)
    face = skin * (down > -0.2 * apart) * (down < 0.6 * apart)
    sides = (quantile(across, face, 0.02), quantile(across, face, 0.98))
    middle, half = (sides[0] + sides[1]) / 2, max((sides[1] - sides[0]) / 2, 1.0 * apart) * 1.06
    pixel = 2 / photo.shape[-1]
    height = torch.where(down < 0, _TOP * chin, 1.1 * chin)
    radius = (((across - middle) / half).abs() ** _ROUND + (down / height).abs() ** _ROUND) ** (1 / _ROUND)
    inside = ((1 - radius) * half / (1.5 * pixel) + 0.5).clamp(0, 1)[:, None]

    hair = share_of(mask, "hair")[:, None]
    # With the rim, where hair and ground mix, and what shows of the forehead between strands.
    near, far = ((F.max_pool2d(hair, size, 1, size // 2) * 3).clamp(0, 1) for size in (5, 11))
    gone = torch.where((down < -0.45 * apart)[:, None] & (skin[:, None] > 0.5), far, near)
    gone = F.avg_pool2d(gone, 3, 1, 1, count_include_pad=False)
    spared = share_of(mask, "l_brow", "r_brow", "l_eye", "r_eye", "nose", "eye_g", "u_lip", "mouth", "l_lip", "hat")
    gone = gone * (1 - spared[:, None]).clamp(0, 1)
    away = (F.max_pool2d(hair, 7, 1, 3) < 0.1).float()
    bare = _filled(light, (skin - 0.5).clamp_min(0)[:, None] * away * (down < 0.3 * apart)[:, None])
    shade = 1 - _RIM * ((radius - 0.6) / 0.45).clamp(0, 1).square()
    lit = ((across - middle).square() + (down + 0.7 * height).square()) / (0.5 * half) ** 2
    shade = shade + _GLOSS * torch.exp(-lit)
    scalp = (bare * shade[:, None]).clamp(0, 1)
    ground_share = share_of(mask, *_GROUND)[:, None] * away
    ground = _filled(light, ground_share)
    made = torch.lerp(light, torch.lerp(ground, scalp, inside), gone)

    parts = [CELEBAMASK_HQ.id(part) for part in _GROUND]
    behind = torch.zeros_like(mask)
    behind[:, parts] = _filled(mask[:, parts], ground_share)
    bald = torch.zeros_like(mask)
    bald[:, CELEBAMASK_HQ.id("skin")] = 1
    made_mask = torch.lerp(mask, torch.lerp(behind / behind.sum(1, keepdim=True).clamp_min(1e-6), bald, inside), gone)
    return made * 2 - 1, made_mask


def _filled(image: Tensor, weight: Tensor) -> Tensor:
    """1×C×S×S: the image where the weight 1×1×S×S is, and between and around it what is near, ever coarser."""
    levels = [(image * weight, weight)]
    while min(levels[-1][1].shape[2:]) > 2:
        colour, total = levels[-1]
        levels.append((F.avg_pool2d(colour, 2, ceil_mode=True), F.avg_pool2d(total, 2, ceil_mode=True)))
    colour, total = levels[-1]
    filled = (colour.mean((2, 3), keepdim=True) / total.mean((2, 3), keepdim=True).clamp_min(1e-6)).expand_as(colour)
    for colour, total in reversed(levels):
        filled = F.interpolate(filled, size=colour.shape[2:], mode="bilinear", align_corners=False)
        known = (total * 4).clamp(0, 1)
        filled = torch.lerp(filled, colour / total.clamp_min(1e-6), known)
    return filled
