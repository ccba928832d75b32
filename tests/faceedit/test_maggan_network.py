# SPDX-License-Identifier: Apache-2.0
import dataclasses
import math

import pytest
import torch

from faceedit.labels import CELEBAMASK_HQ, CELEBAMASK_HQ_ZLL, convert_soft
from faceedit.networks.maggan import (
    MagGANConfig,
    MagGANDiscriminator,
    MagGANDiscriminatorConfig,
    MagGANGenerator,
    SelectiveTransferUnit,
)
from faceedit.relations import influence_mask, mask_guided_conditioning

TINY = MagGANConfig(size_px=32, base_width=4, max_width=8, encoder_stages=4, stu_units=3, spade_width=6)
TINY_CRITIC = MagGANDiscriminatorConfig(input_px=32, base_width=4, max_width=8, stages=4, head_width=16)
VARIANTS = {
    "paper": TINY,
    "plain": dataclasses.replace(TINY, decoder="plain", decoder_norm="batch"),
    "fewer-skips": dataclasses.replace(TINY, stu_units=1, decoder_norm="instance"),
    "residual": dataclasses.replace(TINY, output="residual"),
    "residual-blend": dataclasses.replace(TINY, output="residual", blend=True, encoder_norm="layer"),
    "layered": dataclasses.replace(TINY, output="layered", detail_width=5),
    "plain-no-skips": dataclasses.replace(TINY, decoder="plain", decoder_norm="layer", stu_units=0),
}
each_variant = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())


def inputs(size_px: int = 32, count: int = 2, mask_px: int | None = None):
    generator = torch.Generator().manual_seed(3)
    image = torch.rand(count, 3, size_px, size_px, generator=generator) * 2 - 1
    mask_px = mask_px or size_px
    mask = torch.randn(count, 19, mask_px, mask_px, generator=generator).mul(2).softmax(1)
    difference = torch.randint(-1, 2, (count, 13), generator=generator).float()
    return image, difference, mask


def build(config: MagGANConfig) -> MagGANGenerator:
    torch.manual_seed(0)
    return MagGANGenerator(config)


def parameters(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def conv(kernel: int, before: int, after: int, bias: bool) -> int:
    return kernel * kernel * before * after + bias * after


def paper_generator_parameters() -> int:
    """The published layer list at 128 px, written out by hand."""
    encoder = sum(
        conv(4, before, after, False) + 2 * after
        for before, after in ((3, 64), (64, 128), (128, 256), (256, 512), (512, 1024))
    )
    transfer = sum(
        conv(4, deeper + 13, width, True) + 3 * conv(3, 2 * width, width, True)
        for deeper, width in ((1024, 512), (512, 256), (256, 128), (128, 64))
    )
    decoder = sum(
        conv(4, before, after, True) + conv(3, 13 + skip, 128, True) + conv(3, 128, 2 * after, True)
        for before, after, skip in ((1024 + 13, 1024, 512), (1024, 512, 256), (512, 256, 128), (256, 128, 64))
    )
    return encoder + transfer + decoder + conv(4, 128, 3, True)


def paper_plain_generator_parameters() -> int:
    spade_decoder = sum(
        conv(4, before, after, True) + conv(3, 13 + skip, 128, True) + conv(3, 128, 2 * after, True)
        for before, after, skip in ((1024 + 13, 1024, 512), (1024, 512, 256), (512, 256, 128), (256, 128, 64))
    )
    plain_decoder = sum(
        conv(4, before + 13, after, False) + 2 * after
        for before, after in ((1024, 1024), (1024 + 512, 512), (512 + 256, 256), (256 + 128, 128))
    )
    last = conv(4, 128 + 64 + 13, 3, True) - conv(4, 128, 3, True)
    return paper_generator_parameters() - spade_decoder + plain_decoder + last


def test_paper_parameter_counts():
    with torch.device("meta"):
        spade = MagGANGenerator(MagGANConfig.paper(128))
        plain = MagGANGenerator(MagGANConfig.paper(128, decoder="plain", decoder_norm="batch"))
        discriminator = MagGANDiscriminator(MagGANDiscriminatorConfig.paper(128))
    assert parameters(spade) == paper_generator_parameters()
    assert parameters(plain) == paper_plain_generator_parameters()
    convolutions = sum(
        conv(4, before, after, False) + 2 * after
        for before, after in ((3, 64), (64, 128), (128, 256), (256, 512), (512, 1024))
    )
    heads = 2 * (1024 * 4 * 4 * 1024 + 1024) + 1024 * (1 + 13) + 1 + 13
    assert parameters(discriminator) == convolutions + heads


def test_compact_fits_a_bundled_weights_file():
    with torch.device("meta"):
        generator = MagGANGenerator(MagGANConfig.compact())
    assert sum(tensor.numel() * 2 for tensor in generator.state_dict().values()) < 12 * 2**20 - 100_000


@pytest.mark.parametrize(("size_px", "stages", "width"), [(256, 5, 64), (512, 6, 48), (1024, 7, 32)])
def test_paper_sizes(size_px, stages, width):
    config = MagGANConfig.paper(size_px)
    assert (config.size_px, config.encoder_stages, config.base_width, config.stu_units) == (size_px, stages, width, 4)
    assert size_px // 2**stages == 8
    assert MagGANDiscriminatorConfig.paper(size_px).levels == math.log2(size_px) - 7
    assert MagGANDiscriminatorConfig.paper(size_px).size_px == size_px


@each_variant
def test_every_parameter_learns(config):
    network = build(config).train()
    if network.detail is not None:  # zero at the start, so what lies before it learns from the second step on
        torch.nn.init.normal_(network.detail.layer.weight, std=0.1)
    image, difference, mask = inputs()
    output = network(image, difference, mask)
    assert output.shape == image.shape
    (output - torch.randn_like(output)).square().mean().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@each_variant
def test_output_range_and_determinism(config):
    network = build(config).eval()
    with torch.no_grad():
        torch.nn.init.normal_(network.to_rgb.weight, std=3)
        first, second = network(*inputs()), network(*inputs())
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
    assert first.std() > 0.1


@pytest.mark.parametrize("name", [name for name, config in VARIANTS.items() if not config.blend])
def test_condition_from_outside_gives_the_same(name):
    network = build(VARIANTS[name]).eval()
    image, difference, mask = inputs()
    condition = mask_guided_conditioning(difference, mask)
    torch.testing.assert_close(network.layers(image, condition).image, network(image, difference, mask))


@pytest.mark.parametrize("mask_px", [16, 32, 64])
def test_mask_may_have_another_resolution(mask_px):
    network = build(VARIANTS["residual-blend"]).eval()
    assert network(*inputs(mask_px=mask_px)).shape == (2, 3, 32, 32)


def test_blend_leaves_what_no_attribute_touches():
    network = build(VARIANTS["residual-blend"]).train()
    torch.nn.init.normal_(network.to_rgb.weight, std=1.0)
    image, _, _ = inputs()
    labels = torch.zeros(2, 32, 32, dtype=torch.long)
    labels[:, :12] = CELEBAMASK_HQ.id("hair")
    mask = torch.nn.functional.one_hot(labels, 19).permute(0, 3, 1, 2).float()
    difference = torch.zeros(2, 13)
    assert torch.equal(network(image, difference, mask), image)
    difference[:, 3] = 1
    changed = (network(image, difference, mask) != image).any(1)
    assert not changed[:, 12:].any()
    assert changed[:, :12].float().mean() > 0.9


@pytest.mark.parametrize("name", ["residual", "layered"])
def test_residual_starts_as_the_identity(name):
    image, difference, mask = inputs()
    change = build(VARIANTS[name]).train()(image, difference, mask) - image
    assert 0 < change.abs().max() < 0.1


def test_layered_starts_as_the_residual_and_can_cover_the_input():
    residual, layered = build(VARIANTS["residual"]).eval(), build(VARIANTS["layered"]).eval()
    layered.load_state_dict(residual.state_dict(), strict=False)
    image, difference, mask = inputs()
    with torch.no_grad():
        torch.testing.assert_close(
            layered(image, difference, mask), residual(image, difference, mask), atol=0.02, rtol=0
        )
        layered.detail.layer.bias[3] = 20.0
        covered = layered(image, difference, mask)
    assert covered.abs().max() < 0.1  # an opaque layer of no colour, whatever was below


def test_label_scheme_is_the_configured_one():
    network, zll = build(TINY).eval(), build(dataclasses.replace(TINY, label_scheme=CELEBAMASK_HQ_ZLL.name)).eval()
    image, difference, mask = inputs()
    permuted = convert_soft(mask, CELEBAMASK_HQ, CELEBAMASK_HQ_ZLL)
    torch.testing.assert_close(zll(image, difference, permuted), network(image, difference, mask))
    assert not torch.allclose(network(image, difference, permuted), network(image, difference, mask), atol=1e-6)


def test_condition_matters():
    network = build(TINY).eval()
    image, difference, mask = inputs()
    assert not torch.allclose(network(image, difference, mask), network(image, -difference, mask), atol=1e-5)


def test_relations_follow_the_network():
    network = build(dataclasses.replace(TINY, relation_preset="natural")).double()
    _, _, mask = inputs()
    pale = torch.eye(13)[11].expand(2, 13)
    assert influence_mask(pale, mask, network.relations).sum() > influence_mask(pale, mask).sum()
    assert not any("relation" in name for name in network.state_dict())


def unit_conv(layer, *features):
    return torch.nn.functional.conv2d(torch.cat(features, 1), layer.weight, layer.bias, padding=1)


def test_transfer_unit_matches_its_equations():
    torch.manual_seed(1)
    unit = SelectiveTransferUnit(6, 4).double()
    feature, state = torch.randn(2, 4, 8, 8).double(), torch.randn(2, 6, 4, 4).double()
    condition = torch.randn(2, 13, 4, 4).double()
    hidden = unit.up(torch.cat([state, condition], 1))
    reset, update = unit_conv(unit.gates, hidden, feature).sigmoid().split(4, dim=1)
    candidate = unit_conv(unit.candidate, reset * hidden, feature).tanh()
    transferred, carried = unit(feature, state, condition)
    torch.testing.assert_close(carried, reset * hidden)
    torch.testing.assert_close(transferred, (1 - update) * hidden + update * candidate)


@each_variant
def test_bfloat16_stays_close(config):
    network = build(config).eval().to(memory_format=torch.channels_last)
    image, difference, mask = inputs()
    exact = network(image, difference, mask)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = network(image.to(memory_format=torch.channels_last), difference, mask)
    assert half.dtype == torch.float32
    # bf16 keeps 8 bits; a dozen layers leave about a percent.
    assert ((half - exact).norm() / exact.norm()).item() < 0.03


def test_generator_exports():
    network = build(VARIANTS["residual-blend"]).eval()
    sample = inputs()
    program = torch.export.export(network, sample)
    torch.testing.assert_close(program.module()(*sample), network(*sample))


def test_discriminator_judges_and_penalises():
    torch.manual_seed(0)
    discriminator = MagGANDiscriminator(TINY_CRITIC)
    image = inputs()[0].requires_grad_()
    (judgement,) = discriminator(image)
    assert judgement.critic.shape == (2, 1)
    assert judgement.logits.shape == (2, 13)
    (gradient,) = torch.autograd.grad(judgement.critic.sum(), image, create_graph=True)
    penalty = (gradient.flatten(1).norm(dim=1) - 1).square().mean()
    (penalty + judgement.critic.mean() + judgement.logits.square().mean()).backward()
    for name, parameter in discriminator.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_critic_gradgradcheck():
    torch.manual_seed(0)
    config = MagGANDiscriminatorConfig(input_px=8, base_width=2, stages=2, head_width=3)
    critic = MagGANDiscriminator(config).double().levels[0]
    image = torch.rand(2, 3, 8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: tuple(critic(x)), (image,))
    assert torch.autograd.gradgradcheck(lambda x: critic(x).critic, (image,))


def test_patches_come_from_the_image():
    config = dataclasses.replace(TINY_CRITIC, is_pooled=True, levels=3, crops=2)
    discriminator = MagGANDiscriminator(config)
    ramp = torch.arange(128.0).expand(2, 3, 128, 128) / 128  # each column has its own value
    views = discriminator.views(ramp, torch.Generator().manual_seed(0))
    again = discriminator.views(ramp, torch.Generator().manual_seed(0))
    assert [tuple(view.shape) for view in views] == [(2, 3, 32, 32), (4, 3, 32, 32), (4, 3, 32, 32)]
    assert all(torch.equal(a, b) for a, b in zip(views, again, strict=True))
    steps = [view.diff(dim=-1).mean().item() * 128 for view in views]
    assert steps == pytest.approx([4, 2, 1], rel=1e-4)
    assert len({view[0, 0, 0, 0].item() for view in views[2].split(1)}) > 1
    judgements = discriminator(torch.rand(2, 3, 128, 128))
    assert [tuple(level.logits.shape) for level in judgements] == [(2, 13), (4, 13), (4, 13)]


def test_rejects_mistakes():
    network, (image, difference, mask) = build(TINY), inputs()
    with pytest.raises(ValueError, match=r"image must be \(N,3,32,32\)"):
        network(image[..., :16], difference, mask)
    with pytest.raises(ValueError, match=r"attribute_difference must be \(N,13\)"):
        network(image, difference[:, :12], mask)
    with pytest.raises(ValueError, match=r"mask must be \(2,19,H,W\)"):
        network(image, difference, mask[:, :18])
    with pytest.raises(ValueError, match="condition must be"):
        network.layers(image, mask)
    with pytest.raises(ValueError, match="multiple of"):
        MagGANConfig(size_px=100)
    with pytest.raises(ValueError, match="stu_units"):
        MagGANConfig(stu_units=5)
    for field in ("decoder", "encoder_norm", "decoder_norm", "output"):
        with pytest.raises(ValueError, match=f"MagGANConfig: {field} must be one of .*, got 'spad'"):
            MagGANConfig(**{field: "spad"})
    with pytest.raises(ValueError, match="is_pooled"):
        MagGANDiscriminatorConfig(levels=2)
    with pytest.raises(ValueError, match="image must be"):
        MagGANDiscriminator(TINY_CRITIC)(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ValueError, match="size_px must be one of"):
        MagGANConfig.paper(200)
