# SPDX-License-Identifier: Apache-2.0
"""Pairs of photos with a known result, drawn from photos and synthetic families.

A photo has no counterfactual, but many edits only put something on a face. Two members of a synthetic family differ in
that thing alone; carried over (`training.carry_over`) it gives a second picture of the photo with the thing on. So
does what grows on the photo itself (`training.grown_hair`). Read backwards the pair takes it off, and then the
untouched photo is the truth. Hair is dyed (`training.dyed_hair`), and dyed hair gets its own colour back; hair gives
way to a scalp (`training.bared_scalp`), and lips part or close (`training.moved_lips`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faceedit.attributes import MAGGAN, attribute_index, conflicting
from faceedit.errors import UsageError
from faceedit.labels import CELEBAMASK_HQ
from faceedit.relations import Relations, influence_mask
from faceedit.training import cache
from faceedit.training.bared_scalp import bare_scalp
from faceedit.training.carry_over import (
    LOOKS,
    Look,
    anchor_weights,
    feature_points,
    fit_affine,
    transplant,
)
from faceedit.training.config import require
from faceedit.training.data import AugmentConfig, SyntheticPortraits, augment_images, soften_mask
from faceedit.training.dyed_hair import COLOURS, dye_hair
from faceedit.training.grown_hair import grow_bangs, grow_beard, grow_brows, grow_moustache
from faceedit.training.moved_lips import close_mouth, open_mouth
from faceedit.training.photos import UnlabelledPhotos

_LACKS, _HAS_HAIR = 0.2, 0.06  # a probability below which a photo lacks a thing; share of the image its hair must fill
_SHUT, _OPEN = 0.0012, 0.0025  # share of the image between the lips, at most and at least
_HATLESS = 0.002  # share of the image that a hat fills at most
_CANDIDATES = 32  # drawn people of whom the best fitting one lends what it wears


_GROW = {
    "Bald": bare_scalp,
    "Bangs": grow_bangs,
    "Bushy_Eyebrows": grow_brows,
    "Mustache": grow_moustache,
    "No_Beard": grow_beard,
}
_COLOURS = [MAGGAN.index(name) for name in COLOURS]
_OF_HAIR = [MAGGAN.index("Bangs"), *_COLOURS]


class _Carried(NamedTuple):
    """The photo at `position`, and what was made of it."""

    position: int
    photo: Tensor
    mask: Tensor
    made: Tensor
    made_mask: Tensor
    wears_it: bool
    """Whether the photo shows the thing; what was made of it shows the opposite."""
    colour: str = ""
    """Of hair that was dyed, in what was made of the photo."""


@dataclass(frozen=True, slots=True)
class TransplantConfig:
    """Which things are carried over, the share of pairs that take them off again (that give dyed hair its own colour
    back), and how far (shares of the side) a drawn person's features may lie from the photo's after the best affine
    fit."""

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
    """Photos × things that drawn people wear, and what is made of the photos alone.

    Args: photos, data; attributes, probabilities N×13 of the photos in MAGGAN order: nobody gets what they have.
    """

    def __init__(
        self, photos: UnlabelledPhotos, data: SyntheticPortraits, attributes: Tensor, config: TransplantConfig
    ) -> None:
        self.photos, self.data, self.attributes, self.config = photos, data, attributes, config
        self._photo_points, visible, shares = _photo_layout(photos)
        hair, mouth, hatless = shares["hair"], shares["mouth"], shares["hat"] < _HATLESS
        haired = (hair > _HAS_HAIR) & (attributes[:, MAGGAN.index("Bald")] < _LACKS)
        self._people_points = _people_points(data)
        self._lenders: list[tuple[NDArray[np.int64], ...]] = []
        self._takers: list[NDArray[np.int64]] = []
        for name in config.attributes:
            look, column = LOOKS[name], MAGGAN.index(name)
            shows = attributes[:, column] if look.shown_as else 1 - attributes[:, column]
            takes = visible & (shows < _LACKS)
            if name == "Bangs":
                takes &= haired
            elif look.how in ("dyed", "bared"):
                takes &= haired & hatless
            if look.how == "mouth":
                takes &= mouth < _SHUT
                smiling = visible & (mouth > _OPEN) & (shows > 1 - _LACKS)
                self._lenders.append((smiling.nonzero()[:, 0].numpy(),))
            elif look.how == "dyed":
                own = visible & haired & hatless & (shows > 1 - _LACKS)  # whose hair has the colour already
                self._lenders.append((own.nonzero()[:, 0].numpy(),))
            elif look.how in ("grown", "bared"):
                self._lenders.append((takes.nonzero()[:, 0].numpy(),))  # everyone their own
            else:
                self._lenders.append(_lenders(data, name, look))
            self._takers.append(takes.nonzero()[:, 0].numpy())
            for what, found in (("photos without it", self._takers[-1]), ("lenders", self._lenders[-1][0])):
                if not len(found) and not (look.how == "dyed" and what == "lenders"):
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
        take = {
            "mouth": self._moved_lips,
            "grown": self._grown,
            "bared": self._grown,
            "dyed": self._dyed,
        }.get(look.how, self._dressed)
        carried = take(which, look, generator)
        states = []
        for image, parts, wearing in (
            (carried.photo, carried.mask, carried.wears_it),
            (carried.made, carried.made_mask, not carried.wears_it),
        ):
            attributes = self.attributes[carried.position : carried.position + 1].clone()
            if look.how == "bared" and wearing:
                attributes[:, _OF_HAIR] = 0
            if carried.colour and wearing != carried.wears_it:
                attributes[:, _COLOURS] = 0
                attributes[:, MAGGAN.index(carried.colour)] = 1
            attributes[:, column] = look.shown_as if wearing else 1 - look.shown_as
            states.append({"source": image, "mask": parts, "attributes": attributes})
        backwards = chance[0] < self.config.removal_share and look.how not in ("dyed", "bared")
        if look.how == "mouth":
            backwards = carried.wears_it
        if backwards != carried.wears_it:
            states.reverse()
        before, after = states
        difference = torch.zeros(1, len(MAGGAN))
        difference[:, column] = after["attributes"][:, column] - before["attributes"][:, column]
        if look.how in ("dyed", "bared") and chance[2] < 0.5:  # with what follows from it, as an edit may ask
            gone = [MAGGAN.index(other) for other in conflicting(name) if other in MAGGAN]
            difference[:, gone] = -(before["attributes"][:, gone] > 0.5).float()
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

    def _dressed(self, which: int, look: Look, generator: torch.Generator) -> _Carried:
        """A photo, and what it is with the thing of the best fitting of some drawn people."""
        lenders = self._lenders[which]
        position, chosen, transform = self._fitting(self._takers[which], lenders[0], look, generator)
        person, without, wearing = (int(values[chosen]) for values in lenders)
        images = cache.unpack_image(self.data.images[[person, person], [without, wearing]])
        masks = cache.unpack_mask(self.data.masks[[person, person], [without, wearing]])
        photo, mask = self._read(position)
        made = transplant(photo, mask, images, masks, transform, look)
        return _Carried(position, photo, mask, *made, wears_it=False)

    def _moved_lips(self, which: int, look: Look, generator: torch.Generator) -> _Carried:
        """As `_dressed`, with the photo's own mouth opened, or closed where it is open."""
        shut, smiling = self._takers[which], self._lenders[which][0]
        wears_it = bool(torch.rand((), generator=generator) < self.config.removal_share)
        among = smiling if wears_it else shut
        position = int(among[int(torch.randint(len(among), (), generator=generator))])
        photo, mask = self._read(position)
        made = (close_mouth if wears_it else open_mouth)(photo, mask)
        return _Carried(position, photo, mask, *made, wears_it=wears_it)

    def _grown(self, which: int, look: Look, generator: torch.Generator) -> _Carried:
        """As `_dressed`, with hair that the photo alone decides on, or without any."""
        takers = self._takers[which]
        position = int(takers[int(torch.randint(len(takers), (), generator=generator))])
        photo, mask = self._read(position)
        made = _GROW[self.config.attributes[which]](photo, mask)
        return _Carried(position, photo, mask, *made, wears_it=False)

    def _dyed(self, which: int, look: Look, generator: torch.Generator) -> _Carried:
        """A photo, and what it is with its hair dyed; in reverse, one of this colour that was dyed in another."""
        name, takers, owners = self.config.attributes[which], self._takers[which], self._lenders[which][0]
        back = len(owners) > 0 and float(torch.rand((), generator=generator)) < self.config.removal_share
        among = owners if back else takers
        position = int(among[int(torch.randint(len(among), (), generator=generator))])
        others = [other for other in COLOURS if other != name]
        colour = others[int(torch.randint(len(others), (), generator=generator))] if back else name
        photo, mask = self._read(position)
        made = dye_hair(photo, mask, colour)
        return _Carried(position, photo, mask, made, mask, wears_it=back, colour=colour)

    def _read(self, position: int) -> tuple[Tensor, Tensor]:
        return self.photos.read([position], np.zeros(1, dtype=bool))

    def _fitting(
        self,
        takers: NDArray[np.int64],
        lenders: NDArray[np.int64],
        look: Look,
        generator: torch.Generator,
    ) -> tuple[int, int, Tensor]:
        """A photo's position, the place in `lenders` of who fits it best, and the map 1×2×3 from it to them."""
        best: tuple[float, int, int, Tensor] | None = None
        for _ in range(4):  # a photo that nobody fits, a head turned far, gives way to another
            position = int(takers[int(torch.randint(len(takers), (), generator=generator))])
            candidates = torch.randint(len(lenders), (_CANDIDATES,), generator=generator).numpy()
            own = self._photo_points[position].expand(_CANDIDATES, -1, -1)
            transforms, misfits = fit_affine(own, self._people_points[lenders[candidates]], anchor_weights(look))
            nearest = int(misfits.argmin())
            found = (float(misfits[nearest]), position, int(candidates[nearest]), transforms[nearest : nearest + 1])
            if best is None or found[0] < best[0]:
                best = found
            if best[0] <= 2 * self.config.misfit:  # coordinates run over two, from -1 to 1
                break
        assert best is not None
        return best[1:]


def _photo_layout(photos: UnlabelledPhotos) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Of every photo: points N×6×2, whether all of them show, and some parts' shares of the image."""
    points, visible = [], []
    shares: dict[str, list[Tensor]] = {"hair": [], "mouth": [], "hat": []}
    for start in range(0, len(photos), 32):
        positions: Sequence[int] = range(start, min(start + 32, len(photos)))
        _, mask = photos.read(positions, np.zeros(len(positions), dtype=bool))
        found, shown = feature_points(mask)
        points.append(found)
        visible.append(shown.all(1))
        for part, share in shares.items():
            share.append(mask[:, CELEBAMASK_HQ.id(part)].mean((1, 2)))
    return torch.cat(points), torch.cat(visible), {part: torch.cat(share) for part, share in shares.items()}


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
    flipped &= data.attributes[:, 1:, attribute_index(name)] == look.shown_as
    person, member = np.nonzero(flipped)
    return person, np.zeros_like(person), member + 1
