# SPDX-License-Identifier: Apache-2.0
"""The tasks of MaskFaceGAN's classifiers and parsers at a size that trains in seconds."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from faceedit import training
from faceedit.alignment import align_ffhq
from faceedit.attributes import MASKFACEGAN_GLOBAL, MASKFACEGAN_LOCAL
from faceedit.config import to_dict
from faceedit.errors import UsageError
from faceedit.labels import CELEBAMASK_HQ, MASKFACEGAN, convert_labels
from faceedit.networks import network_kind
from faceedit.registry import MAX_FILE_BYTES, load_network, save_weights
from faceedit.training import cache
from faceedit.training.checkpoint import load_checkpoint
from faceedit.training.config import to_yaml
from faceedit.training.synthetic import render
from faceedit.training.synthetic.geometry import face_points
from faceedit.training.task import TrainingContext, task_class
from faceedit.training.trainer import make_fabric, seed_step

CLASSIFIER, PARSER = "maskfacegan-classifier-starter", "maskfacegan-parser-starter"
TRAINER = (
    "trainer={steps: 4, accelerator: cpu, precision: 32-true, progress_by: steps, cpu_threads: 1, log_every: 1,"
    " checkpoint_every: 2, keep_checkpoints: 9, sample_every: 0, validate_every: 0}"
)
NAMES = "[Blond_Hair, Smiling, Big_Nose]"


def quiet(line: str) -> None:
    """A report that keeps test output readable."""


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tiny_classifier(cache_dir: Path, *more: str) -> Any:
    return training.resolve(
        CLASSIFIER,
        [
            TRAINER,
            f"network={{size_px: 32, width: 8, hidden_width: 8, attributes: {NAMES}}}",
            f"synthetic={{size_px: 40, people: 20, variants: 2, tinted_share: 0.5, attributes: {NAMES}}}",
            f"synthetic.cache_dir={cache_dir}",
            "adam={rate: 0.003, warmup_steps: 0}",
            *("batch_size=9", "validation_people=8"),
            *more,
        ],
    )


def tiny_parser(cache_dir: Path, *more: str) -> Any:
    narrow = "network={size_px: 64, width: 0.25, head_width: 8, rates: [2, 4]}"
    data = ("render_px=80", "people=8", "test_people=5", "batch=4", f"cache_dir={cache_dir}")
    return training.resolve(PARSER, [TRAINER, narrow, *data, *more])


def build(recipe: Any) -> Any:
    task_type = task_class(recipe.task)
    task_type.prepare(recipe, report=quiet)
    seed_step(recipe.trainer, -1, 0)
    return task_type(recipe, TrainingContext(make_fabric(recipe.trainer), recipe.trainer))


def run(recipe: Any, directory: Path, **options: Any) -> Any:
    path = directory.with_suffix(".yaml")
    path.write_text(to_yaml(recipe))
    return training.run(path, output_dir=directory, report=quiet, **options)


# Whole runs


@pytest.mark.parametrize("make", [tiny_classifier, tiny_parser])
def test_a_run_resumes_to_the_same_bits_and_exports_what_loads(make: Any, cache_dir: Path, tmp_path: Path) -> None:
    recipe = make(cache_dir)
    whole = run(recipe, tmp_path / "whole")
    middle = tmp_path / "whole" / "checkpoints" / "step_00000002.pt"
    resumed = run(recipe, tmp_path / "resumed", resume=middle)
    one, other = (load_checkpoint(result.checkpoint)["context"]["networks"] for result in (whole, resumed))
    for name, tensors in one.items():
        assert all(torch.equal(value, other[name][key]) for key, value in tensors.items()), name
    assert resumed.metrics == whole.metrics
    network: Any = load_network(whole.weights, kind=task_class(recipe.task).kind)
    assert network.config == recipe.network
    assert network.header.recipe == recipe.description
    for name, value in whole.metrics.items():
        assert 0 <= value <= 1, name
        assert network.header.metrics[name] == pytest.approx(value)
    if make is tiny_classifier:
        assert network.header.attributes == ("Blond_Hair", "Smiling", "Big_Nose")
        assert {"accuracy", "accuracy_Big_Nose", "flip"} <= whole.metrics.keys()
    else:
        assert network.header.label_scheme == MASKFACEGAN.name
        assert {"mean_iou", "iou_eyes", "iou_belowface"} <= whole.metrics.keys()
    assert list((tmp_path / "whole" / "samples").glob("*.png"))
    task = build(make(cache_dir, f"initial_weights={whole.weights}"))
    (started,) = task.context.networks.values()
    assert all(torch.equal(value, network.state_dict()[key]) for key, value in started.state_dict().items())


@pytest.mark.parametrize(
    ("make", "task", "network"),
    [
        (tiny_classifier, "attribute-cnn", "{backbone: vgg16, width: 0.0625}"),
        (tiny_parser, "fcn", "{backbone: resnet50, width: 0.0625, size_px: 32}"),
        (tiny_parser, "region-unet", "{size_px: 64, widths: [4, 4, 8, 8, 8], blocks: [1, 1, 1, 1, 1]}"),
    ],
)
def test_alternatives_train_by_the_same_recipe(
    make: Any, task: str, network: str, cache_dir: Path, tmp_path: Path
) -> None:
    """As docs/training.md says: a copy of the recipe with another task and another network."""
    recipe = make(cache_dir)
    values = to_dict(recipe) | {"task": task, "network": yaml.safe_load(network)}
    if make is tiny_classifier:
        values["network"] |= {"attributes": list(recipe.network.attributes), "size_px": 32}
    path = tmp_path / "alternative.yaml"
    path.write_text(yaml.safe_dump(values))
    result = training.run(path, ["trainer.steps=1"], output_dir=tmp_path / "run", report=quiet)
    assert result is not None
    loaded: Any = load_network(result.weights or "")
    assert loaded.header.kind == task_class(task).kind  # type: ignore[attr-defined]
    image = torch.zeros(1, 3, 48, 48)
    assert loaded(image).shape == ((1, 3) if make is tiny_classifier else (1, 9, 48, 48))


# The shipped recipes


def test_starter_recipes_fit_what_ships(tmp_path: Path) -> None:
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "tests"}
    for name in (CLASSIFIER, PARSER):
        recipe: Any = training.resolve(name)
        kind = task_class(recipe.task).kind  # type: ignore[attr-defined]
        network = network_kind(kind).classes()[1](recipe.network)
        path = tmp_path / f"{name}.safetensors"
        save_weights(path, kind, recipe.network, network.state_dict(), **facts)
        assert path.stat().st_size < MAX_FILE_BYTES
        lines: list[str] = []
        assert training.run(name, dry_run=True, report=lines.append) is None
        assert f"task: {recipe.task}" in lines[0]
    classifier: Any = training.resolve(CLASSIFIER)
    assert classifier.network.attributes == MASKFACEGAN_LOCAL + MASKFACEGAN_GLOBAL
    assert classifier.synthetic.attributes == classifier.network.attributes
    assert classifier.synthetic.size_px == 1.25 * classifier.network.size_px
    parser: Any = training.resolve(PARSER)
    assert parser.network.label_scheme == MASKFACEGAN.name
    assert parser.render_px == 1.25 * parser.network.size_px


@pytest.mark.parametrize(
    ("make", "override", "words"),
    [
        (tiny_classifier, "warp_strength=-1", "warp_strength must be not negative"),
        (tiny_classifier, "batch_size=0", "batch_size must be positive"),
        (tiny_classifier, "batch_size=1", "batch_size must be above 1"),
        (tiny_classifier, "network.attributes=[Attractive]", "ones that synthetic portraits show"),
        (tiny_classifier, "network.attributes=[Smilling]", "did you mean Smiling"),
        (tiny_classifier, "network.size_px=40", "size_px must be a multiple of 32"),
        (tiny_parser, "batch=1", "batch must be above 1"),
        (tiny_parser, "render_px=8", "render_px must be at least 16"),
        (tiny_parser, "overlap=-1", "overlap must be not negative"),
        (tiny_parser, "people=0", "people must be positive"),
        (tiny_parser, "network.label_scheme=maskfacgan", "did you mean maskfacegan"),
        (tiny_parser, "network.backbone=resnet18", "must be one of 'resnet50'"),
    ],
)
def test_wrong_values_are_refused(make: Any, override: str, words: str, cache_dir: Path) -> None:
    with pytest.raises(UsageError, match=words):
        make(cache_dir, override)


@pytest.mark.parametrize(("backbone", "is_refused"), [("resnet34", True), ("vgg16", False)])
def test_one_image_is_no_batch_for_normalisation(backbone: str, is_refused: bool, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("task: attribute-cnn\ntrainer: {steps: 1}\nbatch_size: 1\nsynthetic: {variants: 0}\n")
    changes = [f"network={{backbone: {backbone}, attributes: {NAMES}}}"]
    with pytest.raises(UsageError, match="batch_size must be above 1") if is_refused else nullcontext():
        training.resolve(path, changes)


# What a batch shows


def test_the_tree_learns_a_batch_and_not_the_colours_of_tinted_people(cache_dir: Path) -> None:
    task = build(tiny_classifier(cache_dir))
    batch = task.batch(0)
    assert batch["image"].shape == (9, 3, 32, 32)
    assert torch.equal(batch["image"], task.batch(0)["image"])
    assert not torch.equal(batch["image"], task.batch(1)["image"])
    tinted = batch["weight"][:, 0] == 0
    assert 0 < tinted.sum() < 9
    assert (batch["weight"][:, 1:] > 0).all()
    losses = [task.training_step(batch, step)["loss"].item() for step in range(60)]
    assert losses[-1] < 0.5 * losses[0]


def test_rare_attributes_count_as_much_as_common_ones(cache_dir: Path) -> None:
    task = build(tiny_classifier(cache_dir))
    everyone = torch.from_numpy(task.data.attributes[..., task.columns]).float().flatten(0, 1)
    weight = task.attribute_weight(everyone)
    present, absent = (weight * everyone).sum(0), (weight * (1 - everyone)).sum(0)
    assert (everyone.mean(0) > 0.05).all()
    torch.testing.assert_close(present, absent)
    task.share = torch.full((3,), 0.05)
    assert task.attribute_weight(torch.ones(1, 3)).max() == pytest.approx(10)


def test_pictures_keep_their_colour(cache_dir: Path) -> None:
    task = build(replace(tiny_classifier(cache_dir), batch_size=60))
    image = task.batch(0)["image"]
    saturation = (image.amax(1) - image.amin(1)).mean((1, 2))
    assert saturation.min() > 0.05


def test_validation_shows_the_face_where_ffhq_puts_it(cache_dir: Path) -> None:
    """Eyes and mouth of all people lie where the runtime's FFHQ alignment takes them."""
    parser, classifier = build(tiny_parser(cache_dir)), build(tiny_classifier(cache_dir))
    image, labels = parser.test_batch([0, 1, 2, 3, 4])
    assert image.shape == (5, 3, 64, 64)
    assert labels.min() >= 0
    assert labels.max() <= 8
    points = face_points(parser.test.people, 80).numpy()
    for row in range(5):
        eyes = (labels[row] == MASKFACEGAN.id("eyes")).nonzero().float().mean(0).flip(0).numpy()
        assert np.isfinite(eyes).all()
        expected = align_ffhq(points[row], (80, 80), 64).to_crop(points[row, :2]).mean(0)
        np.testing.assert_allclose(eyes, expected, atol=2.5)
    pixels = cache.unpack_image(classifier.validation.images[:, 0])
    assert classifier.plain_look(pixels, np.arange(8)).shape == (8, 3, 32, 32)


def test_labels_become_the_schemes(cache_dir: Path) -> None:
    task = build(tiny_parser(cache_dir))
    image, labels = task.people.read([0, 3])
    truth = render(task.people.people.select(torch.tensor([0, 3])), 80).labels
    assert torch.equal(labels, truth)
    assert set(convert_labels(labels, CELEBAMASK_HQ, MASKFACEGAN).unique().tolist()) <= set(range(9))
    batch = task.batch(0)
    assert batch["image"].shape == (4, 3, 64, 64)
    shown = set(batch["labels"].unique().tolist())
    assert {MASKFACEGAN.id(name) for name in ("hair", "skin", "nose", "eyes", "mouth")} <= shown <= set(range(9))
    assert image.shape == (2, 3, 80, 80)


def test_the_parser_learns_a_batch(cache_dir: Path) -> None:
    task = build(tiny_parser(cache_dir, "optimizer={rate: 0.01, warmup_steps: 0}"))
    batch = task.batch(0)
    losses = [task.training_step(batch, step)["loss"].item() for step in range(30)]
    assert losses[-1] < 0.7 * losses[0]
