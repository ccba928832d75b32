# SPDX-License-Identifier: Apache-2.0
"""What an edit asks for becomes the regions, terms and phases of the published tables; nonsense is refused in words."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest

from faceedit.attributes import MASKFACEGAN_GLOBAL, MASKFACEGAN_LOCAL
from faceedit.errors import OutOfRangeError, UnknownAttributeError, UnknownNameError, UsageError
from faceedit.maskfacegan.config import PRESETS, MaskFaceGANConfig, preset
from faceedit.maskfacegan.plan import EditPlan, make_plan, target_probability
from faceedit.maskfacegan.schedule import Phase, latent_phases

# The paper's rules: region, whether λ_S acts, whether the outline may grow, whether ears join.
TABLE = {
    **dict.fromkeys(("Wearing_Lipstick", "Mouth_Slightly_Open", "Smiling", "Big_Lips"), ("mouth", False, False)),
    **dict.fromkeys(("Bushy_Eyebrows", "Arched_Eyebrows"), ("eyebrows", False, False)),
    "Narrow_Eyes": ("eyes", False, False),
    **dict.fromkeys(("Pointy_Nose", "Big_Nose"), ("nose", False, False)),
    **dict.fromkeys(("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair"), ("hair", True, False)),
    **dict.fromkeys(("Wavy_Hair", "Straight_Hair"), ("hair", True, True)),
}
FACE = ("mouth", "eyebrows", "eyes", "hair", "nose", "skin", "ears", "belowface")


@pytest.mark.parametrize("name", TABLE)
def test_local_attributes_follow_the_published_table(name: str) -> None:
    region, has_shape, is_hair_shape = TABLE[name]
    plan = make_plan({name: 1.0})
    ears = ("ears",) if is_hair_shape else ()
    assert plan.target == (region,)
    assert plan.appearance == ("skin", *ears)
    assert plan.shape == ((region, *ears) if has_shape else ())
    assert (plan.is_global, plan.is_dynamic, plan.grows_shape) == (False, True, is_hair_shape)
    assert plan.follows == ((region,) if is_hair_shape else ())
    assert set(plan.parts) == {"skin", region, *ears}
    assert plan.attributes == (name,)
    assert set(MASKFACEGAN_LOCAL) <= set(TABLE)


@pytest.mark.parametrize("name", [*MASKFACEGAN_GLOBAL, "Eyeglasses", "Bald"])
def test_every_other_attribute_is_of_the_whole_face(name: str) -> None:
    plan = make_plan({name: 0.0})
    assert plan.is_global
    assert plan.appearance == plan.blend == plan.parts == FACE
    assert not plan.shape
    assert not plan.is_dynamic
    assert not plan.follows


def test_released_blending_keeps_the_hair_that_was_there() -> None:
    paper, code = (make_plan({"Wavy_Hair": 1}, config=PRESETS[name]) for name in ("default", "code"))
    assert (paper.blend, paper.follows) == (("skin", "ears"), ("hair",))
    assert (code.blend, code.follows) == (("hair", "skin", "ears"), ())


def test_several_attributes_join_regions_but_only_hair_has_an_outline() -> None:
    plan = make_plan({"Smiling": 1, "Blond_Hair": 1, "Wavy_Hair": 1})
    assert plan.target == ("mouth", "hair")
    assert plan.shape == ("hair", "ears")
    assert plan.follows == ("hair",)
    assert plan.blend == ("mouth", "skin", "ears")


def test_a_local_attribute_beside_a_global_one_is_edited_globally() -> None:
    assert make_plan({"Smiling": 1, "Male": 0}).is_global
    assert make_plan({"Smiling": 1}, config=MaskFaceGANConfig(force_global=True)).appearance == FACE


def test_masks_policy_is_the_configuration() -> None:
    plan = make_plan({"Big_Nose": 1}, config=MaskFaceGANConfig(dynamic=False, blend="target"))
    assert (plan.blend, plan.follows) == (("nose",), ())
    assert not plan.is_dynamic
    plan = make_plan({"Big_Nose": 1}, config=MaskFaceGANConfig(blend="targets"))
    assert (plan.blend, plan.follows) == (("nose",), ("nose",))


def test_a_size_needs_no_attribute_and_frees_the_outline() -> None:
    plan = make_plan({}, component="hair", scale=1.5)
    assert (plan.component, plan.scale, plan.target, plan.attributes) == ("hair", 1.5, ("hair",), ())
    assert make_plan({"Smiling": 1}, component="Smiling", scale=0.5).component == "mouth"
    assert make_plan({"Blond_Hair": 1}, component="hair", scale=0.5).shape == ()


def test_keeping_hair_pins_what_is_not_edited() -> None:
    colours = ("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair")
    assert make_plan({"Wavy_Hair": 1}, keep=["hair"]).keep == colours
    assert make_plan({"Blond_Hair": 1}, keep=["hair"]).keep == ("Straight_Hair", "Wavy_Hair")
    assert make_plan({"Young": 0}, keep=["hair"]).keep == (*colours, "Straight_Hair", "Wavy_Hair")
    assert make_plan({"Smiling": 1}, keep=["hair"]).keep == (), "an edit of the mouth does not reach the hair"
    assert make_plan({"Smiling": 1}, keep=["Young", "Smiling"]).attributes == ("Smiling", "Young")


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"values": {}}, UsageError, "attribute or a size"),
        ({"values": {"Smilling": 1}}, UnknownAttributeError, "Smiling"),
        ({"values": {"Blond_Hair": 1, "Black_Hair": 1}}, UsageError, "exclude each other"),
        ({"values": {}, "component": "moth", "scale": 1.0}, UnknownNameError, "mouth"),
        ({"values": {}, "component": "skin", "scale": 1.0}, UnknownNameError, "part that can be edited"),
        ({"values": {}, "component": "nose", "scale": 0.0}, OutOfRangeError, "scale"),
        ({"values": {"Male": 1}, "component": "nose", "scale": 1.5}, UsageError, "two edits"),
        ({"values": {"Smiling": 1}, "keep": ["hiar"]}, UnknownAttributeError, "hair"),
        ({"values": {"Blond_Hair": 1, "Wavy_Hair": 1}, "keep": ["hair"]}, UsageError, "something of the hair to hold"),
        ({"values": {"Smiling": 3}}, OutOfRangeError, "Smiling must be between 0 and 1, got 3"),
        ({"values": {"Smiling": float("nan")}}, OutOfRangeError, "Smiling must be between 0 and 1"),
    ],
)
def test_nonsense_is_refused(arguments: dict, error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        make_plan(**arguments)


def test_targets_are_smoothed_and_run_between_the_ends() -> None:
    assert target_probability(1.0, 0.05) == pytest.approx(0.95)
    assert target_probability(0.0, 0.05) == pytest.approx(0.05)
    assert target_probability(0.5, 0.2) == pytest.approx(0.5)


# Configuration and schedule


def test_defaults_are_the_published_ones() -> None:
    config = MaskFaceGANConfig()
    expected = {
        "latent_steps": 1000, "semantic_start": 500, "dynamic_stop": 700, "noise_start": 700, "encoder_start": 300,
        "latent_rate": 1e-3, "noise_steps": 501, "noise_rate": 0.1, "noise_stop_px": 8, "mean_samples": 50_000,
        "appearance_weight": 2.0, "semantic_weight": 0.005, "shape_weight": 0.5, "size_weight": 1.0,
        "noise_weight": 1.0, "perceptual_weight": 0.03, "global_noise_appearance_weight": 0.03, "epsilon": 0.05,
        "spread_weight": 0.0, "start": "mean", "compat": False, "dynamic": True, "blend": "skin",
    }  # fmt: skip
    assert {name: getattr(config, name) for name in expected} == expected
    assert preset("default") == config


def test_local_schedule_from_the_mean() -> None:
    assert latent_phases(MaskFaceGANConfig(), is_global=False, from_mean=True) == (
        Phase(0, 500, is_constrained=False, restarts=False, updates_masks=False, has_noise=False),
        Phase(500, 700, is_constrained=True, restarts=True, updates_masks=True, has_noise=False),
        Phase(700, 1000, is_constrained=True, restarts=False, updates_masks=False, has_noise=True),
    )


def test_an_encoded_start_leaves_the_first_iterations_out() -> None:
    phases = latent_phases(MaskFaceGANConfig(), is_global=False, from_mean=False)
    assert [(phase.start, phase.stop) for phase in phases] == [(300, 500), (500, 700), (700, 1000)]


@pytest.mark.parametrize(("from_mean", "first"), [(True, 0), (False, 300)])
def test_global_schedule(from_mean: bool, first: int) -> None:
    assert latent_phases(MaskFaceGANConfig(), is_global=True, from_mean=from_mean) == (
        Phase(first, 700, is_constrained=True, restarts=False, updates_masks=False, has_noise=False),
        Phase(700, 1000, is_constrained=True, restarts=False, updates_masks=False, has_noise=True),
    )


def test_schedule_follows_every_count() -> None:
    config = MaskFaceGANConfig(latent_steps=50, semantic_start=10, dynamic_stop=20, noise_start=30, encoder_start=5)
    phases = latent_phases(config, is_global=False, from_mean=True)
    assert [phase.start for phase in phases] == [0, 10, 20, 30]
    assert [phase.updates_masks for phase in phases] == [False, True, False, False]
    assert [phase.has_noise for phase in phases] == [False, False, False, True]
    still = latent_phases(replace(config, dynamic=False), is_global=False, from_mean=True)
    assert not any(phase.updates_masks for phase in still)


def test_the_fast_preset_differs_in_counts_and_the_rate_alone() -> None:
    fast, default = PRESETS["fast"], MaskFaceGANConfig()
    changed = {field.name for field in fields(default) if getattr(fast, field.name) != getattr(default, field.name)}
    counts = {name for name in changed if name.endswith(("_steps", "_start", "_stop"))}
    assert changed - counts == {"latent_rate", "mean_samples"}
    assert fast.latent_steps + fast.noise_steps < 0.25 * (default.latent_steps + default.noise_steps)


@pytest.mark.parametrize(
    ("wrong", "word"),
    [
        ({"latent_rate": 0.0}, "rates"),
        ({"latent_steps": 0}, "latent_steps"),
        ({"semantic_weight": -1.0}, "semantic_weight"),
        ({"noise_rate": float("nan")}, "noise_rate"),
        ({"latent_rate": 1e38}, r"rates must be at most 1e\+30, got 1e\+38 and 0\.1"),
        ({"noise_rate": 1e38}, r"rates must be at most 1e\+30"),
        ({"epsilon": 0.5}, "epsilon"),
        ({"semantic_start": 1000}, "nothing would be edited"),
        ({"dynamic_stop": 499}, "dynamic_stop"),
        ({"latent_steps": 1000.5}, "latent_steps must be a whole number, got 1000.5"),
        ({"noise_steps": True}, "noise_steps must be a whole number"),
    ],
)
def test_wrong_numbers_are_refused(wrong: dict, word: str) -> None:
    with pytest.raises(OutOfRangeError, match=word):
        MaskFaceGANConfig(**wrong)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"blend": "skn"}, "blend must be one of skin, target, targets, got 'skn'; did you mean skin"),
        ({"hair_blend": "generatd"}, "hair_blend must be one of generated, original"),
        ({"start": "encode"}, "start must be one of mean, encoder"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
    ],
)
def test_wrong_choices_are_refused(wrong: dict, words: str) -> None:
    with pytest.raises(UnknownNameError, match=words):
        MaskFaceGANConfig(**wrong)


def test_unknown_preset_is_named_with_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="fast"):
        preset("fasst")


def test_plans_are_values() -> None:
    assert make_plan({"Smiling": 1}) == make_plan({"Smiling": 1.0})
    assert isinstance(make_plan({"Smiling": 1}), EditPlan)
