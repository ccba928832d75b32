# SPDX-License-Identifier: Apache-2.0
import pytest
import torch

from faceedit.attributes import CELEBA, MAGGAN
from faceedit.classification import STARTER, load_classifier
from faceedit.errors import UnknownAttributeError
from faceedit.networks.classifier import AttributeClassifier, AttributeClassifierConfig
from faceedit.registry import load_network

TINY = AttributeClassifierConfig(attributes=MAGGAN, size_px=16, base_width=2, stages=3, hidden_width=8)


def test_paper_parameter_count():
    count, before = 0, 3
    for width in (16, 32, 64, 128, 256):
        count += 9 * before * width + 2 * width + 9 * width * width + 2 * width
        before = width
    count += (256 * 4 * 4 + 1) * 512 + (512 + 1) * 40
    network = AttributeClassifier(AttributeClassifierConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) == count
    assert network.config.attributes == CELEBA


def test_every_parameter_learns():
    torch.manual_seed(0)
    network = AttributeClassifier(TINY)
    logits = network(torch.rand(4, 3, 16, 16) * 2 - 1)
    assert logits.shape == (4, 13)
    torch.nn.functional.binary_cross_entropy_with_logits(logits, torch.randint(0, 2, (4, 13)).float()).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_it_can_learn_a_colour():
    torch.manual_seed(0)
    network = AttributeClassifier(AttributeClassifierConfig(("Blond_Hair",), 16, 4, 2, 8))
    labels = torch.arange(16) % 2
    image = torch.randn(16, 3, 16, 16) * 0.1 + (labels.float() - 0.5)[:, None, None, None]
    optimiser = torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(20):
        loss = torch.nn.functional.binary_cross_entropy_with_logits(network(image)[:, 0], labels.float())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert ((network(image)[:, 0] > 0) == labels.bool()).all()


def test_probabilities_resize():
    network = AttributeClassifier(TINY).eval()
    image = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(network.probabilities(image), network(image).sigmoid())
    larger = image.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert network.probabilities(larger).shape == (2, 13)
    assert not network.probabilities(larger).requires_grad


def test_the_loaded_classifier_is_the_file_in_fewer_passes():
    classifier, network = load_classifier(), load_network(STARTER)
    assert isinstance(classifier, AttributeClassifier)
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in classifier.modules())
    assert classifier.config == network.config
    image = torch.rand(2, 3, 150, 150, generator=torch.Generator().manual_seed(0)) * 2 - 1
    wanted = network.probabilities(image)
    assert wanted.std() > 0.1
    torch.testing.assert_close(classifier.probabilities(image), wanted, rtol=0, atol=1e-5)  # float32: rounding


def test_rejects_mistakes():
    with pytest.raises(ValueError, match=r"image must be \(N,3,16,16\)"):
        AttributeClassifier(TINY)(torch.zeros(1, 3, 32, 32))
    for shape in ((3, 16, 16), (3, 20, 20), (1, 1, 20, 20), (1, 3, 0, 20)):
        with pytest.raises(ValueError, match=r"AttributeClassifier\.probabilities: image must be \(N,3,H,W\), got \("):
            AttributeClassifier(TINY).probabilities(torch.zeros(shape))
    with pytest.raises(UnknownAttributeError, match="Blond_Hair"):
        AttributeClassifierConfig(("Blond",))
    with pytest.raises(ValueError, match="multiple of"):
        AttributeClassifierConfig(size_px=100)
