# SPDX-License-Identifier: Apache-2.0
"""Edits of real photos with a known result: what a drawn person wears, or another photo's mouth, is carried over.

A photo has no counterfactual, but many edits only put something on a face. Two members of a synthetic family differ in
that thing alone; their difference, moved to where the photo's own brows, eyes, nose and lips are, gives a second
picture of the photo with the thing on. Read backwards the pair takes it off, and then the untouched photo is the truth.

Colours are carried over as the ratio of the two drawings, which keeps the photo's light and grain (the expression ratio
images of Liu, Shan and Zhang 2001); what hides the face (glasses, hair on the forehead) covers it. Drawn mouths are too
unlike photographed ones, so an open mouth comes from a photo, in the skin colour of the one that it is given to.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from faceedit.attributes import MAGGAN, attribute_index
from faceedit.errors import UsageError
from faceedit.labels import CELEBAMASK_HQ
from faceedit.relations import Relations, influence_mask
from faceedit.training import cache
from faceedit.training.config import require
from faceedit.training.data import AugmentConfig, SyntheticPortraits, augment_images, soften_mask
from faceedit.training.photos import UnlabelledPhotos

_FEATURES = (("l_brow",), ("r_brow",), ("l_eye",), ("r_eye",), ("nose",), ("u_lip", "mouth", "l_lip"))
_SMALLEST = 5e-5  # share of the image below which a feature's centre is noise
_LACKS, _HAS_HAIR = 0.2, 0.06  # a probability below which a photo lacks a thing; share of the image its hair must fill
_STRANDS = 0.7  # hair of a beard or a brow is this much darker than the mean of what it takes its colour from
_SHUT, _OPEN = 0.0012, 0.0025  # share of the image between the lips, at most and at least
_CANDIDATES = 32  # drawn people of whom the best fitting one lends what it wears
_ANCHOR = 3.0  # how much more than the others a thing's own features count in the fit


class Look(NamedTuple):
    """How one thing is carried over.

    shown_as: the attribute's value that shows it.  how: `cover` (opaque), `hair` (opaque, above the eyes), `strands`
    (as dense as the drawing's are dark), `shade` (the ratio of the drawings) or `mouth` (from another photo).
    parts: of the photo, what it may change.  anchors: the features that must lie best.  colour: the parts of the photo
    whose colour hair and strands take; the drawing's own would be a look that nothing in the photo tells.
    """

    shown_as: int
    how: Literal["cover", "hair", "strands", "shade", "mouth"]
    parts: str
    anchors: str
    colour: str = "hair"


_SKIN = "skin nose u_lip l_lip"
LOOKS: dict[str, Look] = {
    "Bangs": Look(1, "hair", "skin nose l_brow r_brow eye_g", "l_brow r_brow"),
    "Bushy_Eyebrows": Look(1, "strands", "skin nose l_brow r_brow eye_g", "l_brow r_brow", "l_brow r_brow"),
    "Eyeglasses": Look(1, "cover", "skin nose l_brow r_brow l_eye r_eye l_ear r_ear hair", "l_eye r_eye"),
    "Mouth_Slightly_Open": Look(1, "mouth", "u_lip mouth l_lip", "mouth"),
    "Mustache": Look(1, "strands", _SKIN, "nose mouth"),
    "No_Beard": Look(0, "strands", f"{_SKIN} neck", "nose mouth"),
    "Young": Look(0, "shade", _SKIN, "l_brow r_brow nose mouth"),
}
_DARK_HAIR = ("Black_Hair", "Brown_Hair")  # whoever lends strands has one of these: on skin their density is seen


@dataclass(frozen=True, slots=True)
class TransplantConfig:
    """Which things are carried over, the share of pairs that take them off again, and how far (shares of the side) a
    drawn person's features may lie from the photo's after the best affine fit."""

    attributes: tuple[str, ...] = tuple(LOOKS)
    removal_share: float = 0.4
    misfit: float = 0.02

    def __post_init__(self) -> None:
        for name in self.attributes:
            if name not in LOOKS:
                raise UsageError(f"recipe: transplants.attributes must be of {', '.join(LOOKS)}, got {name}; remove it")
        require(len(self.attributes) > 0, "transplants.attributes", "not empty", self.attributes)
        require(0 <= self.removal_share <= 1, "transplants.removal_share", "in [0, 1]", self.removal_share)
        require(self.misfit > 0, "transplants.misfit", "positive", self.misfit)


class Transplants:
    """Photos × things that drawn people wear.

    Args: photos, data; attributes, probabilities N×13 of the photos in MAGGAN order: nobody gets what they have.
    """

    def __init__(
        self, photos: UnlabelledPhotos, data: SyntheticPortraits, attributes: Tensor, config: TransplantConfig
    ) -> None:
        self.photos, self.data, self.attributes, self.config = photos, data, attributes, config
        self._photo_points, visible, hair, mouth = _photo_layout(photos)
        self._people_points = _people_points(data)
        self._lenders: list[tuple[NDArray[np.int64], ...]] = []
        self._takers: list[NDArray[np.int64]] = []
        for name in config.attributes:
            look, column = LOOKS[name], MAGGAN.index(name)
            shows = attributes[:, column] if look.shown_as else 1 - attributes[:, column]
            takes = visible & (shows < _LACKS)
            if look.how in ("hair", "strands") and look.colour == "hair":
                takes &= (hair > _HAS_HAIR) & (attributes[:, MAGGAN.index("Bald")] < _LACKS)
            if look.how == "mouth":
                takes &= mouth < _SHUT
                smiling = visible & (mouth > _OPEN) & (shows > 1 - _LACKS)
                self._lenders.append((smiling.nonzero()[:, 0].numpy(),))
            else:
                self._lenders.append(_lenders(data, name, look))
            self._takers.append(takes.nonzero()[:, 0].numpy())
            for what, found in (("photos without it", self._takers[-1]), ("lenders", self._lenders[-1][0])):
                if not len(found):
                    raise UsageError(
                        f"train: transplants.attributes must leave someone to draw, got {name} with no {what}; "
                        "remove it or add photos or people"
                    )

    def sample(
        self,
        count: int,
        generator: torch.Generator,
        augment: AugmentConfig,
        relations: Relations | None = None,
    ) -> dict[str, Tensor]:
        """`count` pairs with what `sample_pairs` returns; `attributes` are the classifier's, the changed one exact."""
        parts = [self._one(generator, augment.flip) for _ in range(count)]
        batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        batch["mask"] = soften_mask(batch["mask"], augment.soften_mask_share, generator)
        batch["source"], batch["target"] = augment_images([batch["source"], batch["target"]], augment, generator)
        batch["influence"] = influence_mask(batch["difference"], batch["mask"], relations)
        return batch

    def _one(self, generator: torch.Generator, flip: bool) -> dict[str, Tensor]:
        chance = torch.rand(3, generator=generator).tolist()
        which = int(torch.randint(len(self.config.attributes), (), generator=generator))
        name = self.config.attributes[which]
        look, column = LOOKS[name], MAGGAN.index(name)
        wears_it = False  # the photo itself
        if look.how == "mouth":
            # Few photos have a closed mouth: half of the time an open one gets theirs.
            wears_it = chance[2] < 0.5
            position, photo, mask, made, made_mask = self._other_mouth(which, wears_it, generator)
        else:
            position, photo, mask, made, made_mask = self._dressed(which, look, generator)
        states = []
        for image, parts, wearing in ((photo, mask, wears_it), (made, made_mask, not wears_it)):
            attributes = self.attributes[position : position + 1].clone()
            attributes[:, column] = look.shown_as if wearing else 1 - look.shown_as
            states.append({"source": image, "mask": parts, "attributes": attributes})
        if (chance[0] >= self.config.removal_share) == wears_it:
            states.reverse()
        before, after = states
        difference = torch.zeros(1, len(MAGGAN))
        difference[:, column] = after["attributes"][:, column] - before["attributes"][:, column]
        pair = {
            **before,
            "target": after["source"],
            "target_attributes": after["attributes"],
            "difference": difference,
        }
        if flip and chance[1] < 0.5:
            pair |= {key: pair[key].flip(-1) for key in ("source", "target", "mask")}
            pair["mask"] = pair["mask"][:, list(CELEBAMASK_HQ.flip_permutation)]
        return pair

    def _dressed(
        self, which: int, look: Look, generator: torch.Generator
    ) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        """A photo's position, image and mask, and both with the thing of the best fitting of some drawn people."""
        lenders = self._lenders[which]
        position, chosen, transform = self._fitting(
            self._takers[which], lenders[0], self._people_points, look, generator
        )
        person, without, wearing = (int(values[chosen]) for values in lenders)
        images = cache.unpack_image(self.data.images[[person, person], [without, wearing]])
        masks = cache.unpack_mask(self.data.masks[[person, person], [without, wearing]])
        photo, mask = self._read(position)
        return position, photo, mask, *transplant(photo, mask, images, masks, transform, look)

    def _other_mouth(
        self, which: int, wears_it: bool, generator: torch.Generator
    ) -> tuple[int, Tensor, Tensor, Tensor, Tensor]:
        """As `_dressed`, with the mouth of another photo: open, or closed where the photo `wears_it`."""
        shut, smiling = self._takers[which], self._lenders[which][0]
        takers, lenders = (smiling, shut) if wears_it else (shut, smiling)
        look = LOOKS[self.config.attributes[which]]
        position, chosen, transform = self._fitting(takers, lenders, self._photo_points, look, generator)
        photo, mask = self._read(position)
        made = transplant_mouth(photo, mask, *self._read(int(lenders[chosen])), transform)
        return position, photo, mask, *made

    def _read(self, position: int) -> tuple[Tensor, Tensor]:
        return self.photos.read([position], np.zeros(1, dtype=bool))

    def _fitting(
        self,
        takers: NDArray[np.int64],
        lenders: NDArray[np.int64],
        points: Tensor,
        look: Look,
        generator: torch.Generator,
    ) -> tuple[int, int, Tensor]:
        """A photo's position, the place in `lenders` of who fits it best, and the map 1×2×3 from it to them."""
        best: tuple[float, int, int, Tensor] | None = None
        for _ in range(4):  # a photo that nobody fits, a head turned far, gives way to another
            position = int(takers[int(torch.randint(len(takers), (), generator=generator))])
            candidates = torch.randint(len(lenders), (_CANDIDATES,), generator=generator).numpy()
            own = self._photo_points[position].expand(_CANDIDATES, -1, -1)
            transforms, misfits = fit_affine(own, points[lenders[candidates]], _anchor_weights(look))
            nearest = int(misfits.argmin())
            found = (float(misfits[nearest]), position, int(candidates[nearest]), transforms[nearest : nearest + 1])
            if best is None or found[0] < best[0]:
                best = found
            if best[0] <= 2 * self.config.misfit:  # coordinates run over two, from -1 to 1
                break
        assert best is not None
        return best[1:]


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
        ratio = ((worn + 0.03) / (bare + 0.03)).clamp(0.1, 3.0)
        return (light * torch.lerp(torch.ones_like(ratio), ratio, where)).clamp(0, 1) * 2 - 1, mask
    if look.how == "cover":
        changes = (worn - bare).abs().mean(1, keepdim=True)
        opacity = where * ((changes - 0.03) / 0.1).clamp(0, 1)
        return torch.lerp(light, worn, opacity) * 2 - 1, torch.lerp(mask, worn_mask, opacity)
    hair = CELEBAMASK_HQ.id("hair")
    colour = _mean_colour(light, mask[:, [CELEBAMASK_HQ.id(part) for part in look.colour.split()]].sum(1))
    if look.how == "strands":
        dark = _mean_colour(worn, worn_mask[:, hair]) * _STRANDS
        share = (bare - worn).mean(1, keepdim=True) / (bare - dark).mean(1, keepdim=True).clamp_min(0.1)
        return torch.lerp(light, colour * _STRANDS, where * share.clamp(0, 1)) * 2 - 1, mask
    rows = (torch.arange(light.shape[2]) + 0.5) / light.shape[2] * 2 - 1
    above = (rows < feature_points(mask)[0][0, 2:4, 1].mean()).to(light).view(1, 1, -1, 1)
    # Where the drawing's strands mix with its forehead, the forehead would shine through in hair's new colour.
    opacity = where * above * (2 * worn_mask[:, hair : hair + 1] - 1).clamp_min(0)
    worn = worn * colour / _mean_colour(worn, worn_mask[:, hair]).clamp_min(0.02)
    made = torch.lerp(light, worn.clamp(0, 1), opacity)
    return made * 2 - 1, torch.lerp(mask, worn_mask, opacity)


def transplant_mouth(
    photo: Tensor, mask: Tensor, lender: Tensor, lender_mask: Tensor, transform: Tensor
) -> tuple[Tensor, Tensor]:
    """The photo with another photo's mouth, in the colour of its own skin around it, and its mask.

    Args:    photo, lender 1×3×S×S in [-1, 1] with masks 1×19×S×S; transform 1×2×3, the photo's coordinates to the
             lender's.   Returns: image 1×3×S×S, mask 1×19×S×S.
    """
    lent, lent_mask = (_moved(x, transform, photo) for x in (lender, lender_mask))
    either = torch.maximum(mask, lent_mask)[:, [CELEBAMASK_HQ.id(part) for part in ("u_lip", "mouth", "l_lip")]]
    # In pixels of a crop of 128: two around the lips change, three more lend the skin's colour; a soft rim.
    inside = either.sum(1, keepdim=True)
    opacity, around = (F.avg_pool2d(F.max_pool2d(inside, 2 * r + 1, 1, r), 5, 1, 2).clamp(0, 1) for r in (2, 5))
    skin = CELEBAMASK_HQ.id("skin")
    ring = (around - opacity).clamp_min(0)[:, 0] * mask[:, skin] * lent_mask[:, skin]
    light, other = ((x + 1) / 2 for x in (photo, lent))
    ratio = _mean_colour(light, ring) / _mean_colour(other, ring).clamp_min(0.05)
    made = torch.lerp(light, (other * ratio.clamp(0.4, 2.5)).clamp(0, 1), opacity)
    return made * 2 - 1, torch.lerp(mask, lent_mask, opacity)


def _moved(x: Tensor, transform: Tensor, photo: Tensor) -> Tensor:
    """M×C×R×R resampled over the photo's pixels, M×C×S×S; edges repeat."""
    grid = F.affine_grid(transform.expand(len(x), -1, -1), [len(x), *photo.shape[1:]], align_corners=False)
    return F.grid_sample(x, grid, mode="bilinear", padding_mode="border", align_corners=False)


def _mean_colour(image: Tensor, weight: Tensor) -> Tensor:
    weight = weight[:, None]
    return (image * weight).sum((2, 3), keepdim=True) / weight.sum((2, 3), keepdim=True).clamp_min(1e-6)


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


def _anchor_weights(look: Look) -> Tensor:
    anchors = look.anchors.split()
    return torch.tensor([_ANCHOR if any(name in anchors for name in names) else 1.0 for names in _FEATURES])


def fit_affine(points: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The affine map N×2×3 that takes points N×K×2 nearest to targets N×K×2 by weights (K,), and the farthest miss."""
    ones = torch.cat([points, torch.ones_like(points[..., :1])], dim=-1)
    solution = torch.linalg.lstsq(ones * weights[:, None], targets * weights[:, None]).solution
    return solution.transpose(1, 2).contiguous(), (ones @ solution - targets).norm(dim=-1).amax(1)


def _photo_layout(photos: UnlabelledPhotos) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of every photo: points N×6×2, whether all of them show, and hair's and the open mouth's shares of the image."""
    points, visible, hair, mouth = [], [], [], []
    for start in range(0, len(photos), 32):
        positions: Sequence[int] = range(start, min(start + 32, len(photos)))
        _, mask = photos.read(positions, np.zeros(len(positions), dtype=bool))
        found, shown = feature_points(mask)
        points.append(found)
        visible.append(shown.all(1))
        hair.append(mask[:, CELEBAMASK_HQ.id("hair")].mean((1, 2)))
        mouth.append(mask[:, CELEBAMASK_HQ.id("mouth")].mean((1, 2)))
    return torch.cat(points), torch.cat(visible), torch.cat(hair), torch.cat(mouth)


def _people_points(data: SyntheticPortraits) -> Tensor:
    """Points P×6×2 of every drawn person as sampled; infinite where a feature is hidden, so that nobody fits them."""
    parts = []
    for start in range(0, len(data), 32):
        points, shown = feature_points(cache.unpack_mask(np.array(data.masks[start : start + 32, 0])))
        points[~shown.all(1)] = 1e3
        parts.append(points)
    return torch.cat(parts)


def _lenders(data: SyntheticPortraits, name: str, look: Look) -> tuple[NDArray[Any], ...]:
    """Person, member without and member with the thing, of every family in which it was put on: what an edit adds has
    one typical look, and only that can be learned from a face without it."""
    if name not in data.config.attributes:
        return (np.zeros(0, dtype=np.int64),) * 3
    flipped = data.flipped[:, 1:] == data.config.attributes.index(name)
    if look.how == "strands":
        flipped &= data.attributes[:, 0, [attribute_index(hair) for hair in _DARK_HAIR]].any(1, keepdims=True)
    flipped &= data.attributes[:, 1:, attribute_index(name)] == look.shown_as
    person, member = np.nonzero(flipped)
    return person, np.zeros_like(person), member + 1
