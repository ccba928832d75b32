# SPDX-License-Identifier: Apache-2.0
"""upfirdn2d and fir_epilogue on Triton without a GPU."""

import itertools
from typing import Any

import torch
from support.kernel_cases import DTYPES, FORMATS, Place, check_against_oracle, draw
from support.triton_cases import compile_kernel

from faceedit import kernels
from faceedit.kernels.fir_epilogue import fir_epilogue
from faceedit.kernels.fir_epilogue import reference as epilogue_reference
from faceedit.kernels.upfirdn2d import reference, upfirdn2d

# up, down, pad, gain, flip
SETTINGS: list[tuple[Any, ...]] = [
    (1, 1, [1, 1, 1, 1], 4.0, False),
    (2, 1, [-3, 7, 6, -1], 1.0, True),
    (1, 2, [0, -1, -2, 7], 1.0, False),
    (2, 2, [3, 2, 0, 5], 1.0, False),
]
FIRS = [draw(4, seed=7, low=0.2), draw(3, 4, seed=8, low=0.2)]
ROWS = len(FORMATS) * len(DTYPES) * (len(SETTINGS) * len(FIRS) + 4)


def _filter_row(fmt: torch.memory_format, dtype: torch.dtype, setting: tuple[Any, ...], fir: torch.Tensor) -> bool:
    x = draw(2, 5, 9, 7, seed=1, low=0.1).to(dtype).to(memory_format=fmt)
    check_against_oracle(
        Place("triton"),
        lambda x: upfirdn2d(x, fir, *setting),
        lambda x: reference(x, fir, *setting),
        [x],
        ("x",),
        dtype,
    )
    return kernels.last_backend("upfirdn2d") == "triton"


def _epilogue_row(fmt: torch.memory_format, dtype: torch.dtype, act: str, present: bool) -> bool:
    fir, (up, down, pad, gain, flip) = FIRS[0], SETTINGS[0]
    x = draw(2, 5, 9, 7, seed=1, low=0.1).to(dtype).to(memory_format=fmt)
    # Positive before the activation: nothing lies near a kink.
    operands = [
        draw(2, 5, seed=2, low=0.5),
        draw(1, 1, 8, 6, seed=3, low=0.5),
        torch.tensor(0.3),
        draw(5, seed=4, low=0.5),
    ]
    operands += [draw(2, 5, 8, 6, seed=5).to(dtype).to(memory_format=fmt)]
    found = operands if present else [None] * 5
    names = ("scale", "noise", "strength", "bias", "add")
    clamp = 500.0 if present else -1.0
    check_against_oracle(
        Place("triton"),
        lambda x, *t: fir_epilogue(
            x, fir, pad=pad, fir_gain=gain, **dict(zip(names, t, strict=True)), act=act, gain=1.4, clamp=clamp
        ),
        lambda x, *t: epilogue_reference(x, fir, up, down, pad, gain, flip, *t, act, 0.2, 1.4, clamp),
        [x, *found],
        ("x", *names),
        dtype,
    )
    return kernels.last_backend("fir_epilogue") == "triton"


def _clamp_and_negative_side() -> None:
    x = torch.tensor([[-8.0, -1.0, 1.0, 8.0, float("nan")]]).view(1, 1, 1, 5)
    with kernels.backend("triton"):
        y = fir_epilogue(x, torch.ones(1), clamp=1.5)
    assert y[0, 0, 0, :4].tolist() == [-1.5, torch.tensor(-0.2).item(), 1.0, 1.5]
    assert y.isnan().tolist() == [[[[False, False, False, False, True]]]]


def numbers() -> int:
    rows = sum(_filter_row(*row) for row in itertools.product(FORMATS, DTYPES, SETTINGS, FIRS))
    rows += sum(_epilogue_row(*row) for row in itertools.product(FORMATS, DTYPES, ("lrelu", "silu"), (False, True)))
    _clamp_and_negative_side()
    return rows


def compile_all() -> None:
    from faceedit.kernels.upfirdn2d_triton import forward_kernel

    floats = dict.fromkeys(("fir_gain", "slope", "gain", "clamp"), "fp32")
    operands = dict.fromkeys(("SCALE", "NOISE", "STRENGTH", "BIAS", "CLAMP", "ADD"), True)
    for dtype, last in itertools.product(("fp32", "bf16"), (False, True)):
        settings = {"KH": 4, "KW": 4, "UP": 2 - last, "DOWN": 1 + last, "ONE_AXIS": last, "FLIP": last}
        settings |= operands | {"CHANNELS_LAST": last, "EPILOGUE": True, "ACT": 2, "BLOCK": 512}
        compile_kernel(forward_kernel, settings, floats | dict.fromkeys(("x_ptr", "y_ptr", "add_ptr"), f"*{dtype}"))
