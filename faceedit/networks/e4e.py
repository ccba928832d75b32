# SPDX-License-Identifier: Apache-2.0
"""The e4e encoder (Tov et al. 2021): an aligned face to the W+ styles with which StyleGAN2 shows it.

    ws = encoder.encode(image);  again = G.synthesis(ws)

Modules keep the names of the released files, so that those are read as they are.
"""

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.networks.equal_linear import EqualLinear
from faceedit.networks.resizing import resize_square

_COARSE, _MIDDLE = 3, 7  # the first style read from the middle and from the finest map of the pyramid
_REDUCTION = 16


@dataclass(frozen=True, slots=True)
class E4EConfig:
    """Size of the encoder; the defaults are the released one's, for a generator of 1024 px.

    Args: size_px, input side, a power of two from 32; num_ws, w_width, styles of the generator; base_width, channels of
          the first stage, doubled from stage to stage; blocks, residual blocks of the four stages, each of which halves
          the size; head_width, channels of the style heads.
    """

    size_px: int = 256
    num_ws: int = 18
    w_width: int = 512
    base_width: int = 64
    blocks: tuple[int, int, int, int] = (3, 4, 14, 3)
    head_width: int = 512

    def __post_init__(self) -> None:
        if self.size_px < 32 or self.size_px & (self.size_px - 1):
            raise ValueError(f"E4EConfig: size_px must be a power of two from 32, got {self.size_px}; choose another")
        if len(self.blocks) != 4 or min(self.blocks) < 1:
            raise ValueError(f"E4EConfig: blocks must be four positive numbers, got {self.blocks}; see the default")
        if min(self.num_ws, self.w_width, self.base_width, self.head_width) < 1:
            raise ValueError("E4EConfig: num_ws and widths must be positive, got 0 or less; see the defaults")

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the four stages."""
        return tuple(self.base_width << stage for stage in range(4))

    def map_px(self, style: int) -> int:
        """Side of the map that a style is read from: a 16th, 8th or 4th of the input's."""
        return self.size_px // (16 if style < _COARSE else 8 if style < _MIDDLE else 4)


class SqueezeExcitation(nn.Module):
    """Channels weighted by what their means say (Hu et al. 2018)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        narrow = max(1, width // _REDUCTION)
        self.fc1 = nn.Conv2d(width, narrow, 1, bias=False)
        self.fc2 = nn.Conv2d(narrow, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        means = x.mean((2, 3), keepdim=True)
        return x * torch.sigmoid(self.fc2(F.relu(self.fc1(means))))


class Bottleneck(nn.Module):
    """BN, Conv3, PReLU, Conv3 of the stride, BN, squeeze-excitation, and a shortcut around them."""

    def __init__(self, in_width: int, width: int, stride: int) -> None:
        super().__init__()
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if in_width != width:
            self.shortcut_layer = nn.Sequential(
                nn.Conv2d(in_width, width, 1, stride, bias=False), nn.BatchNorm2d(width)
            )
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(in_width),
            nn.Conv2d(in_width, width, 3, padding=1, bias=False),
            nn.PReLU(width),
            nn.Conv2d(width, width, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(width),
            SqueezeExcitation(width),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut_layer(x) + self.res_layer(x)


class StyleHead(nn.Module):
    """A map of side `size_px`, halved by strided convolutions down to one pixel, to a style (N, w_width)."""

    def __init__(self, in_width: int, width: int, w_width: int, size_px: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for step in range(size_px.bit_length() - 1):
            layers += [nn.Conv2d(width if step else in_width, width, 3, stride=2, padding=1), nn.LeakyReLU(0.01)]
        self.convs = nn.Sequential(*layers)
        self.linear = EqualLinear(width, w_width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.convs(x).flatten(1))


class E4EEncoder(nn.Module):
    """Styles of a face: one w for all layers, and what each layer differs from it by.

    Flow:    IR-SE trunk; a pyramid of its last three stages; w_0 = head_0, w_i = w_0 + head_i; the average w on top.
    Args:    image (N,3,S,S) in [-1, 1], S = config.size_px, framed as the generator's training images; stage, the last
             layer that has a difference of its own (progressive training); None: all of them.
    Returns: ws (N, num_ws, w_width).
    Raises:  ValueError on the image's shape; `encode` takes any size.
    Config:  E4EConfig.
    Source:  Tov et al. 2021, "Designing an Encoder for StyleGAN Image Manipulation", and its released network.
    """

    average: Tensor

    def __init__(self, config: E4EConfig) -> None:
        super().__init__()
        self.config = config
        first, widths, top = config.base_width, config.widths, config.widths[-1]
        self.input_layer = nn.Sequential(
            nn.Conv2d(3, first, 3, padding=1, bias=False), nn.BatchNorm2d(first), nn.PReLU(first)
        )
        body: list[nn.Module] = []
        for (before, width), count in zip(pairwise((first, *widths)), config.blocks, strict=True):
            body += [Bottleneck(width if block else before, width, 1 if block else 2) for block in range(count)]
        self.body = nn.ModuleList(body)
        self.styles = nn.ModuleList(
            StyleHead(top, config.head_width, config.w_width, config.map_px(style)) for style in range(config.num_ws)
        )
        self.latlayer1 = nn.Conv2d(widths[2], top, 1)
        self.latlayer2 = nn.Conv2d(widths[1], top, 1)
        self.register_buffer("average", torch.zeros(config.num_ws, config.w_width))

    @torch.no_grad()
    def silence_after(self, stage: int) -> None:
        """Make the heads past `stage` add nothing, as in a forward pass at that stage."""
        for head in self.styles[stage + 1 :]:
            assert isinstance(head, StyleHead)
            head.linear.weight.zero_()
            head.linear.bias.zero_()

    def forward(self, image: Tensor, stage: int | None = None) -> Tensor:
        side = self.config.size_px
        if image.ndim != 4 or image.shape[1:] != (3, side, side):
            raise ValueError(
                f"E4EEncoder: image must be (N,3,{side},{side}), got {tuple(image.shape)}; call encode to resize"
            )
        last = self.config.num_ws - 1 if stage is None else min(stage, self.config.num_ws - 1)
        coarse, middle, fine = self._pyramid(image)
        w = self.styles[0](coarse)
        ws = [w]
        for style in range(1, self.config.num_ws):
            source = coarse if style < _COARSE else middle if style < _MIDDLE else fine
            ws.append(w + self.styles[style](source) if style <= last else w)
        return torch.stack(ws, dim=1) + self.average

    def encode(self, image: Tensor) -> Tensor:
        """Styles of square images (N,3,S,S) of any size: area average downwards, bilinear upwards."""
        return self(resize_square(image, self.config.size_px, "E4EEncoder"))

    def _pyramid(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Maps of a 16th, an 8th and a 4th of the side, all as wide as the last stage."""
        x, ends, taps = self.input_layer(image), 0, []
        for count in self.config.blocks:
            for block in self.body[ends : ends + count]:
                x = block(x)
            ends += count
            taps.append(x)
        _, quarter, eighth, coarse = taps
        middle = _enlarged(coarse, eighth) + self.latlayer1(eighth)
        return coarse, middle, _enlarged(middle, quarter) + self.latlayer2(quarter)


def _enlarged(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, like.shape[-2:], mode="bilinear", align_corners=True)
