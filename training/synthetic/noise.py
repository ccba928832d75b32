# SPDX-License-Identifier: Apache-2.0
"""Seeded value noise: each person owns a small table of random numbers that textures look up, so a texture does not
depend
on the batch, on the resolution or on the order of drawing."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TABLE = 64


class NoiseField:
    """Random tables of N people, 4×64×64 each; `stream` tells the appearances of one person apart."""

    def __init__(self, seeds: Tensor, stream: int = 0) -> None:
        tables = []
        for seed in seeds.tolist():
            generator = torch.Generator().manual_seed((seed * 2_654_435_761 + 97 * stream + 13) % (1 << 62))
            tables.append(torch.rand(4, TABLE, TABLE, generator=generator))
        self.tables = (torch.stack(tables) if tables else torch.empty(0, 4, TABLE, TABLE)).to(seeds.device) * 2 - 1

    def sample(self, u: Tensor, v: Tensor, channel: int = 0) -> Tensor:
        """Noise in [-1,1] at (u, v) N×H×W, one lattice cell a unit, repeating every 64 by reflection."""
        grid = torch.stack([u, v], -1) * (2 / TABLE)
        out = F.grid_sample(
            self.tables[:, channel : channel + 1], grid, mode="bilinear", padding_mode="reflection", align_corners=False
        )
        return out[:, 0]

    def cloud(self, x: Tensor, y: Tensor, frequency: float | Tensor, channel: int = 0) -> Tensor:
        """Two octaves, roughly in [-1,1]."""
        coarse = self.sample(x * frequency, y * frequency, channel)
        fine = self.sample(x * frequency * 2.3 + 7.1, y * frequency * 2.3 - 3.7, channel)
        return 0.7 * coarse + 0.3 * fine

    def wave(self, t: Tensor, frequency: float | Tensor, channel: int = 1, offset: float = 0.0) -> Tensor:
        """Noise along one coordinate (N×H×W), for ragged edges."""
        return self.sample(t * frequency, torch.full_like(t, 0.5 + offset), channel)
