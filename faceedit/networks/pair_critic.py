# SPDX-License-Identifier: Apache-2.0
"""A patch discriminator for edits whose result is known (the form of pix2pix's, Isola et al. 2017)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from faceedit.networks.maggan import NUM_ATTRIBUTES
from faceedit.networks.resizing import resize

_SLOPE = 0.2


@dataclass(frozen=True, slots=True)
class PairCriticConfig:
    """Size of the patch discriminator.

    Args: base_width, max_width, channels of the first stage and their cap, doubling between; stages, halvings: three
          give patches of 38 pixels, one every eighth pixel.
    """

    base_width: int = 24
    max_width: int = 96
    stages: int = 3

    def __post_init__(self) -> None:
        for name in ("base_width", "max_width", "stages"):
            if getattr(self, name) < 1:
                raise ValueError(f"PairCriticConfig: {name} must be positive, got {getattr(self, name)}; use 1 or more")


class PairCritic(nn.Module):
    """Whether a picture is what an edit makes of a source, patch by patch.

    Flow:    (Conv4 s2, leaky ReLU) a stage, of [source, image, 4 (image − source)], the condition joined after the
             first; Conv3. No norm: it would hide how strong an edit is.
    Args:    source, image (N,3,S,S) in [-1, 1], S a multiple of 2**stages; condition (N,13,s,s) as the generator's.
    Returns: logits (N,1,S/2**stages,S/2**stages), higher where it looks like the true edit.
    Config:  PairCriticConfig.
    """

    def __init__(self, config: PairCriticConfig) -> None:
        super().__init__()
        self.config = config
        widths = [9] + [min(config.base_width * 2**stage, config.max_width) for stage in range(config.stages)]
        joined = [0, NUM_ATTRIBUTES] + [0] * (config.stages - 1)
        self.stages = nn.ModuleList(
            nn.Conv2d(before + more, after, 4, stride=2, padding=1)
            for (before, after), more in zip(pairwise(widths), joined, strict=False)
        )
        self.logits = nn.Conv2d(widths[-1] + joined[config.stages], 1, 3, padding=1)

    def forward(self, source: Tensor, image: Tensor, condition: Tensor) -> Tensor:
        x = torch.cat([source, image, 4 * (image - source)], dim=1)
        for number, stage in enumerate(self.stages):
            x = nn.functional.leaky_relu(stage(x), _SLOPE)
            if number == 0:
                x = torch.cat([x, resize(condition, x.shape[-1]).to(x.dtype)], dim=1)
        return self.logits(x)
