# SPDX-License-Identifier: Apache-2.0
"""A scalp where hair was: its colour and place, and what shows behind hair that is gone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.bared_scalp import bare_scalp
from faceedit.training.face_frame import share_of

SIZE = 128
COLOURS = {
    "background": (0.2, 0.3, 0.7), "cloth": (0.1, 0.5, 0.2), "hair": (0.12, 0.08, 0.05), "skin": (0.8, 0.6, 0.5),
    "l_brow": (0.3, 0.2, 0.1), "r_brow": (0.3, 0.2, 0.1), "l_eye": (0.2,) * 3, "r_eye": (0.2,) * 3,
    "eye_g": (0.0, 0.0, 0.0), "hat": (0.9, 0.1, 0.1),
}  # fmt: skip


def scene(*, long: bool = False, hat: bool = False, glasses: bool = False) -> tuple[Tensor, Tensor]:
    """Photo 1×3×S×S and mask of a head of thick hair: wider and higher than the skull; long, it hides the neck."""
    y, x = torch.meshgrid(torch.arange(SIZE) + 0.5 - 64, torch.arange(SIZE) + 0.5 - 64, indexing="ij")
    ellipse = lambda cx, cy, rx, ry: ((x - cx) / rx).square() + ((y - cy) / ry).square() < 1  # noqa: E731
    layers = [
        ("background", torch.ones(SIZE, SIZE, dtype=torch.bool)),
        ("cloth", y > 44),
        ("hair", (ellipse(0, -8, 42, 48) & (y < 20)) | ((x.abs() < 42) & (y > -8) & (y < 54) & long)),
        ("skin", ellipse(0, 4, 28, 36) & (y > -18)),
        *((name, ellipse(12 * side, -8, 6, 1.6)) for name, side in (("l_brow", -1), ("r_brow", 1))),
        *((name, ellipse(12 * side, 0, 4, 2)) for name, side in (("l_eye", -1), ("r_eye", 1))),
    ]
    if glasses:
        layers.append(("eye_g", (y.abs() < 5) & (x.abs() < 38) & (x.abs() > 20)))
    if hat:
        layers.append(("hat", (y < -40) & (x.abs() < 40)))
    mask = torch.zeros(1, 19, SIZE, SIZE)
    for name, where in layers:
        mask[:, :, where] = 0
        mask[:, CELEBAMASK_HQ.id(name), where] = 1
    mask = F.avg_pool2d(F.pad(mask, (1,) * 4, mode="replicate"), 3, 1)  # a soft outline
    light = sum(
        mask[:, [CELEBAMASK_HQ.id(name)]] * torch.tensor(colour).view(1, 3, 1, 1) for name, colour in COLOURS.items()
    )
    return torch.as_tensor(light) * 2 - 1, mask


def colour_at(image: Tensor, x: int, y: int) -> Tensor:
    return (image[0, :, 64 + y, 64 + x] + 1) / 2


def like(name: str) -> Tensor:
    return torch.tensor(COLOURS[name])


def test_hair_gives_way_to_a_scalp_and_to_the_ground() -> None:
    photo, mask = scene()
    before = photo.clone(), mask.clone()
    made, parts = bare_scalp(photo, mask)
    assert torch.equal(photo, before[0])
    assert torch.equal(mask, before[1])
    assert torch.equal(made, bare_scalp(photo, mask)[0])
    assert made.abs().max() <= 1
    torch.testing.assert_close(parts.sum(1), torch.ones(1, SIZE, SIZE), atol=1e-4, rtol=0)
    assert share_of(parts, "hair").max() < 0.01
    skull = colour_at(made, 0, -26)
    torch.testing.assert_close(skull / skull.sum(), like("skin") / like("skin").sum(), atol=0.02, rtol=0)
    assert 0.8 < skull.sum() / like("skin").sum() < 1.2
    # Hair stood out at the sides and above: there the wall shows.
    for x, y in ((39, -10), (-39, -10), (0, -53)):
        torch.testing.assert_close(colour_at(made, x, y), like("background"), atol=0.06, rtol=0)
    assert share_of(parts, "skin")[0, 64 - 26, 64] > 0.95
    assert share_of(parts, "background")[0, 64 - 53, 64] > 0.95


def test_nothing_but_hair_and_its_rim_changes() -> None:
    photo, mask = scene(glasses=True)
    made, parts = bare_scalp(photo, mask)
    rim = F.max_pool2d(share_of(mask, "hair")[None], 13, 1, 6)[0] > 0
    assert torch.equal(made[:, :, ~rim[0]], photo[:, :, ~rim[0]])
    assert torch.equal(parts[:, :, ~rim[0]], mask[:, :, ~rim[0]])
    features = share_of(mask, "l_brow", "r_brow", "l_eye", "r_eye", "eye_g")[0] > 0.999
    assert features.sum() > 100
    torch.testing.assert_close(made[:, :, features], photo[:, :, features], atol=1e-5, rtol=0)


def test_what_is_behind_long_hair_is_what_is_near_it() -> None:
    made, parts = bare_scalp(*scene(long=True))
    for x in (-36, 36):
        assert share_of(parts, "cloth")[0, 64 + 50, 64 + x] > 0.7
        assert share_of(parts, "background")[0, 64 - 10, 64 + x] > 0.7
        torch.testing.assert_close(colour_at(made, x, 50), like("cloth"), atol=0.15, rtol=0)
        torch.testing.assert_close(colour_at(made, x, -10), like("background"), atol=0.15, rtol=0)


def test_a_hat_stays_on() -> None:
    photo, mask = scene(hat=True)
    made, parts = bare_scalp(photo, mask)
    worn = share_of(mask, "hat")[0] > 0.999
    assert worn.sum() > 200
    torch.testing.assert_close(made[:, :, worn], photo[:, :, worn], atol=1e-5, rtol=0)
    assert share_of(parts, "hat")[0][worn].min() > 0.99


@pytest.mark.parametrize("without", ["background", "skin"])
def test_a_mask_without_ground_or_skin_gives_no_nan(without: str) -> None:
    photo, mask = scene()
    hair, gone = CELEBAMASK_HQ.id("hair"), CELEBAMASK_HQ.id(without)
    mask = mask.clone()
    mask[:, hair] += mask[:, gone]
    mask[:, gone] = 0
    made, parts = bare_scalp(photo, mask)
    assert made.isfinite().all()
    assert parts.isfinite().all()
