# SPDX-License-Identifier: Apache-2.0
"""Files in MaskFaceGAN's layouts give what their own formulation gives, and others give one error that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support import maskfacegan_originals as originals
from support.command_line import Run

from faceedit.attributes import CLASSIFIER_ORDER
from faceedit.errors import UnknownNameError, WeightsError
from faceedit.importers import import_weights
from faceedit.networks.attribute_tree import AttributeTreeConfig
from faceedit.networks.deeplab import DeepLabConfig
from faceedit.registry import load_network

CLASSIFIER, PARSER = "maskfacegan-classifier", "maskfacegan-parser"


def imported(kind: str, path: Path, **options) -> torch.nn.Module:
    out = path.with_name("out.safetensors")
    import_weights(kind, path, out, **options)
    return load_network(out)


def images(count: int, size_px: int) -> torch.Tensor:
    return torch.rand(count, 3, size_px, size_px, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layout", ["pt", "pt-parallel", "pt-without-counters", "safetensors"])
def test_classifier_logits(layout: str, tmp_path: Path) -> None:
    state = originals.tree_state()
    path = tmp_path / f"state.{layout.partition('-')[0]}"
    if layout == "safetensors":
        save_file(state, path)
    elif layout == "pt-parallel":
        torch.save({f"module.{key}": value for key, value in state.items()}, path)
    elif layout == "pt-without-counters":
        torch.save({k: v for k, v in state.items() if not k.endswith("num_batches_tracked")}, path)
    else:
        torch.save(state, path)
    network = imported(CLASSIFIER, path)
    assert network.config == AttributeTreeConfig(size_px=64, width=6, hidden_width=10)
    assert network.header.attributes == CLASSIFIER_ORDER
    image = images(4, 150)
    theirs = originals.tree_logits(state, image)
    ours = network(image * 2 - 1)
    for column, (head, values) in enumerate(theirs.items()):
        assert network.config.attributes[column].lower() == head
        assert values.std() > 1e-3, head
        torch.testing.assert_close(ours[:, column], values, rtol=0, atol=1e-4)


def test_parser_logits(tmp_path: Path) -> None:
    state = originals.parser_state()
    torch.save(state, tmp_path / "state.pt")
    network = imported(PARSER, tmp_path / "state.pt")
    assert network.config == DeepLabConfig(width=1 / 8, head_width=6)
    assert network.header.label_scheme == "maskfacegan"
    image = images(1, 512)
    theirs = originals.parser_logits(state, image, 512)
    assert theirs.std((0, 2, 3)).min() > 0.1
    torch.testing.assert_close(network(image * 2 - 1), theirs, rtol=0, atol=1e-4)


def test_parser_of_another_depth_from_parallel_training(tmp_path: Path) -> None:
    state = originals.parser_state(group=4, head=2, depths=(3, 4, 23, 3))
    kept = {f"module.{key}": value for key, value in state.items() if "num_batches_tracked" not in key}
    torch.save(kept, tmp_path / "state.pt")
    network = imported(PARSER, tmp_path / "state.pt")
    assert network.config == DeepLabConfig(backbone="resnet101", width=1 / 16, head_width=2)
    for name, value in network.state_dict().items():
        assert torch.equal(value, kept.get(f"module.{name}", torch.tensor(0))), name


# Bad files


Change = Callable[[originals.State], object]

CLASSIFIER_MISTAKES: dict[str, tuple[Change, str]] = {
    "leaf missing": (
        lambda state: state.pop("fc_layers.15-16.39.0.bias"),
        r"must hold fc_layers\.15-16\.39\.0\.bias, got none",
    ),
    "first layer missing": (
        lambda state: state.pop("conv_layers.01-06.0.0.weight"),
        r"must hold conv_layers\.01-06\.0\.0\.weight",
    ),
    "left over": (
        lambda state: state.update({"fc_layers.15-16.40.0.bias": torch.zeros(1)}),
        r"nothing but MaskFaceGAN's attribute classifier, got fc_layers\.15-16\.40\.0\.bias",
    ),
    "another shape": (
        lambda state: state.update({"conv_layers.06-11.1.4.weight": torch.zeros(6, 5, 3, 3)}),
        r"conv_layers\.06-11\.1\.4\.weight of state\.pt must have the shape \(6,6,3,3\).*got \(6,5,3,3\)",
    ),
    "no such image size": (
        lambda state: state.update(
            {k: torch.zeros(10, 18) for k in state if k.startswith("fc_layers.13-14.") and k.endswith("0.weight")}
        ),
        r"fc_layers\.13-14\.0\.0\.weight .* must have the shape \(10,6\) at 32 px, got \(10,18\)",
    ),
    "integers": (
        lambda state: state.update({"celeba_mean": torch.zeros(3, dtype=torch.int64)}),
        "celeba_mean of .* plain tensor of floats, got torch.int64",
    ),
    "counter of floats": (
        lambda state: state.update({"fc_layers.13-14.0.2.num_batches_tracked": torch.zeros(())}),
        "plain tensor of integers, got torch.float32",
    ),
}


@pytest.mark.parametrize("mistake", CLASSIFIER_MISTAKES)
def test_wrong_classifier_files_are_named(mistake: str, tmp_path: Path) -> None:
    change, words = CLASSIFIER_MISTAKES[mistake]
    state = originals.tree_state()
    change(state)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(WeightsError, match=words) as caught:
        imported(CLASSIFIER, tmp_path / "state.pt")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists()


PARSER_MISTAKES: dict[str, tuple[Change, str]] = {
    "nineteen classes": (
        lambda state: state.update({"model.classifier.4.weight": torch.zeros(19, 6, 1, 1)}),
        r"classifier\.4\.weight .* must be of the 9 classes background, mouth, .* got 19",
    ),
    "auxiliary head": (
        lambda state: state.update({"model.aux_classifier.4.bias": torch.zeros(9)}),
        r"nothing but MaskFaceGAN's face parser, got model\.aux_classifier\.4\.bias",
    ),
    "a block missing": (
        lambda state: [state.pop(key) for key in list(state) if key.startswith("model.backbone.layer3.5.")],
        "ResNet of depth 50 or 101, got 5 blocks",
    ),
    "a tensor missing": (
        lambda state: state.pop("model.classifier.0.project.0.weight"),
        r"must hold model\.classifier\.0\.project\.0\.weight, got none",
    ),
    "another network": (
        lambda state: [state.pop(key) for key in list(state) if key.startswith("model.classifier")],
        r"must hold model\.classifier\.4\.weight, got none",
    ),
}


@pytest.mark.parametrize("mistake", PARSER_MISTAKES)
def test_wrong_parser_files_are_named(mistake: str, tmp_path: Path) -> None:
    change, words = PARSER_MISTAKES[mistake]
    state = originals.parser_state(group=4, head=2)
    change(state)
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(WeightsError, match=words) as caught:
        imported(PARSER, tmp_path / "state.pt")
    assert "\n" not in str(caught.value)


def test_a_hostile_file_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self):
            return eval, ("1/0",)

    for is_zip in (True, False):
        state = {**originals.tree_state(), "extra": Hostile()}
        torch.save(state, tmp_path / "state.pt", _use_new_zipfile_serialization=is_zip)
        with pytest.raises(WeightsError, match=r"got eval; nothing of it was run"):
            imported(CLASSIFIER, tmp_path / "state.pt")


def test_a_part_is_refused(tmp_path: Path) -> None:
    torch.save(originals.tree_state(), tmp_path / "state.pt")
    with pytest.raises(UnknownNameError, match="part must be left out for maskfacegan-classifier, got 'ema'"):
        imported(CLASSIFIER, tmp_path / "state.pt", part="ema")


def test_import_command(run: Run, tmp_path: Path) -> None:
    torch.save(originals.tree_state(), tmp_path / "state.pt")
    out = tmp_path / "classifier.safetensors"
    outcome = run("weights", "import", CLASSIFIER, tmp_path / "state.pt", "-o", out, "--licence", "MIT")
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{out}: attribute-tree, 64 px, from MaskFaceGAN's attribute classifier\n"
    shown = run("weights", "show", out, "--json").json()
    assert shown["licence"] == "MIT"
    assert shown["attributes"] == list(CLASSIFIER_ORDER)
    run("weights", "import", "maskfacegan-clasifier", tmp_path / "state.pt", "-o", out).refused(2, CLASSIFIER)
