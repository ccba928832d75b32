# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from faceedit.attributes import (
    CELEBA,
    CLASSIFIER_ORDER,
    MAGGAN,
    MASKFACEGAN_GLOBAL,
    MASKFACEGAN_LOCAL,
    attribute_index,
    check_attribute,
    complete_request,
    conflicting,
    resolve_conflicts,
)
from faceedit.errors import UnknownAttributeError, UsageError


def test_celeba_indices_are_the_published_ones():
    published = {"5_o_Clock_Shadow": 0, "Bald": 4, "Blond_Hair": 9, "Eyeglasses": 15, "Male": 20, "No_Beard": 24,
                 "Pale_Skin": 26, "Smiling": 31, "Wearing_Lipstick": 36, "Young": 39}  # fmt: skip
    assert len(CELEBA) == len(set(CELEBA)) == 40
    assert {name: attribute_index(name) for name in published} == published


@pytest.mark.parametrize(
    ("names", "count"), [(MAGGAN, 13), (MASKFACEGAN_LOCAL, 14), (MASKFACEGAN_GLOBAL, 3), (CLASSIFIER_ORDER, 40)]
)
def test_lists_are_subsets_of_celeba(names, count):
    assert len(names) == len(set(names)) == count
    assert set(names) <= set(CELEBA)


def test_orders_that_files_depend_on():
    assert list(MAGGAN) == sorted(MAGGAN)
    assert CLASSIFIER_ORDER[0] == "Blurry"
    assert CLASSIFIER_ORDER[6] == "5_o_Clock_Shadow"
    assert CLASSIFIER_ORDER[14] == "Smiling"
    assert CLASSIFIER_ORDER[39] == "Eyeglasses"
    assert not set(MASKFACEGAN_LOCAL) & set(MASKFACEGAN_GLOBAL)


@pytest.mark.parametrize(
    ("wrong", "right"), [("Blonde_Hair", "Blond_Hair"), ("blond_hair", "Blond_Hair"), ("smile", "Smiling")]
)
def test_unknown_name_suggests_the_closest(wrong, right):
    with pytest.raises(UnknownAttributeError, match=right) as caught:
        check_attribute(wrong)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_suggestion_stays_within_what_is_allowed():
    with pytest.raises(UnknownAttributeError) as caught:
        check_attribute("Gray_Hair", MAGGAN)
    suggested = str(caught.value).split(";")[1]
    assert "Gray_Hair" not in suggested
    assert "_Hair" in suggested


def test_conflicts_are_those_of_stgan():
    assert conflicting("Bald") == conflicting("Receding_Hairline") == ("Bangs",)
    assert set(conflicting("Bangs")) == {"Bald", "Receding_Hairline"}
    assert set(conflicting("Blond_Hair")) == {"Black_Hair", "Brown_Hair", "Gray_Hair"}
    assert conflicting("Wavy_Hair") == ("Straight_Hair",)
    assert conflicting("Mustache") == conflicting("No_Beard") == ()


def test_resolve_conflicts_clears_and_keeps():
    source = torch.zeros(2, 13)
    source[:, [MAGGAN.index("Black_Hair"), MAGGAN.index("Young")]] = 1
    before = source.clone()
    target = resolve_conflicts(source, "Blond_Hair")
    assert torch.equal(source, before)
    assert {MAGGAN[i] for i in target[1].nonzero().flatten()} == {"Blond_Hair", "Young"}
    with pytest.raises(ValueError, match=r"\(…,13\)"):
        resolve_conflicts(torch.zeros(2, 40), "Blond_Hair")


def test_request_is_completed_without_overriding_it():
    assert complete_request({"Blond_Hair": 1}) == {"Blond_Hair": 1.0, "Black_Hair": 0.0, "Brown_Hair": 0.0}
    assert complete_request({"Blond_Hair": 0}) == {"Blond_Hair": 0.0}
    assert complete_request({"Blond_Hair": 1, "Brown_Hair": 0.4})["Brown_Hair"] == 0.4
    with pytest.raises(UsageError, match=r"Bald and Bangs|Bangs and Bald"):
        complete_request({"Bald": 1, "Bangs": 1})
