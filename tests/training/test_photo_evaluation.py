# SPDX-License-Identifier: Apache-2.0
"""Editors scored on pairs of photos. Drawn people stand in for the photos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.family_photos import photos_of
from torch import Tensor

from faceedit.attributes import MAGGAN, attribute_index
from faceedit.errors import OutOfRangeError
from faceedit.training import cache, photo_evaluation
from faceedit.training.carry_over import LOOKS
from faceedit.training.data import SyntheticConfig, SyntheticPortraits
from faceedit.training.photo_evaluation import PhotoReport, evaluate_on_photos
from faceedit.training.photos import PhotosConfig
from faceedit.training.transplants import Transplants

SIZE = 48
ASKED = ("Eyeglasses", "Bushy_Eyebrows")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> SyntheticPortraits:
    folder = str(tmp_path_factory.mktemp("families"))
    config = SyntheticConfig(size_px=SIZE, people=24, variants=len(LOOKS), attributes=tuple(LOOKS), cache_dir=folder)
    return SyntheticPortraits(config, report=lambda line: None)


class Nearest:
    """A judge that sees in any picture what the most similar of the photos shows: never an edit."""

    def __init__(self, families: SyntheticPortraits) -> None:
        self.images = cache.unpack_image(families.images[:, 0]).flatten(1)
        columns = [attribute_index(name) for name in MAGGAN]
        self.attributes = torch.from_numpy(families.attributes[:, 0][:, columns]).float()

    def __call__(self, image: Tensor) -> Tensor:
        return self.attributes[torch.cdist(image.flatten(1), self.images).argmin(1)]


def test_doing_nothing_and_doing_right(
    families: SyntheticPortraits, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos, judge, truths = photos_of(families, tmp_path), Nearest(families), []
    plain = Transplants.sample

    def watched(self: Transplants, *arguments: object) -> dict[str, Tensor]:
        pairs = plain(self, *arguments)  # type: ignore[arg-type]
        truths.extend(pairs["target"])
        return pairs

    monkeypatch.setattr(Transplants, "sample", watched)
    options = {"attributes": ASKED, "count": 20}
    idle = evaluate_on_photos(lambda image, difference, mask: image, photos, families, judge, **options)
    assert [(row.attribute, row.value, row.count) for row in idle.rows] == [
        (name, value, 20) for name in ASKED for value in (1, 0)
    ]
    for row in idle.rows:
        assert row.psnr_db == row.unchanged_psnr_db < 40
        assert row.undone == pytest.approx(1)
        assert row.outside == 0
        # A photo that puts something on is not seen with it; one that takes it off is what the judge knows.
        assert (row.success, row.truth_success) == (1 - row.value, 1 - row.value)

    truths.clear()
    served = iter(truths)
    right = evaluate_on_photos(
        lambda image, difference, mask: torch.stack([next(served) for _ in image]), photos, families, judge, **options
    )
    for row, before in zip(right.rows, idle.rows, strict=True):
        assert row.psnr_db == 60
        assert row.undone == pytest.approx(0, abs=1e-6)
        assert row.unchanged_psnr_db == before.unchanged_psnr_db, "every editor gets the same pairs"


def test_held_out_photos_are_nobody_else(families: SyntheticPortraits, tmp_path: Path) -> None:
    photos = photos_of(families, tmp_path, held_out_every=5)
    train, held_out = photos.split()
    assert (len(train), len(held_out)) == (20, 4)
    assert not set(train.index) & set(held_out.index)
    assert sorted([*train.index, *held_out.index]) == list(range(24))
    everyone, nobody = photos_of(families, tmp_path, held_out_every=0).split()
    assert (len(everyone), len(nobody)) == (24, 0)
    with pytest.raises(OutOfRangeError, match=r"photos\.held_out_every must be 0 or more, got -1"):
        PhotosConfig("photos", held_out_every=-1)


def test_report(families: SyntheticPortraits, tmp_path: Path) -> None:
    photos = photos_of(families, tmp_path / "photos")
    report = evaluate_on_photos(
        lambda image, difference, mask: image, photos, families, Nearest(families), attributes=ASKED[:1], count=3
    )
    assert isinstance(report, PhotoReport)
    report.write(tmp_path / "report")
    text = (tmp_path / "report" / "photo_evaluation.md").read_text()
    assert text == report.markdown()
    assert "| Eyeglasses=0 | 3 |" in text
    assert "| **mean** | 6 |" in text
    assert "24 photos that were held out" in text
    written = json.loads((tmp_path / "report" / "photo_evaluation.json").read_text())
    assert written["rows"][0]["value"] == 1


def test_mistakes_are_one_line(
    families: SyntheticPortraits,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = photos_of(families, tmp_path / "photos")
    few.index = few.index[:7]
    monkeypatch.setattr(photo_evaluation, "UnlabelledPhotos", lambda *_, **__: few)
    common = ("--photos", str(tmp_path / "photos"), "--output", str(tmp_path / "report"))
    for arguments, code, words in (
        (("parser-starter",), 1, "must hold a maggan, got parser"),
        (("maggan-starter", "--pairs", "0"), 2, "--pairs must be 1 or more, got 0"),
        (("maggan-starter", "--people", "0"), 2, "--people must be 1 or more, got 0"),
        (("maggan-starter",), 2, "must hold photos that are held out, got 7 in all"),
    ):
        assert photo_evaluation.main([*arguments, *common]) == code
        said = capsys.readouterr()
        assert said.out == ""
        assert words in said.err
        assert len(said.err.splitlines()) == 1
