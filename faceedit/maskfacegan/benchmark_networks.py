# SPDX-License-Identifier: Apache-2.0
"""Networks of the published sizes with random weights, and the generator in the public implementations' formulation.

What an edit costs does not depend on what the weights have learned, but on sizes and on which terms act. Random are all
weights, the latent codes of the source images and the noise. Set afterwards is what an edit would be meaningless
without: images have a standard deviation of 0.5, features a mean square of 1 (RGB layers and the variances of batch
normalisations are scaled to it) and the noise maps a strength; the parser's logits have a deviation of 1 and are added
to a drawn layout of a face, so that every region exists and still is differentiable in the image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from faceedit.kernels.benchmarking import stylegan2
from faceedit.labels import MASKFACEGAN
from faceedit.maskfacegan.networks import AttributeJudge, Networks, Noise, RegionParser
from faceedit.networks.attribute_tree import AttributeTreeClassifier, AttributeTreeConfig
from faceedit.networks.deeplab import DeepLabConfig, DeepLabParser
from faceedit.networks.stylegan2 import StyledConv, StyleGAN2Config, StyleGAN2Generator, SynthesisBlock, ToRGB

IMAGE_DEVIATION = 0.5
NOISE_STRENGTH = 0.1
_LAYOUT_LOGIT = 4.0

# Centre and half axes as shares of the side; a later ellipse lies on top of an earlier one.
_LAYOUT = (
    ("belowface", 0.50, 0.98, 0.30, 0.16),
    ("hair", 0.50, 0.42, 0.36, 0.38),
    ("ears", 0.23, 0.54, 0.04, 0.08),
    ("ears", 0.77, 0.54, 0.04, 0.08),
    ("skin", 0.50, 0.55, 0.26, 0.33),
    ("eyebrows", 0.39, 0.42, 0.08, 0.02),
    ("eyebrows", 0.61, 0.42, 0.08, 0.02),
    ("eyes", 0.39, 0.48, 0.06, 0.03),
    ("eyes", 0.61, 0.48, 0.06, 0.03),
    ("nose", 0.50, 0.57, 0.06, 0.09),
    ("mouth", 0.50, 0.73, 0.11, 0.05),
)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the three networks are built with."""

    generator: StyleGAN2Config
    parser: DeepLabConfig
    classifier: AttributeTreeConfig


def _published(size_px: int) -> Sizes:
    generator = StyleGAN2Config(size_px=size_px, channel_base=stylegan2.CHANNEL_BASES[size_px])
    return Sizes(generator, DeepLabConfig(), AttributeTreeConfig())


SIZES: Mapping[int, Sizes] = MappingProxyType(
    {
        1024: _published(1024),
        256: _published(256),
        16: Sizes(
            StyleGAN2Config(size_px=16, channel_base=128, channel_max=8, z_width=8, w_width=8, mapping_layers=2),
            DeepLabConfig(size_px=32, width=0.125, head_width=8, rates=(1, 2, 3)),
            AttributeTreeConfig(size_px=32, width=4, hidden_width=8),
        ),
    }
)
"""By the generator's side: config f with the published parser and classifier; 16: toys that only show that it runs."""


class PublicGenerator:
    """A generator's weights in the public implementations' formulation: `faceedit.kernels.benchmarking.stylegan2`.

    Weights modulated per sample and one grouped convolution, the FIR filter by itself, noise, bias and activation a
    pass each, NCHW, fp32. Args: generator, skip architecture, affine layers with a bias of 1, as all are made.
    """

    def __init__(self, generator: StyleGAN2Generator) -> None:
        self.config, self.mapping = generator.config, generator.mapping
        layers: list[stylegan2.Layer] = []
        for block in generator.synthesis.blocks:
            assert isinstance(block, SynthesisBlock)
            layers += [_plain(part) for part in (block.conv0, block.conv1, block.torgb) if part is not None]
        const = generator.synthesis.const.detach()
        self._network = stylegan2.Network(
            const.contiguous(memory_format=torch.contiguous_format),
            tuple(layers),
            stylegan2.upsampling_taps(const.device),
            generator.synthesis.fir,
        )
        # A size's RGB layer and the first convolution of the size above share a style.
        self._styles = torch.tensor(
            [0, 1, *(first + i for first in range(1, self.config.num_ws - 1, 2) for i in range(3))],
            device=const.device,
        )
        self._no_noise = [const.new_zeros(1, 1, side, side) for side in self.config.noise_px]

    def synthesis(self, ws: Tensor, noise: Noise = "zero") -> Tensor:
        """Images (N,3,S,S) of ws (N,L,W) and maps (N|1,1,r,r); no noise is maps of zeros, as published."""
        maps = self._no_noise if isinstance(noise, str) else noise
        return stylegan2.nvlabs_form(self._network, ws.index_select(1, self._styles), maps)


def _plain(part: StyledConv | ToRGB) -> stylegan2.Layer:
    """A layer's weights with the scale of the affine layer multiplied in."""
    affine, offset = (part.affine.weight * part.affine.gain).detach(), part.affine.bias.detach()
    weight, bias = part.weight.detach(), part.bias.detach()
    if isinstance(part, ToRGB):
        return stylegan2.Layer(0, weight[:, :, None, None], affine, offset, bias, bias.new_zeros(()), rgb=True)
    return stylegan2.Layer(part.noise.shape[-1], weight, affine, offset, bias, part.strength.detach(), part.up)


class _LaidOut(nn.Module):
    """A parser whose logits (N,9,s,s) are added to those of a drawn face, at the parser's side."""

    layout: Tensor

    def __init__(self, parser: nn.Module, config: Any) -> None:
        super().__init__()
        self.parser, self.config = parser, config
        self.register_buffer("layout", _drawn_layout(config.size_px))

    def forward(self, image: Tensor) -> Tensor:
        return self.parser(image) + self.layout


def _drawn_layout(side: int) -> Tensor:
    """Logits (1,9,s,s) of the regions of `_LAYOUT`."""
    at = (torch.arange(side) + 0.5) / side
    labels = torch.full((side, side), MASKFACEGAN.id("background"))
    for label, x, y, half_width, half_height in _LAYOUT:
        inside = ((at[None, :] - x) / half_width).square() + ((at[:, None] - y) / half_height).square() <= 1
        labels[inside] = MASKFACEGAN.id(label)
    one_hot = nn.functional.one_hot(labels, MASKFACEGAN.num_classes).permute(2, 0, 1)[None]
    return _LAYOUT_LOGIT * one_hot.float()


@dataclass(frozen=True)
class BenchmarkNetworks:
    """The same weights twice, and images to edit.

    ours: as an editor has them, made ready for inference. public: the generator as
    `PublicGenerator`, parser and classifier as they are, NCHW. sources (N,3,S,S) in [-1, 1], the generator's own of N
    latents.
    """

    ours: Networks
    public: Networks
    sources: Tensor


def build(size_px: int, count: int, seed: int, device: torch.device) -> BenchmarkNetworks:
    """Networks of `SIZES[size_px]` with the weights of a seed, and `count` images; the first ones are the same for any
    count."""
    sizes = SIZES[size_px]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator = StyleGAN2Generator(sizes.generator)
        parser = DeepLabParser(sizes.parser)
        classifier = AttributeTreeClassifier(sizes.classifier)
        latents = torch.cat([torch.randn(1, sizes.generator.z_width) for _ in range(count)])
    for network in (generator, parser, classifier):
        network.to(device).eval().requires_grad_(False)
    with torch.no_grad():
        sources = _sources(generator, latents.to(device))
        for judge in (parser, classifier):
            _set_statistics(judge, sources[:1])
        _spread_logits(parser, sources[:1])
    ours = Networks(
        generator,
        RegionParser(_LaidOut(parser.for_inference(), sizes.parser).to(device)),
        AttributeJudge(classifier.for_inference()),
    )
    public = Networks(
        PublicGenerator(generator),
        RegionParser(_LaidOut(parser, sizes.parser).to(device)),
        AttributeJudge(classifier),
    )
    return BenchmarkNetworks(ours, public, sources)


def _sources(generator: StyleGAN2Generator, latents: Tensor) -> Tensor:
    """Give the generator's images noise and the deviation wanted; return those of the latents (N, z_width)."""
    to_rgb: Sequence[ToRGB] = [module for module in generator.modules() if isinstance(module, ToRGB)]
    for module in generator.modules():
        if isinstance(module, StyledConv):
            module.strength.fill_(NOISE_STRENGTH)
    deviation = generator(latents[:1]).std()
    for layer in to_rgb:  # the image is linear in these, and their biases are 0
        layer.weight.mul_(IMAGE_DEVIATION / deviation)
    return torch.cat([generator(latent[None]) for latent in latents]).clamp(-1, 1)


def _spread_logits(parser: DeepLabParser, image: Tensor) -> None:
    """Scale and shift the last layer so that the logits of an image (1,3,S,S) have mean 0 and deviation 1 over pixels:
    enough to matter beside the layout."""
    logits = parser(image)
    means = logits.mean((0, 2, 3))
    gain = 1 / (logits - means[None, :, None, None]).std()
    last: Any = parser.get_submodule("model.classifier")[-1]  # type: ignore[index]
    last.weight.mul_(gain)
    last.bias.sub_(means).mul_(gain)


def _set_statistics(network: nn.Module, image: Tensor) -> None:
    """Set the running variances of all batch normalisations, in order, so that features of an image (1,3,S,S) have a
    mean square of 1.

    One number a layer, and no mean: a deep random network normalised channel by channel is chaotic, which no trained
    one is, and rounding in bfloat16 would then decide what it says.
    """

    def observe(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d)
        assert norm.running_var is not None
        norm.running_var.copy_(inputs[0].square().mean().clamp_min(norm.eps))

    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    hooks = [norm.register_forward_pre_hook(observe) for norm in norms]
    try:
        network(image)
    finally:
        for hook in hooks:
            hook.remove()
