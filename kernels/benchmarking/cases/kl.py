# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor

from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of
from faceedit.kernels.kl import bernoulli_kl, gaussian_kl


def _bernoulli(logits: Tensor, target: Tensor) -> Tensor:
    return bernoulli_kl(logits, target, smoothing=0.05)


def _bernoulli_eager(logits: Tensor, target: Tensor) -> Tensor:
    """As it is usually written; not finite for saturated logits."""
    t, s = (target - 0.05).abs(), torch.sigmoid(logits.float())
    return (t * torch.log(t / s) + (1 - t) * torch.log((1 - t) / (1 - s))).mean(1)


def _build_bernoulli(samples: int, attributes: int, dtype: torch.dtype) -> Case:
    logits = draw(samples, attributes).to(dtype)
    target = (draw(samples, attributes, seed=1) > 0).float()
    read = size_of(logits, target)
    # The usual formula loses digits where both distributions are close.
    return Case(
        (logits, target), _bernoulli, _bernoulli_eager, (read, 2 * read + size_of(logits)), wanted=(0,),
        tolerance=(1e-5, 2e-2 if dtype == torch.bfloat16 else 1e-5),
    )  # fmt: skip


def _gaussian_eager(mu: Tensor, logvar: Tensor) -> Tensor:
    m, v = mu.float(), logvar.float()
    return 0.5 * (m * m + v.exp() - 1 - v).sum(1)


def _build_gaussian(samples: int, width: int, dtype: torch.dtype) -> Case:
    mu, logvar = (draw(samples, width, seed=seed).to(dtype) for seed in range(2))
    size = size_of(mu, logvar)
    tolerance = (1e-5, 2e-2 if dtype == torch.bfloat16 else 1e-5)
    return Case((mu, logvar), gaussian_kl, _gaussian_eager, (size, 3 * size), tolerance=tolerance)


BENCHMARKS = [
    Benchmark("bernoulli_kl", _build_bernoulli, {"1x40": (1, 40), "32x40": (32, 40)}, (2, 5), {"forward": 4.0}),
    Benchmark("gaussian_kl", _build_gaussian, {"8x1024": (8, 1024), "64x1024": (64, 1024)}, (2, 5), {"forward": 4.0}),
]
