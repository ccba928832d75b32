# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest
import torch
from torch import nn

from faceedit.training.ema import ExponentialMovingAverage, HalfLife


def test_average_matches_the_closed_form() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(module.weight)
    average = ExponentialMovingAverage(module, decay=0.5)
    expected = 0.0
    for update, value in enumerate([1.0, 2.0, -3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0]):
        nn.init.constant_(module.weight, value)
        average.update(module)
        decay = min(0.5, (1 + update) / (10 + update))
        expected = decay * expected + (1 - decay) * value
        assert torch.allclose(average.module.weight, torch.tensor(expected))
    assert not average.module.weight.requires_grad


def test_buffers_are_copied_and_the_module_is_left_alone() -> None:
    module = nn.BatchNorm1d(2)
    average = ExponentialMovingAverage(module, decay=0.9)
    before = module.weight.detach().clone()
    module(torch.randn(16, 2))
    average.update(module)
    assert torch.equal(average.module.running_mean, module.running_mean)
    assert torch.equal(average.module.num_batches_tracked, module.num_batches_tracked)
    assert torch.equal(module.weight.detach(), before)
    assert module.training
    assert not average.module.training


def test_half_precision_weights_average_in_float32() -> None:
    module = nn.Linear(2, 2).to(torch.bfloat16)
    average = ExponentialMovingAverage(module, decay=0.999)
    average.update(module)
    assert average.module.weight.dtype is torch.float32


def test_half_life_counts_images() -> None:
    schedule = HalfLife(images=1000, batch_size=50, ramp_up=0)
    assert schedule.decay_at(0) ** 20 == pytest.approx(0.5)
    assert schedule.decay_at(10**6) == schedule.decay_at(0)


def test_half_life_ramps_up_with_the_images_seen() -> None:
    schedule = HalfLife(images=1000, batch_size=50, ramp_up=0.1)
    assert schedule.decay_at(0) == 0  # the first average is the first network
    # After 40 updates, 2,000 images are seen: the half-life is 200 images, four updates.
    assert schedule.decay_at(40) ** 4 == pytest.approx(0.5)
    assert schedule.decay_at(10**6) ** 20 == pytest.approx(0.5)


def test_average_follows_a_half_life() -> None:
    module = nn.Linear(1, 1, bias=False)
    nn.init.constant_(module.weight, 4.0)
    average = ExponentialMovingAverage(module, HalfLife(images=2, batch_size=2, ramp_up=0))
    nn.init.zeros_(module.weight)
    for expected in (2.0, 1.0, 0.5):
        average.update(module)
        assert average.module.weight.item() == pytest.approx(expected)
