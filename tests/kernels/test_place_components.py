# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.exporting import check_export
from support.kernel_cases import DTYPES, FORMATS, PLACES, Place, draw, run
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import native
from faceedit.kernels.place_components import ABSENT, mask_centres, place_components

PLACE = torch.ops.faceedit.place_components.default
CENTRES = torch.ops.faceedit.mask_centres.default
EXTREMES = (ABSENT, -(2**31), 2**31 - 1)
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


def pieces(n: int, dtype: torch.dtype = torch.float32, fmt: torch.memory_format = torch.contiguous_format) -> list:
    """Components of odd and even sizes, one larger than the canvas of 9 x 11, and features."""
    sizes = ((3, 4, 6), (2, 5, 3), (1, 12, 2), (4, 1, 1))
    parts = [draw(n, *size, seed=seed).to(dtype).contiguous(memory_format=fmt) for seed, size in enumerate(sizes)]
    return [*parts, draw(n, 2, 9, 11, seed=9).to(dtype).contiguous(memory_format=fmt)]


def some_centres(n: int) -> Tensor:
    """Inside, over each border, at a corner, and not there."""
    rows = [
        [[4, 5], [0, 0], [8, 10], [2, 3]],
        [[9, 11], [-1, 5], [4, -1], [ABSENT, ABSENT]],
        [[20, 5], [4, 5], [0, 10], [8, 0]],
    ]
    return torch.tensor(rows[:n], dtype=torch.int32)


def by_hand(components: list[Tensor], centres: Tensor, features: Tensor | None, height: int, width: int) -> Tensor:
    """Element by element."""
    blocks = []
    for k, part in enumerate(components):
        n, c, h, w = part.shape
        out = torch.zeros(n, c, height, width, dtype=part.dtype)
        for i in range(n):
            top, left = int(centres[i, k, 0]) - h // 2, int(centres[i, k, 1]) - w // 2
            for y in range(max(top, 0), min(top + h, height)):
                for x in range(max(left, 0), min(left + w, width)):
                    out[i, :, y, x] = part[i, :, y - top, x - left]
        blocks.append(out)
    return torch.cat([*blocks, *([] if features is None else [features])], 1)


def placing(centres: Tensor, features: bool = True) -> Callable[..., Tensor]:
    def function(*tensors: Tensor) -> Tensor:
        *parts, last = tensors if features else (*tensors, None)
        return place_components(parts, centres.to(tensors[0].device), last, (9, 11))

    return function


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("features", [False, True], ids=["alone", "features"])
@pytest.mark.parametrize("place", PLACES)
def test_every_element_and_gradient_is_exact(
    place: Place, features: bool, dtype: torch.dtype, fmt: torch.memory_format
) -> None:
    tensors = pieces(3, dtype, fmt)
    tensors = tensors if features else tensors[:-1]
    centres = some_centres(3)
    parts, last = (tensors[:-1], tensors[-1]) if features else (tensors, None)
    expected = by_hand(parts, centres, last, 9, 11)
    weights = draw(*expected.shape, seed=5).to(dtype).contiguous(memory_format=fmt)
    y, gradients = run(place, placing(centres, features), tensors, weights)
    assert torch.equal(y.cpu(), expected)
    assert y.is_contiguous(memory_format=fmt)
    leaves = [t.detach().float().requires_grad_() for t in tensors]
    found = by_hand(leaves[:-1] if features else leaves, centres, leaves[-1] if features else None, 9, 11)
    for actual, wanted in zip(gradients, torch.autograd.grad(found, leaves, weights.float()), strict=True):
        assert actual is not None
        assert torch.equal(actual.cpu().float(), wanted)


@pytest.mark.parametrize("place", PLACES)
def test_any_centre_is_safe_and_an_absent_part_is_zero(place: Place) -> None:
    part = draw(1, 2, 5, 4, seed=1)
    for y in EXTREMES:
        for x in (*EXTREMES, 3):
            centres = torch.tensor([[[y, x]]], dtype=torch.int32)
            out, (gradient,) = run(
                place, lambda p, c=centres: place_components([p], c.to(p.device), size=(6, 7)), [part]
            )
            assert not out.any()
            assert gradient is not None
            assert not gradient.any()


@pytest.mark.parametrize("place", PLACES)
def test_special_values_are_copied_as_they_are(place: Place) -> None:
    part = torch.tensor([float("nan"), float("inf"), -0.0, 1e-40]).view(1, 1, 2, 2)
    centre = torch.tensor([[[1, 1]]], dtype=torch.int32)
    out, _ = run(place, lambda p: place_components([p], centre.to(p.device), None, (4, 4)), [part])
    assert out.isnan().sum() == 1
    assert torch.equal(out[0, 0, :2, :2].cpu().view(torch.int32), part[0, 0].view(torch.int32))
    assert not out[0, 0, 2:].any()


@pytest.mark.parametrize("place", PLACES)
def test_as_many_components_as_fit(place: Place) -> None:
    parts = [draw(1, 1, 2, 2, seed=k) for k in range(24)]
    centres = torch.tensor([[[k % 5, k % 7] for k in range(24)]], dtype=torch.int32)
    out, _ = run(place, lambda *p: place_components(p, centres.to(p[0].device), None, (6, 7)), parts)
    assert torch.equal(out.cpu(), by_hand(parts, centres, None, 6, 7))


sides = st.integers(1, 13)


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(1, 5), sides, sides), min_size=1, max_size=4),
    st.integers(0, 3),
    st.tuples(sides, sides),
    st.integers(0, 1000),
    st.sampled_from(["nchw", "nhwc", "sliced", "mixed"]),
)
def test_any_sizes(sizes: list[tuple[int, int, int]], n: int, canvas: tuple[int, int], seed: int, layout: str) -> None:
    parts = [draw(n, *size, seed=seed + k) for k, size in enumerate(sizes)]
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randint(-8, 20, (n, len(sizes), 2), generator=generator).to(torch.int32)
    if layout == "nhwc":
        parts = [p.contiguous(memory_format=torch.channels_last) for p in parts]
    elif layout == "mixed":
        parts = [p.contiguous(memory_format=torch.channels_last) if k % 2 else p for k, p in enumerate(parts)]
    elif layout == "sliced":
        parts = [torch.stack([p, p], 2).flatten(1, 2)[:, ::2] for p in parts]
        centres = centres.repeat_interleave(2, 2)[..., ::2]
    leaves = [p.requires_grad_() for p in parts]
    with kernels.backend("cpu"):
        out = place_components(leaves, centres, None, canvas)
    expected = by_hand(leaves, centres, None, *canvas) + 0 * sum(p.sum() for p in leaves)
    assert torch.equal(out, expected)
    weights = draw(*out.shape, seed=seed)
    if n:
        for actual, wanted in zip(
            torch.autograd.grad(out, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True
        ):
            assert torch.equal(actual, wanted)


def test_gradcheck_and_gradgradcheck() -> None:
    tensors = tuple(t.double().requires_grad_() for t in pieces(2))
    function = placing(some_centres(2))
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


@pytest.mark.parametrize("features", [True, False])
def test_many_gradients_at_a_time(features: bool) -> None:
    """A single component takes all channels of the gradient."""
    tensors = [t.requires_grad_() for t in (pieces(2) if features else pieces(2)[:1])]
    y = placing(some_centres(2) if features else some_centres(2)[:, :1], features)(*tensors)
    many = draw(3, *y.shape, seed=4)
    rows = torch.autograd.grad(y, tensors, many, is_grads_batched=True, retain_graph=True)
    mapped = torch.vmap(lambda one: torch.autograd.grad(y, tensors, one, retain_graph=True))(many)
    for index, one in enumerate(many):
        alone = torch.autograd.grad(y, tensors, one, retain_graph=True)
        for row, other, wanted in zip(rows, mapped, alone, strict=True):
            assert torch.equal(row[index], wanted)
            assert torch.equal(other[index], wanted)


def test_only_the_wanted_gradients_come() -> None:
    tensors = pieces(2)
    tensors[1].requires_grad_()
    out = placing(some_centres(2))(*tensors)
    out.sum().backward()
    assert [t.grad is not None for t in tensors] == [False, True, False, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_opcheck(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    *parts, features = (t.requires_grad_() for t in pieces(2, dtype, fmt))
    centres = some_centres(2)
    for arguments in (
        (parts, centres, features, 9, 11),
        (parts, centres, None, 5, 6),
        ([parts[0].detach(), parts[1]], centres[:, :2], None, 5, 6),
        ([p[:0] for p in parts], centres[:0], None, 5, 6),
    ):
        torch.library.opcheck(PLACE, arguments)
    torch.library.opcheck(CENTRES, (draw(2, 3, 5, 6, seed=1, low=0.0).to(dtype).contiguous(memory_format=fmt),))
    torch.library.opcheck(CENTRES, (torch.zeros(0, 3, 5, 6, dtype=dtype),))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    *parts, features = pieces(2)
    mask = draw(2, 4, 9, 11, seed=3, low=0.0)

    def step(*tensors: Tensor) -> Tensor:
        *parts, features = tensors
        return place_components([p * 2 for p in parts], mask_centres(mask), features).square().sum()

    leaves = [t.requires_grad_() for t in (*parts, features)]
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*leaves), leaves)
    for actual, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_exports_to_standard_operators() -> None:
    def inputs(n: int) -> list[Tensor]:
        return [*pieces(n)[:2], pieces(n)[-1], some_centres(n)[:, :2].contiguous()]

    check_export(
        lambda a, b, f, c: place_components([a, b], c, f), PLACE, inputs(2), inputs(3), per_sample={0, 1, 2, 3}
    )
    masks = [draw(n, 3, 9, 11, seed=4, low=-0.5) for n in (2, 3)]
    check_export(lambda m: mask_centres(m).float(), CENTRES, masks[:1], masks[1:], per_sample={0})


def test_vmap_equals_a_loop() -> None:
    parts, centres = draw(4, 2, 3, 4, 5, seed=1), some_centres(2)[:, :1]
    folded = torch.vmap(lambda p: place_components([p], centres, None, (9, 11)))(parts)
    assert torch.equal(folded, torch.stack([place_components([p], centres, None, (9, 11)) for p in parts]))
    masks = draw(4, 2, 3, 5, 6, seed=2, low=0.0)
    assert torch.equal(torch.vmap(mask_centres)(masks), torch.stack([mask_centres(m) for m in masks]))


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_same_bits_at_any_thread_count(fmt: torch.memory_format) -> None:
    parts = [draw(2, 6, 40, 30, seed=k).contiguous(memory_format=fmt) for k in range(2)]
    centres = torch.tensor([[[20, 30], [70, 5]], [[1, 2], [40, 90]]], dtype=torch.int32)
    mask = draw(5, 3, 70, 81, seed=7, low=-0.5)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            function = lambda *p: place_components(p, centres, None, (80, 90))  # noqa: E731
            y, gradients = run(Place("cpu"), function, parts)
            results.append([y, *gradients, mask_centres(mask)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][0], by_hand(parts, centres, None, 80, 90))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_centres_are_exact(place: Place, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and place.backend != "eager":
        pytest.skip("fp64 runs on the eager backend")
    soft = draw(2, 3, 37, 1100, seed=1, low=-0.3)
    mask = (soft > 0).to(dtype) if dtype in (torch.uint8, torch.bool) else soft.to(dtype)
    mask[0, 1] = 0
    with kernels.backend(place.backend):
        found = mask_centres(mask.to(place.device)).cpu()
    units = (mask.double().clamp(0, 1) * 2**20).round()
    weight = units.sum((2, 3))
    y = (units.sum(3) * torch.arange(37)).sum(2) / weight
    x = (units.sum(2) * torch.arange(1100)).sum(2) / weight
    expected = torch.stack([y, x], 2).round().nan_to_num(ABSENT).to(torch.int32)
    assert found.dtype == torch.int32
    assert torch.equal(found, expected)
    assert found[0, 1].tolist() == [ABSENT, ABSENT]


@pytest.mark.parametrize("place", PLACES)
def test_centres_round_halves_to_even_and_skip_nan(place: Place) -> None:
    mask = torch.zeros(1, 4, 8, 8)
    mask[0, 0, 2:4, 5:7] = 1  # the mean is 2.5, 5.5
    mask[0, 1, 3:5, 6:8] = 0.25  # 3.5, 6.5
    mask[0, 2, 6, 1], mask[0, 2, 0, 0], mask[0, 2, 0, 7] = 7.0, float("nan"), -3.0
    mask[0, 3, 5, 4] = 2.0**-22  # rounds to nothing
    with kernels.backend(place.backend):
        found = mask_centres(mask.to(place.device))
    assert found[0].tolist() == [[2, 6], [4, 6], [6, 1], [ABSENT, ABSENT]]


MAP = torch.zeros(2, 3, 4, 5)
GOOD = {"components": [MAP], "centres": torch.zeros(2, 1, 2, dtype=torch.int32), "size": (6, 7)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"components": []}, ValueError, "components must be 1 to 24 maps, got 0"),
        ({"components": [MAP] * 25}, ValueError, "components must be 1 to 24 maps, got 25"),
        ({"components": [MAP[0]]}, ValueError, r"components\[0\] must be of shape \(N, C, H, W\)"),
        ({"components": [MAP, MAP.double()]}, TypeError, r"components\[1\] must be float32 like components\[0\]"),
        ({"components": [MAP, MAP[:1]]}, ValueError, r"components\[1\] must be of shape \(2, 3, 4, 5\)"),
        ({"centres": torch.zeros(2, 2, 2, dtype=torch.int32)}, ValueError, r"centres must be of shape \(2, 1, 2\)"),
        ({"centres": torch.zeros(2, 1, 2)}, TypeError, "centres must be int32"),
        ({"mask_features": torch.zeros(2, 3, 6, 8)}, ValueError, r"mask_features must be of size \(6, 7\)"),
        ({"size": None}, ValueError, r"size must be \(H, W\) without mask_features"),
        ({"size": (-1, 7)}, ValueError, "size must not be negative"),
        ({"size": 6}, TypeError, r"size must be \(H, W\), got 6"),
        ({"size": (6, 7.0)}, TypeError, "size must be an integer, got 7.0"),
        ({"components": None}, TypeError, "components must be a list of tensors, got None"),
        ({"centres": [[0, 0]]}, TypeError, "centres must be a tensor"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        place_components(**(GOOD | change))


def test_centres_reject() -> None:
    with pytest.raises(ValueError, match=r"mask_centres: mask must be of shape \(N, K, H, W\)"):
        mask_centres(torch.zeros(3, 4))
    with pytest.raises(TypeError, match="mask must be floating point, uint8 or bool"):
        mask_centres(torch.zeros(1, 1, 2, 2, dtype=torch.int64))
    with pytest.raises(TypeError, match="mask_centres: mask must be a tensor, got None"):
        mask_centres(None)
