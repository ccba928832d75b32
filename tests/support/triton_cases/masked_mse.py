# SPDX-License-Identifier: Apache-2.0
"""masked_mse on Triton without a GPU."""

import itertools

import torch
from support.kernel_cases import DTYPES, FORMATS, Place, check_against_oracle, draw
from support.triton_cases import compile_kernel

from faceedit import kernels
from faceedit.kernels.masked_mse import NORMALIZE, RELAX, masked_mse, reference

HALVED = list(itertools.product(FORMATS, DTYPES, RELAX, ("mask",), (True,)))
CASES = [*itertools.product(FORMATS, DTYPES, RELAX, NORMALIZE, (False,)), *HALVED]
ROWS = len(CASES)


def _matrix_row(fmt: torch.memory_format, dtype: torch.dtype, relax: str, normalize: str, halved: bool) -> bool:
    h, w = (18, 16) if halved else (19, 17)
    part = 2 if halved else 1
    a = draw(2, 3, h, w, seed=1).to(dtype).to(memory_format=fmt)
    b = (draw(2, 3, h, w, seed=1) + draw(2, 3, h, w, seed=2, low=0.5)).to(dtype).to(memory_format=fmt)
    mask = draw(2, 1, h // part, w // part, seed=3, low=0.0)
    exclude, include = (draw(1, 1, h // part, w // part, seed=4) > 1), draw(2, 1, h, w, seed=5, low=-0.6)
    wide = [m.double() for m in (mask, exclude, include)]
    check_against_oracle(
        Place("triton"),
        lambda a, b: masked_mse(a, b, mask, exclude=exclude, include=include, relax=relax, normalize=normalize),
        lambda a, b: reference(a, b, *wide, relax, normalize)[0],
        [a, b],
        ("a", "b"),
        dtype,
    )
    return kernels.last_backend("masked_mse_backward") == "triton"


def numbers() -> int:
    return sum(_matrix_row(*row) for row in CASES)


def compile_all() -> None:
    from faceedit.kernels.masked_mse_triton import backward_kernel, forward_kernel

    for dtype, last in itertools.product(("fp32", "bf16"), (False, True)):
        masks = {
            "CHANNELS_LAST": last,
            "MASK": 2,
            "EXCLUDE": 2 if last else 1,
            "INCLUDE": 1,
            "MINMAX": last,
            "BLOCK": 256,
        }
        images = dict.fromkeys(("a_ptr", "b_ptr"), f"*{dtype}")
        compile_kernel(forward_kernel, masks, images)
        images |= dict.fromkeys(("ga_ptr", "gb_ptr"), f"*{dtype}")
        compile_kernel(backward_kernel, masks | {"WANT_A": True, "WANT_B": True}, images)
