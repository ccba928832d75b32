# SPDX-License-Identifier: Apache-2.0
"""The Fréchet distance against closed forms, and that a result says by which network it was measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from faceedit.errors import UnknownNameError, WeightsError
from faceedit.networks.stylegan2 import StyleGAN2Config, StyleGAN2Generator
from faceedit.training import fid as fid_module
from faceedit.training.fid import (
    FeatureNetwork,
    FeatureStatistics,
    feature_network,
    fid,
    frechet_distance,
    generated_images,
)


def gaussian(mean: torch.Tensor, covariance: torch.Tensor) -> FeatureStatistics:
    return FeatureStatistics(mean.double(), covariance.double(), 1000)


def random_covariance(width: int, seed: int) -> torch.Tensor:
    root = torch.randn(width, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.t() / width


def test_distance_of_gaussians_with_diagonal_covariances() -> None:
    # Commuting covariances: ‖μ₁ − μ₂‖² + Σ (σ₁ − σ₂)².
    one = gaussian(torch.tensor([0.0, 1.0, 2.0]), torch.diag(torch.tensor([1.0, 4.0, 9.0])))
    other = gaussian(torch.tensor([1.0, 1.0, 0.0]), torch.diag(torch.tensor([4.0, 4.0, 0.25])))
    assert frechet_distance(one, other) == pytest.approx(1 + 4 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2)


def test_distance_of_gaussians_that_do_not_commute() -> None:
    # In two dimensions Tr √M = √(Tr M + 2 √det M) for a product M of two covariances.
    a, b = random_covariance(2, 0), random_covariance(2, 1)
    product = a @ b
    assert not torch.allclose(product, b @ a)
    root = (product.trace() + 2 * product.det().sqrt()).sqrt()
    expected = (a.trace() + b.trace() - 2 * root).item()
    zero = torch.zeros(2)
    assert frechet_distance(gaussian(zero, a), gaussian(zero, b)) == pytest.approx(expected)


def test_distance_is_symmetric_invariant_to_rotation_and_zero_to_itself() -> None:
    a, b = random_covariance(16, 2), random_covariance(16, 3)
    one, other = gaussian(torch.ones(16), a), gaussian(torch.zeros(16), b)
    distance = frechet_distance(one, other)
    assert frechet_distance(other, one) == pytest.approx(distance)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)
    q, _ = torch.linalg.qr(random_covariance(16, 4))
    turned = [gaussian(q @ g.mean, q @ g.covariance @ q.t()) for g in (one, other)]
    assert frechet_distance(*turned) == pytest.approx(distance)


def test_singular_covariances_are_exact() -> None:
    # Rank one, as of two images: a aᵀ against b bᵀ gives ‖a‖² + ‖b‖² − 2 |a·b|.
    a, b = torch.tensor([3.0, 0, 4, 0]), torch.tensor([1.0, 2, 2, 0])
    zero = torch.zeros(4)
    distance = frechet_distance(gaussian(zero, torch.outer(a, a)), gaussian(zero, torch.outer(b, b)))
    assert distance == pytest.approx(25 + 9 - 2 * 11, abs=1e-6)  # square roots of rounding: half of the digits


def test_statistics_do_not_depend_on_the_batches() -> None:
    features = torch.randn(23, 5, generator=torch.Generator().manual_seed(0))
    whole = FeatureStatistics.of([features])
    parts = FeatureStatistics.of(features.split(4))
    torch.testing.assert_close(parts.mean, whole.mean)
    centred = features.double() - features.double().mean(0)
    torch.testing.assert_close(parts.covariance, centred.t() @ centred / 22)
    assert (parts.count, parts.mean.dtype) == (23, torch.float64)
    with pytest.raises(ValueError, match="two features or more"):
        FeatureStatistics.of([features[:1]])


def test_result_names_its_network_and_counts() -> None:
    network = FeatureNetwork("mean-colour", 3, lambda image: image.mean((2, 3)))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 8, 8, generator=generator) * 2 - 1
    result = fid(network, [images + 0.5], images.split(16))
    assert result.value == pytest.approx(3 * 0.25)  # features move by 0.5 in each of three channels
    assert (result.label, result.key) == ("FID (mean-colour features)", "fid_mean-colour")
    assert str(result) == "FID (mean-colour features): 0.750, 40 images against 40"


def test_the_substitute_is_declared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    network = feature_network("auto")
    assert network.name == "attribute-classifier-starter"
    features = network.extract(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, network.width)
    assert torch.equal(features[0], features[1])
    with pytest.raises(WeightsError, match="Inception-v3's ImageNet weights must be at"):
        feature_network("inception-v3")
    with pytest.raises(UnknownNameError, match="attribute-classifier-starter"):
        feature_network("attribute-classifier-startre")


def test_inception_is_taken_where_its_weights_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.models import inception_v3

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = fid_module.inception_weights()
    path.parent.mkdir()
    stored = inception_v3(weights=None, init_weights=False)
    torch.save(stored.state_dict(), path)
    network = feature_network("auto")
    assert (network.name, network.width) == ("inception-v3", 2048)
    image = torch.rand(1, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pooled: list[torch.Tensor] = []
    stored.avgpool.register_forward_hook(lambda module, args, output: pooled.append(output.flatten(1)))
    with torch.no_grad():
        stored.eval()(image)
    torch.testing.assert_close(network.extract(image), pooled[0])


def test_generated_images_follow_the_seed_alone() -> None:
    network = StyleGAN2Generator(
        StyleGAN2Config(size_px=8, channel_base=64, channel_max=8, z_width=8, w_width=8, mapping_layers=1)
    ).eval()
    one = torch.cat(list(generated_images(network, 5, seed=1, batch=5)))
    same = torch.cat(list(generated_images(network, 5, seed=1, batch=5)))
    other = torch.cat(list(generated_images(network, 5, seed=2, batch=5)))
    assert one.shape == (5, 3, 8, 8)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
