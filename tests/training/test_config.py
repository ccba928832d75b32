# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from faceedit import training
from faceedit.errors import OutOfRangeError, UnknownNameError, UsageError
from faceedit.training.config import AdamConfig, to_yaml
from faceedit.training.task import derive_seed


@pytest.mark.parametrize(
    ("override", "error", "message"),
    [
        ("trainer.step=3", UnknownNameError, "recipe.trainer must .* got 'step'; did you mean steps"),
        ("withd=3", UnknownNameError, "got 'withd'; did you mean width"),
        ("adam.Rate=0.1", UnknownNameError, "recipe.adam must .* got 'Rate'; did you mean rate"),
        ("width=3.5", UsageError, "width must be int, got 3.5"),
        ("width=true", UsageError, "width must be int, got True"),
        ("trainer.precision=bf16", UsageError, "recipe.trainer.precision must be one of"),
        ("trainer.steps=0", OutOfRangeError, "trainer.steps must be positive, got 0"),
        ("trainer.progress_by=time", OutOfRangeError, "when max_minutes is not set"),
        ("trainer.steps", UsageError, "override must be key=value"),
        ("task=toi", UnknownNameError, "got 'toi'; did you mean toy"),
        ("adam.rate=-1", OutOfRangeError, "recipe: adam.rate must be positive, got -1"),
        ("adam.rate=.inf", OutOfRangeError, "recipe: adam.rate must be positive, got inf"),
        ("adam.beta1=1", OutOfRangeError, r"recipe: adam.beta1 must be in \[0, 1\), got 1"),
        ("adam.beta2=-0.1", OutOfRangeError, r"recipe: adam.beta2 must be in \[0, 1\), got -0.1"),
        ("adam.weight_decay=-1", OutOfRangeError, "recipe: adam.weight_decay must be 0 or more, got -1"),
        ("adam.warmup_steps=-1", OutOfRangeError, "recipe: adam.warmup_steps must be 0 or more, got -1"),
        ("trainer.steps=[1", UsageError, r"override must be key=value of the recipe, got 'trainer.steps=\[1': while"),
        ("width=${nosuch}", UsageError, r"override must be .*, got 'width=\$\{nosuch\}': .* 'nosuch' not found"),
        ("width=${", UsageError, r"override must be .*, got 'width=\$\{'"),
    ],
)
def test_wrong_overrides_are_refused(toy_recipe: Path, override: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        training.resolve(toy_recipe, [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("recipe", "override", "message"),
    [
        ("parser-starter", "photo_weight=.nan", "photo_weight must be 0 or more, got nan"),
        ("parser-starter", "photo_backdrops=7", r"photo_backdrops must be in \[0, 1\], got 7"),
        ("parser-starter", "network.size_px=0", "network.size_px must be a positive multiple of 32, got 0"),
        ("e4e-starter", "losses.image=-1", "losses.image must be 0 or more, got -1"),
        ("e4e-starter", "losses.delta=.inf", "losses.delta must be 0 or more, got inf"),
        ("classifier-starter", "network.attributes=[Bald,Bald]", "network.attributes must be names that differ"),
        ("classifier-starter", "synthetic.seed_offset=1", r"synthetic.seed_offset must be 0 or in \[188, 900000\)"),
        ("stylegan2-starter", "images.seed_offset=1", r"images.seed_offset must be 0 or in \[188, 900000\)"),
    ],
)
def test_impossible_values_of_shipped_recipes_are_refused(recipe: str, override: str, message: str) -> None:
    with pytest.raises(OutOfRangeError, match=message):
        training.resolve(recipe, [override])


def test_unknown_recipe_names_the_closest() -> None:
    with pytest.raises(UnknownNameError, match="did you mean maggan-starter"):
        training.resolve("magan-starter")


@pytest.mark.parametrize("text", ["- 1\n", "trainer: {steps: 1}\n", "task: [\n", "task: toy\n"])
def test_malformed_recipe_is_one_line(toy_recipe: Path, text: str) -> None:
    toy_recipe.write_text(text)
    with pytest.raises(UsageError) as caught:
        training.resolve(toy_recipe)
    assert "\n" not in str(caught.value)


def test_overrides_replace_and_defaults_fill(toy_recipe: Path) -> None:
    recipe = training.resolve(toy_recipe, ["adam.rate=1", "trainer.max_minutes=2"])
    assert recipe.adam == AdamConfig(rate=1.0)
    assert isinstance(recipe.adam.rate, float)
    assert (recipe.trainer.steps, recipe.trainer.max_minutes, recipe.width) == (12, 2.0, 8)


def test_one_value_of_a_list_is_replaced() -> None:
    recipe: Any = training.resolve("e4e-starter", ["network.blocks[0]=3"])
    assert recipe.network.blocks == (3, 2, 4, 2)
    for override in ("network.blocks[9]=3", "network.blocks.first=3"):
        with pytest.raises(UsageError, match="override must be key=value of the recipe") as caught:
            training.resolve("e4e-starter", [override])
        assert "\n" not in str(caught.value)


def test_a_recipe_that_refers_to_nothing_is_blamed_itself(toy_recipe: Path) -> None:
    toy_recipe.write_text(toy_recipe.read_text() + "width: ${trainer.none}\n")
    with pytest.raises(UsageError, match=r"recipe must be readable YAML, got .*toy\.yaml: .*trainer\.none"):
        training.resolve(toy_recipe, ["adam.rate=${width}"])


def test_errors_about_keys_survive_a_process(toy_recipe: Path) -> None:
    with pytest.raises(OutOfRangeError) as caught:
        AdamConfig(rate=0)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    assert "recipe: rate must be positive, got 0" in str(caught.value)


def test_dry_run_prints_what_resolves_to_the_same_recipe(toy_recipe: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    out = tmp_path / "never"
    assert training.run(toy_recipe, ["width=5"], dry_run=True, output_dir=out, report=lines.append) is None
    again = tmp_path / "again.yaml"
    again.write_text("\n".join(lines))
    assert training.resolve(again) == training.resolve(toy_recipe, ["width=5"])
    assert not out.exists()


@pytest.mark.parametrize("name", training.list_recipes())
def test_shipped_recipes_resolve_and_round_trip(name: str, tmp_path: Path) -> None:
    recipe = training.resolve(name)
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(recipe))
    assert training.resolve(path) == recipe


def test_adam_schedule() -> None:
    adam = AdamConfig(rate=1.0, warmup_steps=3, decay_from=0.5, final_rate_share=0.2)
    assert [adam.rate_at(step, 0.0) for step in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert adam.rate_at(100, 0.5) == 1.0
    assert adam.rate_at(100, 0.75) == pytest.approx(0.6)
    assert adam.rate_at(100, 1.0) == pytest.approx(0.2)


def test_derived_seeds_depend_on_every_part() -> None:
    seeds = {derive_seed(*parts) for parts in [(0, "a", 1), (1, "a", 1), (0, "b", 1), (0, "a", 2), ("0", "a", 11)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 2**63 for seed in seeds)
