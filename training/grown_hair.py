# SPDX-License-Identifier: Apache-2.0
"""A moustache, beard, bangs or bushy brows on a photo, where its mask has the features, in the colour of its own hair.

Nothing but the photo decides where they lie and how they look, so that an editor can learn them from the photo alone.
Of drawn people's, moved to the photo, moustaches and brows were often hardly seen, and bangs ragged and of one colour.
"""

from __future__ import annotations

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
    luminance_of,
    mean_colour,
    quantile,
    share_of,
    spread,
)

_DENSITY = 0.92  # about as drawn moustaches
_STRANDS, _CONTRAST = 60, 0.5  # hairs beside one another, and how much they differ in brightness
_HAIR_SHARE = 0.03  # of the image, below which brows tell the colour
_DARKER = 0.75  # hair of a moustache is this much darker than the mean of the hair it takes its colour from
_REACH, _OVERHANG = 1.22, 0.1  # of bangs: half width in eye distances, and how far they cover the brows
_AGAINST_SKIN = 0.6  # and at most this share of the skin's luminance: a white one would hardly be seen at this size


def grow_moustache(photo: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The photo with a moustache, and its mask, which has no class for one and stays as it is.

    Args:    photo 1×3×S×S in [-1, 1], mask 1×19×S×S that shows the eyes, the nose and the lips.
    Returns: image 1×3×S×S in [-1, 1], mask 1×19×S×S.
    """
    light = ((photo + 1) / 2).clamp(0, 1)
    lips = share_of(mask, *LIPS)
    across, down = along_the_eyes(mask, centre(lips))
    half = 1.7 * spread(across, lips)  # a uniform bar's half length is 1.73 times its deviation
    u = across / half
    top = edge(lips, u.clamp(-0.85, 0.85), down, 0.08)
    lip = float(top.flatten()[(u.square() + (down / half).square()).argmin()])
    gap = max(lip - quantile(down, share_of(mask, "nose"), 0.97), 0.2 * half)
    # From the lip nearly up to the nose, thinner outwards, its ends a little below the corners of the mouth.
    low = top + (0.15 + 0.5 * (u.abs() - 0.8).clamp_min(0)) * gap
    thick = gap * (0.95 - 0.5 * u.abs().clamp(max=1.1) ** 2 - 0.12 * (1 - (u / 0.15) ** 2).clamp_min(0))
    above = (low - down) / thick.clamp_min(1e-3)  # 0 at the lower edge, 1 at the upper one
    strands = _strands(u.abs() + 0.25 * above.clamp(0, 1) - 0.25, u < 0, above)
    pixel = 2 / photo.shape[-1]
    # The lower edge is ragged, the upper one thins out.
    lower = (above + 0.12 * strands) * thick / (1.5 * pixel) + 0.5
    upper = (1.05 - above + 0.12 * strands) / 0.4
    opacity = torch.minimum(torch.minimum(lower, upper), (1.05 - u.abs()) * half / (2 * pixel)).clamp(0, 1)
    where = (share_of(mask, "skin", "u_lip") + 0.5 * share_of(mask, "nose")).clamp(0, 1)
    opacity = (_DENSITY * opacity * where)[:, None]
    made = torch.lerp(light, _strands_in_shade(light, mask, opacity, strands), opacity)
    return made * 2 - 1, mask


def grow_beard(photo: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The photo with a full beard without a moustache, and its mask, which has no class for one and stays as it is.

    Args:    photo 1×3×S×S in [-1, 1], mask 1×19×S×S that shows the eyes, the nose, the lips and skin.
    Returns: image 1×3×S×S in [-1, 1], mask 1×19×S×S.
    """
    light = ((photo + 1) / 2).clamp(0, 1)
    lips, skin_share = share_of(mask, *LIPS), share_of(mask, "skin")
    across, down = along_the_eyes(mask, centre(lips))
    pixel = 2 / photo.shape[-1]
    mouth = 1.7 * spread(across, lips)
    chin = quantile(down, skin_share * (across.abs() < 0.7 * mouth) * (down > 0), 0.98)
    under = quantile(down, lips * (across.abs() < 0.7 * mouth), 0.97)
    height = max(chin - under, 4 * pixel)
    # A turned head shows more of one cheek: 1 is where the face ends beside the mouth, on either side.
    beside = skin_share * (down.abs() < 0.5 * height)
    left, right = (
        max(sign * quantile(across, beside * (sign * across > 0), share), 1.2 * mouth)
        for sign, share in ((-1, 0.03), (1, 0.97))
    )
    u = torch.where(across < 0, across / left, across / right)
    nose = quantile(down, share_of(mask, "nose"), 0.97)
    # Its upper edge runs from below the lip past the corners of the mouth and up to the ears.
    corner = (across.abs() / mouth).clamp(0, 1.25)
    cheek = ((u.abs() - 0.55) / 0.45).clamp(0, 1)
    top = under + 0.3 * height * (1 - corner.square()) - (under - 0.4 * nose) * (corner - 0.75).clamp_min(0) * 2
    top = top - (0.9 * height) * cheek.square()
    low = chin + 0.12 * height
    above = (low - down) / (low - top).clamp_min(2 * pixel)  # 0 below the chin, 1 at the upper edge
    strands = 0.7 * _strands((u.abs() + 0.1 * above.clamp(0, 1)).clamp(0, 1), u < 0, above, curls=9)
    reach = (1.02 + 0.08 * strands - above) * (low - top) / (5 * pixel)
    opacity = reach.clamp(0, 1)
    # A little over the chin's edge, where skin and neck mix.
    face = F.max_pool2d(skin_share[:, None], 5, 1, 2)[:, 0] * share_of(mask, "skin", "neck")
    opacity = opacity * F.avg_pool2d(face[:, None], 3, 1, 1)[:, 0] * (face > 0)
    opacity = (_DENSITY * opacity.clamp(0, 1) * (1 - lips).clamp(0, 1))[:, None]
    made = torch.lerp(light, _strands_in_shade(light, mask, opacity, strands), opacity)
    return made * 2 - 1, mask


def _strands_in_shade(light: Tensor, mask: Tensor, opacity: Tensor, strands: Tensor) -> Tensor:
    """1×3×S×S: hair of the photo's colour where the opacity is, as light and dark as the skin it covers."""
    grey = (light * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)
    skin = luminance_of(light, opacity[:, 0] * share_of(mask, "skin"))
    shade = (F.avg_pool2d(grey, 5, 1, 2, count_include_pad=False) / max(skin, 0.02)).clamp(0.6, 1.3)
    shade = shade * (1 + _CONTRAST * strands[:, None])
    return (_hair_colour(light, mask, skin) * shade).clamp(0, 1)


def grow_bangs(photo: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The photo with hair over the forehead, down to the brows, and its mask.

    Args:    photo 1×3×S×S in [-1, 1], mask 1×19×S×S that shows hair, the eyes and the brows.
    Returns: image 1×3×S×S in [-1, 1], mask 1×19×S×S.
    """
    light = ((photo + 1) / 2).clamp(0, 1)
    brows = share_of(mask, "l_brow", "r_brow")
    across, down = along_the_eyes(mask, centre(brows))
    left, right = centre(share_of(mask, "l_eye")), centre(share_of(mask, "r_eye"))
    half = _REACH * ((right[0] - left[0]) ** 2 + (right[1] - left[1]) ** 2) ** 0.5
    u = across / half
    brow_top = quantile(down, brows, 0.1)
    hair = share_of(mask, "hair")
    forehead = share_of(mask, "skin", "l_brow", "r_brow", "eye_g") * (down < 0) * (u.abs() < 1)
    height = max(brow_top - quantile(down, forehead, 0.02), 0.05)
    # An arch, lower at the temples; 0 at the lower edge, 1 where the forehead ends.
    low = brow_top + (_OVERHANG + 0.25 * u.square()) * height
    above = (low - down) / height
    # Combed to one side, the farther the lower.
    root = u - 0.15 * (1 - above.clamp(0, 1)).square()
    strands = _strands(root.abs(), root < 0, 1 - above)
    pixel = 2 / photo.shape[-1]
    lower = (above + 0.06 * strands - 0.06) * height / (2 * pixel) + 0.5
    opacity = torch.minimum(lower, (1.02 - u.abs()) * half / (4 * pixel)).clamp(0, 1)[:, None]
    # The rim where hair and skin mix is covered too, or it would show between the hair and the bangs.
    bare = share_of(mask, "skin", "l_brow", "r_brow", "eye_g").clamp(0, 1)[:, None]
    rim = F.avg_pool2d(F.max_pool2d(bare, 5, 1, 2), 3, 1, 1) * hair[:, None]
    opacity = opacity * (bare + rim).clamp(0, 1)
    shadow = (F.max_pool2d(opacity, 5, 1, 2) - opacity).clamp_min(0) * share_of(mask, "skin")[:, None] * (above < 0.15)
    colour = _spread_colour(light, hair) * (1 + 0.5 * _CONTRAST * strands[:, None])
    made = torch.lerp(light * (1 - 0.25 * shadow), colour.clamp(0, 1), opacity)
    grown = torch.zeros_like(mask)
    grown[:, CELEBAMASK_HQ.id("hair")] = 1
    return made * 2 - 1, torch.lerp(mask, grown, opacity)


def grow_brows(photo: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The photo with brows that are half as high again and dense, and its mask.

    Args:    photo 1×3×S×S in [-1, 1], mask 1×19×S×S that shows the eyes and the brows.
    Returns: image 1×3×S×S in [-1, 1], mask 1×19×S×S.
    """
    light = ((photo + 1) / 2).clamp(0, 1)
    across, down = along_the_eyes(mask, centre(share_of(mask, "l_brow", "r_brow")))
    pixel = 2 / photo.shape[-1]
    made = light
    for name in ("l_brow", "r_brow"):
        brow = share_of(mask, name)
        half = 1.8 * spread(across, brow)
        middle = float((across * brow).sum() / brow.sum().clamp_min(1e-6))
        u = (across - middle) / half
        top, low = (edge(brow, u, down, share) for share in (0.12, 0.88))
        height = (low - top).clamp_min(4 * pixel)
        above = (low + 0.1 * height - down) / (1.4 * height)
        outwards = u * (1 if middle > 0 else -1)
        strands = _strands((0.55 + 0.45 * outwards - 0.1 * above).clamp(0, 1), torch.zeros_like(brow) > 0, above)
        edges = torch.minimum(above, 1 - above - 0.2 * outwards.clamp_min(0)) + 0.1 * strands
        inside = torch.minimum(edges * 1.4 * height, (1.05 - u.abs()) * half)
        opacity = (inside / (2 * pixel) + 0.4).clamp(0, 1) * share_of(mask, "skin", "l_brow", "r_brow", "eye_g")
        opacity = (_DENSITY * opacity.clamp(0, 1))[:, None]
        skin = luminance_of(light, opacity[:, 0] * share_of(mask, "skin"))
        colour = _visible(mean_colour(light, brow.square()) * _DARKER, skin)
        made = torch.lerp(made, (colour * (1 + 0.5 * _CONTRAST * strands[:, None])).clamp(0, 1), opacity)
        grown = torch.zeros_like(mask)
        grown[:, CELEBAMASK_HQ.id(name)] = 1
        mask = torch.lerp(mask, grown, opacity)
    return made * 2 - 1, mask


def _spread_colour(light: Tensor, weight: Tensor) -> Tensor:
    """1×3×S×S: the colour of where the weight is, spread over everything around it."""
    weight = (2 * weight[:, None] - 1).clamp_min(0)
    colour = F.interpolate(torch.cat([light * weight, weight], dim=1), size=(32, 32), mode="area")
    far = colour.mean((2, 3), keepdim=True) * 0.02
    for _ in range(3):
        colour = F.avg_pool2d(colour, 5, 1, 2)
    colour = F.interpolate(colour + far, size=light.shape[2:], mode="bilinear", align_corners=False)
    return colour[:, :3] / colour[:, 3:].clamp_min(1e-6)


def _strands(root: Tensor, left: Tensor, along: Tensor, curls: int = 3) -> Tensor:
    """Hairs, the same for everybody, by where they grow from (0 to 1, on the left or right side) and the place along
    them (0 to 1), of which each lies `curls` times above or below others: about -1 to 1, over 1×S×S."""
    table = torch.rand(1, 1, curls, _STRANDS, generator=torch.Generator().manual_seed(0)) * 2 - 1
    grid = torch.stack([torch.where(left, -root, root), along.clamp(0, 1) * 2 - 1], dim=-1)
    return F.grid_sample(table, grid, mode="bilinear", padding_mode="border", align_corners=True)[:, 0]


def _visible(colour: Tensor, skin: float) -> Tensor:
    """The colour 1×3×1×1, dark enough to be seen on skin of this luminance."""
    return colour * min(1.0, _AGAINST_SKIN * skin / max(luminance_of(colour, torch.ones(1, 1, 1)), 0.02))


def _hair_colour(light: Tensor, mask: Tensor, skin: float) -> Tensor:
    """1×3×1×1: of the hair, or of the brows where there is too little of it."""
    hair = share_of(mask, "hair")
    source = hair if hair.mean() > _HAIR_SHARE else share_of(mask, "l_brow", "r_brow")
    return _visible(mean_colour(light, source) * _DARKER, skin)
