# SPDX-License-Identifier: Apache-2.0
"""What a parser's scores count, and what the command makes of weights and options. That it measures what training
validated: test_parser_task.py."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from faceedit.labels import CELEBAMASK_HQ
from faceedit.networks.parser import ParserConfig, ParserNet
from faceedit.registry import save_weights
from faceedit.training.contours import BARE, UNKNOWN
from faceedit.training.framed_photos import FramedPhotos
from faceedit.training.parser_evaluation import contour_scores, header_metrics, main

SKIN, EYE, OTHER_EYE, NOSE = (CELEBAMASK_HQ.id(name) for name in ("skin", "l_eye", "r_eye", "nose"))


class Says(nn.Module):
    """Labels every image with the same row of classes."""

    def __init__(self, labels: list[int]) -> None:
        super().__init__()
        self.labels = torch.tensor(labels)

    def forward(self, image: Tensor) -> Tensor:
        one = nn.functional.one_hot(self.labels, CELEBAMASK_HQ.num_classes).float()
        return one.t()[None, :, None].expand(len(image), -1, 1, -1)


def test_parts_are_compared_where_contours_speak() -> None:
    drawn = np.array([[[EYE, EYE, BARE, UNKNOWN, UNKNOWN, NOSE]], [[BARE, EYE, BARE, UNKNOWN, BARE, NOSE]]], np.uint8)
    photos = FramedPhotos(np.zeros((2, 1, 6, 3), np.uint8), drawn)
    # Eyes: found at columns 0, 2 and 3. Photo 0: 1 hit, 1 missed, 1 false; photo 1: none, 1 missed, 2 false.
    scores = contour_scores(Says([OTHER_EYE, SKIN, EYE, EYE, SKIN, SKIN]), photos, torch.device("cpu"))
    assert scores == {"photo_iou_eyes": 1 / 6, "photo_iou_nose": 0.0}
    assert contour_scores(Says([EYE, EYE, SKIN, EYE, EYE, NOSE]), photos, torch.device("cpu")) == {
        "photo_iou_eyes": 3 / 5,
        "photo_iou_nose": 1.0,
    }


def test_every_eighth_photo_with_landmarks_is_held_out() -> None:
    crops = np.arange(17, dtype=np.uint8).reshape(17, 1, 1, 1).repeat(3, 3)
    kept, held_out = FramedPhotos(crops, crops[..., 0]).split()
    assert held_out.crops[:, 0, 0, 0].tolist() == [0, 8, 16]
    assert len(kept) == 14
    assert kept.read_contours([0, 1]).flatten().tolist() == [1, 2]
    everything, nothing = FramedPhotos(crops).split()
    assert (len(everything), len(nothing)) == (17, 0)
    assert everything.read_contours([3]).tolist() == [[[UNKNOWN]]]


def test_the_header_names_the_mean_and_the_photos_parts() -> None:
    scores = {"mean_iou": 0.5, "iou_nose": 0.25, "photo_iou_eyes": 0.75}
    assert header_metrics(scores) == {"synthetic_test_mean_iou": 0.5, "photo_iou_eyes": 0.75}


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = ParserConfig(size_px=32, widths=(4, 4, 4, 4, 4), blocks=(1, 1, 1, 1, 1))
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "tests"}
    claims = {"synthetic_test_mean_iou": 0.875}
    path = tmp_path / "p.safetensors"
    save_weights(path, "parser", config, ParserNet(config).state_dict(), metrics=claims, **facts)
    return path


def test_the_command_writes_scores_beside_the_headers_claims(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FACEEDIT_CACHE", str(tmp_path / "cache"))
    report = tmp_path / "report"
    assert main([str(weights), "--people", "3", "--output", str(report)]) == 0
    printed = capsys.readouterr().out
    stored = json.loads((report / "evaluation.json").read_text())
    assert (stored["people"], stored["photos"], stored["size_px"]) == (3, 0, 32)
    assert f"| synthetic_test_mean_iou | {stored['scores']['mean_iou']:.4f} | 0.8750 |" in printed
    assert f"| skin | {stored['scores']['iou_skin']:.4f} |" in printed
    assert printed.strip() == (report / "evaluation.md").read_text().strip()
    assert Image.open(report / "sheet.png").size == (3 * 32, 2 * 32)
    assert main([str(weights), "--people", "3", "--output", str(report), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == stored


def test_mistakes_are_one_line(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FACEEDIT_CACHE", str(tmp_path / "cache"))
    Image.new("RGB", (8, 8)).save(tmp_path / "photo.png")
    report = ("--people", "2", "--output", str(tmp_path / "report"))
    assert main(["parser-startre", *report]) == 2
    assert "parser-starter" in capsys.readouterr().err
    assert main([str(weights), "--people", "0", "--output", str(tmp_path / "report")]) == 2
    assert "--people must be 1 or more" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main([str(weights), *report, "--photos", str(tmp_path)])
    assert stopped.value.code == 2
    assert "must come together" in capsys.readouterr().err
    for broken in ("none.npz", "photo.png"):
        files = ("--photos", str(tmp_path), "--photo-contours", str(tmp_path / broken))
        assert main([str(weights), *report, *files]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert "photo_contours must be a file that training/face_mesh.py wrote" in said
        assert "recipe" not in said
    assert not (tmp_path / "report").exists()
