# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_close
from support.exporting import check_export
from support.kernel_cases import DTYPES, FORMATS, PLACES, Place, check_against_oracle, draw, run
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import native
from faceedit.kernels.alpha_blend import alpha_blend, soften
from faceedit.kernels.tensors import memory_format

NAMES = ("fg", "bg", "mask")
OP = torch.ops.faceedit.alpha_blend.default
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


def images(n: int, c: int, h: int, w: int, dtype: torch.dtype, fmt: torch.memory_format) -> list[Tensor]:
    return [draw(n, c, h, w, seed=seed).to(dtype).to(memory_format=fmt) for seed in (1, 2)]


def soft_mask(n: int, h: int, w: int) -> Tensor:
    """A mask with values between, at and next to 0 and 1."""
    return draw(n, 1, h, w, seed=3, low=0.0).mul(1.5).sub(0.25).clamp(0, 1)


def straight_line(fg: Tensor, bg: Tensor, mask: Tensor) -> Tensor:
    """For finite values, and the gradient at 0 and 1 that `where` would hide."""
    return bg + mask * (fg - bg)


def levels(image: Tensor) -> Tensor:
    return ((image + 1) * 80).clamp(0, 255).to(torch.uint8)


def assert_same_levels(actual: Tensor, exact: Tensor) -> None:
    """Compare uint8 with real-valued levels: only a value next to a half may round either way."""
    assert actual.dtype == torch.uint8
    exact = exact.clamp(0, 255)
    wanted = exact.round()
    near_half = ((exact - exact.floor()) - 0.5).abs() < 1e-4
    difference = (actual.cpu().double() - wanted).abs()
    assert not difference[~near_half].any()
    assert (difference <= 1).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["mask-each", "mask-shared"])
@pytest.mark.parametrize("place", PLACES)
def test_matches_reference(place: Place, shared: bool, dtype: torch.dtype, fmt: torch.memory_format) -> None:
    tensors = [*images(2, 3, 13, 11, dtype, fmt), soft_mask(1 if shared else 2, 13, 11)]
    check_against_oracle(place, alpha_blend, straight_line, tensors, NAMES, dtype)
    y, _ = run(place, alpha_blend, tensors)
    assert y.stride() == tensors[0].stride()


@pytest.mark.parametrize("wanted", range(1, 8), ids=lambda bits: f"{bits:03b}")
@pytest.mark.parametrize("place", PLACES)
def test_every_subset_of_gradients(place: Place, wanted: int) -> None:
    tensors = [*images(2, 5, 6, 7, torch.float32, torch.channels_last), soft_mask(2, 6, 7)]
    inputs = [t.to(place.device).requires_grad_(bool(wanted >> i & 1)) for i, t in enumerate(tensors)]
    with kernels.backend(place.backend):
        y = alpha_blend(*inputs)
    leaves = [t for t in inputs if t.requires_grad]
    wide = [t.detach().cpu().double().requires_grad_(t.requires_grad) for t in inputs]
    expected = torch.autograd.grad(straight_line(*wide).sum(), [t for t in wide if t.requires_grad])
    for actual, right in zip(torch.autograd.grad(y.sum(), leaves), expected, strict=True):
        assert_close("gradient", actual, right, relative_l2=5e-6)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.uint8], ids=str)
@pytest.mark.parametrize("quantize", [False, True])
@pytest.mark.parametrize("place", PLACES)
def test_ends_are_exact_and_do_not_leak(place: Place, quantize: bool, dtype: torch.dtype) -> None:
    if dtype == torch.float64 and place.backend != "eager":
        pytest.skip("fp64 runs on the eager backend")
    fg, bg = images(2, 3, 8, 9, torch.float32, torch.contiguous_format)
    fg, bg = (levels(fg), levels(bg)) if dtype == torch.uint8 else (fg.to(dtype), bg.to(dtype))
    mask = (draw(2, 1, 8, 9, seed=3) > 0).float()
    expected = torch.where(mask == 1, fg, bg)
    if dtype != torch.uint8:
        fg, bg = torch.where(mask == 1, fg, float("nan")), torch.where(mask == 1, float("inf"), bg)
    with kernels.backend(place.backend):
        y = alpha_blend(*(t.to(place.device) for t in (fg, bg, mask)), quantize=quantize).cpu()
    if quantize and dtype != torch.uint8:
        assert_same_levels(y, expected.double() * 127.5 + 127.5)
    else:
        assert torch.equal(y, expected)


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("kinds", ["ff", "fu", "uf", "uu"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_quantizes(place: Place, dtype: torch.dtype, kinds: str, fmt: torch.memory_format) -> None:
    pair = [
        levels(t.float()) if kind == "u" else t for t, kind in zip(images(2, 3, 9, 7, dtype, fmt), kinds, strict=True)
    ]
    mask = soft_mask(1, 9, 7)
    y, _ = run(place, lambda *t: alpha_blend(*t, mask.to(t[0].device), quantize=True), pair)
    wide = [t.double() if t.dtype == torch.uint8 else t.double() * 127.5 + 127.5 for t in pair]
    assert_same_levels(y, straight_line(*wide, mask.double()))
    assert y.stride() == pair[0].stride()


@pytest.mark.parametrize("place", PLACES)
def test_halves_go_to_even_and_the_range_is_closed(place: Place) -> None:
    fg = torch.tensor([1, 2, 3, 255], dtype=torch.uint8).view(1, 1, 1, 4)
    bg = torch.tensor([2, 3, 4, 254], dtype=torch.uint8).view(1, 1, 1, 4)
    y, _ = run(place, alpha_blend, [fg, bg, torch.full((1, 1, 1, 4), 0.5)])
    assert y.flatten().tolist() == [2, 2, 4, 254]
    wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.5, -1.5, 1e30, 1.0, -1.0]).view(1, 1, 1, 8)
    y, _ = run(place, lambda x: alpha_blend(x, x, x.new_ones(1, 1, 1, 8), quantize=True), [wild])
    assert y.flatten().tolist() == [0, 255, 0, 255, 0, 255, 255, 0]


@pytest.mark.parametrize("place", PLACES)
def test_a_uint8_background_under_a_floating_image(place: Place) -> None:
    fg, bg = images(2, 3, 5, 6, torch.float32, torch.contiguous_format)
    bg, mask = levels(bg), soft_mask(2, 5, 6)
    check_against_oracle(
        place,
        lambda f, m: alpha_blend(f, bg.to(f.device), m),
        lambda f, m: straight_line(f, bg.double() / 127.5 - 1, m),
        [fg, mask],
        ("fg", "mask"),
        torch.float32,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_mask_dtypes(place: Place, dtype: torch.dtype) -> None:
    fg, bg = images(2, 3, 9, 40, torch.float32, torch.contiguous_format)
    mask = soft_mask(2, 9, 40)
    mask = (mask > 0.5).to(dtype) if dtype in (torch.uint8, torch.bool) else mask.to(dtype)
    y, _ = run(place, lambda f, b: alpha_blend(f, b, mask.to(f.device)), [fg, bg])
    assert_close("output", y, straight_line(fg.double(), bg.double(), mask.double()), relative_l2=2e-6)


@pytest.mark.parametrize("place", PLACES)
def test_nan_stays_where_it_is_blended(place: Place) -> None:
    fg, bg = images(1, 2, 1, 4, torch.float32, torch.contiguous_format)
    fg[0, 0, 0, 1], bg[0, 1, 0, 2] = float("nan"), float("nan")
    mask = torch.tensor([0.5, 0.5, 0.25, float("nan")]).view(1, 1, 1, 4)
    y, _ = run(place, alpha_blend, [fg, bg, mask])
    assert y.isnan().flatten().tolist() == [False, True, False, True, False, False, True, True]


shapes = st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 37), st.integers(1, 37))


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(["nchw", "nhwc", "sliced", "mixed", "offset"]))
def test_any_shape_and_stride(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str) -> None:
    n, c, h, w = shape
    fg, bg = images(n, c, h, w, dtype, torch.contiguous_format)
    mask = soft_mask(1 if w % 2 else n, h, w)
    if layout == "nhwc":
        fg, bg = (t.contiguous(memory_format=torch.channels_last) for t in (fg, bg))
    elif layout == "sliced":
        fg = torch.stack([fg, fg], 2).flatten(1, 2)[:, ::2]
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "mixed":
        bg = bg.contiguous(memory_format=torch.channels_last)
    elif layout == "offset":  # a storage offset of one element: no vector load is aligned
        fg = torch.cat([fg.new_zeros(1), fg.flatten()])[1:].view(n, c, h, w)
    with kernels.backend("cpu"):
        y = alpha_blend(fg, bg, mask)
    expected = straight_line(fg.double(), bg.double(), mask.double())
    assert_close("output", y, expected, relative_l2={torch.float32: 2e-6}.get(dtype, 4e-3))
    assert y.is_contiguous(memory_format=memory_format(fg))


@needs_cpp
def test_many_channels_last_outgrow_a_row() -> None:
    tensors = [*images(1, 1500, 2, 3, torch.float32, torch.channels_last), soft_mask(1, 2, 3)]
    check_against_oracle(Place("cpu"), alpha_blend, straight_line, tensors, NAMES, torch.float32)


def test_feather_is_a_ramp_as_wide_as_it_says() -> None:
    mask = torch.zeros(1, 1, 40, 40)
    mask[:, :, :, 20:] = 1
    mask[:, :, :5] = 0
    for radius in (1, 4):
        soft = soften(mask, radius)
        ramp = torch.arange(1, 2 * radius + 1) / (2 * radius + 1)
        assert_close("ramp", soft[0, 0, 25, 20 - radius : 20 + radius], ramp, relative_l2=1e-6)
        assert torch.equal(soft[0, 0, 20:, 20 + radius :], torch.ones(20, 20 - radius))  # up to the image's border
        outside = torch.nn.functional.max_pool2d(mask, 2 * radius + 1, 1, radius) == 0
        assert not soft[outside].any()
        assert torch.equal(soften(mask.bool(), radius), soft)
    fg, bg = images(2, 3, 40, 40, torch.float32, torch.contiguous_format)
    assert torch.equal(alpha_blend(fg, bg, mask, feather=4), alpha_blend(fg, bg, soften(mask, 4)))
    assert alpha_blend(fg[:0], bg[:0], mask, feather=4).shape == (0, 3, 40, 40)


def test_gradcheck_and_gradgradcheck() -> None:
    tensors = [*images(2, 2, 3, 4, torch.float64, torch.contiguous_format), draw(1, 1, 3, 4, seed=3, low=0.0)]
    inputs = tuple(t.double().requires_grad_() for t in tensors)
    for function in (alpha_blend, lambda *t: alpha_blend(*t, feather=1)):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_opcheck(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    fg, bg = (t.requires_grad_() for t in images(2, 3, 4, 5, dtype, fmt))
    mask = soft_mask(2, 4, 5).requires_grad_()
    checks: list[tuple[Any, ...]] = [
        (fg, bg, mask, False),
        (fg, bg.detach(), mask.detach()[:1], False),
        (fg[:0], bg[:0], mask[:0], False),
        (fg[:, :, ::2], bg[:, :, ::2], mask[:, :, ::2], False),
        (fg.detach(), levels(bg.detach().float()), mask.detach(), True),
    ]
    for arguments in checks:
        torch.library.opcheck(OP, arguments)


def test_a_quantized_result_has_no_gradient() -> None:
    fg, bg = images(1, 3, 4, 5, torch.float32, torch.contiguous_format)
    y = alpha_blend(fg.requires_grad_(), bg, soft_mask(1, 4, 5).requires_grad_(), quantize=True)
    assert not y.requires_grad


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    def step(fg: Tensor, bg: Tensor, mask: Tensor) -> Tensor:
        return alpha_blend(fg * 2, bg, mask, feather=1).square().sum()

    tensors = [*images(2, 3, 4, 5, torch.float32, torch.channels_last), soft_mask(2, 4, 5)]
    leaves = [t.requires_grad_() for t in tensors]
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = torch.autograd.grad(step(*leaves), leaves)
    for actual, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert_close("gradient", actual, wanted, relative_l2=1e-6)


@pytest.mark.parametrize(
    "function",
    [alpha_blend, lambda *t: alpha_blend(*t, feather=2), lambda *t: alpha_blend(*t, quantize=True)],
    ids=["plain", "feather", "quantize"],
)
def test_exports_to_standard_operators(function: Callable[..., Tensor]) -> None:
    def inputs(n: int) -> list[Tensor]:
        return [*images(n, 3, 6, 7, torch.float32, torch.contiguous_format), soft_mask(n, 6, 7)]

    check_export(function, OP, inputs(2), inputs(5), per_sample={0, 1, 2})


def test_vmap_equals_a_loop() -> None:
    fg, bg, mask = draw(4, 2, 3, 5, 6, seed=1), draw(2, 3, 5, 6, seed=2), draw(4, 1, 1, 5, 6, seed=3, low=0.0)
    folded = torch.vmap(lambda f, m: alpha_blend(f, bg, m))(fg, mask)
    assert torch.equal(folded, torch.stack([alpha_blend(f, bg, m) for f, m in zip(fg, mask, strict=True)]))


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_same_bits_at_any_thread_count_and_batch_size(fmt: torch.memory_format) -> None:
    tensors = [*images(2, 5, 61, 63, torch.float32, fmt), soft_mask(2, 61, 63)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(run(Place("cpu"), alpha_blend, tensors, tensors[0]))
    finally:
        torch.set_num_threads(before)
    (first, first_gradients), (second, second_gradients) = results
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(first_gradients, second_gradients, strict=True) if a is not None)
    alone, _ = run(Place("cpu"), alpha_blend, [t[1:] for t in tensors])
    assert torch.equal(alone[0], first[1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"fg": torch.zeros(3, 4, 5)}, ValueError, r"fg must be of shape \(N, C, H, W\)"),
        ({"bg": torch.zeros(2, 3, 4, 6)}, ValueError, r"bg must be of shape \(2, 3, 4, 5\)"),
        ({"bg": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, TypeError, "bg must be floating point or uint8"),
        ({"mask": torch.zeros(2, 3, 4, 5)}, ValueError, r"mask must be of shape \(2, 1, 4, 5\) or \(1, 1, 4, 5\)"),
        ({"mask": torch.zeros(2, 1, 4, 5, dtype=torch.int64)}, TypeError, "mask must be floating point, uint8 or bool"),
        ({"feather": -1}, ValueError, "feather must be a number of pixels >= 0, got -1"),
        ({"feather": 1.5}, TypeError, "feather must be an integer, got 1.5"),
        ({"fg": None}, TypeError, "fg must be a tensor, got None"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good = {"fg": torch.zeros(2, 3, 4, 5), "bg": torch.zeros(2, 3, 4, 5), "mask": torch.zeros(2, 1, 4, 5)}
    with pytest.raises(error, match=message):
        alpha_blend(**(good | change))
