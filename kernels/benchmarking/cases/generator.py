# SPDX-License-Identifier: Apache-2.0
"""The whole StyleGAN2 generator. The baseline is NVlabs' formulation in fp32, in the bf16 rows too."""

from collections.abc import Sequence

import torch
from torch import Tensor

from faceedit.kernels.benchmarking import stylegan2
from faceedit.kernels.benchmarking.case import PASSES, Benchmark, Case, Function

# Against the baseline's fp32. A gradient at slope 0.2 also holds the activations whose sign rounding decides.
TOLERANCE = {torch.float32: (1e-4, 1e-2), torch.bfloat16: (5e-2, 0.4)}


def _build(side: int, base: int, width: int, batch: int, wanted: str, dtype: torch.dtype) -> Case:
    networks = {(torch.device("cpu"), torch.float32): stylegan2.build(side, base, width)}

    def placed(ws: Tensor, kind: torch.dtype) -> stylegan2.Network:
        key = (ws.device, kind)
        if key not in networks:
            networks[key] = networks[torch.device("cpu"), torch.float32].to(*key)
        return networks[key]

    def ours(ws: Tensor, *noises: Tensor) -> Tensor:
        return stylegan2.our_form(placed(ws, dtype), ws, noises)

    def nvlabs(fused: bool, kind: torch.dtype) -> Function:
        def run(ws: Tensor, *noises: Tensor) -> Tensor:
            return stylegan2.nvlabs_form(placed(ws, torch.float32), ws, noises, fused, kind)

        return run

    others = {"nvlabs-form": nvlabs(True, torch.float32), "nvlabs-unfused": nvlabs(False, torch.float32)}
    if dtype != torch.float32:
        others["nvlabs-bf16"] = nvlabs(True, dtype)
    network = placed(torch.empty(0), torch.float32)
    inputs: Sequence[Tensor] = stylegan2.inputs(network, batch)
    moved = stylegan2.moved_bytes(network, batch, dtype.itemsize)
    flops = stylegan2.flops(network, batch)
    # Backward is one convolution a layer more, of the same size: the weights are frozen.
    return Case(
        inputs, ours, ours, (moved, 2 * moved), (flops, 2 * flops),
        wanted=(0,) if wanted == "ws" else tuple(range(1 if wanted == "noise" else 0, len(inputs))),
        others=others, baseline="nvlabs-form", tolerance=TOLERANCE[dtype],
        passes=PASSES if wanted == "ws" else PASSES[1:],
    )  # fmt: skip


LAYERS = {
    "256": (256, 16384, 512, 1, "ws"),
    "256 noise": (256, 16384, 512, 1, "noise"),
    "256 both": (256, 16384, 512, 1, "both"),
    "256 N4": (256, 16384, 512, 4, "ws"),
    "1024": (1024, 32768, 512, 1, "ws"),
    "1024 noise": (1024, 32768, 512, 1, "noise"),
    "1024 both": (1024, 32768, 512, 1, "both"),
}
TARGET = {
    "forward float32": 1.9, "forward+backward float32": 3.2, "forward bfloat16": 2.6, "forward+backward bfloat16": 4.6,
}  # fmt: skip
BENCHMARKS = [Benchmark("generator", _build, LAYERS, (16, 64, 8, 1, "ws"), TARGET)]
