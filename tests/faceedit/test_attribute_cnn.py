# SPDX-License-Identifier: Apache-2.0
"""The classifiers of the component analysis answer as the tree does: same images in, same columns out."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

from faceedit.attributes import CLASSIFIER_ORDER
from faceedit.errors import UnknownAttributeError
from faceedit.networks.attribute_cnn import AttributeCNN, AttributeCNNConfig
from faceedit.networks.attribute_network import AttributeNetwork
from faceedit.registry import load_network, save_weights

NAMES = ("Smiling", "Male", "Wavy_Hair")
NARROW = {
    "vgg16": AttributeCNNConfig(NAMES, 32, "vgg16", 1 / 16),
    "resnet34": AttributeCNNConfig(NAMES, 32, "resnet34"),
    "resnet50": AttributeCNNConfig(NAMES, 32, "resnet50", 1 / 16),
}


def images(count: int, size_px: int) -> torch.Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="module", params=NARROW)
def network(request) -> AttributeNetwork:
    torch.manual_seed(0)
    return AttributeCNN(NARROW[request.param]).eval()


@pytest.mark.parametrize("backbone", ["vgg16", "vgg19", "resnet34", "resnet50", "resnet101"])
def test_paper_networks_are_torchvisions(backbone) -> None:
    with torch.device("meta"):
        ours = AttributeCNN(AttributeCNNConfig(backbone=backbone)).model.state_dict()
        theirs = getattr(models, backbone)(num_classes=40).state_dict()
    assert {name: value.shape for name, value in ours.items()} == {name: v.shape for name, v in theirs.items()}


def test_vgg_computes_what_torchvisions_does() -> None:
    torch.manual_seed(0)
    ours = AttributeCNN(NARROW["vgg16"]).eval()
    with torch.device("meta"):
        theirs = models.VGG(ours.model.features).eval()  # builds its full head, which is then replaced
    theirs.classifier = ours.model.classifier
    theirs.avgpool = torch.nn.AdaptiveAvgPool2d(7)
    x = images(2, 32)
    assert ours.logits(x).std() > 0.01
    torch.testing.assert_close(ours.logits(x), theirs(x))


def test_selected_columns_are_equal(network: AttributeNetwork) -> None:
    image = images(3, 48)
    whole = network(image)
    assert whole.shape == (3, 3)
    assert whole.std() > 1e-3
    part = network.select(("Wavy_Hair", "Smiling"))
    assert part.config.attributes == ("Wavy_Hair", "Smiling")
    assert torch.equal(part(image), whole[:, [2, 0]])
    assert torch.equal(part.select("Smiling")(image), whole[:, :1])
    torch.testing.assert_close(part.probabilities(image), whole[:, [2, 0]].sigmoid())
    with pytest.raises(UnknownAttributeError, match="Male"):
        part.select("Male")


def test_saved_network_loads(network: AttributeNetwork, tmp_path) -> None:
    path = tmp_path / "classifier.safetensors"
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "tests", "half": False}
    save_weights(path, "attribute-cnn", network.config, network.state_dict(), attributes=NAMES, **facts)
    loaded = load_network(path, kind="attribute-cnn")
    assert loaded.config == network.config
    assert torch.equal(loaded(images(1, 32)), network(images(1, 32)))


def test_rejects_mistakes(network: AttributeNetwork) -> None:
    assert AttributeCNNConfig().attributes == CLASSIFIER_ORDER
    with pytest.raises(ValueError, match=r"and 1 for resnet34, got 0\.5"):
        AttributeCNNConfig(backbone="resnet34", width=0.5)
    with pytest.raises(ValueError, match="width must be in"):
        AttributeCNNConfig(width=0)
    with pytest.raises(ValueError, match=r"backbone must be one of vgg16, .*, got 'vgg11'; did you mean vgg1"):
        AttributeCNNConfig(backbone="vgg11")
    with pytest.raises(ValueError, match=r"AttributeCNN: image must be \(N,3,S,S\)"):
        network(torch.zeros(3, 32, 32))
