# SPDX-License-Identifier: Apache-2.0
"""The StyleGAN2 task at 16 px: its terms against formulas, its schedule, exact resumption and what it exports."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.stylegan2_tiny import tiny_generator

from faceedit import training
from faceedit.errors import OutOfRangeError, UsageError, WeightsError
from faceedit.networks.stylegan2 import (
    StyleGAN2Discriminator,
    StyleGAN2DiscriminatorConfig,
    StyleGAN2Generator,
    mix_styles,
)
from faceedit.registry import MAX_FILE_BYTES, load_network
from faceedit.training import losses
from faceedit.training.checkpoint import load_checkpoint
from faceedit.training.config import AdamConfig, to_yaml
from faceedit.training.fid import main as fid_command
from faceedit.training.stylegan2 import StyleGAN2Task, TrainedGenerator, Unrounded, lazy_adam
from faceedit.training.task import TrainingContext
from faceedit.training.trainer import make_fabric, seed_step

FID = "fid_attribute-classifier-starter"


def quiet(line: str) -> None:
    """A report that keeps test output readable."""


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def tiny(cache_dir: Path, *more: str) -> Any:
    overrides = [
        "trainer={steps: 6, accelerator: cpu, max_minutes: null, precision: 32-true, cpu_threads: 1, log_every: 2}",
        "trainer={checkpoint_every: 0, sample_every: 0, validate_every: 0}",
        "generator={size_px: 16, channel_base: 128, channel_max: 16, z_width: 8, w_width: 8, mapping_layers: 2}",
        "critic={size_px: 16, channel_base: 128, channel_max: 16, group_size: 2}",
        f"images={{size_px: 16, people: 32, seed_offset: 0, cache_dir: {cache_dir}}}",
        "batch_size=4",
        "mixed_from_px=8",
        "r1={gamma: 3.0, every: 2}",
        "path_length={weight: 2.0, every: 3, batch_share: 0.5}",
        "augmentation={start: 0.5, every: 2, kimg: 0.1}",
        "fid={images: 16, network: attribute-classifier-starter}",
    ]
    return training.resolve("stylegan2-starter", [*overrides, *more])


def build(recipe: Any) -> Any:
    StyleGAN2Task.prepare(recipe, report=quiet)
    seed_step(recipe.trainer, -1, 0)
    return StyleGAN2Task(recipe, TrainingContext(make_fabric(recipe.trainer), recipe.trainer))


def test_r1_of_the_discriminator_matches_finite_differences() -> None:
    torch.manual_seed(0)
    config = StyleGAN2DiscriminatorConfig(size_px=8, channel_base=32, channel_max=4, group_size=1)
    critic = StyleGAN2Discriminator(config).double()
    image = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    _, slopes = losses.squared_slopes(critic, image)
    total, step = 0.0, 1e-6
    with torch.no_grad():
        for place in range(image.numel()):
            nudge = torch.zeros(image.numel(), dtype=torch.float64).index_fill_(0, torch.tensor(place), step)
            nudge = nudge.view_as(image)
            total += ((critic(image + nudge) - critic(image - nudge)).item() / (2 * step)) ** 2
    assert slopes.item() == pytest.approx(total, rel=1e-5)


def test_path_lengths_of_the_generator_match_finite_differences() -> None:
    torch.manual_seed(1)
    network = tiny_generator(8).double()
    ws = network.mapping(torch.randn(1, 8, dtype=torch.float64))
    direction = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    lengths = losses.path_lengths(network.synthesis(ws), ws, direction)
    squares, step = 0.0, 1e-5
    with torch.no_grad():
        for place in range(ws.numel()):
            nudge = torch.zeros(ws.numel(), dtype=torch.float64).index_fill_(0, torch.tensor(place), step).view_as(ws)
            difference = network.synthesis(ws + nudge) - network.synthesis(ws - nudge)
            squares += ((difference * direction).sum().item() / 8 / (2 * step)) ** 2
    assert lengths.item() == pytest.approx((squares / ws.shape[1]) ** 0.5, rel=1e-5)


def test_styles_are_mixed_where_the_crossover_says() -> None:
    torch.manual_seed(2)
    trained = TrainedGenerator(tiny_generator(16).config)  # the strength of noise starts at 0
    network = trained.network
    z, other = torch.randn(3, 8), torch.randn(3, 8)
    made = trained(Unrounded(z, other, torch.tensor([2, 6, 5])))
    for row, crossover in enumerate((2, 6, 5)):
        ws = mix_styles(network.mapping(z[row : row + 1]), network.mapping(other[row : row + 1]), crossover)
        torch.testing.assert_close(made[row : row + 1], network.synthesis(ws), atol=1e-5, rtol=1e-5)


def test_share_of_mixed_images_follows_the_recipe(cache_dir: Path) -> None:
    task = build(tiny(cache_dir, "style_mixing=0.75"))
    _, _, crossover = task._latents("latents", 0, 4000).tensors
    layers = task.recipe.generator.num_ws
    assert crossover.min() == 1
    assert crossover.max() == layers
    assert (crossover < layers).float().mean().item() == pytest.approx(0.75, abs=0.025)


def test_lazy_terms_weigh_what_they_skip_and_run_on_their_schedule(cache_dir: Path) -> None:
    task = build(tiny(cache_dir))
    seen: list[tuple[str, float]] = []
    plain = task.context.minimise
    task.context.minimise = lambda name, loss: (seen.append((name, loss.item())), plain(name, loss))
    scalars = [task.training_step(task.batch(step), step) for step in range(4)]
    assert ["r1" in values for values in scalars] == [True, False, True, False]
    assert ["path_penalty" in values for values in scalars] == [True, False, False, True]
    updates = ["generator", "generator", "critic", "critic"]
    assert [name for name, _ in seen[:6]] == [*updates, "generator", "critic"]
    assert seen[1][1] == pytest.approx(2.0 * 3 * scalars[0]["path_penalty"].item())  # weight · every
    assert seen[3][1] == pytest.approx(3.0 / 2 * 2 * scalars[0]["r1"].item())  # γ/2 · every


def test_path_penalty_measures_from_the_running_mean(cache_dir: Path) -> None:
    task = build(tiny(cache_dir, "path_length={decay: 0.25, batch_share: 0.25}"))
    first = task._regularise_generator(0)
    # One image, and a mean that has moved a quarter of the way from 0: (l − l/4)².
    assert first["path_penalty"].item() == pytest.approx((0.75 * first["path_length"].item()) ** 2, rel=1e-5)
    assert task.bare_generator.mean_length.item() == pytest.approx(0.25 * first["path_length"].item())


def test_adam_is_corrected_for_lazy_steps() -> None:
    adam = lazy_adam(AdamConfig(rate=0.002, beta1=0.5, beta2=0.99), 4)
    assert adam.rate == pytest.approx(0.0016)
    assert adam.beta1**5 == pytest.approx(0.5**4)
    assert adam.beta2**5 == pytest.approx(0.99**4)
    assert lazy_adam(AdamConfig(), 0) == AdamConfig()


def test_every_parameter_gets_a_finite_gradient(cache_dir: Path) -> None:
    task = build(tiny(cache_dir))
    sizes: dict[str, dict[str, float]] = {"generator": {}, "critic": {}}
    plain = task.context.minimise

    def minimise(name: str, loss: torch.Tensor) -> None:
        plain(name, loss)
        for key, parameter in task.context.networks[name].named_parameters():
            assert parameter.grad is not None, (name, key)
            assert parameter.grad.isfinite().all(), (name, key)
            sizes[name][key] = max(sizes[name].get(key, 0.0), parameter.grad.abs().max().item())

    task.context.minimise = minimise
    task.training_step(task.batch(0), 0)
    for name, found in sizes.items():
        assert [key for key, size in found.items() if size == 0] == [], name


def test_augmentation_follows_the_critic(cache_dir: Path) -> None:
    task = build(tiny(cache_dir))
    values = []
    for step in range(6):
        scalars = task.training_step(task.batch(step), step)
        values.append((scalars["augmentation"].item(), scalars.get("sign_real")))
    assert [sign is not None for _, sign in values] == [False, True] * 3
    for (before, sign), (after, _) in zip(values[1::2], values[2::2], strict=False):
        expected = before + (0.08 if sign > 0.6 else -0.08)  # 2 steps of 4 images, 100 images from 0 to 1
        assert after == pytest.approx(expected)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_resume_equals_the_uninterrupted_run(cache_dir: Path, tmp_path: Path, precision: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(tiny(cache_dir)))
    # Step 3 falls between two updates of the augmentation: its counts have to survive as well.
    every = [f"trainer.precision={precision}", "trainer.checkpoint_every=3", "trainer.keep_checkpoints=9"]
    whole = training.run(path, every, output_dir=tmp_path / "whole", report=quiet)
    middle = tmp_path / "whole" / "checkpoints" / "step_00000003.pt"
    resumed = training.run(path, every, output_dir=tmp_path / "resumed", resume=middle, report=quiet)
    assert whole is not None
    assert resumed is not None
    one, other = (load_checkpoint(result.checkpoint)["context"] for result in (whole, resumed))
    half_way = load_checkpoint(middle)["context"]["networks"]["critic"]["probability._extra_state"]
    assert half_way["signs"][1] == 4
    _assert_same(one, other)
    assert resumed.metrics == whole.metrics
    assert whole.metrics.keys() == {FID}


def _assert_same(one: Any, other: Any) -> None:
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    elif isinstance(one, dict):
        assert one.keys() == other.keys()
        for key in one:
            _assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        for a, b in zip(one, other, strict=True):
            _assert_same(a, b)
    else:
        assert one == other


def test_run_exports_the_averaged_generator_with_its_average_w(
    cache_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(to_yaml(tiny(cache_dir)))
    result = training.run(path, ["trainer.steps=2"], output_dir=tmp_path / "run", report=quiet)
    assert result is not None
    assert result.weights is not None
    network: Any = load_network(result.weights)
    assert isinstance(network, StyleGAN2Generator)
    assert network.header.recipe == "stylegan2-starter"
    assert network.header.training_data == "32 synthetic portraits in FFHQ's framing"
    assert network.header.metrics == pytest.approx(result.metrics)
    averaged = load_checkpoint(result.checkpoint)["context"]["averages"]["generator"]["weights"]
    torch.testing.assert_close(
        network.synthesis.const, averaged["network.synthesis.const"], atol=2e-3, rtol=1e-3
    )  # stored in fp16
    # To fp16's rounding of the mapping network, through the mean of 50,000 samples.
    assert network.mapping.average.abs().max() > 0
    torch.testing.assert_close(network.mapping.average, network.mapping.estimate_average(), atol=5e-3, rtol=0)
    assert (tmp_path / "run" / "samples" / "step_00000002.png").is_file()
    capsys.readouterr()
    fid_command([str(result.weights), "--recipe", str(path), "--images", "16", "--seed", "1"])
    label, value, counts = re.fullmatch(r"(.*): ([0-9.]+), (.*)\n", capsys.readouterr().out).groups()  # type: ignore
    assert (label, counts) == ("FID (attribute-classifier-starter features)", "16 images against 16")
    assert float(value) == pytest.approx(result.metrics[FID], rel=0.02)  # from weights in fp16


def test_training_brings_colours_to_those_of_the_data(cache_dir: Path) -> None:
    rates = [
        f"{name}_adam={{rate: 0.01, beta1: 0.0, beta2: 0.99, decay_from: 1.0}}" for name in ("generator", "critic")
    ]
    task = build(tiny(cache_dir, "batch_size=8", "augmentation.start=0.0", "average.half_life_kimg=0.02", *rates))
    truth = task.faces.read(range(32)).mean(0)

    def distance() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            made = task.context.best("generator").network(torch.randn(32, 8))
        return (made.mean(0) - truth).abs().mean().item()

    before = distance()
    for step in range(60):
        task.training_step(task.batch(step), step)
        task.context.update_averages()
    assert distance() < 0.6 * before


def test_shipped_recipes_resolve_and_the_starter_fits_the_package() -> None:
    starter: Any = training.resolve("stylegan2-starter")
    with torch.device("meta"):
        network = StyleGAN2Generator(starter.generator)
    assert 2 * sum(value.numel() for value in network.state_dict().values()) < MAX_FILE_BYTES
    full: Any = training.resolve("stylegan2-ffhq-1024")
    assert (full.generator.size_px, full.generator.num_ws, full.generator.width(8)) == (1024, 18, 32)
    assert full.images.folder is not None


def test_recipe_mistakes_are_named(cache_dir: Path) -> None:
    for override, message in (
        ("critic.size_px=32", r"critic\.size_px must be generator\.size_px = 16, got 32"),
        ("images.size_px=32", r"images\.size_px must be generator\.size_px = 16"),
        ("batch_size=5", r"batch_size must be a multiple of critic\.group_size = 2, got 5"),
        ("style_mixing=2", r"style_mixing must be in \[0, 1\]"),
        ("path_length.batch_share=0", r"path_length\.batch_share must be in"),
        ("images.people=0", r"images\.people must be positive"),
        (
            "trainer.precision=bf16-true",
            r"precision must be 32-true or bf16-mixed or 16-mixed in this task, got 'bf16-t",
        ),
        (
            "trainer.precision=64-true",
            r"precision must be 32-true or bf16-mixed or 16-mixed in this task, got '64-true'",
        ),
    ):
        with pytest.raises(OutOfRangeError, match=message):
            tiny(cache_dir, override)
    for override in ("generator.z_width=0", "generator.w_width=-1"):
        with pytest.raises(UsageError, match="z_width and w_width must be positive"):
            tiny(cache_dir, override)


def test_what_validation_would_miss_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    cache = tmp_path / "cache"
    with pytest.raises(WeightsError, match=r"weights must be at .*; put https.*there, or name another network"):
        StyleGAN2Task.prepare(tiny(cache, "fid.network=inception-v3"), report=quiet)
    assert not cache.exists()
    with pytest.raises(OutOfRangeError, match="images must be two or more, as FID needs, got 1"):
        StyleGAN2Task.prepare(tiny(cache, "images.people=1"), report=quiet)
