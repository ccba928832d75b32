# SPDX-License-Identifier: Apache-2.0
"""alpha_blend on Triton without a GPU."""

import itertools

import torch
from support.kernel_cases import DTYPES, FORMATS, Place, check_against_oracle, draw
from support.triton_cases import compile_kernel

from faceedit import kernels
from faceedit.kernels.alpha_blend import alpha_blend, reference

ROWS = len(FORMATS) * len(DTYPES) * 2


def _matrix_row(fmt: torch.memory_format, dtype: torch.dtype, samples: int) -> bool:
    images = [draw(2, 3, 19, 17, seed=seed).to(dtype).to(memory_format=fmt) for seed in (1, 2)]
    mask = draw(samples, 1, 19, 17, seed=3, low=-0.2).clamp(0, 1)
    check_against_oracle(
        Place("triton"),
        alpha_blend,
        lambda f, b, m: b + m * (f - b),
        [*images, mask],
        ("fg", "bg", "mask"),
        dtype,
    )
    return kernels.last_backend("alpha_blend_backward") == "triton"


def _uint8() -> None:
    """Every pair of kinds, to uint8 and, where fg is floating, to fp32; NaN and infinities on the side not selected."""
    real = draw(2, 3, 7, 9, seed=1)
    coded = (draw(2, 3, 7, 9, seed=2, low=0.0) * 256).to(torch.uint8)
    mask = (draw(2, 1, 7, 9, seed=3) > 0).float()
    torn = torch.where(mask == 1, real, float("nan"))
    for fg, bg, quantize in ((real, coded, True), (coded, real, True), (coded, coded.flip(3), False), (torn, coded, 0)):
        with kernels.backend("triton"):
            y = alpha_blend(fg, bg, mask, quantize=bool(quantize))
        assert torch.equal(y, reference(fg, bg, mask, bool(quantize)))
    halves = torch.tensor([1, 2, 3, 255], dtype=torch.uint8).view(1, 1, 1, 4)
    with kernels.backend("triton"):
        y = alpha_blend(halves, halves + 1, torch.full((1, 1, 1, 4), 0.5))
        wild = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.5]).view(1, 1, 1, 4)
        ends = alpha_blend(wild, wild, torch.ones(1, 1, 1, 4, dtype=torch.bool), quantize=True)
    assert y.flatten().tolist() == [2, 2, 4, 128]  # 255 + 1 wraps round to 0
    assert ends.flatten().tolist() == [0, 255, 0, 255]


def numbers() -> int:
    rows = sum(_matrix_row(*row) for row in itertools.product(FORMATS, DTYPES, (1, 2)))
    _uint8()
    return rows


def compile_all() -> None:
    from faceedit.kernels.alpha_blend_triton import backward_kernel, forward_kernel

    for dtype, last in itertools.product(("fp32", "bf16", "u8"), (False, True)):
        coded = dtype == "u8"
        forward = {"CHANNELS_LAST": last, "FG_UINT8": coded, "BG_UINT8": coded, "LEVELS": coded, "BLOCK": 1024}
        compile_kernel(forward_kernel, forward, dict.fromkeys(("fg_ptr", "bg_ptr", "y_ptr"), f"*{dtype}"))
    for dtype, last in itertools.product(("fp32", "bf16"), (False, True)):
        backward = {"CHANNELS_LAST": last, "BG_UINT8": last, "BLOCK": 256}
        backward |= dict.fromkeys(("WANT_FG", "WANT_BG", "WANT_MASK"), True)
        types = dict.fromkeys(("grad_ptr", "fg_ptr", "bg_ptr", "gfg_ptr", "gbg_ptr"), f"*{dtype}")
        compile_kernel(backward_kernel, backward, types | ({"bg_ptr": "*u8"} if last else {}))
