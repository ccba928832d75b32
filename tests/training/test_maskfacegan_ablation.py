# SPDX-License-Identifier: Apache-2.0
"""Table VI in shape: what each row switches on, and that the whole command runs on networks of the real kinds."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.small_maskfacegan import STEPS, write_bundle
from support.standin_networks import portrait, standins

from faceedit.errors import UsageError
from faceedit.maskfacegan.config import MaskFaceGANConfig
from faceedit.registry import sha256_of
from faceedit.training.fid import FeatureNetwork
from faceedit.training.maskfacegan_ablation import VARIANTS, main, run_ablation, variant_configs

CONFIG = MaskFaceGANConfig(
    latent_steps=60,
    semantic_start=20,
    dynamic_stop=40,
    noise_start=40,
    encoder_start=10,
    latent_rate=0.04,
    mean_samples=0,
    semantic_weight=0.2,
    noise_steps=25,
)


BLOCKS = FeatureNetwork("blocks", 12, lambda image: torch.nn.functional.avg_pool2d(image, 8).flatten(1).cpu())


def test_each_row_adds_one_thing() -> None:
    alone, noise, complete = variant_configs(CONFIG).values()
    assert complete == CONFIG
    assert noise == replace(CONFIG, shape_weight=0.0)
    assert alone == replace(noise, noise_steps=0, noise_start=CONFIG.latent_steps)


def test_rows_come_in_the_papers_order_and_show_what_each_adds(tmp_path: Path) -> None:
    images = torch.cat([portrait(seed) for seed in range(4)])
    report = run_ablation(standins(), images, ["Smiling", "Blond_Hair"], CONFIG, BLOCKS, report=lambda line: None)
    alone, noise, complete = report.rows
    assert tuple(row.variant for row in report.rows) == VARIANTS
    assert noise.skin_psnr_db > alone.skin_psnr_db + 1
    assert complete.hair_iou > noise.hair_iou + 0.05
    assert all(row.edits == 8 and 0 <= row.success <= 1 and math.isfinite(row.fid) for row in report.rows)
    assert {len(fids) for fids in report.fid_by_attribute.values()} == {2}
    report.write(tmp_path)
    written = json.loads((tmp_path / "ablation.json").read_text())
    assert [row["variant"] for row in written["rows"]] == list(VARIANTS)
    table = (tmp_path / "ablation.md").read_text()
    assert all(f"| {variant} | " in table for variant in VARIANTS)


def test_people_without_the_region_are_skipped() -> None:
    images = torch.cat([portrait(seed) for seed in range(3)])
    images[0, 1] = -9  # bald
    config = replace(CONFIG, latent_steps=22, dynamic_stop=21, noise_start=21, noise_steps=1)
    report = run_ablation(standins(), images, ["Blond_Hair"], config, BLOCKS, report=lambda line: None)
    assert (report.skipped, report.rows[0].edits) == (1, 2)
    with pytest.raises(UsageError, match="region in the pictures"):
        run_ablation(standins(), images[:1].repeat(2, 1, 1, 1), ["Blond_Hair"], config, BLOCKS)
    with pytest.raises(UsageError, match="two or more"):
        run_ablation(standins(), images[:1], ["Blond_Hair"], config, BLOCKS)


def test_the_command_writes_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short = STEPS | {"latent_steps": 4, "semantic_start": 2, "dynamic_stop": 3, "noise_start": 3, "noise_steps": 1}
    bundle = write_bundle(tmp_path, config=short)
    code = main(
        [str(bundle), "--people", "2", "--attributes", "Smiling", "--network", str(tmp_path / "c.safetensors"),
         "--output", str(tmp_path / "report")]
    )  # fmt: skip
    assert code == 0
    printed = capsys.readouterr().out
    assert all(variant in printed for variant in VARIANTS)
    written = json.loads((tmp_path / "report" / "ablation.json").read_text(), parse_constant=pytest.fail)
    assert (written["people"], written["features"]) == (2, sha256_of(tmp_path / "c.safetensors")[:8])
    assert [row["hair_iou"] for row in written["rows"]] == [None] * 3  # no hair was edited: JSON has no NaN


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, code, words in (
        (("--people", "1"), 2, "--people must be 2 or more, got 1"),
        (("--batch", "0"), 2, "--batch must be 1 or more, got 0"),
        ((str(tmp_path / "none.json"),), 1, "none.json"),
    ):
        assert main([*arguments, "--output", str(tmp_path / "report")]) == code
        said = capsys.readouterr()
        assert said.out == ""
        assert words in said.err
        assert len(said.err.splitlines()) == 1
