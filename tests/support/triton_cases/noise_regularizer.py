# SPDX-License-Identifier: Apache-2.0
"""noise_regularizer and normalize_noise_ on Triton without a GPU."""

import torch
from support.compare import assert_close
from support.kernel_cases import DTYPES, Place, check_against_oracle, draw
from support.triton_cases import compile_kernel
from torch import Tensor

from faceedit import kernels
from faceedit.kernels.noise_regularizer import noise_regularizer, normalize_noise_, normalized, reference
from faceedit.kernels.tensors import poison

# Sides of one level and of several, beside a tile's 64 and over it; the last takes two launches.
MATRIX = [((4, 16), 8), ((7, 1, 80), 8), ((96, 64), 3), ((64, 128), 2)]
ROWS = len(DTYPES) * (len(MATRIX) + 1)


def _maps(sides: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [draw(2, 1, side, side, seed=i, low=0.3).to(dtype) for i, side in enumerate(sides)]


def _matrix_row(sides: tuple[int, ...], stop: int, dtype: torch.dtype) -> bool:
    check_against_oracle(
        Place("triton"),
        lambda *t: noise_regularizer(t, stop),
        lambda *t: reference(list(t), stop)[0],
        _maps(sides, dtype),
        [f"noises[{i}]" for i in range(len(sides))],
        dtype,
    )
    return kernels.last_backend("noise_regularizer_backward") == "triton"


def _normalizes(dtype: torch.dtype) -> bool:
    noises = [(draw(2, 1, *shape, seed=i) * 3 + 40).to(dtype) for i, shape in enumerate([(4, 4), (90, 100)])]
    noises += [torch.zeros(1, 1, 8, 8, dtype=dtype).expand(2, 1, 8, 8).contiguous(), _maps((96,), dtype)[0].mT]
    expected = [normalized(noise.double()) for noise in noises]
    with kernels.backend("triton"), poison() as guards:
        normalize_noise_(noises)
        assert guards.untouched()
    for actual, wanted in zip(noises, expected, strict=True):
        assert_close("map", actual, wanted, relative_l2={torch.float32: 3e-6}.get(dtype, 4e-3))
    return kernels.last_backend("normalize_noise_") == "triton"


def numbers() -> int:
    rows = sum(_matrix_row(*case, dtype) for case in MATRIX for dtype in DTYPES)
    return rows + sum(_normalizes(dtype) for dtype in DTYPES)


def compile_all() -> None:
    from faceedit.kernels.noise_regularizer_triton import apply_kernel, gradient_kernel, moments_kernel, sums_kernel

    for dtype in ("fp32", "bf16"):
        maps = {"x_ptr": f"*{dtype}"}
        for levels in (1, 4):
            compile_kernel(sums_kernel, {"LEVELS": levels, "SUMS": True, "COARSE": levels == 4, "SIZE": 64}, maps)
            compile_kernel(
                gradient_kernel, {"LEVELS": levels, "NEXT": levels == 4, "SIZE": 64}, maps | {"out_ptr": f"*{dtype}"}
            )
        compile_kernel(moments_kernel, {"BLOCK": 4096}, maps)
        compile_kernel(apply_kernel, {"BLOCK": 4096, "BLOCKS": 256}, maps)
