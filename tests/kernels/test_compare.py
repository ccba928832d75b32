# SPDX-License-Identifier: Apache-2.0
"""The comparison that every parity test relies on must itself be able to fail."""

import pytest
import torch
from support.compare import assert_close, compare


def test_names_the_worst_index_and_its_values() -> None:
    expected = torch.ones(2, 3)
    actual = expected.clone()
    actual[1, 2] = 1.5
    found = compare(actual, expected)
    assert found.worst_index == (1, 2)
    assert found.worst_pair == (1.5, 1.0)
    assert found.relative_l2 == pytest.approx(0.5 / 6**0.5)
    with pytest.raises(AssertionError, match=r"grad of x is off.*\(1, 2\).*got 1.5, expected 1"):
        assert_close("grad of x", actual, expected, relative_l2=0.1)


def test_tells_a_bias_from_noise() -> None:
    expected = torch.linspace(1, 2, 1000)
    noise = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 0.01
    assert abs(compare(expected + noise, expected).bias) < 1e-3
    assert compare(expected + 0.01, expected).bias == pytest.approx(0.01 / 1.5, rel=1e-2)


def test_opposite_gradient_has_cosine_minus_one() -> None:
    expected = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert compare(-expected, expected).cosine == pytest.approx(-1)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_special_values_must_be_in_the_same_places(value: float) -> None:
    expected = torch.zeros(4)
    actual = expected.clone()
    actual[2] = value
    with pytest.raises(AssertionError, match="1 elements differ"):
        assert_close("y", actual, expected, relative_l2=1.0)
    expected[2] = value
    assert_close("y", actual, expected, relative_l2=0.0)


def test_zero_oracle_is_an_absolute_bound() -> None:
    assert_close("y", torch.full((3,), 1e-7), torch.zeros(3), relative_l2=1e-6)
    with pytest.raises(AssertionError):
        assert_close("y", torch.full((3,), 1e-5), torch.zeros(3), relative_l2=1e-6)


def test_rejects_another_shape() -> None:
    with pytest.raises(AssertionError, match="shape"):
        compare(torch.zeros(2, 1), torch.zeros(2))
