# SPDX-License-Identifier: Apache-2.0
"""Each constraint does what it is for: every test compares with the same edit without that term, and fails if it acts
alike. Stand-in networks say exactly what a mouth, hair and a smile are (tests/support/standin_networks.py)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from support.standin_networks import ATTRIBUTES, COLOURS, portrait, standins
from torch import Tensor

from faceedit.kernels import noise_regularizer
from faceedit.labels import MASKFACEGAN
from faceedit.maskfacegan.bundle import STARTER
from faceedit.maskfacegan.config import MaskFaceGANConfig
from faceedit.maskfacegan.losses import spread
from faceedit.maskfacegan.optimizer import optimize
from faceedit.maskfacegan.outcome import EditOutcome
from faceedit.maskfacegan.plan import make_plan

# The stand-in's image moves GAIN times as far as its code, and there are fewer, larger steps than published.
CONFIG = MaskFaceGANConfig(
    latent_steps=150,
    semantic_start=50,
    dynamic_stop=100,
    noise_start=150,
    encoder_start=20,
    latent_rate=0.03,
    mean_samples=0,
    semantic_weight=0.3,
    noise_steps=0,
)
SOURCE = portrait()


def edit(values: Mapping[str, float], config: MaskFaceGANConfig = CONFIG, **size: object) -> EditOutcome:
    (outcome,) = optimize(standins(), SOURCE, [make_plan(values, config=config, **size)], config)
    assert isinstance(outcome, EditOutcome)
    return outcome


def probability(outcome: EditOutcome, name: str) -> float:
    return standins().classifier(outcome.generated)[0, ATTRIBUTES.index(name)].sigmoid().item()


def regions(image: Tensor) -> Tensor:
    return standins().parser(image)


def share(image: Tensor, label: str) -> float:
    return regions(image)[0, MASKFACEGAN.id(label)].mean().item()


def skin_error(outcome: EditOutcome) -> float:
    skin = regions(SOURCE)[:, MASKFACEGAN.id("skin")][:, None]
    return (skin * (outcome.generated - SOURCE).square()).mean().item()


def test_appearance_term_keeps_the_skin() -> None:
    kept, lost = (edit({"Smiling": 1}, replace(CONFIG, appearance_weight=weight)) for weight in (2.0, 0.0))
    assert skin_error(kept) < 0.25 * skin_error(lost)


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_semantic_term_sets_and_removes_the_attribute(value: float) -> None:
    neutral = probability(edit({"Smiling": value}, replace(CONFIG, semantic_weight=0.0)), "Smiling")
    asked = probability(edit({"Smiling": value}), "Smiling")
    assert abs(asked - value) < 0.12 < abs(neutral - value)


def test_epsilon_is_the_probability_asked_for() -> None:
    strong, weak = (probability(edit({"Smiling": 1}, replace(CONFIG, epsilon=e)), "Smiling") for e in (0.05, 0.35))
    assert strong > 0.85
    assert weak == pytest.approx(0.65, abs=0.1)


def test_intensity_runs_between_absent_and_present() -> None:
    results = [probability(edit({"Smiling": value}), "Smiling") for value in (0.0, 0.5, 1.0)]
    assert results == sorted(results)
    assert results[1] == pytest.approx(0.5, abs=0.1)


def test_shape_term_holds_the_hair_region() -> None:
    held, free = (edit({"Blond_Hair": 1}, replace(CONFIG, shape_weight=weight)) for weight in (0.5, 0.0))
    hair = regions(SOURCE)[:, MASKFACEGAN.id("hair")]
    moved = [(regions(o.generated)[:, MASKFACEGAN.id("hair")] - hair).square().mean().item() for o in (held, free)]
    assert moved[0] < 0.35 * moved[1]


def test_no_other_attribute_has_a_shape_term() -> None:
    assert "shape" not in edit({"Smiling": 1}).losses
    assert "shape" in edit({"Blond_Hair": 1}).losses


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.5])
def test_size_moves_the_components_area(alpha: float) -> None:
    before = share(SOURCE, "mouth")
    after = share(edit({}, component="mouth", scale=alpha).generated, "mouth")
    free = share(edit({}, replace(CONFIG, size_weight=0.0), component="mouth", scale=alpha).generated, "mouth")
    assert after == pytest.approx(alpha * before, rel=0.03)
    assert alpha == 1.0 or abs(free - alpha * before) > 3 * abs(after - alpha * before)


def test_size_and_attribute_act_together() -> None:
    outcome = edit({"Blond_Hair": 1}, replace(CONFIG, size_weight=20.0), component="mouth", scale=1.5)
    assert share(outcome.generated, "mouth") == pytest.approx(1.5 * share(SOURCE, "mouth"), rel=0.05)
    assert probability(outcome, "Blond_Hair") > 0.8


def test_dynamic_masks_let_the_target_grow_over_the_skin() -> None:
    # Where skin is held hard, a mouth can only grow or smile if skin is released to it.
    results = []
    for dynamic in (True, False):
        config = replace(CONFIG, dynamic=dynamic, appearance_weight=500.0)
        sized = edit({}, config, component="mouth", scale=2.0)
        results.append((share(sized.generated, "mouth"), probability(edit({"Smiling": 1}, config), "Smiling")))
    (grown, smiling), (pinned, sad) = results
    assert grown > 1.1 * pinned
    assert smiling > sad + 0.05


def test_several_attributes_are_met_at_once() -> None:
    outcome = edit({"Smiling": 1, "Blond_Hair": 0})
    assert probability(outcome, "Smiling") > 0.75
    assert probability(outcome, "Blond_Hair") < 0.2


def test_kept_attributes_stay_as_they_were() -> None:
    source = standins().classifier(SOURCE)[0, ATTRIBUTES.index("Black_Hair")].sigmoid().item()
    assert source > 0.5
    config = replace(CONFIG, shape_weight=0.0)
    changed = probability(edit({"Wavy_Hair": 1}, config), "Black_Hair")
    (outcome,) = optimize(standins(), SOURCE, [make_plan({"Wavy_Hair": 1}, keep=["Black_Hair"], config=config)], config)
    assert isinstance(outcome, EditOutcome)
    assert probability(outcome, "Black_Hair") > 0.5 > changed


def test_spread_term_draws_the_codes_of_the_layers_together() -> None:
    networks, apart = standins(), torch.tensor([0.3, -0.3])[None, :, None]
    start = apart.expand(1, 2, networks.generator.config.w_width)
    spreads = []
    for weight in (1.0, 0.0):
        config = replace(CONFIG, spread_weight=weight)
        (outcome,) = optimize(networks, SOURCE, [make_plan({"Smiling": 1})], config, start=start)
        assert isinstance(outcome, EditOutcome)
        assert ("spread" in outcome.losses) == (weight > 0)
        spreads.append(spread(outcome.ws).item())
    held, free = spreads
    assert held < 0.1 * free


def test_spread_term_is_for_local_edits_and_the_starters() -> None:
    outcome = edit({"Male": 0}, replace(CONFIG, spread_weight=1.0))
    assert set(outcome.losses) == {"perceptual", "semantics"}
    assert STARTER.configuration("default").spread_weight > 0


# Noise


def test_noise_stage_brings_the_image_nearer() -> None:
    config = replace(CONFIG, semantic_weight=0.01)
    without, with_noise = (edit({"Smiling": 1}, replace(config, noise_steps=steps)) for steps in (0, 40))
    assert skin_error(with_noise) < 0.5 * skin_error(without)
    torch.testing.assert_close(with_noise.ws, without.ws)


def test_noise_regulariser_keeps_maps_noise_like() -> None:
    kept, free = (
        edit({"Smiling": 1}, replace(CONFIG, noise_steps=40, noise_weight=weight)).noise for weight in (1.0, 0.0)
    )
    assert noise_regularizer(kept).item() < 0.2 * noise_regularizer(free).item()
    for noise_map in kept:
        assert noise_map.mean().abs() < 1e-6
        assert noise_map.std().item() == pytest.approx(1.0, abs=1e-5)


def test_released_order_of_normalising_is_another_one() -> None:
    config = replace(CONFIG, noise_steps=20)
    ours, released = (edit({"Smiling": 1}, replace(config, compat=compat)) for compat in (False, True))
    assert released.noise[-1].std().item() != pytest.approx(1.0, abs=1e-5)  # the last step comes after normalising
    assert skin_error(released) == pytest.approx(skin_error(ours), rel=0.3)


# The whole face


def test_global_edits_use_the_perceptual_term_alone() -> None:
    outcome = edit({"Male": 0}, replace(CONFIG, semantic_weight=3.0))
    assert set(outcome.losses) == {"perceptual", "semantics"}
    unasked = edit({"Male": 0}, replace(CONFIG, semantic_weight=0.0))
    assert probability(outcome, "Male") < 0.35 < 0.6 < probability(unasked, "Male")
    far = edit({"Male": 0}, replace(CONFIG, semantic_weight=3.0, perceptual_weight=0.0))
    distance = [(regions(SOURCE) - regions(o.generated)).square().mean().item() for o in (outcome, far)]
    assert distance[0] < 0.8 * distance[1]


def test_noise_of_a_global_edit_weighs_less_in_the_picture() -> None:
    outcome = edit({"Male": 0}, replace(CONFIG, noise_steps=10))
    assert set(outcome.losses) == {"perceptual", "semantics", "appearance", "noise"}
    heavier = edit({"Male": 0}, replace(CONFIG, noise_steps=10, global_noise_appearance_weight=30.0))
    assert heavier.losses["appearance"] < outcome.losses["appearance"]


# Blending


def test_blending_is_exact_where_the_mask_is_zero_or_one() -> None:
    source = SOURCE.clone()
    source[:, COLOURS["skin"], 14:] = 40.0  # nothing but skin, to the last bit of a probability
    source[:, :, 0, 0] = -60.0  # nothing but background
    networks, plan = standins(), make_plan({"Smiling": 1})
    (outcome,) = optimize(networks, source, [plan], replace(CONFIG, latent_steps=55))
    assert isinstance(outcome, EditOutcome)
    skin, outside = outcome.blend == 1, outcome.blend == 0
    assert skin[0, 0, 15].all()
    assert outside[0, 0, 0, 0]
    for picked, wanted in ((skin, outcome.generated), (outside, source)):
        where = picked.expand_as(source)
        assert torch.equal(outcome.image[where], wanted[where])


def test_blend_is_skin_and_target() -> None:
    probabilities = regions(SOURCE)
    expected = probabilities[:, [MASKFACEGAN.id("skin"), MASKFACEGAN.id("mouth")]].sum(1, keepdim=True)
    outcome = edit({"Smiling": 1}, replace(CONFIG, latent_steps=55))
    torch.testing.assert_close(outcome.blend, expected)
    mouth = probabilities[:, MASKFACEGAN.id("mouth")][:, None]
    target_only = edit({"Smiling": 1}, replace(CONFIG, latent_steps=55, blend="target"))
    torch.testing.assert_close(target_only.blend, mouth)
    either = edit({"Smiling": 1}, replace(CONFIG, latent_steps=55, blend="targets"))
    made = regions(either.generated)[:, MASKFACEGAN.id("mouth")][:, None]
    torch.testing.assert_close(either.blend, (mouth + made).clamp(0, 1))
    assert not torch.allclose(either.blend, mouth, atol=0.01)
