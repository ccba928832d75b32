# SPDX-License-Identifier: Apache-2.0
"""The synthesis network of StyleGAN2 (config f, skip architecture) with random frozen weights, in two formulations.

`nvlabs_form` computes as NVlabs' code does: weights modulated and demodulated per sample, one grouped convolution for
the batch (or, `fused=False`, scaled activations and a shared one), then the FIR filter, the noise, and bias and
activation, each in a pass of its own over NCHW tensors. `our_form` calls one op a layer on channels_last tensors.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels.benchmarking.case import draw, frozen
from faceedit.kernels.fir_epilogue import fir_epilogue
from faceedit.kernels.modulated_conv2d import modulated_conv2d
from faceedit.kernels.upfirdn2d import setup_filter

GAIN = math.sqrt(2)
FIR = (1.0, 3.0, 3.0, 1.0)
WIDTH = 512  # the most channels, and the numbers in a style
CHANNEL_BASES = {256: 16384, 1024: 32768}  # of the published networks of that many px


def maps(least_px: int) -> list[tuple[int, int]]:
    """Return (channels, side) of every layer of side `least_px` or more of these networks, once each, widest first."""
    found = {
        (min(base // (1 << power), WIDTH), 1 << power)
        for px, base in CHANNEL_BASES.items()
        for power in range(least_px.bit_length() - 1, px.bit_length())
    }
    return sorted(found, key=lambda shape: (-shape[1], shape[0]))


@dataclass(frozen=True, slots=True)
class Layer:
    """A convolution, or a ToRGB (`rgb`): its frozen parameters and where it stands."""

    side: int  # of its output
    weight: Tensor
    affine: Tensor  # (I, width): style from w
    offset: Tensor  # (I), the affine's bias
    bias: Tensor
    strength: Tensor
    up: int = 1
    rgb: bool = False

    def style(self, w: Tensor) -> Tensor:
        return torch.addmm(self.offset, w, self.affine.t())


@dataclass(frozen=True, slots=True)
class Network:
    """constant: the learned input (1,C,4,4). layers in order: every resolution ends with its ToRGB.

    taps (4,4), fir (4): the filter of `nvlabs_form` and of `our_form`. Made of Python's numbers in every pass, it would
    be a copy that a GPU waits for and that no CUDA graph can hold.
    """

    constant: Tensor
    layers: tuple[Layer, ...]
    taps: Tensor
    fir: Tensor

    def convolutions(self) -> Iterator[Layer]:
        return (layer for layer in self.layers if not layer.rgb)

    def to(self, device: torch.device, dtype: torch.dtype) -> "Network":
        """Return the network on a device, the weights of its convolutions in `dtype`."""
        moved = (
            replace(
                layer,
                weight=frozen(layer.weight.to(device, dtype)),
                affine=layer.affine.to(device),
                offset=layer.offset.to(device),
                bias=layer.bias.to(device),
                strength=layer.strength.to(device),
            )
            for layer in self.layers
        )
        return Network(self.constant.to(device), tuple(moved), self.taps.to(device), self.fir.to(device))


def build(side: int, base: int, width: int) -> Network:
    """Return a network of `side` px with min(base / resolution, width) channels and `width` numbers in a style."""

    def channels(resolution: int) -> int:
        return min(base // resolution, width)

    layers: list[Layer] = []

    def add(resolution: int, inputs: int, outputs: int, taps: int, **kind: int | bool) -> None:
        seed = 10 * len(layers)
        weight = frozen(draw(outputs, inputs, taps, taps, seed=seed))
        affine = draw(inputs, width, seed=seed + 1) / math.sqrt(width)
        bias, strength = 0.1 * draw(outputs, seed=seed + 2), torch.tensor(0.1)
        layers.append(Layer(resolution, weight, affine, torch.ones(inputs), bias, strength, **kind))  # type: ignore[arg-type]

    for power in range(2, side.bit_length()):
        resolution = 1 << power
        c = channels(resolution)
        if resolution > 4:
            add(resolution, channels(resolution // 2), c, 3, up=2)
        add(resolution, c, c, 3)
        add(resolution, c, 3, 1, rgb=True)
    return Network(draw(1, channels(4), 4, 4, seed=1), tuple(layers), upsampling_taps(), setup_filter(FIR))


def upsampling_taps(device: torch.device | None = None) -> Tensor:
    """Return the FIR filter (4,4) fp32 with the gain of upsampling by 2 along both axes."""
    taps = torch.tensor(FIR, device=device)
    taps = taps[:, None] * taps[None, :]
    return taps * (4 / taps.sum())


def inputs(network: Network, batch: int) -> tuple[Tensor, ...]:
    """Return ws (N, layers, width), one style a layer, and the noise map (1,1,H,W) of every convolution."""
    width = network.layers[0].affine.shape[1]
    ws = draw(batch, len(network.layers), width, seed=2)
    maps = (draw(1, 1, layer.side, layer.side, seed=3 + i) for i, layer in enumerate(network.convolutions()))
    return ws, *maps


def flops(network: Network, batch: int) -> int:
    """Return the arithmetic of the forward convolutions; a transposed one works on its input's grid."""
    return batch * sum(2 * layer.weight.numel() * (layer.side // layer.up) ** 2 for layer in network.layers)


def moved_bytes(network: Network, batch: int, element: int) -> int:
    """Return what a forward pass moves at least: every convolution's weight, input, output and noise map once."""
    total = 0
    for layer in network.convolutions():
        outputs, inputs = layer.weight.shape[:2]
        values = layer.weight.numel() + batch * (inputs * (layer.side // layer.up) ** 2 + outputs * layer.side**2)
        total += values * element + 4 * layer.side**2
    return total + 4 * batch * 3 * network.layers[-1].side ** 2


# NVlabs' formulation


def _filter(x: Tensor, taps: Tensor, pad: Sequence[int]) -> Tensor:
    c = x.shape[1]
    return F.conv2d(F.pad(x, list(pad)), taps.to(x.dtype)[None, None].expand(c, 1, 4, 4), groups=c)


def _upsample(image: Tensor, taps: Tensor) -> Tensor:
    n, c, h, w = image.shape
    stuffed = F.pad(image.reshape(n, c, h, 1, w, 1), [0, 1, 0, 0, 0, 1]).reshape(n, c, 2 * h, 2 * w)
    return _filter(stuffed, taps, (2, 1, 2, 1))


def _convolve(x: Tensor, weight: Tensor, taps: Tensor, up: int, groups: int) -> Tensor:
    """Convolve with a weight (groups * O, I, k, k)."""
    if up == 1:
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)
    per_sample = weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    return _filter(F.conv_transpose2d(x, per_sample, stride=2, groups=groups), taps, (1, 1, 1, 1))


def _modulated(x: Tensor, layer: Layer, style: Tensor, taps: Tensor, fused: bool) -> Tensor:
    n, inputs, weight = x.shape[0], x.shape[1], layer.weight
    if layer.rgb:
        style = style / math.sqrt(inputs)
    demodulation = None
    modulated = weight[None] * style[:, None, :, None, None]
    if not layer.rgb:
        demodulation = (modulated.square().sum((2, 3, 4)) + 1e-8).rsqrt()
    if fused:
        if demodulation is not None:
            modulated = modulated * demodulation[:, :, None, None, None]
        grouped = modulated.to(x.dtype).flatten(0, 1)
        y = _convolve(x.reshape(1, n * inputs, *x.shape[2:]), grouped, taps, layer.up, n)
        return y.reshape(n, -1, *y.shape[2:])
    y = _convolve(x * style.to(x.dtype)[:, :, None, None], weight.to(x.dtype), taps, layer.up, 1)
    return y if demodulation is None else y * demodulation.to(x.dtype)[:, :, None, None]


def nvlabs_form(
    network: Network, ws: Tensor, noises: Sequence[Tensor], fused: bool = True, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return the image (N,3,H,W) fp32; activations have `dtype`."""
    x = network.constant.to(dtype).expand(ws.shape[0], -1, -1, -1)
    maps, image = iter(noises), None
    for layer, w in zip(network.layers, ws.unbind(1), strict=True):
        y = _modulated(x, layer, layer.style(w), network.taps, fused)
        bias = layer.bias.to(dtype)[None, :, None, None]
        if layer.rgb:
            rgb = (y + bias).float()
            image = rgb if image is None else _upsample(image, network.taps).add_(rgb)
            continue
        y = y.add_((next(maps) * layer.strength).to(dtype))
        x = F.leaky_relu(y + bias, 0.2) * GAIN
    assert image is not None
    return image


# On this library


def our_form(network: Network, ws: Tensor, noises: Sequence[Tensor]) -> Tensor:
    """Return the same image; activations have the dtype of the network's weights, images and sums fp32."""
    dtype = network.layers[0].weight.dtype
    x = network.constant.to(dtype).expand(ws.shape[0], -1, -1, -1).contiguous(memory_format=torch.channels_last)
    maps = iter(noises)
    image: Tensor | None = None
    styles = [layer.style(w) for layer, w in zip(network.layers, ws.unbind(1), strict=True)]
    for index, layer in enumerate(network.layers):
        if layer.rgb:
            continue
        # A resolution's last convolution is followed by its ToRGB, whose sums the same pass makes.
        to_rgb = network.layers[index + 1] if network.layers[index + 1].rgb else None
        result = modulated_conv2d(
            x,
            layer.weight,
            styles[index],
            noise=next(maps),
            strength=layer.strength,
            bias=layer.bias,
            up=layer.up,
            rgb_weight=None if to_rgb is None else to_rgb.weight[:, :, 0, 0].float(),
            rgb_styles=None if to_rgb is None else styles[index + 1] / math.sqrt(to_rgb.weight.shape[1]),
        )
        if isinstance(result, Tensor):
            x = result
            continue
        x, rgb = result
        assert to_rgb is not None
        if image is None:
            image = rgb + to_rgb.bias[None, :, None, None]
        else:
            image = fir_epilogue(
                image, network.fir, up=2, pad=(2, 1, 2, 1), fir_gain=4.0, bias=to_rgb.bias, act="linear", add=rgb
            )
    assert image is not None
    return image
