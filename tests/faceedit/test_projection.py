# SPDX-License-Identifier: Apache-2.0
"""Projection on a tiny untrained generator: images of its own are found again, each as if it were alone."""

import copy
import math

import pytest
import torch
from support.stylegan2_tiny import tiny_generator

from faceedit.kernels import noise_regularizer
from faceedit.networks.classifier import AttributeClassifier, AttributeClassifierConfig
from faceedit.networks.stylegan2 import StyleGAN2Generator
from faceedit.projection import (
    ProjectionConfig,
    ProjectionError,
    ProjectionStep,
    classifier_embedding,
    face_embedding,
    pixel_embedding,
    project,
    squared_distance,
)

SHORT = ProjectionConfig(steps=12, average_samples=100)


@pytest.fixture(scope="module")
def generator() -> StyleGAN2Generator:
    torch.manual_seed(0)
    network = tiny_generator(16)
    for name, parameter in network.named_parameters():
        if name.endswith("strength"):
            torch.nn.init.constant_(parameter, 0.1)
    return network.eval().requires_grad_(False)


def made(generator: StyleGAN2Generator, count: int, seed: int = 3) -> torch.Tensor:
    draws = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 8, generator=draws)
    return generator.synthesis(generator.mapping(z), generator.synthesis.draw_noise(count, draws))


def test_images_of_the_generator_are_found_again(generator: StyleGAN2Generator) -> None:
    image = made(generator, 2)
    result = project(generator, image, ProjectionConfig(steps=100, average_samples=1000), embedding=pixel_embedding)
    assert result.ws.shape == (2, 6, 8)
    assert [tuple(one.shape) for one in result.noise] == [(2, 1, side, side) for side in (4, 8, 8, 16, 16)]
    assert result.distance.shape == result.noise_penalty.shape == (100, 2)
    again = generator.synthesis(result.ws, result.noise)
    error = (again - image).square().mean((1, 2, 3))
    assert (error < 0.2 * result.distance[0]).all()
    # What is returned is what the last steps saw: noise on the styles has vanished by then.
    torch.testing.assert_close(error, result.distance[-1], rtol=0.1, atol=1e-4)


def test_start_is_the_average_and_noise_maps_stay_noise(generator: StyleGAN2Generator) -> None:
    image = made(generator, 1)
    one = ProjectionConfig(steps=1, average_samples=1000, spread=0)
    result = project(generator, image, one, embedding=pixel_embedding)
    draws = torch.Generator().manual_seed(0)
    average = generator.mapping.w(torch.randn(1000, 8, generator=draws)).mean(0)
    # The warm-up begins at rate 0: one step moves nothing.
    torch.testing.assert_close(result.ws, average.expand(1, 6, -1))
    long = project(generator, image, ProjectionConfig(steps=30, average_samples=100), embedding=pixel_embedding)
    for noise_map in long.noise:
        assert noise_map.mean().item() == pytest.approx(0, abs=1e-5)
        assert noise_map.std().item() == pytest.approx(1, abs=1e-4)
    free = ProjectionConfig(steps=30, average_samples=100, noise_weight=0)
    unbound = project(generator, image, free, embedding=pixel_embedding)
    assert noise_regularizer(long.noise).item() < 0.2 * noise_regularizer(unbound.noise).item()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_mode_without_gradients_changes_nothing(generator: StyleGAN2Generator, mode: type) -> None:
    image = made(generator, 1)
    start = generator.mapping.average.expand(1, 6, -1).clone()
    plain = project(generator, image, SHORT, start=start)
    with mode():
        again = project(generator, image.clone(), SHORT, start=start.clone())
    assert torch.equal(again.ws, plain.ws)
    assert not again.ws.is_inference()


def test_a_batch_equals_its_images_alone(generator: StyleGAN2Generator) -> None:
    network = copy.deepcopy(generator).double()
    image = made(generator, 3).double()
    batch = project(network, image, SHORT, embedding=pixel_embedding, seed=4)
    for row in range(3):
        alone = project(network, image[row : row + 1], SHORT, embedding=pixel_embedding, seed=4)
        torch.testing.assert_close(batch.ws[row : row + 1], alone.ws, atol=1e-9, rtol=0)
        torch.testing.assert_close(batch.distance[:, row], alone.distance[:, 0], atol=1e-9, rtol=0)
        for together, single in zip(batch.noise, alone.noise, strict=True):
            torch.testing.assert_close(together[row : row + 1], single, atol=1e-7, rtol=0)
    assert (batch.ws[0] - batch.ws[1]).abs().max() > 1e-3


def test_the_seed_decides_and_weights_get_no_gradient(generator: StyleGAN2Generator) -> None:
    image = made(generator, 1)
    trainable = tiny_generator(16)
    trainable.load_state_dict(generator.state_dict())
    one = project(generator, image, SHORT, embedding=pixel_embedding, seed=1)
    same = project(generator, image, SHORT, embedding=pixel_embedding, seed=1)
    unfrozen = project(trainable, image, SHORT, embedding=pixel_embedding, seed=1)
    other = project(generator, image, SHORT, embedding=pixel_embedding, seed=2)
    assert torch.equal(one.ws, same.ws)
    # Layers that could be trained make their styles one by one: equal but for the order of sums.
    torch.testing.assert_close(unfrozen.ws, one.ws, rtol=1e-3, atol=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(one.noise, same.noise, strict=True))
    assert not torch.equal(one.ws, other.ws)
    assert all(parameter.grad is None for parameter in trainable.parameters())
    assert not one.ws.requires_grad


def test_w_space_has_one_style_for_all_layers(generator: StyleGAN2Generator) -> None:
    config = ProjectionConfig(steps=12, average_samples=100, space="w")
    ws = project(generator, made(generator, 1), config, embedding=pixel_embedding).ws
    assert ws.shape == (1, 6, 8)
    assert torch.equal(ws, ws[:, :1].expand(-1, 6, -1))


def test_callback_watches_and_ends(generator: StyleGAN2Generator) -> None:
    seen: list[ProjectionStep] = []

    def watch(step: ProjectionStep) -> bool:
        seen.append(step)
        return len(seen) == 2

    image = made(generator, 2)
    result = project(generator, image, SHORT, embedding=pixel_embedding, callback=watch, callback_every=3)
    assert [(step.step, step.steps) for step in seen] == [(3, 12), (6, 12)]
    assert seen[0].image.shape == image.shape
    assert len(result.distance) == 6
    assert torch.equal(seen[1].distance, result.distance[5])
    whole = project(generator, image, SHORT, embedding=pixel_embedding, callback=lambda step: None, callback_every=3)
    assert torch.equal(whole.distance[:6], result.distance)
    assert len(whole.distance) == 12


def test_an_encoders_styles_are_a_better_start(generator: StyleGAN2Generator) -> None:
    draws = torch.Generator().manual_seed(3)
    ws = generator.mapping(torch.randn(1, 8, generator=draws))
    image = generator.synthesis(ws, "zero")
    near = project(generator, image, SHORT, embedding=pixel_embedding, start=ws)
    far = project(generator, image, SHORT, embedding=pixel_embedding)
    assert near.distance[0].item() < 0.5 * far.distance[0].item()


def test_schedule_is_the_papers() -> None:
    config = ProjectionConfig()
    assert config.rate_at(0) == 0
    assert config.rate_at(25) == pytest.approx(0.05)  # half of the warm-up
    assert config.rate_at(500) == pytest.approx(0.1)
    assert config.rate_at(875) == pytest.approx(0.05)  # half of the cool-down's cosine
    assert config.spread_at(0) == pytest.approx(0.05)
    assert config.spread_at(375) == pytest.approx(0.05 / 4)
    assert config.spread_at(750) == config.spread_at(999) == 0


def test_embeddings_measure_what_they_say() -> None:
    draws = torch.Generator().manual_seed(0)
    one, other = (torch.rand(2, 3, 32, 32, generator=draws) * 2 - 1 for _ in range(2))
    error = (one - other).square().mean((1, 2, 3))
    torch.testing.assert_close(squared_distance(pixel_embedding(one), pixel_embedding(other)), error)
    config = AttributeClassifierConfig(("Male",), size_px=32, base_width=4, stages=2, hidden_width=4)
    torch.manual_seed(0)
    network = AttributeClassifier(config).eval()
    embed = classifier_embedding(network, pixel_weight=2.0)
    expected = 2 * error
    with torch.no_grad():
        found = squared_distance(embed(one), embed(other))
        for cut in (6, 13):  # before either pooling: two of (Conv, BN, ReLU) a stage
            f, g = (network.features[:cut](x) for x in (one, other))
            f, g = f / f.norm(dim=1, keepdim=True).clamp_min(1e-5), g / g.norm(dim=1, keepdim=True).clamp_min(1e-5)
            expected = expected + (f - g).square().sum(1).mean((1, 2))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_the_default_embedding_ships(generator: StyleGAN2Generator) -> None:
    image = made(generator, 1)
    result = project(generator, image, ProjectionConfig(steps=2, average_samples=100))
    embed = face_embedding()
    average = generator.synthesis(result.ws, result.noise)  # the warm-up begins at rate 0, so nearly the start
    assert result.distance[1].item() > squared_distance(pixel_embedding(average), pixel_embedding(image)).item()
    assert squared_distance(embed(image), embed(image)).item() == 0
    assert len(embed(image)) == 6  # pixels and the classifier's five stages


def test_mistakes_are_named(generator: StyleGAN2Generator) -> None:
    image = made(generator, 1)
    with pytest.raises(ValueError, match=r"project: image must be \(N,3,16,16\), got \(1, 3, 8, 8\)"):
        project(generator, image[..., :8, :8], SHORT)
    with pytest.raises(ValueError, match=r"project: start must be \(1\|1,6,8\), got \(1, 4, 8\)"):
        project(generator, image, SHORT, start=torch.zeros(1, 4, 8))
    with pytest.raises(ValueError, match="callback_every must be positive"):
        project(generator, image, SHORT, callback_every=0)
    with pytest.raises(ValueError, match=r"rate must be at most 1e\+30, got 1e\+38"):
        ProjectionConfig(rate=1e38)
    with pytest.raises(ValueError, match='space must be "w\\+" or "w"'):
        ProjectionConfig(space="z")  # type: ignore[arg-type]
    with pytest.raises(ProjectionError, match="distance must be finite, got nan or inf by step 11 for image 0"):
        project(generator, image * math.nan, SHORT, embedding=pixel_embedding)
