# SPDX-License-Identifier: Apache-2.0
"""norm_modulate on Triton without a GPU."""

import itertools

import torch
from support.kernel_cases import DTYPES, FORMATS, Place, check_against_oracle, draw
from support.triton_cases import compile_kernel
from torch import Tensor

from faceedit import kernels
from faceedit.kernels.norm_modulate import NORMS, norm_modulate, reference

# gamma and beta: one value a channel (of the batch, of a sample), a pixel, an element; None absent
MODULATIONS = [("element", "element"), ("nc", "pixel"), ("pixel", "c"), (None, None)]
ROWS = len(FORMATS) * len(DTYPES) * len(NORMS) * len(MODULATIONS)


def _operand(kind: str | None, x: Tensor, seed: int) -> Tensor | None:
    n, c, h, w = x.shape
    shapes = {"c": (c,), "nc": (n, c), "pixel": (n, 1, h, w), "element": (n, c, h, w)}
    if kind is None:
        return None
    values = draw(*shapes[kind], seed=seed, low=0.3)
    return values if values.dim() < 4 else values.to(x.dtype)


def _matrix_row(fmt: torch.memory_format, dtype: torch.dtype, norm: str, kinds: tuple[str | None, str | None]) -> bool:
    # More than one tile of pixels and of channels in either layout.
    shape = (2, 35, 9, 8) if fmt is torch.channels_last else (2, 2, 35, 33)
    x = (draw(*shape, seed=1) + 5.0).to(dtype).contiguous(memory_format=fmt)
    tensors = [x, _operand(kinds[0], x, 2), _operand(kinds[1], x, 3), None, None]
    if norm == "given":
        tensors[3:] = [draw(shape[1], seed=5), draw(*shape[:2], seed=6, low=0.5)]
    check_against_oracle(
        Place("triton"),
        lambda x, g, b, m, r: norm_modulate(x, g, b, norm=norm, mean=m, rstd=r, act="silu"),
        lambda *t: reference(*t, norm, True, 1e-5, "silu", 0.2)[0],
        tensors,
        ("x", "gamma", "beta", "mean", "rstd"),
        dtype,
    )
    return kernels.last_backend("norm_modulate_backward") == "triton"


def _far_planes_and_outliers() -> None:
    x = draw(1, 3, 40, 41, seed=1)
    x[:, 0] += 1e5
    x[:, 1, 0, 0] = 5e4
    x[:, 2] = 1.7
    with kernels.backend("triton"):
        y = norm_modulate(x)
    expected = reference(x.double(), None, None, None, None, "instance", True, 1e-5, "linear", 0.2)[0]
    assert ((y - expected).norm(dim=(2, 3)) / (expected.norm(dim=(2, 3)) + 1)).max() < 2e-6


def numbers() -> int:
    rows = sum(_matrix_row(*row) for row in itertools.product(FORMATS, DTYPES, NORMS, MODULATIONS))
    _far_planes_and_outliers()
    return rows


def compile_all() -> None:
    from faceedit.kernels.norm_modulate_triton import backward_kernel, forward_kernel, statistics_kernel, sums_kernel

    floats = dict.fromkeys(("one", "slope"), "fp32")
    for dtype, last in itertools.product(("fp32", "bf16"), (False, True)):
        tile = {"CHANNELS_LAST": last, "BLOCK_P": 32 if last else 1024, "BLOCK_C": 32 if last else 1}
        compile_kernel(statistics_kernel, tile, {"x_ptr": f"*{dtype}", "eps": "fp32"})
        settings = tile | {"GAMMA": 3, "BETA": 2, "NORM": 0, "ACT": 3}
        images = floats | dict.fromkeys(("x_ptr", "gamma_ptr", "beta_ptr"), f"*{dtype}")
        compile_kernel(forward_kernel, settings, images | {"y_ptr": f"*{dtype}"})
        compile_kernel(forward_kernel, settings | {"GAMMA": 1, "BETA": 0, "NORM": 2}, images | {"gamma_ptr": "*fp32"})
        images |= {"grad_ptr": f"*{dtype}"}
        compile_kernel(sums_kernel, settings, images)
        images |= dict.fromkeys(("gx_ptr", "ggamma_ptr", "gbeta_ptr"), f"*{dtype}")
        compile_kernel(backward_kernel, settings | dict.fromkeys(("WANT_X", "WANT_GAMMA", "WANT_BETA"), True), images)
