# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from contextlib import nullcontext
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
from faceedit.kernels import fir_epilogue, native, noise_bias_act, setup_filter, upfirdn2d
from faceedit.kernels.fir_epilogue import reference
from faceedit.kernels.noise_bias_act import ACTIVATIONS
from faceedit.kernels.tensors import memory_format

OP = torch.ops.faceedit.fir_epilogue.default
NAMES = ("x", "scale", "noise", "strength", "bias", "add")
FIR = setup_filter([1, 3, 3, 1])
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")

# up, down, pad, fir_gain, flip: after a transposed convolution, of a skip image, and down.
AFTER_CONV, SKIP, DOWN = (
    (1, 1, [1, 1, 1, 1], 4.0, False),
    (2, 1, [2, 1, 2, 1], 4.0, False),
    (1, 2, [1, 2, 2, 1], 1.0, True),
)


def inputs(
    setting: tuple[Any, ...], n: int, c: int, h: int, w: int, dtype: torch.dtype, fmt: torch.memory_format
) -> list[Tensor]:
    """Return x and every operand, for an output of (h, w), even where up is 2."""
    up, down, pad = setting[:3]
    rows, columns = ((size - 1) * down + 4 - sum(sides) for size, sides in ((h, pad[2:]), (w, pad[:2])))
    x = draw(n, c, rows // up, columns // up, seed=1).to(dtype).to(memory_format=fmt)
    add = draw(n, c, h, w, seed=5).to(dtype).to(memory_format=fmt)
    return [x, draw(n, c, seed=2, low=0.5), draw(n, 1, h, w, seed=3, low=0.5), torch.tensor(0.3), draw(c, seed=4), add]


def away_from_kinks(setting: tuple[Any, ...], tensors: list[Tensor], gain: float, clamp: float) -> None:
    """Draw the noise anew until no pre-activation lies near a kink, where the gradient is a matter of rounding."""
    x, scale, noise, strength, bias, _ = tensors
    for seed in range(1000, 1100):
        z = reference(
            *(x.double(), FIR, *setting, scale.double(), noise.double(), strength, bias.double()),
            *(None, "linear", 0.2, 1.0, -1.0),
        )
        near = z.abs() < 0.015
        for slope in (1.0, 0.2):
            near |= ((z * slope * gain).abs() - clamp).abs() < 0.03
        near = near.any(1, keepdim=True)
        if not near.any():
            return
        noise[near] = draw(*noise.shape, seed=seed, low=0.5)[near]
    raise AssertionError("no values away from the kinks were found")


def call(setting: tuple[Any, ...], **options: Any) -> Callable[..., Tensor]:
    up, down, pad, fir_gain, flip = setting

    def function(x: Tensor, *operands: Tensor | None) -> Tensor:
        named = dict(zip(NAMES[1:], operands, strict=True))
        fir = FIR.to(x.device)
        return fir_epilogue(x, fir, up=up, down=down, pad=pad, fir_gain=fir_gain, flip=flip, **named, **options)

    return function


def oracle(setting: tuple[Any, ...], act: str, gain: float = 1.0, clamp: float = -1.0) -> Callable[..., Tensor]:
    return lambda x, *operands: reference(x, FIR, *setting, *operands, act, 0.2, gain, clamp)


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 19), st.integers(1, 19)),
    st.sampled_from([AFTER_CONV, SKIP, DOWN]), st.sampled_from(DTYPES), st.sets(st.sampled_from(NAMES[1:])),
    st.sampled_from(["nchw", "nhwc", "sliced", "transposed", "offset", "expanded"]),
)  # fmt: skip
def test_any_shape_stride_and_choice_of_operands(
    shape: tuple[int, int, int, int], setting: tuple[Any, ...], dtype: torch.dtype, left_out: set[str], layout: str
) -> None:
    n, c, h, w = shape
    twice = 2 if setting is SKIP else 1
    x, *operands = inputs(setting, n, c, h * twice, w * twice, dtype, torch.contiguous_format)
    if layout == "nhwc":
        x = x.contiguous(memory_format=torch.channels_last)
    elif layout == "sliced":
        x = x.repeat_interleave(2, 1)[:, ::2]
    elif layout == "transposed":
        x = x.transpose(2, 3).contiguous().transpose(2, 3)
    elif layout == "offset":  # a storage offset of one element: no vector load is aligned
        x = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    elif layout == "expanded" and n:
        x = x[:1].expand(x.shape)
    chosen = [None if name in left_out else t for name, t in zip(NAMES[1:], operands, strict=True)]
    if chosen[1] is None:
        chosen[2] = None  # a strength is of a noise map
    results = []
    for dtype_of, compute in (
        (None, call(setting, act="linear", gain=0.5)),
        (torch.double, oracle(setting, "linear", 0.5)),
    ):
        leaves = [None if t is None else t.detach().to(dtype_of or t.dtype).requires_grad_() for t in (x, *chosen)]
        with kernels.backend("cpu" if dtype_of is None else "eager"):
            y = compute(*leaves)
            weights = draw(*y.shape, seed=9).to(dtype).to(y.dtype)
            results.append([y, *torch.autograd.grad(y, [t for t in leaves if t is not None], weights)])
    for actual, wanted in zip(*results, strict=True):
        assert actual.shape == wanted.shape
        # Sums over terms of either sign may cancel: the bound is on the largest value, not on each.
        if actual.numel():
            bound = TOLERANCE[dtype][1] * max(float(wanted.detach().abs().max()), 1.0)
            assert (actual.double() - wanted).abs().max() <= bound


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_matches_reference(place: Place, act: str, dtype: torch.dtype, fmt: torch.memory_format) -> None:
    tensors = inputs(AFTER_CONV, 2, 19, 5, 7, dtype, fmt)
    away_from_kinks(AFTER_CONV, tensors, 1.4, 3.0)
    options = {"gain": 1.4, "clamp": 3.0}
    check_against_oracle(
        place, call(AFTER_CONV, act=act, **options), oracle(AFTER_CONV, act, **options), tensors, NAMES, dtype
    )


@pytest.mark.parametrize("setting", [AFTER_CONV, SKIP, DOWN], ids=["conv", "skip", "down"])
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("place", PLACES)
def test_from_the_saved_output(place: Place, fmt: torch.memory_format, setting: tuple[Any, ...]) -> None:
    """Without `add` and a gradient to scale only the output is saved; the gradients are the same."""
    tensors = inputs(setting, 2, 17, 6, 4, torch.float32, fmt)
    away_from_kinks(setting, tensors, 1.4, 3.0)
    scale = tensors[1]
    function, expected = call(setting, gain=1.4, clamp=3.0), oracle(setting, "lrelu", 1.4, 3.0)
    check_against_oracle(
        place,
        lambda x, noise, strength, bias: function(x, scale.to(x.device), noise, strength, bias, None),
        lambda x, noise, strength, bias: expected(x, scale, noise, strength, bias, None),
        [tensors[0], *tensors[2:5]],
        ("x", "noise", "strength", "bias"),
        torch.float32,
    )


@pytest.mark.parametrize("present", range(32), ids=lambda bits: f"{bits:05b}")
@pytest.mark.parametrize("place", PLACES)
def test_every_subset_of_operands(place: Place, present: int) -> None:
    setting = (AFTER_CONV, SKIP, DOWN)[present % 3]
    everything = inputs(setting, 2, 17, 4, 6, torch.float32, FORMATS[present // 2 % 2])
    everything[2] = everything[2][:1]
    tensors = [everything[0], *(t if present >> i & 1 else None for i, t in enumerate(everything[1:]))]
    if tensors[2] is None:
        tensors[3] = None
    check_against_oracle(place, call(setting, act="silu"), oracle(setting, "silu"), tensors, NAMES, torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_equals_the_two_ops_it_fuses(place: Place) -> None:
    x, scale, noise, strength, bias, add = (
        t.to(place.device) for t in inputs(SKIP, 2, 3, 8, 6, torch.float32, torch.contiguous_format)
    )
    with kernels.backend(place.backend):
        fused = call(SKIP, clamp=1.5)(x, scale, noise, strength, bias, add)
        apart = noise_bias_act(upfirdn2d(x, FIR.to(x.device), *SKIP), scale, noise, strength, bias, clamp=1.5) + add
    assert_close("output", fused, apart, relative_l2=1e-6)


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(("channels", "height", "width"), [(3, 5, 1100), (70, 9, 90), (3000, 2, 4)])
def test_images_of_many_tiles(fmt: torch.memory_format, channels: int, height: int, width: int) -> None:
    tensors = inputs(AFTER_CONV, 1, channels, height, width, torch.float32, fmt)
    for operands in (tensors, [*tensors[:5], None]):
        y, _ = run(Place("cpu"), call(AFTER_CONV), operands)
        wide = [None if t is None else t.double() for t in operands]
        assert_close("output", y, oracle(AFTER_CONV, "lrelu")(*wide), relative_l2=2e-6)


@pytest.mark.parametrize("place", PLACES)
def test_settings_whose_output_hides_the_sign_save_the_input(place: Place) -> None:
    tensors = inputs(AFTER_CONV, 1, 3, 4, 5, torch.float32, torch.contiguous_format)
    away_from_kinks(AFTER_CONV, tensors, 1.0, 1e9)
    fixed = [t.clone() for t in tensors[1:]]
    up, down, pad, fir_gain, flip = AFTER_CONV
    for slope, gain in ((0.0, 1.0), (-0.5, 1.0), (0.2, -1.0), (0.2, 0.0)):
        check_against_oracle(
            place,
            lambda x, slope=slope, gain=gain: fir_epilogue(
                x,
                FIR.to(x.device),
                pad=pad,
                fir_gain=fir_gain,
                **dict(zip(NAMES[1:], (t.to(x.device) for t in fixed), strict=True)),
                slope=slope,
                gain=gain,
            ),
            lambda x, slope=slope, gain=gain: reference(
                x, FIR, up, down, pad, fir_gain, flip, *fixed, "lrelu", slope, gain, -1.0
            ),
            [tensors[0]],
            ("x",),
            torch.float32,
        )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_keeps_memory_format(place: Place, fmt: torch.memory_format) -> None:
    tensors = inputs(AFTER_CONV, 2, 8, 4, 6, torch.float32, fmt)
    y, (gradient, *_) = run(place, call(AFTER_CONV), tensors)
    assert memory_format(y) is fmt
    assert gradient is not None
    assert gradient.stride() == tensors[0].stride()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_nan_reaches_what_it_touches_alone(place: Place, act: str) -> None:
    x = draw(1, 2, 9, 9, seed=1)
    x[0, 0, 4, 4] = float("nan")
    y, _ = run(place, lambda x: fir_epilogue(x, FIR.to(x.device), pad=1, act=act, clamp=2.0), [x])
    expected = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    expected[0, 0, 2:6, 2:6] = True
    assert torch.equal(y.isnan().cpu(), expected)


@pytest.mark.parametrize("setting", [AFTER_CONV, SKIP, DOWN], ids=["conv", "skip", "down"])
@pytest.mark.parametrize("act", ["lrelu", "silu", "tanh"])
def test_gradcheck_and_gradgradcheck(act: str, setting: tuple[Any, ...]) -> None:
    tensors = [t.double() for t in inputs(setting, 2, 2, 4, 2, torch.float64, torch.contiguous_format)]
    away_from_kinks(setting, tensors, 1.3, 3.0)
    leaves = tuple(t.requires_grad_() for t in tensors)
    function = call(setting, act=act, gain=1.3, clamp=3.0)
    assert torch.autograd.gradcheck(function, leaves)
    assert torch.autograd.gradgradcheck(function, leaves)


def test_gradgradcheck_from_the_saved_output() -> None:
    tensors = [t.double() for t in inputs(AFTER_CONV, 1, 2, 3, 3, torch.float64, torch.contiguous_format)]
    away_from_kinks(AFTER_CONV, tensors, 1.3, 1e9)
    x, scale, noise, strength, bias, _ = tensors
    leaves = tuple(t.requires_grad_() for t in (x, noise, strength, bias))
    function = call(AFTER_CONV, gain=1.3)
    assert torch.autograd.gradcheck(lambda x, n, s, b: function(x, scale, n, s, b, None), leaves)
    assert torch.autograd.gradgradcheck(lambda x, n, s, b: function(x, scale, n, s, b, None), leaves)


@pytest.mark.parametrize("setting", [AFTER_CONV, SKIP, DOWN], ids=["conv", "skip", "down"])
@pytest.mark.parametrize("wants", ["x", "x add", "x noise strength bias add"])
@pytest.mark.parametrize("gain", [1.0, 1.4])
@pytest.mark.parametrize("place", PLACES)
def test_one_slope_saves_no_image(place: Place, gain: float, wants: str, setting: tuple[Any, ...]) -> None:
    """Linear and not clamped, as between the sizes of a skip generator's image: no gradient depends on values."""
    everything = dict(zip(NAMES, inputs(setting, 2, 5, 6, 4, torch.float32, torch.channels_last), strict=True))
    everything["scale"] = None
    names = [name for name in NAMES if name in wants.split()]
    fixed = {name: t for name, t in everything.items() if name not in names}
    options = {"act": "linear", "gain": gain}

    def given(tensors: tuple[Tensor, ...]) -> list[Tensor | None]:
        found = fixed | dict(zip(names, tensors, strict=True))
        return [None if (t := found[name]) is None else t.to(tensors[0].device) for name in NAMES]

    saved: list[torch.Size] = []

    def function(*tensors: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.shape), t)[1], lambda t: t):
            return call(setting, **options)(*given(tensors))

    check_against_oracle(
        place,
        function,
        lambda *tensors: oracle(setting, **options)(*given(tensors)),
        [everything[name] for name in names],
        tuple(names),
        torch.float32,
    )
    image = everything["x"].shape, everything["add"].shape
    assert saved
    assert not any(shape in image for shape in saved)


def test_gradgradcheck_with_one_slope() -> None:
    x, _, noise, strength, bias, add = (
        t.double() for t in inputs(SKIP, 1, 2, 4, 4, torch.float64, torch.contiguous_format)
    )
    function = call(SKIP, act="linear")
    few = tuple(t.requires_grad_() for t in (x, add))
    many = tuple(t.requires_grad_() for t in (x, noise, strength, bias, add))
    for case, leaves in (
        (lambda x, add: function(x, None, None, None, None, add), few),
        (lambda x, n, s, b, add: function(x, None, n, s, b, add), many),
    ):
        assert torch.autograd.gradcheck(case, leaves)
        assert torch.autograd.gradgradcheck(case, leaves)


@pytest.mark.parametrize("gain", [1.0, 1.4])
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("place", PLACES)
def test_with_one_slope_the_gradient_has_the_inputs_format(place: Place, fmt: torch.memory_format, gain: float) -> None:
    """A gradient may come in any layout, as one number for all, and many at once."""
    x = inputs(SKIP, 2, 3, 6, 4, torch.float32, fmt)[0].to(place.device).requires_grad_()
    with native.isa(place.isa) if place.isa else nullcontext(), kernels.backend(place.backend):
        y = call(SKIP, act="linear", gain=gain)(x, *[None] * 5)
        (gradient,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        assert memory_format(gradient) is fmt
        grads = draw(3, *y.shape, seed=9).to(x.device)
        (together,) = torch.autograd.grad(y, x, grads, is_grads_batched=True, retain_graph=True)
        alone = [torch.autograd.grad(y, x, grad, retain_graph=True)[0] for grad in grads]
    torch.testing.assert_close(together, torch.stack(alone))


@needs_cpp
def test_the_backward_pass_runs_where_the_forward_pass_did() -> None:
    x, *operands = inputs(AFTER_CONV, 1, 3, 6, 6, torch.float32, torch.contiguous_format)
    x.requires_grad_()
    with kernels.backend("eager"):
        y = call(AFTER_CONV)(x, *operands)
    y.sum().backward()
    for op in ("fir_epilogue", "upfirdn2d", "noise_bias_act_backward"):
        assert kernels.last_backend(op) == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_opcheck(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    tensors = [t.requires_grad_() for t in inputs(AFTER_CONV, 2, 3, 4, 5, dtype, fmt)]
    x, *operands = tensors
    checks: list[tuple[Any, ...]] = [
        (x, FIR, *AFTER_CONV, *operands, "silu", 0.2, 1.4, 3.0),
        (x, FIR, *AFTER_CONV, None, None, None, operands[3], None, "lrelu", 0.2, 1.4, -1.0),
        (x[:0], FIR, *SKIP, None, None, None, operands[3], None, "lrelu", 0.2, 1.4, -1.0),
        (x[:, :, ::2], FIR, *SKIP, operands[0], None, None, None, None, "linear", 0.2, 1.0, -1.0),
        (x, FIR, *AFTER_CONV, None, None, None, None, operands[4], "linear", 0.2, 1.0, -1.0),
    ]
    for arguments in checks:
        torch.library.opcheck(OP, arguments)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    function = call(AFTER_CONV, act="silu", gain=1.4)
    tensors = [t.requires_grad_() for t in inputs(AFTER_CONV, 2, 3, 4, 5, torch.float32, torch.channels_last)]

    def step(*tensors: Tensor) -> Tensor:
        return function(tensors[0] * 2, *tensors[1:]).square().sum()

    expected = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        assert_close("gradient", actual, wanted, relative_l2=1e-6)
    with kernels.backend("eager"):
        compiled(*tensors)
        assert kernels.last_backend("fir_epilogue") == "eager"


def test_exports_to_standard_operators() -> None:
    function = call(SKIP, gain=1.4, clamp=2.0)
    tensors = inputs(SKIP, 2, 3, 6, 4, torch.float32, torch.contiguous_format)
    larger = inputs(SKIP, 5, 3, 6, 4, torch.float32, torch.contiguous_format)
    check_export(function, OP, tensors, larger, per_sample={0, 1, 2, 5})


def test_vmap_equals_a_loop() -> None:
    tensors = inputs(AFTER_CONV, 6, 3, 5, 4, torch.float32, torch.contiguous_format)
    x, scale, noise, strength, bias, add = tensors
    function = call(AFTER_CONV)
    split = [t.unflatten(0, (3, 2)) for t in (x, scale, noise, add)]
    folded = torch.vmap(lambda x, s, n, a: function(x, s, n, strength, bias, a))(*split)
    assert torch.equal(folded.flatten(0, 1), function(*tensors))
    shared = torch.vmap(lambda x: function(x, scale[:2], noise[:1], strength, bias, None))(split[0])
    looped = torch.stack([function(t, scale[:2], noise[:1], strength, bias, None) for t in split[0]])
    assert torch.equal(shared, looped)
    biases = draw(3, 3, seed=8)
    per_bias = torch.vmap(lambda x, b: function(x, None, None, None, b, None))(split[0], biases)
    looped = torch.stack([function(t, None, None, None, b, None) for t, b in zip(split[0], biases, strict=True)])
    assert torch.equal(per_bias, looped)


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_same_bits_at_any_thread_count_and_batch_size(fmt: torch.memory_format) -> None:
    tensors = inputs(AFTER_CONV, 2, 40, 41, 43, torch.float32, fmt)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(Place("cpu"), call(AFTER_CONV), tensors))
    finally:
        torch.set_num_threads(before)
    first, *others = results
    for other in others:
        assert torch.equal(first[0], other[0])
        for a, b in zip(first[1], other[1], strict=True):
            assert a is not None
            assert torch.equal(a, b)
    x, scale, noise, strength, bias, add = tensors
    alone, _ = run(Place("cpu"), call(AFTER_CONV), [x[1:], scale[1:], noise[1:], strength, bias, add[1:]])
    assert torch.equal(alone[0], first[0][1])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x must be of shape"),
        ({"fir": torch.zeros(2, requires_grad=True), "bias": torch.zeros(3)}, ValueError, "fir must not require grad"),
        ({"scale": torch.zeros(3)}, ValueError, r"scale must be of shape \(2, 3\), got float32 of shape \(3,\)"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must be of shape"),
        ({"noise": torch.zeros(2, 1, 4, 5)}, ValueError, r"noise must be of shape \(2, 1, 3, 4\) or \(1, 1, 3, 4\)"),
        ({"add": torch.zeros(1, 3, 3, 4)}, ValueError, r"add must be of shape \(2, 3, 3, 4\)"),
        ({"strength": torch.tensor(1.0)}, ValueError, "strength must come with noise"),
        ({"act": "gelu"}, ValueError, "act must be one of"),
        ({"up": 3}, ValueError, "up must be 1 or 2"),
        ({"add": torch.zeros(2, 3, 3, 4, dtype=torch.int64)}, TypeError, "add must be floating point"),
        ({"bias": torch.zeros(3, dtype=torch.complex64)}, TypeError, "bias must be floating point"),
        ({"fir_gain": None}, TypeError, "fir_gain must be a number, got None"),
        ({"clamp": None}, TypeError, "clamp must be a number, got None; pass -1 for no clamp"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"fir_epilogue: {message}"):
        fir_epilogue(**({"x": torch.zeros(2, 3, 4, 5), "fir": torch.zeros(2)} | change))
