# SPDX-License-Identifier: Apache-2.0
"""The noise maps of a batch of edits in one piece of memory: what is done to all of them is done at once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NoiseMaps:
    """Maps (N,1,r,r), map after map, in one vector.

    values: the vector (Σ N·r²).   maps: views of it, which follow what is written to it.
    """

    def __init__(self, count: int, sides: Sequence[int], seed: int, device: torch.device) -> None:
        """N(0, 1), the same for every edit, batch and device, so that no edit's noise depends on its batch."""
        generator = torch.Generator().manual_seed(seed)
        drawn = (torch.randn(1, 1, px, px, generator=generator).to(device).repeat(count, 1, 1, 1) for px in sides)
        self.values = torch.cat([noise_map.flatten() for noise_map in drawn])
        self._count, self._sides = count, tuple(sides)
        self.maps = self.of(self.values)
        # Which edit a value belongs to; with one edit none needs to ask.
        owners = torch.arange(count, device=device, dtype=torch.int32)
        self._owners = torch.cat([owners.repeat_interleave(px * px) for px in sides]) if count > 1 else None

    def of(self, values: Tensor) -> list[Tensor]:
        """A vector like `values` as maps, differentiably: the gradients of all of them become one vector at once."""
        parts = values.split([self._count * px * px for px in self._sides])
        return [part.view(self._count, 1, px, px) for part, px in zip(parts, self._sides, strict=True)]

    def expand(self, edits: Tensor) -> Tensor:
        """What is given once an edit (N), for each value."""
        return edits if self._owners is None else edits.index_select(0, self._owners)

    def sums(self) -> Tensor:
        """Sums over parts of an edit's values that together are all of them, (parts, N)."""
        if self._count == 1:
            return self.values.detach().sum().view(1, 1)
        return torch.stack([noise_map.detach().flatten(1).sum(1) for noise_map in self.maps])
