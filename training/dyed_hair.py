# SPDX-License-Identifier: Apache-2.0
"""A photo's own hair in another colour, strand for strand: what a hair colour looks like on it, where nobody knows the
same person dyed.

The pigment alone is exchanged. How light a strand is among the others (its shape, the light that falls on it) stays,
in linear light, as does the gloss, which has the light's colour and not the hair's. At the rim, where a pixel is part
hair, only that part changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.face_frame import LUMINANCE

COLOURS = {"Black_Hair": (30, 26, 26), "Blond_Hair": (214, 177, 110), "Brown_Hair": (90, 62, 43)}
"""sRGB of hair of mean lightness in a photo of usual exposure."""

_CONTRAST = {"Black_Hair": 0.9, "Blond_Hair": 0.55, "Brown_Hair": 0.7}  # powers of the strands' relative lightness
_WARMTH = (0.92, 1.0, 1.15)  # red, green, blue: hair is redder in its own shade
_GLOSS = {"Black_Hair": 0.05, "Blond_Hair": 0.0, "Brown_Hair": 0.02}
_SKIN, _EXPOSURE = 0.33, 0.5  # linear luminance of skin in a photo of usual exposure; how far hair follows the skin's


def dye_hair(photo: Tensor, mask: Tensor, name: str) -> Tensor:
    """The photo with its hair in the colour of an attribute; the mask stays as it is.

    Args:    photo 1×3×S×S in [-1, 1], mask 1×19×S×S that shows hair and skin; name, one of COLOURS.
    Returns: image 1×3×S×S in [-1, 1].
    """
    light = _linear(((photo + 1) / 2).clamp(0, 1))
    alpha, strands, behind = _matte(light, mask[:, CELEBAMASK_HQ.id("hair")][:, None])
    grey = _luminance(strands)
    sure = alpha.square()
    mean = ((grey.log() * sure).sum() / sure.sum().clamp_min(1e-6)).exp()
    relative = (grey / mean).clamp(0.15, 2.2)
    skin = mask[:, CELEBAMASK_HQ.id("skin")][:, None].square()
    exposure = (_luminance(light) * skin).sum() / skin.sum().clamp_min(1e-6) / _SKIN
    pigment = _linear(torch.tensor(COLOURS[name]).view(1, 3, 1, 1) / 255) * exposure.clamp(0.4, 1.6) ** _EXPOSURE
    powers = _CONTRAST[name] * torch.tensor(_WARMTH).view(1, 3, 1, 1)
    dyed = pigment * relative**powers + _GLOSS[name] * (grey - 1.5 * mean).clamp_min(0)
    made = torch.lerp(behind, dyed, alpha)
    return torch.where(alpha > 0, _encoded(made.clamp(0, 1)) * 2 - 1, photo)


def _matte(light: Tensor, hair: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How much of a pixel is hair, 1×1×S×S, and the colours of that part and of the rest alone, 1×3×S×S.

    At the rim, where the pixel lies between the colours on either side of it, if these differ; else what the mask says:
    `faceedit.matting` for a crop as small as its parse, in linear light, where mixtures are sums.
    """
    inside, outside = (2 * hair - 1).clamp_min(0).square(), (1 - 2 * hair).clamp_min(0).square()
    sure = F.max_pool2d(-inside, 3, 1, 1).neg()  # hair all around
    foreground, background = _nearby(light, sure + 1e-3 * inside), _nearby(light, outside)
    across = foreground - background
    distance = across.square().sum(1, keepdim=True)
    by_colour = ((light - background) * across).sum(1, keepdim=True) / distance.clamp_min(1e-6)
    rim = F.max_pool2d(hair, 5, 1, 2) - F.max_pool2d(-hair, 5, 1, 2).neg()
    told = ((distance.sqrt() - 0.06) / 0.12).clamp(0, 1) * (rim > 0.05)
    alpha = torch.lerp(hair, by_colour.clamp(0, 1), told * (1 - sure))
    alpha = alpha * (F.max_pool2d(hair, 3, 1, 1) / 0.3).clamp(0, 1)  # a dark wall is no hair
    strands = torch.lerp(foreground, light, sure.sqrt()).clamp_min(2e-3)
    rest = (light - alpha * strands) / (1 - alpha).clamp_min(0.05)
    return alpha, strands, rest.clamp(torch.minimum(light, background), torch.maximum(light, background))


def _nearby(light: Tensor, weight: Tensor) -> Tensor:
    """1×3×S×S: the colour of where the weight is, nearest first."""
    weighted = torch.cat([light * weight, weight], dim=1)
    near = F.avg_pool2d(F.avg_pool2d(weighted, 5, 1, 2), 5, 1, 2)
    total = near + F.avg_pool2d(weighted, 31, 1, 15) * 1e-2 + weighted.mean((2, 3), keepdim=True) * 1e-4
    return total[:, :3] / total[:, 3:].clamp_min(1e-9)


def _luminance(light: Tensor) -> Tensor:
    return (light * torch.tensor(LUMINANCE).view(1, 3, 1, 1)).sum(1, keepdim=True)


def _linear(encoded: Tensor) -> Tensor:
    """sRGB's transfer function, IEC 61966-2-1."""
    return torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def _encoded(linear: Tensor) -> Tensor:
    return torch.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear.clamp_min(1e-6) ** (1 / 2.4) - 0.055)
