# SPDX-License-Identifier: Apache-2.0
"""Every op inside `torch.autocast`: what a network gives it there, and that nothing in it is rounded on the way."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.compare import assert_close
from support.kernel_cases import PLACES, Place, draw
from support.op_cases import CASES, CENTRES, IMAGE, Case
from torch import Tensor
from torch.nn import functional as F

from faceedit import kernels
from faceedit.kernels import native

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
OTHER_NAMES = {"backend", "backends_report", "decomposition_table", "last_backend", "setup_filter"}  # no op


def _permits(device: str, dtype: torch.dtype) -> bool:
    """Return whether PyTorch convolves and multiplies in `dtype` on this device under autocast."""
    try:
        with torch.autocast(device, dtype=dtype):
            y = F.conv2d(torch.ones(1, 2, 4, 4, device=device), torch.ones(2, 2, 3, 3, device=device))
            return y.dtype == dtype and F.linear(y, y[0, 0]).dtype == dtype
    except RuntimeError:
        return False


# Of the C++ instruction sets the widest; where there is no C++ the row says so.
WHERE = [row for row in PLACES if row.values[0].isa in ("", *native.build_report()["isas"][-1:])]
DIFFERENTIABLE = [case for case in CASES if case.has_gradient]


def _inputs(case: Case, place: Place, dtype: torch.dtype | None) -> list[Tensor]:
    """Draw a case's inputs, activations from a layer under autocast in `dtype`, or from one in fp32 (None)."""
    tensors = []
    for seed, shape in enumerate(case.activations):
        source, square = draw(*shape, seed=seed).to(place.device), draw(shape[1], shape[1], seed=90).to(place.device)
        with torch.autocast(place.device, dtype=dtype, enabled=dtype is not None):
            y = F.conv2d(source, square[:, :, None, None]) if len(shape) == 4 else F.linear(source, square)
        assert y.dtype == (dtype or torch.float32)
        tensors.append(y.detach().requires_grad_())
    tensors += [draw(*s, seed=20 + i).to(place.device).requires_grad_() for i, s in enumerate(case.parameters)]
    return tensors + [draw(*s, seed=40 + i, low=0.0).to(place.device) for i, s in enumerate(case.constants)]


def _gradients(case: Case, y: Tensor, inputs: list[Tensor], **settings: Any) -> list[Tensor]:
    """Return the gradient of every input that has one, of a sum of y with positive weights that every dtype holds."""
    if not case.has_gradient:
        return []
    weights = draw(*y.shape, seed=99, low=0.5).bfloat16().half().to(y)
    return list(torch.autograd.grad(y, [t for t in inputs if t.requires_grad], weights, **settings))


def test_every_op_has_a_case() -> None:
    assert {case.operation for case in CASES} == set(kernels.__all__) - OTHER_NAMES


@pytest.mark.parametrize("half", HALF)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("place", WHERE)
def test_half_activations_with_parameters_in_fp32(place: Place, case: Case, half: str) -> None:
    dtype = HALF[half]
    if not _permits(place.device, dtype):
        pytest.skip(f"PyTorch does not convolve in {half} on this {place.device}")
    inputs = _inputs(case, place, dtype)
    with kernels.backend(place.backend), torch.autocast(place.device, dtype=dtype):
        y = case.op(*inputs)
    wide = [t.detach().double().requires_grad_(t.requires_grad) for t in inputs]
    expected = case.op(*wide)

    assert y.dtype == (case.result or dtype)
    if not y.is_floating_point():
        assert torch.equal(y, expected)
        return
    forward, backward = case.tolerance(dtype, y.dtype)
    assert_close("output", y, expected, relative_l2=forward)
    given = [t for t in inputs if t.requires_grad]
    pairs = zip(_gradients(case, y, inputs), _gradients(case, expected, wide), strict=True)
    for i, (gradient, wanted) in enumerate(pairs):
        assert gradient.dtype == given[i].dtype
        assert gradient.isfinite().all()
        assert_close(f"gradient {i}", gradient, wanted, relative_l2=backward)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("place", WHERE)
def test_fp32_is_not_rounded(place: Place, case: Case) -> None:
    results = []
    for enabled in (False, True):
        inputs = _inputs(case, place, None)
        with kernels.backend(place.backend), torch.autocast(place.device, dtype=torch.bfloat16, enabled=enabled):
            y = case.op(*inputs)
            once = _gradients(case, y, inputs, retain_graph=True)
            results.append([y, *once, *_gradients(case, y, inputs, create_graph=True)])
    for outside, inside in zip(*results, strict=True):
        assert inside.dtype == outside.dtype
        # Inside, the fp32 sums of conv_attribute_maps have another order, and those of resizing one of chance on a GPU.
        # bf16 would be off by 4e-3.
        if case.operation == "conv_attribute_maps" or (case.resizes and place.device == "cuda"):
            assert_close("inside", inside, outside.double(), relative_l2=1e-6)
        else:
            assert torch.equal(inside, outside)


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
@pytest.mark.parametrize("place", WHERE)
def test_backward_inside_equals_backward_outside(place: Place, case: Case) -> None:
    inputs = _inputs(case, place, torch.bfloat16)
    results = []
    with kernels.backend(place.backend):
        for enabled in (False, True):
            with torch.autocast(place.device, dtype=torch.bfloat16):
                y = case.op(*inputs)
            with torch.autocast(place.device, dtype=torch.bfloat16, enabled=enabled):
                once = _gradients(case, y, inputs, retain_graph=True)
                results.append([*once, *_gradients(case, y, inputs, create_graph=True)])
    for outside, inside in zip(*results, strict=True):
        assert inside.dtype == outside.dtype
        if case.resizes and place.device == "cuda":  # PyTorch sums that gradient in an order of chance there
            assert_close("inside", inside, outside.double(), relative_l2=1e-6)
        else:
            assert torch.equal(inside, outside)


MIXED = [
    (lambda h, f: kernels.gru_gate(f, h, h), "gru_gate: z_pre must be of h's dtype torch.float32, got bfloat16"),
    (lambda h, f: kernels.reset_gate(h, f), "reset_gate: r_pre must be of h's dtype torch.bfloat16, got float32"),
    (
        lambda h, f: kernels.place_components([h, f], CENTRES, size=(8, 8)),
        r"place_components: components\[1\] must be bfloat16 like components\[0\], got float32",
    ),
    (
        lambda h, f: kernels.place_components([h, h], CENTRES, f),
        r"place_components: mask_features must be bfloat16 like components\[0\], got float32",
    ),
    (
        lambda h, f: kernels.noise_regularizer([h[:, :1], f[:, :1]]),
        r"noise_regularizer: noises\[1\] must be of noises\[0\]'s dtype, got float32",
    ),
    (
        lambda h, f: kernels.normalize_noise_([h[:, :1], f[:, :1]]),
        r"normalize_noise_: noises\[1\] must be of noises\[0\]'s dtype, got float32",
    ),
]


@pytest.mark.parametrize(("call", "message"), MIXED)
def test_tensors_that_are_copied_or_combined_alike_must_be_of_one_dtype(
    call: Callable[[Tensor, Tensor], Any], message: str
) -> None:
    half, full = draw(*IMAGE, seed=1).bfloat16(), draw(*IMAGE, seed=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(TypeError, match=message + ".*; cast it"):
            call(half, full)
        call(half, full.to(half.dtype))
