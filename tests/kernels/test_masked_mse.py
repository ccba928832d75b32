# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_close
from support.exporting import check_export
from support.kernel_cases import DTYPES, FORMATS, PLACES, TOLERANCE, Place, check_against_oracle, draw, run
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import native
from faceedit.kernels.masked_mse import NORMALIZE, RELAX, effective_mask, masked_mse, reference

OP = torch.ops.faceedit.masked_mse.default
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


def images(n: int, c: int, h: int, w: int, dtype: torch.dtype, fmt: torch.memory_format) -> tuple[Tensor, Tensor]:
    # The second image differs by at least 0.5, so that a - b keeps its precision in the half types.
    a = draw(n, c, h, w, seed=1)
    b = a + 0.5 + draw(n, c, h, w, seed=2, low=0.0)
    return a.to(dtype).to(memory_format=fmt), b.to(dtype).to(memory_format=fmt)


def masks(n: int, h: int, w: int) -> list[Tensor]:
    return [draw(n, 1, h, w, seed=3, low=0.0), draw(1, 1, h, w, seed=4, low=-0.5), draw(n, 1, h, w, seed=5, low=-0.6)]


def with_settings(function: Callable[..., Any], relax: str, normalize: str) -> Callable[..., Tensor]:
    if function is reference:
        return lambda *t: reference(*t, relax, normalize)[0]
    return lambda a, b, m, e, i: masked_mse(a, b, m, exclude=e, include=i, relax=relax, normalize=normalize)


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("normalize", NORMALIZE)
@pytest.mark.parametrize("place", PLACES)
def test_matches_reference(
    place: Place, normalize: str, relax: str, dtype: torch.dtype, fmt: torch.memory_format
) -> None:
    a, b = images(2, 3, 13, 11, dtype, fmt)
    wide = [m.double() for m in masks(2, 13, 11)]
    narrow = [m.float() for m in wide]
    check_against_oracle(
        place,
        lambda a, b: with_settings(masked_mse, relax, normalize)(a, b, *(m.to(a.device) for m in narrow)),
        lambda a, b: with_settings(reference, relax, normalize)(a, b, *wide),
        [a, b],
        ("a", "b"),
        dtype,
    )


def test_reference_is_the_published_formula() -> None:
    """The oracle itself against numpy-like arithmetic, pixel by pixel."""
    a, b = (t.double() for t in images(2, 3, 4, 5, torch.float32, torch.contiguous_format))
    mask, exclude, include = (m.double() for m in masks(2, 4, 5))
    for n in range(2):
        total = weight = 0.0
        for y in range(4):
            for x in range(5):
                m = min(max(float(mask[n, 0, y, x] - exclude[0, 0, y, x]), 0.0), 1.0)
                m = min(max(m + float(include[n, 0, y, x]), 0.0), 1.0)
                total += m * float(((a - b)[n, :, y, x] ** 2).sum())
                weight += m
        everything = reference(a, b, mask, exclude, include, "clamp", "all")[0][n]
        inside = reference(a, b, mask, exclude, include, "clamp", "mask")[0][n]
        assert float(everything) == pytest.approx(total / 60, rel=1e-12)
        assert float(inside) == pytest.approx(total / (3 * weight), rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_mask_dtypes_and_absent_masks(place: Place, dtype: torch.dtype) -> None:
    a, b = images(3, 3, 9, 40, torch.float32, torch.contiguous_format)
    mask = (draw(1, 1, 9, 40, seed=3) > 0).to(dtype)
    for present in (None, mask, mask.expand(3, 1, 9, 40)):
        y, _ = run(place, lambda a, b, m=present: masked_mse(a, b, None if m is None else m.to(a.device)), [a, b])
        wide = None if present is None else present.double()
        expected = reference(a.double(), b.double(), wide, None, None, "clamp", "all")[0]
        assert_close("loss", y, expected, relative_l2=1e-6)


def halved_masks(n: int, h: int, w: int) -> list[Tensor]:
    """Masks of which the first and the last are of half the size."""
    half, _, last = masks(n, h // 2, w // 2)
    return [half, masks(n, h, w)[1], last]


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("relax", RELAX)
@pytest.mark.parametrize("place", PLACES)
def test_halved_masks_match_reference(place: Place, relax: str, dtype: torch.dtype, fmt: torch.memory_format) -> None:
    a, b = images(2, 3, 14, 34, dtype, fmt)
    narrow = halved_masks(2, 14, 34)
    wide = [m.double() for m in narrow]
    check_against_oracle(
        place,
        lambda a, b: with_settings(masked_mse, relax, "mask")(a, b, *(m.to(a.device) for m in narrow)),
        lambda a, b: with_settings(reference, relax, "mask")(a, b, *wide),
        [a, b],
        ("a", "b"),
        dtype,
    )


def test_reference_spreads_a_halved_mask_by_quarters() -> None:
    """Pixel 2i lies a quarter before element i of the half, pixel 2i + 1 a quarter behind it; the edges go on."""
    half = torch.tensor([[0.0, 4.0], [8.0, 16.0]]).double().view(1, 1, 2, 2)
    found = effective_mask(torch.zeros(1, 1, 4, 4).double(), half, None, None, "clamp")
    rows = [[0, 1, 3, 4], [2, 3.25, 5.75, 7], [6, 7.75, 11.25, 13], [8, 10, 14, 16]]
    assert found is not None
    assert found[0, 0].tolist() == rows


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("side", [(2, 2), (2, 600), (600, 2), (6, 514), (40, 22)], ids=str)
def test_every_pixel_of_a_halved_mask(place: Place, side: tuple[int, int]) -> None:
    """The gradient of a loss with a - b = 1 shows the mask itself, pixel by pixel, across rows and blocks."""
    h, w = side
    a = torch.ones(2, 1, h, w)
    for count, dtype in ((2, torch.float32), (1, torch.float16), (2, torch.uint8), (1, torch.bool)):
        mask = draw(count, 1, h // 2, w // 2, seed=6, low=0.0)
        mask = mask.to(dtype) if dtype.is_floating_point else (mask > 0.5).to(dtype)
        _, (gradient, _) = run(place, lambda a, b, m=mask: masked_mse(a, b, m.to(a.device)), [a, torch.zeros_like(a)])
        wanted = effective_mask(a.double(), mask, None, None, "clamp")
        assert gradient is not None
        assert wanted is not None
        assert_close("mask", gradient * (h * w / 2), wanted.expand(2, 1, h, w), relative_l2=1e-6, absolute=1e-6)


def test_halved_masks_trace_map_and_take_an_empty_batch() -> None:
    a, b = images(2, 3, 4, 6, torch.float32, torch.contiguous_format)
    mask, exclude, include = halved_masks(2, 4, 6)
    torch.library.opcheck(OP, (a.requires_grad_(), b, mask, exclude, include, "minmax", "mask"))
    torch.library.opcheck(OP, (a[:0], b[:0], mask[:0], None, None, "clamp", "mask"))
    assert torch.equal(
        torch.vmap(lambda a, m: masked_mse(a[None], b[:1], m[None]))(a, mask)[:, 0],
        torch.cat([masked_mse(a[i : i + 1], b[:1], mask[i : i + 1]) for i in range(2)]),
    )


def test_core_refuses_a_halved_mask_of_odd_images() -> None:
    if not native.build_report()["cpp"]:
        pytest.skip("native module is missing")
    images_ = {"a": 1, "b": 1, "inverse_weight": 1, "loss": 1, "workspace": 1, "batch": 1, "channels": 1}
    for pixels, width, stride in ((6, 3, 0), (6, 2, 0), (8, 4, 8), (8, 0, 0)):
        mask = {"mask": (1, stride, 0), "mask_halved": True, "pixels": pixels, "width": width}
        message = "a mask must have the pixels" if stride else "an even number of rows and of columns"
        with pytest.raises(RuntimeError, match=message):
            native.module().masked_mse_fwd((-1, 1, 0), **images_, **mask)


@needs_cpp
@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 37), st.integers(1, 37)),
    st.sampled_from(NORMALIZE),
    st.sampled_from(["nchw", "nhwc", "sliced", "mixed"]),
)
def test_any_shape_and_stride(shape: tuple[int, int, int, int], normalize: str, layout: str) -> None:
    n, c, h, w = shape
    a, b = images(n, c, h, w, torch.float32, torch.contiguous_format)
    mask = draw(n, 1, h, w, seed=3, low=0.0)
    if layout == "nhwc":
        a, b = (t.contiguous(memory_format=torch.channels_last) for t in (a, b))
    elif layout == "sliced":
        a = torch.stack([a, a])[1]
        mask = mask.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "mixed":
        a = a.contiguous(memory_format=torch.channels_last)
    with kernels.backend("cpu"):
        loss = masked_mse(a, b, mask, normalize=normalize)
    expected = reference(a.double(), b.double(), mask.double(), None, None, "clamp", normalize)[0]
    assert_close("loss", loss, expected, relative_l2=1e-6)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_empty_mask_gives_zero_and_no_gradient(place: Place, dtype: torch.dtype) -> None:
    a, b = images(2, 3, 5, 5, dtype, torch.contiguous_format)
    loss, gradients = run(place, lambda a, b: masked_mse(a, b, a.new_zeros(1, 1, 5, 5), normalize="mask"), [a, b])
    assert torch.equal(loss.cpu(), torch.zeros(2))
    assert all(g is not None and not g.any() for g in gradients)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_pixel_mask(place: Place, dtype: torch.dtype) -> None:
    a, b = images(1, 3, 6, 7, dtype, torch.contiguous_format)
    mask = torch.zeros(1, 1, 6, 7)
    mask[0, 0, 4, 2] = 1
    loss, _ = run(place, lambda a, b: masked_mse(a, b, mask.to(a.device), normalize="mask"), [a, b])
    assert_close("loss", loss, ((a.double() - b.double())[:, :, 4, 2] ** 2).mean(1), relative_l2=1e-6)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("relax", RELAX)
def test_nan_is_reported(place: Place, relax: str) -> None:
    a, b = images(3, 3, 5, 5, torch.float32, torch.contiguous_format)
    a[0, 1, 2, 3] = float("nan")
    mask = torch.ones(3, 1, 5, 5)
    mask[1, 0, 2, 2] = float("nan")
    zeros = torch.zeros(1, 1, 5, 5)

    def function(a: Tensor, b: Tensor) -> Tensor:
        return masked_mse(a, b, mask.to(a.device), include=zeros.to(a.device), relax=relax)

    loss, _ = run(place, function, [a, b])
    assert loss.isnan().tolist() == [True, True, False]


def test_gradcheck_and_gradgradcheck() -> None:
    a, b = (t.double().requires_grad_() for t in images(2, 2, 3, 4, torch.float32, torch.contiguous_format))
    operands = [m.double() for m in masks(2, 3, 4)]
    for relax in RELAX:
        for normalize in NORMALIZE:
            function = lambda a, b, r=relax, n=normalize: with_settings(masked_mse, r, n)(a, b, *operands)  # noqa: E731
            assert torch.autograd.gradcheck(function, (a, b))
            assert torch.autograd.gradgradcheck(function, (a, b))


def test_gradient_to_the_masks_goes_through_the_composition() -> None:
    a, b = (t.double() for t in images(2, 2, 3, 4, torch.float32, torch.contiguous_format))
    operands = tuple(m.double().requires_grad_() for m in masks(2, 3, 4))
    function = lambda m, e, i: masked_mse(a, b, m, exclude=e, include=i, normalize="mask")  # noqa: E731
    assert torch.autograd.gradcheck(function, operands)


def test_direct_call_refuses_a_mask_that_requires_grad() -> None:
    a, b = images(1, 2, 3, 4, torch.float32, torch.contiguous_format)
    loss, _ = OP(a.requires_grad_(), b, torch.ones(1, 1, 3, 4, requires_grad=True), None, None, "clamp", "all")
    with pytest.raises(RuntimeError, match="must go through faceedit"):
        loss.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_opcheck(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    a, b = (t.requires_grad_() for t in images(2, 3, 4, 5, dtype, fmt))
    mask, exclude, include = masks(2, 4, 5)
    torch.library.opcheck(OP, (a, b, mask, exclude, include, "minmax", "mask"))
    torch.library.opcheck(OP, (a, b.detach(), None, None, None, "clamp", "all"))
    torch.library.opcheck(OP, (a[:0], b[:0], None, None, None, "clamp", "mask"))


@pytest.mark.slow
def test_compiles() -> None:
    a, b = images(2, 3, 4, 5, torch.float32, torch.contiguous_format)
    mask = masks(2, 4, 5)[0]
    step = lambda a: masked_mse(a * 2, b, mask).sum()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(step(a.requires_grad_()), a)[0]
    assert_close("gradient", torch.autograd.grad(compiled(a), a)[0], expected, relative_l2=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("relax", "normalize"), [("clamp", "all"), ("minmax", "mask")])
def test_exports_to_standard_operators(relax: str, normalize: str) -> None:
    def inputs(n: int) -> list[Tensor]:
        return [*images(n, 3, 6, 7, torch.float32, torch.contiguous_format), *masks(n, 6, 7)]

    check_export(with_settings(masked_mse, relax, normalize), OP, inputs(2), inputs(5), per_sample={0, 1, 2, 4})


@pytest.mark.parametrize(("dtype", "fmt"), list(zip((torch.float32, torch.bfloat16), FORMATS, strict=True)), ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_large_gradients(place: Place, dtype: torch.dtype, fmt: torch.memory_format) -> None:
    """On the CPU these bypass the caches; their rows start and end inside cache lines."""
    a, b = images(2, 3, 597, 589 if dtype == torch.float32 else 1181, dtype, fmt)
    mask = masks(2, *a.shape[2:])[0]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        _, gradients = run(place, lambda a, b: masked_mse(a, b, mask.to(a.device)), [a, b])
    finally:
        torch.set_num_threads(before)
    wanted = mask * (a.float() - b.float()) * (2 / a[0].numel())
    for name, gradient, sign in zip("ab", gradients, (1, -1), strict=True):
        assert gradient is not None
        assert_close(f"gradient of {name}", gradient, sign * wanted, relative_l2=TOLERANCE[dtype][1])


def test_vmap_equals_a_loop() -> None:
    a, b = draw(4, 2, 3, 5, 5, seed=1), draw(2, 3, 5, 5, seed=2)
    mask = draw(4, 1, 1, 5, 5, seed=3, low=0.0)
    folded = torch.vmap(lambda a, m: masked_mse(a, b, m))(a, mask)
    assert torch.equal(folded, torch.stack([masked_mse(x, b, m) for x, m in zip(a, mask, strict=True)]))


@needs_cpp
def test_same_bits_at_any_thread_count_and_batch_size() -> None:
    a, b = images(2, 3, 130, 170, torch.float32, torch.contiguous_format)
    mask = masks(2, 130, 170)[0]
    before, losses = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with kernels.backend("cpu"):
                losses.append(masked_mse(a, b, mask, normalize="mask"))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(losses[0], losses[1])
    with kernels.backend("cpu"):
        assert torch.equal(masked_mse(a[1:], b[1:], mask[1:], normalize="mask"), losses[0][1:])


def test_mixed_dtypes_use_the_wider() -> None:
    a, b = images(2, 3, 4, 5, torch.float32, torch.contiguous_format)
    loss = masked_mse(a.bfloat16().requires_grad_(), b)
    assert loss.dtype == torch.float32
    assert_close("loss", loss, masked_mse(a.bfloat16().float(), b), relative_l2=0.0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"b": torch.zeros(2, 3, 4, 6)}, ValueError, "b must be of shape"),
        ({"mask": torch.zeros(2, 3, 4, 5)}, ValueError, r"mask must be of shape \(2, 1, 4, 5\) or \(1, 1, 4, 5\)"),
        ({"include": torch.zeros(2, 1, 4, 5, dtype=torch.int64)}, TypeError, "include must be floating point, uint8"),
        ({"exclude": torch.zeros(2, 1, 2, 2)}, ValueError, r"exclude must be of shape \(2, 1, 4, 5\)"),
        ({"relax": "soft"}, ValueError, "relax must be one of"),
        ({"normalize": "mean"}, ValueError, "normalize must be one of"),
        ({"b": None}, TypeError, "b must be a tensor, got None"),
        ({"mask": 0.5}, TypeError, "mask must be a tensor, got 0.5"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        masked_mse(**({"a": torch.zeros(2, 3, 4, 5), "b": torch.zeros(2, 3, 4, 5)} | change))
