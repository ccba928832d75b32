# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import torch
from torch import nn

from faceedit.training.ema import ExponentialMovingAverage


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
