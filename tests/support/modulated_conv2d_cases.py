# SPDX-License-Identifier: Apache-2.0
"""Layers of modulated_conv2d, and their comparison with float64."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.compare import assert_close
from support.kernel_cases import Place, draw, run
from torch import Tensor

from faceedit.kernels import modulated_conv2d_parts as parts
from faceedit.kernels import native
from faceedit.kernels.modulated_conv2d import modulated_conv2d, reference

NAMES = ("x", "weight", "styles", "noise", "strength", "bias", "rgb_weight", "rgb_styles")
OP = torch.ops.faceedit.modulated_conv2d.default
RESAMPLINGS = [(1, 1), (2, 1), (1, 2)]
# Relative L2 against fp64, of outputs and of gradients. The half types round the scaled input, the convolution's result
# and the output, 2^-11 and 2^-8 each; fp32 adds up to 9 I products.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float16: (5e-3, 2e-2), torch.bfloat16: (1e-2, 5e-2)}
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")
FASTEST = Place("cpu") if native.build_report()["cpp"] else Place("eager")


def inputs(
    n: int = 2, i: int = 5, o: int = 7, h: int = 6, w: int = 5, k: int = 3, up: int = 1, down: int = 1, rgb: bool = True
) -> list[Tensor | None]:
    """Operands in the order of NAMES, float32. The noise is positive: its gradients do not cancel."""
    height, width = parts.Geometry(k, up, down).output_size(h, w)
    return [
        draw(n, i, h, w, seed=1),
        draw(o, i, k, k, seed=2) / k,
        draw(n, i, seed=3) + 1,
        draw(n if n % 2 == 0 else 1, 1, height, width, seed=4, low=0.5),
        torch.tensor(0.3),
        draw(o, seed=5),
        draw(3, o, seed=6) if rgb else None,
        draw(n, o, seed=7, low=0.5) if rgb else None,
    ]


def call(function: Callable[..., Any] = modulated_conv2d, **options: Any) -> Callable[..., Tensor]:
    """Make a function of the operands by position that returns y and rgb in one vector: both are compared at once."""

    def together(*tensors: Tensor | None) -> Tensor:
        operands = dict(zip(NAMES, tensors, strict=False))
        found = function(**operands, **options)
        if isinstance(found, Tensor):
            return found
        return torch.cat([found[0].flatten().float(), found[1].flatten()])

    return together


def oracle(**options: Any) -> Callable[..., Tensor]:
    o = {"up": 1, "down": 1, "demodulate": True, "act": "lrelu", "slope": 0.2, "gain": 2**0.5, "clamp": -1.0} | options

    def together(*tensors: Tensor | None) -> Tensor:
        t = dict(zip(NAMES, tensors, strict=False))
        y, rgb, _, _ = reference(
            t["x"], t["weight"], t["styles"], t.get("noise"), t.get("strength"), t.get("bias"), options.get("fir"),
            t.get("rgb_weight"), t.get("rgb_styles"),
            o["up"], o["down"], o["demodulate"], o["act"], o["slope"], o["gain"], o["clamp"],
        )  # fmt: skip
        return y if t.get("rgb_weight") is None else torch.cat([y.flatten(), rgb.flatten()])

    return together


def away_from_kinks(tensors: list[Tensor | None], **options: Any) -> list[Tensor | None]:
    """Move the noise of pixels where some |z| is small: there the gradient is a matter of rounding."""
    noise = tensors[3]
    assert noise is not None
    geometry = {key: options.get(key, default) for key, default in (("up", 1), ("down", 1), ("demodulate", True))}
    limits = [options.get("clamp", -1.0)] if options.get("clamp", -1.0) >= 0 else []
    limits = [0.0, *limits, *(-5 * limit for limit in limits)]
    for _ in range(40):
        plain = [None if t is None else t.double() for t in (*tensors[:3], noise, *tensors[4:6])]
        z = oracle(act="linear", gain=2**0.5, **geometry)(*plain)
        near = torch.stack([(z - limit).abs() < 2e-2 for limit in limits]).any(0).any(1, keepdim=True)
        if noise.shape[0] == 1:
            near = near.any(0, keepdim=True)
        if not near.any():
            break
        noise = torch.where(near, noise + 0.137, noise)
    return [*tensors[:3], noise, *tensors[4:]]


def check(
    place: Place, tensors: list[Tensor | None], dtype: torch.dtype, fmt: torch.memory_format, **options: Any
) -> None:
    """Compare outputs and all gradients with autograd of the reference in float64."""
    x = tensors[0]
    assert x is not None
    tensors = [x.to(dtype).contiguous(memory_format=fmt), *tensors[1:]]
    _compare(place, NAMES, call(**options), oracle(**options), tensors)


def _compare(
    place: Place,
    names: Sequence[str],
    function: Callable[..., Tensor],
    expected_of: Callable[..., Tensor],
    tensors: Sequence[Tensor | None],
) -> None:
    """Compare a function's output and its gradients to all tensors with those of another in float64."""
    wide = [None if t is None else t.double().requires_grad_() for t in tensors]
    expected = expected_of(*wide)
    seeds = draw(*expected.shape, seed=99, low=0.5)
    leaves = [t for t in wide if t is not None]
    found = iter(torch.autograd.grad(expected, leaves, seeds.double(), materialize_grads=True))
    y, gradients = run(place, function, tensors, seeds)
    assert tensors[0] is not None
    forward, backward = TOLERANCE[tensors[0].dtype]
    assert_close("output", y, expected, relative_l2=forward)
    for name, leaf, actual in zip(names, wide, gradients, strict=True):
        if leaf is not None:
            assert actual is not None
            assert_close(f"gradient of {name}", actual, next(found), relative_l2=backward)


def check_frozen(place: Place, tensors: list[Tensor | None], dtype: torch.dtype, **options: Any) -> None:
    """Compare y, rgb and every gradient but the weight's, which is frozen, with float64's; x is channels_last."""
    names = [name for name in NAMES if name != "weight"]
    x, weight, *rest = tensors
    assert x is not None
    assert weight is not None
    given = [x.to(dtype).contiguous(memory_format=torch.channels_last), *rest]
    frozen = weight.to(place.device)

    def with_weight(function: Any, w: Tensor) -> Any:
        def together(x: Tensor, *others: Tensor | None) -> Tensor:
            found = function(x, w, *others)
            return found if isinstance(found, Tensor) else torch.cat([f.flatten().float() for f in found])

        return together

    def layer(x: Tensor, w: Tensor, *others: Tensor | None) -> Any:
        operands = dict(zip(names[1:], others, strict=True))
        return modulated_conv2d(x, w, **operands, **options)  # type: ignore[arg-type]

    _compare(place, names, with_weight(layer, frozen), with_weight(oracle(**options), weight.double()), given)
