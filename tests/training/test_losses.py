# SPDX-License-Identifier: Apache-2.0
"""Each loss against the formula written out in loops or in closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from faceedit.training import losses


def images(seed: int, count: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 4, 5, generator=generator, dtype=torch.float64) * 2 - 1


def test_masked_means() -> None:
    x, y, mask = images(0), images(1), (images(2)[:, :1] + 1) / 2
    one = 0.0
    for n in range(3):
        for c in range(3):
            for h in range(4):
                for w in range(5):
                    difference = (x[n, c, h, w] - y[n, c, h, w]).item()
                    one += mask[n, 0, h, w].item() * abs(difference)
    assert losses.masked_l1(x, y, mask).item() == pytest.approx(one / x.numel())


def test_region_means_weigh_samples_alike_and_skip_empty_regions() -> None:
    x, y = images(0), images(1)
    region = torch.zeros(3, 1, 4, 5, dtype=torch.float64)
    region[0] = 1
    region[1, 0, 2, 3] = 1
    region[2, 0, 0, 0] = 0.01  # less than a pixel: no region
    difference = x - y
    one = (difference[0].abs().mean() + difference[1, :, 2, 3].abs().mean()) / 2
    assert losses.region_l1(x, y, region).item() == pytest.approx(one.item())
    assert losses.region_l1(x, y, torch.zeros_like(region)).item() == 0


def test_region_means_as_a_share_of_the_edit() -> None:
    """Half of a strong edit and half of a fainter one cost the same; below the faintest the edit's own size counts."""
    source = torch.zeros(3, 1, 2, 2)
    sizes = torch.tensor([1.0, 0.2, 0.01]).view(3, 1, 1, 1)
    target, region = source + sizes, torch.ones(3, 1, 2, 2)
    shares = [
        losses.region_l1(target[i : i + 1] / 2, target[i : i + 1], region[:1], source[:1]).item() for i in range(3)
    ]
    assert shares == pytest.approx([0.5, 0.5, 0.1])


def test_a_square_asks_for_the_mean_of_a_line_that_may_lie_in_two_places() -> None:
    """Where an absolute error is as small without any line: the reason for the term."""
    source, region = torch.zeros(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    lines = [source.clone(), source.clone(), source.clone()]
    for row, line in enumerate(lines, start=3):
        line[:, :, row] = -0.3
    mean = torch.stack(lines).mean(0)

    def cost(made: torch.Tensor) -> tuple[float, float]:
        both = [
            (losses.faint_squared_share(made, line, source, region).item(), losses.region_l1(made, line, region).item())
            for line in lines
        ]
        return sum(square for square, _ in both) / 3, sum(absolute for _, absolute in both) / 3

    (nothing, nothing_l1), (faint, faint_l1) = cost(source), cost(mean)
    assert nothing == pytest.approx(1)
    assert faint == pytest.approx(2 / 3)
    assert faint_l1 > nothing_l1


def test_detail_is_a_share_of_the_lines_that_an_edit_draws() -> None:
    """A line without the tint around it is all the detail there is, and the tint without the line none of it."""
    source = torch.zeros(1, 3, 16, 16)
    tinted = source - 0.1
    target = tinted.clone()
    target[..., 8, 3:13] -= 0.2
    line = source.clone()
    line[..., 8, 3:13] -= 0.2
    everywhere, elsewhere = torch.ones(1, 1, 16, 16), torch.zeros(1, 1, 16, 16)
    elsewhere[..., :4, :] = 1  # four rows above the line, out of its reach

    def cost(made: torch.Tensor, region: torch.Tensor = everywhere) -> float:
        return losses.detail_share(made, target, source, region).item()

    assert cost(source) == pytest.approx(1)
    assert cost(tinted) == pytest.approx(1)
    assert cost((source + line) / 2) == pytest.approx(0.5)
    assert cost(line) == pytest.approx(0, abs=1e-5)
    assert cost(source, elsewhere) == 0


def test_squares_are_a_share_of_faint_edits_inside_the_region() -> None:
    source = torch.zeros(5, 3, 4, 4)
    target = source + torch.tensor([0.05, 0.09, 0.001, 0.5, 0.05]).view(5, 1, 1, 1)  # two faint, none, strong, faint
    region = torch.ones(5, 1, 4, 4)
    region[4] = 0
    made = target / 2
    made[1] = 0
    each = [
        losses.faint_squared_share(*(x[i : i + 1] for x in (made, target, source, region))).item() for i in range(5)
    ]
    assert each == pytest.approx([0.25, 1, 0, 0, 0])
    assert losses.faint_squared_share(made, target, source, region).item() == pytest.approx(1.25 / 2)
    region[0, :, 0] = 0
    made[0, :, 0] += 7
    assert losses.faint_squared_share(made, target, source, region).item() == pytest.approx(1.25 / 2)


def test_feature_share_is_relative_to_the_true_change() -> None:
    """Half way costs a half in a loud and in a quiet map; a sample that the edit leaves as it was has no say."""
    target = [torch.ones(3, 2, 4, 4), torch.full((3, 1, 2, 2), 0.01)]
    source = [2 * target[0], 3 * target[1]]
    for before, after in zip(source, target, strict=True):
        before[2] = after[2]
    half = [(before + after) / 2 for before, after in zip(source, target, strict=True)]
    half[0][2] += 5
    assert losses.feature_share(half, target, source).item() == pytest.approx(0.5)
    assert losses.feature_share(source, target, source).item() == pytest.approx(1)
    assert losses.feature_share(target, target, source).item() == 0
    assert losses.feature_share(target, target, target).item() == 0


def test_attribute_bce() -> None:
    logits = torch.tensor([[0.3, -2.0], [1.5, 40.0]], dtype=torch.float64)
    target = torch.tensor([[1.0, 0.0], [0.25, 1.0]], dtype=torch.float64)

    def one(logit: float, wanted: float) -> float:
        p = 1 / (1 + math.exp(-logit))
        return -(wanted * math.log(p) + ((1 - wanted) * math.log1p(-p) if wanted < 1 else 0))

    values = [[one(logits[i, j].item(), target[i, j].item()) for j in range(2)] for i in range(2)]
    assert losses.attribute_bce(logits, target).item() == pytest.approx(sum(map(sum, values)) / 4)
    weight = torch.tensor([[1.0], [0.0]], dtype=torch.float64)
    assert losses.attribute_bce(logits, target, weight).item() == pytest.approx(sum(values[0]) / 2)
    assert losses.attribute_bce(logits, target, weight * 0).item() == 0


def test_wgan_terms_have_opposite_pulls() -> None:
    real, made = torch.tensor([1.0, 3.0]), torch.tensor([-1.0, 0.0, 4.0])
    assert losses.wgan_critic_loss(real, made).item() == pytest.approx(1.0 - 2.0)
    assert losses.wgan_generator_loss(made).item() == pytest.approx(-1.0)


def test_gradient_penalty_of_a_linear_critic_is_closed_form() -> None:
    weight = nn.Parameter(torch.randn(3 * 4 * 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    penalty = losses.gradient_penalty(lambda x: x.flatten(1) @ weight, images(0), images(1))
    norm = weight.detach().norm()
    assert penalty.item() == pytest.approx((norm.item() - 1) ** 2)
    penalty.backward()
    expected = 2 * (norm - 1) * weight.detach() / norm
    assert weight.grad is not None
    assert torch.allclose(weight.grad, expected)


def test_gradient_penalty_of_a_quadratic_critic_is_taken_between_the_images() -> None:
    real, made = images(0), images(1).requires_grad_(True)
    alpha = torch.rand(3, generator=torch.Generator().manual_seed(5)).double().view(3, 1, 1, 1)
    between = real + alpha * (made.detach() - real)
    expected = ((between.flatten(1).norm(dim=1) - 1) ** 2).mean()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    penalty = losses.gradient_penalty(
        lambda x: scale * 0.5 * x.square().flatten(1).sum(1), real, made, torch.Generator().manual_seed(5)
    )
    assert penalty.item() == pytest.approx(expected.item())
    penalty.backward()
    assert made.grad is None
    assert scale.grad is not None


def test_logistic_losses() -> None:
    real, made = torch.tensor([[2.0], [-1.0]], dtype=torch.float64), torch.tensor([[0.5], [3.0]], dtype=torch.float64)

    def softplus(x: float) -> float:
        return math.log1p(math.exp(x))

    assert losses.logistic_generator_loss(made).item() == pytest.approx((softplus(-0.5) + softplus(-3.0)) / 2)
    expected = (softplus(0.5) + softplus(3.0)) / 2 + (softplus(-2.0) + softplus(1.0)) / 2
    assert losses.logistic_critic_loss(real, made).item() == pytest.approx(expected)


def test_squared_slopes_of_a_quadratic_critic() -> None:
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    x = images(4)
    logits, slopes = losses.squared_slopes(lambda image: weight * image.square().sum((1, 2, 3), keepdim=False), x)
    # D(x) = w ‖x‖²: ∇D = 2 w x, ‖∇D‖² = 4 w² ‖x‖².
    norms = x.square().sum((1, 2, 3))
    torch.testing.assert_close(slopes, 4 * weight.detach() ** 2 * norms)
    torch.testing.assert_close(logits, weight.detach() * norms)
    slopes.mean().backward()
    assert weight.grad is not None
    assert weight.grad.item() == pytest.approx(8 * 0.7 * norms.mean().item())


def test_path_lengths_of_a_linear_generator() -> None:
    generator = torch.Generator().manual_seed(3)
    jacobian = torch.randn(2, 3, 3, 4, 4, generator=generator, dtype=torch.float64)  # layers, w, image
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    ws = torch.randn(5, 2, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    made = scale * torch.einsum("nlw,lwchx->nchx", ws, jacobian)
    direction = torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64)
    lengths = losses.path_lengths(made, ws, direction)
    for n in range(5):
        total = 0.0
        for layer in range(2):
            for w in range(3):
                total += (1.5 * (jacobian[layer, w] * direction[n]).sum().item() / 4) ** 2
        assert lengths[n].item() == pytest.approx(math.sqrt(total / 2))
    lengths.sum().backward()
    assert scale.grad is not None
    assert scale.grad.item() == pytest.approx(lengths.sum().item() / 1.5)
