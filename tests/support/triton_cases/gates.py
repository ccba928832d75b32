# SPDX-License-Identifier: Apache-2.0
"""gru_gate and reset_gate on Triton without a GPU."""

import itertools

import torch
from support.kernel_cases import DTYPES, FORMATS, Place, check_against_oracle, draw
from support.triton_cases import compile_kernel

from faceedit import kernels
from faceedit.kernels.gates import gru_gate, reference, reset_gate

ROWS = 2 * len(FORMATS) * len(DTYPES) + 1


def _matrix_row(fmt: torch.memory_format, dtype: torch.dtype, is_reset: bool) -> bool:
    h, z, c = (draw(2, 19, 9, 8, seed=seed).to(dtype).to(memory_format=fmt) for seed in range(3))
    scale, shift = draw(19, seed=3, low=0.5), draw(19, seed=4)
    if is_reset:
        check_against_oracle(
            Place("triton"),
            lambda h, z: reset_gate(h, z, shift=shift),
            lambda h, z: reference(h, z, None, None, shift.double(), None, None),
            [h, z],
            ("h", "r_pre"),
            dtype,
        )
    else:
        check_against_oracle(
            Place("triton"),
            lambda h, z, c: gru_gate(h, z, c, z_scale=scale, c_scale=scale, c_shift=shift),
            lambda h, z, c: reference(h, z, c, scale.double(), None, scale.double(), shift.double()),
            [h, z, c],
            ("h", "z_pre", "c_pre"),
            dtype,
        )
    return kernels.last_backend("gate_backward") == "triton"


def _all_but_shut_row() -> bool:
    """1 - sigmoid(z) and 1 - tanh(c)^2 next to operands so large that their relative precision decides."""
    h, z = torch.tensor([1e12, 1e36]).view(1, 1, 1, 2), torch.tensor([20.0, 22.0]).view(1, 1, 1, 2)
    check_against_oracle(
        Place("triton"),
        gru_gate,
        lambda h, z, c: reference(h, z, c, None, None, None, None),
        [h, z, torch.tensor([10.0, -9.0]).view(1, 1, 1, 2)],
        ("h", "z_pre", "c_pre"),
        torch.float32,
    )
    return kernels.last_backend("gate_backward") == "triton"


def numbers() -> int:
    return _all_but_shut_row() + sum(_matrix_row(*row) for row in itertools.product(FORMATS, DTYPES, (False, True)))


def compile_all() -> None:
    from faceedit.kernels.gates_triton import backward_kernel, forward_kernel

    images = ("h_ptr", "z_ptr", "c_ptr", "y_ptr", "grad_ptr", "gh_ptr", "gz_ptr", "gc_ptr")
    affine = dict.fromkeys(("Z_SCALE", "Z_SHIFT", "C_SCALE", "C_SHIFT"), True)
    for dtype, flag in itertools.product(("fp32", "bf16"), (False, True)):
        constants = affine | {"RESET": flag, "CHANNELS_LAST": flag, "BLOCK": 1024}
        for kernel in (forward_kernel, backward_kernel):
            types = {name: f"*{dtype}" for name in images if name in kernel.arg_names}
            compile_kernel(kernel, constants, types)
