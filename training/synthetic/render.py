# SPDX-License-Identifier: Apache-2.0
"""Render people: image, label map, soft mask, attributes and landmarks of each."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.synthetic.appearance import paint_portrait
from faceedit.training.synthetic.geometry import build_layers, face_points
from faceedit.training.synthetic.parameters import PortraitParameters, attributes_of

# On a CPU people are drawn a few at a time, so that the layers of one group stay in the second-level cache.
_CACHED_PIXELS = 4 * 128 * 128


@dataclass(frozen=True)
class PortraitBatch:
    """`image` N×3×S×S in [-1,1]; `labels` N×S×S int64 and `mask` N×19×S×S in [0,1] in CelebAMask-HQ order;
    `attributes` N×40
    in {0,1} in CelebA order; `landmarks` N×5×2 pixels (x, y), image-left first."""

    image: Tensor
    labels: Tensor
    mask: Tensor
    attributes: Tensor
    landmarks: Tensor

    def __len__(self) -> int:
        return self.image.shape[0]


@torch.no_grad()
def render(params: PortraitParameters, size_px: int, tint_seed: int | None = None) -> PortraitBatch:
    """Draw people at size_px².

    Args:    params of N people; size_px ≥ 16; tint_seed not None recolours about half of the regions of every portrait
    at
             random (domain randomisation: the label map and the shading stay, the colours lie).
    Returns: PortraitBatch on the device of `params`.
    Raises:  ValueError if size_px < 16.
    """
    if size_px < 16:
        raise ValueError(f"render: size_px must be ≥ 16, got {size_px}; ask for a larger portrait")
    tint = None if tint_seed is None else _region_tints(params, tint_seed)
    on_cpu = params["seed"].device.type == "cpu"
    step = max(1, _CACHED_PIXELS // size_px**2) if on_cpu else max(1, len(params))
    images, masks = [], []
    for start in range(0, max(1, len(params)), step):
        rows = slice(start, start + step)
        people = params.select(rows)
        canvas = paint_portrait(people, build_layers(people, size_px), None if tint is None else tint[rows])
        images.append(canvas.image * 2 - 1)
        masks.append(canvas.soft_mask())
    mask = torch.cat(masks)
    return PortraitBatch(
        image=torch.cat(images),
        labels=mask.argmax(1),
        mask=mask,
        attributes=attributes_of(params),
        landmarks=face_points(params, size_px),
    )


def _region_tints(params: PortraitParameters, seed: int) -> Tensor:
    """N×19×3 colours, NaN where a region keeps its own; both eyes, brows, ears and lips change together."""
    rows = []
    for person in params["seed"].tolist():
        generator = torch.Generator().manual_seed((person * 31 + seed * 7_919 + 5) % (1 << 62))
        colours = torch.rand(CELEBAMASK_HQ.num_classes, 3, generator=generator)
        colours = colours * (0.2 + 0.8 * torch.rand(CELEBAMASK_HQ.num_classes, 1, generator=generator))
        kept = torch.rand(CELEBAMASK_HQ.num_classes, generator=generator) > 0.55
        for first, second in (("l_eye", "r_eye"), ("l_brow", "r_brow"), ("l_ear", "r_ear"), ("u_lip", "l_lip")):
            a, b = CELEBAMASK_HQ.id(first), CELEBAMASK_HQ.id(second)
            colours[b], kept[b] = colours[a], kept[a]
        # Half of the time the nose is the skin's colour, or nothing would say "nose" but its outline.
        skin, nose = CELEBAMASK_HQ.id("skin"), CELEBAMASK_HQ.id("nose")
        if torch.rand((), generator=generator) < 0.8:
            colours[nose], kept[nose] = colours[skin], kept[skin]
        colours[kept] = float("nan")
        rows.append(colours)
    return torch.stack(rows).to(params["seed"].device) if rows else torch.empty(0, CELEBAMASK_HQ.num_classes, 3)
