# SPDX-License-Identifier: Apache-2.0
"""Find the styles and noise maps with which a StyleGAN2 generator shows given images.

    result = project(G, images);  again = G.synthesis(result.ws, result.noise)

The optimisation of Karras et al. 2020 (StyleGAN2), appendix D, in W+ or W. Images of a batch have no influence on each
other: each has its own loss, and all see the same random numbers, so that an image's result is that of projecting it
alone, up to the rounding of batched arithmetic.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.errors import FaceEditError
from faceedit.kernels import noise_regularizer, normalize_noise_
from faceedit.networks.classifier import AttributeClassifier
from faceedit.networks.stylegan2 import StyleGAN2Generator

Embedding = Callable[[Tensor], Sequence[Tensor]]
"""What images are compared by: N×3×S×S in [-1, 1] to tensors N×…, whose squared differences are summed over all."""


_MAX_RATE = 1e30  # what Adam can compute with


class ProjectionError(FaceEditError):
    """The optimisation left the range of numbers."""


@dataclass(frozen=True, slots=True)
class ProjectionConfig:
    """The schedule; the defaults are the paper's.

    Args: steps; rate, Adam's highest learning rate; warm_up and cool_down, shares of the steps in which it rises
          (linearly) and falls (as a cosine); space, "w+" (a style a layer) or "w" (one for all); spread, standard
          deviations of w that noise on the styles has at first; spread_until, share of the steps in which it vanishes;
          noise_weight, of the penalty on noise maps that are not noise; average_samples, latents by which the spread of
          w is measured.
    """

    steps: int = 1000
    rate: float = 0.1
    warm_up: float = 0.05
    cool_down: float = 0.25
    space: Literal["w+", "w"] = "w+"
    spread: float = 0.05
    spread_until: float = 0.75
    noise_weight: float = 1e5
    average_samples: int = 10_000

    def __post_init__(self) -> None:
        if self.steps < 1 or self.average_samples < 2:
            raise ValueError(
                f"ProjectionConfig: steps and average_samples must be positive, got {self.steps} and "
                f"{self.average_samples}; the paper has 1000 and 10000"
            )
        for name in ("rate", "spread_until"):
            if not getattr(self, name) > 0:
                raise ValueError(f"ProjectionConfig: {name} must be positive, got {getattr(self, name)}; raise it")
        if self.rate > _MAX_RATE:
            raise ValueError(f"ProjectionConfig: rate must be at most {_MAX_RATE:g}, got {self.rate:g}; lower it")
        if self.space not in ("w+", "w"):
            raise ValueError(f'ProjectionConfig: space must be "w+" or "w", got {self.space!r}; choose one of them')

    def rate_at(self, step: int) -> float:
        """Learning rate of a step (0-based): `rate` times the cosine of the cool-down times the warm-up."""
        done = step / self.steps
        fall = min(1.0, (1 - done) / self.cool_down) if self.cool_down > 0 else 1.0
        rise = min(1.0, done / self.warm_up) if self.warm_up > 0 else 1.0
        return self.rate * (0.5 - 0.5 * math.cos(fall * math.pi)) * rise

    def spread_at(self, step: int) -> float:
        """Standard deviations of w that the styles' noise has at a step (0-based)."""
        return self.spread * max(0.0, 1 - step / self.steps / self.spread_until) ** 2


@dataclass(frozen=True, slots=True)
class ProjectionStep:
    """What a callback sees: steps done, of how many, the images of that step (N,3,S,S), and what its loss was made of:
    their distances (N) and, not weighted, how far their maps were from noise (N)."""

    step: int
    steps: int
    image: Tensor
    distance: Tensor
    noise_penalty: Tensor


@dataclass(frozen=True, slots=True)
class Projection:
    """Styles ws (N,L,W), noise maps as `G.synthesis` takes them, and what each step's loss was made of.

    distance, noise_penalty (T,N): per step and image, before the step; T is less than was asked for if the callback
    ended it.
    """

    ws: Tensor
    noise: list[Tensor]
    distance: Tensor
    noise_penalty: Tensor

    def tensors(self) -> dict[str, Tensor]:
        """What `G.synthesis` takes, by name, to be stored: "ws", and "noise.0", "noise.1", … in their order."""
        return {"ws": self.ws} | {f"noise.{k}": one for k, one in enumerate(self.noise)}


@torch.inference_mode(False)  # with gradients, whatever mode the caller is in
def project(
    generator: StyleGAN2Generator,
    image: Tensor,
    config: ProjectionConfig | None = None,
    *,
    embedding: Embedding | None = None,
    start: Tensor | None = None,
    seed: int = 0,
    callback: Callable[[ProjectionStep], bool | None] | None = None,
    callback_every: int = 50,
) -> Projection:
    """Project images on a generator.

    Args:    generator, in evaluation mode, its weights frozen or not: they get no gradient; image (N,3,S,S) in [-1, 1],
             of the generator's size, on its device, framed as its training images; embedding, what distances are
             measured in (default: `face_embedding()`, which ships; LPIPS or any other network fits as well); start, the
             first styles (N|1,L,W), of an encoder for instance (default: the average w); seed, of the noise maps and of
             the noise on the styles; callback, called after every `callback_every`-th step; returning True ends the
             projection there.
    Returns: Projection, without gradients; bit for bit the same for the same arguments, CPU and number of threads.
    Raises:  ValueError on shapes; ProjectionError when a loss is not finite, at the callback's next call or the end.
    Source:  Karras et al. 2020, appendix D, whose distance is LPIPS and whose space is W.
    """
    config = config or ProjectionConfig()
    _check(generator, image, start, callback_every)
    image = image.clone()  # the caller's may be of an inference mode, which no gradient may pass
    embedding = face_embedding(image.device) if embedding is None else embedding
    draws = torch.Generator().manual_seed(seed)
    average, deviation = _statistics_of_w(generator, config.average_samples, draws)
    count, layers = image.shape[0], generator.config.num_ws if config.space == "w+" else 1
    first = average.expand(1, layers, -1) if start is None else start.detach().clone()
    if layers == 1 and first.shape[1] > 1:
        first = first.mean(1, keepdim=True)
    ws = first.expand(count, layers, -1).clone().requires_grad_(True)
    # One draw for all images: no image's result depends on its place in the batch.
    noise = [
        one.to(ws).expand(count, -1, -1, -1).clone().requires_grad_(True)
        for one in generator.synthesis.draw_noise(1, draws, "cpu")
    ]
    optimizer = torch.optim.Adam([ws, *noise], lr=config.rate)
    with torch.no_grad():
        wanted = embedding(image)
    distances, penalties = [], []
    for step in range(config.steps):
        optimizer.param_groups[0]["lr"] = config.rate_at(step)
        wander = torch.randn(1, *ws.shape[1:], generator=draws).to(ws) * (deviation * config.spread_at(step))
        made = generator.synthesis((ws + wander).expand(-1, generator.config.num_ws, -1), noise)
        distance = squared_distance(embedding(made), wanted)
        penalty = noise_regularizer(noise).to(distance)
        loss = (distance + config.noise_weight * penalty).sum()
        gradients = torch.autograd.grad(loss, [ws, *noise])
        for parameter, gradient in zip([ws, *noise], gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        normalize_noise_(noise)
        distances.append(distance.detach())
        penalties.append(penalty.detach())
        if callback is not None and (step + 1) % callback_every == 0:
            _require_finite(distances[-1], step)
            if callback(ProjectionStep(step + 1, config.steps, made.detach(), distances[-1], penalties[-1])):
                break
    _require_finite(distances[-1], len(distances) - 1)
    found = ws.detach().expand(-1, generator.config.num_ws, -1).contiguous()
    return Projection(found, [one.detach() for one in noise], torch.stack(distances), torch.stack(penalties))


def squared_distance(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    """Sum of squared differences of two embeddings, a value (N) for each image."""
    parts = [(a - b).square().flatten(1).sum(1) for a, b in zip(one, other, strict=True)]
    return torch.stack(parts).sum(0)


def pixel_embedding(image: Tensor) -> list[Tensor]:
    """The pixels themselves: the distance is the mean squared error."""
    return [image / math.sqrt(image[0].numel())]


def face_embedding(device: torch.device | str = "cpu", pixel_weight: float = 1.0) -> Embedding:
    """The embedding that ships: features of attribute-classifier-starter, and pixels.

    Raises: WeightsError when the classifier is not installed.
    """
    from faceedit.registry import load_network

    network = load_network("attribute-classifier-starter", device, kind="attribute-classifier")
    assert isinstance(network, AttributeClassifier)
    return classifier_embedding(network, pixel_weight)


def classifier_embedding(network: AttributeClassifier, pixel_weight: float = 1.0) -> Embedding:
    """LPIPS's form on a classifier of faces: after each stage, features of unit length at every place.

    The distance is the sum over stages of the mean over places of ‖f − g‖², and `pixel_weight` times the mean squared
    error. Unlike LPIPS's, stages are not weighted by human judgements. Images of another size than the network's are
    resized with antialiasing for the features.
    """

    def embed(image: Tensor) -> list[Tensor]:
        side = (network.config.size_px, network.config.size_px)
        x = image
        if image.shape[-2:] != side:
            x = F.interpolate(image, side, mode="bilinear", align_corners=False, antialias=True)
        parts = [math.sqrt(pixel_weight) * pixel for pixel in pixel_embedding(image)]
        for layer in network.features:
            if isinstance(layer, nn.MaxPool2d):
                unit = x * (x.square().sum(1, keepdim=True) + 1e-10).rsqrt()
                parts.append(unit / math.sqrt(x.shape[2] * x.shape[3]))
            x = layer(x)
        return parts

    return embed


@torch.no_grad()
def _statistics_of_w(generator: StyleGAN2Generator, samples: int, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mean of w (W), and the root of its total variance, as the paper's projector measures it."""
    like = generator.mapping.average
    w = generator.mapping.w(torch.randn(samples, generator.config.z_width, generator=draws).to(like))
    average = w.mean(0)
    return average, (w - average).square().sum().div(samples).sqrt()


def _check(generator: StyleGAN2Generator, image: Tensor, start: Tensor | None, callback_every: int) -> None:
    config = generator.config
    side = config.size_px
    if image.ndim != 4 or image.shape[1:] != (3, side, side):
        raise ValueError(
            f"project: image must be (N,3,{side},{side}), got {tuple(image.shape)}; align the photo at that size"
        )
    if start is not None and (
        start.ndim != 3 or start.shape[0] not in (1, len(image)) or start.shape[1:] != (config.num_ws, config.w_width)
    ):
        raise ValueError(
            f"project: start must be ({len(image)}|1,{config.num_ws},{config.w_width}), got {tuple(start.shape)}; "
            "use styles of this generator"
        )
    if callback_every < 1:
        raise ValueError(f"project: callback_every must be positive, got {callback_every}; call it every few steps")


def _require_finite(distance: Tensor, step: int) -> None:
    bad = (~distance.isfinite()).nonzero()[:, 0].tolist()
    if bad:
        raise ProjectionError(
            f"project: distance must be finite, got nan or inf by step {step} for image {bad[0]}; lower the rate or "
            "run the generator in fp32"
        )
