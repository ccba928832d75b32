# SPDX-License-Identifier: Apache-2.0
"""Fréchet distance between images in the features of a declared network (FID; Heusel et al. 2017).

python -m faceedit.training.fid WEIGHTS --recipe stylegan2-starter --images 5000

The number means nothing without its network, so a result carries its name: Inception-v3 on ImageNet where torchvision's
weights are on this machine, otherwise the attribute classifier that ships with the package.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.classification import STARTER
from faceedit.errors import MissingExtraError, WeightsError

if TYPE_CHECKING:
    from faceedit.networks.stylegan2 import StyleGAN2Generator

INCEPTION = "inception-v3"
_BATCH = 32


@dataclass(frozen=True, slots=True)
class FeatureNetwork:
    """What images are compared by.

    Args: name, declared with every result; width, features of an image; extract, images N×3×H×W in [-1, 1] of any size
          to features N×width on the CPU.
    """

    name: str
    width: int
    extract: Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class FeatureStatistics:
    """Mean (D) and covariance (D,D, divisor count − 1) of features, float64."""

    mean: Tensor
    covariance: Tensor
    count: int

    @staticmethod
    def of(batches: Iterable[Tensor]) -> FeatureStatistics:
        """Statistics of features N×D that come in batches. Raises ValueError for fewer than two of them."""
        features = torch.cat([batch.detach().cpu().double() for batch in batches])
        if len(features) < 2:
            raise ValueError(f"FeatureStatistics: there must be two features or more, got {len(features)}; add images")
        return FeatureStatistics(
            features.mean(0), torch.cov(features.t()).reshape(features.shape[1], -1), len(features)
        )


@dataclass(frozen=True, slots=True)
class FIDResult:
    """A distance, and what it was measured with: the network's name and the number of images on either side."""

    value: float
    network: str
    images: int
    references: int

    @property
    def label(self) -> str:
        """The metric's full name, e.g. "FID (attribute-classifier-starter features)"."""
        return f"FID ({self.network} features)"

    @property
    def key(self) -> str:
        """The metric's name in logs and weight headers."""
        return f"fid_{self.network}"

    def __str__(self) -> str:
        return f"{self.label}: {self.value:.3f}, {self.images} images against {self.references}"


def frechet_distance(one: FeatureStatistics, other: FeatureStatistics) -> float:
    """‖μ₁ − μ₂‖² + Tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½), the distance of two Gaussians, in float64.

    The trace of (Σ₁Σ₂)^½ is that of (Σ₁^½ Σ₂ Σ₁^½)^½, which is symmetric: its eigenvalues are real and, once rounding
    below zero is clamped, not negative. A singular covariance, of fewer images than features, needs no care.
    """
    half = _symmetric_root(one.covariance)
    cross = _symmetric_eigenvalues(half @ other.covariance @ half).sqrt().sum()
    means = (one.mean - other.mean).square().sum()
    return max(0.0, float(means + one.covariance.trace() + other.covariance.trace() - 2 * cross))


def _symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh((matrix + matrix.t()) / 2)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.t()


def _symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    return torch.linalg.eigvalsh((matrix + matrix.t()) / 2).clamp_min(0)


def fid(network: FeatureNetwork, made: Iterable[Tensor], reference: FeatureStatistics | Iterable[Tensor]) -> FIDResult:
    """FID of images that come in batches N×3×H×W in [-1, 1], against others or against their statistics."""
    if not isinstance(reference, FeatureStatistics):
        reference = FeatureStatistics.of(network.extract(batch) for batch in reference)
    statistics = FeatureStatistics.of(network.extract(batch) for batch in made)
    value = frechet_distance(statistics, reference)
    return FIDResult(value, network.name, statistics.count, reference.count)


def feature_network(name: str = "auto", device: torch.device | str = "cpu") -> FeatureNetwork:
    """The feature network called `name`.

    Args:   "inception-v3" (torchvision's, 2048 pooled features at 299²), the name or path of an attribute classifier's
            weights (the units before its outputs), or "auto": Inception where its ImageNet weights are on this machine,
            else attribute-classifier-starter. Nothing is downloaded.
    Raises: WeightsError when the weights are not here; MissingExtraError without torchvision.
    """
    if name == INCEPTION or (name == "auto" and inception_weights().is_file()):
        return _inception(device)
    return _classifier(STARTER if name == "auto" else name, device)


def inception_weights() -> Path:
    """Where torchvision keeps its ImageNet weights of Inception-v3 on this machine, present or not."""
    try:
        from torchvision.models import Inception_V3_Weights
    except ImportError as error:
        raise MissingExtraError(
            "feature_network: torchvision must be installed; run pip install torchvision"
        ) from error
    return Path(torch.hub.get_dir()) / "checkpoints" / Inception_V3_Weights.IMAGENET1K_V1.url.rpartition("/")[2]


def _inception(device: torch.device | str) -> FeatureNetwork:
    from torchvision.models import inception_v3

    path = inception_weights()
    if not path.is_file():
        raise WeightsError(
            f"feature_network: Inception-v3's ImageNet weights must be at {path}, got no file; fetch them with "
            "torchvision, or name another network"
        )
    network = inception_v3(weights=None, init_weights=False)  # in [-1, 1], as its weights were trained
    network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    network.fc = torch.nn.Identity()
    network.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def extract(image: Tensor) -> Tensor:
        return cast(Tensor, network(_resized(image, 299).float().to(device))).cpu()

    return FeatureNetwork(INCEPTION, 2048, extract)


def _classifier(name: str, device: torch.device | str) -> FeatureNetwork:
    from faceedit.networks.classifier import AttributeClassifier
    from faceedit.registry import load_network

    network = load_network(name, device, kind="attribute-classifier")
    assert isinstance(network, AttributeClassifier)

    @torch.no_grad()
    def extract(image: Tensor) -> Tensor:
        return network.embedding(_resized(image, network.config.size_px).float().to(device)).cpu()

    return FeatureNetwork(Path(name).stem, network.config.hidden_width, extract)


def _resized(image: Tensor, size_px: int) -> Tensor:
    """Clamped to [-1, 1], as a file would hold it, and resized with antialiasing."""
    image = image.clamp(-1, 1)
    if image.shape[-2:] == (size_px, size_px):
        return image
    return F.interpolate(image, (size_px, size_px), mode="bilinear", align_corners=False, antialias=True)


@torch.no_grad()
def generated_images(generator: StyleGAN2Generator, count: int, seed: int = 0, batch: int = _BATCH) -> Iterable[Tensor]:
    """`count` images of a generator in batches, with random noise and without truncation; the same for a seed."""
    device = generator.mapping.average.device
    draws = torch.Generator().manual_seed(seed)
    for start in range(0, count, batch):
        size = min(batch, count - start)
        z = torch.randn(size, generator.config.z_width, generator=draws)
        noise = generator.synthesis.draw_noise(size, draws, "cpu")
        yield generator.synthesis(generator.mapping(z.to(device)), [noise_map.to(device) for noise_map in noise])


def main(arguments: list[str] | None = None) -> None:
    """Print the FID of a generator's weights against the training images of a recipe."""
    parser = argparse.ArgumentParser(prog="python -m faceedit.training.fid", description=main.__doc__)
    parser.add_argument("weights", help="name or path of stylegan2 weights")
    parser.add_argument("--recipe", default="stylegan2-starter", help="whose images are the reference")
    parser.add_argument("--images", type=int, default=5000, help="how many on either side")
    parser.add_argument("--network", default="auto", help='"auto", "inception-v3" or classifier weights')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the recipe to change")
    options = parser.parse_args(arguments)
    from faceedit.registry import load_network
    from faceedit.training import resolve
    from faceedit.training.aligned import AlignedFaces

    recipe: Any = resolve(options.recipe, options.overrides)
    faces = AlignedFaces(recipe.images)
    generator = cast("StyleGAN2Generator", load_network(options.weights, options.device, kind="stylegan2"))
    network = feature_network(options.network, options.device)
    print(fid(network, generated_images(generator, options.images, options.seed), faces.batches(options.images)))


if __name__ == "__main__":
    main()
