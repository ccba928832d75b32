# SPDX-License-Identifier: Apache-2.0
"""noise_bias_act on Triton without a GPU."""

import itertools

import torch
from support.kernel_cases import DTYPES, FORMATS, Place, check_against_oracle, draw
from support.triton_cases import compile_kernel

from faceedit import kernels
from faceedit.kernels.noise_bias_act import ACTIVATIONS, noise_bias_act, reference

ROWS = len(FORMATS) * len(DTYPES) * len(ACTIVATIONS)


def _matrix_row(fmt: torch.memory_format, dtype: torch.dtype, act: str) -> bool:
    x = (draw(2, 35, 9, 8, seed=1) + 0.003).to(dtype)
    x = torch.where(x.abs() < 0.03, 0.5, x).to(memory_format=fmt)
    noise, strength = draw(1, 1, 9, 8, seed=3, low=3.0), torch.tensor(0.3)
    operands = [draw(2, 35, seed=2, low=0.5), noise, strength, draw(35, seed=4)]
    if act in ("relu", "lrelu"):
        operands = [operands[0], None, None, None]
    check_against_oracle(
        Place("triton"),
        lambda *t: noise_bias_act(*t, act=act, gain=1.4, clamp=50.0),
        lambda *t: reference(*t, act, 0.2, 1.4, 50.0),
        [x, *operands],
        ("x", "scale", "noise", "strength", "bias"),
        dtype,
    )
    return kernels.last_backend("noise_bias_act_backward") == "triton"


def _clamp_that_binds() -> None:
    """From the saved output."""
    bias = draw(35, seed=4)
    x = draw(1, 35, 3, 3, seed=7) * 3
    z = x + bias.view(1, -1, 1, 1)
    x = torch.where((z.abs() < 0.02) | ((z - 1).abs() < 0.02) | ((0.2 * z + 1).abs() < 0.02), x + 0.1, x)
    check_against_oracle(
        Place("triton"),
        lambda x, b: noise_bias_act(x, bias=b, clamp=1.0),
        lambda x, b: reference(x, None, None, None, b, "lrelu", 0.2, 1.0, 1.0),
        [x, bias],
        ("x", "bias"),
        torch.float32,
    )


def _nan_and_infinities() -> None:
    x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).view(1, 1, 1, 4)
    with kernels.backend("triton"):
        y = noise_bias_act(x, clamp=2.0)
    assert y.isnan().tolist() == [[[[True, False, False, False]]]]
    assert y[0, 0, 0, 1:].tolist() == [2.0, -2.0, 1.0]


def numbers() -> int:
    rows = sum(_matrix_row(*row) for row in itertools.product(FORMATS, DTYPES, ACTIVATIONS))
    _clamp_that_binds()
    _nan_and_infinities()
    return rows


def compile_all() -> None:
    from faceedit.kernels.noise_bias_act_triton import backward_kernel, forward_kernel

    everything = dict.fromkeys(("SCALE", "NOISE", "STRENGTH", "BIAS", "CLAMP"), True)
    floats = dict.fromkeys(("slope", "gain", "clamp"), "fp32")
    for dtype, last in itertools.product(("fp32", "bf16"), (False, True)):
        forward = everything | {"ACT": 5, "CHANNELS_LAST": last, "BLOCK": 1024}
        compile_kernel(forward_kernel, forward, floats | dict.fromkeys(("x_ptr", "y_ptr"), f"*{dtype}"))
        backward = everything | {"ACT": 3, "CHANNELS_LAST": last, "FROM_INPUT": True, "BLOCK_P": 64, "BLOCK_C": 32}
        backward |= dict.fromkeys(("WANT_SCALE", "WANT_ROWS", "WANT_BIAS"), True)
        images = dict.fromkeys(("grad_ptr", "saved_ptr", "gx_ptr"), f"*{dtype}")
        compile_kernel(backward_kernel, backward, floats | images)
