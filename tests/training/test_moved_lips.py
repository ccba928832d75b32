# SPDX-License-Identifier: Apache-2.0
"""A mouth that opens or closes on a photo: what moves, what shows, what stays. Faces are drawn from a few shapes."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.face_frame import along_the_eyes, centre, eye_line, share_of
from faceedit.training.moved_lips import close_mouth, open_mouth

SIZE = 128
SKIN, LIP, TEETH = (
    torch.tensor(colour).view(1, 3, 1, 1) for colour in ((0.75, 0.55, 0.45), (0.6, 0.3, 0.3), (0.95,) * 3)
)
PARTS = ("skin", "nose", "l_eye", "r_eye", "u_lip", "mouth", "l_lip")


def scene(gap: float = 0.0, tilt: float = 0.0, tone: Tensor = SKIN) -> tuple[Tensor, Tensor]:
    """Photo 1×3×S×S and mask of a face, lips 16 px to either side of the middle, parted by `gap` px, turned by `tilt`
    degrees; bars of another brightness run across it, so that what moves is seen."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5 - 64, torch.arange(SIZE) + 0.5 - 64, indexing="ij")
    turn = math.radians(tilt)
    x, y = x * math.cos(turn) + y * math.sin(turn), y * math.cos(turn) - x * math.sin(turn)

    def within(signed: Tensor) -> Tensor:
        return (signed + 0.5).clamp(0, 1)

    def blob(cx: float, cy: float, rx: float, ry: float) -> Tensor:
        return within((1 - ((x - cx) / rx).square().add(((y - cy) / ry).square()).sqrt()) * min(rx, ry))

    lens = (1 - (x / 16).square()).clamp_min(0).sqrt()
    level = y - 22
    shares = dict.fromkeys(PARTS, torch.zeros(SIZE, SIZE))
    shares["skin"] = blob(0, 4, 40, 46)
    shares["nose"] = blob(0, 2, 6, 8)
    for name, side in (("l_eye", -1), ("r_eye", 1)):
        shares[name] = blob(17 * side, -10, 5, 2.5)
    half = gap / 2 * lens
    shares["mouth"] = within(half - level.abs()) * (gap > 0)
    shares["u_lip"] = within(4 * lens + half + level) * within(-half - level) * (x.abs() < 16)
    shares["l_lip"] = within(5 * lens + half - level) * within(level - half) * (x.abs() < 16)
    mask = torch.zeros(1, 19, SIZE, SIZE)
    left = torch.ones(SIZE, SIZE)
    for name in reversed(PARTS):
        mask[:, CELEBAMASK_HQ.id(name)] = torch.minimum(shares[name], left)
        left = left - mask[0, CELEBAMASK_HQ.id(name)]
    mask[:, CELEBAMASK_HQ.id("background")] = left
    bars = 1 + 0.1 * torch.sign(torch.sin(y * math.pi / 3))
    light = tone * bars
    for part, colour in (("u_lip", LIP), ("l_lip", LIP), ("mouth", TEETH)):
        light = torch.lerp(light, colour.expand_as(light), mask[:, [CELEBAMASK_HQ.id(part)]])
    return light.expand(1, 3, SIZE, SIZE) * 2 - 1, mask


def part(mask: Tensor, *names: str) -> Tensor:
    return share_of(mask, *names)[0]


def rows_of(weight: Tensor) -> tuple[int, int]:
    rows = (weight > 0.5).any(1).nonzero()
    return int(rows.min()), int(rows.max())


@pytest.mark.parametrize("tilt", [0.0, 15.0])
def test_an_opened_mouth_shows_teeth_between_its_own_lips(tilt: float) -> None:
    photo, mask = scene(tilt=tilt)
    before = photo.clone(), mask.clone()
    made, parts = open_mouth(photo, mask)
    assert torch.equal(photo, before[0])
    assert torch.equal(mask, before[1])
    assert torch.equal(made, open_mouth(photo, mask)[0])
    assert made.abs().max() <= 1
    torch.testing.assert_close(parts.sum(1), torch.ones(1, SIZE, SIZE), atol=0.02, rtol=0)
    between = part(parts, "mouth")
    # A third of half the width of 32 px, as a lens over nearly all of it.
    assert 70 < between.sum() < 150
    across, down = along_the_eyes(mask, centre(part(mask, "u_lip", "l_lip")[None]))
    wide = across[between[None] > 0.5]
    assert wide.max() - wide.min() > 0.8 * 32 * 2 / SIZE
    shown = between[None] > 0.9
    teeth = shown & (across.abs() < 0.1) & (down < down[shown].quantile(0.6))
    grey = (made + 1).mean(1) / 2
    skin = part(mask, "skin")[None] > 0.99
    assert grey[teeth].mean() > 1.1 * ((photo + 1).mean(1) / 2)[skin].mean()
    corner = shown & (across.abs() > 0.9 * across[shown].abs().max())
    assert grey[corner].mean() < 0.6 * grey[teeth].mean()
    # The lips keep their area, nearly, and lie above and below.
    for name, side in (("u_lip", -1), ("l_lip", 1)):
        assert part(parts, name).sum() == pytest.approx(float(part(mask, name).sum()), rel=0.2)
        moved = torch.tensor(centre(part(parts, name)[None])) - torch.tensor(centre(part(mask, name)[None]))
        along = eye_line(mask)
        step = float(moved[1] * along[0] - moved[0] * along[1]) * SIZE / 2
        assert (0.4 < -step < 2.5) if side < 0 else (2 < step < 6)


def test_nothing_beyond_nose_and_chin_moves() -> None:
    photo, mask = scene()
    chin = rows_of(part(mask, "skin"))[1]
    for made in (open_mouth(photo, mask)[0], close_mouth(*scene(gap=7))[0] - scene(gap=7)[0] + photo):
        changed = (made - photo).abs().amax(1)[0] > 0.02
        rows, columns = changed.nonzero(as_tuple=True)
        assert rows.min() >= 64 + 8  # the nose's lower end
        assert rows.max() <= chin
        assert columns.min() >= 64 - 20
        assert columns.max() <= 64 + 20


def test_a_closed_mouth_shows_no_teeth_and_keeps_its_lips() -> None:
    photo, mask = scene(gap=7)
    made, parts = close_mouth(photo, mask)
    assert made.abs().max() <= 1
    torch.testing.assert_close(parts.sum(1), torch.ones(1, SIZE, SIZE), atol=0.02, rtol=0)
    assert part(parts, "mouth").max() == 0
    light = (made + 1) / 2
    assert (photo + 1).div(2).amin(1)[0][part(mask, "mouth") > 0.99].min() > 0.9
    core = F.max_pool2d(-part(parts, "u_lip", "l_lip")[None, None], 3, 1, 1)[0, 0] < -0.9
    assert core.sum() > 60
    redness = light[0, 0] - light[0, 1]
    assert redness[core].mean() > 0.2  # the lips': 0.3; of teeth 0
    assert light[0, 1][core].max() < 0.5
    before = rows_of(part(mask, "u_lip", "mouth", "l_lip"))
    after = rows_of(part(parts, "u_lip", "l_lip"))
    assert after[1] - after[0] < before[1] - before[0] - 2


def test_open_and_closed_again_is_near_the_photo() -> None:
    photo, mask = scene()
    made, parts = open_mouth(photo, mask)
    again, _ = close_mouth(made, parts)
    lips = F.max_pool2d(part(mask, "u_lip", "l_lip")[None, None], 5, 1, 2)[0, 0] > 0.5
    opened, closed = ((x - photo).abs().mean(1)[0][lips].mean() for x in (made, again))
    assert closed < 0.5 * opened


def test_teeth_have_the_light_of_the_photo() -> None:
    grey = torch.full((1, 3, 1, 1), 0.5)
    photo, mask = scene(tone=grey)
    shown = None
    means = []
    for gain in (1.0, 0.4):
        made, parts = open_mouth((photo + 1) * gain - 1, mask)
        shown = parts[:, CELEBAMASK_HQ.id("mouth")][0] > 0.99
        means.append((made[0, :, shown] + 1).mean(1) / 2)
    torch.testing.assert_close(means[1], 0.4 * means[0], atol=0.01, rtol=0.02)
    assert means[0].max() - means[0].min() < 0.01  # a photo without colour gets teeth without
