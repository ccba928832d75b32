# SPDX-License-Identifier: Apache-2.0
"""Fréchet distance between images in the features of a declared network (FID; Heusel et al. 2017).

python -m faceedit.training.fid WEIGHTS --recipe stylegan2-starter --images 5000

The number means nothing without its network, so a result carries its name: Inception-v3 on ImageNet where torchvision's
weights are on this machine, otherwise the attribute classifier that ships with the package.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.classification import STARTER
from faceedit.errors import FaceEditError, MissingExtraError, UsageError, WeightsError
from faceedit.training.command import progress, require_option, run_command

if TYPE_CHECKING:
    from faceedit.networks.stylegan2 import StyleGAN2Generator
    from faceedit.training.aligned import AlignedConfig

INCEPTION = "inception-v3"
_BATCH = 32
_FEWEST = 2


class FeatureNetwork(nn.Module):
    """What images are compared by.

    Args: name, declared with every result; num_features, width of an image's features; extract, images N×3×H×W in
          [-1, 1] of any size to features N×num_features on the CPU.
    """

    def __init__(self, name: str, num_features: int, extract: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.name, self.num_features, self.extract = name, num_features, extract

    def forward(self, image: Tensor) -> Tensor:
        return self.extract(image)


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


class FID:
    """FID against fixed images, whose statistics are computed once (torchmetrics; sums in float64).

    Args:   network; reference, images N×3×H×W in [-1, 1] in batches.
    Raises: ValueError for fewer than two images.
    """

    def __init__(self, network: FeatureNetwork, reference: Iterable[Tensor]) -> None:
        from torchmetrics.image.fid import FrechetInceptionDistance

        self.network = network
        # One process measures: the others of a run on several devices have nothing to add, and would be waited for.
        self._metric = FrechetInceptionDistance(feature=network, reset_real_features=False, sync_on_compute=False)
        self._references = self._add(reference, real=True)

    def of(self, images: Iterable[Tensor]) -> FIDResult:
        """The distance of images N×3×H×W in [-1, 1] that come in batches."""
        self._metric.reset()  # the reference stays
        count = self._add(images, real=False)
        value = float(self._metric.compute())
        if not math.isfinite(value):
            raise FaceEditError(f"FID: the distance must be finite, got {value} for {count} images; look at the images")
        return FIDResult(max(0.0, value), self.network.name, count, self._references)

    def _add(self, images: Iterable[Tensor], *, real: bool) -> int:
        count = 0
        for batch in images:
            self._metric.update(batch, real=real)
            count += len(batch)
        if count < _FEWEST:
            raise ValueError(
                f"FID: images must be {_FEWEST} or more on either side, got {count}; a covariance needs them"
            )
        # Sums that are not finite would be a distance of 0 to some, and the end of the process to LAPACK.
        side = "real" if real else "fake"
        sums = (getattr(self._metric, f"{side}_features_{kind}") for kind in ("sum", "cov_sum"))
        if not all(bool(total.isfinite().all()) for total in sums):
            raise FaceEditError(
                f"FID: features must be finite, got NaN or infinity in {count} {side} images; "
                "the generator has diverged, or the network does not fit"
            )
        return count


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
    from torchvision.models import Inception_V3_Weights, inception_v3

    path = inception_weights()
    if not path.is_file():
        raise WeightsError(
            f"feature_network: Inception-v3's ImageNet weights must be at {path}, got no file; put "
            f"{Inception_V3_Weights.IMAGENET1K_V1.url} there, or name another network"
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

    return FeatureNetwork(_declared_name(name), network.config.hidden_width, extract)


def _declared_name(name: str) -> str:
    """A registered name as it is; of a file, whose name says little, the recipe it was trained by and its SHA-256."""
    from faceedit.registry import find, sha256_of

    row = find(name, "attribute-classifier")
    if row.sha256:
        return row.name
    trained_by = "-".join(row.header.recipe.split())
    return "-".join(part for part in (trained_by, sha256_of(row.path)[:8]) if part)


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


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the FID of a generator's weights against the training images of a recipe. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m faceedit.training.fid", description=main.__doc__)
    parser.add_argument("weights", help="name or path of stylegan2 weights")
    parser.add_argument("--recipe", default="stylegan2-starter", help="whose images are the reference")
    parser.add_argument("--images", type=int, default=5000, help="how many on either side")
    parser.add_argument("--network", default="auto", help='"auto", "inception-v3" or classifier weights')
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="fields of the recipe to change")
    options = parser.parse_intermixed_args(arguments)  # overrides may follow options
    return run_command(lambda: _measure(options))


def _measure(options: argparse.Namespace) -> FIDResult:
    from faceedit.devices import resolve_device
    from faceedit.registry import load_network
    from faceedit.training.aligned import AlignedFaces

    require_option("fid", "--images", options.images, _FEWEST, "a covariance needs them")
    device = resolve_device(options.device)
    generator = cast("StyleGAN2Generator", load_network(options.weights, device, kind="stylegan2"))
    network = feature_network(options.network, device)
    faces = AlignedFaces(_references(options.recipe, options.overrides, generator.config.size_px), progress)
    if len(faces) < _FEWEST:
        raise UsageError(f"fid: the recipe must have {_FEWEST} images or more, got {len(faces)}; name another folder")
    return FID(network, faces.batches(options.images)).of(generated_images(generator, options.images, options.seed))


def _references(name: str, overrides: Sequence[str], size_px: int) -> AlignedConfig:
    """The images of a recipe at the generator's size, whatever size the recipe's own generator has."""
    from faceedit.training import resolve
    from faceedit.training.aligned import AlignedConfig

    own = "images.size_px="
    asked = [override.removeprefix(own) for override in overrides if override.startswith(own)]
    if any(size != str(size_px) for size in asked):
        raise UsageError(f"fid: {own[:-1]} must be the generator's {size_px}, got {', '.join(asked)}; leave it out")
    recipe: Any = resolve(name, [override for override in overrides if not override.startswith(own)])
    images = getattr(recipe, "images", None)
    if not isinstance(images, AlignedConfig):
        raise UsageError(
            f"fid: --recipe must be one of aligned images, got {name}; name stylegan2-starter or e4e-starter"
        )
    if images.size_px != size_px:
        progress(f"the recipe's images at the generator's {size_px} px, not at {images.size_px}")
    return replace(images, size_px=size_px)


if __name__ == "__main__":
    sys.exit(main())
