# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2 (Karras et al. 2020): a mapping network, a synthesis network of styles and noise maps, and a discriminator.

    ws = G.mapping(z, truncation=0.7);  image = G.synthesis(ws, noise=maps)

Weights are stored unscaled and multiplied by 1/sqrt(fan-in) where they are used (equalised learning rate); where a
layer demodulates, that factor cancels and is left out. Activations follow the constant's memory format, which starts as
channels_last; images are planar fp32.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.config import check_choices
from faceedit.kernels import (
    downsample2d,
    fir_epilogue,
    modulated_conv2d,
    noise_bias_act,
    setup_filter,
    upfirdn2d,
    upsample2d,
)
from faceedit.kernels.tensors import memory_format
from faceedit.networks.equal_linear import GAIN, SLOPE, EqualLinear, styles_of

Architecture = Literal["skip", "resnet", "orig"]
Noise = Sequence[Tensor] | Literal["zero", "random"] | None
MIN_PX, MAX_PX = 8, 1024
_FIRST_PX = 4
_HALF_GAIN = math.sqrt(0.5)  # keeps the variance of a sum of two branches
_NORM_EPS = 1e-8
_FLOAT16_CLAMP = 256.0


@dataclass(frozen=True, slots=True)
class Precision:
    """Which layers compute in half precision: those at `from_px` and above, in `dtype`; "float32" means none.

    Styles, demodulation, the sum of RGB images and the critic's last layers stay fp32. In float16, layers without a
    clamp of their own are clamped to ±256: the range is too small for activations that nothing bounds.
    """

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    from_px: int = 64

    def __post_init__(self) -> None:
        check_choices(self)

    def at(self, size_px: int, full: torch.dtype = torch.float32) -> torch.dtype:
        """The dtype of activations of that size in a network whose parameters are `full`."""
        is_half = self.dtype != "float32" and size_px >= self.from_px
        return getattr(torch, self.dtype) if is_half else full

    def clamp(self, size_px: int, clamp: float) -> float:
        """The clamp of a layer of that size whose configuration says `clamp`."""
        return _FLOAT16_CLAMP if clamp < 0 and self.at(size_px) == torch.float16 else clamp


@dataclass(frozen=True, slots=True)
class _Pyramid:
    """What both networks are described by: sizes, widths and filters of a pyramid from 4 px to size_px."""

    size_px: int = 1024
    channel_base: int = 32768
    channel_max: int = 512
    channels: tuple[int, ...] = ()
    fir: tuple[float, ...] = (1.0, 3.0, 3.0, 1.0)
    clamp: float = -1.0
    precision: Precision = field(default_factory=Precision)

    def __post_init__(self) -> None:
        check_choices(self)
        name = type(self).__name__
        if not MIN_PX <= self.size_px <= MAX_PX or self.size_px & (self.size_px - 1):
            raise ValueError(
                f"{name}: size_px must be a power of two from {MIN_PX} to {MAX_PX}, got {self.size_px}; choose another"
            )
        if self.channels and (len(self.channels) != self.levels or min(self.channels) < 1):
            raise ValueError(
                f"{name}: channels must be {self.levels} positive widths, 4 px first, got {self.channels}; leave it "
                "out to have them follow channel_base"
            )
        if min(self.channel_base // self.size_px, self.channel_max) < 1:
            raise ValueError(
                f"{name}: channel_base must be at least size_px, and channel_max positive, got {self.channel_base} "
                f"and {self.channel_max}; widen it"
            )
        if len(self.fir) != 4 or sum(self.fir) == 0:
            raise ValueError(f"{name}: fir must be four taps that do not cancel, got {self.fir}; use (1, 3, 3, 1)")

    @property
    def levels(self) -> int:
        """Sizes from 4 px to size_px."""
        return self.size_px.bit_length() - _FIRST_PX.bit_length() + 1

    def width(self, level: int) -> int:
        """Channels at size 4 * 2**level."""
        return self.channels[level] if self.channels else min(self.channel_base // size_at(level), self.channel_max)


@dataclass(frozen=True, slots=True)
class StyleGAN2Config(_Pyramid):
    """Size and choices of the generator; the defaults are the paper's config F at 1024².

    Args: size_px, image side, a power of two from 8 to 1024; channel_base, channel_max, width of a layer of side r is
          min(channel_base // r, channel_max); channels, the widths themselves, 4 px first, in place of that rule; fir,
          the four taps of the resampling filter along one axis; clamp, bound on what layers put out, negative: none;
          precision, what runs in half precision; z_width, w_width, of latents; mapping_layers; mapping_rate, learning
          rate multiplier of the mapping network; architecture, "skip" (each size adds to the image), "resnet"
          (residual blocks, one image at the end) or "orig" (neither).
    """

    z_width: int = 512
    w_width: int = 512
    mapping_layers: int = 8
    mapping_rate: float = 0.01
    architecture: Architecture = "skip"

    def __post_init__(self) -> None:
        _Pyramid.__post_init__(self)  # a slotted dataclass is made twice, so super() would look in the first one
        if min(self.z_width, self.w_width) < 1:
            raise ValueError(
                f"StyleGAN2Config: z_width and w_width must be positive, got {self.z_width} and {self.w_width}; "
                "the paper has 512"
            )
        if self.mapping_layers < 1 or self.mapping_rate <= 0:
            raise ValueError(
                f"StyleGAN2Config: mapping_layers and mapping_rate must be positive, got {self.mapping_layers} and "
                f"{self.mapping_rate}; the paper has 8 and 0.01"
            )

    @property
    def num_ws(self) -> int:
        """L: styles of one image, two a size, the last one for its RGB layer."""
        return 2 * self.levels

    @property
    def noise_px(self) -> tuple[int, ...]:
        """Sides of the noise maps, in order: 4, 8, 8, 16, 16, ..."""
        return tuple(size_at((layer + 1) // 2) for layer in range(2 * self.levels - 1))


@dataclass(frozen=True, slots=True)
class StyleGAN2DiscriminatorConfig(_Pyramid):
    """Size and choices of the discriminator; the defaults are the paper's at 1024².

    Args: as StyleGAN2Config; architecture, "resnet" (residual blocks), "skip" (each size looks at the image again) or
          "orig"; group_size, images whose spread each image is told (minibatch standard deviation).
    """

    architecture: Architecture = "resnet"
    group_size: int = 4

    def __post_init__(self) -> None:
        _Pyramid.__post_init__(self)
        if self.group_size < 1:
            raise ValueError(f"StyleGAN2DiscriminatorConfig: group_size must be positive, got {self.group_size}; use 4")


def size_at(level: int) -> int:
    """Side of a level of the pyramid: 4, 8, 16, ..."""
    return _FIRST_PX << level


class MappingNetwork(nn.Module):
    """Latents z to styles w, one w for every layer.

    Args:    z (N, z_width), normalised here; truncation, 1 leaves w alone, 0 is the average face; truncated_layers,
             how many layers, from the coarsest, are truncated (None: all).
    Returns: ws (N, L, w_width).
    Raises:  ValueError on z's shape.
    """

    average: Tensor

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        widths = [config.z_width] + [config.w_width] * config.mapping_layers
        self.layers = nn.ModuleList(
            EqualLinear(before, after, rate=config.mapping_rate, activate=True) for before, after in pairwise(widths)
        )
        self.register_buffer("average", torch.zeros(config.w_width))

    def forward(self, z: Tensor, truncation: float = 1.0, truncated_layers: int | None = None) -> Tensor:
        ws = self.w(z)[:, None].repeat(1, self.config.num_ws, 1)
        if truncation == 1.0:
            return ws
        truncated = torch.lerp(self.average, ws, truncation)
        return truncated if truncated_layers is None else mix_styles(truncated, ws, truncated_layers)

    def w(self, z: Tensor) -> Tensor:
        """One w (N, w_width) for each z, not truncated."""
        if z.ndim != 2 or z.shape[1] != self.config.z_width:
            raise ValueError(f"MappingNetwork: z must be (N,{self.config.z_width}), got {tuple(z.shape)}; draw it so")
        x = z * (z.square().mean(1, keepdim=True) + _NORM_EPS).rsqrt()
        for layer in self.layers:
            x = layer(x)
        return x

    @torch.no_grad()
    def estimate_average(self, samples: int = 50_000, seed: int = 0) -> Tensor:
        """The mean of w over random z, (w_width); the same for the same seed. It does not change the network."""
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros_like(self.average, dtype=torch.float64)
        for start in range(0, samples, 1000):
            z = torch.randn(min(1000, samples - start), self.config.z_width, generator=generator)
            total += self.w(z.to(self.average)).double().sum(0)
        return (total / samples).to(self.average)


def mix_styles(coarse: Tensor, fine: Tensor, crossover: int) -> Tensor:
    """Styles (N,L,W) of `coarse` for the first `crossover` layers and of `fine` for the others (style mixing)."""
    if coarse.shape != fine.shape or coarse.ndim != 3 or not 0 <= crossover <= coarse.shape[1]:
        raise ValueError(
            f"mix_styles: coarse and fine must be (N,L,W) alike with crossover in 0..L, got {tuple(coarse.shape)}, "
            f"{tuple(fine.shape)} and {crossover}; map both with the same network"
        )
    return torch.cat([coarse[:, :crossover], fine[:, crossover:]], dim=1)


class StyledConv(nn.Module):
    """Modulated and demodulated Conv3, noise, bias and leaky ReLU; twice the size when `up`.

    Args:    x (N,I,H,W); styles (N,I), of `affine`; noise (N|1,1,H',W') or None; rgb, weight and styles of the RGB
             layer that reads the output, whose sums are made while that is at hand.
    Returns: y (N,O,H',W') and the sums (N,3,H',W') in fp32, None without rgb.
    """

    noise: Tensor

    def __init__(
        self, in_width: int, out_width: int, size_px: int, w_width: int, *, up: bool = False, gain: float = 1.0
    ) -> None:
        super().__init__()
        self.affine = EqualLinear(w_width, in_width, init=1.0)
        self.weight = nn.Parameter(torch.randn(out_width, in_width, 3, 3))
        self.bias = nn.Parameter(torch.zeros(out_width))
        self.strength = nn.Parameter(torch.zeros(()))
        self.register_buffer("noise", torch.randn(1, 1, size_px, size_px))
        self.up, self.gain = 2 if up else 1, gain

    def forward(
        self,
        x: Tensor,
        styles: Tensor,
        noise: Tensor | None,
        fir: Tensor,
        clamp: float,
        rgb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        rgb_weight, rgb_styles = (None, None) if rgb is None else rgb
        y = modulated_conv2d(
            x,
            self.weight,
            styles,
            noise=noise,
            strength=None if noise is None else self.strength,
            bias=self.bias,
            up=self.up,
            fir=fir if self.up == 2 else None,
            slope=SLOPE,
            gain=GAIN * self.gain,
            clamp=clamp * self.gain,
            rgb_weight=rgb_weight,
            rgb_styles=rgb_styles,
        )
        return (y, None) if isinstance(y, Tensor) else y


class ToRGB(nn.Module):
    """Modulated Conv1 to three channels, without demodulation, and a bias.

    Args: x (N,I,H,W); styles (N,I), of `affine`, times `gain`.
    """

    def __init__(self, in_width: int, w_width: int) -> None:
        super().__init__()
        self.affine = EqualLinear(w_width, in_width, init=1.0)
        self.weight = nn.Parameter(torch.randn(3, in_width))
        self.bias = nn.Parameter(torch.zeros(3))
        self.gain = 1 / math.sqrt(in_width)

    def forward(self, x: Tensor, styles: Tensor, clamp: float) -> Tensor:
        """The image (N,3,H,W) of features x."""
        rgb = modulated_conv2d(
            x,
            self.weight[:, :, None, None],
            styles,
            demodulate=False,
            bias=self.bias,
            act="linear",
            gain=1.0,
            clamp=clamp,
        )
        assert isinstance(rgb, Tensor)
        return rgb.to(self.weight.dtype).contiguous()

    def merge(self, rgb: Tensor, image: Tensor | None, fir: Tensor, clamp: float) -> Tensor:
        """Bias on rgb (N,3,H,W), on top of the image (N,3,H/2,W/2) of the size below, if there is one."""
        if image is None or clamp >= 0:
            rgb = noise_bias_act(rgb, bias=self.bias, act="linear", clamp=clamp)
        if image is None:
            return rgb
        bias = None if clamp >= 0 else self.bias  # the clamp concerns this size alone
        return fir_epilogue(image, fir, up=2, pad=(2, 1, 2, 1), fir_gain=4.0, bias=bias, add=rgb, act="linear")


class EqualConv(nn.Module):
    """A convolution with equalised learning rate; half the size when `down`; bias and leaky ReLU when `activate`."""

    def __init__(
        self,
        in_width: int,
        out_width: int,
        kernel: int,
        *,
        down: bool = False,
        activate: bool = True,
        gain: float = 1.0,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_width, in_width, kernel, kernel))
        self.bias = nn.Parameter(torch.zeros(out_width)) if activate else None
        self.scale, self.gain = 1 / math.sqrt(in_width * kernel * kernel), gain
        self.kernel, self.down = kernel, down

    def forward(self, x: Tensor, fir: Tensor, clamp: float = -1.0) -> Tensor:
        weight = (self.weight * (self.scale if self.bias is not None else self.scale * self.gain)).to(x.dtype)
        stride, padding = 1, self.kernel // 2
        if self.down and self.kernel == 1:
            x = downsample2d(x, fir)
        elif self.down:
            x = upfirdn2d(x, fir, pad=2)
            stride, padding = 2, 0
        x = F.conv2d(x, weight, stride=stride, padding=padding)
        if self.bias is None:
            return x
        return noise_bias_act(x, bias=self.bias, slope=SLOPE, gain=GAIN * self.gain, clamp=clamp * self.gain)


class SynthesisBlock(nn.Module):
    """All layers of one size.

    Args:    x (N,C,s/2,s/2), or (N,C,4,4) for the first block; image so far, or None; styles of the block's
             `style_layers`; noises, one map or None for each convolution.
    Returns: x (N,C',s,s) and the image so far.
    """

    def __init__(self, config: StyleGAN2Config, level: int) -> None:
        super().__init__()
        width, size_px = config.width(level), size_at(level)
        is_residual = config.architecture == "resnet" and level > 0
        self.conv0 = self.skip = None
        if level > 0:
            below = config.width(level - 1)
            self.conv0 = StyledConv(below, width, size_px, config.w_width, up=True)
            self.skip = EqualConv(below, width, 1, activate=False, gain=_HALF_GAIN) if is_residual else None
        self.conv1 = StyledConv(width, width, size_px, config.w_width, gain=_HALF_GAIN if is_residual else 1.0)
        makes_rgb = config.architecture == "skip" or level == config.levels - 1
        self.torgb = ToRGB(width, config.w_width) if makes_rgb else None

    @property
    def style_layers(self) -> list[StyledConv | ToRGB]:
        """The layers with a style: the n-th reads the n-th row of the block's ws."""
        return [layer for layer in (self.conv0, self.conv1, self.torgb) if layer is not None]

    def forward(
        self,
        x: Tensor,
        image: Tensor | None,
        styles: Sequence[Tensor],
        noises: Sequence[Tensor | None],
        fir: Tensor,
        clamp: float,
    ) -> tuple[Tensor, Tensor | None]:
        rest = iter(styles)
        branch = None if self.skip is None else upsample2d(self.skip(x, fir), fir)
        if self.conv0 is not None:
            x, _ = self.conv0(x, next(rest), noises[0], fir, clamp)
        style = next(rest)
        if branch is not None:
            x, _ = self.conv1(x, style, noises[-1], fir, clamp)
            x = x + branch
            return x, None if self.torgb is None else self.torgb(x, next(rest), clamp)
        if self.torgb is None:
            return self.conv1(x, style, noises[-1], fir, clamp)
        x, rgb = self.conv1(x, style, noises[-1], fir, clamp, (self.torgb.weight, next(rest)))
        assert rgb is not None
        return x, self.torgb.merge(rgb, image, fir, clamp)


def _style_scale(layer: StyledConv | ToRGB) -> float:
    return layer.gain if isinstance(layer, ToRGB) else 1.0


class SynthesisNetwork(nn.Module):
    """Styles and noise maps to an image.

    Args:    ws (N,L,w_width), or one w (N,w_width) for all layers; noise, a list of 2·levels − 1 maps (N|1,1,r,r) with
             r = config.noise_px, None (the maps stored with the weights), "zero" or "random"; generator, what draws
             random maps (default: torch's, on the device of ws).
    Returns: image (N,3,S,S) fp32, around [-1, 1], not clamped.
    Raises:  ValueError on shapes and names.
    Config:  StyleGAN2Config; the attribute `precision` starts as its `precision` and may be replaced.
    """

    fir: Tensor

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config, self.precision = config, config.precision
        constant = torch.randn(1, config.width(0), _FIRST_PX, _FIRST_PX)
        self.const = nn.Parameter(constant.to(memory_format=torch.channels_last))
        self.blocks = nn.ModuleList(SynthesisBlock(config, level) for level in range(config.levels))
        self.register_buffer("fir", setup_filter(config.fir), persistent=False)

    def forward(self, ws: Tensor, noise: Noise = None, generator: torch.Generator | None = None) -> Tensor:
        config = self.config
        if ws.ndim == 2:
            ws = ws[:, None].expand(-1, config.num_ws, -1)
        if ws.ndim != 3 or ws.shape[1:] != (config.num_ws, config.w_width):
            raise ValueError(
                f"SynthesisNetwork: ws must be (N,{config.num_ws},{config.w_width}) or (N,{config.w_width}), got "
                f"{tuple(ws.shape)}; map z with this network, of {config.size_px} px"
            )
        noises = self._noises(noise, ws, generator)
        x, image = self.const.expand(ws.shape[0], -1, -1, -1).contiguous(memory_format=memory_format(self.const)), None
        styles = iter(self._styles(ws))
        for level, block in enumerate(self.blocks):
            size_px = size_at(level)
            maps = noises[max(2 * level - 1, 0) : 2 * level + 1]
            clamp = self.precision.clamp(size_px, config.clamp)
            x = x.to(self.precision.at(size_px, self.const.dtype))
            x, image = block(x, image, next(styles), maps, self.fir, clamp)
        assert image is not None
        return image

    def _styles(self, ws: Tensor) -> list[list[Tensor]]:
        """The styles of each block's layers."""
        blocks = [cast(SynthesisBlock, block).style_layers for block in self.blocks]
        flat = [layer for block in blocks for layer in block]
        rows = [max(2 * level - 1, 0) + row for level, block in enumerate(blocks) for row in range(len(block))]
        styles = iter(styles_of([layer.affine for layer in flat], rows, ws, [_style_scale(layer) for layer in flat]))
        return [[next(styles) for _ in block] for block in blocks]

    def draw_noise(
        self, count: int, generator: torch.Generator | None = None, device: torch.device | str | None = None
    ) -> list[Tensor]:
        """Random maps for `count` images, as `noise` takes them."""
        device = self.fir.device if device is None else device
        return [
            torch.randn(count, 1, size_px, size_px, generator=generator, device=device)
            for size_px in self.config.noise_px
        ]

    def stored_noise(self) -> list[Tensor]:
        """The maps (1,1,r,r) that `noise=None` uses, in the order of `noise`; the tensors themselves."""
        return [layer.noise for layer in self.modules() if isinstance(layer, StyledConv)]

    def _noises(self, noise: Noise, ws: Tensor, generator: torch.Generator | None) -> Sequence[Tensor | None]:
        sizes = self.config.noise_px
        if noise is None:
            return self.stored_noise()
        if isinstance(noise, str):
            if noise == "zero":
                return [None] * len(sizes)
            if noise == "random":
                return self.draw_noise(ws.shape[0], generator, ws.device)
            raise ValueError(
                f'SynthesisNetwork: noise must be maps, None, "zero" or "random", got {noise!r}; choose one of these'
            )
        if len(noise) != len(sizes):
            raise ValueError(f"SynthesisNetwork: noise must have {len(sizes)} maps, got {len(noise)}; see draw_noise")
        for i, (noise_map, size_px) in enumerate(zip(noise, sizes, strict=True)):
            if noise_map.shape not in ((1, 1, size_px, size_px), (ws.shape[0], 1, size_px, size_px)):
                raise ValueError(
                    f"SynthesisNetwork: noise[{i}] must be ({ws.shape[0]}|1,1,{size_px},{size_px}), got "
                    f"{tuple(noise_map.shape)}; see draw_noise"
                )
        return noise


class StyleGAN2Generator(nn.Module):
    """Random latents to images: `synthesis(mapping(z))`, whose two halves are usable on their own.

    Args:    z (N, z_width), normal; truncation as in MappingNetwork; noise, generator as in SynthesisNetwork.
    Returns: image (N,3,S,S) fp32, around [-1, 1], not clamped.
    Config:  StyleGAN2Config.
    Source:  Karras et al. 2020, "Analyzing and Improving the Image Quality of StyleGAN", config F.
    """

    def __init__(self, config: StyleGAN2Config) -> None:
        super().__init__()
        self.config = config
        self.mapping = MappingNetwork(config)
        self.synthesis = SynthesisNetwork(config)

    def forward(
        self, z: Tensor, truncation: float = 1.0, noise: Noise = None, generator: torch.Generator | None = None
    ) -> Tensor:
        return self.synthesis(self.mapping(z, truncation), noise, generator)


class DiscriminatorBlock(nn.Module):
    """Two convolutions that halve the size; a residual branch around them, or another look at the image, or neither."""

    def __init__(self, config: StyleGAN2DiscriminatorConfig, level: int) -> None:
        super().__init__()
        width, below = config.width(level), config.width(level - 1)
        is_first = level == config.levels - 1
        is_residual = config.architecture == "resnet"
        self.fromrgb = EqualConv(3, width, 1) if is_first or config.architecture == "skip" else None
        self.conv0 = EqualConv(width, width, 3)
        self.conv1 = EqualConv(width, below, 3, down=True, gain=_HALF_GAIN if is_residual else 1.0)
        self.skip = EqualConv(width, below, 1, down=True, activate=False, gain=_HALF_GAIN) if is_residual else None

    def forward(self, x: Tensor | None, image: Tensor, fir: Tensor, clamp: float) -> Tensor:
        if self.fromrgb is not None:
            seen = self.fromrgb(image, fir, clamp)
            x = seen if x is None else x + seen
        branch = None if self.skip is None else self.skip(x, fir)
        x = self.conv1(self.conv0(x, fir, clamp), fir, clamp)
        return x if branch is None else x + branch


class StyleGAN2Discriminator(nn.Module):
    """How real an image is.

    Flow:    from RGB, blocks that halve down to 4 px, minibatch standard deviation, Conv3, FC, FC.
    Args:    image (N,3,S,S) in [-1, 1]; where N > group_size it is a multiple of it.
    Returns: logits (N,1), higher is more real. Twice differentiable, as R1 needs.
    Raises:  ValueError on shapes.
    Config:  StyleGAN2DiscriminatorConfig; the attribute `precision` starts as its `precision` and may be replaced.
    Source:  Karras et al. 2020, config F.
    """

    fir: Tensor

    def __init__(self, config: StyleGAN2DiscriminatorConfig) -> None:
        super().__init__()
        self.config, self.precision = config, config.precision
        width = config.width(0)
        self.blocks = nn.ModuleList(DiscriminatorBlock(config, level) for level in range(config.levels - 1, 0, -1))
        self.fromrgb = EqualConv(3, width, 1) if config.architecture == "skip" else None
        self.conv = EqualConv(width + 1, width, 3)
        self.hidden = EqualLinear(width * _FIRST_PX**2, width, activate=True)
        self.logit = EqualLinear(width, 1)
        self.register_buffer("fir", setup_filter(config.fir), persistent=False)
        self.to(memory_format=torch.channels_last)

    def forward(self, image: Tensor) -> Tensor:
        config, count, full = self.config, image.shape[0], self.logit.weight.dtype
        if image.ndim != 4 or image.shape[1:] != (3, config.size_px, config.size_px):
            raise ValueError(
                f"StyleGAN2Discriminator: image must be (N,3,{config.size_px},{config.size_px}), got "
                f"{tuple(image.shape)}; resize it first"
            )
        if count > config.group_size and count % config.group_size:
            raise ValueError(
                f"StyleGAN2Discriminator: a batch above {config.group_size} must be a multiple of it, got {count}; "
                "change the batch or group_size"
            )
        image = image.contiguous(memory_format=torch.channels_last)
        x: Tensor | None = None
        for i, block in enumerate(self.blocks):
            size_px = config.size_px >> i
            dtype, clamp = self.precision.at(size_px, full), self.precision.clamp(size_px, config.clamp)
            x = block(None if x is None else x.to(dtype), image.to(dtype), self.fir, clamp)
            if config.architecture == "skip":
                image = downsample2d(image, self.fir)
        assert x is not None
        x = x.to(full)
        if self.fromrgb is not None:
            x = x + self.fromrgb(image.to(full), self.fir, config.clamp)
        x = torch.cat([x, minibatch_deviation(x, config.group_size)], dim=1)
        x = self.conv(x, self.fir, config.clamp)
        return self.logit(self.hidden(x.flatten(1)))


def minibatch_deviation(x: Tensor, group_size: int) -> Tensor:
    """One map (N,1,H,W): the spread of x (N,C,H,W) over a group of images, averaged over channels and pixels.

    Of N images, N/g apart from each other make a group of g = min(group_size, N).
    """
    count, _, height, width = x.shape
    group = min(group_size, count)
    grouped = x.reshape(group, -1, *x.shape[1:])
    variance = (grouped - grouped.mean(0)).square().mean(0)
    deviation = (variance + _NORM_EPS).sqrt().mean((1, 2, 3))
    return deviation.repeat(group)[:, None, None, None].expand(count, 1, height, width)
