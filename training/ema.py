# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


@dataclass(frozen=True, slots=True)
class HalfLife:
    """A decay by images seen: after `images` more of them the present weights count half.

    Args:   images, half-life; batch_size, images of one update, of all devices together; ramp_up, early on the
            half-life is this share of the images seen so far (0: never shortened).
    Source: Karras et al. 2020 (StyleGAN2-ADA's settings; StyleGAN has 10,000 images and no ramp).
    """

    images: float
    batch_size: int
    ramp_up: float = 0.05

    def decay_at(self, updates: int) -> float:
        """The decay of the next update, when `updates` are behind."""
        images = self.images
        if self.ramp_up > 0:
            images = min(images, updates * self.batch_size * self.ramp_up)
        return float(0.5 ** (self.batch_size / max(images, 1e-8)))


class ExponentialMovingAverage:
    """A float32 copy of `module` whose weights trail it: w ← d·w + (1−d)·w_now, buffers copied.

    With a number for `decay`, d = (1 + updates) / (10 + updates) where that is below it, so that a short run does not
    average in its random initialisation. With a HalfLife, d is its `decay_at`.
    """

    def __init__(self, module: nn.Module, decay: float | HalfLife) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)

    def next_decay(self) -> float:
        """The decay of the next update."""
        if isinstance(self.decay, HalfLife):
            return self.decay.decay_at(self.updates)
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards `module`'s current weights by one step."""
        decay = self.next_decay()
        self.updates += 1
        averages, current = list(self.module.parameters()), list(module.parameters())
        # One call for all: on a GPU a launch for each parameter would take as long as the step itself.
        move = get_ema_multi_avg_fn(decay)
        move(averages, [value.to(torch.float32) for value in current], self.updates)
        for buffer, latest in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(latest)
