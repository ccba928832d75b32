# SPDX-License-Identifier: Apache-2.0
"""Adaptive augmentation: what it leaves alone, what it changes, that R1 can go through it, and how p moves."""

from __future__ import annotations

import math

import pytest
import torch

from faceedit.errors import OutOfRangeError
from faceedit.training.adaptive_augmentation import (
    SYM6,
    AdaptiveProbability,
    Augmentation,
    AugmentationConfig,
    count_signs,
    draw_augmentation,
    recolour,
    warp,
)

SIZE = 16


def draw(probability: float, count: int = 64, seed: int = 0, **fields: bool) -> Augmentation:
    generator = torch.Generator().manual_seed(seed)
    return draw_augmentation(AugmentationConfig(**fields), probability, count, SIZE, generator)


def noise(count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(5), dtype=dtype)


def matrix(*rows: tuple[float, float, float]) -> torch.Tensor:
    return torch.tensor([rows], dtype=torch.float64)


def test_probability_zero_is_the_identity_bit_for_bit() -> None:
    image = noise(64)
    assert torch.equal(draw(0.0).apply(image), image)


def test_probability_one_changes_every_image() -> None:
    image = noise(64)
    changed = draw(1.0).apply(image)
    assert changed.shape == image.shape
    assert changed.isfinite().all()
    assert ((changed - image).abs().mean((1, 2, 3)) > 0.05).all()


def test_images_that_are_not_chosen_pass_unread() -> None:
    image, augmentation = noise(64), draw(0.05)
    changed = augmentation.apply(image)
    untouched = ~(augmentation.moved | augmentation.recoloured)
    assert 0 < untouched.sum() < 64
    assert torch.equal(changed[untouched], image[untouched])
    assert (changed[~untouched] != image[~untouched]).flatten(1).any(1).all()


def test_share_of_changed_images_follows_the_probability() -> None:
    # One gate a change: with colour alone there are five, of which the inversion is a coin flip.
    probability = 0.1
    augmentation = draw(probability, 20_000, blit=False, geometric=False)
    expected = 1 - (1 - probability) ** 4 * (1 - probability / 2)
    assert not augmentation.moved.any()
    assert augmentation.recoloured.float().mean().item() == pytest.approx(expected, abs=0.012)  # 3.4 deviations


def test_groups_can_be_left_out() -> None:
    moving = draw(1.0, colour=False)
    assert not moving.recoloured.any()
    assert moving.moved.any()
    nothing = draw(1.0, blit=False, geometric=False, colour=False)
    assert not (nothing.moved | nothing.recoloured).any()


def test_wavelet_is_orthogonal_to_its_even_shifts() -> None:
    taps = torch.tensor(SYM6, dtype=torch.float64)
    products = [(taps[2 * shift :] * taps[: len(taps) - 2 * shift]).sum().item() for shift in range(6)]
    assert products == pytest.approx([1, 0, 0, 0, 0, 0], abs=1e-11)
    assert taps.sum().item() == pytest.approx(math.sqrt(2))


@pytest.mark.parametrize(("across", "down"), [(0, 0), (2, 0), (0, -3), (1, 2)])
def test_warp_by_whole_pixels_is_a_shift(across: int, down: int) -> None:
    image = noise(2, torch.float64)
    shift = matrix((1, 0, across * 2 / SIZE), (0, 1, down * 2 / SIZE)).expand(2, 2, 3)
    moved = warp(image, shift)
    expected = image.roll((-down, -across), (2, 3))
    inner = slice(6, -6)
    torch.testing.assert_close(moved[..., inner, inner], expected[..., inner, inner], atol=1e-10, rtol=0)


def test_warp_turns_and_enlarges_as_its_matrix_says() -> None:
    steps = (torch.arange(SIZE, dtype=torch.float64) + 0.5) * 2 / SIZE - 1
    ramp = torch.stack([steps.expand(SIZE, SIZE), steps[:, None].expand(SIZE, SIZE), torch.zeros(SIZE, SIZE)])[None]
    turned = warp(ramp, matrix((0, -0.5, 0.1), (0.5, 0, 0)))
    # A result's point (x, y) shows the image's point (−y/2 + 0.1, x/2), and the image holds its own coordinates.
    inner = slice(4, -4)
    x, y = ramp[0, 0], ramp[0, 1]
    torch.testing.assert_close(turned[0, 0][inner, inner], (0.1 - y / 2)[inner, inner], atol=1e-10, rtol=0)
    torch.testing.assert_close(turned[0, 1][inner, inner], (x / 2)[inner, inner], atol=1e-10, rtol=0)


def test_changes_are_differentiable_twice() -> None:
    generator = torch.Generator().manual_seed(2)
    augmentation = draw_augmentation(AugmentationConfig(), 1.0, 1, 8, generator)
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64, generator=generator).requires_grad_(True)
    assert torch.autograd.gradcheck(augmentation.apply, image, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: augmentation.apply(x) ** 2, image, fast_mode=True)


def test_colour_matrices_keep_what_they_should() -> None:
    image = noise(1, torch.float64)
    colours = draw(1.0, 256, blit=False, geometric=False).colour.double()
    # Inversion, hue and saturation turn about the lightness axis: a grey stays grey, and with it every change here.
    grey = torch.full((256, 3, 1, 1), 0.3, dtype=torch.float64)
    greys = recolour(grey, colours)
    torch.testing.assert_close(greys[:, 0], greys[:, 1], atol=1e-6, rtol=0)  # drawn in float32
    torch.testing.assert_close(greys[:, 0], greys[:, 2], atol=1e-6, rtol=0)
    doubled = torch.eye(3, 4, dtype=torch.float64)[None] * 2
    torch.testing.assert_close(recolour(image, doubled), 2 * image)


def test_the_draw_is_the_generators() -> None:
    one, same, other = draw(0.7, seed=1), draw(0.7, seed=1), draw(0.7, seed=2)
    assert torch.equal(one.geometry, same.geometry)
    assert not torch.equal(one.geometry, other.geometry)


def test_probability_moves_towards_the_target() -> None:
    adaptive = AdaptiveProbability(AugmentationConfig(target=0.6, kimg=1.0, start=0.5))
    adaptive.observe(count_signs(torch.tensor([[3.0], [0.1], [2.0], [5.0]])))
    assert adaptive.move(images=100) == 1.0  # the critic is sure: overfitting
    assert adaptive.value == pytest.approx(0.6)
    adaptive.observe(count_signs(torch.tensor([[1.0], [-1.0]])))
    adaptive.observe(count_signs(torch.tensor([[1.0], [1.0]])))
    assert adaptive.move(images=300) == pytest.approx(0.5)
    assert adaptive.value == pytest.approx(0.3)
    adaptive.observe(count_signs(torch.tensor([[-1.0]])))
    adaptive.move(images=1000)
    assert adaptive.value == 0.0  # it stays a probability
    adaptive.observe(count_signs(torch.tensor([[1.0]])))
    adaptive.move(images=5000)
    assert adaptive.value == 1.0


def test_probability_and_counts_are_part_of_the_state() -> None:
    config = AugmentationConfig(start=0.25)
    adaptive = AdaptiveProbability(config)
    adaptive.observe(count_signs(torch.tensor([[1.0], [-2.0], [3.0]])))
    adaptive.value = 0.375
    again = AdaptiveProbability(config)
    again.load_state_dict(adaptive.state_dict())
    assert again.value == 0.375
    assert again.get_extra_state()["signs"].tolist() == [1.0, 3.0]


def test_configuration_is_checked() -> None:
    with pytest.raises(OutOfRangeError, match=r"augmentation\.target must be in \[-1, 1\], got 2"):
        AugmentationConfig(target=2)
