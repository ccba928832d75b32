# SPDX-License-Identifier: Apache-2.0
"""Every count, rate, weight and choice of MaskFaceGAN's optimisation; the defaults are the released ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import MappingProxyType
from typing import Literal, get_type_hints

from faceedit.config import check_choices
from faceedit.errors import OutOfRangeError, UnknownNameError, suggestion

MAX_RATE = 1e30
"""What Adam can compute with; far below, an edit leaves the range of numbers and says so."""


@dataclass(frozen=True, slots=True)
class MaskFaceGANConfig:
    """How an edit is optimised. Iterations count from 0; a stage's last iteration is its count less one.

    Latent stage:
      latent_steps, its end; semantic_start, when semantics, shape and size join the appearance term and Adam starts
      anew; dynamic_stop, when masks stop following the edit; noise_start, when N(0, 1) maps take the place of no noise;
      encoder_start, the first iteration when the latent code was not the mean; latent_rate, Adam's rate.
      start, "mean" or "encoder"; mean_samples, latents that the mean is taken over, 0: the average kept with the
      weights. A global edit starts from the encoder whenever there is one.
    Noise stage:
      noise_steps; noise_rate; noise_stop_px, side at which the regulariser's pyramid ends; compat, True: maps are
      normalised between the loss and its backward pass, as the released code does, False: after the step.
    Terms: λ_M, λ_C, λ_S, λ_P, λ_R of the paper as appearance, semantic, shape, size and noise weight;
      perceptual_weight, the appearance term of a global edit; global_noise_appearance_weight, λ_M of its noise stage.
      Images count in [0, 1], as published. λ_S acts on hair alone, λ_P where a size is asked for. spread_weight, of how
      far the codes of an image's layers lie apart in the latent stage of a local edit: 0 as published; more keeps a
      generator that has seen little within what it knows.
    epsilon: smoothing of the targets: 1 asks for a probability of 1 - epsilon, 0 for epsilon. Smaller is stronger.
    Masks: dynamic, False: masks never follow the edit; blend, what of the generated image comes into the photo, "skin":
      skin and target (the paper), "target": the target as the input has it, "targets": where either image has it;
      hair_blend, "generated": an edit of hair shape is blended with the hair it made (the paper), "original": with the
      hair that was there (the released code); force_global, True: every attribute is edited as one of the whole face;
      min_region_share, least share of the crop that the region of an edit must cover.
    Computation: precision, "bfloat16": convolutions of all three networks in bfloat16, statistics, losses, latent code,
      maps and Adam in float32; cuda_graph: on a GPU, each phase's iteration is captured once and replayed; False: run.

    Raises: OutOfRangeError, UnknownNameError.
    """

    latent_steps: int = 1000
    semantic_start: int = 500
    dynamic_stop: int = 700
    noise_start: int = 700
    encoder_start: int = 300
    latent_rate: float = 1e-3
    start: Literal["mean", "encoder"] = "mean"
    mean_samples: int = 50_000

    noise_steps: int = 501
    noise_rate: float = 0.1
    noise_stop_px: int = 8
    compat: bool = False

    appearance_weight: float = 2.0
    semantic_weight: float = 0.005
    shape_weight: float = 0.5
    size_weight: float = 1.0
    noise_weight: float = 1.0
    perceptual_weight: float = 0.03
    global_noise_appearance_weight: float = 0.03
    spread_weight: float = 0.0
    epsilon: float = 0.05

    dynamic: bool = True
    blend: Literal["skin", "target", "targets"] = "skin"
    hair_blend: Literal["generated", "original"] = "generated"
    force_global: bool = False
    min_region_share: float = 2e-4

    precision: Literal["float32", "bfloat16"] = "float32"
    cuda_graph: bool = True

    def __post_init__(self) -> None:
        check_choices(self)
        kinds = get_type_hints(type(self))
        for field in fields(self):
            value, kind = getattr(self, field.name), kinds[field.name]
            if kind is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise OutOfRangeError(
                    f"MaskFaceGANConfig: {field.name} must be a whole number, got {value!r}; "
                    f"the default is {field.default}"
                )
            if isinstance(value, int | float) and not isinstance(value, bool) and not 0 <= value < math.inf:
                raise OutOfRangeError(
                    f"MaskFaceGANConfig: {field.name} must be finite and not negative, got {value:g}; "
                    f"the default is {field.default}"
                )
        if min(self.latent_rate, self.noise_rate) <= 0 or self.noise_stop_px < 1 or self.latent_steps < 1:
            raise OutOfRangeError(
                f"MaskFaceGANConfig: latent_steps, noise_stop_px and both rates must be positive, got "
                f"{self.latent_steps}, {self.noise_stop_px}, {self.latent_rate:g} and {self.noise_rate:g}; "
                "noise_steps=0 leaves the noise stage out"
            )
        if max(self.latent_rate, self.noise_rate) > MAX_RATE:
            raise OutOfRangeError(
                f"MaskFaceGANConfig: rates must be at most {MAX_RATE:g}, got {self.latent_rate:g} and "
                f"{self.noise_rate:g}; the defaults are 0.001 and 0.1"
            )
        if not 0 < self.epsilon < 0.5:
            raise OutOfRangeError(
                f"MaskFaceGANConfig: epsilon must lie between 0 and 0.5, got {self.epsilon:g}; the default is 0.05"
            )
        if max(self.semantic_start, self.encoder_start) >= self.latent_steps:
            raise OutOfRangeError(
                f"MaskFaceGANConfig: semantic_start and encoder_start must come before latent_steps, got "
                f"{self.semantic_start}, {self.encoder_start} and {self.latent_steps}; nothing would be edited"
            )
        if self.dynamic_stop < self.semantic_start:
            raise OutOfRangeError(
                f"MaskFaceGANConfig: dynamic_stop must not come before semantic_start, got {self.dynamic_stop} and "
                f"{self.semantic_start}; dynamic=False keeps the masks as they are"
            )


PRESETS: Mapping[str, MaskFaceGANConfig] = MappingProxyType(
    {
        "default": MaskFaceGANConfig(),
        # The released code's order of normalising noise, and its blending of hair.
        "code": MaskFaceGANConfig(compat=True, hair_blend="original"),
        # A fifth of the iterations at five times the latent rate. Given up: how closely the preserved skin is met
        # before the attribute is asked for, small steps near the end, most of the detail that noise brings back.
        "fast": MaskFaceGANConfig(
            latent_steps=200,
            semantic_start=100,
            dynamic_stop=140,
            noise_start=140,
            encoder_start=60,
            latent_rate=5e-3,
            mean_samples=10_000,
            noise_steps=101,
        ),
    }
)
"""Named configurations; `docs/maskfacegan.md` says what each is for."""


def preset(name: str) -> MaskFaceGANConfig:
    """The preset of that name. Raises UnknownNameError that lists the closest ones."""
    if name not in PRESETS:
        raise UnknownNameError(f"preset: name must be a known preset, got {name!r}; {suggestion(name, PRESETS)}")
    return PRESETS[name]
