# SPDX-License-Identifier: Apache-2.0
"""MagGAN (Wei et al. 2020): attribute editing that knows which facial parts an attribute may touch.

An encoder-decoder with Selective Transfer Units (STGAN, Liu et al. 2019) and a spatial condition: each attribute's
difference is painted only on the parts it concerns (`faceedit.relations`). Where the paper's supplement would be needed
(decoder layers, widths beyond 256²) the choice is this project's.

Deviations, each an option that is off by default:
* `output="residual"`: the network predicts what to add to the input. The shallowest skip has half the input's
  resolution, so an image predicted from scratch loses pores and single hairs; an added change keeps them.
* `output="layered"`: the residual, finished at the input's own size by two convolutions that see the input, over an
  input that the network may cover. Where an edit puts one thing in front of another (skin where hair was) a residual
  would have to carry the negative of every strand; an opacity hides them.
* `blend`: the paper's blending trick (13), with the soft mask, so that no hard seam appears.
* widths: `MagGANConfig.compact()` is a sixth of the paper's deepest width, to train and run on a CPU.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.attributes import MAGGAN
from faceedit.config import check_choices
from faceedit.kernels import noise_bias_act
from faceedit.labels import scheme
from faceedit.networks.resizing import resize
from faceedit.relations import Relations, influence_mask, mask_guided_conditioning, relation_matrices

Norm = Literal["batch", "instance", "layer"]
NUM_ATTRIBUTES = len(MAGGAN)
_BATCH_NORM_EPS = 1e-3  # TF-slim's default, which STGAN uses
_SLOPE = 0.2
_RESIDUAL_RANGE = 2.0  # any colour in [-1, 1] can reach any other
_CLEAR = -4.0  # logit of the opacity at the start of training: two percent


@dataclass(frozen=True, slots=True)
class MagGANConfig:
    """Size and choices of the generator; the defaults are the paper's at 128².

    Args: size_px, image side; base_width, max_width, channels of the first encoder stage and their cap, doubling
          between; encoder_stages, halvings; stu_units, skips that pass a transfer unit (the deepest ones; the others
          are dropped); label_scheme, relation_preset, how `faceedit.relations` reads the mask; decoder, "spade"
          (denormalisation) or "plain" (STGAN's); encoder_norm, decoder_norm; spade_width, hidden channels of a SPADE
          block; output, "image", "residual" or "layered"; detail_width, hidden channels of the layered output's
          convolutions at full size; blend, whether the result is composited by the soft preserve mask.
    """

    size_px: int = 128
    base_width: int = 64
    max_width: int = 1024
    encoder_stages: int = 5
    stu_units: int = 4
    label_scheme: str = "celebamask-hq"
    relation_preset: str = "paper"
    decoder: Literal["spade", "plain"] = "spade"
    encoder_norm: Norm = "batch"
    decoder_norm: Norm = "layer"
    spade_width: int = 128
    output: Literal["image", "residual", "layered"] = "image"
    detail_width: int = 16
    blend: bool = False

    def __post_init__(self) -> None:
        check_choices(self)
        if self.encoder_stages < 1 or self.size_px % 2**self.encoder_stages:
            raise ValueError(
                f"MagGANConfig: size_px must be a multiple of 2**encoder_stages, got {self.size_px} and "
                f"{self.encoder_stages}; "
                "use fewer stages"
            )
        if not 0 <= self.stu_units < self.encoder_stages:
            raise ValueError(
                f"MagGANConfig: stu_units must be 0..{self.encoder_stages - 1}, got {self.stu_units}; a unit needs a "
                "deeper stage"
            )

    def width(self, level: int) -> int:
        """Channels of encoder level 1..encoder_stages (level l has side size_px / 2**l)."""
        return min(self.base_width * 2 ** (level - 1), self.max_width)

    @classmethod
    def paper(cls, size_px: int = 128, **changes: Any) -> "MagGANConfig":
        """The paper's network at 128, 256, 512 or 1024 px; the last two have more stages and start narrower."""
        widths = {128: (64, 5), 256: (64, 5), 512: (48, 6), 1024: (32, 7)}
        if size_px not in widths:
            raise ValueError(f"MagGANConfig.paper: size_px must be one of {list(widths)}, got {size_px}; use compact()")
        base_width, stages = widths[size_px]
        return replace(cls(size_px=size_px, base_width=base_width, encoder_stages=stages), **changes)

    @classmethod
    def compact(cls, **changes: Any) -> "MagGANConfig":
        """256², narrow, with a residual output: trains and runs on a CPU, and in fp16 fits a bundled weights file."""
        compact = cls(size_px=256, base_width=32, max_width=160, spade_width=32, output="residual")
        return replace(compact, **changes)


def _norm(kind: Norm, channels: int, *, affine: bool = True) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels, eps=_BATCH_NORM_EPS, affine=affine)
    if kind == "instance":
        return nn.InstanceNorm2d(channels, affine=affine)
    return nn.GroupNorm(1, channels, affine=affine)  # one group: layer norm over (C, H, W), in any memory format


def _join(first: Tensor, *others: Tensor) -> Tensor:
    """Concatenate channels in the first tensor's dtype, so that autocast's half precision is not widened again."""
    return torch.cat([first, *(other.to(first.dtype) for other in others)], dim=1)


def _upsampling(in_channels: int, out_channels: int, *, bias: bool) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(in_channels, out_channels, 4, stride=2, padding=1, bias=bias)


class _ConvAct(nn.Conv2d):
    """Conv3 whose bias and activation are one pass over memory."""

    def __init__(self, in_channels: int, out_channels: int, act: str) -> None:
        super().__init__(in_channels, out_channels, 3, padding=1)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return noise_bias_act(self._conv_forward(x, self.weight, None), bias=self.bias, act=self.act)


class _EncoderStage(nn.Module):
    """Conv4 s2, norm, leaky ReLU."""

    def __init__(self, in_channels: int, out_channels: int, norm: Norm) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 4, stride=2, padding=1, bias=False)
        self.norm = _norm(norm, out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(self.norm(self.conv(x)), _SLOPE)


class SelectiveTransferUnit(nn.Module):
    """A convolutional gated unit that decides, by the condition, what an encoder feature hands to the decoder.

    ŝ = up([state, a]);  r, u = σ(conv([f, ŝ]));  s = r ⊙ ŝ;  h = tanh(conv([f, s]));  f' = (1−u) ⊙ ŝ + u ⊙ h

    Args:    feature f (N,C,H,W), state (N,C',H/2,W/2), condition a (N,13,H/2,W/2).
    Returns: f' for the decoder and s for the next unit, both (N,C,H,W).
    Source:  Liu et al. 2019 (STGAN), eqs. of its STU. The two gates are one convolution here.
    """

    def __init__(self, state_channels: int, channels: int) -> None:
        super().__init__()
        self.up = _upsampling(state_channels + NUM_ATTRIBUTES, channels, bias=True)
        self.gates = _ConvAct(2 * channels, 2 * channels, "sigmoid")
        self.candidate = _ConvAct(2 * channels, channels, "tanh")

    def forward(self, feature: Tensor, state: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.up(_join(state, condition))
        reset, update = self.gates(_join(hidden, feature)).chunk(2, dim=1)
        state = reset * hidden
        candidate = self.candidate(_join(state, feature))
        return torch.lerp(hidden, candidate, update), state


class _SpadeStage(nn.Module):
    """ConvT4 s2, normalisation without parameters, then scale and shift predicted from condition and skip, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, skip_channels: int, config: MagGANConfig) -> None:
        super().__init__()
        # Only the layer norm leaves a channel's bias standing.
        self.up = _upsampling(in_channels, out_channels, bias=config.decoder_norm == "layer")
        self.norm = _norm(config.decoder_norm, out_channels, affine=False)
        self.hidden = _ConvAct(NUM_ATTRIBUTES + skip_channels, config.spade_width, "relu")
        self.scale_shift = nn.Conv2d(config.spade_width, 2 * out_channels, 3, padding=1)
        self.out_channels = out_channels

    def forward(self, x: Tensor, skip: Tensor | None, condition: Tensor) -> Tensor:
        x = self.up(x)
        normal = self.norm(x).to(x.dtype)
        guide = condition.to(x.dtype) if skip is None else _join(skip, condition)
        scale, shift = self.scale_shift(self.hidden(guide)).chunk(2, dim=1)
        return F.relu(torch.addcmul(shift, 1 + scale, normal))


class _PlainStage(nn.Module):
    """STGAN's decoder stage: ConvT4 s2, norm, ReLU, then the skip and the condition are concatenated."""

    def __init__(self, in_channels: int, out_channels: int, skip_channels: int, config: MagGANConfig) -> None:
        super().__init__()
        self.up = _upsampling(in_channels, out_channels, bias=False)
        self.norm = _norm(config.decoder_norm, out_channels)
        self.out_channels = out_channels + skip_channels + NUM_ATTRIBUTES

    def forward(self, x: Tensor, skip: Tensor | None, condition: Tensor) -> Tensor:
        x = self.up(x)
        x = F.relu(self.norm(x).to(x.dtype))
        return _join(x, condition) if skip is None else _join(x, skip, condition)


class _Detail(nn.Module):
    """Finish a change at full size: decoder features, the coarse change and the image give its correction and opacity.

    Flow:    ConvT4 s2 of the features; conv3 of [that, coarse change, image], leaky ReLU; conv3, zero at the start.
    Args:    features (N,C,S/2,S/2), coarse (N,3,S,S) before its tanh, image (N,3,S,S).
    Returns: the change before its tanh (N,3,S,S), and in [0, 1] how much of the image it covers (N,1,S,S).
    """

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.up = _upsampling(in_channels, width, bias=False)
        self.hidden = _ConvAct(width + 6, width, "lrelu")
        self.layer = nn.Conv2d(width, 4, 3, padding=1)
        nn.init.zeros_(self.layer.weight)
        with torch.no_grad():
            self.layer.bias.copy_(torch.tensor([0.0, 0.0, 0.0, _CLEAR]))  # type: ignore[union-attr]

    def forward(self, features: Tensor, coarse: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        found = self.layer(self.hidden(_join(self.up(features), coarse, image)))
        return coarse + found[:, :3], torch.sigmoid(found[:, 3:])


class EditLayers(NamedTuple):
    """An edited image (N,3,S,S) in [-1, 1] and how much of the input it hides, opacity (N,1,S,S) in [0, 1]."""

    image: Tensor
    opacity: Tensor


class MagGANGenerator(nn.Module):
    """Change attributes of an aligned face, on the parts they concern.

    Flow:    encoder f1..fL; transfer units from deep to shallow turn f into f'; decoder from [fL, a] upwards with f' as
             skips and the condition a at every size.
    Args:    image (N,3,S,S) in [-1, 1]; attribute_difference (N,13), target minus source, {−1, 0, 1} in training,
             scaled by intensity at test; mask (N,19,S',S') soft, summing to 1, in the configured scheme.
    Returns: image (N,3,S,S) in [-1, 1]. A residual or layered output is clamped in evaluation only: in training a pixel
             that overshoots must still receive its gradient. With `with_opacity` an `EditLayers`.
    Raises:  ValueError on shapes.
    Config:  MagGANConfig.
    Source:  MagGAN section 3, eqs. (11)-(13); STGAN.
    """

    relation_plus: Tensor
    relation_minus: Tensor

    def __init__(self, config: MagGANConfig) -> None:
        super().__init__()
        self.config = config
        depth = config.encoder_stages
        self.encoder = nn.ModuleList(
            _EncoderStage(3 if level == 1 else config.width(level - 1), config.width(level), config.encoder_norm)
            for level in range(1, depth + 1)
        )
        self.transfer_levels = tuple(range(depth - 1, depth - 1 - config.stu_units, -1))
        self.transfer = nn.ModuleList(
            SelectiveTransferUnit(config.width(level + 1), config.width(level)) for level in self.transfer_levels
        )
        stage_type = _SpadeStage if config.decoder == "spade" else _PlainStage
        channels = config.width(depth) + NUM_ATTRIBUTES
        self.decoder = nn.ModuleList()
        for level in range(depth - 1, 0, -1):
            skip_channels = config.width(level) if level in self.transfer_levels else 0
            self.decoder.append(stage_type(channels, config.width(level + 1), skip_channels, config))
            channels = self.decoder[-1].out_channels  # type: ignore[assignment]
        self.to_rgb = _upsampling(channels, 3, bias=True)
        if config.output != "image":
            nn.init.normal_(self.to_rgb.weight, std=1e-3)  # start from (almost) the identity
            nn.init.zeros_(self.to_rgb.bias)  # type: ignore[arg-type]
        self.detail = _Detail(channels, config.detail_width) if config.output == "layered" else None
        relations = relation_matrices(scheme(config.label_scheme), config.relation_preset)
        self.register_buffer("relation_plus", relations.plus, persistent=False)
        self.register_buffer("relation_minus", relations.minus, persistent=False)

    @property
    def relations(self) -> Relations:
        """AR⁺ and AR⁻ on the network's device, for the losses and masks that go with it."""
        return Relations(self.relation_plus, self.relation_minus)

    def forward(
        self, image: Tensor, attribute_difference: Tensor, mask: Tensor, with_opacity: bool = False
    ) -> Tensor | EditLayers:
        # The condition is linear in the mask and first needed at half size.
        half = resize(mask, self.config.size_px // 2)
        layers = self.layers(image, mask_guided_conditioning(attribute_difference, half, self.relations))
        if self.config.blend:
            influence = resize(influence_mask(attribute_difference, mask, self.relations), self.config.size_px)
            influence = influence.to(image)
            layers = EditLayers(torch.lerp(image, layers.image, influence), layers.opacity * influence)
        return layers if with_opacity else layers.image

    def layers(self, image: Tensor, condition: Tensor) -> EditLayers:
        """The network itself, with a ready condition (N,13,s,s) of any size in place of difference and mask.

        Only a layered output has an opacity between 0 and 1; a residual covers nothing, a new image everything.
        """
        config = self.config
        if image.ndim != 4 or image.shape[1:] != (3, config.size_px, config.size_px):
            raise ValueError(
                f"MagGANGenerator: image must be (N,3,{config.size_px},{config.size_px}), got {tuple(image.shape)}; "
                "align the face to the network's size"
            )
        if condition.ndim != 4 or condition.shape[:2] != (image.shape[0], NUM_ATTRIBUTES):
            raise ValueError(
                f"MagGANGenerator: condition must be ({image.shape[0]},{NUM_ATTRIBUTES},s,s), got "
                f"{tuple(condition.shape)}; "
                "build it with mask_guided_conditioning"
            )
        features, conditions = [image], [resize(condition, config.size_px // 2)] * 2
        for level, stage in enumerate(self.encoder, start=1):
            features.append(stage(features[-1]))
            if level > 1:
                conditions.append(F.avg_pool2d(conditions[-1], 2))
        state, skips = features[-1], {}
        for level, unit in zip(self.transfer_levels, self.transfer, strict=True):
            skips[level], state = unit(features[level], state, conditions[level + 1])
        x = _join(features[-1], conditions[-1])
        for level, stage in zip(range(config.encoder_stages - 1, 0, -1), self.decoder, strict=True):
            x = stage(x, skips.get(level), conditions[level])
        change = self.to_rgb(x)
        if config.output == "image":
            edited = torch.tanh(change).to(image.dtype)
            return EditLayers(edited, torch.ones_like(edited[:, :1]))
        opacity = torch.zeros_like(image[:, :1])
        if self.detail is not None:
            change, opacity = self.detail(x, change, image)
            opacity = opacity.to(image.dtype)
        edited = image * (1 - opacity) + _RESIDUAL_RANGE * torch.tanh(change).to(image.dtype)
        return EditLayers(edited if self.training else edited.clamp(-1, 1), opacity)


@dataclass(frozen=True, slots=True)
class MagGANDiscriminatorConfig:
    """Size of the discriminator; the defaults are STGAN's at 128².

    Args: input_px, what each level sees; base_width, max_width, stages, as in the generator; head_width, hidden units
          of each head; is_pooled, global average pooling before the heads, so that one shape serves whole images and
          patches; levels, P of the paper; crops, patches taken from each image at the finer levels.
    """

    input_px: int = 128
    base_width: int = 64
    max_width: int = 1024
    stages: int = 5
    head_width: int = 1024
    is_pooled: bool = False
    levels: int = 1
    crops: int = 2

    def __post_init__(self) -> None:
        if self.input_px % 2**self.stages:
            raise ValueError(
                f"MagGANDiscriminatorConfig: input_px must be a multiple of 2**stages, got {self.input_px} and "
                f"{self.stages}; "
                "use fewer stages"
            )
        if self.levels < 1 or (self.levels > 1 and not self.is_pooled):
            raise ValueError(
                f"MagGANDiscriminatorConfig: levels must be 1 unless is_pooled, got {self.levels}; set is_pooled"
            )

    @property
    def size_px(self) -> int:
        """Side of the images that are judged: each finer level doubles it."""
        return self.input_px * 2 ** (self.levels - 1)

    @classmethod
    def paper(cls, size_px: int = 128, **changes: Any) -> "MagGANDiscriminatorConfig":
        """One level at 128 and 256 px, two at 512, three at 1024; heads are pooled from 256 px on."""
        levels = {128: 1, 256: 1, 512: 2, 1024: 3}
        if size_px not in levels:
            raise ValueError(f"MagGANDiscriminatorConfig.paper: size_px must be one of {list(levels)}, got {size_px}")
        return replace(cls(input_px=min(size_px, 256), is_pooled=size_px > 128, levels=levels[size_px]), **changes)


class Judgement(NamedTuple):
    """What one level says of its views: critic (M,1), higher is more real, and attribute logits (M,13)."""

    critic: Tensor
    logits: Tensor


class MagGANCritic(nn.Module):
    """One level: convolutions with affine instance norm, then a critic head and an attribute head. (M,3,s,s) ->
    Judgement.

    Twice differentiable, as the gradient penalty needs.
    """

    def __init__(self, config: MagGANDiscriminatorConfig) -> None:
        super().__init__()
        widths = [3] + [min(config.base_width * 2**stage, config.max_width) for stage in range(config.stages)]
        self.stages = nn.ModuleList(_EncoderStage(before, after, "instance") for before, after in pairwise(widths))
        self.is_pooled = config.is_pooled
        side = 1 if config.is_pooled else config.input_px // 2**config.stages
        flat = widths[-1] * side * side
        self.critic, self.attributes = (
            nn.Sequential(nn.Linear(flat, config.head_width), nn.LeakyReLU(_SLOPE), nn.Linear(config.head_width, out))
            for out in (1, NUM_ATTRIBUTES)
        )

    def forward(self, x: Tensor) -> Judgement:
        for stage in self.stages:
            x = stage(x)
        x = x.mean(dim=(2, 3)) if self.is_pooled else x.flatten(1)
        return Judgement(self.critic(x), self.attributes(x))


class MagGANDiscriminator(nn.Module):
    """Multi-level patch discriminator: the coarsest level sees the whole image, finer ones patches of finer images.

    Args:    image (N,3,S,S) in [-1, 1] with S = config.size_px; generator, what draws the patches (default: torch's).
    Returns: one Judgement a level, coarsest first: N rows at the first, N·crops at the others, ordered crop by crop, so
             that labels repeat as `labels.repeat(crops, 1)`.
    Config:  MagGANDiscriminatorConfig.
    Source:  MagGAN section 3.4. Patches of real and edited images need not coincide.
    """

    def __init__(self, config: MagGANDiscriminatorConfig) -> None:
        super().__init__()
        self.config = config
        self.levels = nn.ModuleList(MagGANCritic(config) for _ in range(config.levels))

    def views(self, image: Tensor, generator: torch.Generator | None = None) -> list[Tensor]:
        """What each level looks at; a gradient penalty interpolates between these."""
        config = self.config
        if image.ndim != 4 or image.shape[1:] != (3, config.size_px, config.size_px):
            raise ValueError(
                f"MagGANDiscriminator: image must be (N,3,{config.size_px},{config.size_px}), got "
                f"{tuple(image.shape)}; "
                "resize it first"
            )
        views = [resize(image, config.input_px)]
        for level in range(1, config.levels):
            size_px = config.input_px * 2**level
            finer, room = resize(image, size_px), size_px - config.input_px + 1
            corners = torch.randint(room, (config.crops, image.shape[0], 2), generator=generator).tolist()
            patches = [
                finer[i, :, top : top + config.input_px, left : left + config.input_px]
                for crop in corners
                for i, (top, left) in enumerate(crop)
            ]
            views.append(torch.stack(patches))
        return views

    def forward(self, image: Tensor, generator: torch.Generator | None = None) -> list[Judgement]:
        return [level(view) for level, view in zip(self.levels, self.views(image, generator), strict=True)]
