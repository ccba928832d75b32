# SPDX-License-Identifier: Apache-2.0
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
from faceedit.kernels.gates import gru_gate, reference, reset_gate
from faceedit.kernels.tensors import memory_format

OP = torch.ops.faceedit.gate.default
NAMES = ("h", "z_pre", "c_pre")
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


def inputs(n: int, c: int, h: int, w: int, dtype: torch.dtype, fmt: torch.memory_format) -> list[Tensor]:
    return [draw(n, c, h, w, seed=seed).to(dtype).to(memory_format=fmt) for seed in (1, 2, 3)]


def vectors(c: int) -> list[Tensor]:
    return [draw(c, seed=4, low=0.5), draw(c, seed=5), draw(c, seed=6, low=-0.5), draw(c, seed=7)]


def gru(h: Tensor, z: Tensor, c: Tensor, affine: list[Tensor | None]) -> Tensor:
    affine = [None if t is None else t.to(h.device) for t in affine]
    return gru_gate(h, z, c, z_scale=affine[0], z_shift=affine[1], c_scale=affine[2], c_shift=affine[3])


def wide(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_matches_reference(place: Place, dtype: torch.dtype, fmt: torch.memory_format) -> None:
    tensors = inputs(2, 19, 9, 8, dtype, fmt)
    for affine in ([None] * 4, list(vectors(19))):
        oracle = lambda *t, a=affine: reference(*t, *wide(a))  # noqa: E731
        check_against_oracle(place, lambda *t, a=affine: gru(*t, a), oracle, tensors, NAMES, dtype)
    scale, shift = vectors(19)[:2]
    check_against_oracle(
        place,
        lambda h, r: reset_gate(h, r, scale=scale.to(h.device), shift=shift.to(h.device)),
        lambda h, r: reference(h, r, None, scale.double(), shift.double(), None, None),
        tensors[:2],
        ("h", "r_pre"),
        dtype,
    )


@pytest.mark.parametrize("present", range(16), ids=lambda bits: f"{bits:04b}")
@pytest.mark.parametrize("place", PLACES)
def test_every_subset_of_affine_operands(place: Place, present: int) -> None:
    fmt = torch.channels_last if present % 3 else torch.contiguous_format
    affine = [t if present >> i & 1 else None for i, t in enumerate(vectors(17))]
    tensors = inputs(2, 17, 3, 5, torch.float32, fmt)
    oracle = lambda *t: reference(*t, *wide(affine))  # noqa: E731
    check_against_oracle(place, lambda *t: gru(*t, affine), oracle, tensors, NAMES, torch.float32)


shapes = st.tuples(st.integers(0, 3), st.integers(1, 70), st.integers(1, 37), st.integers(1, 37))


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(["nchw", "nhwc", "half", "offset", "expanded"]), st.booleans())
def test_any_shape_and_stride(shape: tuple[int, int, int, int], dtype: torch.dtype, layout: str, plain: bool) -> None:
    n, c, h, w = shape
    tensors = inputs(n, c, h, w, dtype, torch.channels_last if layout == "nhwc" else torch.contiguous_format)
    if layout == "half":  # one of two gates that a single convolution makes
        tensors[1] = torch.cat([tensors[1], tensors[2]], 1)[:, :c]
    elif layout == "offset":  # a storage offset of one element: no vector load is aligned
        tensors = [torch.cat([t.new_zeros(1), t.flatten()])[1:].view(shape) for t in tensors]
    elif layout == "expanded" and n:
        tensors[0] = tensors[0][:1].expand(shape)
    affine = [None] * 4 if plain else list(vectors(c))
    with kernels.backend("cpu"):
        y = gru(*tensors, affine)
        kept = reset_gate(tensors[0], tensors[1])
    expected = reference(*[t.double() for t in tensors], *wide(affine))
    bound = {torch.float32: 2e-6}.get(dtype, 4e-3)
    assert_close("gru_gate", y, expected, relative_l2=bound)
    assert_close("reset_gate", kept, tensors[0].double() * tensors[1].double().sigmoid(), relative_l2=bound)
    assert y.is_contiguous(memory_format=memory_format(tensors[0]))


@pytest.mark.parametrize("place", PLACES)
def test_shut_and_open_gates_at_extreme_values(place: Place) -> None:
    h = torch.tensor([3.0, -2.0, 0.5, 1e-20]).view(1, 1, 2, 2)
    c = torch.tensor([1e4, -1e4, 1e-20, 0.0]).view(1, 1, 2, 2)
    for z, expected in ((-200.0, h), (200.0, torch.tanh(c))):
        y, gradients = run(place, gru_gate, [h, torch.full_like(h, z), c])
        assert_close("output", y, expected.double(), relative_l2=1e-6)
        assert all(g is not None and g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("place", PLACES)
def test_all_but_shut_gates_keep_their_relative_precision(place: Place) -> None:
    """1 - sigmoid(z) and 1 - tanh(c)^2 are below what fp32 resolves next to 1; a large state or gradient meets them."""
    z = torch.tensor([9.0, 12.0, 17.0, 20.0, 22.0, -20.0, -22.0, 3.0]).view(1, 1, 2, 4)  # fp64 resolves these
    h = torch.tensor([1e6, -1e9, 1e12, 1e20, 1e36, 1.0, -1.0, 1e3]).view(1, 1, 2, 4)
    saturated = torch.tensor([-9.0, 9.0, 8.0, -10.0, 10.0, -7.0, 6.0, 0.5]).view(1, 1, 2, 4)
    no_affine = (None,) * 4
    for c in (None, torch.zeros_like(z), saturated):
        tensors = [h, z] if c is None else [h, z, c]
        wide = [t.double().requires_grad_() for t in tensors]
        y = reference(*(*wide, None)[:3], *no_affine)
        expected = (y.detach(), *torch.autograd.grad(y.sum(), wide))
        actual, gradients = run(place, reset_gate if c is None else gru_gate, tensors)
        for name, a, e in zip(("output", *NAMES), (actual, *gradients), expected, strict=False):
            assert a is not None
            error = (a.detach().cpu() - e).abs() / e.abs()
            assert error.max() < 2e-6, f"{name}: relative errors {error.flatten().tolist()}"


@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_stay_in_their_element(place: Place) -> None:
    tensors = inputs(1, 3, 4, 5, torch.float32, torch.contiguous_format)
    for i, tensor in enumerate(tensors):
        tensor[0, i, i, 0], tensor[0, i, i, 1], tensor[0, i, i, 2] = float("nan"), float("inf"), -float("inf")
    y, _ = run(place, gru_gate, tensors)
    assert_close("output", y, reference(*[t.double() for t in tensors], None, None, None, None), relative_l2=2e-6)


@pytest.mark.parametrize("is_reset", [False, True], ids=["gru", "reset"])
def test_gradcheck_and_gradgradcheck(is_reset: bool) -> None:
    h, z, c = (t.requires_grad_() for t in inputs(2, 3, 2, 2, torch.float64, torch.contiguous_format))
    affine = [t.double() for t in vectors(3)]
    function: Any = (lambda *t: reset_gate(*t, scale=affine[0])) if is_reset else (lambda *t: gru(*t, affine))
    tensors = (h, z) if is_reset else (h, z, c)
    assert torch.autograd.gradcheck(function, tensors)
    assert torch.autograd.gradgradcheck(function, tensors)


def test_affine_operands_that_require_grad_get_theirs() -> None:
    tensors = inputs(2, 3, 4, 5, torch.float32, torch.contiguous_format)
    affine = [t.requires_grad_() for t in vectors(3)]
    actual = torch.autograd.grad(gru(*tensors, affine).sum(), affine)
    expected = torch.autograd.grad(reference(*[t.double() for t in tensors], *wide(affine)).sum(), affine)
    for a, e in zip(actual, expected, strict=True):
        assert_close("gradient", a, e, relative_l2=1e-5)
    with pytest.raises(RuntimeError, match="gate: a scale or shift that requires grad must go through"):
        OP(*tensors, *affine).sum().backward()


@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_trained_affine_operands_leave_the_result_in_h_format(fmt: torch.memory_format) -> None:
    other = next(f for f in FORMATS if f is not fmt)
    h, z, c = inputs(2, 3, 4, 5, torch.float32, other)
    h = h.contiguous(memory_format=fmt)
    scale = vectors(3)[0].requires_grad_()
    assert reset_gate(h, z, scale=scale).stride() == h.stride()
    assert gru_gate(h, z, c, c_shift=scale).stride() == h.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_opcheck(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    h, z, c = (t.requires_grad_() for t in inputs(2, 3, 4, 5, dtype, fmt))
    torch.library.opcheck(OP, (h, z, c, *vectors(3)))
    torch.library.opcheck(OP, (h, z, None, None, None, None, None))
    torch.library.opcheck(OP, (h[:0], z[:0], c[:0], None, None, None, None))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    def step(h: Tensor, z: Tensor, c: Tensor) -> Tensor:
        return gru_gate(reset_gate(h, z), z, c * 2).square().sum()

    tensors = [t.requires_grad_() for t in inputs(2, 3, 4, 5, torch.float32, torch.channels_last)]
    expected = torch.autograd.grad(step(*tensors), tensors)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*tensors), tensors), expected, strict=True):
        assert_close("gradient", actual, wanted, relative_l2=1e-6)


def test_exports_to_standard_operators() -> None:
    small, large = (inputs(n, 3, 4, 5, torch.float32, torch.contiguous_format) for n in (2, 5))
    shift = draw(3, seed=9)
    check_export(
        lambda h, z, c: gru_gate(reset_gate(h, z, shift=shift), z, c, z_shift=shift),
        OP,
        small,
        large,
        per_sample={0, 1, 2},
    )


def test_vmap_equals_a_loop() -> None:
    h, z, c = draw(4, 2, 3, 5, 5, seed=1), draw(2, 3, 5, 5, seed=2), draw(4, 2, 3, 5, 5, seed=3)
    folded = torch.vmap(lambda h, c: gru_gate(h, z, c))(h, c)
    assert torch.equal(folded, torch.stack([gru_gate(a, z, b) for a, b in zip(h, c, strict=True)]))


@needs_cpp
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_same_bits_at_any_thread_count_and_batch_size(fmt: torch.memory_format) -> None:
    tensors, affine = inputs(2, 33, 31, 29, torch.float32, fmt), list(vectors(33))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y, gradients = run(Place("cpu"), lambda *t: gru(*t, affine), tensors)
            results.append([y, *(g for g in gradients if g is not None)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone, _ = run(Place("cpu"), lambda *t: gru(*t, affine), [t[1:] for t in tensors])
    assert torch.equal(alone[0], results[0][0][1])


@needs_cpp
def test_core_repeats_the_checks_and_names_the_argument() -> None:
    module, target = native.module(), (-1, 1, 0)
    good = {"h": 64, "z": 64, "batch": 1, "channels": 1, "pixels": 1}
    for change, message in (
        ({}, "y must not be null"),
        ({"dtype": 9}, "dtype is not supported"),
        ({"pixels": 0}, "h must not be empty"),
        ({"z": 0}, "h and z must not be null"),
    ):
        with pytest.raises(RuntimeError, match=f"gate_fwd: {message}"):
            module.gate_fwd(target, **(good | change))
    with pytest.raises(RuntimeError, match="gate_bwd: c and grad_c must come together"):
        module.gate_bwd(target, **good, grad=64, grad_h=64, grad_z=64, c=64)


H = torch.zeros(2, 3, 4, 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"h": H[0]}, ValueError, "h must be of shape"),
        ({"h": H.int()}, TypeError, "h must be floating point"),
        ({"z_pre": H[:1]}, ValueError, r"z_pre must be of shape \(2, 3, 4, 5\), got float32 of shape \(1, 3, 4, 5\)"),
        ({"c_pre": H.double()}, TypeError, "c_pre must be of h's dtype torch.float32"),
        ({"c_shift": torch.zeros(4)}, ValueError, r"c_shift must be of shape \(3,\)"),
        ({"c_shift": torch.zeros(3, dtype=torch.complex64)}, TypeError, "c_shift must be floating point"),
        ({"z_pre": 0.5}, TypeError, "z_pre must be a tensor, got 0.5"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"gru_gate: {message}"):
        gru_gate(**({"h": H, "z_pre": H, "c_pre": H} | change))


def test_reset_gate_names_its_own_arguments() -> None:
    with pytest.raises(ValueError, match="reset_gate: r_pre must be of shape"):
        reset_gate(H, H[:1])
    with pytest.raises(ValueError, match="reset_gate: scale must be of shape"):
        reset_gate(H, H, scale=torch.zeros(1))
