# SPDX-License-Identifier: Apache-2.0
"""The encoder task on a tiny generator: it learns known styles, follows its schedule and exports what loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.stylegan2_tiny import tiny_generator

from faceedit import training
from faceedit.errors import OutOfRangeError, UsageError
from faceedit.networks.e4e import E4EEncoder
from faceedit.registry import load_network, save_weights
from faceedit.training.config import to_yaml
from faceedit.training.e4e import E4ETask, ProgressiveConfig
from faceedit.training.task import TrainingContext
from faceedit.training.trainer import make_fabric, seed_step


def quiet(line: str) -> None:
    """A report that keeps test output readable."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the weights of an untrained generator of 32 px and the cache of its images."""
    path = tmp_path_factory.mktemp("e4e")
    torch.manual_seed(0)
    generator = tiny_generator(32)
    generator.mapping.average.copy_(generator.mapping.estimate_average(1000))
    about = {"licence": "Apache-2.0", "training_data": "none", "source": "test"}
    save_weights(path / "tiny.safetensors", "stylegan2", generator.config, generator.state_dict(), half=False, **about)
    return path


def tiny(folder: Path, *more: str) -> Any:
    overrides = [
        "trainer={steps: 4, accelerator: cpu, max_minutes: null, progress_by: steps, precision: 32-true}",
        "trainer={cpu_threads: 1, log_every: 2, checkpoint_every: 0, sample_every: 0, validate_every: 0}",
        f"generator={folder / 'tiny.safetensors'}",
        # Of a base width of 4, torch 2.14.1's weight gradients write past their end on a processor with AVX2 alone.
        "network={size_px: 32, num_ws: 8, w_width: 8, base_width: 8, blocks: [1, 1, 1, 1], head_width: 16}",
        f"images={{size_px: 32, people: 8, seed_offset: 0, cache_dir: {folder}}}",
        "batch={made: 6, faces: 2}",
        "progressive={start: 1, every: 2}",
        "adam={rate: 0.003, beta1: 0.9, warmup_steps: 0}",
        "validation_images=16",
    ]
    return training.resolve("e4e-starter", [*overrides, *more])


def build(recipe: Any) -> Any:
    E4ETask.prepare(recipe, report=quiet)
    seed_step(recipe.trainer, -1, 0)
    return E4ETask(recipe, TrainingContext(make_fabric(recipe.trainer), recipe.trainer))


def test_training_learns_styles_of_unseen_images(folder: Path) -> None:
    task = build(tiny(folder, "trainer.ema_decay=0.9", "progressive={start: 0, every: 1}", "losses.image=0"))
    for step in range(120):
        assert "image" not in task.training_step(task.batch(step), step)
        task.context.update_averages()
    assert task.validate()["latent"] < 0.7  # of the average w's error


def test_training_lowers_the_distance_of_reconstructions(folder: Path) -> None:
    task = build(tiny(folder, "losses={latent: 0, delta: 0}", "batch={made: 1, faces: 1}", "progressive.start=0"))
    batch = task.batch(0)
    distances = [task.training_step(batch, 99)["image"].item() for _ in range(20)]
    assert distances[-1] < 0.9 * distances[0]


def test_terms_are_what_they_say(folder: Path) -> None:
    task = build(tiny(folder, "batch.truncation=1.0"))
    batch = task.batch(0)
    seen: list[float] = []
    task.context.minimise = lambda name, loss: seen.append(loss.item())
    scalars = task.training_step(batch, 3)
    encoder = task.context.networks["encoder"]
    with torch.no_grad():
        wanted = task.synthesiser.mapping(batch["z"])
        image = torch.cat([task.synthesiser.synthesis(wanted), batch["face"]])
        ws = encoder(image, 2)  # step 3: two layers have differences
        latent = (ws[:6] - wanted).square().mean() / task.variance
        delta = sum((ws[:, i] - ws[:, 0]).square().sum(1).mean() for i in range(8))
    assert scalars["latent"].item() == pytest.approx(latent.item(), rel=1e-4)
    # All layers have the same average w here, so that differences are the heads' alone.
    assert scalars["delta"].item() == pytest.approx(delta.item(), rel=1e-4)
    weighted = scalars["latent"] + scalars["image"] + 2e-4 * scalars["delta"]
    assert seen[0] == pytest.approx(weighted.item(), rel=1e-5)


def test_layers_come_in_one_by_one() -> None:
    progressive = ProgressiveConfig(start=10, every=5)
    assert [progressive.stage_at(step, 4) for step in (0, 9, 10, 14, 15, 20, 1000)] == [0, 0, 1, 1, 2, 3, 3]


def test_heads_that_wait_say_nothing(folder: Path, tmp_path: Path) -> None:
    """Neither in validation nor in what a run that ended early exports: their weights are chance's."""
    task = build(tiny(folder, "progressive={start: 100, every: 2}"))
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    batch = task.context.to_device(task.batch(0))
    task.training_step(batch, 0)
    ws = task._encode(image)
    assert torch.equal(ws, ws[:, :1].expand_as(ws))
    task.export(tmp_path / "w.safetensors", {})
    encoder: Any = load_network(tmp_path / "w.safetensors")
    alone = encoder(image)
    torch.testing.assert_close(alone, alone[:, :1].expand_as(alone))
    task.training_step(batch, 1000)
    ws = task._encode(image)
    assert not torch.allclose(ws, ws[:, :1].expand_as(ws))


def test_run_exports_what_loads(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(tiny(folder)))
    result = training.run(path, output_dir=tmp_path / "run", report=quiet)
    assert result is not None
    assert result.metrics.keys() == {"latent", "psnr_db"}
    encoder: Any = load_network(result.weights or "")
    assert isinstance(encoder, E4EEncoder)
    assert encoder.header.training_data == "images of tiny; 8 synthetic portraits in FFHQ's framing"
    generator: Any = load_network(folder / "tiny.safetensors")
    torch.testing.assert_close(encoder.average, generator.mapping.average.expand(8, -1), atol=1e-3, rtol=1e-3)
    assert generator.synthesis(encoder.encode(torch.zeros(1, 3, 64, 64))).shape == (1, 3, 32, 32)


def test_an_encoder_of_another_generator_is_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"network\.num_ws must be the generator's 8, got 12"):
        E4ETask.prepare(tiny(folder, "network.num_ws=12"), report=quiet)
    with pytest.raises(UsageError, match=r"images\.size_px must be the generator's 32, got 16"):
        E4ETask.prepare(tiny(folder, "images.size_px=16"), report=quiet)
    with pytest.raises(OutOfRangeError, match=r"network\.size_px must be at most the generator's 32"):
        E4ETask.prepare(tiny(folder, "network.size_px=64"), report=quiet)


def test_a_run_resumed_at_its_end_exports_the_same(folder: Path, tmp_path: Path) -> None:
    """Heads that had no turn stay silent, and the step keeps one line of scores."""
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(to_yaml(tiny(folder)))
    ends = []
    for resume in (None, run):
        result = training.run(path, output_dir=run, resume=resume, report=quiet)
        assert result is not None
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        ends.append(
            (result.metrics, load_file(result.weights or ""), [(line["step"], line["split"]) for line in lines])
        )
    (metrics, weights, lines), (again, same, kept) = ends
    assert again == metrics
    assert all(torch.equal(value, same[name]) for name, value in weights.items())
    assert kept == lines == [(2, "train"), (4, "train"), (4, "validation")]
