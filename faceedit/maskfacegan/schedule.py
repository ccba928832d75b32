# SPDX-License-Identifier: Apache-2.0
"""Which terms act in which iteration of the latent stage. Within a phase every iteration is alike."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from faceedit.maskfacegan.config import MaskFaceGANConfig


@dataclass(frozen=True, slots=True)
class Phase:
    """Iterations start … stop - 1.

    is_constrained: semantics, shape and size act beside the appearance. restarts: Adam is made anew before `start`.
    updates_masks: masks follow the image of each iteration. has_noise: N(0, 1) maps; without, none.
    """

    start: int
    stop: int
    is_constrained: bool
    restarts: bool
    updates_masks: bool
    has_noise: bool


def latent_phases(config: MaskFaceGANConfig, *, is_global: bool, from_mean: bool) -> tuple[Phase, ...]:
    """The phases of the latent stage, in order.

    Args:   is_global, the edit is of the whole face: constrained throughout, no restart, masks as they are;
            from_mean, False when the latent code was given or encoded: the first iterations are then left out.
    Source: Pernuš et al. 2023, the released schedule.
    """
    first = 0 if from_mean else config.encoder_start
    borders = {first, config.noise_start, config.latent_steps}
    if not is_global:
        borders |= {config.semantic_start} | ({config.dynamic_stop} if config.dynamic else set())
    inside = sorted(border for border in borders if first <= border <= config.latent_steps)
    phases = []
    for start, stop in pairwise(inside):
        constrained = is_global or start >= config.semantic_start
        phases.append(
            Phase(
                start=start,
                stop=stop,
                is_constrained=constrained,
                restarts=not is_global and start == config.semantic_start and start > first,
                updates_masks=config.dynamic and not is_global and constrained and start < config.dynamic_stop,
                has_noise=start >= config.noise_start,
            )
        )
    return tuple(phases)
