# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from faceedit.attributes import MAGGAN, attribute_index
from faceedit.errors import UsageError
from faceedit.training import cache, evaluation, maskfacegan_ablation, parser_evaluation, photo_evaluation
from faceedit.training.command import require_folder
from faceedit.training.data import SyntheticPortraits


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> SyntheticPortraits:
    config = evaluation.thirteen_flips(6, 32, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return SyntheticPortraits(config, "test", report=lambda line: None)


def oracle(data: SyntheticPortraits) -> evaluation.Edit:
    """An editor that looks the truth up: the ceiling of every measure."""
    known = {cache.pack_image(cache.unpack_image(row[None]))[0].tobytes(): i for i, row in enumerate(data.images[:, 0])}

    def edit(image: Tensor, difference: Tensor, mask: Tensor) -> Tensor:
        rows = []
        for picture, asked in zip(cache.pack_image(image), difference, strict=True):
            person = known[picture.tobytes()]
            member = 0
            if asked.any():
                raised = asked > 0 if (asked > 0).any() else asked < 0
                names = [name for name, hit in zip(MAGGAN, raised, strict=True) if hit]
                assert len(names) == 1
                member = int(np.flatnonzero(data.flipped[person] == MAGGAN.index(names[0]))[0])
            rows.append(data.images[person, member])
        return cache.unpack_image(np.stack(rows))

    return edit


def reader(data: SyntheticPortraits) -> evaluation.Classify:
    """A classifier that knows every image of the set by heart."""
    columns = [attribute_index(name) for name in MAGGAN]
    known = {
        data.images[p, m].tobytes(): data.attributes[p, m][columns]
        for p in range(len(data))
        for m in range(data.images.shape[1])
    }
    return lambda image: torch.from_numpy(
        np.stack([known[picture.tobytes()] for picture in cache.pack_image(image)])
    ).float()


def test_region_psnr_matches_the_formula() -> None:
    image, truth = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    image[0, 0, 0, 0] = 0.5
    image[1] = 1.0
    region = torch.zeros(2, 1, 4, 4)
    region[:, :, 0] = 1.0
    region[:, :, 1] = 0.5
    weighted = (0.25 / 3) / (4 + 2)
    expected = [10 * math.log10(4 / weighted), 10 * math.log10(4.0)]
    assert evaluation.region_psnr_db(image, truth, region).tolist() == pytest.approx(expected)
    assert evaluation.region_psnr_db(truth, truth, region).tolist() == [60.0, 60.0]


def test_outside_error_matches_the_formula() -> None:
    image, source = torch.zeros(1, 3, 2, 2), torch.zeros(1, 3, 2, 2)
    image[0, :, 0, 0] = torch.tensor([0.3, -0.6, 0.0])
    image[0, :, 1, 1] = 1.0
    region = torch.tensor([[[[0.5, 0.0], [0.0, 1.0]]]])
    assert evaluation.outside_error(image, source, region).item() == pytest.approx(0.5 * 0.9 / 12)


def test_an_oracle_is_perfect_inside(data: SyntheticPortraits) -> None:
    report = evaluation.evaluate_editor(oracle(data), data, reader(data), batch_size=4)
    assert report.psnr_db == 60.0
    assert report.undone == 0
    assert report.reconstruction_psnr_db == 60.0
    assert report.success == report.truth_success
    assert report.success is not None
    assert report.success > 0.9
    assert sum(row.count for row in report.rows) + report.skipped == 6 * 13


def test_doing_nothing_fails_but_preserves(data: SyntheticPortraits) -> None:
    report = evaluation.evaluate_editor(lambda image, difference, mask: image, data, reader(data))
    assert report.mre == 0
    assert report.success == 0
    for row in report.rows:
        assert row.psnr_db == row.unchanged_psnr_db < 60
        assert row.undone == pytest.approx(1, abs=1e-4)


def test_painting_everything_is_seen_outside(data: SyntheticPortraits) -> None:
    report = evaluation.evaluate_editor(lambda image, difference, mask: image + 0.5, data)
    assert report.mre > 0.2
    assert report.success is None
    assert "success" not in report.scalars()


def test_report_is_written(data: SyntheticPortraits, tmp_path: Path) -> None:
    report = evaluation.evaluate_editor(lambda image, difference, mask: image, data, reader(data))
    report.write(tmp_path / "report")
    stored = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert stored["mre"] == report.mre
    assert [row["attribute"] for row in stored["rows"]] == [row.attribute for row in report.rows]
    table = (tmp_path / "report" / "evaluation.md").read_text().splitlines()
    assert len([line for line in table if line.startswith("| ")]) == len(report.rows) + 2


def test_classify_with_reorders_and_resizes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, image: Tensor) -> Tensor:
            assert image.shape[-2:] == (16, 16)
            return self.scale * torch.arange(13.0).expand(len(image), -1)

    names = tuple(reversed(MAGGAN))
    seen = evaluation.classify_with(Net(), names, 16)(torch.zeros(2, 3, 64, 64))
    assert torch.equal(seen[0], torch.arange(12.0, -1.0, -1.0).sigmoid())


def test_a_classifier_must_know_the_thirteen() -> None:
    with pytest.raises(UsageError, match="must hold MagGAN's attributes, got none of Bald"):
        evaluation.classify_with(nn.Identity(), MAGGAN[1:], 16)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["maggan-startre"], 2, "maggan-starter"),
        (["parser-starter"], 1, "must hold a maggan, got parser"),
        (["maggan-starter", "--classifier", "parser-starter"], 1, "must hold a attribute-classifier, got parser"),
        (["maggan-starter", "--people", "0"], 2, "--people must be 1 or more, got 0"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], code: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluation.main([*arguments, "--output", str(tmp_path / "report")]) == code
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert words in said.err
    assert len(said.err.splitlines()) == 1


def test_an_unusable_output_is_known_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of every evaluation: before its weights are looked for."""
    (tmp_path / "file").touch()
    commands: tuple[tuple[Any, list[str]], ...] = (
        (evaluation, ["none"]),
        (photo_evaluation, ["none", "--photos", str(tmp_path)]),
        (parser_evaluation, ["none"]),
        (maskfacegan_ablation, ["none"]),
    )
    for command, more in commands:
        for output in ("file", "file/report", "a" * 300):
            assert command.main([*more, "--output", str(tmp_path / output)]) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert "--output must be a folder to write to, got" in line
    require_folder("command", "--output", tmp_path / "deep" / "report")
    require_folder("command", "--output", Path("report"))
    assert not (tmp_path / "deep").exists()
