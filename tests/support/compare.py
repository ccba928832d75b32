# SPDX-License-Identifier: Apache-2.0
"""Compare a tensor with its float64 oracle, and explain a failure instead of printing two tensors."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far `actual` is from `expected`.

    relative_l2: |a - e| / |e|, 0 where both are zero.  cosine: 1 for parallel tensors.  bias: mean signed error over
    mean magnitude (a systematic error shows here, a random one does not).  worst_*: the largest absolute error.
    """

    relative_l2: float
    cosine: float
    bias: float
    worst_index: tuple[int, ...]
    worst_error: float
    worst_pair: tuple[float, float]
    pattern_differs: int

    def __str__(self) -> str:
        actual, expected = self.worst_pair
        return (
            f"relative L2 {self.relative_l2:.3g}, cosine {self.cosine:.6f}, signed bias {self.bias:.3g}; worst at "
            f"{self.worst_index}: got {actual:.9g}, expected {expected:.9g} (error {self.worst_error:.3g}); "
            f"{self.pattern_differs} elements differ in being NaN or infinite"
        )


def compare(actual: Tensor, expected: Tensor) -> Comparison:
    """Measure `actual` against `expected` in float64. NaN agrees with NaN, an infinity with the same infinity."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} is not the expected {tuple(expected.shape)}")
    a, e = actual.detach().cpu().double(), expected.detach().cpu().double()
    regular = a.isfinite() & e.isfinite()
    same_special = (a.isnan() & e.isnan()) | (a == e)
    differs = int((~regular & ~same_special).sum())
    a, e = torch.where(regular, a, 0.0), torch.where(regular, e, 0.0)
    error = a - e
    if not error.numel():
        return Comparison(0.0, 1.0, 0.0, (), 0.0, (0.0, 0.0), differs)
    worst = int(error.abs().argmax())
    index = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    scale, length = float(e.norm()), float(a.norm())
    return Comparison(
        relative_l2=float(error.norm()) / scale if scale else (0.0 if not length else float("inf")),
        cosine=float((a * e).sum()) / (scale * length) if scale and length else float(scale == length),
        bias=float(error.mean() / e.abs().mean()) if scale else float(error.mean()),
        worst_index=index,
        worst_error=float(error.abs().max()),
        worst_pair=(float(a.flatten()[worst]), float(e.flatten()[worst])),
        pattern_differs=differs,
    )


def assert_close(
    name: str, actual: Tensor, expected: Tensor, *, relative_l2: float, absolute: float = float("inf")
) -> None:
    """Assert that `actual` is within both bounds of `expected`, with the same NaNs and infinities in the same places.

    A tensor whose oracle is zero (up to `1e-12`) is held to `relative_l2` as an absolute bound.
    """
    found = compare(actual, expected)
    tiny = (
        float(expected.detach().double().nan_to_num(posinf=0, neginf=0).abs().max()) < 1e-12 if expected.numel() else 0
    )
    distance = found.worst_error if tiny else found.relative_l2
    if found.pattern_differs or distance > relative_l2 or found.worst_error > absolute:
        raise AssertionError(f"{name} is off (bounds: relative L2 {relative_l2:.3g}, absolute {absolute:.3g}): {found}")
