# SPDX-License-Identifier: Apache-2.0
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_close
from support.exporting import check_export
from support.kernel_cases import DTYPES, FORMATS, PLACES, Place, check_against_oracle, draw, run
from torch import Tensor
from torch.nn import functional as F

from faceedit import kernels
from faceedit.kernels import native
from faceedit.kernels.activations import ACTIVATIONS
from faceedit.kernels.norm_modulate import NORMS, norm_modulate, reference
from faceedit.kernels.normalization import adain, instance_norm_act, sft, spade
from faceedit.kernels.tensors import memory_format

NAMES = ("x", "gamma", "beta", "mean", "rstd")
KINDS = ("absent", "c", "nc", "pixel", "element")
OP = torch.ops.faceedit.norm_modulate.default
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


def operand(kind: str, x: Tensor, seed: int, low: float = 0.3) -> Tensor | None:
    n, c, h, w = x.shape
    if kind == "absent":
        return None
    shape = {"c": (c,), "nc": (n, c), "pixel": (n, 1, h, w), "element": (n, c, h, w)}[kind]
    values = draw(*shape, seed=seed, low=low)
    if len(shape) < 4:
        return values
    fmt = memory_format(x) if kind == "element" else torch.contiguous_format
    return values.to(x.dtype).contiguous(memory_format=fmt)


def inputs(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    fmt: torch.memory_format,
    gamma: str = "element",
    beta: str = "element",
    norm: str = "instance",
    act: str = "linear",
) -> list[Tensor | None]:
    x = (draw(*shape, seed=1) + 0.2).to(dtype).contiguous(memory_format=fmt)
    tensors = [x, operand(gamma, x, 2), operand(beta, x, 3)]
    if norm == "given":
        tensors += [draw(shape[1], seed=5), operand("nc", x, 6, 0.5)]
    else:
        tensors += [None, None]
    if act in ("relu", "lrelu") and tensors[2] is not None:
        tensors[2] = away_from_kink(tensors, norm)
    return tensors


def away_from_kink(tensors: list[Tensor | None], norm: str) -> Tensor:
    """Return a beta that keeps z off the kink at 0, where the gradient is a matter of rounding."""
    beta = tensors[2]
    assert beta is not None
    z, _ = oracle_z([None if t is None else t.double() for t in tensors], norm)
    if beta.dim() < 4 or beta.shape != z.shape:
        return beta
    return torch.where(z.abs() < 0.05, beta + 0.25, beta).contiguous(memory_format=memory_format(beta))


def oracle_z(tensors: list[Tensor | None], norm: str) -> tuple[Tensor, Tensor]:
    return reference(*tensors, norm, True, 1e-5, "linear", 0.2)


def ours(norm: str, **options: Any) -> Callable[..., Tensor]:
    return lambda x, g, b, m, r: norm_modulate(x, g, b, norm=norm, mean=m, rstd=r, **options)


def oracle(norm: str, *, one_plus: bool = True, act: str = "linear", slope: float = 0.2) -> Callable[..., Tensor]:
    return lambda *tensors: reference(*tensors, norm, one_plus, 1e-5, act, slope)[0]


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("place", PLACES)
def test_matches_reference(place: Place, act: str, dtype: torch.dtype, fmt: torch.memory_format) -> None:
    tensors = inputs((2, 19, 5, 7), dtype, fmt, act=act)
    check_against_oracle(place, ours("instance", act=act), oracle("instance", act=act), tensors, NAMES, dtype)


@pytest.mark.parametrize("beta", KINDS)
@pytest.mark.parametrize("gamma", KINDS)
@pytest.mark.parametrize("place", PLACES)
def test_every_kind_of_modulation(place: Place, gamma: str, beta: str) -> None:
    for norm in NORMS:
        for fmt in FORMATS:
            tensors = inputs((2, 17, 3, 5), torch.float32, fmt, gamma, beta, norm)
            options = {"one_plus": fmt is torch.channels_last, "act": "silu"}
            check_against_oracle(place, ours(norm, **options), oracle(norm, **options), tensors, NAMES, torch.float32)


# Many runs and blocks, a plane cut among threads, more channels than a run, fewer channels than a vector.
@pytest.mark.parametrize("shape", [(1, 2, 150, 131), (1, 37, 130, 131), (1, 1100, 3, 5), (2, 3, 61, 47)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("place", PLACES)
def test_blocks(place: Place, fmt: torch.memory_format, shape: tuple[int, int, int, int]) -> None:
    tensors = inputs(shape, torch.float32, fmt, "element", "nc")
    check_against_oracle(
        place, ours("instance", act="tanh"), oracle("instance", act="tanh"), tensors, NAMES, torch.float32
    )


# Pixels and channels that vector accesses divide: planes of one step and of several, a tile that ends inside its width.
@pytest.mark.parametrize("shape", [(1, 3, 72, 64), (2, 40, 12, 16), (2, 40, 4, 8)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_aligned_shapes(
    place: Place, dtype: torch.dtype, fmt: torch.memory_format, shape: tuple[int, int, int, int]
) -> None:
    for gamma, beta, norm in (("element", "pixel", "instance"), ("nc", "c", "given")):
        tensors = inputs(shape, dtype, fmt, gamma, beta, norm)
        check_against_oracle(place, ours(norm, act="silu"), oracle(norm, act="silu"), tensors, NAMES, dtype)


def test_oracle_agrees_with_other_formulas() -> None:
    x, gamma, beta = draw(2, 3, 5, 4, seed=1).double(), draw(2, 3, seed=2).double(), draw(2, 3, 5, 4, seed=3).double()
    values = x.numpy()
    normal = (values - values.mean((2, 3), keepdims=True)) / np.sqrt(values.var((2, 3), keepdims=True) + 1e-5)
    expected = torch.from_numpy(normal) * (1 + gamma[..., None, None]) + beta
    assert_close("AdaIN", norm_modulate(x, gamma, beta), expected, relative_l2=1e-12)
    weight, bias = draw(3, seed=4).double(), draw(3, seed=5).double()
    expected = F.leaky_relu(F.instance_norm(x, weight=weight, bias=bias), 0.2)
    assert_close("instance norm", instance_norm_act(x, weight, bias), expected, relative_l2=1e-12)
    expected = F.instance_norm(x) * gamma[..., None, None] + beta[:, :, :1, :1]
    assert_close("AdaIN", adain(x, gamma, beta[:, :, 0, 0]), expected, relative_l2=1e-12)
    assert_close("SFT", sft(x, beta, beta, act="relu"), F.relu(x * (1 + beta) + beta), relative_l2=1e-12)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    expected = F.batch_norm(x, mean, var) * (1 + beta) + beta
    assert_close("SPADE", spade(x, beta, beta, mean=mean, rstd=(var + 1e-5).rsqrt()), expected, relative_l2=1e-12)
    assert_close("SPADE", spade(x, beta, beta), norm_modulate(x, beta, beta), relative_l2=0)


def test_batch_norm_through_given_statistics_has_its_gradient() -> None:
    x, beta = draw(2, 3, 5, 4, seed=1).requires_grad_(), draw(2, 3, 5, 4, seed=3)
    wide = x.detach().double().requires_grad_()
    weights = draw(2, 3, 5, 4, seed=9)
    expected = F.batch_norm(wide, None, None, training=True) * (1 + beta.double()) + beta.double()
    (expected_gradient,) = torch.autograd.grad(expected, wide, weights.double())
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
    y = spade(x, beta, beta, mean=mean, rstd=(var + 1e-5).rsqrt())
    (gradient,) = torch.autograd.grad(y, x, weights)
    assert_close("output", y, expected, relative_l2=2e-6)
    assert_close("gradient", gradient, expected_gradient, relative_l2=5e-6)


shapes = st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 37), st.integers(1, 37))
layouts = st.sampled_from(["nchw", "nhwc", "sliced", "transposed", "offset", "expanded"])


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(DTYPES), layouts, st.sampled_from(KINDS), st.sampled_from(KINDS), st.sampled_from(NORMS))
def test_any_shape_and_stride(
    shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, gamma: str, beta: str, norm: str
) -> None:
    n, c, h, w = shape
    x, *operands = inputs(shape, dtype, torch.contiguous_format, gamma, beta, norm)
    assert x is not None
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
    tensors = [x, *operands]
    if n == 0:
        assert ours(norm)(*tensors).shape == x.shape
        return
    # Two or three pixels may lie close together: what rounds off x is then large against the deviations.
    loose = 10 if norm == "instance" and h * w < 4 else 1
    wide_tensors = [None if t is None else t.double() for t in tensors]
    with kernels.backend("cpu"):
        y = ours(norm, act="lrelu")(*tensors)
    bound = {torch.float32: 2e-6}.get(dtype, 4e-3)
    assert_close("output", y, oracle(norm, act="lrelu")(*wide_tensors), relative_l2=loose * bound)
    assert y.is_contiguous(memory_format=memory_format(x))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_keeps_memory_format(place: Place, fmt: torch.memory_format) -> None:
    tensors = inputs((2, 8, 4, 6), torch.float32, fmt)
    y, (gx, ggamma, gbeta, *_) = run(place, ours("instance"), tensors)
    for found in (y, gx, ggamma, gbeta):
        assert found is not None
        assert tensors[0] is not None
        assert found.stride() == tensors[0].stride()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_offsets_and_outliers_do_not_hurt_the_statistics(place: Place, fmt: torch.memory_format) -> None:
    x = draw(1, 5, 40, 41, seed=1)
    x[:, 0] += 3000.0
    x[:, 1] -= 1e6
    x[:, 2, 0, 0] = 5e4  # an outlier, where a shift by the first value would be the worst there is
    x[:, 3] *= 1e12
    x[:, 4] += torch.linspace(0.0, 1e4, 40 * 41).view(40, 41)  # the first values say little about the rest
    x = x.contiguous(memory_format=fmt)
    weights = draw(1, 5, 40, 41, seed=2, low=0.5)
    y, (gradient,) = run(place, instance_norm_act, [x], weights)
    wide = x.double().requires_grad_()
    expected = F.leaky_relu(F.instance_norm(wide), 0.2)
    (expected_gradient,) = torch.autograd.grad(expected, wide, weights.double())
    for c in range(5):
        # Eager computes with a mean rounded to fp32: the offset costs it that rounding against a deviation of 1.
        bound = 2e-2 if place.backend == "eager" else 3e-6
        assert_close(f"plane {c}", y[:, c], expected[:, c], relative_l2=bound)
        assert gradient is not None
        assert_close(f"gradient {c}", gradient[:, c], expected_gradient[:, c], relative_l2=max(bound, 1e-4))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", [(1, 1), (4, 5), (33, 40)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_constant_plane_is_its_shift_and_gets_no_gradient(
    place: Place, dtype: torch.dtype, size: tuple[int, int]
) -> None:
    for fmt in FORMATS:
        x = torch.full((2, 3, *size), 1.7, dtype=dtype).contiguous(memory_format=fmt)
        beta = draw(2, 3, seed=1)
        y, (gx, gbeta) = run(place, lambda x, b: norm_modulate(x, None, b, act="lrelu"), [x, beta])
        expected = F.leaky_relu(beta, 0.2)[..., None, None].expand_as(y)
        bound = max(1e-3 if place.backend == "eager" else 1e-6, torch.finfo(dtype).eps)
        assert_close("output", y, expected, relative_l2=bound)
        assert gx is not None
        assert gbeta is not None
        assert gx.abs().max() < 1e-2  # rstd is 316 here
        assert gbeta.isfinite().all()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_nan_and_infinity_spoil_their_own_plane_only(place: Place, fmt: torch.memory_format) -> None:
    x = draw(2, 4, 5, 6, seed=1)
    x[0, 1, 2, 3], x[1, 2, 0, 0], x[1, 3, 4, 5] = float("nan"), float("inf"), float("-inf")
    y, _ = run(place, instance_norm_act, [x.contiguous(memory_format=fmt)])
    spoilt = torch.zeros(2, 4, dtype=torch.bool)
    spoilt[0, 1] = spoilt[1, 2] = spoilt[1, 3] = True
    assert torch.equal(y.isnan().cpu(), spoilt[..., None, None].expand_as(y))
    y, _ = run(place, lambda x: norm_modulate(x, norm="none", act="lrelu"), [x.contiguous(memory_format=fmt)])
    assert_close("output", y, F.leaky_relu(x, 0.2), relative_l2=1e-6)


def gradcheck_inputs(gamma: str, beta: str, norm: str) -> tuple[Tensor | None, ...]:
    tensors = inputs((2, 3, 2, 3), torch.float64, torch.contiguous_format, gamma, beta, norm, "lrelu")
    return tuple(None if t is None else t.double().requires_grad_() for t in tensors)


@pytest.mark.parametrize(
    ("gamma", "beta", "norm", "act"),
    [
        ("nc", "c", "instance", "silu"),
        ("element", "element", "instance", "lrelu"),
        ("pixel", "nc", "instance", "tanh"),
        ("element", "pixel", "given", "sigmoid"),
        ("c", "element", "none", "linear"),
    ],
)
def test_gradcheck_and_gradgradcheck(gamma: str, beta: str, norm: str, act: str) -> None:
    tensors = gradcheck_inputs(gamma, beta, norm)
    assert torch.autograd.gradcheck(ours(norm, act=act), tensors)
    assert torch.autograd.gradgradcheck(ours(norm, act=act), tensors)


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("act", ["linear", "relu"])
@pytest.mark.parametrize("beta_shape", [(2, 3, 6, 5), (2, 1, 6, 5), (2, 3)], ids=["map", "pixel", "channel"])
@pytest.mark.parametrize("wanted", ["gamma", "beta", "both"])
def test_a_condition_is_trained_on_features_that_are_not(
    wanted: str, beta_shape: tuple[int, ...], act: str, fmt: torch.memory_format
) -> None:
    x = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=fmt)
    gamma, beta = x.flip(3) * 0.5, torch.randn(beta_shape, generator=torch.Generator().manual_seed(2))
    leaves = [t.requires_grad_() for t, name in ((gamma, "gamma"), (beta, "beta")) if wanted in (name, "both")]
    found = []
    for backend in ("auto", "eager"):
        with kernels.backend(backend):
            y = norm_modulate(x, gamma, beta, act=act)
            found.append(torch.autograd.grad((y * x.flip(2)).sum(), leaves))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_gradient_penalty_goes_through_the_statistics() -> None:
    """The double backward pass of native tensors, as a WGAN-GP critic asks for it."""

    def penalty(x: Tensor, weight: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad((instance_norm_act(x, weight).square()).sum(), x, create_graph=True)
        return (gradient.square().sum() - 1) ** 2

    x, weight = draw(2, 3, 4, 5, seed=1), draw(3, seed=2, low=0.5)
    wide = (x.double().requires_grad_(), weight.double().requires_grad_())
    narrow = (x.requires_grad_(), weight.requires_grad_())
    expected = torch.autograd.grad(penalty(*wide), wide)
    for actual, wanted in zip(torch.autograd.grad(penalty(*narrow), narrow), expected, strict=True):
        assert_close("second gradient", actual, wanted, relative_l2=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_opcheck(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    def arguments(gamma: str, beta: str, norm: str, act: str) -> tuple[Any, ...]:
        tensors = inputs((2, 3, 4, 5), dtype, fmt, gamma, beta, norm)
        return (*(None if t is None else t.requires_grad_() for t in tensors), norm, True, 1e-5, act, 0.2)

    checks = [
        arguments("element", "c", "instance", "silu"),
        arguments("nc", "pixel", "given", "lrelu"),
        arguments("absent", "absent", "none", "linear"),
    ]
    x, *rest = arguments("c", "c", "instance", "relu")
    checks += [(x[:0], *rest), (x[:, :, ::2], *rest)]
    for arguments_ in checks:
        torch.library.opcheck(OP, arguments_)


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    def step(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return norm_modulate(x * 2, gamma, beta, act="silu").square().sum()

    leaves = tuple(
        t.requires_grad_() for t in inputs((2, 3, 4, 5), torch.float32, torch.channels_last)[:3] if t is not None
    )
    expected = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert_close("gradient", actual, wanted, relative_l2=1e-6)
    with kernels.backend("eager"):
        compiled(*leaves)
        assert kernels.last_backend("norm_modulate") == "eager"  # the graph follows the scope it is called in


def test_exports_to_standard_operators() -> None:
    def sample(n: int) -> list[Tensor]:
        return [draw(n, 3, 4, 5, seed=n), draw(n, 3, seed=2), draw(n, 1, 4, 5, seed=3)]

    check_export(lambda *t: norm_modulate(*t, act="lrelu"), OP, sample(2), sample(5), per_sample={0, 1, 2})


def test_vmap_equals_a_loop() -> None:
    x, gamma, beta = draw(4, 2, 3, 5, 5, seed=1), draw(4, 2, 3, 5, 5, seed=2), draw(2, 3, seed=3)
    folded = torch.vmap(lambda x, g: norm_modulate(x, g, beta))(x, gamma)
    looped = torch.stack([norm_modulate(a, g, beta) for a, g in zip(x, gamma, strict=True)])
    assert torch.equal(folded, looped)
    weights = draw(4, 3, seed=4)
    folded = torch.vmap(lambda x, w: instance_norm_act(x, w))(x, weights)
    assert torch.equal(folded, torch.stack([instance_norm_act(a, w) for a, w in zip(x, weights, strict=True)]))
    pixel = gamma[:, :, :1]
    folded = torch.vmap(lambda x, b: norm_modulate(x, None, b, norm="none"))(x, pixel)
    assert torch.equal(folded, x + pixel)


@needs_cpp
@pytest.mark.parametrize("shape", [(3, 5, 181, 183), (2, 40, 41, 43)], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_same_bits_at_any_thread_count_and_batch_size(
    fmt: torch.memory_format, shape: tuple[int, int, int, int]
) -> None:
    tensors = inputs(shape, torch.float32, fmt, "element", "nc")
    weights = draw(*shape, seed=8)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(Place("cpu"), ours("instance", act="lrelu"), tensors, weights))
    finally:
        torch.set_num_threads(before)
    first, *others = results
    for other in others:
        assert torch.equal(first[0], other[0])
        assert all(
            torch.equal(a, b) for a, b in zip(first[1], other[1], strict=True) if a is not None and b is not None
        )
    last = [None if t is None else t[-1:] for t in tensors]
    alone, gradients = run(Place("cpu"), ours("instance", act="lrelu"), last, weights[-1:])
    assert torch.equal(alone[0], first[0][-1])
    for a, b in zip(gradients, first[1], strict=True):
        assert a is None or (b is not None and torch.equal(a[0], b[-1]))


@needs_cpp
def test_core_repeats_the_checks() -> None:
    module, target = native.module(), (-1, 1, 0)
    good = {"batch": 1, "channels": 1, "pixels": 1, "norm": 1}
    for change, message in (
        ({}, "x and y must not be null"),
        ({"pixels": 0}, "x must not be empty"),
        ({"dtype": 9}, "dtype is not supported"),
        ({"act": 7}, "act is not a known activation"),
        ({"norm": 3}, "norm is not a known normalisation"),
        ({"norm": 0}, "statistics must not be null"),
        ({"norm": 2}, "mean and rstd must be given"),
        ({"gamma_kind": 4}, "gamma_kind and beta_kind must be known"),
        ({"beta_kind": 3}, "gamma and beta must not be null"),
    ):
        with pytest.raises(RuntimeError, match=f"norm_modulate_fwd: {message}"):
            module.norm_modulate_fwd(target, **(good | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "x must be of shape"),
        ({"x": torch.zeros(2, 3, 4, 5, dtype=torch.int32)}, TypeError, "x must be floating point"),
        ({"gamma": torch.zeros(4)}, ValueError, r"gamma must be of shape \(3,\) or \(2, 3\) or"),
        ({"beta": torch.zeros(1, 3, 4, 5)}, ValueError, "beta must be of shape"),
        ({"norm": "batch"}, ValueError, "norm must be one of"),
        ({"norm": "given"}, ValueError, "mean must come with norm='given'"),
        ({"norm": "given", "mean": torch.zeros(3)}, ValueError, "rstd must come with norm='given'"),
        ({"mean": torch.zeros(3)}, ValueError, "mean must come with norm='given' and only with it"),
        ({"norm": "given", "mean": torch.zeros(2), "rstd": torch.ones(3)}, ValueError, "mean must be of shape"),
        ({"eps": 0.0}, ValueError, "eps must be positive"),
        ({"act": "gelu"}, ValueError, "act must be one of"),
        ({"beta": torch.zeros(3, dtype=torch.int64)}, TypeError, "beta must be floating point, got int64"),
        ({"norm": "given", "mean": torch.zeros(3).int(), "rstd": torch.ones(3)}, TypeError, "mean must be floating"),
        ({"gamma": 1.0}, TypeError, "gamma must be a tensor, got 1.0"),
        ({"eps": None}, TypeError, "eps must be a number, got None"),
        ({"slope": None}, TypeError, "slope must be a number, got None"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        norm_modulate(**({"x": torch.zeros(2, 3, 4, 5)} | change))
