# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole edits: the same weights in both formulations, rows that fail, files that killed runs leave."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.command_line import Run
from torch import Tensor

from faceedit.cli import bench
from faceedit.labels import MASKFACEGAN
from faceedit.maskfacegan import benchmarking
from faceedit.maskfacegan.benchmark_networks import IMAGE_DEVIATION, SIZES, BenchmarkNetworks, PublicGenerator, build
from faceedit.maskfacegan.benchmarking import (
    DEFAULT,
    FORMULATIONS,
    FULL_STEPS,
    LEAST_STEPS,
    PUBLIC,
    REFERENCE,
    Settings,
    compare,
    measure,
    shortened,
)
from faceedit.maskfacegan.optimizer import optimize
from faceedit.maskfacegan.outcome import Progress
from faceedit.maskfacegan.plan import make_plan
from faceedit.networks.stylegan2 import StyleGAN2Config, StyleGAN2Generator

CPU = torch.device("cpu")
TINY = Settings(16, (1,), ("Smiling",), steps=6, public_steps=6)


@pytest.fixture(scope="module")
def networks() -> BenchmarkNetworks:
    return build(16, 2, 0, CPU)


@pytest.fixture(autouse=True)
def few_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean of w over 50 latents, not 50,000."""
    monkeypatch.setattr(benchmarking, "DEFAULT", replace(DEFAULT, mean_samples=50))


# The networks


def test_the_published_sizes_are_published() -> None:
    with torch.device("meta"):
        generator = StyleGAN2Generator(SIZES[1024].generator)
    assert sum(p.numel() for p in generator.parameters()) == 30_370_060  # as released
    assert (SIZES[1024].parser.backbone, SIZES[1024].parser.size_px) == ("resnet50", 512)
    assert (SIZES[1024].classifier.width, SIZES[1024].classifier.size_px) == (64, 224)
    assert [SIZES[256].generator.width(level) for level in range(7)] == [512] * 4 + [256, 128, 64]


@pytest.mark.parametrize("has_noise", [False, True])
def test_both_formulations_make_the_same_images_and_gradients(networks: BenchmarkNetworks, has_noise: bool) -> None:
    ours, public = networks.ours.generator, networks.public.generator
    config = ours.config
    draw = torch.Generator().manual_seed(3)
    ws = torch.randn(2, config.num_ws, config.w_width, generator=draw).requires_grad_()
    maps = [torch.randn(2, 1, px, px, generator=draw).requires_grad_() for px in config.noise_px]
    wanted = [ws, *maps] if has_noise else [ws]
    weights = torch.rand(2, 3, 16, 16, generator=draw)
    answers = []
    for generator in (ours, public):
        image = generator.synthesis(ws, noise=maps if has_noise else "zero")
        answers.append([image, *torch.autograd.grad((image * weights).sum(), wanted)])
    for one, other in zip(*answers, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # fp32, sums in another order


def test_every_style_reaches_its_own_layers() -> None:
    generator = StyleGAN2Generator(StyleGAN2Config(size_px=32, channel_base=64, channel_max=4, w_width=4, z_width=4))
    assert PublicGenerator(generator)._styles.tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7]


def test_sources_are_images_that_do_not_depend_on_how_many_there_are(networks: BenchmarkNetworks) -> None:
    assert networks.sources.shape == (2, 3, 16, 16)
    assert float(networks.sources.abs().max()) <= 1
    assert float(networks.sources[:1].std()) == pytest.approx(IMAGE_DEVIATION, rel=0.3)  # less what was clamped
    assert torch.equal(build(16, 1, 0, CPU).sources, networks.sources[:1])
    assert not torch.equal(build(16, 1, 1, CPU).sources, networks.sources[:1])


def test_a_parse_has_every_region_and_follows_the_image(networks: BenchmarkNetworks) -> None:
    image = networks.sources[:1].clone().requires_grad_()
    parsed = networks.ours.parser(image)
    drawn = parsed.argmax(1).unique().tolist()
    assert drawn == list(range(MASKFACEGAN.num_classes))
    (gradient,) = torch.autograd.grad(parsed[0, MASKFACEGAN.id("mouth")].sum(), image)
    assert float(gradient.abs().max()) > 0
    # Folding batch normalisation and another memory format are rounding; they multiply weights beforehand.
    torch.testing.assert_close(parsed, networks.public.parser(image), rtol=1e-3, atol=1e-4)


def test_the_first_losses_of_both_formulations_are_equal(networks: BenchmarkNetworks) -> None:
    config = shortened(8)
    plans = [make_plan({"Wavy_Hair": 1})] * 2

    def first_losses(chosen: Any) -> dict[str, Tensor]:
        seen: list[Progress] = []
        optimize(chosen, networks.sources, plans, config, observe=seen.append, every=1)
        latent = [progress for progress in seen if progress.stage == "latent"]
        constrained = next(progress for progress in latent if "semantics" in progress.losses)
        return {"first": latent[0].losses["appearance"], **constrained.losses}

    ours, public = first_losses(networks.ours), first_losses(networks.public)
    assert set(ours) == {"first", "appearance", "semantics", "shape"}
    torch.testing.assert_close(ours["first"], public["first"], rtol=1e-4, atol=0)
    for term in ours:  # two steps of Adam later
        torch.testing.assert_close(ours[term], public[term], rtol=1e-2, atol=0)


# The schedule


def test_the_whole_schedule_is_the_default_one() -> None:
    assert shortened(FULL_STEPS) == benchmarking.DEFAULT


def test_shorter_schedules_keep_their_proportions() -> None:
    short = shortened(150)
    assert (short.latent_steps, short.noise_steps) == (100, 50)
    assert (short.semantic_start, short.dynamic_stop, short.noise_start, short.encoder_start) == (49, 69, 69, 29)
    least = shortened(LEAST_STEPS)
    assert least.latent_steps + least.noise_steps == LEAST_STEPS
    assert least.semantic_start < least.latent_steps
    assert least.noise_steps > 0


# Rows


def test_rows_are_whole_edits() -> None:
    settings = replace(TINY, batches=(1, 2), rows=("bf16-graph", REFERENCE, PUBLIC))
    records = compare(list(measure(settings, CPU)))
    assert [(r["batch"], r["row"]) for r in records] == [
        (n, row) for n in (1, 2) for row in ("bf16-graph", PUBLIC, REFERENCE)
    ]
    for record in records:
        assert record["status"] == "ok"
        assert not record["graph"]
        assert record["is_extrapolated"]
        assert record["peak_bytes"] is None
        assert set(record["losses"]) == {"appearance", "semantics", "noise"}
        assert all(len(values) == record["batch"] for values in record["losses"].values())
        assert sum(record["stage_seconds"].values()) == pytest.approx(record["seconds"])
        each = record["ms_per_iteration"]
        iterations = 1000 * each["latent"] + 501 * each["noise"]
        rest = record["stage_seconds"]["blend"] + record["stage_seconds"]["other"]
        assert record["seconds_of_full_edit"] == pytest.approx(iterations / 1000 + rest)
        assert "extrapolated" in benchmarking.line(record)
    half, public, reference = records[:3]
    assert reference["deviation"] is None
    assert public["deviation"]["appearance"] < 1e-3
    assert half["ratio_to_public"] == pytest.approx(public["seconds_of_full_edit"] / half["seconds_of_full_edit"])
    assert half["ratio_is_extrapolated"]


def test_losses_are_compared_after_as_many_steps_only() -> None:
    settings = replace(TINY, rows=(PUBLIC, REFERENCE), public_steps=4)
    public, reference = compare(list(measure(settings, CPU)))
    assert (public["steps"], reference["steps"]) == (4, 6)
    assert public["deviation"] is None
    assert reference["ratio_to_public"] is not None


def test_a_full_schedule_is_not_called_extrapolated(monkeypatch: pytest.MonkeyPatch) -> None:
    short = replace(shortened(6), mean_samples=50)
    monkeypatch.setattr(benchmarking, "FULL_STEPS", 6)
    monkeypatch.setattr(benchmarking, "DEFAULT", short)
    (record,) = measure(replace(TINY, rows=(REFERENCE,)), CPU)
    assert not record["is_extrapolated"]
    assert record["seconds_of_full_edit"] == record["seconds"]
    assert "extrapolated" not in benchmarking.line(record)


def failing_in(precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(networks: Any, source: Tensor, plans: Any, config: Any, **options: Any) -> Any:
        if config.precision == precision:
            raise RuntimeError("out of\nmemory")
        return optimize(networks, source, plans, config, **options)

    monkeypatch.setattr(benchmarking, "optimize", broken)


def test_a_row_that_fails_says_why_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    failing_in("bfloat16", monkeypatch)
    records = compare(list(measure(replace(TINY, rows=("bf16-graph", REFERENCE)), CPU)))
    assert [record["status"] for record in records] == ["failed", "ok"]
    assert records[0]["reason"] == "RuntimeError: out of memory"
    assert records[0]["deviation"] is None
    assert "FAILED: RuntimeError: out of memory" in benchmarking.line(records[0])


def test_an_edit_whose_numbers_break_is_a_row_that_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmarking, "DEFAULT", replace(benchmarking.DEFAULT, latent_rate=1e30))
    (record,) = measure(replace(TINY, rows=(REFERENCE,)), CPU)
    assert record["status"] == "failed"
    assert "finite" in record["reason"]


# The command


ARGUMENTS = ("bench", "maskfacegan", "--size", 16, "--device", "cpu", "--steps", 6, "--public-steps", 6)


def test_the_file_is_there_after_every_row(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing_in("bfloat16", monkeypatch)
    written: list[Any] = []
    write_text = bench.write_text

    def watched(path: Path, text: str) -> None:
        write_text(path, text)
        written.append(json.loads(path.read_text()))

    monkeypatch.setattr(bench, "write_text", watched)
    outcome = run(*ARGUMENTS, "--batch", 1, "--attribute", "Smiling", "--json", tmp_path / "edits.json")
    assert outcome.code == 1
    assert "1 of 4 rows failed" in outcome.err
    assert [len(document["rows"]) for document in written] == [1, 2, 3, 4, 4]
    assert [document["complete"] for document in written] == [False] * 4 + [True]
    assert [row["row"] for row in written[-1]["rows"]] == list(FORMULATIONS)
    assert written[-1]["settings"]["public_steps"] == 6
    assert "no CUDA device" in outcome.out
    assert "(extrapolated)" in outcome.out


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--size", 100, "1024, 256, 16"),
        ("--attribute", "Male", "--attribute"),
        ("--row", "bf16", "bf16-graph"),
        ("--steps", FULL_STEPS + 1, "at most 1501"),
    ],
)
def test_what_cannot_be_measured_is_refused_first(run: Run, option: str, value: object, words: str) -> None:
    run(*ARGUMENTS, option, value).refused(2, words)
