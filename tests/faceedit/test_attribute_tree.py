# SPDX-License-Identifier: Apache-2.0
"""MaskFaceGAN's tree: the released one's size and shape, narrow ones, and the path to a few attributes alone."""

from __future__ import annotations

import pytest
import torch

from faceedit.attributes import CLASSIFIER_ORDER, MASKFACEGAN_GLOBAL, MASKFACEGAN_LOCAL
from faceedit.errors import UnknownAttributeError
from faceedit.networks.attribute_tree import AttributeTreeClassifier, AttributeTreeConfig
from faceedit.registry import load_network, save_weights

SEVENTEEN = MASKFACEGAN_LOCAL + MASKFACEGAN_GLOBAL
TINY = AttributeTreeConfig(size_px=64, width=5, hidden_width=7)


def settled(config: AttributeTreeConfig) -> AttributeTreeClassifier:
    """A network whose normalisations have seen some images."""
    torch.manual_seed(0)
    network = AttributeTreeClassifier(config)
    for _ in range(3):
        network(torch.rand(8, 3, config.size_px, config.size_px) * 2 - 1)
    return network.eval()


@pytest.fixture(scope="module")
def tree() -> AttributeTreeClassifier:
    return settled(TINY)


def images(count: int, size_px: int) -> torch.Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_size_of_the_released_tree() -> None:
    with torch.device("meta"):
        network = AttributeTreeClassifier(AttributeTreeConfig())
    assert sum(parameter.numel() for parameter in network.parameters()) == 8_830_248
    assert len(network.state_dict()) == 642
    assert network.config.attributes == CLASSIFIER_ORDER
    assert [len(copies) for copies in network.conv_layers.values()] == [1, 2, 3, 10]
    assert [len(copies) for copies in network.fc_layers.values()] == [18, 33, 40]


def test_feature_sizes_of_the_released_tree() -> None:
    with torch.device("meta"):
        network = AttributeTreeClassifier(AttributeTreeConfig()).eval()
        shapes = {}
        for name, copies in network.conv_layers.items():
            copies["0"].register_forward_hook(
                lambda module, inputs, output, name=name: shapes.update({name: tuple(output.shape[1:])})
            )
        assert network(torch.empty(2, 3, 1024, 1024)).shape == (2, 40)
    assert shapes == {"01-06": (64, 56, 56), "06-11": (64, 14, 14), "11-12": (64, 14, 14), "12-13": (64, 7, 7)}


@pytest.mark.parametrize("names", [("Smiling",), ("Black_Hair", "Blurry", "Eyeglasses"), SEVENTEEN, CLASSIFIER_ORDER])
def test_selected_branches_equal_the_columns(tree: AttributeTreeClassifier, names: tuple[str, ...]) -> None:
    image = images(3, 80)
    whole, part = tree(image), tree.select(names)
    assert whole.std() > 0.01
    assert part.config.attributes == names
    assert torch.equal(part(image), whole[:, [CLASSIFIER_ORDER.index(name) for name in names]])
    again = part.select(names[-1])
    assert torch.equal(again(image), whole[:, [CLASSIFIER_ORDER.index(names[-1])]])


def test_a_selected_branch_leaves_the_rest_out(tree: AttributeTreeClassifier) -> None:
    part = tree.select("Smiling")
    own, shared = dict(part.named_parameters()), dict(tree.named_parameters())
    assert all(own[name] is shared[name] for name in own), "the layers are shared, under the same names"
    groups = [*part.conv_layers.values(), *part.fc_layers.values()]
    assert [len(copies) for copies in groups] == [1] * 7
    assert not part.training
    ran = []
    for module in tree.modules():
        if not list(module.children()) and list(module.parameters()):
            module.register_forward_hook(lambda module, *_: ran.append(module))
    part(images(1, 64))
    leaves = {module for module in part.modules() if not list(module.children()) and list(module.parameters())}
    assert set(ran) == leaves, "nothing outside the path is computed"
    for module in tree.modules():
        module._forward_hooks.clear()


def test_a_pruned_tree_can_be_saved_by_itself(tree: AttributeTreeClassifier, tmp_path) -> None:
    part = tree.select(("Male", "Wavy_Hair"))
    path = tmp_path / "part.safetensors"
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "tests", "half": False}
    save_weights(path, "attribute-tree", part.config, part.state_dict(), attributes=part.config.attributes, **facts)
    loaded = load_network(path, kind="attribute-tree")
    image = images(2, 64)
    assert torch.equal(loaded(image), part(image))
    assert loaded.header.attributes == ("Male", "Wavy_Hair")


def test_images_of_any_size_are_resized_and_normalised(tree: AttributeTreeClassifier) -> None:
    image = images(2, 64)
    sharp = tree(image)
    torch.testing.assert_close(tree(image.repeat_interleave(4, -1).repeat_interleave(4, -2)), sharp)
    assert tree(images(2, 33)).shape == (2, 40)
    plain = ((image + 1) / 2 - tree.celeba_mean[:, None, None]) / tree.celeba_std[:, None, None]
    torch.testing.assert_close(tree.logits(plain), sharp)
    torch.testing.assert_close(tree.probabilities(image), sharp.sigmoid())


def test_gradient_reaches_every_parameter_and_the_image() -> None:
    network = AttributeTreeClassifier(AttributeTreeConfig(size_px=32, width=4, hidden_width=6))
    image = images(4, 48).requires_grad_(True)
    torch.nn.functional.binary_cross_entropy_with_logits(network(image), torch.full((4, 40), 0.3)).backward()
    assert image.grad is not None
    assert image.grad.abs().sum() > 0
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_rejects_mistakes(tree: AttributeTreeClassifier) -> None:
    with pytest.raises(UnknownAttributeError, match="did you mean Smiling"):
        tree.select("smilling")
    with pytest.raises(UnknownAttributeError, match="Male"):
        tree.select("Male").select("Young")
    with pytest.raises(ValueError, match="different names"):
        tree.select(("Male", "Male"))
    with pytest.raises(ValueError, match="different names"):
        tree.select(())
    with pytest.raises(UnknownAttributeError, match="Blond_Hair"):
        AttributeTreeConfig(("blond_hair",))
    with pytest.raises(ValueError, match="multiple of 32, got 100"):
        AttributeTreeConfig(size_px=100)
    with pytest.raises(ValueError, match="must be positive"):
        AttributeTreeConfig(width=0)
    for shape in ((3, 64, 64), (1, 1, 64, 64), (1, 3, 64, 32)):
        with pytest.raises(ValueError, match=r"AttributeTreeClassifier: image must be \(N,3,S,S\), got"):
            tree(torch.zeros(shape))
