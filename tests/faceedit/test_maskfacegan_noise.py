# SPDX-License-Identifier: Apache-2.0
"""Noise maps in one vector: views that stay views, and what is said of an edit reaches its values alone."""

from __future__ import annotations

import pytest
import torch

from faceedit.maskfacegan.noise_maps import NoiseMaps

SIDES = (4, 8, 8)


@pytest.fixture(params=[1, 3])
def noise(request: pytest.FixtureRequest) -> NoiseMaps:
    return NoiseMaps(request.param, SIDES, seed=5, device=torch.device("cpu"))


def test_every_edit_starts_with_the_same_noise(noise: NoiseMaps) -> None:
    alone = NoiseMaps(1, SIDES, seed=5, device=torch.device("cpu"))
    for noise_map, expected, px in zip(noise.maps, alone.maps, SIDES, strict=True):
        assert noise_map.shape[1:] == (1, px, px)
        assert noise_map.is_contiguous()
        assert noise_map.std() > 0.5
        assert torch.equal(noise_map, expected.expand_as(noise_map))
    assert not torch.equal(noise.values, NoiseMaps(len(noise.maps[0]), SIDES, 6, torch.device("cpu")).values)


def test_maps_follow_the_vector_and_back(noise: NoiseMaps) -> None:
    noise.values.mul_(2)
    noise.of(noise.values)[1].zero_()
    assert not noise.maps[1].any()
    assert sum(noise_map.abs().sum() for noise_map in noise.maps) == pytest.approx(noise.values.abs().sum().item())


def test_gradients_become_one_vector(noise: NoiseMaps) -> None:
    values = noise.values.requires_grad_(True)
    weights = [torch.randn_like(noise_map) for noise_map in noise.maps]
    total = sum((noise_map * weight).sum() for noise_map, weight in zip(noise.of(values), weights, strict=True))
    (gradient,) = torch.autograd.grad(total, values)
    assert torch.equal(gradient, torch.cat([weight.flatten() for weight in weights]))


def test_an_edit_is_told_from_the_others(noise: NoiseMaps) -> None:
    count = len(noise.maps[0])
    edits = torch.arange(float(count))
    spread = noise.expand(edits).expand_as(noise.values)
    for part in noise.of(spread.contiguous()):
        assert torch.equal(part, edits.view(-1, 1, 1, 1).expand_as(part))
    noise.maps[-1][count - 1, 0, 2, 3] = float("nan")
    assert noise.sums().isfinite().all(0).tolist() == [True] * (count - 1) + [False]
    torch.testing.assert_close(noise.sums().sum(0)[:-1], sum(m.flatten(1).sum(1)[:-1] for m in noise.maps))
