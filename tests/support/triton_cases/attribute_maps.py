# SPDX-License-Identifier: Apache-2.0
"""attribute_maps on Triton without a GPU."""

import itertools

import torch
from support.kernel_cases import DTYPES, FORMATS, Place, check_against_oracle, draw
from support.triton_cases import compile_kernel

from faceedit import kernels
from faceedit.kernels.attribute_maps import attribute_maps, reference

ROWS = 2 * len(FORMATS) * len(DTYPES)


def _matrix_row(fmt: torch.memory_format, dtype: torch.dtype, is_per_sample: bool) -> bool:
    probs = draw(2, 19, 9, 17, seed=1, low=0.1).to(dtype).to(memory_format=fmt)
    relation = draw(2, 13, 19, seed=2, low=0.0) if is_per_sample else draw(13, 19, seed=2, low=0.0)
    check_against_oracle(
        Place("triton"),
        lambda attr, probs: attribute_maps(attr, probs, relation),
        lambda attr, probs: reference(probs, attr, relation.double()),
        [draw(2, 13, seed=3, low=0.5), probs],
        ("attr", "probs"),
        dtype,
    )
    return kernels.last_backend("attribute_maps_backward") == "triton"


def numbers() -> int:
    return sum(_matrix_row(*row) for row in itertools.product(FORMATS, DTYPES, (False, True)))


def compile_all() -> None:
    from faceedit.kernels.attribute_maps_triton import mix_kernel, sums_kernel

    for dtype, has_factor in itertools.product(("fp32", "bf16"), (False, True)):
        types = dict.fromkeys(("in_ptr", "out_ptr"), f"*{dtype}")
        compile_kernel(mix_kernel, {"FACTOR": has_factor, "INPUTS": 32, "BLOCK": 128}, types)
        types = dict.fromkeys(("probs_ptr", "grad_ptr"), f"*{dtype}")
        compile_kernel(sums_kernel, {"PARTS": 32, "BLOCK": 128}, types)
