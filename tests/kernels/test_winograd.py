# SPDX-License-Identifier: Apache-2.0
"""modulated_conv2d's float32 layers by Winograd's minimal filtering, on a CPU."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.kernel_cases import Place, draw
from support.modulated_conv2d_cases import away_from_kinks, check_frozen, inputs, needs_cpp, oracle
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import native, tensors, winograd_native
from faceedit.kernels.modulated_conv2d import modulated_conv2d

pytestmark = needs_cpp
ISAS = native.build_report()["isas"]


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layer wherever it can run, however small; the list has a name for every call of it."""
    calls: list[str] = []

    def spied(name: str) -> Any:
        real = getattr(winograd_native, name)

        def call(*arguments: Any, **options: Any) -> Any:
            calls.append(name)
            return real(*arguments, **options)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(winograd_native, name, spied(name))
    monkeypatch.setattr(winograd_native, "fits", can_run)
    return calls


WAYS = ["plain", "folded", "split"]  # up-sampling with the FIR in the weight, or apart from it


def take(way: str, patch: pytest.MonkeyPatch) -> int:
    """Return the factor of up-sampling, which has one way from now on."""
    patch.setattr(winograd_native, "_folds", lambda *_: way == "folded")
    return 1 if way == "plain" else 2


@pytest.fixture(params=WAYS)
def up(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    return take(request.param, monkeypatch)


def can_run(x: Tensor, weight: Tensor, up: int) -> bool:
    return x.dtype is torch.float32 and weight.shape[2] == 3 and weight.shape[0] % 32 == weight.shape[1] % 32 == 0


def operands(**shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, channels_last, weight and styles."""
    x, weight, styles, *_ = inputs(**{"n": 1, "i": 32, "o": 32, "h": 9, "w": 14} | shape)
    assert x is not None
    assert weight is not None
    assert styles is not None
    return x.contiguous(memory_format=torch.channels_last), weight, styles


@pytest.mark.parametrize("isa", ISAS)
def test_matches_reference(isa: str, up: int, taken: list[str]) -> None:
    """Sides that tiles do not divide, two samples of different styles, outputs that are not the inputs."""
    options = {"up": up, "clamp": 2.0}
    shaped = away_from_kinks(inputs(n=2, i=32, o=64, h=9, w=14, up=up), **options)
    check_frozen(Place("cpu", isa=isa), shaped, torch.float32, **options)
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("way", "width"), [("plain", 192), ("split", 288)])
def test_weights_larger_than_a_cache_are_all_threads_work(
    isa: str, way: str, width: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    up = take(way, monkeypatch)
    shaped = inputs(n=2, i=width, o=width, h=32, w=37, up=up)  # in more than one block of 128 tiles
    check_frozen(Place("cpu", isa=isa), shaped, torch.float32, act="linear", gain=1.4, up=up)
    assert taken == ["forward", "backward"]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.integers(1, 3), st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 96]), st.integers(1, 13),
    st.integers(1, 13), st.sampled_from(WAYS), st.booleans(),
)  # fmt: skip
def test_every_shape(n: int, i: int, o: int, h: int, w: int, way: str, demodulate: bool) -> None:
    if h * w * i == i:
        w = 2  # one pixel is planar and channels_last alike
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(winograd_native, "fits", can_run)
        up = take(way, patch)
        options = {"act": "linear", "gain": 1.4, "up": up, "demodulate": demodulate}
        check_frozen(Place("cpu"), inputs(n=n, i=i, o=o, h=h, w=w, up=up), torch.float32, **options)


@pytest.mark.parametrize(("way", "bound"), [("plain", 1.3e-6), ("split", 6e-7)])
def test_many_channels_have_the_error_of_a_direct_sum(
    way: str, bound: float, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    up = take(way, monkeypatch)
    x, weight, styles = operands(i=512, h=16, w=16)
    y = modulated_conv2d(x, weight, styles, act="linear", up=up)
    expected = oracle(act="linear", up=up)(x.double(), weight.double(), styles.double())
    assert (y.double() - expected).norm() < bound * expected.norm()
    assert taken == ["forward"]


@pytest.mark.parametrize("present", range(16), ids=lambda bits: f"{bits:04b}")
def test_every_subset_of_operands(present: int, up: int, taken: list[str]) -> None:
    has_noise, has_strength, has_bias, has_rgb = (bool(present >> bit & 1) for bit in range(4))
    all_of_them = inputs(n=3, i=32, o=32, h=5, w=7, up=up, rgb=has_rgb)
    keep = [True, True, True, has_noise, has_noise and has_strength, has_bias, True, True]
    chosen = [t if kept else None for t, kept in zip(all_of_them, keep, strict=True)]
    check_frozen(Place("cpu"), chosen, torch.float32, act="linear", gain=1.4, up=up, demodulate=bool(present % 5))
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize(("act", "slope", "gain", "clamp"), [("relu", 0.2, 1.4, -1.0), ("lrelu", 0.1, 1.4, 2.0)])
def test_activations(act: str, slope: float, gain: float, clamp: float, up: int, taken: list[str]) -> None:
    shaped = away_from_kinks(inputs(n=2, i=32, o=32, h=9, w=6, up=up), up=up, clamp=clamp)
    check_frozen(Place("cpu"), shaped, torch.float32, act=act, slope=slope, gain=gain, clamp=clamp, up=up)
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize("taps", [[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0]])
def test_any_filter_where_it_is_apart_from_the_weight(
    taps: list[float], taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    take("split", monkeypatch)
    shaped = inputs(n=2, i=32, o=64, h=9, w=6, up=2)
    check_frozen(Place("cpu"), shaped, torch.float32, act="linear", gain=1.4, up=2, fir=torch.tensor(taps))
    assert taken == ["forward", "backward"]


def test_a_smooth_activation_keeps_its_input_and_so_its_convolution(taken: list[str]) -> None:
    """On the way forward; the data gradient is that of any activation."""
    check_frozen(Place("cpu"), inputs(n=2, i=32, o=32), torch.float32, act="silu")
    assert taken == ["backward"]


@pytest.mark.parametrize(
    ("way", "width"), [("plain", 32), ("plain", 192), ("folded", 32), ("split", 32), ("split", 288)]
)
def test_where_it_is_chosen_a_result_depends_neither_on_threads_nor_on_the_batch(
    way: str, width: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights beside a core's blocks, and those that are all threads' work."""
    up = take(way, monkeypatch)
    x, weight, styles = operands(n=3, i=width, o=width, h=30, w=41)
    leaves = [x.requires_grad_(), styles.requires_grad_()]

    def results(first: int, last: int) -> list[Tensor]:
        y = modulated_conv2d(leaves[0][first:last], weight, leaves[1][first:last], up=up)
        gradients = torch.autograd.grad(y, leaves, torch.ones_like(y))
        return [y.detach(), *(g[first:last] for g in gradients)]

    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        together = results(0, 3)
        torch.set_num_threads(1)
        alone = results(0, 3)
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(alone, together, strict=True):
        assert torch.equal(one, two)
    for one, all_three in zip(results(1, 2), together, strict=True):
        assert torch.equal(one, all_three[1:2])
    assert taken == ["forward", "backward"] * 3


def gradients(x: Tensor, weight: Tensor, styles: Tensor, seed: Tensor, **options: Any) -> list[Tensor]:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (x, styles)]
    y = modulated_conv2d(leaves[0], weight, leaves[1], **options)
    assert isinstance(y, Tensor)
    return [y.detach(), *torch.autograd.grad(y, leaves, seed)]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", ["linear", "lrelu", "relu"])
def test_what_is_not_finite_stays_where_it_is(up: int, act: str, value: float, taken: list[str]) -> None:
    """A tile would spread it. What else there is, in the same sample too, has the values of a direct sum."""
    x, weight, styles = operands(n=2)
    options = {"act": act, "up": up}
    seed = draw(2, 32, 9 * up, 14 * up, seed=5, low=0.5)
    for where in ("x", "gradient"):
        x_, seed_ = x.clone(memory_format=torch.preserve_format), seed.clone()
        (x_ if where == "x" else seed_)[0, 3, 4, 11] = value
        found = gradients(x_, weight, styles, seed_, **options)
        with kernels.backend("eager"):
            wanted = gradients(x_, weight, styles, seed_, **options)
        for one, other in zip(found, wanted, strict=True):
            finite = other.isfinite()
            assert torch.equal(one.isfinite(), finite)
            assert not (one.isnan() & ~other.isnan()).any()
            scale = float(other[finite].abs().max())
            torch.testing.assert_close(one[finite], other[finite], rtol=0.0, atol=2e-5 * scale)
    assert taken == ["forward", "backward"] * 2


def test_what_only_a_tile_takes_out_of_range(up: int, taken: list[str]) -> None:
    x, weight, styles = operands()
    x[0, 3, 4, 9:12] = 3e38  # of two taps a tile has sums of neighbours
    y = modulated_conv2d(x, weight / 100, styles, up=up, demodulate=False, act="linear")
    with kernels.backend("eager"):
        expected = modulated_conv2d(x, weight / 100, styles, up=up, demodulate=False, act="linear")
    assert expected.isfinite().all()
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))
    assert taken == ["forward"]


def test_a_direct_sum_is_used_instead_with_torgb_and_a_frozen_style(up: int, taken: list[str]) -> None:
    x, weight, styles = operands(n=2)
    x[1, 0, 0, 0] = float("inf")
    factors, rgb_styles = torch.ones(3, 32), torch.ones(2, 32)
    y, rgb = modulated_conv2d(x, weight, styles, up=up, rgb_weight=factors, rgb_styles=rgb_styles)
    with kernels.backend("eager"):
        wanted, colours = modulated_conv2d(x, weight, styles, up=up, rgb_weight=factors, rgb_styles=rgb_styles)
    torch.testing.assert_close(y[0], wanted[0])
    torch.testing.assert_close(rgb[0], colours[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(rgb.isfinite(), colours.isfinite())
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert taken == ["forward"]


def test_a_weight_that_was_written_to_is_transformed_again(taken: list[str]) -> None:
    x, weight, styles = operands()
    before = modulated_conv2d(x, weight, styles, demodulate=False, act="linear")
    weight.mul_(2.0)
    torch.testing.assert_close(modulated_conv2d(x, weight, styles, demodulate=False, act="linear"), 2.0 * before)
    assert taken == ["forward"] * 2


def test_a_trained_weight_has_its_gradient_too(taken: list[str]) -> None:
    x, weight, styles = operands(n=2)
    leaves = [t.requires_grad_() for t in (x, weight, styles)]
    found = torch.autograd.grad(modulated_conv2d(*leaves, act="linear").square().sum(), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(oracle(act="linear")(*wide).square().sum(), wide)
    for name, one, other in zip(("x", "weight", "styles"), found, expected, strict=True):
        error = (one.double() - other).norm() / other.norm()
        assert error < 1e-4, name
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize("with_gradient", [True, False])
def test_a_style_without_gradient_is_not_summed_for(
    with_gradient: bool, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[bool] = []
    real = winograd_native._workspace

    def workspace(shape: torch.Size, inputs: int, outputs: int, sums: bool, *others: Any) -> int:
        asked.append(sums)
        return real(shape, inputs, outputs, sums, *others)

    monkeypatch.setattr(winograd_native, "_workspace", workspace)
    x, weight, styles = operands()
    y = modulated_conv2d(x.requires_grad_(), weight, styles.requires_grad_(with_gradient))
    (found,) = torch.autograd.grad(y, [x], torch.ones_like(y), retain_graph=True)
    if with_gradient:
        torch.autograd.grad(y, [x, styles], torch.ones_like(y))
    with kernels.backend("eager"):
        y = modulated_conv2d(x, weight, styles)
        (wanted,) = torch.autograd.grad(y, [x], torch.ones_like(y))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    again = [True] if with_gradient else []
    assert asked == [False, with_gradient, *again]
    assert taken == ["forward", "backward", *("backward" for _ in again)]


def test_where_it_is_what_is_fastest() -> None:
    def fits(n: int, channels: int, side: int, up: int = 1, **kind: Any) -> bool:
        x = torch.empty(n, channels, side, side, dtype=kind.get("dtype"), device=kind.get("device"))
        weight = torch.empty(kind.get("outputs", channels), channels, 3, 3)
        if not kind.get("plain"):
            weight = torch.nn.Parameter(weight, requires_grad=kind.get("trained", False))
        return winograd_native.fits(x, weight, up)

    if len(ISAS) > 1:
        assert fits(1, 512, 16)
        assert fits(4, 512, 8)  # as many tiles
        assert fits(1, 64, 64, trained=True)
        assert fits(1, 64, 64, plain=True)
        assert fits(1, 64, 64, up=2, outputs=32)
        assert fits(1, 512, 32, up=2, outputs=256)
        with native.isa("baseline"):
            assert not fits(1, 512, 16)
    for refused in (
        fits(1, 512, 8), fits(1, 64, 32, trained=True), fits(1, 24, 64), fits(1, 64, 64, outputs=40),
        fits(1, 64, 32, plain=True),  # which may be a new one at each call
        fits(1, 64, 64, dtype=torch.bfloat16), fits(1, 64, 64, dtype=torch.float64), fits(1, 64, 64, device="meta"),
        fits(64, 64, 5), fits(1, 512, 16, up=2), fits(1, 128, 64, up=2, outputs=64, trained=True),
    ):  # fmt: skip
        assert not refused


def test_where_the_filter_is_part_of_the_weight() -> None:
    def folds(inputs: int = 64, outputs: int = 32, side: int = 64, fir: Tensor | None = None) -> bool:
        x = torch.empty(1, inputs, side, side)
        return winograd_native._folds(x, torch.empty(outputs, inputs, 3, 3), fir)

    usual = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
    assert folds()
    assert folds(fir=usual)
    for apart in (
        folds(fir=usual * 2), folds(fir=torch.tensor([0.1, 0.2, 0.3, 0.4])), folds(128, 64), folds(32, 64),
        folds(side=60),
    ):  # fmt: skip
        assert not apart


def test_another_filter_at_the_size_where_the_usual_one_is_part_of_the_weight() -> None:
    x, weight, styles = operands(h=64, w=64)
    fir = torch.tensor([0.1, 0.2, 0.3, 0.4])
    options: dict[str, Any] = {"up": 2, "act": "linear", "fir": fir}
    y = modulated_conv2d(x, torch.nn.Parameter(weight, requires_grad=False), styles, **options)
    expected = oracle(**options)(x.double(), weight.double(), styles.double())
    assert (y.double() - expected).norm() < 2e-6 * expected.norm()


def test_the_filter_is_exactly_part_of_the_weight() -> None:
    """Whatever PyTorch's convolutions are allowed to round to when the weight is made."""
    x, weight, styles = operands(h=64, w=64)
    weight = torch.nn.Parameter(weight, requires_grad=False)
    kept = torch.backends.mkldnn.conv.fp32_precision  # type: ignore[attr-defined]
    try:
        torch.backends.mkldnn.conv.fp32_precision = "bf16"  # type: ignore[attr-defined]
        y = modulated_conv2d(x, weight, styles, up=2, act="linear")
    finally:
        torch.backends.mkldnn.conv.fp32_precision = kept  # type: ignore[attr-defined]
    expected = oracle(up=2, act="linear")(x.double(), weight.double(), styles.double())
    if winograd_native.fits(x, weight, 2):
        assert (y.double() - expected).norm() < 2e-6 * expected.norm()


@pytest.mark.parametrize(("side", "blocks"), [(32, 8), (128, 16)])
def test_small_layers_have_blocks_for_many_threads(side: int, blocks: int) -> None:
    """A core would hold 168 tiles of 32 channels, and a layer of 32 px has 64."""
    shape = torch.Size((1, 32, side, side))
    one, many = (winograd_native._workspace(shape, 32, 32, False, threads, False, 1) for threads in (1, 64))
    assert many >= blocks * one


def test_scratch_is_kept_from_call_to_call_and_fresh_where_outputs_are_poisoned() -> None:
    like = torch.zeros(1)
    first = tensors.scratch(like, 1000)
    assert tensors.scratch(like, 10).data_ptr() == first.data_ptr()
    assert tensors.scratch(like, first.numel() + 1).numel() == first.numel() + 1
    with tensors.poison():
        assert tensors.scratch(like, 10).isnan().all()
    assert tensors.scratch(like, tensors.MOST_SCRATCH + 1).numel() == tensors.MOST_SCRATCH + 1
    assert tensors.scratch(like, 10).numel() <= tensors.MOST_SCRATCH


def test_core_names_the_argument() -> None:
    module, target = native.module(), (-1, 1, 0)
    good = {"batch": 1, "inputs": 32, "outputs": 32, "height": 4, "width": 4, "down": 1, "up": 1, "buffers": 1}
    for change, message in (
        ({}, "x, y, transformed, unbounded and workspace must not be null"),
        ({"width": 0}, "x must not be empty"),
        ({"up": 3}, "down and up must be 1 or 2"),
        ({"inputs": 24}, "the channels of x must be a multiple of 16"),
        ({"inputs": 32, "down": 2}, "the channels of x must be a multiple of 16"),
        ({"outputs": 48}, "outputs must be a multiple of 32, the channels of y of 16"),
        ({"outputs": 32, "up": 2}, "outputs must be a multiple of 32, the channels of y of 16"),
        ({"split": True}, "split needs up or down"),
        ({"split": True, "up": 2, "act": 1}, "split has no epilogue"),
        ({"split": True, "up": 2, "bias": 64}, "split has no epilogue"),
        ({"split": True, "down": 2, "inputs": 24}, "the channels of x must be a multiple of 16"),
        ({"act": 4}, "act must be piecewise linear"),
        ({"noise_stride": 5}, "noise must have the pixels of y"),
        ({"rgb": 64}, "rgb needs rgb_factors"),
        ({"grad_style": 64}, "grad_style needs other"),
        ({"buffers": 0}, "buffers must be positive"),
    ):
        with pytest.raises(RuntimeError, match=f"winograd: {message}"):
            module.winograd(target, **(good | change))
    with pytest.raises(RuntimeError, match="winograd_weight: outputs must be a multiple of 32"):
        module.winograd_weight(target, outputs=24, inputs=32)
