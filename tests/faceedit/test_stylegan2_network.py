# SPDX-License-Identifier: Apache-2.0
import dataclasses
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import faceedit
from faceedit import kernels, registry
from faceedit.networks.stylegan2 import (
    Precision,
    StyledConv,
    StyleGAN2Config,
    StyleGAN2Discriminator,
    StyleGAN2DiscriminatorConfig,
    StyleGAN2Generator,
    mix_styles,
)

TINY = StyleGAN2Config(size_px=32, channels=(10, 9, 8, 6), z_width=12, w_width=11, mapping_layers=2)
TINY_CRITIC = StyleGAN2DiscriminatorConfig(size_px=32, channels=(10, 9, 8, 6))
ARCHITECTURES = ("skip", "resnet", "orig")
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def build(config: StyleGAN2Config = TINY) -> StyleGAN2Generator:
    """A generator whose noise, biases and average do something, as in a trained one."""
    torch.manual_seed(0)
    network = StyleGAN2Generator(config)
    with torch.no_grad():
        for layer in network.modules():
            if isinstance(layer, StyledConv):
                layer.strength.fill_(0.3)
                layer.bias.normal_(std=0.2)
        network.mapping.average.normal_()
    return network


def latents(config: StyleGAN2Config = TINY, count: int = 3) -> torch.Tensor:
    return torch.randn(count, config.z_width, generator=seeded(1))


def styles(config: StyleGAN2Config = TINY, count: int = 3) -> torch.Tensor:
    return torch.randn(count, config.num_ws, config.w_width, generator=seeded(2))


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual - expected).norm() / expected.norm()).item()


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def config_f_discriminator_parameters() -> int:
    """The layers of config F at 1024 px, written out by hand."""
    widths = [32, 64, 128, 256, 512, 512, 512, 512, 512]
    blocks = sum(9 * a * a + a + 9 * a * b + b + a * b for a, b in pairwise(widths))
    return (3 * 32 + 32) + blocks + (9 * 513 * 512 + 512) + (512 * 16 * 512 + 512) + (512 + 1)


def test_config_f_sizes():
    with torch.device("meta"):
        counts = [parameters(StyleGAN2Generator(StyleGAN2Config(size_px=size_px))) for size_px in (1024, 64)]
        discriminator = StyleGAN2Discriminator(StyleGAN2DiscriminatorConfig())
    assert counts == [30_370_060, 27_032_600]
    assert parameters(discriminator) == config_f_discriminator_parameters()
    config = StyleGAN2Config()
    assert [config.width(level) for level in range(config.levels)] == [512, 512, 512, 512, 512, 256, 128, 64, 32]
    assert config.num_ws == 18
    assert config.noise_px == (4, 8, 8, 16, 16, 32, 32, 64, 64, 128, 128, 256, 256, 512, 512, 1024, 1024)


@pytest.mark.parametrize("size_px", [8, 16, 64, 128])
def test_every_size(size_px):
    config = StyleGAN2Config(size_px=size_px, channel_base=512, channel_max=6, z_width=4, w_width=5, mapping_layers=1)
    network = build(config)
    ws = network.mapping(latents(config, 2), truncation=0.7)
    assert ws.shape == (2, config.num_ws, 5)
    image = network.synthesis(ws, noise=network.synthesis.draw_noise(2))
    assert image.shape == (2, 3, size_px, size_px)
    assert image.dtype == torch.float32
    assert image.is_contiguous()
    critic = StyleGAN2Discriminator(StyleGAN2DiscriminatorConfig(size_px=size_px, channel_base=512, channel_max=6))
    assert critic(image).shape == (2, 1)


@each_architecture
def test_the_same_input_gives_the_same_image(architecture):
    network = build(dataclasses.replace(TINY, architecture=architecture))
    first, second = (
        network(latents(), noise="random", generator=seeded(7)),
        network(latents(), noise="random", generator=seeded(7)),
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, network(latents(), noise="random", generator=seeded(8)))
    assert torch.equal(network(latents()), network.synthesis(network.mapping(latents())))


@each_architecture
def test_batch_does_not_matter(architecture):
    network = build(dataclasses.replace(TINY, architecture=architecture))
    together = network.synthesis(styles())
    alone = torch.cat([network.synthesis(ws[None]) for ws in styles()])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


def test_truncation():
    network, average = build(), build().mapping.average
    full = network.mapping(latents())
    assert torch.equal(network.mapping(latents(), truncation=1.0), full)
    assert torch.equal(network.mapping(latents(), truncation=0.0), average.expand_as(full))
    torch.testing.assert_close(network.mapping(latents(), truncation=0.7), average + 0.7 * (full - average))
    partly = network.mapping(latents(), truncation=0.7, truncated_layers=3)
    assert torch.equal(partly[:, 3:], full[:, 3:])
    assert not torch.isclose(partly[:, :3], full[:, :3]).any()
    torch.testing.assert_close(network(latents(), 0.7), network.synthesis(network.mapping(latents(), 0.7)))


def test_average_of_w():
    network = build()
    first = network.mapping.estimate_average(3000, seed=1)
    assert torch.equal(first, network.mapping.estimate_average(3000, seed=1))
    other = network.mapping.estimate_average(3000, seed=2)
    assert 0 < (first - other).abs().max() < 0.2
    drawn = network.mapping.w(torch.randn(3000, TINY.z_width, generator=seeded(3)))
    torch.testing.assert_close(first, drawn.mean(0), rtol=0, atol=0.2)


def test_scale_of_z_does_not_matter():
    network = build()
    torch.testing.assert_close(network.mapping(latents() * 5), network.mapping(latents()))


def test_noise_modes():
    synthesis, ws = build().synthesis, styles()
    stored = synthesis(ws)
    assert torch.equal(synthesis(ws, synthesis.stored_noise()), stored)
    assert [noise.shape[-1] for noise in synthesis.stored_noise()] == list(TINY.noise_px)
    zeros = [torch.zeros(1, 1, size_px, size_px) for size_px in TINY.noise_px]
    assert torch.equal(synthesis(ws, "zero"), synthesis(ws, zeros))
    assert not torch.allclose(stored, synthesis(ws, "zero"), atol=1e-2)
    each = [noise.repeat(3, 1, 1, 1) for noise in synthesis.stored_noise()]
    torch.testing.assert_close(synthesis(ws, each), stored)
    drawn = synthesis.draw_noise(3, seeded(4))
    assert torch.equal(synthesis(ws, drawn), synthesis(ws, "random", seeded(4)))
    for i in range(len(zeros)):  # every map is used, at its own place
        one = [*zeros[:i], synthesis.stored_noise()[i], *zeros[i + 1 :]]
        assert not torch.allclose(synthesis(ws, one), synthesis(ws, "zero"), atol=1e-3), i


def test_every_style_is_used_by_its_own_layer():
    for architecture in ARCHITECTURES:
        network, ws = build(dataclasses.replace(TINY, architecture=architecture)), styles()
        before = network.synthesis(ws)
        changed = []
        for layer in range(TINY.num_ws):
            other = ws.clone()
            other[:, layer] += 1
            changed.append(not torch.allclose(network.synthesis(other), before, atol=1e-4))
        assert all(changed), architecture
    one = network.synthesis(ws[:, 0])
    torch.testing.assert_close(one, network.synthesis(ws[:, :1].repeat(1, TINY.num_ws, 1)), rtol=0, atol=2e-5)


def test_style_mixing():
    network = build()
    first, second = network.mapping(latents()), network.mapping(latents().flip(0))
    mixed = mix_styles(first, second, 3)
    assert torch.equal(mixed[:, :3], first[:, :3])
    assert torch.equal(mixed[:, 3:], second[:, 3:])
    assert torch.equal(mix_styles(first, second, 0), second)
    assert torch.equal(mix_styles(first, second, TINY.num_ws), first)
    last = mix_styles(first, second, TINY.num_ws - 1)  # the last style is of the finest RGB layer
    difference = network.synthesis(last) - network.synthesis(first)
    assert difference.abs().max() > 1e-2
    with pytest.raises(ValueError, match="coarse and fine must be"):
        mix_styles(first, second[:, 1:], 3)
    with pytest.raises(ValueError, match=r"crossover in 0\.\.L"):
        mix_styles(first, second, 99)


@each_architecture
def test_memory_formats_agree(architecture):
    network = build(dataclasses.replace(TINY, architecture=architecture))
    seen = []
    network.synthesis.blocks[-1].register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last))
    )
    first = network.synthesis(styles())
    network.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(network.synthesis(styles()), first, rtol=0, atol=2e-5)
    assert seen == [True, False]


@each_architecture
def test_backends_agree(architecture):
    network = build(dataclasses.replace(TINY, architecture=architecture, clamp=2.0))
    critic = StyleGAN2Discriminator(TINY_CRITIC)
    image = network.synthesis(styles())
    logits = critic(image)
    with kernels.backend("eager"):
        torch.testing.assert_close(network.synthesis(styles()), image, rtol=0, atol=2e-5)
        torch.testing.assert_close(critic(image), logits, rtol=0, atol=2e-5)


@each_architecture
@pytest.mark.parametrize(("dtype", "limit"), [("bfloat16", 0.03), ("float16", 0.005)])
def test_half_precision_stays_close(architecture, dtype, limit):
    network = build(dataclasses.replace(TINY, architecture=architecture))
    exact = network.synthesis(styles())
    network.synthesis.precision = Precision(dtype, from_px=16)
    seen = []
    for block in network.synthesis.blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
    half = network.synthesis(styles())
    assert seen == [torch.float32] * 2 + [getattr(torch, dtype)] * 2
    assert half.dtype == torch.float32
    assert 0 < relative(half, exact) < limit
    critic = StyleGAN2Discriminator(dataclasses.replace(TINY_CRITIC, architecture=architecture))
    logits = critic(exact)
    critic.precision = Precision(dtype, from_px=16)
    assert critic(exact).dtype == torch.float32
    torch.testing.assert_close(critic(exact), logits, rtol=0, atol=5 * limit)


def test_float16_is_clamped():
    config = dataclasses.replace(TINY, precision=Precision("float16", from_px=16))
    network = build(config)
    with torch.no_grad():
        network.synthesis.blocks[2].conv0.bias.fill_(1e30)  # beyond what float16 holds
    assert network.synthesis(styles()).isfinite().all()
    assert config.precision.clamp(16, -1.0) == 256.0
    assert config.precision.clamp(16, 5.0) == 5.0
    assert config.precision.clamp(8, -1.0) == -1.0
    assert Precision("bfloat16", from_px=16).clamp(16, -1.0) == -1.0


@each_architecture
def test_gradients_to_styles_and_noise(architecture):
    config = StyleGAN2Config(size_px=8, channels=(3, 2), z_width=2, w_width=2, mapping_layers=1)
    network = build(dataclasses.replace(config, architecture=architecture)).double()
    ws = styles(config, 2).double().requires_grad_()
    noise = [n.double().requires_grad_() for n in network.synthesis.draw_noise(2, seeded(5))]
    assert torch.autograd.gradcheck(lambda ws, *noise: network.synthesis(ws, noise), (ws, *noise), fast_mode=True)


@each_architecture
def test_frozen_weights_still_give_gradients(architecture):
    network = build(dataclasses.replace(TINY, architecture=architecture)).requires_grad_(False)
    ws = styles().requires_grad_()
    noise = [n.requires_grad_() for n in network.synthesis.draw_noise(3, seeded(5))]
    image = network.synthesis(ws, noise)
    gradients = torch.autograd.grad(image.square().mean(), [ws, *noise])
    with kernels.backend("eager"):
        expected = torch.autograd.grad(network.synthesis(ws, noise).square().mean(), [ws, *noise])
    for ours, theirs in zip(gradients, expected, strict=True):
        assert theirs.abs().max() > 0
        assert relative(ours, theirs) < 1e-3
    assert gradients[0].abs().amax((0, 2)).min() > 0  # every layer's style


@each_architecture
def test_every_parameter_learns(architecture):
    network = build(dataclasses.replace(TINY, architecture=architecture))
    critic = StyleGAN2Discriminator(dataclasses.replace(TINY_CRITIC, architecture=architecture, group_size=3))
    image = network(latents(), noise="random", generator=seeded(6))
    critic(image).square().mean().backward()
    for name, parameter in [*network.named_parameters(), *critic.named_parameters()]:
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@each_architecture
def test_second_order(architecture):
    """R1 differentiates the critic's gradient, path-length regularisation the generator's."""
    critic = StyleGAN2Discriminator(dataclasses.replace(TINY_CRITIC, architecture=architecture))
    image = torch.randn(2, 3, 32, 32, generator=seeded(1)).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
    gradient.square().sum().backward()
    assert critic.blocks[0].conv0.weight.grad.abs().sum() > 0
    network = build(dataclasses.replace(TINY, architecture=architecture))
    ws = styles(count=2).requires_grad_()
    (gradient,) = torch.autograd.grad(network.synthesis(ws).square().sum(), ws, create_graph=True)
    gradient.square().sum().backward()
    assert network.synthesis.blocks[0].conv1.weight.grad.isfinite().all()
    assert network.synthesis.blocks[0].conv1.weight.grad.abs().sum() > 0


def test_critic_is_told_how_alike_images_are():
    torch.manual_seed(0)
    critic = StyleGAN2Discriminator(TINY_CRITIC)
    image = torch.randn(1, 3, 32, 32)
    alone = critic(image)
    torch.testing.assert_close(critic(image.repeat(4, 1, 1, 1)), alone.repeat(4, 1))
    varied = critic(torch.cat([image, torch.randn(3, 3, 32, 32)]))
    assert not torch.isclose(varied[0], alone[0], atol=1e-4)


def test_saved_and_loaded_by_name(tmp_path: Path, monkeypatch):
    monkeypatch.setenv(registry.DIRECTORY_VARIABLE, str(tmp_path))
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "a test", "half": False}
    config = dataclasses.replace(TINY, precision=Precision("bfloat16", from_px=32), clamp=256.0)
    network = build(config)
    registry.save_weights(tmp_path / "g.safetensors", "stylegan2", config, network.state_dict(), **facts)
    registry.pin_weights("stylegan2-tiny", tmp_path / "g.safetensors")
    G = faceedit.load_network("stylegan2-tiny")
    assert G.config == config
    z = latents()
    ws = G.mapping(z, truncation=0.7)
    maps = G.synthesis.draw_noise(3, seeded(1))
    network.requires_grad_(False)  # as what was loaded is: frozen layers make their styles together
    assert torch.equal(G.synthesis(ws, noise=maps), network.synthesis(network.mapping(z, truncation=0.7), noise=maps))
    assert not any(parameter.requires_grad for parameter in G.parameters())


def test_rejects_mistakes():
    synthesis, mapping, ws = build().synthesis, build().mapping, styles()
    maps = synthesis.draw_noise(3)
    for match, call in (
        (r"z must be \(N,12\), got \(3, 11\)", lambda: mapping(torch.zeros(3, 11))),
        (
            r"ws must be \(N,8,11\) or \(N,11\), got \(3, 18, 11\); .* of 32 px",
            lambda: synthesis(torch.zeros(3, 18, 11)),
        ),
        (r"ws must be", lambda: synthesis(torch.zeros(3, 10))),
        (r"noise must have 7 maps, got 6", lambda: synthesis(ws, maps[:-1])),
        (r"noise\[6\] must be \(3\|1,1,32,32\), got \(3, 1, 8, 8\)", lambda: synthesis(ws, [*maps[:-1], maps[1]])),
        (r"noise\[0\] must be", lambda: synthesis(ws[:2], maps)),
        (r"noise must be maps, None, \"zero\" or \"random\", got 'const'", lambda: synthesis(ws, "const")),
        (r"image must be \(N,3,32,32\)", lambda: StyleGAN2Discriminator(TINY_CRITIC)(torch.zeros(1, 3, 16, 16))),
        (r"multiple of it, got 6", lambda: StyleGAN2Discriminator(TINY_CRITIC)(torch.zeros(6, 3, 32, 32))),
        (r"StyleGAN2Config: size_px must be a power of two", lambda: StyleGAN2Config(size_px=100)),
        (r"size_px must be a power of two from 8 to 1024, got 2048", lambda: StyleGAN2Config(size_px=2048)),
        (r"StyleGAN2DiscriminatorConfig: size_px", lambda: StyleGAN2DiscriminatorConfig(size_px=4)),
        (r"channels must be 2 positive widths", lambda: StyleGAN2Config(size_px=8, channels=(1,))),
        (r"channels must be 2 positive widths", lambda: StyleGAN2Config(size_px=8, channels=(1, 0))),
        (r"channel_base must be at least size_px", lambda: StyleGAN2Config(channel_base=512)),
        (r"fir must be four taps", lambda: StyleGAN2Config(fir=(1.0, 2.0, 1.0))),
        (r"fir must be four taps", lambda: StyleGAN2Config(fir=(1.0, -1.0, 1.0, -1.0))),
        (r"mapping_layers and mapping_rate must be positive", lambda: StyleGAN2Config(mapping_layers=0)),
        (
            r"StyleGAN2Config: architecture must be one of .*did you mean skip",
            lambda: StyleGAN2Config(architecture="Skip"),
        ),
        (
            r"StyleGAN2DiscriminatorConfig: architecture must be one of skip, resnet, orig, got 'residual'",
            lambda: StyleGAN2DiscriminatorConfig(architecture="residual"),
        ),
        (r"Precision: dtype must be one of float32, bfloat16, float16, got 'bf16'", lambda: Precision("bf16")),
        (r"group_size must be positive", lambda: StyleGAN2DiscriminatorConfig(group_size=0)),
    ):
        with pytest.raises(ValueError, match=match):
            call()
