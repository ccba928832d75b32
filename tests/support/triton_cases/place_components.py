# SPDX-License-Identifier: Apache-2.0
"""place_components and mask_centres on Triton without a GPU."""

import itertools

import torch
from support.kernel_cases import DTYPES, FORMATS, Place, draw, run
from support.triton_cases import compile_kernel
from torch import Tensor

from faceedit import kernels
from faceedit.kernels.place_components import ABSENT, centres_reference, mask_centres, place_components, reference

ROWS = len(FORMATS) * len(DTYPES) + 3


def _matrix_row(fmt: torch.memory_format, dtype: torch.dtype) -> bool:
    sizes = ((3, 4, 6), (2, 5, 3), (4, 30, 2), (2, 19, 23))  # the last: features
    tensors = [draw(2, *s, seed=k).to(dtype).contiguous(memory_format=fmt) for k, s in enumerate(sizes)]
    rows = [[[4, 5], [0, 0], [18, 22]], [[-1, 24], [ABSENT, ABSENT], [2**31 - 1, 3]]]
    centres = torch.tensor(rows, dtype=torch.int32)

    def place(*t: Tensor) -> Tensor:
        return place_components(t[:-1], centres, t[-1])

    weights = draw(2, 11, 19, 23, seed=9).to(dtype)
    y, gradients = run(Place("triton"), place, tensors, weights)
    ran = kernels.last_backend("place_components_backward") == "triton"
    expected, right = run(Place("eager"), place, tensors, weights)
    assert torch.equal(y, expected)
    assert torch.equal(expected, reference(tensors[:-1], centres, tensors[-1], 19, 23))
    assert all(torch.equal(a, b) for a, b in zip(gradients, right, strict=True) if a is not None and b is not None)
    return ran


def _centres_row(dtype: torch.dtype) -> bool:
    soft = draw(2, 3, 37, 41, seed=1, low=-0.3)
    mask = (soft > 0).to(dtype) if dtype == torch.bool else soft.to(dtype)
    mask[0, 1] = 0
    with kernels.backend("triton"):
        found = mask_centres(mask)
    ran = kernels.last_backend("mask_centres") == "triton"
    assert torch.equal(found, centres_reference(mask))
    return ran


def numbers() -> int:
    rows = sum(_matrix_row(*row) for row in itertools.product(FORMATS, DTYPES))
    return rows + sum(_centres_row(dtype) for dtype in (torch.float32, torch.bfloat16, torch.bool))


def compile_all() -> None:
    from faceedit.kernels.place_components_triton import centres_kernel, crop_kernel, place_kernel

    for dtype, last in itertools.product(("fp32", "bf16"), (False, True)):
        constants = {"CENTRED": not last, "CHANNELS_LAST": last, "BLOCK": 1024}
        types = {"centres_ptr": "*i32"} | dict.fromkeys(("source_ptr", "out_ptr"), f"*{dtype}")
        compile_kernel(place_kernel, constants, types)
        types = {"centres_ptr": "*i32"} | dict.fromkeys(("grad_ptr", "found_ptr"), f"*{dtype}")
        compile_kernel(crop_kernel, constants, types)
    for dtype in ("fp32", "bf16", "u8"):
        compile_kernel(centres_kernel, {"BLOCK": 1024}, {"mask_ptr": f"*{dtype}", "centres_ptr": "*i32"})
