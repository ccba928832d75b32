# SPDX-License-Identifier: Apache-2.0
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_close
from support.exporting import check_export
from support.kernel_cases import DTYPES, PLACES, Place, check_against_oracle, draw, run
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import native
from faceedit.kernels.kl import bernoulli_kl, bernoulli_reference, gaussian_kl, gaussian_reference

BERNOULLI = torch.ops.faceedit.bernoulli_kl.default
GAUSSIAN = torch.ops.faceedit.gaussian_kl.default
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


def bernoulli_inputs(n: int, a: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return (3 * draw(n, a, seed=1)).to(dtype), draw(n, a, seed=2, low=0.0), draw(a, seed=3, low=0.5)


def gaussian_inputs(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [draw(*shape, seed=1).to(dtype), (2 * draw(*shape, seed=2)).to(dtype)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", [0.0, 0.05])
@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("place", PLACES)
def test_bernoulli_matches_reference(place: Place, weighted: bool, smoothing: float, dtype: torch.dtype) -> None:
    logits, target, weight = bernoulli_inputs(3, 41, dtype)
    used = weight if weighted else None
    check_against_oracle(
        place,
        lambda x: bernoulli_kl(x, target.to(x.device), None if used is None else used.to(x.device), smoothing),
        lambda x: bernoulli_reference(x, target.double(), None if used is None else used.double(), smoothing),
        [logits],
        ("logits",),
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 37), (2, 5, 6, 11), (1, 700)], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_gaussian_matches_reference(place: Place, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    check_against_oracle(
        place, gaussian_kl, gaussian_reference, gaussian_inputs(*shape, dtype=dtype), ("mu", "logvar"), dtype
    )


def test_references_are_the_textbook_formulas() -> None:
    """The oracles against plain arithmetic, and the gaussian one against an integral."""
    logits, target, weight = (t.double() for t in bernoulli_inputs(2, 5))
    for n in range(2):
        total = 0.0
        for a in range(5):
            s, t = 1 / (1 + math.exp(-logits[n, a])), abs(float(target[n, a]) - 0.05)
            total += float(weight[a]) * (t * math.log(t / s) + (1 - t) * math.log((1 - t) / (1 - s)))
        found = bernoulli_reference(logits, target, weight, 0.05)[n]
        assert float(found) == pytest.approx(total / 5, rel=1e-12)
    z = torch.linspace(-12, 12, 200001, dtype=torch.float64)
    mu, logvar = 0.7, -0.4
    log_p = -0.5 * (z - mu) ** 2 / math.exp(logvar) - 0.5 * logvar
    integrand = torch.exp(log_p) / math.sqrt(2 * math.pi) * (log_p + 0.5 * z**2)
    found = gaussian_reference(torch.tensor([[mu]], dtype=torch.float64), torch.tensor([[logvar]], dtype=torch.float64))
    assert float(found) == pytest.approx(float(torch.trapezoid(integrand, z)), rel=1e-8)


@pytest.mark.parametrize("place", PLACES)
def test_saturated_logits_and_certain_targets_are_finite(place: Place) -> None:
    logits = torch.tensor([[1e4], [-1e4], [1e4], [-1e4], [3e38], [0.0], [0.0]])
    target = torch.tensor([[1.0], [0.0], [0.0], [1.0], [0.0], [0.0], [0.5]])
    y, (gradient,) = run(place, lambda x: bernoulli_kl(x, target.to(x.device)), [logits])
    assert gradient is not None
    assert y.tolist() == pytest.approx([0.0, 0.0, 1e4, 1e4, 3e38, math.log(2), 0.0], rel=1e-6, abs=1e-7)
    assert gradient.flatten().tolist() == pytest.approx([0, 0, 1, -1, 1, 0.5, 0])


@pytest.mark.parametrize("place", PLACES)
def test_nan_stays_in_its_sample(place: Place) -> None:
    logits, target, _ = bernoulli_inputs(4, 6)
    logits[0, 1] = target[2, 3] = float("nan")
    y, _ = run(place, lambda x: bernoulli_kl(x, target.to(x.device)), [logits])
    assert y.isnan().tolist() == [True, False, True, False]
    mu, logvar = gaussian_inputs(3, 6)
    mu[0, 1] = logvar[2, 3] = float("nan")
    y, _ = run(place, gaussian_kl, [mu, logvar])
    assert y.isnan().tolist() == [True, False, True]


@needs_cpp
@pytest.mark.parametrize("isa", native.build_report()["isas"])
def test_nearly_equal_distributions_keep_their_digits(isa: str) -> None:
    logits = torch.linspace(-3, 3, 60).view(-1, 1)
    target = (logits.double().sigmoid() + 1e-3).float()
    v = torch.cat([torch.logspace(-12, 0.3, 300), -torch.logspace(-12, 2, 300), torch.tensor([0.0, 80.0])]).view(-1, 1)
    leaf = v.clone().requires_grad_()
    with native.isa(isa), kernels.backend("cpu"):
        found, variance = bernoulli_kl(logits, target), gaussian_kl(torch.zeros_like(v), leaf)
        (slope,) = torch.autograd.grad(variance.sum(), leaf)
    expected = bernoulli_reference(logits.double(), target.double(), None, 0.0)
    assert ((found - expected).abs() <= 1e-6 * expected).all()
    exact = 0.5 * (torch.expm1(v.double()) - v)
    series = v.double() ** 2 * (0.25 + v.double() / 12 + v.double() ** 2 / 48)  # where fp64 expm1(v) - v cancels
    exact = torch.where(v.abs() < 1e-4, series, exact).flatten()
    assert ((variance - exact).abs() <= 1e-6 * exact).all()
    exact = 0.5 * torch.expm1(v.double())
    assert ((slope - exact).abs() <= 1e-6 * exact.abs()).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.uint8, torch.bool], ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_target_dtypes(place: Place, dtype: torch.dtype) -> None:
    logits = bernoulli_inputs(3, 40)[0]
    target = (draw(3, 40, seed=5) > 0).to(dtype)
    y, _ = run(place, lambda x: bernoulli_kl(x, target.to(x.device), smoothing=0.1), [logits])
    expected = bernoulli_reference(logits.double(), target.double(), None, 0.1)
    assert_close("loss", y, expected, relative_l2=1e-6)


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(0, 3), st.integers(1, 1100), st.sampled_from(DTYPES), st.booleans())
def test_any_shape_and_stride(n: int, width: int, dtype: torch.dtype, strided: bool) -> None:
    logits, target, weight = bernoulli_inputs(n, width, dtype)
    mu, logvar = gaussian_inputs(n, width, dtype=dtype)
    if strided:
        logits, target, mu = (torch.stack([t, t], 2)[..., 0] for t in (logits, target, mu))
        logvar = torch.cat([logvar.new_zeros(1), logvar.flatten()])[1:].view(n, width)
    with kernels.backend("cpu"):
        found = bernoulli_kl(logits, target, weight, 0.02), gaussian_kl(mu, logvar)
    expected = bernoulli_reference(logits.double(), target.double(), weight.double(), 0.02)
    assert_close("bernoulli", found[0], expected, relative_l2=1e-6)
    assert_close("gaussian", found[1], gaussian_reference(mu.double(), logvar.double()), relative_l2=1e-6)


def test_no_attributes_is_no_loss() -> None:
    assert bernoulli_kl(torch.zeros(2, 0), torch.zeros(2, 0)).tolist() == [0.0, 0.0]
    assert gaussian_kl(torch.zeros(2, 0), torch.zeros(2, 0)).tolist() == [0.0, 0.0]


def test_gradcheck_and_gradgradcheck() -> None:
    logits, target, weight = (t.double() for t in bernoulli_inputs(2, 3))
    bernoulli = lambda x: bernoulli_kl(x, target, weight, 0.05)  # noqa: E731
    leaves = tuple(t.double().requires_grad_() for t in gaussian_inputs(2, 3, 2))
    for function, inputs in ((bernoulli, (logits.requires_grad_(),)), (gaussian_kl, leaves)):
        assert torch.autograd.gradcheck(function, inputs)
        assert torch.autograd.gradgradcheck(function, inputs)


def test_gradient_to_target_and_weight_goes_through_the_composition() -> None:
    inputs = tuple(t.double().requires_grad_() for t in bernoulli_inputs(2, 3))
    assert torch.autograd.gradcheck(lambda x, t, w: bernoulli_kl(x, t, w), inputs)
    loss = BERNOULLI(*bernoulli_inputs(2, 3)[:2], torch.ones(3, requires_grad=True), 0.0)
    with pytest.raises(RuntimeError, match="must go through faceedit"):
        loss.sum().backward()


def test_mixed_dtypes_use_the_wider() -> None:
    mu, logvar = gaussian_inputs(2, 9)
    found = gaussian_kl(mu.bfloat16().requires_grad_(), logvar)
    assert_close("loss", found, gaussian_kl(mu.bfloat16().float(), logvar), relative_l2=0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    logits, target, weight = bernoulli_inputs(2, 5, dtype)
    logits.requires_grad_()
    for arguments in (
        (logits, target, weight, 0.05),
        (logits, target > 0.5, None, 0.0),
        (logits[:0], target[:0], None, 0.0),
        (logits[:, ::2], target[:, ::2], None, 0.0),
    ):
        torch.library.opcheck(BERNOULLI, arguments)
    mu, logvar = (t.requires_grad_() for t in gaussian_inputs(2, 3, 4, 5, dtype=dtype))
    last = mu.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    for pair in ((mu, logvar), (mu, logvar.detach()), (mu[:0], logvar[:0]), (last, logvar)):
        torch.library.opcheck(GAUSSIAN, pair)


@pytest.mark.slow
@pytest.mark.parametrize("which", ["bernoulli", "gaussian"])
def test_compiles_without_a_graph_break(which: str) -> None:
    if which == "bernoulli":
        x, other, weight = bernoulli_inputs(2, 5)
        step: Callable[[Tensor], Tensor] = lambda x: bernoulli_kl(x * 2, other, weight, 0.05).sum()  # noqa: E731
    else:
        x, other = gaussian_inputs(2, 5)
        step = lambda x: gaussian_kl(x * 2, other).sum()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    expected = torch.autograd.grad(step(x.requires_grad_()), x)[0]
    assert_close("gradient", torch.autograd.grad(compiled(x), x)[0], expected, relative_l2=1e-6)


def test_exports_to_standard_operators() -> None:
    weight = bernoulli_inputs(1, 5)[2]
    check_export(
        lambda x, t: bernoulli_kl(x, t, weight, 0.05),
        BERNOULLI,
        bernoulli_inputs(2, 5)[:2],
        bernoulli_inputs(4, 5)[:2],
        per_sample={0, 1},
    )
    check_export(gaussian_kl, GAUSSIAN, gaussian_inputs(2, 3, 4), gaussian_inputs(5, 3, 4), per_sample={0, 1})


def test_vmap_equals_a_loop() -> None:
    logits, target = draw(4, 2, 5, seed=1), draw(2, 5, seed=2, low=0.0)
    weights = draw(4, 5, seed=3, low=0.5)
    shared = torch.vmap(lambda x: bernoulli_kl(x, target, weights[0]))(logits)
    assert torch.equal(shared, torch.stack([bernoulli_kl(x, target, weights[0]) for x in logits]))
    own = torch.vmap(lambda x, w: bernoulli_kl(x, target, w))(logits, weights)
    assert torch.equal(own, torch.stack([bernoulli_kl(x, target, w) for x, w in zip(logits, weights, strict=True)]))
    normal = torch.vmap(gaussian_kl, in_dims=(0, None))(logits, target)
    assert torch.equal(normal, torch.stack([gaussian_kl(x, target) for x in logits]))


@needs_cpp
def test_same_bits_at_any_thread_count_and_batch_size() -> None:
    logits, target, weight = bernoulli_inputs(40, 700)
    mu, logvar = gaussian_inputs(3, 9000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            with kernels.backend("cpu"):
                results.append((bernoulli_kl(logits, target, weight), gaussian_kl(mu, logvar)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    with kernels.backend("cpu"):
        assert torch.equal(bernoulli_kl(logits[1:2], target[1:2], weight), results[0][0][1:2])
        assert torch.equal(gaussian_kl(mu[1:2], logvar[1:2]), results[0][1][1:2])


GOOD = {"logits": torch.zeros(2, 3), "target": torch.zeros(2, 3)}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"logits": torch.zeros(3)}, ValueError, r"bernoulli_kl: logits must be of shape \(N, A\)"),
        ({"logits": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "logits must be floating point"),
        ({"target": torch.zeros(2, 4)}, ValueError, r"target must be of shape \(2, 3\)"),
        ({"target": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "target must be floating point, uint8 or bool"),
        ({"weight": torch.zeros(2)}, ValueError, r"weight must be of shape \(3,\)"),
        ({"smoothing": 1.5}, ValueError, r"smoothing must be in \[0, 1\], got 1.5"),
        ({"smoothing": None}, TypeError, "smoothing must be a number, got None"),
        ({"weight": torch.zeros(3, dtype=torch.int64)}, TypeError, "weight must be floating point, got int64"),
        ({"target": 0.5}, TypeError, "target must be a tensor, got 0.5"),
    ],
)
def test_bernoulli_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        bernoulli_kl(**(GOOD | change))


def test_gaussian_rejects() -> None:
    x = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"gaussian_kl: mu must be of shape \(N, ...\)"):
        gaussian_kl(x[0], x[0])
    with pytest.raises(TypeError, match="logvar must be floating point"):
        gaussian_kl(x, x.int())
    with pytest.raises(TypeError, match=r"gaussian_kl: mu must be a tensor, got 0\.5"):
        gaussian_kl(0.5, x)
    with pytest.raises(ValueError, match=r"logvar must be of shape \(2, 3\)"):
        gaussian_kl(x, x[:, :2])
