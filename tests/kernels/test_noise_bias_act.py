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
from faceedit.kernels.noise_bias_act import ACTIVATIONS, noise_bias_act, reference
from faceedit.kernels.tensors import memory_format

NAMES = ("x", "scale", "noise", "strength", "bias")
OP = torch.ops.faceedit.noise_bias_act.default
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


def inputs(
    n: int, c: int, h: int, w: int, dtype: torch.dtype, fmt: torch.memory_format, shared_noise: bool = False
) -> list[Tensor]:
    x = draw(n, c, h, w, seed=1).to(dtype).to(memory_format=fmt)
    noise = draw(1 if shared_noise else n, 1, h, w, seed=3, low=0.5)
    return [x, draw(n, c, seed=2, low=0.5), noise, torch.tensor(0.3), draw(c, seed=4)]


def away_from_kinks(x: Tensor, operands: list[Tensor | None], gain: float, clamp: float) -> Tensor:
    """Move values that lie near a kink, where the gradient is a matter of rounding."""
    z = reference(x.double(), *[None if t is None else t.double() for t in operands], "linear", 0.2, 1.0, -1.0)
    y = z * gain
    near = z.abs() < 1e-2
    if clamp >= 0:
        near |= (y.abs() - clamp).abs() < 2e-2 * max(clamp, 1)
        near |= ((0.2 * y).abs() - clamp).abs() < 2e-2 * max(clamp, 1)
    return torch.where(near, x + 0.25, x).contiguous(
        memory_format=torch.contiguous_format if x.is_contiguous() else torch.channels_last
    )


def oracle(act: str, **options: float) -> Callable[..., Tensor]:
    keys = {"slope": 0.2, "gain": 1.0, "clamp": -1.0} | options
    return lambda *tensors: reference(*tensors, act, keys["slope"], keys["gain"], keys["clamp"])


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_matches_reference(place: Place, act: str, dtype: torch.dtype, fmt: torch.memory_format) -> None:
    tensors = inputs(2, 19, 5, 7, dtype, fmt)
    tensors[0] = away_from_kinks(tensors[0], list(tensors[1:]), 1.4, 2.5)
    options = {"gain": 1.4, "clamp": 2.5}
    check_against_oracle(
        place, lambda *t: noise_bias_act(*t, act=act, **options), oracle(act, **options), tensors, NAMES, dtype
    )


@pytest.mark.parametrize("width", [8, 7], ids=["packs", "single"])
@pytest.mark.parametrize("has_scale", [False, True], ids=["", "scale"])
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_the_gradient_to_x_alone(
    place: Place, dtype: torch.dtype, fmt: torch.memory_format, has_scale: bool, width: int
) -> None:
    """Frozen operands, as of a folded network: nothing is summed, and the output is all that is saved."""
    x, scale, noise, strength, bias = inputs(2, 8 if width == 8 else 5, 6, width, dtype, fmt)
    operands = [scale if has_scale else None, noise, strength, bias]
    x = away_from_kinks(x, operands, 1.4, 2.5)
    frozen = [None if t is None else t.to(place.device) for t in operands]
    check_against_oracle(
        place,
        lambda x: noise_bias_act(x, *frozen, act="lrelu", gain=1.4, clamp=2.5),
        lambda x: oracle("lrelu", gain=1.4, clamp=2.5)(x, *(None if t is None else t.double() for t in operands)),
        [x],
        NAMES[:1],
        dtype,
    )


@pytest.mark.parametrize("present", range(16), ids=lambda bits: f"{bits:04b}")
@pytest.mark.parametrize("place", PLACES)
def test_every_subset_of_operands(place: Place, present: int) -> None:
    everything = inputs(
        2, 17, 3, 5, torch.float32, torch.channels_last if present % 2 else torch.contiguous_format, True
    )
    tensors: list[Tensor | None] = [everything[0]]
    tensors += [t if present >> i & 1 else None for i, t in enumerate(everything[1:])]
    if tensors[2] is None:
        tensors[3] = None
    assert tensors[0] is not None
    tensors[0] = away_from_kinks(tensors[0], tensors[1:], 1.0, -1.0)
    check_against_oracle(place, noise_bias_act, oracle("lrelu"), tensors, NAMES, torch.float32)


@pytest.mark.parametrize(("slope", "gain"), [(0.0, 1.0), (-0.5, 1.0), (0.2, -1.0), (0.2, 0.0)])
def test_settings_whose_output_hides_the_sign_save_the_input(slope: float, gain: float) -> None:
    place = Place("cpu") if native.build_report()["cpp"] else Place("eager")
    x, bias = draw(2, 3, 4, 5, seed=1), draw(3, seed=2)
    options = {"slope": slope, "gain": gain}
    x = away_from_kinks(x, [None, None, None, bias], 1.0, -1.0)
    check_against_oracle(
        place,
        lambda x, b: noise_bias_act(x, bias=b, **options),
        lambda x, b: reference(x, None, None, None, b, "lrelu", slope, gain, -1.0),
        [x, bias],
        ("x", "bias"),
        torch.float32,
    )


shapes = st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 37), st.integers(1, 37))


@needs_cpp
@settings(max_examples=60, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(["nchw", "nhwc", "sliced", "transposed", "offset", "expanded"]))
def test_any_shape_and_stride(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str) -> None:
    n, c, h, w = shape
    x, *operands = inputs(n, c, h, w, dtype, torch.contiguous_format, shared_noise=n % 2 == 0)
    x = away_from_kinks(x, list(operands), 1.0, -1.0)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        wide = torch.zeros(n, 2 * c, h, w, dtype=dtype)
        wide[:, ::2] = x
        x = wide[:, ::2]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "offset":  # a storage offset of one element: no vector load is aligned
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(n, c, h, w)
    elif layout == "expanded" and n:
        x = x[:1].expand(n, c, h, w)
    with kernels.backend("cpu"):
        y = noise_bias_act(x, *operands)
    expected = reference(x.double(), *[t.double() for t in operands], "lrelu", 0.2, 1.0, -1.0)
    assert_close("output", y, expected, relative_l2={torch.float32: 2e-6}.get(dtype, 4e-3))
    assert y.is_contiguous(memory_format=memory_format(x))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_keeps_memory_format(place: Place, fmt: torch.memory_format) -> None:
    x = inputs(2, 8, 4, 6, torch.float32, fmt)[0]
    y, (gradient,) = run(place, noise_bias_act, [x])
    assert y.stride() == x.stride()
    assert gradient is not None
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_and_infinity_pass_through_alone(place: Place, act: str) -> None:
    x = draw(1, 3, 4, 5, seed=1)
    x[0, 0, 0, 0], x[0, 1, 1, 1], x[0, 2, 2, 2], x[0, 0, 3, 4] = float("nan"), float("inf"), float("-inf"), 90.0
    for clamp in (-1.0, 2.0):
        y, _ = run(place, lambda x, clamp=clamp: noise_bias_act(x, act=act, clamp=clamp), [x])
        expected = reference(x.double(), None, None, None, None, act, 0.2, 1.0, clamp)
        assert_close("output", y, expected, relative_l2=2e-6)


@needs_cpp
@pytest.mark.parametrize("isa", native.build_report()["isas"])
def test_smooth_activations_over_their_whole_range(isa: str) -> None:
    x = torch.cat([torch.linspace(-110, 110, 20001), torch.logspace(-30, 1, 2001), -torch.logspace(-30, 1, 2001)])
    x = x.view(1, 1, 1, -1)
    for act in ("tanh", "sigmoid", "silu"):
        with native.isa(isa), kernels.backend("cpu"):
            y = noise_bias_act(x, act=act)
        expected = reference(x.double(), None, None, None, None, act, 0.2, 1.0, -1.0)
        # 4 ulp of the result; below the smallest normal number only the absolute error is bounded.
        bound = 4 * 2**-24 * expected.abs() + 2**-126
        assert ((y.double() - expected).abs() <= bound).all(), act


@pytest.mark.parametrize(("act", "factor"), [("sigmoid", 1), ("tanh", 2)])
@pytest.mark.parametrize("place", PLACES)
def test_slopes_of_saturated_activations_keep_their_digits(place: Place, act: str, factor: int) -> None:
    """s (1 - s) and 1 - t^2 would be 0 where s and t round to 1."""
    x = torch.tensor([3.0, 9.0, 12.0, 17.0, 25.0, 80.0, -9.0, -40.0]).view(1, 1, 2, 4) / factor
    e = torch.exp(-factor * x.double().abs())
    _, (gradient,) = run(place, lambda x: noise_bias_act(x, act=act), [x])
    assert gradient is not None
    error = gradient.cpu() * (1 + e) ** 2 / (factor**2 * e) - 1
    assert error.abs().max() < 1e-6, error


def gradcheck_inputs() -> tuple[Tensor, ...]:
    x, *operands = inputs(2, 3, 2, 3, torch.float64, torch.contiguous_format, shared_noise=True)
    x = away_from_kinks(x, list(operands), 1.3, 2.5)
    return tuple(t.double().requires_grad_() for t in (x, *operands))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_gradcheck_and_gradgradcheck(act: str) -> None:
    tensors = gradcheck_inputs()
    function = lambda *t: noise_bias_act(*t, act=act, gain=1.3, clamp=2.5)  # noqa: E731
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_gradgradcheck_from_the_saved_output() -> None:
    x, *_, bias = gradcheck_inputs()
    x = away_from_kinks(x.detach(), [None, None, None, bias.detach()], 1.3, -1.0).requires_grad_()
    function = lambda x, bias: noise_bias_act(x, bias=bias, gain=1.3)  # noqa: E731
    assert torch.autograd.gradcheck(function, (x, bias))
    assert torch.autograd.gradgradcheck(function, (x, bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_opcheck(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    x, scale, noise, strength, bias = (t.requires_grad_() for t in inputs(2, 3, 4, 5, dtype, fmt))
    checks: list[tuple[Any, ...]] = [
        (x, scale, noise, strength, bias, "silu", 0.2, 1.4, 1.0),
        (x, None, None, None, bias, "lrelu", 0.2, 1.4, -1.0),
        (x[:0], None, None, None, bias, "lrelu", 0.2, 1.4, -1.0),
        (x[:, :, ::2], None, noise[:, :, ::2], None, None, "linear", 0.2, 1.0, -1.0),
    ]
    for arguments in checks:
        torch.library.opcheck(OP, arguments)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    def step(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        return noise_bias_act(x * 2, scale, bias=bias, act="silu").square().sum()

    x, scale, _, _, bias = (t.requires_grad_() for t in inputs(2, 3, 4, 5, torch.float32, torch.channels_last))
    expected = torch.autograd.grad(step(x, scale, bias), (x, scale, bias))
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(x, scale, bias), (x, scale, bias)), expected, strict=True):
        assert_close("gradient", actual, wanted, relative_l2=1e-6)
    with kernels.backend("eager"):
        compiled(x, scale, bias)
        assert kernels.last_backend("noise_bias_act") == "eager"  # the graph follows the scope it is called in


def test_exports_to_standard_operators() -> None:
    check_export(
        lambda x, bias: noise_bias_act(x, bias=bias, gain=1.4, clamp=2.0),
        OP,
        [draw(2, 3, 4, 5, seed=1), draw(3, seed=2)],
        [draw(5, 3, 4, 5, seed=5), draw(3, seed=2)],
        per_sample={0},
    )


def test_onnx_exporter_finds_the_decomposition() -> None:
    """R1 rests on a private name of torch: notice when it moves."""
    assert torch._decomp.decomposition_table[OP] is reference


def test_vmap_equals_a_loop() -> None:
    x, scale, noise, strength, bias = (
        draw(4, 2, 3, 5, 5, seed=1),
        draw(2, 3, seed=2),
        draw(4, 1, 1, 5, 5, seed=3),
        0.3,
        None,
    )
    strength_t, biases = torch.tensor(strength), draw(4, 3, seed=4)
    folded = torch.vmap(lambda x, n: noise_bias_act(x, scale, n, strength_t, bias))(x, noise)
    looped = torch.stack([noise_bias_act(a, scale, b, strength_t) for a, b in zip(x, noise, strict=True)])
    assert torch.equal(folded, looped)
    per_bias = torch.vmap(lambda x, b: noise_bias_act(x, bias=b))(x, biases)
    assert torch.equal(per_bias, torch.stack([noise_bias_act(a, bias=b) for a, b in zip(x, biases, strict=True)]))


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_same_bits_at_any_thread_count_and_batch_size(fmt: torch.memory_format) -> None:
    x, scale, noise, strength, bias = inputs(2, 40, 41, 43, torch.float32, fmt, shared_noise=True)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(Place("cpu"), noise_bias_act, [x, scale, noise, strength, bias], x))
    finally:
        torch.set_num_threads(before)
    first, *others = results
    for other in others:
        assert torch.equal(first[0], other[0])
        assert all(
            torch.equal(a, b) for a, b in zip(first[1], other[1], strict=True) if a is not None and b is not None
        )
    alone, _ = run(Place("cpu"), noise_bias_act, [x[1:], scale[1:], noise, strength, bias])
    assert torch.equal(alone[0], first[0][1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x must be of shape"),
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, TypeError, "x must be floating point"),
        ({"scale": torch.zeros(3)}, ValueError, r"scale must be of shape \(2, 3\), got float32 of shape \(3,\)"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must be of shape"),
        ({"noise": torch.zeros(3, 1, 4, 5)}, ValueError, "noise must be of shape"),
        ({"strength": torch.tensor(1.0)}, ValueError, "strength must come with noise"),
        ({"act": "gelu"}, ValueError, "act must be one of"),
        ({"x": None}, TypeError, "x must be a tensor, got None"),
        ({"noise": torch.zeros(1, 1, 4, 5), "strength": 0.3}, TypeError, "strength must be a tensor, got 0.3"),
        ({"scale": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "scale must be floating point, got int64"),
        ({"bias": torch.zeros(3, dtype=torch.complex64)}, TypeError, "bias must be floating point, got complex64"),
        ({"noise": torch.zeros(1, 1, 4, 5, dtype=torch.uint8)}, TypeError, "noise must be floating point, got uint8"),
        ({"slope": None}, TypeError, "slope must be a number, got None"),
        ({"gain": torch.ones(())}, TypeError, r"gain must be a number, got tensor\(1.\)"),
        ({"clamp": None}, TypeError, "clamp must be a number, got None; pass -1 for no clamp"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        noise_bias_act(**({"x": torch.zeros(2, 3, 4, 5)} | change))
