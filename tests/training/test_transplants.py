# SPDX-License-Identifier: Apache-2.0
"""Edits carried over to photos. Drawn people stand in for the photos, so that the truth is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support.family_photos import photos_of
from torch import Tensor

from faceedit.attributes import MAGGAN, attribute_index
from faceedit.errors import OutOfRangeError, UsageError
from faceedit.labels import CELEBAMASK_HQ
from faceedit.relations import influence_mask
from faceedit.training import cache
from faceedit.training.carry_over import (
    LOOKS,
    feature_points,
    fit_affine,
    transplant,
)
from faceedit.training.data import AugmentConfig, SyntheticConfig, SyntheticPortraits
from faceedit.training.photos import UnlabelledPhotos
from faceedit.training.transplants import TransplantConfig, Transplants

PLAIN = AugmentConfig(flip=False, gain=0, gamma=0, tint=0, noise=0, soften_mask_share=0)
SIZE = 64
IDENTITY = torch.eye(2, 3)[None]
DRAWN = tuple(name for name in LOOKS if LOOKS[name].how in ("cover", "shade"))  # what drawn people lend
GROWN = tuple(name for name in LOOKS if LOOKS[name].how == "grown")


def quiet(line: str) -> None:
    """A report that keeps test output readable."""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> SyntheticPortraits:
    config = SyntheticConfig(
        size_px=SIZE,
        people=24,
        variants=len(LOOKS),
        attributes=tuple(LOOKS),
        cache_dir=str(tmp_path_factory.mktemp("families")),
    )
    return SyntheticPortraits(config, report=quiet)


@pytest.fixture(scope="module")
def photos(families: SyntheticPortraits, tmp_path_factory: pytest.TempPathFactory) -> UnlabelledPhotos:
    return photos_of(families, tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def attributes(families: SyntheticPortraits) -> Tensor:
    columns = [attribute_index(name) for name in MAGGAN]
    return torch.from_numpy(families.attributes[:, 0][:, columns]).float()


def pair_of(families: SyntheticPortraits, name: str) -> tuple[Tensor, Tensor]:
    """Images and masks 2×… of one drawn person, without the thing and with it, where it shows."""
    for person in range(len(families)):
        member = 1 + int(np.flatnonzero(families.flipped[person, 1:] == list(LOOKS).index(name))[0])
        adds = families.attributes[person, member, attribute_index(name)] == LOOKS[name].shown_as
        both = [0, member] if adds else [member, 0]
        images = cache.unpack_image(families.images[[person] * 2, both])
        if (images[0] - images[1]).abs().max() > 0.3:
            return images, cache.unpack_mask(families.masks[[person] * 2, both])
    raise AssertionError(name)


def test_the_fit_finds_a_known_map() -> None:
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(3, 6, 2, generator=generator) * 2 - 1
    known = torch.tensor([[1.1, 0.2, -0.3], [-0.1, 0.9, 0.05]]).expand(3, 2, 3)
    targets = points @ known[:, :, :2].transpose(1, 2) + known[:, None, :, 2]
    found, misfit = fit_affine(points, targets, torch.tensor([1.0, 1, 1, 1, 3, 3]))
    torch.testing.assert_close(found, known, atol=1e-5, rtol=1e-5)
    assert misfit.max() < 1e-5
    targets[1, 0] += 0.5
    _, misfit = fit_affine(points, targets, torch.ones(6))
    assert misfit[1] > 0.05 > misfit[0]


def test_features_are_found_where_they_are() -> None:
    mask = torch.zeros(2, 19, 16, 16)
    mask[:, CELEBAMASK_HQ.id("skin")] = 1
    centres = {"l_brow": (2, 2), "r_brow": (2, 10), "l_eye": (5, 2), "r_eye": (5, 10), "nose": (8, 6), "u_lip": (12, 6)}
    for name, (row, column) in centres.items():
        mask[0, CELEBAMASK_HQ.id(name), row : row + 2, column : column + 2] = 1
    points, shown = feature_points(mask)
    expected = torch.tensor([[(column + 1) / 8 - 1, (row + 1) / 8 - 1] for row, column in centres.values()])
    torch.testing.assert_close(points[0], expected)
    assert shown.tolist() == [[True] * 6, [False] * 6]


@pytest.mark.parametrize("name", DRAWN)
def test_a_person_given_their_own_thing_wears_it(families: SyntheticPortraits, name: str) -> None:
    """In place, on the same person, the result is the drawing with the thing, and nothing else changes."""
    look = LOOKS[name]
    images, masks = pair_of(families, name)
    made, mask = transplant(images[:1], masks[:1], images, masks, IDENTITY, look._replace(density=1.0))
    allowed = masks[:1, [CELEBAMASK_HQ.id(part) for part in look.parts.split()]].sum(1, keepdim=True)
    untouched = (allowed == 0).expand_as(made)
    assert torch.equal(made[untouched], images[:1][untouched])
    changed = (images[1:] - images[:1]).abs().mean(1, keepdim=True) * (allowed > 0.9)
    error = ((made - images[1:]).abs().mean(1, keepdim=True) * (allowed > 0.9)).sum()
    assert error < 0.5 * changed.sum()
    torch.testing.assert_close(mask.sum(1), torch.ones(1, SIZE, SIZE))
    glasses = CELEBAMASK_HQ.id("eye_g")
    assert (mask[:, glasses].sum() > masks[:1, glasses].sum()) == (name == "Eyeglasses")


def test_ageing_draws_no_light(families: SyntheticPortraits) -> None:
    """A lip that moves in the drawing is bright against the skin: it is no wrinkle."""
    images, masks = pair_of(families, "Young")
    grey = torch.full_like(images[:1], 0.0)
    bright = torch.where(torch.rand(images[1:].shape, generator=torch.Generator().manual_seed(0)) < 0.5, 1.0, -1.0)
    made, _ = transplant(grey, masks[:1], torch.cat([grey, bright]), masks, IDENTITY, LOOKS["Young"])
    assert ((made + 1) / 2).max() <= 0.5 * 1.15 + 1e-6
    assert ((made + 1) / 2).min() < 0.3


@pytest.mark.parametrize("removal_share", [0.0, 1.0])
def test_hair_is_only_taken_off(
    photos: UnlabelledPhotos, families: SyntheticPortraits, attributes: Tensor, removal_share: float
) -> None:
    """Whatever the share of removals: the photo is the source, and what is made of it shows no hair."""
    columns = {name: MAGGAN.index(name) for name in ("Bald", "Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair")}
    attributes = attributes.clone()
    attributes[:, columns["Bangs"]] = 1 - attributes[:, columns["Bald"]]
    config = TransplantConfig(attributes=("Bald",), removal_share=removal_share)
    batch = Transplants(photos, families, attributes, config).sample(16, torch.Generator().manual_seed(1), PLAIN)
    known = {families.images[person, 0].tobytes(): person for person in range(24)}
    for pixels in cache.pack_image(batch["source"]):
        assert attributes[known[pixels.tobytes()], columns["Bald"]] == 0
    assert (batch["difference"][:, columns["Bald"]] == 1).all()
    assert (batch["mask"][:, CELEBAMASK_HQ.id("hair")].mean((1, 2)) > 0.06).all()
    of_hair = [columns[name] for name in ("Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair")]
    assert (batch["attributes"][:, of_hair].sum(1) > 0).any()
    assert (batch["target_attributes"][:, of_hair] == 0).all()
    assert (batch["target_attributes"][:, columns["Bald"]] == 1).all()
    # Half of the edits also say that what hair they had goes; no other column is asked for.
    told = batch["difference"][:, of_hair]
    assert set(told.unique().tolist()) == {-1.0, 0.0}
    assert (batch["attributes"][:, of_hair][told == -1] == 1).all()
    assert (batch["difference"].abs().sum(1) == 1 + told.abs().sum(1)).all()


@pytest.mark.parametrize("removal_share", [0.0, 1.0])
def test_one_end_of_every_pair_is_an_untouched_photo(
    photos: UnlabelledPhotos, families: SyntheticPortraits, attributes: Tensor, removal_share: float
) -> None:
    config = TransplantConfig(attributes=DRAWN + GROWN, removal_share=removal_share)
    batch = Transplants(photos, families, attributes, config).sample(24, torch.Generator().manual_seed(3), PLAIN)
    untouched = batch["target" if removal_share else "source"]
    known = {families.images[person, 0].tobytes(): person for person in range(24)}
    kinds = set()
    for row, pixels in enumerate(cache.pack_image(untouched)):
        person = known[pixels.tobytes()]
        changed = batch["difference"][row].nonzero()
        assert len(changed) == 1
        column = int(changed)
        shown_as = LOOKS[MAGGAN[column]].shown_as
        assert attributes[person, column] == 1 - shown_as  # nobody gets what they have
        puts_on = batch["difference"][row, column] == (1 if shown_as else -1)
        assert puts_on == (removal_share == 0)
        kinds.add(MAGGAN[column])
    assert len(kinds) > 3
    expected = batch["attributes"] + batch["difference"]
    assert torch.equal(batch["target_attributes"], expected)
    assert torch.equal(batch["influence"], influence_mask(batch["difference"], batch["mask"]))
    assert (batch["source"] != batch["target"]).flatten(1).any(1).float().mean() > 0.8


@pytest.mark.parametrize("removal_share", [0.0, 1.0])
def test_hair_is_dyed_in_the_colour_asked_for_and_back_in_its_own(
    photos: UnlabelledPhotos, families: SyntheticPortraits, attributes: Tensor, removal_share: float
) -> None:
    names = ("Black_Hair", "Blond_Hair", "Brown_Hair")
    columns = [MAGGAN.index(name) for name in names]
    config = TransplantConfig(attributes=names, removal_share=removal_share)
    batch = Transplants(photos, families, attributes, config).sample(24, torch.Generator().manual_seed(3), PLAIN)
    known = {families.images[person, 0].tobytes(): person for person in range(24)}
    shown, wanted = batch["attributes"][:, columns], batch["target_attributes"][:, columns]
    asked = batch["difference"][:, columns]
    assert (wanted.sum(1) == 1).all()
    assert torch.equal(asked == 1, wanted == 1)
    assert (shown[wanted == 1] == 0).all()  # nobody gets what they have
    assert len(set(wanted.argmax(1).tolist())) == 3
    for row, pixels in enumerate(cache.pack_image(batch["target" if removal_share else "source"])):
        own = attributes[known[pixels.tobytes()], columns]
        assert torch.equal(own, (wanted if removal_share else shown)[row])
    # Half of the edits also say that the colour from before goes.
    told = (asked == -1).any(1)
    assert 0 < told.sum() < 24
    assert (shown[asked == -1] == 1).all()
    changed = (batch["target"] - batch["source"]).abs().mean(1) > 0.02
    rim = F.max_pool2d(batch["mask"][:, CELEBAMASK_HQ.id("hair")], 3, 1, 1)
    assert changed.any((1, 2)).all()
    assert rim[changed].min() > 0


@pytest.mark.parametrize("removal_share", [0.0, 0.5, 1.0])
def test_mouths_of_photos_open_and_close(
    photos: UnlabelledPhotos, families: SyntheticPortraits, attributes: Tensor, removal_share: float
) -> None:
    """The source is an untouched photo either way: nothing in moved lips tells how they were."""
    config = TransplantConfig(attributes=("Mouth_Slightly_Open",), removal_share=removal_share)
    batch = Transplants(photos, families, attributes, config).sample(16, torch.Generator().manual_seed(3), PLAIN)
    between, column = CELEBAMASK_HQ.id("mouth"), MAGGAN.index("Mouth_Slightly_Open")
    known = {families.images[person, 0].tobytes(): person for person in range(24)}
    gap = batch["mask"][:, between].mean((1, 2))  # the mask is the source's
    opened = batch["difference"][:, column] > 0
    assert opened.sum() == 16 * (1 - removal_share) if removal_share in (0, 1) else 0 < opened.sum() < 16
    for row, pixels in enumerate(cache.pack_image(batch["source"])):
        assert attributes[known[pixels.tobytes()], column] == (not opened[row])
        assert (gap[row] < 0.0012) if opened[row] else (gap[row] > 0.0025)
        assert batch["target_attributes"][row, column] == opened[row]
    assert (batch["source"] != batch["target"]).flatten(1).any(1).all()


def test_the_same_draw_gives_the_same_pairs(
    photos: UnlabelledPhotos, families: SyntheticPortraits, attributes: Tensor
) -> None:
    pool = Transplants(photos, families, attributes, TransplantConfig())
    first, again = (pool.sample(4, torch.Generator().manual_seed(7), AugmentConfig()) for _ in range(2))
    for name, values in first.items():
        assert torch.equal(values, again[name]), name


def test_mirrored_pairs_exchange_left_and_right(
    photos: UnlabelledPhotos, families: SyntheticPortraits, attributes: Tensor
) -> None:
    pool = Transplants(photos, families, attributes, TransplantConfig())
    flipping = AugmentConfig(flip=True, gain=0, gamma=0, tint=0, noise=0, soften_mask_share=0)
    plain, mirrored = (pool.sample(8, torch.Generator().manual_seed(1), augment) for augment in (PLAIN, flipping))
    turned = (plain["source"] != mirrored["source"]).flatten(1).any(1)
    assert 0 < turned.sum() < 8
    assert torch.equal(mirrored["target"][turned], plain["target"][turned].flip(-1))
    swapped = plain["mask"][turned].flip(-1)[:, list(CELEBAMASK_HQ.flip_permutation)]
    assert torch.equal(mirrored["mask"][turned], swapped)


def test_nobody_to_draw_is_refused(photos: UnlabelledPhotos, families: SyntheticPortraits, attributes: Tensor) -> None:
    everyone = attributes.clone()
    everyone[:, MAGGAN.index("Eyeglasses")] = 1
    with pytest.raises(UsageError, match="Eyeglasses with no photos without it"):
        Transplants(photos, families, everyone, TransplantConfig(attributes=("Eyeglasses",)))


def test_settings_are_checked() -> None:
    with pytest.raises(UsageError, match="Male"):
        TransplantConfig(attributes=("Male",))
    with pytest.raises(UsageError, match="not empty"):
        TransplantConfig(attributes=())
    with pytest.raises((UsageError, OutOfRangeError), match="removal_share"):
        TransplantConfig(removal_share=1.5)
