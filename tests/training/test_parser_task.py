# SPDX-License-Identifier: Apache-2.0
"""The parser's own task: synthetic portraits, then photos by the mean teacher; few photos are enough."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from faceedit import detection, training
from faceedit.detection import FaceBox
from faceedit.errors import OutOfRangeError, UsageError
from faceedit.labels import CELEBAMASK_HQ
from faceedit.registry import load_network
from faceedit.training import parser_evaluation
from faceedit.training.cache import pack_image
from faceedit.training.degradation import flip_some
from faceedit.training.framed_photos import framed_photos
from faceedit.training.parser import ParserTask, pseudo_labels
from faceedit.training.segmentation import dice_loss
from faceedit.training.task import TrainingContext
from faceedit.training.trainer import make_fabric

FLIP = torch.tensor(CELEBAMASK_HQ.flip_permutation)


def quiet(line: str) -> None:
    """A report that keeps test output readable."""


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(3):
        pixels = np.random.default_rng(number).integers(0, 256, (60, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    (folder / "torn.jpg").write_bytes(b"no picture")
    return folder


def tiny(cache_dir: Path, *more: str) -> list[str]:
    return [
        "trainer={steps: 4, accelerator: cpu, precision: 32-true, cpu_threads: 1, log_every: 1, checkpoint_every: 0}",
        "trainer={sample_every: 0, validate_every: 0}",
        "network={size_px: 64, widths: [4, 4, 8, 8, 8], blocks: [1, 1, 1, 1, 1]}",
        *("people=8", "test_people=4", "batch=4", "photo_batch=2", f"cache_dir={cache_dir}"),
        *more,
    ]


def train(cache_dir: Path, output_dir: Path, *more: str) -> Any:
    return training.run("parser-starter", tiny(cache_dir, *more), output_dir=output_dir, report=quiet)


def test_a_share_of_the_people_stays_as_rendered(cache_dir: Path) -> None:
    """`plain_share` people come as they lie in the cache, or mirrored; all others went through a camera."""
    shares = {}
    for share in (0.0, 0.5, 1.0):
        recipe = training.resolve("parser-starter", tiny(cache_dir, f"plain_share={share}", "batch=16"))
        ParserTask.prepare(recipe, report=quiet)
        task = ParserTask(recipe, TrainingContext(make_fabric(recipe.trainer), recipe.trainer))
        image, labels = task.people.read(list(range(8)))
        known = {pixels.tobytes(): turned for pixels, turned in zip(pack_image(image), labels, strict=True)}
        batch = task.vary(task.batch(3), 3)
        plain = 0
        for made, names in zip(batch["image"], batch["labels"], strict=True):
            for turned in (made, made.flip(-1)):
                found = known.get(pack_image(turned[None])[0].tobytes())
                if found is not None:
                    # Mirrored labels have left and right exchanged; where both mean the same, nothing moved.
                    same = names == found if turned is made else names.flip(-1) == FLIP[found]
                    assert bool(same.all())
                    plain += 1
        shares[share] = plain / 16
    assert shares[0.0] == 0
    assert 0.1 < shares[0.5] < 0.9
    assert shares[1.0] == 1
    with pytest.raises(OutOfRangeError, match=r"plain_share must be in \[0, 1\], got 2"):
        training.resolve("parser-starter", ["plain_share=2"])


def test_a_run_with_few_photos_exports_what_loads(
    cache_dir: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection, "detect_faces", lambda pixels: [FaceBox(10, 15, 30, 30, 1.0)])
    result = train(cache_dir, tmp_path / "run", f"photos={photos}", "photo_from=0.5")
    logged = [line for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"train"' in line]
    assert ['"photo"' in line for line in logged] == [False, False, True, True]
    assert 0 <= result.metrics["mean_iou"] <= 1
    network: Any = load_network(result.weights, kind="parser")
    assert network.config.widths == (4, 4, 8, 8, 8)
    assert "photographs" in network.header.training_data
    sheet = Image.open(tmp_path / "run" / "samples" / "step_00000004.png")
    assert sheet.size == (4 * 64, (1 + 3) * 2 * 64)


def test_contours_join_and_hold_photos_out(
    cache_dir: Path,
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    mesh = np.random.default_rng(5).uniform(20, 40, (478, 2)).astype(np.float32)
    mesh[[33, 133, 263, 362, 1, 61, 291]] = [(18, 25), (22, 25), (28, 25), (32, 25), (25, 32), (20, 40), (30, 40)]
    np.savez(tmp_path / "contours.npz", **{f"{number}.png": mesh for number in range(3)})
    more = (f"photos={photos}", f"photo_contours={tmp_path / 'contours.npz'}", "photo_from=0")
    result = train(cache_dir, tmp_path / "run", *more)
    assert {f"photo_iou_{part}" for part in ("eyes", "brows", "nose", "lips")} <= result.metrics.keys()
    network: Any = load_network(result.weights, kind="parser")
    assert "Face Mesh" in network.header.training_data
    assert "photo_iou_eyes" in network.header.metrics

    # The evaluation command finds the same scores, but for the rounding of exported weights.
    monkeypatch.setenv("FACEEDIT_CACHE", str(cache_dir))
    again = [str(result.weights), "--people", "4", "--output", str(tmp_path / "report"), "--json"]
    again += ["--photos", str(photos), "--photo-contours", str(tmp_path / "contours.npz")]
    capsys.readouterr()
    assert parser_evaluation.main(again) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["photos"] == 1
    assert report["scores"] == pytest.approx(result.metrics, abs=0.01)
    assert report["header"] == pytest.approx(network.header.metrics)

    # Exported weights may label the photos once, instead of the averaged network all along.
    fixed = train(cache_dir, tmp_path / "fixed", *more, f"photo_teacher={result.weights}")
    logged = [json.loads(line) for line in (tmp_path / "fixed" / "metrics.jsonl").read_text().splitlines()]
    both = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert logged[0]["photo"] != both[0]["photo"]
    assert fixed.metrics.keys() == result.metrics.keys()


def test_mirroring_exchanges_left_and_right_and_spares_what_is_no_class() -> None:
    left, right = CELEBAMASK_HQ.id("l_eye"), CELEBAMASK_HQ.id("r_eye")
    image = torch.arange(16.0).view(8, 1, 1, 2).expand(8, 3, 1, 2)
    labels = torch.tensor([left, 254]).view(1, 1, 2).expand(8, 1, 2)
    soft = torch.nn.functional.one_hot(labels.clamp(max=18), 19).permute(0, 3, 1, 2).float()
    flipped, names, mask = flip_some(image, torch.Generator().manual_seed(1), labels, soft)
    turned = flipped[:, 0, 0, 0] > flipped[:, 0, 0, 1]
    assert 0 < turned.sum() < 8
    assert names[turned].tolist() == [[[254, right]]] * int(turned.sum())
    assert names[~turned].tolist() == [[[left, 254]]] * int((~turned).sum())
    assert (mask[turned].argmax(1)[:, 0, 1] == right).all()


def test_contours_need_their_photos(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="photos must be the folder"):
        train(tmp_path / "cache", tmp_path / "run", f"photo_contours={tmp_path / 'contours.npz'}")


def test_dice_counts_every_class_that_is_shown() -> None:
    labels = torch.tensor([[[0, 0, 0, 1]]])
    logits = torch.full((1, 3, 1, 4), -50.0)
    logits[0, 0, 0] = 50.0  # everything is called class 0
    # class 0: 2·3/(4+3), class 1: 0, class 2 is not shown and does not count
    assert dice_loss(logits, labels).item() == pytest.approx(1 - (6 / 7 + 0) / 2, abs=1e-5)
    perfect = torch.where(torch.nn.functional.one_hot(labels, 3).permute(0, 3, 1, 2) > 0, 50.0, -50.0)
    assert dice_loss(perfect, labels).item() == pytest.approx(0, abs=1e-5)


def test_photos_that_cannot_be_used_are_counted_aloud(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection, "detect_faces", lambda pixels: [FaceBox(10, 15, 30, 30, 1.0)])
    lines: list[str] = []
    assert len(framed_photos(photos, None, 32, tmp_path, lines.append)) == 3
    assert lines[-1] == f"{photos}: 1 of 4 images could not be used"


def test_photos_without_a_face_are_refused(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "detect_faces", lambda pixels: [])
    with pytest.raises(UsageError, match="photos that show faces"):
        train(tmp_path / "cache", tmp_path / "run", f"photos={photos}")


def test_nobody_is_taught_that_long_hair_has_ended_but_by_its_colour() -> None:
    hair, cloth = CELEBAMASK_HQ.id("hair"), CELEBAMASK_HQ.id("cloth")
    labels = torch.full((1, 64, 64), cloth)
    labels[:, 5:44, 10:26] = hair
    soft = torch.nn.functional.one_hot(labels, 19).permute(0, 3, 1, 2).float()
    photo = torch.full((1, 3, 64, 64), -0.4)
    photo[:, :, 55:] = 0.9  # a white collar
    _, weight = pseudo_labels(soft, 0.8, photo)
    assert (weight[0, 5:44, 10:26] == 1).all(), "the hair itself"
    assert (weight[0, 44:55, 10:26] == 0).all(), "below it"
    assert (weight[0, 55:] == 1).all(), "of another colour"
    assert (weight[0, :32, 30:] == 1).all(), "above and away from it"
    labels[:, 35:44] = cloth
    short = torch.nn.functional.one_hot(labels, 19).permute(0, 3, 1, 2).float()
    assert (pseudo_labels(short, 0.8, photo)[1] == 1).all()


def test_pseudo_labels_do_not_wear_thin_parts_away() -> None:
    skin, brow = CELEBAMASK_HQ.id("skin"), CELEBAMASK_HQ.id("l_brow")
    soft = torch.zeros(1, 19, 1, 4)
    soft[0, skin, 0] = torch.tensor([0.99, 0.85, 0.40, 0.70])
    soft[0, brow, 0] = torch.tensor([0.01, 0.15, 0.60, 0.0])
    soft[0, 0, 0, 3] = 0.30
    target, weight = pseudo_labels(soft, 0.8, torch.zeros(1, 3, 1, 4))
    assert target[0, 0].tolist() == [skin, skin, brow, skin]
    sure, contested, thin, doubtful = weight[0, 0].tolist()
    assert sure == pytest.approx(0.95)
    assert contested == 0  # skin by 85 %, but the rest says brow
    assert thin == pytest.approx(0.2)
    assert doubtful == 0
