# SPDX-License-Identifier: Apache-2.0
"""The critic of pairs: what it is shown, where it counts, and that it misses a line that an absolute error lets go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from faceedit.networks.maggan import NUM_ATTRIBUTES
from faceedit.networks.pair_critic import PairCritic, PairCriticConfig
from faceedit.training.pair_critic import pair_critic_loss, pair_critic_penalty, pair_generator_loss

_SMALL = PairCriticConfig(base_width=8, max_width=16, stages=2)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _lines(count: int, size_px: int, seed: int) -> dict[str, Tensor]:
    """Grey squares whose true edit is one dark column, a pixel or two beside where anyone would expect it."""
    source = torch.rand(count, 3, 1, 1, generator=_generator(seed)).expand(-1, -1, size_px, size_px) * 0.5
    target = source.clone()
    for row, column in enumerate(torch.randint(7, 10, (count,), generator=_generator(seed)).tolist()):
        target[row, :, 4:-4, column] -= 0.2
    return {"source": source.contiguous(), "target": target}


@pytest.mark.parametrize("stages", [1, 2, 3])
def test_one_logit_a_patch(stages: int) -> None:
    critic = PairCritic(PairCriticConfig(base_width=4, max_width=8, stages=stages))
    image, condition = torch.zeros(2, 3, 32, 32), torch.zeros(2, NUM_ATTRIBUTES, 16, 16)
    assert critic(image, image, condition).shape == (2, 1, 32 // 2**stages, 32 // 2**stages)
    with torch.no_grad():
        asked = critic(image, image, condition + 1)
    assert not torch.equal(asked, critic(image, image, condition))


def test_width_and_stages_must_be_positive() -> None:
    with pytest.raises(ValueError, match="stages must be positive, got 0"):
        PairCriticConfig(stages=0)


def test_losses_of_a_critic_that_measures_brightness_are_closed_form() -> None:
    batch = {"source": torch.zeros(2, 3, 8, 8), "target": torch.full((2, 3, 8, 8), 0.5)}
    made = torch.full((2, 3, 8, 8), 0.2, requires_grad=True)

    def brightness(source: Tensor, image: Tensor, condition: Tensor) -> Tensor:
        return torch.nn.functional.avg_pool2d(image.mean(1, keepdim=True), 4)

    def softplus(x: float) -> float:
        return torch.nn.functional.softplus(torch.tensor(x)).item()

    condition = torch.zeros(2, NUM_ATTRIBUTES, 4, 4)
    loss = pair_critic_loss(brightness, batch, made, condition, _generator())
    # The noise is the same on all three pictures, so that a linear critic's differences don't know it.
    assert loss.item() == pytest.approx(softplus(0.2 - 0.5) + softplus(0.0 - 0.5) / 2, abs=1e-5)
    assert not loss.requires_grad  # the made picture is only looked at
    loss = pair_generator_loss(brightness, batch, made, condition, _generator())
    assert loss.item() == pytest.approx(softplus(0.5 - 0.2), abs=1e-5)
    loss.backward()
    assert made.grad is not None
    assert (made.grad < 0).all()  # brighter is truer


def test_penalty_of_a_linear_critic_is_the_square_of_a_patch_slope() -> None:
    """A patch's mean of 4×4 pixels and 3 channels has 48 slopes of 1/48, times 5: 25/48; half of it for either end."""
    batch = {"source": torch.zeros(3, 3, 16, 16), "target": torch.zeros(3, 3, 16, 16)}
    batch["target"][0] = 0.5
    batch["target"][1, :, :8] = 0.5  # half the patches, the same slope; the third pair changes nothing
    factor = torch.tensor(5.0, requires_grad=True)

    def brightness(source: Tensor, image: Tensor, condition: Tensor) -> Tensor:
        return factor * torch.nn.functional.avg_pool2d(image.mean(1, keepdim=True), 4)

    condition = torch.zeros(3, NUM_ATTRIBUTES, 8, 8)
    penalty = pair_critic_penalty(brightness, batch, batch["target"] / 2, condition, _generator())
    assert penalty.item() == pytest.approx(25 / 48)
    penalty.backward()
    assert factor.grad is not None
    assert factor.grad.item() == pytest.approx(10 / 48)


def test_only_what_the_true_edit_changes_counts() -> None:
    batch = {"source": torch.zeros(3, 3, 16, 16), "target": torch.zeros(3, 3, 16, 16)}
    batch["target"][0, :, :8, :8] = 1  # the second and third pair change nothing
    made = torch.zeros(3, 3, 16, 16, requires_grad=True)
    critic = PairCritic(PairCriticConfig(base_width=4, max_width=8, stages=1))
    # A critic of its own patch alone: no context carries a gradient out of the changed quarter.
    pair_generator_loss(
        lambda source, image, condition: torch.nn.functional.avg_pool2d(image.sum(1, keepdim=True), 8),
        batch,
        made,
        torch.zeros(3, NUM_ATTRIBUTES, 8, 8),
        _generator(),
    ).backward()
    assert made.grad is not None
    assert (made.grad[0, :, :8, :8] != 0).all()
    assert made.grad.abs().sum() == made.grad[0, :, :8, :8].abs().sum()
    batch["target"].zero_()
    condition = torch.zeros(3, NUM_ATTRIBUTES, 8, 8)
    assert pair_critic_loss(critic, batch, made, condition, _generator()).item() == 0


def test_critic_learns_to_miss_a_line() -> None:
    """Blurred over its possible places, the least absolute error but one, the line is found missing on unseen pairs."""
    torch.manual_seed(0)
    critic = PairCritic(_SMALL)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3, betas=(0.5, 0.999))

    def blurred(batch: dict[str, Tensor]) -> Tensor:
        made = batch["source"].clone()
        made[:, :, 4:-4, 7:10] -= 0.2 / 3
        return made

    condition = torch.ones(16, NUM_ATTRIBUTES, 8, 8)
    for step in range(120):
        batch = _lines(16, 16, step)
        loss = pair_critic_loss(critic, batch, blurred(batch), condition, _generator(step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen = _lines(16, 16, 1000)
    for image in (blurred(unseen), unseen["source"]):
        found = [
            pair_generator_loss(
                critic,
                {name: values[row : row + 1] for name, values in unseen.items()},
                image[row : row + 1],
                condition[:1],
                _generator(row),
            ).item()
            for row in range(16)
        ]
        # Where the critic can't tell, softplus(0) = 0.69.
        assert sum(cost > 0.8 for cost in found) >= 15
