# SPDX-License-Identifier: Apache-2.0
"""The parsers of nine regions: the paper's against torchvision's own, narrow ones, and any image size."""

from __future__ import annotations

import copy

import pytest
import torch
from torchvision import models

from faceedit.errors import UnknownNameError
from faceedit.networks.deeplab import DeepLabConfig, DeepLabParser
from faceedit.networks.dilated_backbones import dilated_backbone
from faceedit.networks.fcn import FCNConfig, FCNParser
from faceedit.networks.folding import ConvBiasReLU
from faceedit.networks.parser import ParserNet
from faceedit.networks.region_parser import RegionParser
from faceedit.networks.region_unet import RegionUNetConfig, RegionUNetParser
from faceedit.registry import load_network, save_weights

NARROW = {
    "deeplab-parser": DeepLabConfig(size_px=64, backbone="mobilenet_v3_large", width=0.25, head_width=8, rates=(2, 4)),
    "fcn-parser": FCNConfig(size_px=64, width=1 / 16),
    "region-unet-parser": RegionUNetConfig(size_px=64, widths=(4, 4, 8, 8, 8), blocks=(1, 1, 1, 1, 1)),
}
CLASSES = {"deeplab-parser": DeepLabParser, "fcn-parser": FCNParser, "region-unet-parser": RegionUNetParser}


def images(count: int, size_px: int) -> torch.Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(3)) * 2 - 1


def settled(network: torch.nn.Module, size_px: int) -> torch.nn.Module:
    """The network with normalisations that have seen images and no longer shrink what passes."""
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 0.5
    for _ in range(4):
        network.train()(images(4, size_px))
    return network.eval()


@pytest.fixture(scope="module", params=NARROW)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def parser(kind: str) -> RegionParser:
    torch.manual_seed(0)
    return settled(CLASSES[kind](NARROW[kind]), 64)


@pytest.mark.parametrize(
    ("network", "config", "name"),
    [
        (DeepLabParser, DeepLabConfig(), "deeplabv3_resnet50"),
        (FCNParser, FCNConfig(), "fcn_resnet50"),
        (FCNParser, FCNConfig(backbone="resnet101"), "fcn_resnet101"),
    ],
)
def test_paper_networks_are_torchvisions(network, config, name: str) -> None:
    build = getattr(models.segmentation, name)
    with torch.device("meta"):
        ours = network(config).state_dict()
        theirs = build(weights=None, weights_backbone=None, num_classes=9).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {
        f"model.{name}": value.shape for name, value in theirs.items()
    }


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize("name", ["resnet50", "resnet101", "mobilenet_v3_large"])
def test_features_keep_their_density(name, output_stride: int) -> None:
    with torch.device("meta"):
        backbone, channels = dilated_backbone(name, 0.25, output_stride)
        features = backbone.eval()(torch.empty(1, 3, 128, 128))
    assert features.shape == (1, channels, 128 // output_stride, 128 // output_stride)


@pytest.mark.parametrize("output_stride", [8, 16])
def test_dense_features_contain_torchvisions(output_stride: int) -> None:
    """Dilation replaces strides exactly: the undilated network's features are every second or fourth of ours."""
    torch.manual_seed(0)
    sparse = settled(models.mobilenet_v3_large(width_mult=0.25).features, 64)
    dense = dilated_backbone("mobilenet_v3_large", 0.25, output_stride)[0].eval()
    dense.load_state_dict(sparse.state_dict())
    for network in (sparse, dense):  # its gates average over positions, of which the dense network has others too
        for module in network.modules():
            if type(module).__name__ == "SqueezeExcitation":
                module.forward = lambda x: x
    step = 32 // output_stride
    few, many = sparse(images(1, 128)), dense(images(1, 128))
    assert few.std() > 1e-3
    torch.testing.assert_close(many[..., ::step, ::step], few, rtol=1e-4, atol=1e-6)


def test_running_statistics_follow_within_a_short_run() -> None:
    torch.manual_seed(0)
    backbone = dilated_backbone("mobilenet_v3_large", 0.25, 8)[0]
    image = images(4, 32)
    with torch.no_grad():
        for _ in range(160):
            trained = backbone.train()(image)
        assert trained.std() > 0.1
        # Measured: 0.67 here, 0.001 with torchvision's own momentum. Unbiased variances keep it from 1.
        assert torch.corrcoef(torch.stack([backbone.eval()(image).flatten(), trained.flatten()]))[0, 1] > 0.3


@pytest.mark.parametrize("size_px", [32, 64, 100, 128])
def test_logits_have_the_size_of_the_image(parser: RegionParser, size_px: int) -> None:
    assert parser(images(1, size_px)).shape == (1, 9, size_px, size_px)


def test_enlarging_an_image_enlarges_its_logits(parser: RegionParser) -> None:
    image = images(2, 64)
    larger = parser(image.repeat_interleave(2, -1).repeat_interleave(2, -2))
    again = torch.nn.functional.interpolate(parser(image), scale_factor=2, mode="bilinear")
    torch.testing.assert_close(larger, again)


def test_folding_keeps_the_logits_and_the_gradient(parser: RegionParser) -> None:
    parser = copy.deepcopy(parser).double()  # in float32 a rounded-off sign before a ReLU moves single gradients
    folded = parser.for_inference()
    norms = [module for module in folded.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    assert not norms
    assert any(isinstance(module, torch.nn.BatchNorm2d) for module in parser.modules()), "the original stays"
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    assert any(type(module) is ConvBiasReLU for module in folded.modules())
    convolutions = [m for m in folded.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert all(m.weight.is_contiguous(memory_format=torch.channels_last) for m in convolutions)
    image = images(2, 64).double().requires_grad_(True)
    assert parser(image).std() > 0.1
    gradients = []
    for network in (parser, folded):
        logits = network(image)
        gradients.append(torch.autograd.grad(logits.square().sum(), image)[0])
        torch.testing.assert_close(logits, parser(image), rtol=0, atol=1e-9)
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-9 * gradients[0].abs().max().item())


def test_the_unet_is_the_starters() -> None:
    torch.manual_seed(0)
    network = RegionUNetParser(RegionUNetConfig(size_px=256)).eval()
    assert isinstance(network.model, ParserNet)
    image = images(1, 256)
    assert torch.equal(network(image), network.model(image))


def test_saved_parser_loads(parser: RegionParser, kind: str, tmp_path) -> None:
    path, config = tmp_path / "parser.safetensors", parser.config
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "tests"}
    save_weights(path, kind, config, parser.state_dict(), label_scheme=config.label_scheme, half=False, **facts)
    loaded = load_network(path, kind=kind)
    assert type(loaded) is type(parser)
    assert loaded.config == config
    assert torch.equal(loaded(images(1, 64)), parser(images(1, 64)))


def test_rejects_mistakes(parser: RegionParser) -> None:
    with pytest.raises(UnknownNameError, match="celebamask-hq"):
        DeepLabConfig(label_scheme="celebamask")
    with pytest.raises(ValueError, match=r"DeepLabConfig: backbone must be one of .*, got 'resnet18'; did you mean"):
        DeepLabConfig(backbone="resnet18")
    with pytest.raises(ValueError, match="FCNConfig: backbone must be one of resnet50, resnet101"):
        FCNConfig(backbone="mobilenet_v3_large")
    with pytest.raises(ValueError, match=r"dilated_backbone: name must be one of .*, got 'resnet18'; did you mean"):
        dilated_backbone("resnet18", 1.0, 8)
    for mistake, words in (
        ({"size_px": 100}, "multiple of 32, got 100"),
        ({"head_width": 0}, "head_width and rates must be positive"),
        ({"rates": ()}, "head_width and rates must be positive"),
    ):
        with pytest.raises(ValueError, match=words):
            DeepLabConfig(**mistake)
    for mistake in ({"widths": (4, 4)}, {"blocks": (1, 1, 1, 1, 0)}):
        with pytest.raises(ValueError, match="widths and blocks must be five positive numbers"):
            RegionUNetConfig(**mistake)
    for config, words in (
        (DeepLabConfig(output_stride=4), "output_stride must be 8 or 16, got 4"),
        (DeepLabConfig(width=0.0), "width must be in"),
    ):
        with pytest.raises(ValueError, match=words):
            DeepLabParser(config)
    with pytest.raises(ValueError, match=rf"{type(parser).__name__}: image must be \(N,3,S,S\), got \(1, 3, 64, 32\)"):
        parser(torch.zeros(1, 3, 64, 32))
