# SPDX-License-Identifier: Apache-2.0
"""Networks made ready for inference: the same values and gradients, in fewer passes."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import PACKAGE_ROOT
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.segmentation.deeplabv3 import ASPP

from faceedit.kernels import native
from faceedit.maskfacegan.networks import AttributeJudge, RegionParser, _halved, _halves
from faceedit.networks import folding
from faceedit.networks.attribute_cnn import AttributeCNN, AttributeCNNConfig
from faceedit.networks.attribute_tree import AttributeTreeClassifier, AttributeTreeConfig
from faceedit.networks.fcn import FCNConfig, FCNParser
from faceedit.networks.folding import ChannelAffine, ConvBiasReLU, QuickConv, ResidualBlock, for_inference
from faceedit.networks.parser import ParserConfig, ParserNet


class _OwnConv(nn.Conv2d):
    """A convolution that may do anything."""


def _way_round(width: int, stride: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(4, width, 1, stride, bias=False), nn.BatchNorm2d(width))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "conv bn relu": lambda: nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
    "conv relu bn pool": lambda: nn.Sequential(
        nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.Conv2d(6, 3, 1)
    ),
    "plain norm": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 2, 1), nn.Tanh()),
    "basic": lambda: nn.Sequential(BasicBlock(4, 4), BasicBlock(4, 4)),
    "basic, halved": lambda: nn.Sequential(BasicBlock(4, 8, 2, _way_round(8, 2))),
    "bottleneck": lambda: nn.Sequential(Bottleneck(4, 1), nn.AvgPool2d(2)),
    "pyramid": lambda: nn.Sequential(ASPP(4, (1, 2), 6)),
    "bottleneck, halved": lambda: nn.Sequential(Bottleneck(4, 2, 2, _way_round(8, 2))),
}


class _Calls(TorchDispatchMode):
    """Counts operators."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[function._schema.name.split("::")[1].rstrip("_")] += 1
        return function(*args, **(kwargs or {}))


def calls(function: Callable[[], Any]) -> Counter[str]:
    with _Calls() as mode:
        function()
    return mode.found


def lived_in(network: nn.Module) -> nn.Module:
    """The network with normalisations whose statistics and weights are anything but neutral."""
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d | nn.BatchNorm1d):
            for tensor in (module.running_mean, module.running_var, module.weight, module.bias):
                if tensor is not None:
                    tensor.data.copy_(torch.rand(tensor.shape, generator=generator) + 0.3)
            if module.weight is not None:
                module.weight.data[::2].neg_()
    return network.eval()


@pytest.fixture(params=["cpu's way", "cuda's way"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of adding biases, whatever the device."""
    monkeypatch.setattr(folding, "adds_bias", lambda x: request.param == "cpu's way")


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", NETWORKS)
def test_values_and_gradients_stay(name: str) -> None:
    torch.manual_seed(0)
    network = lived_in(NETWORKS[name]()).double()
    folded = for_inference(network)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.ReLU) for module in folded.modules() if name != "plain norm")
    assert not any(parameter.requires_grad for parameter in folded.parameters())
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64, requires_grad=True)
    wanted, found = network(x), folded(x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    weights = torch.randn_like(wanted)
    expected, gradient = (torch.autograd.grad((y * weights).sum(), x)[0] for y in (wanted, found))
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["vgg", "basic"])
def test_convolutions_of_enough_pixels_are_the_kernel_librarys(name: str) -> None:
    """On a CPU, in float32: values and the gradient that reaches the image stay."""
    if native.build_report()["isa"] in ("", "baseline"):
        pytest.skip("no C++ kernels, or a processor whose vectors are too short")
    torch.manual_seed(0)
    vgg = [layer for _ in range(2) for layer in (nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(32))]
    network = lived_in(nn.Sequential(*vgg) if name == "vgg" else nn.Sequential(BasicBlock(32, 32)))
    folded = for_inference(network)
    x = torch.randn(2, 32, 20, 24).contiguous(memory_format=torch.channels_last).requires_grad_()
    found = calls(lambda: folded(x))
    assert found["modulated_conv2d"] == 2
    assert not found["convolution"]
    wanted = network.double()(x.double())
    y = folded(x)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    seed = torch.randn_like(wanted)
    expected, gradient = (torch.autograd.grad((o * s).sum(), x)[0] for o, s in ((wanted, seed), (y, seed.float())))
    # A few signs next to 0 are a matter of rounding.
    assert (gradient - expected).norm() < 2e-3 * expected.norm()
    folded[0].weight.requires_grad_() if name == "vgg" else folded[0].inner[0].weight.requires_grad_()
    assert calls(lambda: folded(x))["modulated_conv2d"] == 1


def _parser(*widths: int) -> ParserNet:
    return ParserNet(ParserConfig(size_px=64, num_classes=5, widths=widths, blocks=(1,) * len(widths)))


@pytest.mark.usefixtures("way")
def test_the_face_parser_keeps_values_and_gradients() -> None:
    torch.manual_seed(0)
    network = lived_in(_parser(4, 6, 4, 6, 4)).double()
    folded = for_inference(network)
    assert not any(isinstance(module, nn.BatchNorm2d | nn.ReLU) for module in folded.modules())
    assert type(folded.head) is QuickConv
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64, requires_grad=True)
    wanted, found = network(x), folded(x)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    seed = torch.randn_like(wanted)
    expected, gradient = (torch.autograd.grad((y * seed).sum(), x)[0] for y in (wanted, found))
    assert expected.abs().max() > 0
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-9)


def test_convolutions_outside_sequences_are_the_kernel_librarys_too() -> None:
    """The face parser's, whose sums stand between them. With gradient only those that a ReLU was joined to."""
    if native.build_report()["isa"] in ("", "baseline"):
        pytest.skip("no C++ kernels, or a processor whose vectors are too short")
    torch.manual_seed(0)
    network = lived_in(_parser(32, 32))
    folded = for_inference(network)
    x = torch.randn(2, 3, 64, 64)
    found = calls(lambda: folded(x))
    assert found["modulated_conv2d"] == 2 * 3  # two of each residual block: one a level, and the decoder's
    assert found["convolution"] == 5  # the stem's of 12 channels, one of stride 2, two of one pixel, the head's of 20
    wanted = network.double()(x.double())
    torch.testing.assert_close(folded(x).double(), wanted, rtol=1e-4, atol=1e-4)
    x.requires_grad_()
    assert calls(lambda: folded(x))["modulated_conv2d"] == 3
    wanted, y = network(x.double()), folded(x)
    torch.testing.assert_close(y.double(), wanted, rtol=1e-4, atol=1e-4)
    seed = torch.randn_like(wanted)
    expected, gradient = (torch.autograd.grad((o * s).sum(), x)[0] for o, s in ((wanted, seed), (y, seed.float())))
    # A few signs next to 0 are a matter of rounding.
    assert (gradient - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("after", [nn.ReLU(inplace=True), nn.LeakyReLU(0.1, inplace=True)])
def test_what_follows_a_convolution_may_write_over_it(after: nn.Module) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(32, 32, 3, padding=1, bias=False), after)
    folded = for_inference(network)
    x = torch.randn(1, 32, 32, 32).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected, gradient = (torch.autograd.grad(net(x).square().sum(), x)[0] for net in (network, folded))
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4)


def test_convolutions_are_replaced_once_and_only_those_of_three_by_three() -> None:
    shared = nn.Conv2d(4, 4, 3, padding=1)
    folded: Any = for_inference(nn.ModuleList([shared, nn.ModuleList([shared]), nn.Conv2d(4, 4, 3), _OwnConv(4, 4, 1)]))
    assert type(folded[0]) is QuickConv
    assert folded[1][0] is folded[0]
    assert [type(layer) for layer in folded[2:]] == [nn.Conv2d, _OwnConv]
    assert type(shared) is nn.Conv2d


def test_torchvision_is_not_imported_for_networks_without_its_blocks(tmp_path: Path) -> None:
    program = (
        "import sys; from torch import nn; from faceedit.networks.folding import for_inference;"
        " for_inference(nn.Sequential(nn.Conv2d(1, 1, 3), nn.ReLU())); sys.exit('torchvision' in sys.modules)"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}
    assert subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=False).returncode == 0


def test_copies_made_in_inference_mode_pass_gradients() -> None:
    with torch.inference_mode():
        folded = for_inference(nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)))
    assert not any(tensor.is_inference() for tensor in folded.state_dict().values())
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    assert torch.autograd.grad(folded(x).sum(), x)[0].abs().max() > 0


def test_the_original_stays_as_it_is() -> None:
    torch.manual_seed(0)
    network = lived_in(NETWORKS["bottleneck, halved"]()).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for_inference(network)
    assert network.training
    assert isinstance(network[0], Bottleneck)
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_what_is_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "adds_bias", lambda x: False)
    joined = for_inference(lived_in(NETWORKS["conv relu bn pool"]()))
    assert [type(layer) for layer in joined] == [ConvBiasReLU, nn.Identity, ChannelAffine, nn.MaxPool2d, nn.Conv2d]
    assert isinstance(for_inference(lived_in(NETWORKS["basic"]()))[1], ResidualBlock)
    x = torch.randn(1, 4, 8, 8)
    found = calls(lambda: joined(x))
    assert found["noise_bias_act"] == 2
    assert not found["relu"]
    assert not found["native_batch_norm"]


def test_a_shared_order_is_not_taken_for_a_sequence() -> None:
    """Outside a Sequential the order of registration says nothing about what follows what."""

    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.relu = nn.Conv2d(4, 4, 1), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.relu(x))

    torch.manual_seed(0)
    network = Apart()
    x = torch.randn(1, 4, 3, 3)
    torch.testing.assert_close(for_inference(network)(x), network(x))


class _Doubled(nn.Sequential):
    """Reads a value between two of its layers."""

    def forward(self, x: Tensor) -> Tensor:
        first = self[0](x)
        return first + self[1](first)


def _in_two_places(layer: nn.Module, *others: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(layer), nn.Sequential(layer, *others))


def _with_activation(block: Any, activation: nn.Module) -> nn.Module:
    block.relu = activation
    return nn.Sequential(block)


def _around(layer: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(4, 4, 3), layer, nn.Conv2d(4, 4, 3), layer, nn.ReLU())


ODD_NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "a layer twice, then a ReLU": lambda: _around(nn.AvgPool2d(2, 1)),
    "a block twice": lambda: nn.Sequential(*[BasicBlock(4, 4)] * 2),
    "a block in two places": lambda: _in_two_places(Bottleneck(4, 1), nn.Tanh()),
    "a way round of several": lambda: nn.Sequential(
        BasicBlock(4, 6, 1, nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6)))
    ),
    "a way round that ends otherwise": lambda: nn.Sequential(
        BasicBlock(4, 4, 1, nn.Sequential(nn.Conv2d(4, 4, 1), nn.Tanh()))
    ),
    "a block of other normalisations": lambda: nn.Sequential(BasicBlock(4, 4, norm_layer=partial(nn.GroupNorm, 2))),
    "a block of another activation": lambda: _with_activation(BasicBlock(4, 4), nn.SiLU()),
    "statistics of the batch": lambda: nn.Sequential(
        nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, track_running_stats=False), nn.ReLU(), nn.BatchNorm2d(4)
    ),
    "a forward of its own": lambda: _Doubled(nn.Conv2d(4, 4, 1), nn.ReLU()),
    "reflected borders": lambda: nn.Sequential(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"), nn.ReLU()),
}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("name", ODD_NETWORKS)
def test_what_cannot_be_joined_keeps_its_values(name: str) -> None:
    torch.manual_seed(0)
    network = lived_in(ODD_NETWORKS[name]()).double()
    x = torch.randn(2, 4, 9, 9, dtype=torch.float64)
    wanted = network(x)
    assert wanted.std() > 0.05
    torch.testing.assert_close(for_inference(network)(x), wanted, rtol=1e-9, atol=1e-9)


def test_the_pyramid_reorders_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folding, "adds_bias", lambda x: False)
    torch.manual_seed(0)
    network = for_inference(lived_in(nn.Sequential(nn.Conv2d(4, 8, 3), ASPP(8, (1, 2), 6))))
    x = torch.randn(2, 4, 9, 9).to(memory_format=torch.channels_last).requires_grad_(True)
    layouts: set[bool] = set()

    class Layouts(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            if function._schema.name in ("aten::cat", "aten::add", "aten::convolution"):
                layouts.add(result.is_contiguous(memory_format=torch.channels_last))
            return result

    with Layouts():
        torch.autograd.grad(network(x).square().sum(), x)
    assert layouts == {True}


@pytest.mark.parametrize("backbone", ["tree", "resnet34", "vgg16"])
def test_a_classifier_can_still_be_pruned(backbone: str) -> None:
    torch.manual_seed(0)
    network: Any
    if backbone == "tree":
        network = AttributeTreeClassifier(AttributeTreeConfig(size_px=32, width=4, hidden_width=8))
    else:
        width = 1.0 if backbone == "resnet34" else 1 / 16
        network = AttributeCNN(AttributeCNNConfig(size_px=32, backbone=backbone, width=width))
    lived_in(network).double()
    folded = network.for_inference()
    image = torch.rand(2, 3, 40, 40, dtype=torch.float64) * 2 - 1
    names = ("Smiling", "Wavy_Hair")
    wanted = AttributeJudge(network).select(names)(image)
    assert wanted.std() > 0
    torch.testing.assert_close(AttributeJudge(folded).select(names)(image), wanted, rtol=1e-6, atol=1e-6)
    assert torch.equal(
        folded.select(names)(image), folded(image)[:, [folded.config.attributes.index(n) for n in names]]
    )


def test_half_precision_rounds_no_bias_of_a_joined_layer_and_casts_nothing_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(folding, "adds_bias", lambda x: False)
    torch.manual_seed(0)
    parser = lived_in(FCNParser(FCNConfig(size_px=32, width=1 / 16)))
    judge = RegionParser(parser.for_inference())
    judge.network, judge.is_half = _halved(judge.network), True
    joined = [module for module in judge.network.modules() if type(module) is ConvBiasReLU]
    assert joined
    assert all(module.weight.dtype is torch.bfloat16 and module.bias.dtype is torch.float32 for module in joined)
    image = torch.rand(1, 3, 32, 32) * 2 - 1
    assert calls(lambda: judge(image))["_to_copy"] <= 3  # of the image and of the logits, there and back
    wanted, rounded = RegionParser(parser)(image), RegionParser(parser)
    rounded.is_half = True
    errors = [(found(image) - wanted).norm().item() for found in (judge, rounded)]
    assert 0 < errors[0] <= errors[1]  # measured: 0.6 of it


def test_half_precision_copies_a_network_once_and_again_after_a_write() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 1))
    made = _halved(network)
    assert _halved(network) is made
    with torch.no_grad():
        network[0].weight.fill_(2)
    assert _halved(network) is not made
    assert _halved(network)[0].weight.unique().tolist() == [2]
    for value in (3.0, 4.0):  # whose memory may be that of the one before
        network[0].weight.data = torch.full((4, 3, 1, 1), value)
        assert _halved(network)[0].weight.unique().tolist() == [value]
    known = len(_halves)
    del network
    gc.collect()
    assert len(_halves) == known - 1


def test_writes_to_inference_tensors_are_seen() -> None:
    with torch.inference_mode():
        network = nn.Sequential(nn.Conv2d(3, 4, 1))
        for value in (1.0, 2.0):
            network[0].weight.fill_(value)
            assert _halved(network)[0].weight.unique().tolist() == [value]
