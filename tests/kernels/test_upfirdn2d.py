# SPDX-License-Identifier: Apache-2.0
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support.compare import assert_close
from support.exporting import check_export
from support.kernel_cases import DTYPES, FORMATS, PLACES, TOLERANCE, Place, check_against_oracle, draw, run
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import downsample2d, filter2d, native, noise_bias_act, setup_filter, upfirdn2d, upsample2d
from faceedit.kernels.noise_bias_act import ACTIVATIONS
from faceedit.kernels.tensors import memory_format
from faceedit.kernels.upfirdn2d import native_geometry, output_shape, reference

OP = torch.ops.faceedit.upfirdn2d.default
FAST = "cpu" if native.build_report()["cpp"] else "eager"
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")

# up, down, pad, gain, flip: StyleGAN2's filters after a transposed convolution, of skip images and of the
# discriminator; both at once; cropping; pads that reach beyond the filter.
SETTINGS = [
    (1, 1, [1, 1, 1, 1], 4.0, False),
    (2, 1, [2, 1, 2, 1], 4.0, False),
    (1, 2, [1, 1, 1, 1], 1.0, True),
    (2, 2, [3, 2, 0, 5], 1.0, False),
    (1, 1, [-1, 2, 3, -2], 0.5, False),
    (2, 1, [-3, 7, 6, -1], 1.0, True),
    (1, 2, [0, -1, -2, 7], 1.0, False),
]
FIRS = {
    "one axis": draw(4, seed=7, low=0.2),
    "rank one": torch.outer(draw(3, seed=8, low=0.2), draw(5, seed=9, low=0.2)),
}
FIRS["general"] = draw(4, 3, seed=10, low=0.2)


def by_loops(x: Tensor, fir: Tensor, up: int, down: int, pad: list[int], gain: float, flip: bool) -> Tensor:
    """The definition, written as sums over indices: y[i] = sum over k of fir[k] * stuffed[i * down + k' - pad]."""
    fir = fir if fir.dim() == 2 else torch.outer(fir, fir)
    kh, kw = fir.shape
    y = x.new_zeros(output_shape(x, fir, up, down, pad))
    for i in range(y.shape[2]):
        for j in range(y.shape[3]):
            for a in range(kh):
                for b in range(kw):
                    row, column = i * down + a - pad[2], j * down + b - pad[0]
                    if row % up or column % up or not (0 <= row < x.shape[2] * up and 0 <= column < x.shape[3] * up):
                        continue
                    tap = fir[a, b] if flip else fir[kh - 1 - a, kw - 1 - b]
                    y[:, :, i, j] += gain * tap * x[:, :, row // up, column // up]
    return y


@pytest.mark.parametrize("fir", FIRS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_reference_is_the_definition(setting: tuple[Any, ...], fir: str) -> None:
    x = draw(2, 2, 6, 7, seed=1).double()
    assert_close(
        "output", reference(x, FIRS[fir], *setting), by_loops(x, FIRS[fir].double(), *setting), relative_l2=1e-12
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fir", FIRS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_matches_reference(
    place: Place, setting: tuple[Any, ...], fir: str, dtype: torch.dtype, fmt: torch.memory_format
) -> None:
    taps = FIRS[fir]
    x = draw(2, 19, 9, 7, seed=1, low=0.1).to(dtype).to(memory_format=fmt)
    check_against_oracle(
        place,
        lambda x: upfirdn2d(x, taps.to(x.device), *setting),
        lambda x: reference(x, taps, *setting),
        [x],
        ("x",),
        dtype,
    )


shapes = st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 37), st.integers(1, 37))
pads = st.lists(st.integers(-2, 3), min_size=4, max_size=4)
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shapes, pads, sizes, st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.sampled_from(DTYPES),
    st.sampled_from(["one axis", "rank one", "general"]),
    st.sampled_from(["nchw", "nhwc", "sliced", "transposed", "offset", "expanded"]),
)  # fmt: skip
def test_any_shape_and_stride(
    shape: tuple[int, int, int, int], pad: list[int], size: tuple[int, int], up: int, down: int, dtype: torch.dtype,
    kind: str, layout: str,
) -> None:  # fmt: skip
    n, c, h, w = shape
    x = draw(n, c, h, w, seed=1).to(dtype)
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
    kh, kw = size
    fir = draw(kh, seed=2) if kind == "one axis" else draw(kh, kw, seed=2)
    if kind == "rank one":
        fir = torch.outer(draw(kh, seed=3), draw(kw, seed=4))
    assume(h * up + pad[2] + pad[3] >= fir.shape[0] and w * up + pad[0] + pad[1] >= fir.shape[-1])
    leaf = x.detach().requires_grad_()
    with kernels.backend("cpu"):
        y = upfirdn2d(leaf, fir, up, down, pad)
        weights = draw(*y.shape, seed=5).to(dtype)
        (gradient,) = torch.autograd.grad(y, leaf, weights)
    wide = x.double().requires_grad_()
    expected = reference(wide, fir.double(), up, down, pad, 1.0, False)
    (expected_gradient,) = torch.autograd.grad(expected, wide, weights.double())
    # A sum of terms of either sign may cancel: the bound is on the largest value, not on each.
    for name, actual, wanted in (("output", y, expected), ("gradient", gradient, expected_gradient)):
        assert actual.shape == wanted.shape
        if actual.numel():
            bound = TOLERANCE[dtype][0] * max(float(wanted.detach().abs().max()), float(fir.abs().sum()), 1e-3)
            assert (actual.double() - wanted).abs().max() <= bound, name
    assert y.is_contiguous(memory_format=memory_format(x))


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    ("channels", "height", "width", "taps"), [(3, 5, 700, 4), (70, 9, 90, 4), (1300, 3, 5, 12), (520, 3, 4, 32)]
)
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2)])
def test_images_of_many_tiles(
    fmt: torch.memory_format, channels: int, height: int, width: int, taps: int, up: int, down: int
) -> None:
    """Wide rows are cut along the row, very many channels along the channels."""
    x = draw(1, channels, height, width, seed=1).to(memory_format=fmt)
    fir = torch.outer(draw(2, seed=2, low=0.1), draw(taps, seed=3, low=0.1)) / taps
    setting = (up, down, [taps, taps - 1, 1, 2], 1.0, False)
    y, _ = run(Place("cpu"), lambda x: upfirdn2d(x, fir, *setting), [x])
    assert_close("output", y, reference(x.double(), fir.double(), *setting), relative_l2=2e-6)


@needs_cpp
@pytest.mark.parametrize("isa", native.build_report()["isas"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rates", [(1, 1), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 5, 3), (1, 37, 70, 9), (1, 530, 6, 19), (1, 20, 3, 450)], ids=str)
def test_rolling_rows_of_any_size(
    shape: tuple[int, int, int, int], rates: tuple[int, int], dtype: torch.dtype, isa: str
) -> None:
    """Tails of channels, several groups of them, bands, segments, both phases: every output written, none beside."""
    x, fir, margin = draw(*shape, seed=1).to(dtype).contiguous(memory_format=torch.channels_last), draw(4, seed=2), 64
    for pad in ([1, 1, 1, 1], [2, 1, 2, 1], [3, 0, 5, 2], [-1, 2, 1, 1]):
        setting = (*rates, pad, 1.5, False)
        expected = reference(x.double(), fir.double(), *setting)
        buffer = x.new_full((expected.numel() + 2 * margin,), float("nan"))
        layout = torch.empty(expected.shape, device="meta").contiguous(memory_format=torch.channels_last)
        y = buffer.as_strided(expected.shape, layout.stride(), margin)
        bound = TOLERANCE[dtype][0] * max(float(expected.abs().max()), float(fir.abs().sum())) * 2
        with native.isa(isa):
            native.module().upfirdn2d_fwd((-1, 2, 0), **native_geometry(x, fir, *setting, y) | {"channels_last": True})
        assert bool(((y.double() - expected).abs() <= bound).all())
        assert bool(buffer[:margin].isnan().all() and buffer[-margin:].isnan().all())


@needs_cpp
def test_large_images_past_the_caches_keep_their_bits() -> None:
    """Such stores need an aligned output; one that is not aligned takes the others."""
    x = draw(1, 16, 64, 64, seed=1).repeat(1, 1, 11, 11).contiguous(memory_format=torch.channels_last)
    setting = (1, 1, [2, 1, 1, 2], 1.5, False)
    shape = output_shape(x, FIRS["one axis"], 1, 1, [2, 1, 1, 2])
    buffer = torch.full((x.numel() + 64,), float("nan"))
    start = -buffer.data_ptr() % 64 // 4
    results = []
    for offset in (start, start + 1):
        y = buffer.as_strided(shape, x.new_empty(shape).contiguous(memory_format=torch.channels_last).stride(), offset)
        native.module().upfirdn2d_fwd((-1, 2, 0), **native_geometry(x, FIRS["one axis"], *setting, y))
        results.append(y.clone())
    assert not results[0].isnan().any()
    assert torch.equal(*results)


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS[:3], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_channels_in_packs_of_four(
    place: Place, setting: tuple[Any, ...], dtype: torch.dtype, fmt: torch.memory_format
) -> None:
    x = draw(2, 12, 38, 13, seed=1, low=0.1).to(dtype).to(memory_format=fmt)
    check_against_oracle(
        place,
        lambda x: upfirdn2d(x, FIRS["one axis"].to(x.device), *setting),
        lambda x: reference(x, FIRS["one axis"], *setting),
        [x],
        ("x",),
        dtype,
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_keeps_memory_format(place: Place, fmt: torch.memory_format) -> None:
    x = draw(2, 8, 4, 6, seed=1).to(memory_format=fmt)
    y, (gradient,) = run(place, lambda x: upsample2d(x, FIRS["one axis"].to(x.device)), [x])
    assert memory_format(y) is fmt
    assert gradient is not None
    assert gradient.stride() == x.stride()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_nan_and_infinity_reach_what_they_touch_alone(place: Place, setting: tuple[Any, ...]) -> None:
    x = draw(1, 2, 11, 12, seed=1, low=0.1)
    x[0, 0, 1, 2], x[0, 0, 8, 9], x[0, 1, 4, 4] = float("nan"), float("inf"), float("-inf")
    y, _ = run(place, lambda x: upfirdn2d(x, FIRS["one axis"].to(x.device), *setting), [x])
    # By hand: the reference multiplies the zeros between samples, and a convolution library may take any route.
    expected = by_loops(x.double(), FIRS["one axis"].double(), *setting)
    if place.backend != "eager":
        assert_close("output", y, expected, relative_l2=2e-6)
    assert torch.equal(y.isnan().cpu() | y.isinf().cpu(), expected.isnan() | expected.isinf())


@pytest.mark.parametrize("fir", FIRS)
@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_gradcheck_and_gradgradcheck(setting: tuple[Any, ...], fir: str) -> None:
    x = draw(1, 2, 5, 6, seed=1).double().requires_grad_()
    function = lambda x: upfirdn2d(x, FIRS[fir], *setting)  # noqa: E731
    assert torch.autograd.gradcheck(function, x)
    assert torch.autograd.gradgradcheck(function, x)


@needs_cpp
def test_every_order_of_gradient_runs_the_same_kernel() -> None:
    x = draw(1, 3, 8, 9, seed=1).requires_grad_()
    with kernels.backend("cpu"):
        y = upsample2d(x, FIRS["one axis"])
    weights = draw(*y.shape, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(y, x, weights, create_graph=True)
    assert kernels.last_backend("upfirdn2d") == "cpu"
    (second,) = torch.autograd.grad(gradient, weights, x)
    assert_close("second order", second, y, relative_l2=1e-6)  # linear: the gradient's gradient is the op on x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_opcheck(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    x = draw(2, 3, 5, 6, seed=1).to(dtype).to(memory_format=fmt).requires_grad_()
    checks: list[tuple[Any, ...]] = [
        (x, FIRS["one axis"], *SETTINGS[0]),
        (x, FIRS["general"], *SETTINGS[3]),
        (x[:0], FIRS["rank one"], *SETTINGS[1]),
        (x[:, :, ::2], FIRS["one axis"], *SETTINGS[1]),
    ]
    for arguments in checks:
        torch.library.opcheck(OP, arguments)


def test_setup_filter_is_on_the_device_that_is_asked_for_or_is_the_default() -> None:
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    with torch.device("meta"):
        assert setup_filter([1, 3, 3, 1]).device.type == setup_filter(taps).device.type == "meta"
        for fir in (setup_filter([1, 3, 3, 1], device="cpu"), setup_filter(taps, device="cpu")):
            torch.testing.assert_close(fir, taps.cpu() / 8)
    assert setup_filter(taps, device="meta").device.type == setup_filter([1], device="meta").device.type == "meta"


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    fir = setup_filter([1, 3, 3, 1])

    def step(x: Tensor) -> Tensor:
        return downsample2d(upsample2d(x * 2, fir), fir).square().sum()

    x = draw(2, 3, 6, 5, seed=1).to(memory_format=torch.channels_last).requires_grad_()
    expected = torch.autograd.grad(step(x), x)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    assert_close("gradient", torch.autograd.grad(compiled(x), x)[0], expected[0], relative_l2=1e-6)
    with kernels.backend("eager"):
        compiled(x)
        assert kernels.last_backend("upfirdn2d") == "eager"


def test_exports_to_standard_operators() -> None:
    for index, (up, down, pad, gain, flip) in enumerate(SETTINGS[:5:2]):
        check_export(
            lambda x, fir, s=(up, down, pad, gain, flip): upfirdn2d(x, fir, *s),
            OP,
            [draw(2, 3, 6, 5, seed=1), list(FIRS.values())[index]],
            [draw(5, 3, 6, 5, seed=5), list(FIRS.values())[index]],
            per_sample={0},
        )


def test_vmap_equals_a_loop() -> None:
    x, firs = draw(4, 2, 3, 6, 5, seed=1), draw(4, 3, 4, seed=2)
    folded = torch.vmap(lambda x: upsample2d(x, firs[0]), in_dims=1)(x)
    assert torch.equal(folded, torch.stack([upsample2d(a, firs[0]) for a in x.unbind(1)]))
    per_fir = torch.vmap(lambda x, fir: upsample2d(x, fir))(x, firs)
    assert torch.equal(per_fir, torch.stack([upsample2d(a, f) for a, f in zip(x, firs, strict=True)]))


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_same_bits_at_any_thread_count_and_batch_size(fmt: torch.memory_format) -> None:
    x = draw(2, 40, 41, 43, seed=1).to(memory_format=fmt)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, (gradient,) = run(Place("cpu"), lambda x: upfirdn2d(x, FIRS["one axis"], *SETTINGS[1]), [x])
            results.append((y, gradient))
    finally:
        torch.set_num_threads(before)
    for y, gradient in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(gradient, results[0][1])
    alone, _ = run(Place("cpu"), lambda x: upfirdn2d(x, FIRS["one axis"], *SETTINGS[1]), [x[1:]])
    assert torch.equal(alone[0], results[0][0][1])


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 40), st.integers(1, 70)), pads,
    st.tuples(st.integers(1, 6), st.integers(1, 6)), st.sampled_from([1, 2]), st.sampled_from([1, 2]), st.booleans(),
    st.booleans(), st.booleans(),
)  # fmt: skip
def test_blocks_of_the_cuda_kernel(
    shape: tuple[int, int, int, int], pad: list[int], size: tuple[int, int], up: int, down: int, separable: bool,
    last: bool, epilogue: bool,
) -> None:  # fmt: skip
    """Its threads, run one after another on the host, write every output once and nothing else."""
    fir = draw(*size[: 2 - separable], seed=2)
    _, _, h, w = shape
    assume(h * up + pad[2] + pad[3] >= fir.shape[0] and w * up + pad[0] + pad[1] >= fir.shape[-1])
    check_blocks(draw(*shape, seed=1), fir, up, down, pad, last, epilogue)


@needs_cpp
@pytest.mark.parametrize("last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(32,), (32, 32)], ids=str)
@pytest.mark.parametrize(("up", "down"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_blocks_of_the_cuda_kernel_with_the_largest_filter(
    up: int, down: int, size: tuple[int, ...], last: bool
) -> None:
    check_blocks(draw(1, 20, 7, 5, seed=1), draw(*size, seed=2) / 32, up, down, [15, 16, 14, 13], last, False)


def check_blocks(x: Tensor, fir: Tensor, up: int, down: int, pad: list[int], last: bool, epilogue: bool) -> None:
    x = x.contiguous(memory_format=FORMATS[last])
    n, c = x.shape[:2]
    y = torch.full(output_shape(x, fir, up, down, pad), float("nan")).contiguous(memory_format=FORMATS[last])
    call = native_geometry(x, fir, up, down, pad, 1.5, True, y) | {"channels_last": last}
    expected = reference(x.double(), fir.double(), up, down, pad, 1.5, True)
    if epilogue:
        scale, noise, bias = draw(n, c, seed=3), draw(1, 1, *y.shape[2:], seed=4), draw(c, seed=5)
        strength, add = torch.tensor(0.3), draw(*y.shape, seed=6).contiguous(memory_format=FORMATS[last])
        operands = {"scale": scale, "noise": noise, "bias": bias, "strength": strength, "add": add}
        call |= {name: tensor.data_ptr() for name, tensor in operands.items()}
        call |= {"epilogue": True, "act": 2, "slope": 0.2, "gain": 1.4, "clamp": 3.0}
        expected = noise_bias_act(expected, scale, noise, strength, bias, gain=1.4, clamp=3.0) + add
    for packs in (False, True) if last and c % 4 == 0 else (False,):
        y.fill_(float("nan"))
        _, floats = native.module().upfirdn2d_blocks(packs, **call)
        assert floats <= 48 * 1024 // 4
        bound = 2e-6 * max(float(expected.abs().max()), float(fir.abs().sum()), 1e-3)
        assert bool(((y.double() - expected).abs() <= bound).all())


@needs_cpp
@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 12), st.integers(1, 75), st.integers(1, 40)), pads,
    st.sampled_from([(1, 1), (2, 1), (1, 2)]), st.sampled_from(DTYPES), st.booleans(), st.booleans(),
    st.sampled_from(["none", "lrelu", "linear"]), st.sampled_from([1, 4, 7, 32]),
)  # fmt: skip
def test_strips_of_the_cuda_kernel(
    shape: tuple[int, int, int, int], pad: list[int], rates: tuple[int, int], dtype: torch.dtype, last: bool,
    flip: bool, act: str, rows: int,
) -> None:  # fmt: skip
    """Its threads, run one after another on the host, write every output and nothing else, at any edge."""
    up, down = rates
    _, _, h, w = shape
    assume(h * up + pad[2] + pad[3] >= 4 and w * up + pad[0] + pad[1] >= 4)
    check_strips(draw(*shape, seed=1).to(dtype), (up, down, pad, 1.5, flip), last, act, rows)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rates", [(1, 1), (2, 1), (1, 2)], ids=str)
@pytest.mark.parametrize("act", ["none", "lrelu"])
def test_strips_of_the_cuda_kernel_read_packs(act: str, rates: tuple[int, int], dtype: torch.dtype) -> None:
    for channels in (4, 8, 20):
        check_strips(draw(2, channels, 37, 9, seed=1).to(dtype), (*rates, [2, 1, 1, 2], 4.0, False), True, act, 8)


def check_strips(x: Tensor, setting: tuple[Any, ...], last: bool, act: str, rows: int) -> None:
    fmt = FORMATS[last]
    x, fir = x.contiguous(memory_format=fmt), draw(4, seed=2)
    n, c = x.shape[:2]
    expected = reference(x.double(), fir.double(), *setting)
    size, margin = expected.numel(), 64
    buffer = x.new_empty(size + 2 * margin)
    y = buffer[margin:-margin].as_strided(
        expected.shape, torch.empty(expected.shape, device="meta").contiguous(memory_format=fmt).stride(), margin
    )
    fields = native_geometry(x, fir, *setting, y) | {"channels_last": last}
    scale, noise, bias = draw(n, c, seed=3), draw(n, 1, *y.shape[2:], seed=4), draw(c, seed=5)
    strength, add = torch.tensor(0.3), draw(*y.shape, seed=6).to(x.dtype).contiguous(memory_format=fmt)
    if act != "none":
        operands = {"scale": scale, "noise": noise, "bias": bias, "strength": strength, "add": add}
        fields |= {name: tensor.data_ptr() for name, tensor in operands.items()}
        fields |= {"epilogue": True, "act": ACTIVATIONS.index(act), "slope": 0.2, "gain": 1.4, "clamp": 3.0}
        fields["noise_stride"] = noise[0].numel()
        expected = noise_bias_act(expected, scale, noise, strength, bias, act=act, gain=1.4, clamp=3.0) + add
    bound = TOLERANCE[x.dtype][0] * max(float(expected.abs().max()), float(fir.abs().sum()), 1e-3) * 2
    for packs in (False, True) if last and c % 4 == 0 else (False,):
        buffer.fill_(float("nan"))
        assert native.module().upfirdn2d_strips(packs, rows, **fields)
        assert bool(((y.double() - expected).abs() <= bound).all())
        assert bool(buffer[:margin].isnan().all() and buffer[-margin:].isnan().all())


@needs_cpp
def test_strips_leave_other_filters_to_the_blocks() -> None:
    x = draw(1, 4, 8, 8, seed=1)
    others: list[tuple[Tensor, int, int, dict[str, Any]]] = [
        (draw(3, seed=2), 1, 1, {}),
        (draw(4, 4, seed=2), 1, 1, {}),
        (draw(4, seed=2), 2, 2, {}),
        (draw(4, seed=2), 1, 1, {"epilogue": True, "act": ACTIVATIONS.index("silu")}),
    ]
    for fir, up, down, fields in others:
        y = torch.full(output_shape(x, fir, up, down, [2] * 4), float("nan"))
        call = native_geometry(x, fir, up, down, [2] * 4, 1.0, False, y) | fields
        assert not native.module().upfirdn2d_strips(False, 4, **call)
        assert bool(y.isnan().all())


def test_filters_are_made_as_documented() -> None:
    fir = setup_filter([1, 3, 3, 1])
    assert torch.equal(fir, torch.tensor([0.125, 0.375, 0.375, 0.125]))
    assert torch.equal(setup_filter([1, 2], normalize=False, flip=True, gain=4.0), torch.tensor([4.0, 2.0]))
    assert torch.equal(setup_filter([[1, 2], [3, 4]], flip=True, gain=10.0), torch.tensor([[4.0, 3.0], [2.0, 1.0]]))


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5])
def test_sizes_and_brightness_of_the_three_resamplers(taps: int) -> None:
    fir = setup_filter([1.0] * taps)
    x = torch.ones(1, 2, 12, 10)
    assert filter2d(x, fir).shape == x.shape
    assert upsample2d(x, fir).shape == (1, 2, 24, 20)
    assert downsample2d(x, fir).shape == (1, 2, 6, 5)
    for y in (filter2d(x, fir), downsample2d(x, fir)):
        assert_close("interior", y[:, :, 2:-2, 2:-2], torch.ones_like(y[:, :, 2:-2, 2:-2]), relative_l2=1e-6)
    if taps % 2 == 0:  # then every output has equally many taps
        y = upsample2d(x, fir)[:, :, 4:-4, 4:-4]
        assert_close("interior", y, torch.ones_like(y), relative_l2=1e-6)


def test_resamplers_keep_an_image_where_it_is() -> None:
    """A symmetric filter moves nothing: the centre of mass of a blob stays, measured from the image's centre."""
    fir = setup_filter([1, 3, 3, 1])
    x = torch.zeros(1, 1, 16, 16)
    x[0, 0, 7:9, 5:7] = 1.0

    def offset(image: Tensor) -> float:
        columns = (torch.arange(image.shape[3]) + 0.5) / image.shape[3]
        return float((image.sum((0, 1, 2)) * columns).sum() / image.sum())

    assert offset(upsample2d(x, fir)) == pytest.approx(offset(x), abs=1e-6)
    assert offset(downsample2d(x, fir)) == pytest.approx(offset(x), abs=1e-6)
    assert offset(filter2d(x, setup_filter([1, 2, 1]))) == pytest.approx(offset(x), abs=1e-6)
    extra = upsample2d(x, fir, (1, 2, 3, 4))
    assert torch.equal(extra[:, :, 3:-4, 1:-2], upsample2d(x, fir))


def test_the_core_repeats_the_checks() -> None:
    if not native.build_report()["cpp"]:
        pytest.skip(f"native module is missing: {native.MISSING_REASON}")
    module, target = native.module(), (-1, 1, 0)
    good = dict.fromkeys(("x", "y", "fir"), 8) | dict.fromkeys(
        (
            "batch",
            "channels",
            "in_height",
            "in_width",
            "out_height",
            "out_width",
            "fir_height",
            "fir_width",
            "up",
            "down",
        ),
        1,
    )
    for change, message in (
        ({"x": 0}, "x, y and fir must not be null"),
        ({"dtype": 3}, "dtype is not supported"),
        ({"batch": 0}, "x must not be empty"),
        ({"out_width": 0}, "y must not be empty"),
        ({"up": 3}, "up and down must be 1 or 2"),
        ({"fir_width": 33}, "fir must have 1 to 32 taps"),
        ({"separable": True, "fir_width": 2}, "a separable fir is one row"),
        ({"epilogue": True, "act": 9}, "act is not a known activation"),
        ({"noise_stride": 4}, "noise must have the pixels of y"),
    ):
        with pytest.raises(RuntimeError, match=f"upfirdn2d_fwd: {message}"):
            module.upfirdn2d_fwd(target, **(good | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(3, 4, 5)}, ValueError, "x must be of shape"),
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, TypeError, "x must be floating point"),
        ({"x": torch.zeros(2, 0, 4, 5)}, ValueError, "x must be of at least one channel and one pixel"),
        ({"fir": torch.zeros(1, 2, 3)}, ValueError, r"fir must be of shape \(kh, kw\) or \(k,\)"),
        ({"fir": torch.zeros(3, dtype=torch.int64)}, TypeError, "fir must be floating point"),
        ({"fir": [1, 3, 3, 1]}, TypeError, r"fir must be a tensor, got \[1, 3, 3, 1\]; make it one with setup_filter"),
        ({"fir": None}, TypeError, "fir must be a tensor, got None"),
        ({"fir": torch.zeros(33, 1)}, ValueError, "fir must have 1 to 32 taps an axis"),
        ({"fir": torch.zeros(0)}, ValueError, "fir must have 1 to 32 taps an axis"),
        ({"fir": torch.zeros(3, device="meta")}, ValueError, "fir must be on cpu, got meta"),
        ({"fir": torch.zeros(3, requires_grad=True)}, ValueError, "fir must not require grad"),
        ({"fir": torch.zeros(5, 1)}, ValueError, r"fir must be no larger than the padded input of \(4, 5\)"),
        ({"pad": -2}, ValueError, r"fir must be no larger than the padded input of \(0, 1\)"),
        ({"pad": (1, 1)}, ValueError, r"pad must be one number or \(x0, x1, y0, y1\), got 2 numbers"),
        ({"up": 4}, ValueError, "up must be 1 or 2, got 4"),
        ({"down": 0}, ValueError, "down must be 1 or 2, got 0"),
        ({"up": 2.0}, TypeError, "up must be an integer, got 2.0"),
        ({"down": None}, TypeError, "down must be an integer, got None"),
        ({"pad": 1.0}, TypeError, r"pad must be one number or \(x0, x1, y0, y1\), got 1.0; give integers"),
        ({"pad": (1, 1, 1, 0.5)}, TypeError, r"pad must be .* got \(1, 1, 1, 0.5\)"),
        ({"gain": None}, TypeError, "gain must be a number, got None"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        upfirdn2d(**({"x": torch.zeros(2, 3, 4, 5), "fir": torch.zeros(3)} | change))


@pytest.mark.parametrize("function", [filter2d, upsample2d, downsample2d])
def test_resamplers_name_themselves(function: Any) -> None:
    with pytest.raises(ValueError, match=f"{function.__name__}: pad must be one number"):
        function(torch.zeros(1, 1, 8, 8), torch.zeros(4), (1, 1))
    with pytest.raises(TypeError, match=f"{function.__name__}: fir must be a tensor, got None"):
        function(torch.zeros(1, 1, 8, 8), None)


def test_takes_numbers_of_numpy() -> None:
    x, fir = draw(1, 2, 6, 6, seed=1), setup_filter([1, 3, 3, 1])
    expected = upfirdn2d(x, fir, 2, 1, 1, 1.5)
    for pad in (np.int64(1), np.ones(4, np.int32), (np.int64(1), 1, 1, 1)):
        assert torch.equal(upfirdn2d(x, fir, np.int64(2), np.int32(1), pad, np.float32(1.5)), expected)


def test_the_other_order_of_the_last_two_arguments_is_refused() -> None:
    """NVlabs' upfirdn2d ends with flip_filter, gain: by position, its False would be a gain of zero."""
    x, fir = torch.zeros(1, 1, 8, 8), torch.zeros(3)
    for last in ((False,), (True,), (1.0, 4.0), (False, 4.0)):
        with pytest.raises(TypeError, match=r"NVlabs' order is flip_filter, gain: name them"):
            upfirdn2d(x, fir, 1, 1, 1, *last)


def test_setup_filter_rejects_more_axes() -> None:
    with pytest.raises(ValueError, match="setup_filter: taps must be of shape"):
        setup_filter(torch.zeros(1, 2, 3))
    with pytest.raises(TypeError, match=r"setup_filter: taps must be numbers, got None; \[1\] changes nothing"):
        setup_filter(None)
