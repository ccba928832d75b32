# SPDX-License-Identifier: Apache-2.0
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
from faceedit.kernels.noise_regularizer import (
    backward_reference,
    noise_regularizer,
    normalize_noise_,
    normalized,
    pyramid_levels,
    reference,
)
from faceedit.kernels.tensors import poison

OP = torch.ops.faceedit.noise_regularizer.default
NORMALIZE = torch.ops.faceedit.normalize_noise_.default
SIDES = (4, 8, 16, 20, 64, 96, 256)  # one level to six; bands of one and of several rows of blocks
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


def maps(n: int, sides: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Positive values: no mean product is the rounding error of a cancelled sum."""
    return [draw(n, 1, side, side, seed=i, low=0.3).to(dtype) for i, side in enumerate(sides)]


def regularize(*noises: Tensor, stop: int = 8) -> Tensor:
    return noise_regularizer(noises, stop)


def by_hand(noise: Tensor, stop: int) -> float:
    """The loss of one map by explicit sums, with neither roll nor pooling."""
    x, loss = noise[0, 0].double().tolist(), 0.0
    while True:
        side = len(x)
        across = sum(x[i][j] * x[i][j - 1] for i in range(side) for j in range(side)) / side**2
        down = sum(x[i][j] * x[i - 1][j] for i in range(side) for j in range(side)) / side**2
        loss += across**2 + down**2
        if side <= stop:
            return loss
        half = range(side // 2)
        x = [
            [(sum(x[2 * i][2 * j : 2 * j + 2]) + sum(x[2 * i + 1][2 * j : 2 * j + 2])) / 4 for j in half] for i in half
        ]


@pytest.mark.parametrize(("side", "stop"), [(1, 8), (5, 8), (8, 8), (12, 8), (16, 2), (24, 3)])
def test_reference_agrees_with_explicit_sums(side: int, stop: int) -> None:
    noise = draw(1, 1, side, side, seed=side).double()
    assert float(reference([noise], stop)[0]) == pytest.approx(by_hand(noise, stop), rel=1e-12)


def test_known_values() -> None:
    """2 a level for ones; the levels of a 1024 px generator's 17 maps."""
    sides = [4, *(2**k for k in range(3, 11) for _ in range(2))]
    assert sum(pyramid_levels(side, 8) for side in sides) == 73
    loss = noise_regularizer([torch.ones(2, 1, 4, 4), torch.ones(2, 1, 32, 32)])
    assert loss.tolist() == [2.0 + 6.0] * 2
    white = [torch.randn(1, 1, side, side, generator=torch.Generator().manual_seed(side)) for side in (64, 256)]
    assert float(noise_regularizer(white)) < 0.1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_matches_reference(place: Place, dtype: torch.dtype) -> None:
    names = [f"noises[{i}]" for i in range(len(SIDES))]
    check_against_oracle(place, regularize, lambda *t: reference(list(t), 8)[0], maps(2, SIDES, dtype), names, dtype)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("sides", "stop"), [((128,), 128), ((7, 1, 3), 8), ((48, 6), 3), ((512,), 1)])
def test_other_depths(place: Place, sides: tuple[int, ...], stop: int) -> None:
    names = [f"noises[{i}]" for i in range(len(sides))]
    oracle = lambda *t: reference(list(t), stop)[0]  # noqa: E731
    check_against_oracle(place, lambda *t: regularize(*t, stop=stop), oracle, maps(1, sides), names, torch.float32)


@pytest.mark.parametrize("place", PLACES)
def test_white_noise_whose_products_cancel(place: Place) -> None:
    """The gradient is a sum over levels of small multiples of the map: held to an absolute error."""
    noises = [draw(1, 1, side, side, seed=side) for side in (64, 128)]
    wide = [noise.double().requires_grad_() for noise in noises]
    loss, moments = reference(wide, 8)
    y, gradients = run(place, regularize, noises)
    assert_close("loss", y, loss, relative_l2=1e-5)
    for actual, expected in zip(gradients, torch.autograd.grad(loss.sum(), wide), strict=True):
        assert actual is not None
        assert_close("gradient", actual, expected, relative_l2=1e-4)
    assert moments.abs().max() < 0.5


LAYOUTS = ["plain", "transposed", "offset", "strided"]
shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 4)).map(lambda t: t[0] << t[1]), min_size=1, max_size=5)


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.integers(0, 3), shapes, st.sampled_from(DTYPES), st.sampled_from(["plain", "transposed", "offset", "strided"])
)
def test_any_shape_and_stride(n: int, sides: list[int], dtype: torch.dtype, layout: str) -> None:
    noises = maps(n, tuple(sides), dtype)
    if layout == "transposed":
        noises = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in noises]
    elif layout == "offset":
        noises = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in noises]
    elif layout == "strided":
        noises = [torch.stack([x, x + 1], -1)[..., 0] for x in noises]
    with kernels.backend("cpu"), poison() as guards:
        y = noise_regularizer(noises, 9)
        assert guards.untouched()
    assert_close("loss", y, reference([x.double() for x in noises], 9)[0], relative_l2=2e-6)
    expected = [normalized(x.double()) for x in noises]
    with kernels.backend("cpu"), poison() as guards:
        normalize_noise_(noises)
        assert guards.untouched()
    for actual, wanted in zip(noises, expected, strict=True):
        assert_close("map", actual, wanted, relative_l2={torch.float32: 2e-6}.get(dtype, 4e-3))


@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_stay_in_their_sample(place: Place) -> None:
    noises = maps(3, (8, 32))
    noises[1][0, 0, 5, 6], noises[0][2, 0, 0, 0] = float("nan"), float("inf")
    y, gradients = run(place, regularize, noises)
    assert y.isfinite().tolist() == [False, True, False]
    assert y[0].isnan()
    gradient = gradients[1]
    assert gradient is not None
    assert gradient[0].isnan().all()  # its mean products are NaN
    assert gradient[1].isfinite().all()


def test_gradcheck() -> None:
    noises = [t.double().requires_grad_() for t in maps(2, (3, 8))]
    assert torch.autograd.gradcheck(lambda *t: regularize(*t, stop=2), noises[1:])
    assert torch.autograd.gradcheck(regularize, noises)


def test_eager_gradient_is_that_of_the_reference() -> None:
    noises = [t.double().requires_grad_() for t in maps(2, (8, 32))]
    loss, moments = reference(noises, 8)
    weights = torch.tensor([0.3, 2.0], dtype=torch.float64)
    expected = torch.autograd.grad(loss, noises, weights)
    for actual, wanted in zip(backward_reference(noises, weights, moments, 8), expected, strict=True):
        assert_close("gradient", actual, wanted, relative_l2=1e-12)


def test_second_differentiation_is_refused() -> None:
    noises = [t.requires_grad_() for t in maps(1, (8, 16))]
    gradients = torch.autograd.grad(noise_regularizer(noises).sum(), noises, create_graph=True)
    with pytest.raises(RuntimeError, match="noise_regularizer: the gradient must be used to first order"):
        gradients[1].square().sum().backward()


def test_many_gradients_at_a_time() -> None:
    """They are PyTorch's own operators, so that these have a second derivative too."""
    noises = [t.requires_grad_() for t in maps(2, (8, 32))]
    loss = noise_regularizer(noises)
    rows = torch.autograd.grad(loss, noises, torch.eye(2), is_grads_batched=True, retain_graph=True)
    for index, chosen in enumerate(torch.eye(2)):
        alone = torch.autograd.grad(loss, noises, chosen, retain_graph=True)
        for row, one in zip(rows, alone, strict=True):
            assert_close("gradient", row[index], one, relative_l2=1e-6)

    x = draw(1, 1, 4, 4, seed=3).double().requires_grad_()
    twice: list[Tensor] = []
    for function in (noise_regularizer, lambda noises: reference(noises, 8)[0]):
        (once,) = torch.autograd.grad(function([x]), x, x.new_ones(1, 1), is_grads_batched=True, create_graph=True)
        twice.append(torch.autograd.grad(once.square().sum(), x)[0])
    assert_close("second gradient", *twice, relative_l2=1e-9)


def test_gradient_of_some_maps_only() -> None:
    noises = maps(1, (8, 16))
    noises[1].requires_grad_()
    noise_regularizer(noises).sum().backward()
    assert noises[0].grad is None
    expected = torch.autograd.grad(reference(noises, 8)[0].sum(), noises[1])[0]
    assert noises[1].grad is not None
    assert_close("gradient", noises[1].grad, expected, relative_l2=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    noises = maps(2, (4, 16), dtype)
    torch.library.opcheck(OP, ([x.requires_grad_() for x in noises], 8))
    torch.library.opcheck(OP, ([x[:0] for x in noises], 8))
    torch.library.opcheck(OP, ([noises[0][:, :, ::2, ::2], noises[1].detach()], 8))
    torch.library.opcheck(NORMALIZE, ([x.detach().clone() for x in noises],))
    torch.library.opcheck(NORMALIZE, ([noises[0].detach()[:, :, ::2]],))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    def step(a: Tensor, b: Tensor) -> Tensor:
        return noise_regularizer([a * 2, b]).sum()

    noises = [x.requires_grad_() for x in maps(2, (4, 16))]
    expected = torch.autograd.grad(step(*noises), noises)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*noises), noises), expected, strict=True):
        assert_close("gradient", actual, wanted, relative_l2=1e-6)

    def normalize(a: Tensor, b: Tensor) -> Tensor:
        normalize_noise_([a, b])
        return a.sum() + b.square().sum()

    plain, traced = ([x.detach().clone() for x in noises] for _ in range(2))
    compiled = torch.compile(normalize, fullgraph=True, backend="aot_eager")
    assert_close("sum", compiled(*traced), normalize(*plain), relative_l2=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(plain, traced, strict=True))


def test_exports_to_standard_operators() -> None:
    check_export(lambda *t: regularize(*t), OP, maps(2, (4, 16)), maps(3, (4, 16)), per_sample={0, 1})


def test_vmap_equals_a_loop() -> None:
    a, b = draw(3, 2, 1, 4, 4, seed=1), draw(2, 1, 16, 16, seed=2)
    folded = torch.vmap(lambda a: noise_regularizer([a, b]))(a)
    assert_close("vmap", folded, torch.stack([noise_regularizer([x, b]) for x in a]), relative_l2=1e-6)


@needs_cpp
def test_same_bits_at_any_thread_count_and_batch_size() -> None:
    noises = [draw(2, 1, side, side, seed=side) for side in (512, 96, 8)]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            own = [x.clone() for x in noises]
            with kernels.backend("cpu"):
                normalize_noise_(own)
            y, gradients = run(Place("cpu"), regularize, own)
            results.append([y, *own, *(g for g in gradients if g is not None)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone, _ = run(Place("cpu"), regularize, [x[1:] for x in results[0][1:4]])
    assert torch.equal(alone[0], results[0][0][1])


def normalize_at(place: Place, noises: list[Tensor]) -> list[Tensor]:
    own = [noise.clone().to(place.device) for noise in noises]
    scope = native.isa(place.isa) if place.isa else kernels.backend("auto")
    with scope, kernels.backend(place.backend), poison() as guards:
        normalize_noise_(own)
        assert guards.untouched()
        assert kernels.last_backend("normalize_noise_") == place.backend
    return own


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_normalizes(place: Place, dtype: torch.dtype) -> None:
    noises = [(draw(2, 1, *shape, seed=i) * 3 + 40).to(dtype) for i, shape in enumerate([(4, 4), (64, 65), (130, 70)])]
    for actual, noise in zip(normalize_at(place, noises), noises, strict=True):
        assert_close("map", actual, normalized(noise.double()), relative_l2={torch.float32: 3e-6}.get(dtype, 4e-3))
        if dtype is torch.float32:
            wide = actual.double()
            assert wide.mean((1, 2, 3)).abs().max() < 1e-6
            assert (wide.std((1, 2, 3)) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("place", PLACES)
def test_maps_without_spread_become_zeros(place: Place) -> None:
    noises = [
        torch.zeros(1, 1, 8, 8),
        torch.full((1, 1, 70, 70), 0.1),
        torch.ones(1, 1, 1, 1),
        draw(1, 1, 4, 4, seed=1),
    ]
    zero, constant, single, drawn = normalize_at(place, noises)
    assert not any(t.any() for t in (zero, constant, single))
    assert float(drawn.std()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_an_outlier_costs_the_deviation_no_precision(place: Place) -> None:
    noise = draw(1, 1, 128, 128, seed=3)
    noise[0, 0, 70, 3] = 1e5
    (actual,) = normalize_at(place, [noise])
    assert_close("map", actual, normalized(noise.double()), relative_l2=2e-6)


@pytest.mark.parametrize("place", PLACES)
def test_normalizing_keeps_nan_in_its_map_and_sample(place: Place) -> None:
    noises = [draw(2, 1, 8, 8, seed=1), draw(2, 1, 80, 80, seed=2)]
    noises[1][1, 0, 70, 3] = float("nan")
    first, second = normalize_at(place, noises)
    assert first.isfinite().all()
    assert second[0].isfinite().all()
    assert second[1].isnan().all()


def test_normalizing_parameters_is_seen_by_a_backward_pass_that_needs_the_old_values() -> None:
    noises = [t.requires_grad_() for t in maps(1, (8, 16))]
    loss = noise_regularizer(noises).sum()
    normalize_noise_(noises)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    noise_regularizer(noises).sum().backward()
    assert noises[0].grad is not None


@needs_cpp
def test_core_repeats_the_checks_and_names_the_argument() -> None:
    module, target = native.module(), (-1, 1, 0)
    good = {"maps": [64], "sides": [8], "count": 1, "batch": 1, "stop": 8, "moments": 64}
    for change, message in (
        ({}, "loss and partials must not be null"),
        ({"dtype": 9}, "dtype is not supported"),
        ({"count": 25}, "noises must hold 1 to 24 maps"),
        ({"count": 2}, "noises must not be null"),
        ({"sides": [18]}, "side must halve evenly down to stop"),
        ({"stop": 0}, "stop must be positive"),
        ({"batch": 0}, "noises must not be empty"),
        ({"moments": 0}, "moments must not be null"),
    ):
        with pytest.raises(RuntimeError, match=f"noise_regularizer_fwd: {message}"):
            module.noise_regularizer_fwd(target, **(good | change))
    with pytest.raises(RuntimeError, match="noise_regularizer_bwd: grad_maps must not be null"):
        module.noise_regularizer_bwd(target, **good)
    with pytest.raises(RuntimeError, match="normalize_noise: workspace must not be null"):
        module.normalize_noise(target, maps=[64], pixels=[4], count=1, batch=1)
    with pytest.raises(ValueError, match="at most 24 entries"):
        module.normalize_noise(target, maps=[64] * 25)


MAP = torch.zeros(2, 1, 8, 8)


@pytest.mark.parametrize(
    ("noises", "stop", "error", "message"),
    [
        ([], 8, ValueError, "noises must hold 1 to 24 maps, got 0"),
        ([MAP] * 25, 8, ValueError, "noises must hold 1 to 24 maps, got 25"),
        ([MAP[0]], 8, ValueError, r"noises\[0\] must be of shape \(N, C, H, W\)"),
        ([MAP.int()], 8, TypeError, r"noises\[0\] must be floating point"),
        ([MAP, MAP.double()], 8, TypeError, r"noises\[1\] must be of noises\[0\]'s dtype"),
        ([MAP, MAP[:1]], 8, ValueError, r"noises\[1\] must be of shape \(2, 1, 8, 8\)"),
        ([MAP.expand(2, 3, 8, 8)], 8, ValueError, r"noises\[0\] must be of shape \(2, 1, 8, 8\)"),
        ([MAP[:, :, :4]], 8, ValueError, r"noises\[0\] must be square and halve evenly down to stop=8"),
        ([torch.zeros(1, 1, 18, 18)], 8, ValueError, r"noises\[0\] must be square and halve evenly"),
        ([MAP], 0, ValueError, "stop must be 1 or more, got 0"),
        ([MAP], 8.0, TypeError, "stop must be an integer, got 8.0"),
        (None, 8, TypeError, "noises must be a list of tensors, got None"),
    ],
)
def test_rejects(noises: list[Tensor], stop: int, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"noise_regularizer: {message}"):
        noise_regularizer(noises, stop)
