# SPDX-License-Identifier: Apache-2.0
"""Hair that grows on a photo: where it lies, what it spares, whose colour it has. Drawn people stand in for photos."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training import cache
from faceedit.training.carry_over import LOOKS, feature_points
from faceedit.training.data import SyntheticConfig, SyntheticPortraits
from faceedit.training.grown_hair import grow_bangs, grow_beard, grow_brows, grow_moustache

SIZE = 96
GROW: dict[str, Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]] = {
    "Bangs": grow_bangs,
    "Bushy_Eyebrows": grow_brows,
    "Mustache": grow_moustache,
    "No_Beard": grow_beard,
}


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[Tensor, Tensor]]:
    """Pictures and masks of drawn people whose features and hair show, and whose forehead is free."""
    config = SyntheticConfig(
        size_px=SIZE, people=40, variants=0, tinted_share=0.0, cache_dir=str(tmp_path_factory.mktemp("people"))
    )
    drawn = SyntheticPortraits(config, report=lambda line: None)
    masks = cache.unpack_mask(np.array(drawn.masks[:, 0]))
    images = cache.unpack_image(np.array(drawn.images[:, 0]))
    shown = feature_points(masks)[1].all(1)
    haired = share(masks, "hair").mean((1, 2)) > 0.1
    middle = slice(SIZE // 2 - 8, SIZE // 2 + 8)
    free = (share(masks, "skin")[:, :, middle].amax(2).argmax(1) < feature_rows(masks) - SIZE // 8) & ~(
        share(masks, "eye_g").mean((1, 2)) > 0.001
    )
    chosen = (shown & haired & free).nonzero()[:6, 0].tolist()
    assert len(chosen) >= 4
    return [(images[at : at + 1], masks[at : at + 1]) for at in chosen]


def share(mask: Tensor, *parts: str) -> Tensor:
    return mask[:, [CELEBAMASK_HQ.id(part) for part in parts]].sum(1)


def feature_rows(masks: Tensor) -> Tensor:
    """The row of the brows of every mask."""
    return (feature_points(masks)[0][:, :2, 1].mean(1) + 1) / 2 * masks.shape[-1]


def changed(photo: Tensor, made: Tensor, more_than: float = 0.08) -> Tensor:
    return (made - photo).abs().mean(1)[0] > more_than


@pytest.mark.parametrize("name", GROW)
def test_only_its_parts_change(people: list[tuple[Tensor, Tensor]], name: str) -> None:
    for photo, mask in people:
        before = photo.clone(), mask.clone()
        made, made_mask = GROW[name](photo, mask)
        assert torch.equal(photo, before[0])
        assert torch.equal(mask, before[1])
        allowed = share(mask, *LOOKS[name].parts.split())[:, None]
        rim = F.max_pool2d(allowed, 5, 1, 2)  # a shadow on soft skin
        spared = (rim == 0).expand_as(made)
        torch.testing.assert_close(made[spared], photo[spared], atol=1e-6, rtol=0)
        assert made.abs().max() <= 1
        torch.testing.assert_close(made_mask.sum(1), mask.sum(1))
        assert changed(photo, made).sum() > 12
        again, _ = GROW[name](photo, mask)
        assert torch.equal(made, again)


def test_a_moustache_lies_between_nose_and_mouth(people: list[tuple[Tensor, Tensor]]) -> None:
    for photo, mask in people:
        made, made_mask = grow_moustache(photo, mask)
        assert torch.equal(made_mask, mask)
        x, y = moved_centre(photo, made)
        points = feature_points(mask)[0][0]
        nose_y, (mouth_x, mouth_y) = float(points[4, 1]), points[5].tolist()
        assert nose_y < y < mouth_y
        assert abs(x - mouth_x) < 0.06
        # As wide as the mouth, about.
        lips = share(mask, "u_lip", "mouth", "l_lip")[0]
        width = (lips.amax(0) > 0.5).sum()
        assert 0.6 * width < changed(photo, made).any(0).sum() < 1.5 * width


def test_a_beard_runs_around_the_mouth_to_the_chin(people: list[tuple[Tensor, Tensor]]) -> None:
    for photo, mask in people:
        made, made_mask = grow_beard(photo, mask)
        assert torch.equal(made_mask, mask)
        grown = changed(photo, made)
        lips = share(mask, "u_lip", "mouth", "l_lip")[0] > 0.5
        lip_rows, lip_columns = lips.nonzero(as_tuple=True)
        under = slice(int(lip_rows.max()), None), slice(lip_columns.min(), lip_columns.max())
        skin = share(mask, "skin")[0][under] > 0.9
        bare = round(0.5 * float(skin.any(1).sum()))  # below the lip
        assert grown[under][bare:][skin[bare:]].float().mean() > 0.8
        assert not grown[share(mask, "u_lip", "mouth", "l_lip")[0] > 0.9].any()
        assert not grown[: int(feature_rows(mask))].any()
        # On both cheeks, as far as the face goes and beyond the corners of the mouth.
        columns = grown.any(0).nonzero()[:, 0]
        assert columns.min() < lip_columns.min()
        assert columns.max() > lip_columns.max()
        top = int(lip_rows.min())
        assert grown[top - 3 : top, lip_columns.min() : lip_columns.max()].float().mean() < 0.3  # no moustache


def test_bangs_reach_from_the_hair_to_the_brows(people: list[tuple[Tensor, Tensor]]) -> None:
    hair = CELEBAMASK_HQ.id("hair")
    for photo, mask in people:
        _, made_mask = grow_bangs(photo, mask)
        brow_row = float(feature_rows(mask))
        eye_row = float((feature_points(mask)[0][0, 2:4, 1].mean() + 1) / 2 * SIZE)
        column = round(float((feature_points(mask)[0][0, 2:4, 0].mean() + 1) / 2 * SIZE))
        middle = made_mask[0, hair, :, column - 3 : column + 4].mean(1)
        top = int((mask[0, hair, :, column - 3 : column + 4].mean(1) > 0.5).nonzero()[0])
        assert (middle[top : int(brow_row) - 4] > 0.5).all()
        assert (middle[round(eye_row) :] < 0.1).all()
        assert (made_mask[:, hair] >= mask[:, hair] - 1e-6).all()


def test_brows_become_higher_and_darker(people: list[tuple[Tensor, Tensor]]) -> None:
    for photo, mask in people:
        made, made_mask = grow_brows(photo, mask)
        for name in ("l_brow", "r_brow"):
            before, after = share(mask, name).sum(), share(made_mask, name).sum()
            assert 1.15 * before < after < max(2.6 * before, 0.008 * SIZE**2)  # a thin line of a brow becomes a brow
            place = share(made_mask, name)[0] > 0.8
            assert made[0, :, place].mean() < photo[0, :, place].mean() - 0.05
        eyes = share(mask, "l_eye", "r_eye")[0] > 0.9
        torch.testing.assert_close(made[0, :, eyes], photo[0, :, eyes], atol=0.02, rtol=0)


@pytest.mark.parametrize("name", GROW)
def test_it_follows_the_face(people: list[tuple[Tensor, Tensor]], name: str) -> None:
    """Tilted and moved, the face has its hair tilted and moved, but for what resampling blurs."""
    photo, mask = people[0]
    angle = math.radians(15)
    turn = torch.tensor([[[math.cos(angle), -math.sin(angle), 0.05], [math.sin(angle), math.cos(angle), -0.04]]])

    def moved(x: Tensor) -> Tensor:
        grid = F.affine_grid(turn, list(x.shape), align_corners=False)
        return F.grid_sample(x, grid, padding_mode="border", align_corners=False)

    there, _ = GROW[name](moved(photo), moved(mask))
    back = moved(GROW[name](photo, mask)[0])
    effect = (back - moved(photo)).abs().sum()
    assert (there - back).abs().sum() < 0.5 * effect


@pytest.mark.parametrize("name", GROW)
def test_the_colour_is_the_photos_own(people: list[tuple[Tensor, Tensor]], name: str) -> None:
    """Red hair and brows give red hair."""
    photo, mask = people[0]
    hair = share(mask, "hair", "l_brow", "r_brow")[:, None]
    red = torch.tensor([0.0, -0.8, -0.9]).view(1, 3, 1, 1)
    dyed = torch.lerp(photo, red.expand_as(photo), hair)
    made, _ = GROW[name](dyed, mask)
    place = changed(dyed, made, 0.15) & (hair[0, 0] < 0.1)
    assert place.sum() > 5
    colour = (made[0, :, place].mean(1) + 1) / 2
    assert colour[0] > 1.5 * colour[1:].max()


def test_white_hair_gives_a_moustache_that_is_seen(people: list[tuple[Tensor, Tensor]]) -> None:
    photo, mask = people[0]
    skin = share(mask, "skin", "nose")[:, None]
    pale = torch.lerp(photo, torch.full_like(photo, 0.6), skin)
    white = torch.lerp(pale, torch.ones_like(photo), share(mask, "hair", "l_brow", "r_brow")[:, None])
    made, _ = grow_moustache(white, mask)
    place = changed(white, made, 0.3)
    assert place.sum() > 20
    assert ((made[0, :, place] + 1) / 2).mean() < 0.75 * 0.8


def moved_centre(photo: Tensor, made: Tensor) -> tuple[float, float]:
    """Where the change lies, in [-1, 1]."""
    rows, columns = changed(photo, made).nonzero(as_tuple=True)
    return tuple(float((at.float().mean() + 0.5) / SIZE * 2 - 1) for at in (columns, rows))  # type: ignore[return-value]
