# SPDX-License-Identifier: Apache-2.0
"""Synthetic portraits as training data: families of counterfactuals, and batches drawn from them.

A family is one person drawn several times: as sampled, and with one attribute flipped. Any two members are an edit
whose true result is known: source image, attribute difference, target image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from faceedit.attributes import CELEBA, MAGGAN, attribute_index
from faceedit.devices import resolve_device
from faceedit.errors import UsageError
from faceedit.relations import Relations, influence_mask
from faceedit.training import cache
from faceedit.training import synthetic as portraits
from faceedit.training.config import require
from faceedit.training.synthetic.geometry import face_points

# Seeds of sample_parameters by purpose. Two seeds share nobody, so no test person is ever trained on.
SPLIT_SEEDS = {"train": 1_000, "validation": 2_000_000, "test": 3_000_000}
_FAMILIES_A_CHUNK = 16
_SURE = 0.8


def require_other_people(seed_offset: int, people: int, at_once: int) -> None:
    """Raise OutOfRangeError about a configuration's `seed_offset` that is neither 0 nor leads past its own people.

    Each `at_once` people have a seed, the next ones the next: a small offset has nearly everyone in common with none.
    """
    seeds = -(-people // at_once)
    is_apart = seed_offset == 0 or seeds <= seed_offset < 900_000
    require(is_apart, "seed_offset", f"0 or in [{seeds}, 900000) for {people} people", seed_offset)


@dataclass(frozen=True, slots=True)
class SyntheticConfig:
    """Which families to render. `tinted_share` of the people have regions of random colour (domain randomisation).

    `seed_offset` (0, or at least people / 16) skips 16 people each: nobody drawn then is among the first `people` of
    the split. Disk: size_px² × 6 bytes × people × (1 + variants).
    """

    size_px: int = 128
    people: int = 3000
    variants: int = 3
    attributes: tuple[str, ...] = MAGGAN
    tinted_share: float = 0.0
    seed_offset: int = 0
    cache_dir: str | None = None

    def __post_init__(self) -> None:
        require(self.people > 0, "people", "positive", self.people)
        require(0 <= self.tinted_share <= 1, "tinted_share", "in [0, 1]", self.tinted_share)
        require_other_people(self.seed_offset, self.people, _FAMILIES_A_CHUNK)
        require(0 <= self.variants <= len(self.attributes), "variants", "at most the attributes", self.variants)
        for name in self.attributes:
            attribute_index(name)
            if name not in portraits.SUPPORTED_ATTRIBUTES:
                raise UsageError(
                    f"recipe: attributes must be ones that synthetic portraits show, got {name}; remove it"
                )


class SyntheticPortraits:
    """Families of one split, rendered once into a cache.

    Arrays: images uint8 P×V×S×S×3, masks (packed) uint8 P×V×S×S×3, attributes uint8 P×V×40, V = 1 + variants;
    flipped int8 P×V, the position in `config.attributes` of what member v changes (-1 for member 0, the person as
    sampled); tinted bool P×1, whose colours lie.
    """

    def __init__(self, config: SyntheticConfig, split: str = "train", report: Callable[[str], Any] = print) -> None:
        self.config = config
        self.seed = SPLIT_SEEDS[split] + config.seed_offset
        folder = _cache_folder(config, split, self.seed)
        members = 1 + config.variants
        shape = (config.people, members, config.size_px, config.size_px, 3)
        shapes = {
            "images": (shape, "uint8"),
            "masks": (shape, "uint8"),
            "attributes": ((config.people, members, len(CELEBA)), "uint8"),
            "flipped": ((config.people, members), "int8"),
            "tinted": ((config.people, 1), "bool"),
        }
        arrays = cache.build_cache(
            folder,
            shapes,
            cache.rendered_at_once(_FAMILIES_A_CHUNK, config.size_px),
            self._render,
            report,
            workers=cache.renderers(),
        )
        self.images, self.masks = arrays["images"], arrays["masks"]
        self.attributes = np.array(arrays["attributes"])
        self.flipped = np.array(arrays["flipped"])
        self.tinted = np.array(arrays["tinted"])

    def __len__(self) -> int:
        return self.config.people

    def landmarks(self) -> Tensor:
        """Five points P×5×2 of every person as sampled, pixels (x, y), image-left first."""
        starts = range(0, len(self), _FAMILIES_A_CHUNK)
        people = (self._people(start, min(start + _FAMILIES_A_CHUNK, len(self))) for start in starts)
        return torch.cat([face_points(chunk, self.config.size_px) for chunk in people])

    def _people(self, start: int, stop: int) -> portraits.PortraitParameters:
        """Each chunk is its own sample_parameters seed, so a cache can resume anywhere."""
        return portraits.sample_parameters(stop - start, self.seed + start // _FAMILIES_A_CHUNK)

    def _draw(self, start: int, stop: int) -> tuple[list[portraits.PortraitParameters], Tensor, Tensor]:
        """A chunk of families: members' parameters, what each flips (N, variants), and which are tinted (N)."""
        generator = torch.Generator().manual_seed(self.seed * 1_000 + start // _FAMILIES_A_CHUNK)
        people = self._people(start, stop)
        variants, order = _flipped_variants(people, self.config, generator)
        return [people, *variants], order, torch.rand(stop - start, generator=generator) < self.config.tinted_share

    def _render(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Families start…stop, whole chunks."""
        starts = range(start, stop, _FAMILIES_A_CHUNK)
        chunks = [self._draw(first, min(first + _FAMILIES_A_CHUNK, stop)) for first in starts]
        family = [_joined(members) for members in zip(*(c[0] for c in chunks), strict=True)]
        order, tinted = torch.cat([chunk[1] for chunk in chunks]), torch.cat([chunk[2] for chunk in chunks])
        size, place = self.config.size_px, resolve_device("auto")
        images, masks, attributes = [], [], []
        for member in (one.to(place) for one in family):
            batch = portraits.render(member, size)
            image = batch.image
            if tinted.any():
                # The same tint for the whole family: the seed is the person's.
                image = image.clone()
                chosen = tinted.to(place)
                image[chosen] = portraits.render(member.select(chosen), size, tint_seed=self.seed).image
            images.append(cache.pack_image(image))
            masks.append(cache.pack_mask(batch.mask))
            attributes.append(batch.attributes.to(torch.uint8).cpu().numpy())
        stacked = {"images": images, "masks": masks, "attributes": attributes}
        joined = {name: np.stack(values, axis=1) for name, values in stacked.items()}
        flipped = torch.cat([torch.full((stop - start, 1), -1), order], dim=1).numpy()
        return {**joined, "flipped": flipped, "tinted": tinted[:, None].numpy()}


def _cache_folder(config: SyntheticConfig, split: str, seed: int) -> Path:
    values: dict[str, Any] = {
        "size": config.size_px,
        "people": config.people,
        "variants": config.variants,
        "seed": seed,
    }
    values |= {"attributes": config.attributes, "tinted": config.tinted_share, "version": 1}
    renderer = Path(portraits.__file__ or "").parent
    key = cache.fingerprint(values, list(renderer.glob("*.py")))
    return Path(config.cache_dir or cache.default_cache_dir()) / f"synthetic-{split}-{config.size_px}px-{key}"


def _flipped_variants(
    people: portraits.PortraitParameters, config: SyntheticConfig, generator: torch.Generator
) -> tuple[list[portraits.PortraitParameters], Tensor]:
    """For each variant, every person with one attribute of their own flipped; no attribute twice a family.

    Returns: the variants, and N×variants positions in `config.attributes` of what was flipped.
    """
    count, total = len(people), len(config.attributes)
    order = torch.stack([torch.randperm(total, generator=generator) for _ in range(count)])
    shown = portraits.attributes_of(people)
    variants = []
    for slot in range(config.variants):
        parts: list[portraits.PortraitParameters] = []
        places: list[Tensor] = []
        for number, name in enumerate(config.attributes):
            for value in (0, 1):
                chosen = (order[:, slot] == number) & (shown[:, attribute_index(name)] == 1 - value)
                if chosen.any():
                    parts.append(portraits.with_attribute(people.select(chosen), name, value))
                    places.append(chosen.nonzero()[:, 0])
        back = torch.cat(places).argsort()
        variants.append(_joined(parts).select(back))
    return variants, order[:, : config.variants]


def _joined(parts: Sequence[portraits.PortraitParameters]) -> portraits.PortraitParameters:
    return portraits.PortraitParameters({name: torch.cat([part[name] for part in parts]) for name in parts[0].values})


@dataclass(frozen=True, slots=True)
class AugmentConfig:
    """Photometric changes shared by source and target of a pair, and softened masks as a parser gives them.

    `fading` is the most colour a picture may lose, in [0, 1] (1: down to grey); most lose little.
    """

    flip: bool = True
    gain: float = 0.15
    gamma: float = 0.25
    tint: float = 0.06
    fading: float = 0.0
    noise: float = 0.02
    soften_mask_share: float = 0.5

    def __post_init__(self) -> None:
        require(0 <= self.fading <= 1, "augment.fading", "in [0, 1]", self.fading)


@dataclass(frozen=True, slots=True)
class PairConfig:
    """How pairs are drawn.

    `multi_share` of them join two flipped members, so that several attributes differ. `terse_share` of the edits away
    from the sampled person name only the attribute that was asked for and leave out what follows from it (blond, but
    not "no longer brown"), because at test time the source attributes may be unknown. Pairs that flip an attribute of
    `emphasis` are drawn `emphasis_weight` times as often as the others, twice that where it is named twice.
    `backwards_share` of the pairs lead back to the sampled person; since nothing is put on again that was taken off, a
    small share means more pairs that add something.
    `idle_share` ask for what is there already (`ask_for_what_is_there`).
    """

    multi_share: float = 0.15
    terse_share: float = 0.5
    emphasis: tuple[str, ...] = ()
    emphasis_weight: float = 2.0
    backwards_share: float = 0.5
    idle_share: float = 0.0

    def __post_init__(self) -> None:
        for name in self.emphasis:
            attribute_index(name)
        require(self.emphasis_weight > 0, "pairs.emphasis_weight", "positive", self.emphasis_weight)


def sample_pairs(
    data: SyntheticPortraits,
    count: int,
    generator: torch.Generator,
    pairs: PairConfig,
    augment: AugmentConfig,
    relations: Relations | None = None,
) -> dict[str, Tensor]:
    """`count` counterfactual edits. `relations` (default: the paper's) say which parts an attribute influences.

    Returns: source, target count×3×S×S in [-1, 1]; mask count×19×S×S of the source; difference count×13 in {-1,0,1};
             attributes, target_attributes count×13 in {0,1}; influence count×1×S×S in [0, 1].
    """
    members = data.config.variants + 1
    weights = [pairs.emphasis_weight * pairs.emphasis.count(name) or 1.0 for name in data.config.attributes]
    often = torch.tensor(weights)[torch.from_numpy(data.flipped[:, 1:].astype(np.int64))]
    drawn = torch.multinomial(often.flatten(), count, replacement=True, generator=generator)
    person, flipped = (drawn // (members - 1)).numpy(), drawn % (members - 1) + 1
    backwards = torch.rand(count, generator=generator) < pairs.backwards_share
    several = torch.rand(count, generator=generator) < (pairs.multi_share if members > 2 else 0.0)
    step = torch.randint(1, max(members - 1, 2), (count,), generator=generator)
    other = torch.where(several, (flipped - 1 + step) % (members - 1) + 1, 0)
    source, target = torch.where(backwards, flipped, other).numpy(), torch.where(backwards, other, flipped).numpy()
    # Undoing a member's flip must not ask for a look that nothing in the source tells (the person's own glasses).
    position = data.flipped[person, source]
    column = np.array([attribute_index(name) for name in data.config.attributes])[position]
    unknowable = (position >= 0) & (data.attributes[person, source, column] == 0)
    source, target = np.where(unknowable, 0, source), np.where(unknowable & (target == 0), source, target)
    mirrored = (torch.rand(count, generator=generator) < 0.5).numpy() & augment.flip
    columns = [attribute_index(name) for name in MAGGAN]
    attributes = torch.from_numpy(data.attributes[person, source][:, columns]).float()
    wanted = torch.from_numpy(data.attributes[person, target][:, columns]).float()
    images = [_read(data.images, person, member, mirrored) for member in (source, target)]
    packed = np.stack([data.masks[p, m] for p, m in zip(person, source, strict=True)])
    packed[mirrored] = cache.flip_packed_mask(packed[mirrored])
    mask = soften_mask(cache.unpack_mask(packed), augment.soften_mask_share, generator)
    before, after = augment_images([cache.unpack_image(image) for image in images], augment, generator)
    difference = wanted - attributes
    terse = (torch.rand(count, generator=generator) < pairs.terse_share) & torch.from_numpy(source == 0)
    asked = np.array([MAGGAN.index(name) for name in data.config.attributes])[data.flipped[person, target]]
    only_asked = F.one_hot(torch.from_numpy(asked), len(MAGGAN)).float() * difference
    difference = torch.where(terse[:, None], only_asked, difference)
    return {
        "source": before,
        "target": after,
        "mask": mask,
        "difference": difference,
        "attributes": attributes,
        "target_attributes": wanted,
        "influence": influence_mask(difference, mask, relations),
    }


def is_sure(probability: Tensor) -> Tensor:
    """Where a classifier's estimate of an attribute counts as knowing it, booleans of the same shape."""
    return (probability > _SURE) | (probability < 1 - _SURE)


def ask_for_what_is_there(
    batch: dict[str, Tensor], share: float, generator: torch.Generator, relations: Relations | None = None
) -> dict[str, Tensor]:
    """Turn a share of pairs into requests that a face meets already (glasses for who wears some); their result is the
    source. A person cannot know what the network takes for open, or bushy, and must not get a mouth opened twice.

    Args: batch as from `sample_pairs`; its attributes may be probabilities, of which only the sure ones are asked for.
    """
    count = len(batch["source"])
    column = torch.randint(len(MAGGAN), (count,), generator=generator)
    asked = F.one_hot(column, len(MAGGAN)).float()
    state = (batch["attributes"] * asked).sum(1)
    idle = ((torch.rand(count, generator=generator) < share) & is_sure(state))[:, None]
    difference = torch.where(idle, asked * torch.where(state > 0.5, 1.0, -1.0)[:, None], batch["difference"])
    return batch | {
        "target": torch.where(idle[..., None, None], batch["source"], batch["target"]),
        "target_attributes": torch.where(idle, batch["attributes"], batch["target_attributes"]),
        "difference": difference,
        "influence": influence_mask(difference, batch["mask"], relations),
    }


def _read(
    images: NDArray[Any], person: NDArray[Any], member: NDArray[Any], mirrored: NDArray[np.bool_]
) -> NDArray[np.uint8]:
    pixels = np.stack([images[p, m] for p, m in zip(person, member, strict=True)])
    pixels[mirrored] = pixels[mirrored][..., ::-1, :]
    return pixels


def soften_mask(mask: Tensor, share: float, generator: torch.Generator) -> Tensor:
    """Blur some masks by 3×3 or 5×5 averaging (sums stay 1): a parser's boundaries are softer than a renderer's."""
    drawn = torch.rand(mask.shape[0], generator=generator)
    for reach, chosen in ((1, drawn < share / 2), (2, (drawn >= share / 2) & (drawn < share))):
        if chosen.any():
            padded = F.pad(mask[chosen], (reach,) * 4, mode="replicate")
            mask[chosen] = F.avg_pool2d(padded, 2 * reach + 1, stride=1)
    return mask


def augment_images(images: list[Tensor], config: AugmentConfig, generator: torch.Generator) -> list[Tensor]:
    """The same random gain, gamma, tint, fading and noise on every image batch of the list (all N×3×S×S)."""
    count = images[0].shape[0]

    def draw(spread: float, channels: int = 1) -> Tensor:
        return (torch.rand(count, channels, 1, 1, generator=generator) * 2 - 1) * spread

    scale = (1 + draw(config.gain)) * (1 + draw(config.tint, 3))
    power = torch.exp(draw(config.gamma))
    fading = torch.rand(count, 1, 1, 1, generator=generator).square() * config.fading
    noise = torch.randn(images[0].shape, generator=generator) * draw(config.noise).abs()
    weights = torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)
    changed = []
    for image in images:
        light = ((image + 1) / 2).clamp(0, 1) ** power * scale
        light = light + fading * ((light * weights).sum(1, keepdim=True) - light)
        changed.append(((light + noise).clamp(0, 1)) * 2 - 1)
    return changed
