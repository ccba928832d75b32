# SPDX-License-Identifier: Apache-2.0
"""The divergences on Triton without a GPU."""

import itertools

import torch
from support.kernel_cases import DTYPES, Place, check_against_oracle, draw
from support.triton_cases import compile_kernel
from torch import Tensor

from faceedit import kernels
from faceedit.kernels.kl import bernoulli_kl, bernoulli_reference, gaussian_kl, gaussian_reference

ROWS = len(DTYPES) * 3 + len(DTYPES)


def _bernoulli_row(dtype: torch.dtype, target: Tensor, weight: Tensor | None) -> bool:
    check_against_oracle(
        Place("triton"),
        lambda x: bernoulli_kl(x, target, weight, 0.05),
        lambda x: bernoulli_reference(x, target.double(), None if weight is None else weight.double(), 0.05),
        [(3 * draw(3, 70, seed=1)).to(dtype)],
        ("logits",),
        dtype,
    )
    return kernels.last_backend("bernoulli_kl_backward") == "triton"


def _gaussian_row(dtype: torch.dtype) -> bool:
    inputs = [draw(2, 5, 130, seed=1).to(dtype), (2 * draw(2, 5, 130, seed=2)).to(dtype)]
    check_against_oracle(Place("triton"), gaussian_kl, gaussian_reference, inputs, ("mu", "logvar"), dtype)
    return kernels.last_backend("gaussian_kl_backward") == "triton"


def _ends() -> None:
    logits = torch.tensor([[1e4], [-1e4], [1e4], [0.0], [float("nan")], [30.0]])
    target = torch.tensor([[1], [0], [0], [1], [1], [1]], dtype=torch.uint8)
    with kernels.backend("triton"):
        loss = bernoulli_kl(logits, target)
    assert loss[4].isnan()
    expected = torch.tensor([0.0, 0.0, 1e4, 0.6931472, 9.3576e-14])
    assert torch.allclose(loss[[0, 1, 2, 3, 5]], expected, rtol=1e-4, atol=0)


def numbers() -> int:
    soft, weight = draw(3, 70, seed=2, low=0.0), draw(70, seed=3, low=0.5)
    targets = ((soft, weight), (soft, None), (soft > 0.5, weight))
    rows = sum(_bernoulli_row(dtype, *rest) for dtype, rest in itertools.product(DTYPES, targets))
    _ends()
    return rows + sum(_gaussian_row(dtype) for dtype in DTYPES)


def compile_all() -> None:
    from faceedit.kernels import kl_triton as k

    for dtype in ("fp32", "bf16"):
        shared = {"target_ptr": "*u8" if dtype == "bf16" else "*fp32", "smoothing_ptr": "*fp64"}
        bernoulli = {"WEIGHT": dtype == "bf16", "BLOCK": 64}
        compile_kernel(k.bernoulli_forward_kernel, bernoulli, shared | {"logits_ptr": f"*{dtype}"})
        types = shared | dict.fromkeys(("logits_ptr", "found_ptr"), f"*{dtype}")
        compile_kernel(k.bernoulli_backward_kernel, bernoulli, types)
        types = dict.fromkeys(("mu_ptr", "logvar_ptr"), f"*{dtype}")
        compile_kernel(k.gaussian_forward_kernel, {"BLOCK": 512}, types)
        types |= dict.fromkeys(("gmu_ptr", "glogvar_ptr"), f"*{dtype}")
        compile_kernel(k.gaussian_backward_kernel, {"WANT_MU": True, "WANT_LOGVAR": True, "BLOCK": 512}, types)
