# SPDX-License-Identifier: Apache-2.0
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import pytest

from faceedit.config import check_choices, from_dict, to_dict, without_infinities
from faceedit.errors import UnknownNameError, UsageError


@dataclass(frozen=True, slots=True)
class Optimiser:
    learning_rate: float = 2e-4
    betas: tuple[float, float] = (0.5, 0.999)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ValueError(f"Optimiser: learning_rate must be positive, got {self.learning_rate}; raise it")


@dataclass(frozen=True, slots=True)
class Recipe:
    steps: int
    name: str = "tiny"
    precision: Literal["fp32", "bf16"] = "fp32"
    resume: str | None = None
    is_logged: bool = True
    attributes: tuple[str, ...] = ()
    sizes: Sequence[int] = ()
    weights: dict[str, float] = field(default_factory=dict)
    optimiser: Optimiser = field(default_factory=Optimiser)


FULL = Recipe(3, "full", "bf16", "last", False, ("Bald", "Male"), [1, 2], {"l1": 1.0}, Optimiser(0.1, (0.0, 0.9)))


@pytest.mark.parametrize("recipe", [Recipe(1), FULL], ids=["defaults", "full"])
def test_round_trip_through_json(recipe):
    read = from_dict(Recipe, json.loads(json.dumps(to_dict(recipe))))
    assert to_dict(read) == to_dict(recipe)
    assert read.attributes == recipe.attributes
    assert read.optimiser == recipe.optimiser


def test_integers_become_floats_only_where_asked():
    recipe = from_dict(Recipe, {"steps": 1, "optimiser": {"learning_rate": 1, "betas": [0, 1]}})
    assert isinstance(recipe.optimiser.learning_rate, float)
    assert recipe.optimiser.betas == (0.0, 1.0)


@pytest.mark.parametrize(
    ("mapping", "error", "text"),
    [
        ({"steps": 1, "atributes": []}, UnknownNameError, "attributes"),
        ({"steps": 1, "optimiser": {"lerning_rate": 1}}, UnknownNameError, r"Recipe\.optimiser.*learning_rate"),
        ({}, UsageError, "steps"),
        ({"steps": 1.5}, UsageError, "steps must be int"),
        ({"steps": True}, UsageError, "steps must be int"),
        ({"steps": "3"}, UsageError, "steps must be int"),
        ({"steps": 1, "is_logged": 1}, UsageError, "is_logged must be bool"),
        ({"steps": 1, "precision": "bf61"}, UsageError, "bf16"),
        ({"steps": 1, "attributes": "Bald"}, UsageError, "attributes"),
        ({"steps": 1, "attributes": [1]}, UsageError, r"attributes\[0\] must be str"),
        ({"steps": 1, "weights": {"l1": "x"}}, UsageError, r"weights\.l1 must be float"),
        ({"steps": 1, "resume": 3}, UsageError, "resume must be str"),
        ({"steps": 1, "optimiser": {"betas": [0.1]}}, UsageError, "betas"),
        ({"steps": 1, "optimiser": 3}, UsageError, "optimiser must be a mapping"),
        ({"steps": 1, "optimiser": {"learning_rate": -1.0}}, UsageError, "learning_rate must be positive"),
    ],
)
def test_rejects(mapping, error, text):
    with pytest.raises(error, match=text):
        from_dict(Recipe, mapping)


def test_choices_are_checked_where_from_dict_did_not() -> None:
    check_choices(Recipe(steps=1))
    with pytest.raises(UnknownNameError, match="Recipe: precision must be one of fp32, bf16, got 'fp64'; did you mean"):
        check_choices(Recipe(steps=1, precision="fp64"))  # type: ignore[arg-type]


def test_numbers_that_json_lacks_become_null() -> None:
    value = {"a": math.nan, "b": [1.5, -math.inf, {"c": (math.inf, True, "nan")}]}
    plain = without_infinities(value)
    assert plain == {"a": None, "b": [1.5, None, {"c": [None, True, "nan"]}]}
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
