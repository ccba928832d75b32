# SPDX-License-Identifier: Apache-2.0
"""Hair in another colour: which pixels change, into what, and what of the hair stays."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.dyed_hair import COLOURS, dye_hair

SIZE = 64
HAIR, SKIN, WALL = (CELEBAMASK_HQ.id(part) for part in ("hair", "skin", "background"))
LUMINANCE = torch.tensor([0.2126, 0.7152, 0.0722]).view(1, 3, 1, 1)


def linear(encoded: Tensor) -> Tensor:
    return torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def encoded(light: Tensor) -> Tensor:
    return torch.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def scene(hair: Tensor, skin: float = 0.33, wall: float = 0.6) -> tuple[Tensor, Tensor, Tensor]:
    """Photo 1×3×S×S and mask of a head of hair (its linear light, 1×1×S×S or 1×3×S×S) over skin of that luminance,
    before a wall; and how much of each pixel is hair."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5, torch.arange(SIZE) + 0.5, indexing="ij")
    radius = ((x - SIZE / 2).square() + (y - SIZE / 2).square()).sqrt()
    alpha = ((24 - radius) / 2 + 0.5).clamp(0, 1) * (y < SIZE / 2).float()
    face = (radius < 24).float() * (y >= SIZE / 2)
    behind = wall * (1 - face) + skin * face
    light = torch.lerp(behind.expand(1, 3, SIZE, SIZE), hair.expand(1, 3, SIZE, SIZE), alpha)
    mask = torch.zeros(1, 19, SIZE, SIZE)
    mask[:, HAIR], mask[:, SKIN] = alpha, face
    mask[:, WALL] = 1 - alpha - face
    return encoded(light) * 2 - 1, mask, alpha


def light_of(image: Tensor) -> Tensor:
    return linear(((image + 1) / 2).clamp(0, 1))


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("grey", [0.02, 0.2, 0.5])
def test_hair_of_one_tone_gets_the_colour(name: str, grey: float) -> None:
    photo, mask, alpha = scene(torch.full((1, 1, 1, 1), grey))
    before = photo.clone(), mask.clone()
    made = dye_hair(photo, mask, name)
    assert torch.equal(photo, before[0])
    assert torch.equal(mask, before[1])
    assert torch.equal(made, dye_hair(photo, mask, name))
    wanted = torch.tensor(COLOURS[name]).view(1, 3, 1, 1) / 255 * 2 - 1
    core = F.max_pool2d(-alpha[None, None], 5, 1, 2).neg() > 0.999
    torch.testing.assert_close(
        made[core.expand_as(made)], wanted.expand_as(made)[core.expand_as(made)], atol=0.02, rtol=0
    )


@pytest.mark.parametrize("name", COLOURS)
def test_nothing_but_hair_changes(name: str) -> None:
    photo, mask, alpha = scene(torch.full((1, 1, 1, 1), 0.05))
    made = dye_hair(photo, mask, name)
    bare = (F.max_pool2d(alpha[None, None], 5, 1, 2) == 0).expand_as(made)
    assert bare.float().mean() > 0.3
    assert torch.equal(made[bare], photo[bare])


def test_the_rim_is_a_mixture_of_the_new_colour_and_what_is_behind() -> None:
    """Also where the mask has the rim a pixel too far inside: the photo tells."""
    photo, mask, alpha = scene(torch.full((1, 1, 1, 1), 0.03))
    small = F.max_pool2d(-mask[:, [HAIR]], 3, 1, 1).neg()
    mask[:, WALL] += mask[:, HAIR] - small[:, 0]
    mask[:, HAIR] = small[:, 0]
    made = light_of(dye_hair(photo, mask, "Blond_Hair"))
    blond = linear(torch.tensor(COLOURS["Blond_Hair"]).view(1, 3, 1, 1) / 255)
    rim = (alpha > 0.05) & (alpha < 0.95)
    rim[SIZE // 2 - 3 :] = False  # where skin begins too
    assert rim.sum() > 40
    error = (made - torch.lerp(torch.full_like(made, 0.6), blond.expand_as(made), alpha))[:, :, rim].abs().mean()
    undyed = (light_of(photo) - torch.lerp(torch.full_like(made, 0.6), blond.expand_as(made), alpha))[:, :, rim]
    assert error < 0.3 * undyed.abs().mean()


@pytest.mark.parametrize("name", COLOURS)
def test_strands_keep_their_order_of_lightness(name: str) -> None:
    strands = 0.02 + 0.1 * torch.rand(1, 1, 1, SIZE, generator=torch.Generator().manual_seed(0))
    photo, mask, alpha = scene(strands)
    made = dye_hair(photo, mask, name)
    core = F.max_pool2d(-alpha[None, None], 5, 1, 2)[0, 0].neg() > 0.999
    before, after = ((light_of(image) * LUMINANCE).sum(1)[0][core] for image in (photo, made))
    # Far lighter or darker strands than the mean are of one tone.
    relative = before / before.log().mean().exp()
    told = (relative > 0.2) & (relative < 2)
    order = before[told].argsort()
    assert (after[told][order].diff() >= -1e-4).all()
    assert after[told].std() > 0.1 * after[told].mean()


def test_hair_that_was_dyed_is_dyed_as_if_it_never_had_been() -> None:
    strands = 0.03 + 0.05 * torch.rand(1, 1, 1, SIZE, generator=torch.Generator().manual_seed(1))
    photo, mask, _ = scene(strands)
    once = dye_hair(photo, mask, "Brown_Hair")
    by_way_of_blond = dye_hair(dye_hair(photo, mask, "Blond_Hair"), mask, "Brown_Hair")
    untouched = (photo - once).abs().mean()
    assert (by_way_of_blond - once).abs().mean() < 0.35 * untouched


def test_hair_in_a_dark_photo_is_darker() -> None:
    means = []
    for exposure in (0.4, 1.0):
        photo, mask, alpha = scene(torch.full((1, 1, 1, 1), 0.1 * exposure), 0.33 * exposure, 0.6 * exposure)
        means.append(float((light_of(dye_hair(photo, mask, "Blond_Hair")) * LUMINANCE).sum(1)[0][alpha > 0.99].mean()))
    assert means[0] < 0.75 * means[1]
