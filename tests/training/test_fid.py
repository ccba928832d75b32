# SPDX-License-Identifier: Apache-2.0
"""The Fréchet distance against closed forms, and that a result says by which network it was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from faceedit.errors import FaceEditError, UnknownNameError, WeightsError
from faceedit.networks.classifier import AttributeClassifier, AttributeClassifierConfig
from faceedit.networks.stylegan2 import StyleGAN2Config, StyleGAN2Generator
from faceedit.registry import save_weights, sha256_of
from faceedit.training import fid as fid_module
from faceedit.training.fid import FID, FeatureNetwork, feature_network, generated_images

FEATURES = FeatureNetwork("features", 4, lambda image: image[:, :, 0, 0])
"""An "image" N×D×1×1 is its own features."""


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    """FID of features N×4."""
    return FID(FEATURES, [one[:, :, None, None]]).of([other[:, :, None, None]]).value


def sample(mean: torch.Tensor, covariance: torch.Tensor, count: int = 64) -> torch.Tensor:
    """Features count×4 with exactly this mean and covariance (divisor count − 1), float64."""
    draws = torch.randn(count, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    white = torch.linalg.qr(draws - draws.mean(0))[0] * (count - 1) ** 0.5
    return mean.double() + white @ torch.linalg.cholesky(covariance.double()).t()


def random_covariance(seed: int) -> torch.Tensor:
    root = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return root @ root.t() / 4


def test_distance_of_gaussians_with_diagonal_covariances() -> None:
    # Commuting covariances: ‖μ₁ − μ₂‖² + Σ (σ₁ − σ₂)².
    one = sample(torch.tensor([0.0, 1.0, 2.0, 0.0]), torch.diag(torch.tensor([1.0, 4.0, 9.0, 1.0])))
    other = sample(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.diag(torch.tensor([4.0, 4.0, 0.25, 1.0])))
    assert distance(one, other) == pytest.approx(1 + 4 + (1 - 2) ** 2 + 0 + (3 - 0.5) ** 2)


def test_distance_of_gaussians_that_do_not_commute() -> None:
    # Tr (Σ₁Σ₂)^½ by the symmetric product that has the same eigenvalues.
    a, b = random_covariance(0), random_covariance(1)
    assert not torch.allclose(a @ b, b @ a)
    values, vectors = torch.linalg.eigh(a)
    root = vectors @ torch.diag(values.sqrt()) @ vectors.t()
    expected = (a.trace() + b.trace() - 2 * torch.linalg.eigvalsh(root @ b @ root).sqrt().sum()).item()
    zero = torch.zeros(4)
    assert distance(sample(zero, a), sample(zero, b)) == pytest.approx(expected)
    assert distance(sample(zero, b), sample(zero, a)) == pytest.approx(expected)
    assert distance(sample(zero, a), sample(zero, a)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e200])
def test_what_is_not_finite_has_no_distance(value: float) -> None:
    """It was 0.000 once, a perfect score."""
    good = sample(torch.zeros(4), torch.eye(4))
    bad = good.clone()
    bad[3, 1] = value
    for one, other in ((good, bad), (bad, good)):
        with pytest.raises(FaceEditError, match=r"FID: (features|the distance) must be finite"):
            distance(one, other)
    assert distance(good, good) == pytest.approx(0, abs=1e-6)


def test_fewer_images_than_features_are_exact() -> None:
    # Two images have a covariance of rank one: a aᵀ against b bᵀ gives ‖a‖² + ‖b‖² − 2 |a·b|.
    a, b = torch.tensor([3.0, 0, 4, 0]), torch.tensor([1.0, 2, 2, 0])
    pairs = [torch.stack([v, -v]).double() / 2**0.5 for v in (a, b)]
    assert distance(*pairs) == pytest.approx(25 + 9 - 2 * 11, abs=1e-5)


def test_distance_does_not_depend_on_the_batches_nor_on_what_was_measured_before() -> None:
    one, other = (
        torch.randn(23, 4, 1, 1, generator=torch.Generator().manual_seed(seed)) * (seed + 1) for seed in (0, 1)
    )
    whole = FID(FEATURES, [one]).of([other])
    measured = FID(FEATURES, one.split(4))
    assert measured.of([other + 3]).value > whole.value
    assert measured.of(other.split(5)).value == pytest.approx(whole.value)
    with pytest.raises(ValueError, match="2 or more on either side"):
        measured.of([other[:1]])


def test_result_names_its_network_and_counts() -> None:
    network = FeatureNetwork("mean-colour", 3, lambda image: image.mean((2, 3)))
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(40, 3, 8, 8, generator=generator) * 2 - 1
    result = FID(network, images.split(16)).of([images + 0.5])
    assert result.value == pytest.approx(3 * 0.25, abs=1e-6)  # features move by 0.5 in each of three channels
    assert (result.label, result.key) == ("FID (mean-colour features)", "fid_mean-colour")
    assert str(result) == "FID (mean-colour features): 0.750, 40 images against 40"


def test_the_substitute_is_declared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    network = feature_network("auto")
    assert network.name == "attribute-classifier-starter"
    features = network.extract(torch.zeros(2, 3, 32, 32))
    assert features.shape == (2, network.num_features)
    assert torch.equal(features[0], features[1])
    with pytest.raises(WeightsError, match="Inception-v3's ImageNet weights must be at"):
        feature_network("inception-v3")
    with pytest.raises(UnknownNameError, match="attribute-classifier-starter"):
        feature_network("attribute-classifier-startre")


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    config = AttributeClassifierConfig(attributes=("Young",), size_px=32, base_width=4, hidden_width=8)
    about = {"licence": "Apache-2.0", "training_data": "none", "source": "test"}
    names = []
    for recipe in ("", "classifier-starter", "classifier-starter"):
        path = tmp_path / str(len(names)) / "weights.safetensors"
        path.parent.mkdir()
        save_weights(
            path, "attribute-classifier", config, AttributeClassifier(config).state_dict(), recipe=recipe, **about
        )
        names.append(feature_network(str(path)).name)
        assert names[-1].endswith(sha256_of(path)[:8])
    assert len(set(names)) == 3
    assert [name.rpartition("-")[0] for name in names] == ["", "classifier-starter", "classifier-starter"]
    assert feature_network("starter").name == "attribute-classifier-starter"


def test_inception_is_taken_where_its_weights_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.models import inception_v3

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    path = fid_module.inception_weights()
    path.parent.mkdir()
    stored = inception_v3(weights=None, init_weights=False)
    torch.save(stored.state_dict(), path)
    network = feature_network("auto")
    assert (network.name, network.num_features) == ("inception-v3", 2048)
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


@pytest.fixture
def command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """The command on an untrained generator of 16 px: exit code, stdout, stderr."""
    monkeypatch.setenv("FACEEDIT_CACHE", str(tmp_path))
    config = StyleGAN2Config(size_px=16, channel_base=64, channel_max=8, z_width=8, w_width=8, mapping_layers=1)
    about = {"licence": "Apache-2.0", "training_data": "none", "source": "test"}
    path = tmp_path / "tiny.safetensors"
    save_weights(path, "stylegan2", config, StyleGAN2Generator(config).state_dict(), **about)

    def call(*more: str) -> tuple[int, str, str]:
        code = fid_module.main([str(path), "--network", "attribute-classifier-starter", *more])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


@pytest.mark.parametrize("more", [(), ("images.size_px=16",)])
def test_the_command_compares_at_the_generators_size(
    command: Callable[..., tuple[int, str, str]], more: tuple[str, ...]
) -> None:
    """The recipe's own generator has 128 px; and overrides may come after options."""
    code, out, err = command("--images", "4", "images.people=4", *more)
    assert code == 0, err
    assert out.endswith("4 images against 4\n")
    assert len(out.splitlines()) == 1
    assert "at the generator's 16 px, not at 128" in err


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--images", "4", "images.size_px=32"), 2, "images.size_px must be the generator's 16, got 32"),
        (("--images", "1"), 2, "--images must be 2 or more, got 1"),
        (("--recipe", "maggan-starter"), 2, "--recipe must be one of aligned images"),
        (("--network", "maggan-starter"), 1, "must hold a attribute-classifier, got maggan"),
        (("imagse.people=3",), 2, "did you mean images"),
        (("images.people=1",), 2, "the recipe must have 2 images or more, got 1"),
    ],
)
def test_the_command_says_in_one_line_what_is_wrong(
    command: Callable[..., tuple[int, str, str]], more: tuple[str, ...], code: int, words: str
) -> None:
    found = command(*more)
    assert found[:2] == (code, "")
    last = found[2].splitlines()[-1]  # after the progress of a cache
    assert last.startswith("error: ")
    assert words in last
