# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels.benchmarking.case import Benchmark, Case, Function, draw, size_of
from faceedit.kernels.norm_modulate import norm_modulate
from faceedit.kernels.normalization import adain, instance_norm_act, sft

HALF = (2e-2, 4e-2)  # the eager code rounds every intermediate result of a half type


def _case(inputs: tuple[Tensor, ...], ours: Function, eager: Function) -> Case:
    """Forward reads x (and the maps) and writes y. Backward reads the gradient, x and the maps again and writes a
    gradient to each; x is in the cache the second time that a plane is read.
    """
    x, *operands = inputs
    maps = size_of(*operands)
    moved = (2 * size_of(x) + maps, 5 * size_of(x) + 3 * maps)
    return Case(inputs, ours, eager, moved, tolerance=None if x.dtype == torch.float32 else HALF)


def _operands(x: Tensor, per_channel: bool) -> tuple[Tensor, Tensor]:
    shape = x.shape[:2] if per_channel else x.shape
    gamma, beta = (0.3 * draw(*shape, seed=seed) for seed in (1, 2))
    return (gamma, beta) if per_channel else (gamma.to(x.dtype), beta.to(x.dtype))


def _planes(rows: Tensor, x: Tensor) -> Tensor:
    return rows[..., None, None].to(x.dtype)


def _norm_relu(x: Tensor) -> Tensor:
    return instance_norm_act(x, act="relu")


def _norm_relu_eager(x: Tensor) -> Tensor:
    return F.relu(F.instance_norm(x))


def _adain_relu(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return adain(x, gamma, beta, act="relu")


def _adain_eager(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.instance_norm(x) * _planes(gamma, x) + _planes(beta, x)


def _adain_relu_eager(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return F.relu(_adain_eager(x, gamma, beta))


def _sft(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return sft(x, gamma, beta, one_plus=False)


def _sft_eager(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return x * gamma + beta


FORMS: dict[str, tuple[Function, Function]] = {
    "in relu": (_norm_relu, _norm_relu_eager),
    "adain": (adain, _adain_eager),
    "adain relu": (_adain_relu, _adain_relu_eager),
    "sft": (_sft, _sft_eager),
}


def _build(form: str, channels: int, side: int, dtype: torch.dtype) -> Case:
    x = draw(1, channels, side, side).to(dtype)
    operands = () if form == "in relu" else _operands(x, per_channel=form != "sft")
    return _case((x, *operands), *FORMS[form])


def _decoder(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return norm_modulate(x, gamma, beta, act="lrelu")


def _decoder_eager(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    if gamma.dim() == 2:
        gamma, beta = _planes(gamma, x), _planes(beta, x)
    return F.leaky_relu(F.instance_norm(x) * (1 + gamma) + beta, 0.2)


def _build_decoder(per_channel: bool, channels: int, side: int, dtype: torch.dtype) -> Case:
    x = draw(1, channels, side, side).to(dtype)
    return _case((x, *_operands(x, per_channel)), _decoder, _decoder_eager)


# Every normalised or modulated layer of a 512 px MaskGAN generator, the widest map first: instance norm on the way down
# and up, AdaIN in the residual blocks, with the ReLU and before the sum, and SFT, without a norm, in the style encoder.
LAYERS = {
    f"{form} {channels}@{side}": (form, channels, side)
    for form, channels, side in (
        ("in relu", 64, 512), ("in relu", 128, 256), ("in relu", 256, 128), ("in relu", 512, 64), ("in relu", 1024, 32),
        ("adain relu", 1024, 32), ("adain", 1024, 32), ("sft", 64, 128), ("sft", 64, 16),
    )
}  # fmt: skip
# A decoder's layers with a leaky ReLU behind them: maps as in SPADE, and a style's rows as in AdaIN.
DECODER = ((128, 128), (512, 32), (64, 256))
BENCHMARKS = [
    Benchmark("norm_modulate", _build, LAYERS, ("sft", 5, 12), {"forward": 6.0}),
    *(
        Benchmark(
            op, _build_decoder, {f"{c}@{side}": (rows, c, side) for c, side in DECODER}, (rows, 5, 12), {"forward": 7.0}
        )
        for op, rows in (("spade", False), ("adain", True))
    ),
]
