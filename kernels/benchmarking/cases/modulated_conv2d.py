# SPDX-License-Identifier: Apache-2.0
import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels.benchmarking.case import Benchmark, Case, draw, size_of
from faceedit.kernels.modulated_conv2d import modulated_conv2d, reference


def _build(inside: int, outside: int, side: int, up: int, kernel: int, dtype: torch.dtype) -> Case:
    """Make a layer whose output has `side` pixels. The weight is frozen: no gradient to it is wanted."""
    to_rgb = kernel == 1
    act, gain = ("linear", 1.0) if to_rgb else ("lrelu", 2**0.5)
    # As the layer below gives it. Of inputs without a mean the styles' gradient is a small difference of large sums, in
    # bfloat16 a tenth off in every formulation.
    x = F.leaky_relu(draw(1, inside, side // up, side // up, channels_last=True), 0.2).mul_(2**0.5).to(dtype)
    weight = draw(outside, inside, kernel, kernel, seed=1)
    weight = weight / (inside**0.5 * kernel if to_rgb else 1.0)
    styles, bias, strength = draw(1, inside, seed=2) * 0.3 + 1, draw(outside, seed=3), torch.tensor(0.1)
    noise = draw(1, 1, side, side, seed=4)
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8

    def ours(x: Tensor, styles: Tensor, noise: Tensor, weight: Tensor, bias: Tensor, strength: Tensor) -> Tensor:
        if to_rgb:
            return modulated_conv2d(x, weight, styles, bias=bias, demodulate=False, act="linear", gain=1.0)  # type: ignore[return-value]
        return modulated_conv2d(x, weight, styles, noise=noise, strength=strength, bias=bias, up=up)  # type: ignore[return-value]

    def eager(x: Tensor, styles: Tensor, noise: Tensor, weight: Tensor, bias: Tensor, strength: Tensor) -> Tensor:
        map_, factor = (None, None) if to_rgb else (noise, strength)
        y, *_ = reference(
            x, weight, styles, map_, factor, bias, None, None, None, up, 1, not to_rgb, act, 0.2, gain, -1.0
        )  # fmt: skip
        return y

    def per_sample(x: Tensor, styles: Tensor, noise: Tensor, weight: Tensor, bias: Tensor, strength: Tensor) -> Tensor:
        """The usual formulation: a weight a sample, a grouped convolution, then FIR, noise and bias by themselves."""
        n, i, h, w = x.shape
        own = weight[None] * styles[:, None, :, None, None]
        if not to_rgb:
            own = own * (own.square().sum((2, 3, 4)) + 1e-8).rsqrt()[:, :, None, None, None]
        own = own.to(x.dtype)
        grouped = x.reshape(1, n * i, h, w)
        if up == 2:
            z = F.conv_transpose2d(grouped, own.transpose(1, 2).flatten(0, 1), stride=2, groups=n)
            kernel = (torch.outer(taps, taps) * 4).to(z).expand(z.shape[1], 1, 4, 4)
            z = F.conv2d(F.pad(z, [1, 1, 1, 1]), kernel, groups=z.shape[1])
        else:
            z = F.conv2d(grouped, own.flatten(0, 1), padding=kernel_padding, groups=n)
        z = z.reshape(n, outside, side, side)
        if to_rgb:
            return z + bias.to(z.dtype)[:, None, None]
        z = z + (noise * strength).to(z.dtype)
        return F.leaky_relu(z + bias.to(z.dtype)[:, None, None], 0.2) * gain

    kernel_padding = kernel // 2
    # Forward reads x and writes y; backward reads the gradient, y and x, and writes the gradient to x.
    image, out = size_of(x), outside * side * side * x.element_size()
    flops = 2 * inside * outside * kernel**2 * (side // up) ** 2
    wanted = (0, 1) if to_rgb else (0, 1, 2)
    return Case(
        (x, styles, noise, weight, bias, strength), ours, eager, (image + out, 3 * image + 3 * out),
        flops=(flops, 2 * flops), wanted=wanted, others={"per-sample": per_sample}, baseline="per-sample",
        tolerance=(2e-2, 0.1) if dtype == torch.bfloat16 else (1e-5, 1e-3), frozen=(3,),
    )  # fmt: skip


# The layers of a 256 and of a 1024 px StyleGAN2: in, out, side of the output, up, kernel.
LAYERS = {
    "conv 32@1024": (32, 32, 1024, 1, 3),
    "up 64-32@1024": (64, 32, 1024, 2, 3),
    "rgb 32@1024": (32, 3, 1024, 1, 1),
    "conv 128@256": (128, 128, 256, 1, 3),
    "up 128-64@256": (128, 64, 256, 2, 3),
    "conv 64@256": (64, 64, 256, 1, 3),
    "up 512-512@64": (512, 512, 64, 2, 3),
    "conv 512@64": (512, 512, 64, 1, 3),
    "conv 512@16": (512, 512, 16, 1, 3),
    "conv 512@4": (512, 512, 4, 1, 3),
}
TARGET = {"forward": 1.5, "forward+backward": 2.2}
BENCHMARKS = [Benchmark("modulated_conv2d", _build, LAYERS, (5, 7, 12, 2, 3), TARGET)]
