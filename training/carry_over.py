# SPDX-License-Identifier: Apache-2.0
"""Edits of real photos with a known result: what a drawn person wears is carried over to where the photo's own brows,
eyes, nose and lips are.

Colours are carried over as the ratio of the two drawings, which keeps the photo's light and grain (the expression ratio
images of Liu, Shan and Zhang 2001); glasses cover the face. Everything else comes from the photo alone, so that an
editor can learn all of it: bangs, moustaches, beards and bushy brows grow (`training.grown_hair`), hair is dyed
(`training.dyed_hair`) or gives way to a scalp (`training.bared_scalp`), lips part or close (`training.moved_lips`).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ

_FEATURES = (("l_brow",), ("r_brow",), ("l_eye",), ("r_eye",), ("nose",), ("u_lip", "mouth", "l_lip"))
_SMALLEST = 5e-5  # share of the image below which a feature's centre is noise
_ANCHOR = 3.0  # how much more than the others a thing's own features count in the fit


class Look(NamedTuple):
    """How one thing is carried over.

    shown_as: the attribute's value that shows it.  how: `cover` (opaque), `shade` (the ratio of the drawings), or of
    the photo itself: `grown` (hair drawn on it), `mouth` (its lips parted or closed), `dyed` (its hair, in the colour
    or, in reverse, another) or `bared` (of its hair). What grew or was carried over may be taken off again; what lips,
    dye or a bare scalp were before, nothing in them tells: those pairs are read in one direction.
    parts: of the photo, what it may change.  anchors: the features that must lie best.  density: of shades, the power
    of the ratio.
    """

    shown_as: int
    how: Literal["cover", "shade", "grown", "mouth", "dyed", "bared"]
    parts: str
    anchors: str
    density: float = 1.0


LOOKS: dict[str, Look] = {
    "Bald": Look(1, "bared", "background skin l_ear r_ear ear_r neck neck_l hair cloth", "l_brow r_brow"),
    "Bangs": Look(1, "grown", "skin l_brow r_brow eye_g hair", "l_brow r_brow"),
    "Black_Hair": Look(1, "dyed", "hair", "l_brow r_brow"),
    "Blond_Hair": Look(1, "dyed", "hair", "l_brow r_brow"),
    "Brown_Hair": Look(1, "dyed", "hair", "l_brow r_brow"),
    "Bushy_Eyebrows": Look(1, "grown", "skin l_brow r_brow eye_g", "l_brow r_brow"),
    "Eyeglasses": Look(1, "cover", "skin nose l_brow r_brow l_eye r_eye l_ear r_ear hair", "l_eye r_eye"),
    "Mouth_Slightly_Open": Look(1, "mouth", "skin u_lip mouth l_lip", "mouth"),
    "Mustache": Look(1, "grown", "skin nose u_lip", "nose mouth"),
    "No_Beard": Look(0, "grown", "skin nose neck", "nose mouth"),
    "Young": Look(0, "shade", "skin nose", "l_brow r_brow nose mouth", density=1.7),
}


def transplant(
    photo: Tensor, mask: Tensor, images: Tensor, masks: Tensor, transform: Tensor, look: Look
) -> tuple[Tensor, Tensor]:
    """The photo with what the second drawing wears and the first does not, and its mask.

    Args:    photo 1×3×S×S in [-1, 1], mask 1×19×S×S; images 2×3×R×R and masks 2×19×R×R, one drawn person without and
             with the thing; transform 1×2×3, the photo's coordinates in [-1, 1] to the drawings'.
    Returns: image 1×3×S×S, mask 1×19×S×S.
    """
    bare, worn = ((_moved(images, transform, photo) + 1) / 2).clamp(0, 1).split(1)
    worn_mask = _moved(masks[1:], transform, photo)
    light = ((photo + 1) / 2).clamp(0, 1)
    parts = [CELEBAMASK_HQ.id(part) for part in look.parts.split()]
    where = mask[:, parts].sum(1, keepdim=True)
    if look.how == "shade":
        ratio = (
            ((worn + 0.03) / (bare + 0.03)).pow(look.density).clamp(0.4, 1.15)
        )  # wrinkles; a lip that moved would be a white blot
        return (light * torch.lerp(torch.ones_like(ratio), ratio, where)).clamp(0, 1) * 2 - 1, mask
    changes = (worn - bare).abs().mean(1, keepdim=True)
    opacity = where * ((changes - 0.03) / 0.1).clamp(0, 1)
    return torch.lerp(light, worn, opacity) * 2 - 1, torch.lerp(mask, worn_mask, opacity)


def _moved(x: Tensor, transform: Tensor, photo: Tensor) -> Tensor:
    """M×C×R×R resampled over the photo's pixels, M×C×S×S; edges repeat."""
    grid = F.affine_grid(transform.expand(len(x), -1, -1), [len(x), *photo.shape[1:]], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def feature_points(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Centres N×6×2 of brows, eyes, nose and mouth in [-1, 1] (x, y), and which of them a mask N×19×S×S shows, N×6."""
    side = mask.shape[-1]
    axis = (torch.arange(side, dtype=mask.dtype) + 0.5) / side * 2 - 1
    points, shown = [], []
    for names in _FEATURES:
        weight = mask[:, [CELEBAMASK_HQ.id(name) for name in names]].sum(1)
        area = weight.sum((1, 2))
        centre = torch.stack([(weight.sum(1) * axis).sum(1), (weight.sum(2) * axis).sum(1)], dim=-1)
        points.append(centre / area.clamp_min(1e-6)[:, None])
        shown.append(area > _SMALLEST * side * side)
    return torch.stack(points, dim=1), torch.stack(shown, dim=1)


def fit_affine(points: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map N×2×3 that takes points N×K×2 nearest to targets N×K×2 by weights (K,), and the farthest miss."""
    ones = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    solution = torch.linalg.lstsq(ones * weights[:, None], targets * weights[:, None]).solution
    return solution.transpose(1, 2).contiguous(), (ones @ solution - targets).norm(dim=-1).amax(1)


def anchor_weights(look: Look) -> Tensor:
    anchors = look.anchors.split()
    return torch.tensor([_ANCHOR if any(name in anchors for name in names) else 1.0 for names in _FEATURES])
