# SPDX-License-Identifier: Apache-2.0
"""modulated_conv2d in half precision, where values leave its range on the way unless somebody sees to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compare import assert_close
from support.kernel_cases import PLACES, Place, draw, run
from support.modulated_conv2d_cases import (
    NAMES,
    TOLERANCE,
    away_from_kinks,
    call,
    check,
    inputs,
    oracle,
)
from torch import Tensor

from faceedit import kernels
from faceedit.kernels.modulated_conv2d import modulated_conv2d


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("place", PLACES)
def test_half_precision_survives_large_and_small_modulation(place: Place, dtype: torch.dtype) -> None:
    """fp16 ends at 65504: neither the scaled input nor the convolution may meet that limit on the way.

    bf16 has float32's range and must simply keep its precision.
    """
    x, weight, styles, *_ = inputs(rgb=False)
    assert x is not None
    assert weight is not None
    assert styles is not None
    for factor in (1e-4, 1e4):
        tensors = [x, weight.to(dtype).float(), styles * factor, None, None, None, None, None]
        check(place, tensors, dtype, torch.channels_last, act="linear")
    check(place, [x, weight * 4000, styles, *[None] * 5], dtype, torch.channels_last, act="linear")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize(("up", "down", "o", "k"), [(1, 1, 7, 3), (2, 1, 7, 3), (1, 2, 7, 3), (1, 1, 3, 1)])
@pytest.mark.parametrize("place", PLACES)
def test_half_precision_survives_large_styles_without_demodulation(
    place: Place, up: int, down: int, o: int, k: int, dtype: torch.dtype
) -> None:
    """style * x passes fp16's 65504; the result does not. bf16 has the range, and must keep its precision there.

    The weight is frozen.
    """
    x, weight, styles, *_ = inputs(o=o, k=k, rgb=False)
    assert x is not None
    assert weight is not None
    assert styles is not None
    # Smooth: bf16's rounding puts sums on the other side of a kink.
    options: dict[str, Any] = {"up": up, "down": down, "demodulate": False, "act": "silu"}
    weight, styles = weight * 1e-3, styles * 1e3
    x = (100 * x).to(dtype).contiguous(memory_format=torch.channels_last)
    assert (x.float() * styles[:, :, None, None]).abs().max() > 65504

    def together(x: Tensor, styles: Tensor) -> Tensor:
        return call(**options)(x, weight.to(x.device), styles)

    wide = [x.double().requires_grad_(), styles.double().requires_grad_()]
    expected = oracle(**options)(wide[0], weight.double(), wide[1])
    weights = draw(*expected.shape, seed=99, low=0.5).to(dtype)
    y, found = run(place, together, [x, styles], weights)
    forward, backward = TOLERANCE[dtype]
    assert_close("output", y, expected, relative_l2=forward)
    for name, actual, wanted in zip(
        ("x", "styles"), found, torch.autograd.grad(expected, wide, weights.double()), strict=True
    ):
        assert actual is not None
        assert_close(f"gradient of {name}", actual, wanted, relative_l2=backward)


@pytest.mark.parametrize("create_graph", [False, True], ids=["first", "graph"])
@pytest.mark.parametrize(
    ("options", "o", "k"),
    [
        ({"act": "linear"}, 7, 3),
        ({"act": "lrelu", "up": 2}, 7, 3),
        ({"act": "silu", "down": 2}, 7, 3),
        ({"act": "linear"}, 3, 1),
        ({"act": "silu"}, 3, 1),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
@pytest.mark.parametrize("place", PLACES)
def test_half_precision_gradients_survive_large_styles_without_demodulation(
    place: Place, options: dict[str, Any], o: int, k: int, create_graph: bool
) -> None:
    """gradient * style passes 65504, and so does the gradient of the float32 weight: neither may become infinite."""
    x, weight, styles, *_ = inputs(o=o, k=k, rgb=False)
    assert x is not None
    assert weight is not None
    assert styles is not None
    options = {"demodulate": False} | options
    scale = torch.tensor([[1e3], [10.0]])  # one factor serves both samples' part in the weight's gradient
    tensors = [x.to(torch.float16).contiguous(memory_format=torch.channels_last), weight * 1e-3, styles * scale]
    wide = [t.double().requires_grad_() for t in tensors]
    expected = oracle(**options)(*wide)
    weights = (draw(*expected.shape, seed=99, low=0.5) * 200).to(torch.float16)
    wanted = torch.autograd.grad(expected, wide, weights.double())
    assert 1e3 * weights.double().max() > 65504
    assert wanted[1].abs().max() > 65504

    def together(*operands: Tensor) -> Tensor:
        return call(**options)(*operands)

    if create_graph:
        leaves = [t.to(place.device).requires_grad_() for t in tensors]
        with kernels.backend(place.backend):
            found = torch.autograd.grad(together(*leaves), leaves, weights.to(place.device), create_graph=True)
    else:
        found = run(place, together, tensors, weights)[1]
    for name, actual, e in zip(NAMES, found, wanted, strict=False):
        assert actual is not None
        assert_close(f"gradient of {name}", actual, e, relative_l2=TOLERANCE[torch.float16][1])


def spread(filters: str, weight: Tensor) -> Tensor:
    """Return the weight with its filters scaled: all alike, or each by its own factor between 1e-4 and 1e3."""
    if filters == "mixed":
        return weight * torch.logspace(-4, 3, len(weight))[:, None, None, None]
    return weight * float(filters)


@pytest.mark.parametrize("filters", ["1e-4", "1e-3", "1e3", "mixed"])
@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, {}),
        ({"up": 2, "clamp": 3.0}, {"rgb": False}),
        ({"down": 2, "act": "silu"}, {}),
        ({"act": "linear"}, {"n": 1, "i": 2, "o": 3, "h": 66, "w": 65}),  # the style is folded into the weight
        ({"act": "linear", "gain": 1.0}, {"o": 3, "k": 1, "rgb": False}),
        ({"act": "silu"}, {"o": 3, "k": 1}),
    ],
    ids=["plain", "up", "down-silu", "folded", "rgb", "rgb-silu"],
)
@pytest.mark.parametrize("place", PLACES)
def test_half_precision_survives_filters_of_any_scale(
    place: Place, options: dict[str, Any], shape: dict[str, Any], filters: str
) -> None:
    """Demodulation takes the filters' scale out of the result, and 1 / scale into what a gradient passes through."""
    resampling = {key: options[key] for key in ("up", "down") if key in options}
    tensors = inputs(**shape, **resampling)
    assert tensors[0] is not None
    assert tensors[1] is not None
    tensors[1] = spread(filters, tensors[1])
    kinks = {key: value for key, value in options.items() if key in ("up", "down", "clamp")}
    tensors = away_from_kinks(tensors, **kinks) if "act" not in options else tensors
    tensors[0] = tensors[0].to(torch.float16).contiguous(memory_format=torch.channels_last)
    wide = [None if t is None else t.double().requires_grad_() for t in tensors]
    leaves = [t for t in wide if t is not None]
    expected = oracle(**options)(*wide)
    unit = draw(*expected.shape, seed=99, low=0.5)
    for size in (1e-3, 1e2, 1e3):
        weights = (unit * size).to(torch.float16)
        found = iter(torch.autograd.grad(expected, leaves, weights.double(), retain_graph=True))
        y, gradients = run(place, call(**options), tensors, weights)
        forward, backward = TOLERANCE[torch.float16]
        assert_close("output", y, expected, relative_l2=forward)
        for name, leaf, actual in zip(NAMES, wide, gradients, strict=True):
            if leaf is not None:
                assert actual is not None
                assert_close(f"gradient of {name} at {size}", actual, next(found), relative_l2=backward)


@pytest.mark.parametrize("size", [1.0, 1e3])
@pytest.mark.parametrize("place", PLACES)
def test_half_precision_gradients_of_small_filters_with_create_graph(place: Place, size: float) -> None:
    """The composed backward pass; where gradients are of order 1, also what is differentiated again."""
    x, weight, styles, *_ = inputs(rgb=False)
    assert x is not None
    assert weight is not None
    tensors = [x.to(torch.float16), spread("mixed", weight), styles]

    def gradients(function: Callable[..., Tensor], leaves: list[Tensor], weights: Tensor) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(function(*leaves), leaves, weights, create_graph=True)
        return *first, *(torch.autograd.grad(first[2].square().sum(), leaves[2]) if size == 1.0 else ())

    wide = [t.double().requires_grad_() for t in tensors if t is not None]
    weights = (draw(2, 7, 6, 5, seed=99, low=0.5) * size).to(torch.float16)
    expected = gradients(oracle(act="linear"), wide, weights.double())
    leaves = [t.to(place.device).requires_grad_() for t in tensors if t is not None]
    with kernels.backend(place.backend):
        actual = gradients(call(act="linear"), leaves, weights.to(place.device))
    names = [*NAMES[:3], "second of styles"][: len(expected)]
    for name, a, e in zip(names, actual, expected, strict=True):
        assert_close(f"gradient of {name}", a, e, relative_l2=TOLERANCE[torch.float16][1])


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("place", PLACES)
def test_half_precision_weight_gradient_of_a_long_sum(place: Place, demodulate: bool) -> None:
    """A weight's gradient sums over pixels and samples: of float32 weights it may be far beyond fp16's range."""
    x, weight, styles, *_ = inputs(n=3, i=2, o=3, h=64, w=64, rgb=False)
    assert x is not None
    tensors = [(x.abs() + 1).to(torch.float16), weight, styles]
    wide = [None if t is None else t.double().requires_grad_() for t in tensors]
    expected = oracle(act="linear", demodulate=demodulate)(*wide)
    weights = (draw(*expected.shape, seed=99, low=0.5) * 1e3).to(torch.float16)
    found = torch.autograd.grad(expected, [t for t in wide if t is not None], weights.double())
    assert found[1].abs().max() > 65504
    gradients = run(place, call(act="linear", demodulate=demodulate), tensors, weights)[1]
    for name, actual, e in zip(NAMES, gradients, found, strict=False):
        assert actual is not None
        assert_close(f"gradient of {name}", actual, e, relative_l2=TOLERANCE[torch.float16][1])


@pytest.mark.parametrize("place", PLACES)
def test_half_precision_gradient_of_a_sample_without_one(place: Place) -> None:
    """Zeros have no scale to be divided by; nor does an infinity, which stays in its sample."""
    x, weight, styles, *_ = inputs(h=9, w=9, rgb=False)
    assert x is not None
    tensors = [x.to(torch.float16), weight, styles, *[None] * 5]
    weights = torch.zeros(2, 7, 9, 9)
    for gradient in run(place, call(act="linear"), tensors, weights)[1][:3]:
        assert gradient is not None
        assert not gradient.any()
    weights[1, 2, 4, 4] = float("inf")
    gx = run(place, call(act="linear"), tensors, weights)[1][0]
    assert gx is not None
    assert not gx[0].any()


@pytest.mark.parametrize("place", PLACES)
def test_half_precision_survives_a_filter_of_zeros(place: Place) -> None:
    x, weight, styles, *_ = inputs(rgb=False)
    assert weight is not None
    weight[1] = 0
    weight[2] = 0
    weight[2, 1, 1, 1] = 1e-7
    check(place, [x, weight, styles, *[None] * 5], torch.float16, torch.channels_last, act="linear")


@pytest.mark.parametrize("place", PLACES)
def test_half_precision_survives_a_sample_that_is_not_asked_for(place: Place) -> None:
    """Its gradient is 0, whatever its styles are."""
    x, weight, styles, *_ = inputs(rgb=False)
    assert x is not None
    assert styles is not None
    styles[0] *= 1e-36

    def second(x: Tensor, weight: Tensor, styles: Tensor) -> Tensor:
        return modulated_conv2d(x, weight, styles, act="linear")[1]

    _, gradients = run(place, second, [x.to(torch.float16), weight, styles])
    for gradient in gradients:
        assert gradient is not None
        assert gradient.isfinite().all()
    for index in (0, 2):
        assert not gradients[index][0].any()
        assert gradients[index][1].any()


@pytest.mark.parametrize("place", PLACES)
def test_half_precision_keeps_an_infinite_style_infinite(place: Place) -> None:
    x, weight, styles, *_ = (None if t is None else t.abs() + 0.5 for t in inputs(rgb=False))
    assert x is not None
    assert styles is not None
    styles[0, 1] = float("inf")
    y, _ = run(place, call(demodulate=False), [x.to(torch.float16), weight, styles])
    assert (y[0] == float("inf")).all()
    assert y[1].isfinite().all()
