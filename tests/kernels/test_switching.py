# SPDX-License-Identifier: Apache-2.0
"""Each row of docs/kernels/switching.md, computed by the other library's definition and by ours.

The definitions are written here from what those ops are documented to compute, in plain PyTorch and float64:
explicit sums, no code of theirs and none of ours.
"""

import math
import re
from collections.abc import Callable, Sequence

import pytest
import torch
from support.compare import assert_close
from support.kernel_cases import draw
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels import (
    downsample2d,
    filter2d,
    fir_epilogue,
    modulated_conv2d,
    noise_bias_act,
    noise_regularizer,
    normalize_noise_,
    setup_filter,
    upfirdn2d,
    upsample2d,
)

ROOT2 = math.sqrt(2)
TAPS = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64)
PLANE = TAPS[:, None] * TAPS[None, :] / 64
ODD = torch.arange(12.0, dtype=torch.float64).reshape(3, 4) - 4  # neither symmetric nor separable

X = draw(2, 5, 8, 6, seed=1)
BIAS, NOISE = draw(5, seed=2), draw(2, 1, 8, 6, seed=3)
WEIGHT, STYLES = draw(7, 5, 3, 3, seed=4), draw(2, 5, seed=5) + 1
POINT, OUT_BIAS = draw(3, 5, 1, 1, seed=6), draw(7, seed=7)
# In the shapes that the other libraries keep.
NOISE_CONST, RGB_BIAS, DCOEFS = NOISE[0, 0], OUT_BIAS[:3].view(1, 3, 1, 1), STYLES[:, :, None, None]

Row = tuple[Callable[[], Tensor], Callable[[], Tensor]]
ROWS: dict[str, Row] = {}


def row(there: str, theirs: Callable[[], Tensor], ours: Callable[[], Tensor]) -> None:
    ROWS[there] = (theirs, ours)


def activated(x: Tensor, act: str, gain: float, slope: float = 0.2, clamp: float | None = None) -> Tensor:
    formulas = {
        "linear": lambda z: z,
        "relu": lambda z: z * (z > 0),
        "lrelu": lambda z: torch.where(z > 0, z, slope * z),
        "swish": lambda z: z / (1 + torch.exp(-z)),
    }
    y = formulas[act](x.double()) * gain
    return y if clamp is None else torch.where(y.abs() > clamp, clamp * y.sign(), y)


def per_channel(b: Tensor) -> Tensor:
    return b.double()[None, :, None, None]


def fir_by_definition(
    x: Tensor, f: Tensor, up: int = 1, down: int = 1, pad: Sequence[int] = (0, 0, 0, 0), correlate: bool = False
) -> Tensor:
    """Zeros, padding or cropping, a sum over the taps, and every down-th sample; pad is x0, x1, y0, y1."""
    n, c, h, w = x.shape
    stuffed = torch.zeros(n, c, h * up, w * up, dtype=torch.float64)
    stuffed[:, :, ::up, ::up] = x.double()
    padded = F.pad(stuffed, list(pad))
    f = f.double() if correlate else f.double().flip(0, 1)
    height, width = padded.shape[2] - f.shape[0] + 1, padded.shape[3] - f.shape[1] + 1
    y = torch.zeros(n, c, height, width, dtype=torch.float64)
    for i in range(f.shape[0]):
        for j in range(f.shape[1]):
            y += f[i, j] * padded[:, :, i : i + height, j : j + width]
    return y[:, :, ::down, ::down]


def convolved(x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool = True, up: int = 1, down: int = 1) -> Tensor:
    """One sample after the other, with a weight of its own."""
    samples = []
    for sample, style in zip(x.double(), styles.double(), strict=True):
        w = weight.double() * style[None, :, None, None]
        if demodulate:
            w = w / (w.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if up == 2:
            wide = F.conv_transpose2d(sample[None], w.transpose(0, 1), stride=2)
            y = fir_by_definition(wide, 4 * PLANE, pad=(1, 1, 1, 1))
        elif down == 2:
            y = F.conv2d(fir_by_definition(sample[None], PLANE, pad=(2, 2, 2, 2)), w, stride=2)
        else:
            y = F.conv2d(sample[None], w, padding=weight.shape[-1] // 2)
        samples.append(y)
    return torch.cat(samples)


BIASED = X.double() + per_channel(BIAS)
row(
    "NVlabs `bias_act(x, b, act='lrelu')`",
    lambda: activated(BIASED, "lrelu", ROOT2),
    lambda: noise_bias_act(X, bias=BIAS, gain=2**0.5),
)
row(
    "NVlabs `bias_act(x, b, act='relu')`",
    lambda: activated(BIASED, "relu", ROOT2),
    lambda: noise_bias_act(X, bias=BIAS, act="relu", gain=2**0.5),
)
row(
    "NVlabs `bias_act(x, b, act='swish')`",
    lambda: activated(BIASED, "swish", ROOT2),
    lambda: noise_bias_act(X, bias=BIAS, act="silu", gain=2**0.5),
)
row(
    "NVlabs `bias_act(x, b)`",
    lambda: activated(BIASED, "linear", 1),
    lambda: noise_bias_act(X, bias=BIAS, act="linear"),
)
row(
    "NVlabs `bias_act(x, b, act='lrelu', alpha=a, gain=g, clamp=c)`",
    lambda: activated(BIASED, "lrelu", 1.7, 0.1, 0.9),
    lambda: noise_bias_act(X, bias=BIAS, slope=0.1, gain=1.7, clamp=0.9),
)
row(
    "NVlabs `fma(x, dcoefs, noise)`",
    lambda: X.double() * DCOEFS.double() + NOISE.double(),
    lambda: noise_bias_act(X, DCOEFS.flatten(1), NOISE, act="linear"),
)
row(
    "rosinality `fused_leaky_relu(x, b, slope, scale)`",
    lambda: activated(BIASED, "lrelu", 1.3, 0.3),
    lambda: noise_bias_act(X, bias=BIAS, slope=0.3, gain=1.3),
)
row(
    "rosinality `NoiseInjection`",
    lambda: X.double() + 0.3 * NOISE.double(),
    lambda: noise_bias_act(X, noise=NOISE, strength=torch.tensor([0.3]), act="linear"),
)


def whole(f: Tensor) -> Tensor:
    """A filter as both axes show it."""
    return f if f.dim() == 2 else f[:, None] * f[None, :]


F4 = PLANE.float()
row("NVlabs `setup_filter([1, 3, 3, 1])`", lambda: PLANE, lambda: whole(setup_filter([1, 3, 3, 1])))
row(
    "NVlabs `upfirdn2d(x, f, up, down, padding=[x0, x1, y0, y1], flip_filter=flip, gain=g)`",
    lambda: fir_by_definition(X, 1.5 * ODD, 2, 2, (3, -1, 2, 0), correlate=True),
    lambda: upfirdn2d(X, ODD.float(), 2, 2, [3, -1, 2, 0], 1.5, True),
)
row(
    "NVlabs `filter2d(x, f, padding=p)`",
    lambda: fir_by_definition(X, ODD, pad=(3, 2, 2, 2)),
    lambda: filter2d(X, ODD.float(), 1),
)
row(
    "NVlabs `upsample2d(x, f)`",
    lambda: fir_by_definition(X, 4 * PLANE, 2, 1, (2, 1, 2, 1)),
    lambda: upsample2d(X, F4),
)
row(
    "NVlabs `downsample2d(x, f)`",
    lambda: fir_by_definition(X, PLANE, 1, 2, (1, 1, 1, 1)),
    lambda: downsample2d(X, F4),
)
SKIP = draw(2, 5, 16, 12, seed=8)
row(
    "NVlabs `upsample2d(img, f) + y`",
    lambda: fir_by_definition(X, 4 * PLANE, 2, 1, (2, 1, 2, 1)) + SKIP.double(),
    lambda: fir_epilogue(X, F4, up=2, pad=(2, 1, 2, 1), fir_gain=4, act="linear", add=SKIP),
)
row("rosinality `make_kernel([1, 3, 3, 1])`", lambda: PLANE, lambda: whole(setup_filter([1, 3, 3, 1])))
row(
    "rosinality `upfirdn2d(x, kernel, up, down, pad=(p0, p1))`",
    lambda: fir_by_definition(X, ODD, 2, 1, (2, 1, 2, 1)),
    lambda: upfirdn2d(X, ODD.float(), 2, 1, (2, 1, 2, 1)),
)
row(
    "rosinality `Upsample([1, 3, 3, 1])`",
    lambda: fir_by_definition(X, 4 * PLANE, 2, 1, (2, 1, 2, 1)),
    lambda: upsample2d(X, setup_filter([1, 3, 3, 1])),
)
row(
    "rosinality `Downsample([1, 3, 3, 1])`",
    lambda: fir_by_definition(X, PLANE, 1, 2, (1, 1, 1, 1)),
    lambda: downsample2d(X, setup_filter([1, 3, 3, 1])),
)
row(
    "rosinality `Blur([1, 3, 3, 1], pad=(1, 1), upsample_factor=2)`",
    lambda: fir_by_definition(X, 4 * PLANE, pad=(1, 1, 1, 1)),
    lambda: upfirdn2d(X, setup_filter([1, 3, 3, 1]), pad=1, gain=4),
)

row(
    "NVlabs `modulated_conv2d(x, w, s, noise, padding=1)`",
    lambda: convolved(X, WEIGHT, STYLES) + NOISE_CONST.double(),
    lambda: modulated_conv2d(X, WEIGHT, STYLES, noise=NOISE_CONST[None, None], act="linear", gain=1),
)
row(
    "NVlabs `modulated_conv2d(x, w, s, up=2, padding=1, resample_filter=f, flip_weight=False)`",
    lambda: convolved(X, WEIGHT, STYLES, up=2),
    lambda: modulated_conv2d(X, WEIGHT, STYLES, up=2, act="linear", gain=1),
)
row(
    "NVlabs `modulated_conv2d(x, w, s, down=2, padding=1, resample_filter=f)`",
    lambda: convolved(X, WEIGHT, STYLES, down=2),
    lambda: modulated_conv2d(X, WEIGHT, STYLES, down=2, act="linear", gain=1),
)
row(
    "NVlabs `modulated_conv2d(x, w, s, demodulate=False)`",
    lambda: convolved(X, POINT, STYLES, demodulate=False),
    lambda: modulated_conv2d(X, POINT, STYLES, demodulate=False, act="linear", gain=1),
)
row(
    "NVlabs `modulated_conv2d(x, w, s, padding=1, flip_weight=False)`",
    lambda: convolved(X, WEIGHT.flip(2, 3), STYLES),
    lambda: modulated_conv2d(X, WEIGHT.flip(2, 3), STYLES, act="linear", gain=1),
)
row(
    "NVlabs `SynthesisLayer`",
    lambda: activated(
        convolved(X, WEIGHT, STYLES) + 0.3 * NOISE_CONST.double() + per_channel(OUT_BIAS), "lrelu", ROOT2
    ),
    lambda: modulated_conv2d(
        X, WEIGHT, STYLES, noise=NOISE_CONST[None, None], strength=torch.tensor(0.3), bias=OUT_BIAS
    ),
)
SCALE = 1 / math.sqrt(5 * 9)
RAW = WEIGHT[None]  # rosinality's parameter has a leading axis
row(
    "rosinality `ModulatedConv2d`",
    lambda: convolved(X, SCALE * WEIGHT.double(), STYLES),
    lambda: modulated_conv2d(X, SCALE * RAW[0], STYLES, act="linear", gain=1),
)
row(
    "rosinality `ModulatedConv2d(upsample=True)`",
    lambda: convolved(X, SCALE * WEIGHT.double(), STYLES, up=2),
    lambda: modulated_conv2d(X, SCALE * RAW[0], STYLES, up=2, act="linear", gain=1),
)
row(
    "rosinality `StyledConv`",
    lambda: activated(
        convolved(X, SCALE * WEIGHT.double(), STYLES) + 0.3 * NOISE.double() + per_channel(OUT_BIAS), "lrelu", ROOT2
    ),
    lambda: modulated_conv2d(X, SCALE * RAW[0], STYLES, noise=NOISE, strength=torch.tensor([0.3]), bias=OUT_BIAS),
)
row(
    "rosinality `ToRGB`",
    lambda: convolved(X, POINT.double() / math.sqrt(5), STYLES, demodulate=False) + per_channel(OUT_BIAS[:3]),
    lambda: modulated_conv2d(
        X, POINT / math.sqrt(5), STYLES, bias=RGB_BIAS.flatten(), demodulate=False, act="linear", gain=1
    ),
)


MAPS = [draw(1, 1, side, side, seed=9 + side, low=0.1) for side in (8, 16, 32)]


def autocorrelation() -> Tensor:
    """Neighbours' mean products squared, over levels that halve until a side is at most 8."""
    total = torch.zeros((), dtype=torch.float64)
    for noise in MAPS:
        level = noise.double()
        while True:
            for axis in (2, 3):
                size = level.shape[axis]
                previous = level.index_select(axis, (torch.arange(size) - 1) % size)
                total += (level * previous).mean() ** 2
            if level.shape[2] <= 8:
                break
            level = F.avg_pool2d(level, 2)
    return total


def normalized() -> Tensor:
    maps = [noise.double() for noise in MAPS]
    return torch.cat([((noise - noise.mean()) / noise.std()).flatten() for noise in maps])


def normalized_in_place() -> Tensor:
    maps = [noise.clone() for noise in MAPS]
    normalize_noise_(maps)
    return torch.cat([noise.flatten() for noise in maps])


row("rosinality `noise_regularize(noises)`", autocorrelation, lambda: noise_regularizer(MAPS).sum())
row("rosinality `noise_normalize_(noises)`", normalized, normalized_in_place)


@pytest.mark.parametrize("there", ROWS)
def test_row_gives_the_same(there: str) -> None:
    theirs, ours = ROWS[there]
    assert_close(there, ours(), theirs(), relative_l2=2e-6)


@pytest.fixture
def page(request: pytest.FixtureRequest) -> dict[str, str]:
    """The page's right column by its left one."""
    text = (request.config.rootpath / "docs" / "kernels" / "switching.md").read_text()
    table = text.split("## Without a counterpart")[0]
    return dict(re.findall(r"^\| ((?:NVlabs|rosinality) .*?) \| (.*) \|$", table, re.MULTILINE))


def test_every_row_of_the_page_is_here(page: dict[str, str]) -> None:
    assert set(page) == set(ROWS)


@pytest.mark.parametrize(
    ("there", "operands"),
    [
        ("NVlabs `fma(x, dcoefs, noise)`", {"x": X, "dcoefs": DCOEFS, "noise": NOISE}),
        (
            "NVlabs `modulated_conv2d(x, w, s, noise, padding=1)`",
            {"x": X, "w": WEIGHT, "s": STYLES, "noise": NOISE_CONST},
        ),
    ],
)
def test_the_cell_itself_takes_the_operands_of_the_other_library(
    page: dict[str, str], there: str, operands: dict[str, Tensor]
) -> None:
    assert_close(there, eval(page[there].strip("`"), globals() | operands), ROWS[there][0](), relative_l2=2e-6)


def test_nan_passes_the_clamp() -> None:
    x = torch.full((1, 1, 1, 2), math.nan)
    assert noise_bias_act(x, clamp=1.0).isnan().all()
