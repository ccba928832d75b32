# SPDX-License-Identifier: Apache-2.0
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_close
from support.exporting import check_export
from support.kernel_cases import FORMATS, PLACES, Place, draw, run
from support.modulated_conv2d_cases import (
    FASTEST,
    NAMES,
    OP,
    RESAMPLINGS,
    TOLERANCE,
    away_from_kinks,
    call,
    check,
    inputs,
    needs_cpp,
    oracle,
)
from torch import Tensor
from torch.nn import functional as F

from faceedit import kernels
from faceedit.kernels import modulated_conv2d_parts as parts
from faceedit.kernels.modulated_conv2d import backward_reference, modulated_conv2d, reference
from faceedit.kernels.tensors import memory_format


def nvlabs(
    x: Tensor, weight: Tensor, styles: Tensor, fir: Tensor, up: int = 1, down: int = 1, demodulate: bool = True
) -> Tensor:
    """The per-sample form: one modulated, demodulated weight a sample, a grouped convolution, and then the FIR.

    Written from the paper's equations; it shares nothing with the op.
    """
    n, i, h, w = x.shape
    o, _, k, _ = weight.shape
    own = weight[None] * styles[:, None, :, None, None]
    if demodulate:
        own = own / (own.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    kernel = torch.outer(fir, fir).flip(0, 1)

    def filtered(image: Tensor, before: int, after: int, gain: float) -> Tensor:
        padded = F.pad(image, [before, after, before, after])
        return F.conv2d(padded.flatten(0, 1)[:, None], kernel[None, None] * gain)[:, 0].unflatten(0, image.shape[:2])

    grouped = x.reshape(1, n * i, h, w)
    if up == 2:
        own = own.transpose(1, 2).reshape(n * i, o, k, k)
        y = F.conv_transpose2d(grouped, own, stride=2, groups=n)
        y = filtered(y.unflatten(1, (n, o))[0], (5 - k) // 2, (5 - k) // 2, 4.0)
    elif down == 2:
        blurred = filtered(x, k // 2 + 1, k // 2 + 1, 1.0)
        y = F.conv2d(blurred.reshape(1, n * i, *blurred.shape[2:]), own.flatten(0, 1), stride=2, groups=n)
        y = y.unflatten(1, (n, o))[0]
    else:
        y = F.conv2d(grouped, own.flatten(0, 1), padding=k // 2, groups=n).unflatten(1, (n, o))[0]
    return y


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("k", [1, 3, 5])
@pytest.mark.parametrize(("up", "down"), RESAMPLINGS)
def test_the_reference_is_the_per_sample_form(up: int, down: int, k: int, demodulate: bool) -> None:
    x, weight, styles, noise, strength, bias, *_ = (t.double() for t in inputs(k=k, up=up, down=down) if t is not None)
    fir = torch.tensor([0.1, 0.5, 0.3, 0.2], dtype=torch.float64)  # not symmetric: a mirrored filter would show
    y, rgb, _, _ = reference(
        x, weight, styles, noise, strength, bias, fir, None, None, up, down, demodulate, "lrelu", 0.2, 2**0.5, 3.0
    )
    z = nvlabs(x, weight, styles, fir, up, down, demodulate) + noise * strength + bias[:, None, None]
    expected = (F.leaky_relu(z, 0.2) * 2**0.5).clamp(-3, 3)
    assert_close("y", y, expected, relative_l2=1e-12)
    assert rgb.numel() == 0


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize(("up", "down"), RESAMPLINGS)
@pytest.mark.parametrize("place", PLACES)
def test_matches_reference(place: Place, up: int, down: int, dtype: torch.dtype, fmt: torch.memory_format) -> None:
    tensors = away_from_kinks(inputs(o=35, up=up, down=down), up=up, down=down)
    check(place, tensors, dtype, fmt, up=up, down=down)
    assert kernels.last_backend("modulated_conv2d_backward") == place.backend


@pytest.mark.parametrize(("act", "slope", "gain", "clamp"), [
    ("linear", 0.2, 1.0, -1.0), ("relu", 0.2, 1.4, -1.0), ("lrelu", 0.1, 1.4, 2.0), ("lrelu", -0.5, 1.0, -1.0),
    ("lrelu", 0.2, -1.0, -1.0), ("silu", 0.2, 1.4, -1.0), ("tanh", 0.2, 1.0, -1.0), ("sigmoid", 0.2, 1.0, -1.0),
])  # fmt: skip
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_every_activation(act: str, slope: float, gain: float, clamp: float, fmt: torch.memory_format) -> None:
    """Those that the output can be inverted through, and those that keep their input."""
    tensors = away_from_kinks(inputs(n=2, o=6), clamp=clamp)
    check(FASTEST, tensors, torch.float32, fmt, act=act, slope=slope, gain=gain, clamp=clamp)


@pytest.mark.parametrize("present", range(16), ids=lambda bits: f"{bits:04b}")
def test_every_subset_of_operands(present: int) -> None:
    has_noise, has_strength, has_bias, has_rgb = (bool(present >> bit & 1) for bit in range(4))
    tensors = inputs(o=33, h=5, w=7)
    if not has_rgb:
        tensors[6:] = [None, None]
    # Linear, since without noise there is nothing to move away from a kink with.
    keep = [True, True, True, has_noise, has_noise and has_strength, has_bias, True, True]
    chosen = [t if kept else None for t, kept in zip(tensors, keep, strict=True)]
    fmt = torch.channels_last if present % 3 else torch.contiguous_format
    check(FASTEST, chosen, torch.float32, fmt, act="linear", gain=1.4, demodulate=bool(present % 5))


@pytest.mark.parametrize("demodulate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_to_rgb_by_itself(place: Place, dtype: torch.dtype, demodulate: bool) -> None:
    options = {"act": "linear", "gain": 1.0, "demodulate": demodulate}
    for fmt in FORMATS:
        tensors = inputs(i=37, o=3, k=1, rgb=False)
        tensors[3] = tensors[4] = None
        check(place, tensors, dtype, fmt, **options)
    tensors = away_from_kinks(inputs(n=1, i=37, o=3, k=1), demodulate=demodulate, clamp=2.0)
    check(place, tensors, dtype, torch.channels_last, demodulate=demodulate, clamp=2.0)


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("up", "down"), RESAMPLINGS)
def test_one_large_sample_folds_the_style_into_the_weight(up: int, down: int, fmt: torch.memory_format) -> None:
    tensors = away_from_kinks(inputs(n=1, i=2, o=3, h=66, w=65, up=up, down=down), up=up, down=down)
    assert tensors[0] is not None
    assert parts.folds_style(tensors[0], parts.Geometry(3, up, down))
    check(FASTEST, tensors, torch.float32, fmt, up=up, down=down)


shapes = st.tuples(st.integers(0, 3), st.integers(1, 40), st.integers(1, 70), st.integers(1, 13), st.integers(1, 13))


@pytest.mark.parametrize("place", PLACES)
def test_styles_may_be_a_slice_of_a_wider_tensor(place: Place) -> None:
    """As a network gets them that computes the styles of several layers at once."""
    x, weight, styles, *_ = inputs(rgb=False)
    assert styles is not None
    wide = torch.stack([styles, torch.full_like(styles, 1e3)], 2).flatten(1)
    expected, (gx, gweight, gstyles) = run(place, call(), [x, weight, styles])
    y, found = run(place, lambda x, weight, wide: call()(x, weight, wide[:, ::2]), [x, weight, wide])
    assert_close("output", y, expected, relative_l2=1e-6)
    for actual, wanted in zip(found, (gx, gweight, gstyles), strict=True):
        assert actual is not None
        assert wanted is not None
        actual = actual[:, ::2] if actual.shape == wide.shape else actual
        assert_close("gradient", actual, wanted, relative_l2=1e-5)


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes,
    st.sampled_from([1, 3]),
    st.sampled_from(RESAMPLINGS),
    st.sampled_from(["nhwc", "sliced", "offset", "expanded"]),
)
def test_any_shape_and_stride(shape: tuple[int, ...], k: int, resampling: tuple[int, int], layout: str) -> None:
    n, i, o, h, w = shape
    up, down = resampling
    if down == 2:
        h, w = h + 1, w + 1
    tensors = inputs(n, i, o, h, w, k, up, down)
    x = tensors[0]
    assert x is not None
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        wide = torch.zeros(n, 2 * i, h, w)
        wide[:, ::2] = x
        x = wide[:, ::2]
    elif layout == "offset":  # a storage offset of one element: no vector load is aligned
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(n, i, h, w)
    elif layout == "expanded" and n:
        x = x[:1].expand(n, i, h, w)
    tensors[0] = x
    with kernels.backend("cpu"):
        y, rgb = modulated_conv2d(**dict(zip(NAMES, tensors, strict=True)), up=up, down=down)
    wide_tensors = [None if t is None else t.double() for t in tensors]
    assert_close(
        "output", torch.cat([y.flatten(), rgb.flatten()]), oracle(up=up, down=down)(*wide_tensors), relative_l2=1e-5
    )
    assert y.is_contiguous(memory_format=memory_format(x))


@pytest.mark.parametrize("place", PLACES)
def test_nan_stays_in_its_sample_and_its_window(place: Place) -> None:
    x, weight, styles, *_ = inputs(n=2, h=7, w=7, rgb=False)
    assert x is not None
    x[0, 2, 3, 3] = float("nan")
    y, _ = run(place, call(clamp=2.0), [x, weight, styles])
    bad = y.isnan()
    assert bad[0, :, 2:5, 2:5].all()
    assert int(bad.sum()) == 9 * y.shape[1]
    x[0, 2, 3, 3] = float("inf")
    y, _ = run(place, call(clamp=2.0), [x, weight, styles])
    assert (y[0, :, 2:5, 2:5].abs() <= 2.0).all()
    assert not y[1].isnan().any()


def gradcheck_inputs(up: int, down: int, k: int = 3) -> list[Tensor]:
    tensors = away_from_kinks(inputs(n=2, i=3, o=3, h=5, w=5, k=k, up=up, down=down), up=up, down=down)
    return [t.double().requires_grad_() for t in tensors if t is not None]


@pytest.mark.parametrize("act", ["lrelu", "silu"])
@pytest.mark.parametrize(("up", "down"), RESAMPLINGS)
def test_gradcheck_and_gradgradcheck(up: int, down: int, act: str) -> None:
    tensors = gradcheck_inputs(up, down)

    def function(*t: Tensor) -> Any:
        return modulated_conv2d(**dict(zip(NAMES, t, strict=True)), up=up, down=down, act=act)

    # fast_mode projects on random directions: 40,000 entries one by one take a minute each.
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, tensors, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:], ids=str)
@pytest.mark.parametrize(("up", "down"), RESAMPLINGS)
def test_gradients_of_any_subset_agree(up: int, down: int, wanted: tuple[bool, bool, bool]) -> None:
    tensors = away_from_kinks(inputs(up=up, down=down), up=up, down=down)
    named = dict(zip(NAMES, tensors, strict=True))
    everything = run(FASTEST, call(up=up, down=down), tensors)[1]
    leaves = {name: t for name, t in named.items() if t is not None}
    chosen = [name for name, want in zip(NAMES, wanted, strict=False) if want]
    for name in chosen:
        leaves[name] = leaves[name].clone().requires_grad_()
    with kernels.backend(FASTEST.backend):
        y, rgb = modulated_conv2d(**leaves, up=up, down=down)
        found = torch.autograd.grad(y.sum() + rgb.sum(), [leaves[name] for name in chosen])
    for name, gradient in zip(chosen, found, strict=True):
        expected = everything[NAMES.index(name)]
        assert expected is not None
        assert_close(name, gradient, expected, relative_l2=1e-5)


@pytest.mark.parametrize("used", ["y", "rgb"])
def test_only_one_of_two_outputs_used(used: str) -> None:
    tensors = away_from_kinks(inputs())
    results = []
    for place in (FASTEST, Place("eager")):
        pick = 0 if used == "y" else 1
        function = lambda *t, pick=pick: modulated_conv2d(**dict(zip(NAMES, t, strict=True)))[pick]  # noqa: E731
        leaves = [t.clone().requires_grad_() for t in tensors if t is not None]
        with kernels.backend(place.backend):
            results.append(torch.autograd.grad(function(*leaves).square().sum(), leaves, materialize_grads=True))
    for name, actual, expected in zip(NAMES, *results, strict=True):
        assert_close(name, actual, expected, relative_l2=1e-4)


def test_no_gradient_has_the_size_of_a_weight_per_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen weights: no convolution of the backward pass is asked for a weight gradient."""
    asked = []
    real = parts.Geometry.convolve_backward

    def spy(self: Any, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]) -> tuple[Tensor, Tensor]:
        asked.append((wanted[1], tuple(weight.shape)))
        return real(self, grad, x, weight, wanted)

    monkeypatch.setattr(parts.Geometry, "convolve_backward", spy)
    x, weight, styles, *_ = inputs()
    assert x is not None
    assert weight is not None
    assert styles is not None
    styles = styles.requires_grad_()
    modulated_conv2d(x, weight, styles).sum().backward()
    weight = weight.clone().requires_grad_()
    modulated_conv2d(x, weight, styles).sum().backward()
    assert asked == [(False, (7, 5, 3, 3)), (True, (7, 5, 3, 3))]


def test_a_sample_beyond_32_bit_offsets_does_not_go_to_the_one_kernel_layer() -> None:
    pytest.importorskip("triton")
    from faceedit.kernels import modulated_conv2d_gemm_triton

    weight = torch.empty(64, 32, 3, 3, device="meta")
    for side, fits in ((4096, True), (8192, False)):
        x = torch.empty(1, 32, side, side, device="meta")
        assert modulated_conv2d_gemm_triton.fits(x, weight) is fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_opcheck(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    x, weight, styles, noise, strength, bias, rgb_weight, rgb_styles = (
        t.requires_grad_() for t in inputs(o=3, h=4, w=4) if t is not None
    )
    x = x.detach().to(dtype).contiguous(memory_format=fmt).requires_grad_()
    usual = (1, 1, True, "lrelu", 0.2, 1.4, 1.0)
    checks: list[tuple[Any, ...]] = [
        (x, weight, styles, noise, strength, bias, None, rgb_weight, rgb_styles, *usual),
        (x, weight, styles, None, None, bias, None, None, None, 2, 1, True, "silu", 0.2, 1.0, -1.0),
        (x, weight, styles.detach(), None, None, None, None, None, None, 1, 2, False, "linear", 0.2, 1.0, -1.0),
        (x[:0], weight, styles[:0], None, None, bias, None, None, None, *usual),
        (x[:, :, ::2], weight[:, :, :1, :1], styles, None, None, None, None, None, None, *usual),
    ]
    for arguments in checks:
        torch.library.opcheck(OP, arguments)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    def step(x: Tensor, weight: Tensor, styles: Tensor) -> Tensor:
        y = modulated_conv2d(x * 2, weight, styles)
        return modulated_conv2d(y, weight.transpose(0, 1), styles.new_ones(2, 7), up=2).square().sum()

    x, weight, styles = (t.requires_grad_() for t in inputs()[:3] if t is not None)
    expected = torch.autograd.grad(step(x, weight, styles), (x, weight, styles))
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    actual = torch.autograd.grad(compiled(x, weight, styles), (x, weight, styles))
    for a, b in zip(actual, expected, strict=True):
        assert_close("gradient", a, b, relative_l2=1e-5)
    with kernels.backend("eager"):
        compiled(x, weight, styles)
        assert kernels.last_backend("modulated_conv2d") == "eager"  # the graph follows the scope it is called in


@pytest.mark.parametrize(("up", "down"), RESAMPLINGS)
def test_exports_to_standard_operators(up: int, down: int) -> None:
    def tensors(n: int) -> list[Tensor]:
        x, weight, styles, noise, strength, bias, *rgb = (
            t for t in inputs(n, h=6, w=6, up=up, down=down) if t is not None
        )
        return [x, weight, styles, noise[:1], strength, bias, *rgb]

    def function(*t: Tensor) -> Any:
        return modulated_conv2d(**dict(zip(NAMES, t, strict=True)), up=up, down=down)

    check_export(function, OP, tensors(2), tensors(5), per_sample={0, 2, 7})


def test_onnx_exporter_finds_the_decomposition() -> None:
    """R1 rests on a private name of torch: notice when it moves."""
    assert torch._decomp.decomposition_table[OP] is reference


def test_vmap_equals_a_loop() -> None:
    x, weight, styles, *_ = inputs()
    assert styles is not None
    many = torch.stack([styles, styles + 1, styles * 2])
    mapped = torch.vmap(lambda s: modulated_conv2d(x, weight, s))(many)
    assert torch.equal(mapped, torch.stack([modulated_conv2d(x, weight, s) for s in many]))


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_same_bits_at_any_thread_count(fmt: torch.memory_format) -> None:
    """Of what does not pass through the backward convolution, whose bits are PyTorch's; forward it is one product."""
    tensors = inputs(n=2, i=1, o=40, h=41, w=43, k=1)
    assert tensors[0] is not None
    tensors[0] = tensors[0].contiguous(memory_format=fmt)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(Place("cpu"), call(), tensors))
    finally:
        torch.set_num_threads(before)
    first, *others = results
    for other in others:
        assert torch.equal(first[0], other[0])
        for name, a, b in list(zip(NAMES, first[1], other[1], strict=True))[3:]:
            assert torch.equal(a, b), name


def test_a_sample_does_not_depend_on_its_batch() -> None:
    x, weight, styles, *_ = inputs(n=3, h=9, w=9, rgb=False)
    assert x is not None
    assert styles is not None
    whole, alone = modulated_conv2d(x, weight, styles), modulated_conv2d(x[1:2], weight, styles[1:2])
    assert_close("sample 1", whole[1:2], alone, relative_l2=1e-6)


def test_backward_of_an_exotic_backend_scope_runs_there() -> None:
    x, weight, styles, *_ = inputs()
    assert styles is not None
    styles = styles.requires_grad_()
    with kernels.backend("eager"):
        y = modulated_conv2d(x, weight, styles)
    y.sum().backward()
    assert kernels.last_backend("modulated_conv2d_backward") == "eager"


def test_second_order_of_a_path_length_penalty() -> None:
    """|J^T v|^2 through two layers, as StyleGAN2's regulariser takes it, against finite differences in fp64."""
    x, weight, styles, *_ = (t.double() for t in inputs(n=1, i=3, o=3, h=4, w=4, rgb=False) if t is not None)
    direction = draw(1, 3, 16, 16, seed=8).double()

    def penalty(styles: Tensor) -> Tensor:
        styles = styles if styles.requires_grad else styles.requires_grad_()
        y = modulated_conv2d(x, weight, styles, up=2, act="silu")
        y = modulated_conv2d(y, weight, styles, up=2, act="silu")
        (gradient,) = torch.autograd.grad((y * direction).sum(), styles, create_graph=True)
        return gradient.square().sum()

    leaf = styles.clone().requires_grad_()
    (analytic,) = torch.autograd.grad(penalty(leaf), leaf)
    for index in range(3):
        step = torch.zeros_like(styles)
        step[0, index] = 1e-5
        numeric = (penalty(styles + step) - penalty(styles - step)).detach() / 2e-5
        assert float(numeric) == pytest.approx(float(analytic[0, index]), rel=1e-5)


def test_backward_reference_reads_nothing_but_inputs() -> None:
    """It is what is differentiated again: y, core and demodulation carry no graph and must not enter."""
    x, weight, styles, *_ = (t for t in inputs(rgb=False) if t is not None)
    nan = torch.full((1,), float("nan"))
    found = backward_reference(
        x, torch.ones(2, 7, 6, 5), None, weight, styles, nan, nan, nan, *[None] * 6,
        1, 1, True, "lrelu", 0.2, 1.4, -1.0, [True] * 3 + [False] * 5,
    )  # fmt: skip
    assert all(g.isfinite().all() for g in found)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x must be of shape"),
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, TypeError, "x must be floating point"),
        ({"weight": torch.zeros(4, 2, 3, 3)}, ValueError, r"weight must be of shape \(O, 3, k, k\) with k odd"),
        ({"weight": torch.zeros(4, 3, 2, 2)}, ValueError, "with k odd"),
        ({"weight": torch.zeros(4, 3, 3, 3, dtype=torch.int8)}, TypeError, "weight must be floating point"),
        ({"styles": torch.zeros(3)}, ValueError, r"styles must be of shape \(2, 3\), got float32 of shape \(3,\)"),
        ({"up": 2, "down": 2}, ValueError, "up and down must be 1, or one of them 2"),
        ({"up": 3}, ValueError, "up and down must be 1"),
        ({"x": torch.zeros(2, 3, 1, 5), "down": 2}, ValueError, "x must have channels and 2 or more pixels"),
        ({"x": torch.zeros(2, 3, 4, 0)}, ValueError, "x must have channels and 1 or more pixels"),
        (
            {"x": torch.zeros(2, 0, 4, 5), "weight": torch.zeros(4, 0, 3, 3), "styles": torch.zeros(2, 0)},
            ValueError,
            "x must have channels",
        ),
        ({"weight": torch.zeros(0, 3, 3, 3)}, ValueError, r"weight must be of shape \(O, 3, k, k\)"),
        ({"bias": torch.zeros(3)}, ValueError, "bias must be of shape"),
        ({"noise": torch.zeros(2, 1, 4, 5), "up": 2}, ValueError, r"noise must be of shape \(2, 1, 8, 10\)"),
        ({"strength": torch.tensor(1.0)}, ValueError, "strength must come with noise"),
        ({"fir": torch.zeros(3)}, ValueError, "fir must be of shape"),
        ({"fir": torch.ones(4, requires_grad=True)}, ValueError, "fir must not require grad"),
        ({"rgb_weight": torch.zeros(3, 4)}, ValueError, "rgb_weight must come with rgb_styles"),
        ({"rgb_weight": torch.zeros(3, 3), "rgb_styles": torch.zeros(2, 4)}, ValueError, "rgb_weight must be of shape"),
        ({"act": "gelu"}, ValueError, "act must be one of"),
        ({"weight": None}, TypeError, "weight must be a tensor, got None"),
        ({"styles": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "styles must be floating point, got int64"),
        ({"bias": torch.zeros(4, dtype=torch.complex64)}, TypeError, "bias must be floating point, got complex64"),
        ({"fir": torch.zeros(4, dtype=torch.int64)}, TypeError, "fir must be floating point"),
        ({"noise": torch.zeros(1, 1, 4, 5), "strength": 0.3}, TypeError, "strength must be a tensor, got 0.3"),
        ({"up": 2.0}, TypeError, "up must be an integer, got 2.0"),
        ({"clamp": None}, TypeError, "clamp must be a number, got None; pass -1 for no clamp"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    usual = {"x": torch.zeros(2, 3, 4, 5), "weight": torch.zeros(4, 3, 3, 3), "styles": torch.zeros(2, 3)}
    with pytest.raises(error, match=message):
        modulated_conv2d(**(usual | change))
