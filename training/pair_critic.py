# SPDX-License-Identifier: Apache-2.0
"""What the pair critic and the generator make of each other, where a true edit is known.

An absolute error leaves out a thin line whose place is not quite sure, and a frozen classifier is pleased by patterns
that no eye sees. A critic that compares true edits with made ones learns what is missing, as it is missing. It is also
shown sources without any edit as false, so that doing nothing never passes (matching-aware, Reed et al. 2016).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.training.losses import moved_pixels, squared_slopes

Critic = Callable[[Tensor, Tensor, Tensor], Tensor]
PENALTY_EVERY = 4
"""On every which step the penalty is taken, as often as it counts (lazy regularisation, Karras et al. 2020)."""

_NOISE = 0.02  # of the range [-1, 1]: what is less than a rounding or two must not tell the made from the true
_TINY = 1e-6


def pair_critic_loss(
    critic: Critic, batch: dict[str, Tensor], made: Tensor, condition: Tensor, generator: torch.Generator
) -> Tensor:
    """E softplus(D(made) − D(true)) + ½ E softplus(D(source) − D(true)), over what the true edit changes.

    Args: batch with source and target P×3×S×S in [-1, 1]; made P×3×S×S, from which no gradient goes on; condition
          P×13×s×s as the generator's; generator draws the noise, the same on all three, on the CPU.
    """
    source, target = batch["source"], batch["target"]
    noise = _noise(source, generator)
    shown = torch.cat([target + noise, made.detach() + noise, source + noise])
    logits = critic(source.repeat(3, 1, 1, 1), shown, condition.repeat(3, 1, 1, 1)).float()
    of_true, of_made, of_nothing = logits.chunk(3)
    terms = F.softplus(of_made - of_true) + F.softplus(of_nothing - of_true) / 2
    return _mean_where_moved(terms, source, target)


def pair_generator_loss(
    critic: Critic, batch: dict[str, Tensor], made: Tensor, condition: Tensor, generator: torch.Generator
) -> Tensor:
    """E softplus(D(true) − D(made)) over what the true edit changes; arguments as above."""
    source, target = batch["source"], batch["target"]
    noise = _noise(source, generator)
    of_made = critic(source, made + noise, condition).float()
    with torch.no_grad():
        of_true = critic(source, target + noise, condition).float()
    return _mean_where_moved(F.softplus(of_true - of_made), source, target)


def pair_critic_penalty(
    critic: Critic, batch: dict[str, Tensor], made: Tensor, condition: Tensor, generator: torch.Generator
) -> Tensor:
    """½ E ‖∇D(true)‖² + ½ E ‖∇D(made)‖² of a patch's logit, over what the true edit changes (R1 and R2).

    It keeps the critic from growing ever steeper; a strong one keeps it silent. Patches take part with random signs in
    one sum, whose squared slope has the sum of the patches' own as its mean. Arguments as above.
    Source: Mescheder et al. 2018; Huang et al. 2024 (R3GAN), for critics of differences.
    """
    source, target = batch["source"], batch["target"]
    noise = _noise(source, generator)
    shown = torch.cat([target + noise, made.detach() + noise])
    sources, conditions = source.repeat(2, 1, 1, 1), condition.repeat(2, 1, 1, 1)

    def shared(image: Tensor) -> Tensor:
        logits = critic(sources, image, conditions).float()
        moved = _moved_patches(source, target, logits)
        area = moved.sum(dim=(1, 2, 3), keepdim=True)
        signs = (torch.randint(2, moved.shape, generator=generator) * 2 - 1).to(moved)
        return logits * ((moved / area.clamp_min(_TINY)).sqrt() * signs).repeat(2, 1, 1, 1)

    _, slopes = squared_slopes(shared, shown)
    present = moved_pixels(source, target).amax(dim=(1, 2, 3)) > 0
    return slopes.sum() / 2 / present.sum().clamp_min(1)


def _noise(like: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randn(like.shape, generator=generator) * _NOISE).to(like)


def _mean_where_moved(values: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """The mean of patch values P×1×h×w over patches that the true edit changes, then over the pairs that have some."""
    moved = _moved_patches(source, target, values)
    area = moved.sum(dim=(1, 2, 3))
    inside = (values * moved).sum(dim=(1, 2, 3)) / area.clamp_min(_TINY)
    present = (area > 0).to(inside.dtype)
    return (inside * present).sum() / present.sum().clamp_min(1)


def _moved_patches(source: Tensor, target: Tensor, values: Tensor) -> Tensor:
    """How far the true edit changes each of the patches that `values` P×1×h×w belong to, P×1×h×w in [0, 1]."""
    return F.adaptive_max_pool2d(moved_pixels(source, target), values.shape[-2:])
