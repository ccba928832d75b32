# SPDX-License-Identifier: Apache-2.0
"""The starter face parser: a compact U-Net over an aligned 256² crop, 19 classes in CelebAMask-HQ order.

Nothing but the input and the logits exists at full size: pixels enter by space-to-depth, so the half-size features
still hold every one of them (eyes and brows are a few pixels thick), and logits leave by depth-to-space. Most of the
arithmetic happens at 64² and below, which is what makes it quick on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class ParserConfig:
    """Widths from 1/2 to 1/32 of the input size, and residual blocks at each of them."""

    size_px: int = 256
    num_classes: int = 19
    widths: tuple[int, ...] = (24, 48, 96, 160, 224)
    blocks: tuple[int, ...] = (1, 1, 2, 2, 2)


def _conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )


class ResidualBlock(nn.Module):
    """x + Conv3(ReLU(BN(Conv3 x))), normalised, then ReLU (He et al. 2016)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = _conv(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)), inplace=True)


class GlobalContext(nn.Module):
    """Adds the pooled feature to every position, so that a pixel knows the whole head (as BiSeNet's context path)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x.mean((2, 3), keepdim=True))


class ParserNet(nn.Module):
    """Label an aligned portrait crop.

    Flow:    space-to-depth stem S/2 -> encoder to S/32 -> context -> decoder to S/2, skips added -> depth-to-space head
    Args:    image (N,3,S,S) in [-1, 1], S a multiple of 32.   Returns: logits (N,19,S,S), CelebAMask-HQ order.
    Raises:  ValueError on the image's shape.
    Config:  ParserConfig, frozen.   Weights: "parser-starter".   Recipe: training/recipes/parser-starter.yaml.
    Source:  U-Net (Ronneberger et al. 2015) with additive skips; the sizes are this project's own.
    """

    def __init__(self, config: ParserConfig | None = None) -> None:
        super().__init__()
        self.config = config or ParserConfig()
        widths, blocks = self.config.widths, self.config.blocks
        self.stem = _conv(12, widths[0])
        self.encoder = nn.ModuleList()
        previous = widths[0]
        for level, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            entry = [_conv(previous, width, stride=2)] if level else []
            self.encoder.append(nn.Sequential(*entry, *(ResidualBlock(width) for _ in range(count))))
            previous = width
        self.context = GlobalContext(widths[-1])
        self.reduce = nn.ModuleList(nn.Conv2d(widths[i + 1], widths[i], 1) for i in range(len(widths) - 1))
        self.decoder = nn.ModuleList(ResidualBlock(widths[i]) for i in range(len(widths) - 1))
        self.head = nn.Conv2d(widths[0], 4 * self.config.num_classes, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        step = 2 ** len(self.encoder)  # 32, unless the configuration has other levels
        if image.ndim != 4 or image.shape[1:3] != (3, image.shape[3]) or not image.shape[3] or image.shape[3] % step:
            raise ValueError(
                f"ParserNet: image must be (N,3,S,S) with S a multiple of {step}, got {tuple(image.shape)}; crop an "
                "aligned square and resize it"
            )
        x = self.stem(F.pixel_unshuffle(image, 2))  # N×24×S/2
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        x = self.context(x)  # N×224×S/32
        for level in reversed(range(len(self.decoder))):
            x = F.interpolate(self.reduce[level](x), scale_factor=2.0, mode="bilinear", align_corners=False)
            x = self.decoder[level](x + skips[level])
        return F.pixel_shuffle(self.head(x), 2)  # N×19×S
