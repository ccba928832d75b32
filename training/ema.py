# SPDX-License-Identifier: Apache-2.0
"""Exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class ExponentialMovingAverage:
    """A float32 copy of `module` whose weights trail it: w ← d·w + (1−d)·w_now, buffers copied.

    Early on d = (1 + updates) / (10 + updates) where that is below `decay`, so that a short run does not average in
    its random initialisation.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(module).float().eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Move towards `module`'s current weights by one step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        for average, current in zip(self.module.parameters(), module.parameters(), strict=True):
            average.lerp_(current.to(average.dtype), 1 - decay)
        for buffer, latest in zip(self.module.buffers(), module.buffers(), strict=True):
            buffer.copy_(latest)
