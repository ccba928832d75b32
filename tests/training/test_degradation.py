# SPDX-License-Identifier: Apache-2.0
"""Changes of domain randomisation: what JPEG loses against a real coder, and that nothing but the generator decides."""

from __future__ import annotations

import io

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training import degradation
from faceedit.training.degradation import _camera, flip_some, photograph
from faceedit.training.hair_ends import below_long_hair, could_be_hair, lengthen, long_hair
from faceedit.training.jpeg import CHROMINANCE, LUMINANCE, jpeg, scale_of, scaled_table


def picture(width: int, height: int) -> torch.Tensor:
    """Smooth colours with some edges and grain, 3×H×W in [0, 1] of 256 levels."""
    generator = np.random.default_rng(3)
    y, x = np.mgrid[0:height, 0:width] / max(width, height)
    waves = np.stack([0.5 + 0.3 * np.sin(7 * x + 3 * y), 0.4 + 0.3 * np.cos(5 * y), 0.3 + 0.5 * x * y])
    waves[:, height // 3 : height // 2, width // 4 :] += 0.3
    waves += generator.normal(0, 0.03, waves.shape)
    return torch.from_numpy((waves.clip(0, 1) * 255).round() / 255).float()


@pytest.mark.parametrize("quality", [10, 30, 50, 75, 95])
@pytest.mark.parametrize("size", [(64, 48), (50, 37)])
def test_jpeg_loses_what_a_coder_loses(quality: int, size: tuple[int, int]) -> None:
    """Most of the way to libjpeg's result, whose integer arithmetic rounds a few coefficients the other way."""
    image = picture(*size)
    pixels = (image.permute(1, 2, 0) * 255).round().byte().numpy()
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2)
    coded = np.asarray(Image.open(file)).astype(float)
    ours = jpeg(image[None], torch.tensor([quality]))[0].permute(1, 2, 0).numpy() * 255
    assert np.abs(ours - coded).mean() < 0.28 * np.abs(pixels - coded).mean()


def test_quantisation_is_libjpegs_at_every_quality() -> None:
    for quality in range(1, 101):
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)
        written = Image.open(file).quantization
        scale = scale_of(torch.tensor([float(quality)])).view(-1, 1, 1, 1)
        for number, table in enumerate((LUMINANCE, CHROMINANCE)):
            ours = scaled_table(torch.tensor(table, dtype=torch.float32), scale)
            assert ours.flatten().tolist() == written[number], (quality, number)


def test_each_picture_meets_the_camera_that_was_drawn_for_it() -> None:
    """Resampling and lens blur as OpenCV has them, JPEG as above, or nothing at all; every case occurs."""
    count = 64
    image = picture(64, 64)[None].repeat(count, 1, 1, 1)
    pixels = (image[0].permute(1, 2, 0) * 255).round().byte().numpy()
    seen = _camera(image, torch.Generator().manual_seed(2))
    draws = torch.rand(count, 5, generator=torch.Generator().manual_seed(2)).tolist()
    cases = {"none": 0, "coded": 0, "blurred": 0, "resampled": 0}
    for row, (resampled, share, coded, quality, filtered) in enumerate(draws):
        small = int(64 * (0.16 + 0.6 * share)) if resampled < 0.5 else 64
        is_coded, is_blurred = coded < 0.5, small == 64 and filtered < 0.25
        if is_coded + is_blurred + (small < 64) > 1:
            continue
        wanted, tolerance, case = image[row], 0.0, "none"
        if is_coded:
            wanted, case = jpeg(image[row : row + 1], torch.tensor([int(25 + 70 * quality)]))[0], "coded"
            tolerance = 1 / 255
        elif is_blurred:
            blurred = cv2.GaussianBlur(pixels.astype(np.float32) / 255, (0, 0), 0.5 + 6 * filtered)
            wanted, tolerance, case = torch.from_numpy(blurred).permute(2, 0, 1), 0.02, "blurred"
        elif small < 64:
            way = cv2.INTER_CUBIC if filtered < 0.7 else cv2.INTER_LINEAR
            shrunk = cv2.resize(pixels.astype(np.float32) / 255, (small, small), interpolation=cv2.INTER_AREA)
            grown = cv2.resize(shrunk, (64, 64), interpolation=way).clip(0, 1)
            wanted, tolerance, case = torch.from_numpy(grown).permute(2, 0, 1), 2e-3, "resampled"
        cases[case] += 1
        torch.testing.assert_close(seen[row], wanted, atol=max(tolerance, 1e-6), rtol=0, msg=f"{case} {row}")
    assert min(cases.values()) > 1, cases


def test_jpeg_has_a_quality_for_each_image() -> None:
    image = picture(32, 32)[None].repeat(2, 1, 1, 1)
    both = jpeg(image, torch.tensor([10, 90]))
    for row, quality in enumerate((10, 90)):
        alone = jpeg(image[:1], torch.tensor([quality]))
        torch.testing.assert_close(both[row : row + 1], alone, atol=1 / 255, rtol=0)
    assert (both[0] - image[0]).abs().mean() > 2 * (both[1] - image[1]).abs().mean()


def test_photographs_follow_their_generator_alone() -> None:
    image = picture(64, 64)[None].repeat(6, 1, 1, 1)
    first, again, other = (photograph(image, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0
    assert first.max() <= 1
    assert torch.equal(image, picture(64, 64)[None].repeat(6, 1, 1, 1)), "the input must stay as it was"
    assert len({one.numpy().tobytes() for one in first}) == 6, "each picture has a camera of its own"


def test_mirrored_labels_and_masks_exchange_sides() -> None:
    labels = torch.randint(19, (8, 6, 6), generator=torch.Generator().manual_seed(0))
    soft = torch.nn.functional.one_hot(labels, 19).permute(0, 3, 1, 2).float()
    image = labels[:, None].float().repeat(1, 3, 1, 1)
    turned, names, parts = flip_some(image, torch.Generator().manual_seed(4), labels, soft)
    mirrored = [not torch.equal(one, before) for one, before in zip(turned, image, strict=True)]
    assert 0 < sum(mirrored) < 8
    table = torch.tensor(CELEBAMASK_HQ.flip_permutation)
    for row, is_mirrored in enumerate(mirrored):
        wanted = table[labels[row].flip(-1)] if is_mirrored else labels[row]
        assert torch.equal(names[row], wanted)
        assert torch.equal(parts[row].argmax(0), wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device was found")
def test_a_gpu_photographs_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same draws on both devices; the sensor's noise, which each draws itself, is left out."""
    monkeypatch.setattr(degradation, "_noise", lambda like, generator: torch.zeros_like(like))
    image = picture(64, 64)[None].repeat(16, 1, 1, 1)
    here, there = (photograph(image.to(place), torch.Generator().manual_seed(5)).cpu() for place in ("cpu", "cuda"))
    assert (here - there).abs().mean() < 0.003


def hair_of(columns: slice, rows: slice, size: int = 64) -> torch.Tensor:
    hair = torch.zeros(1, size, size, dtype=torch.bool)
    hair[:, rows, columns] = True
    return hair


def test_below_hair_that_reaches_the_mouth_and_beside_it() -> None:
    """The lower half where hair was, eight columns of 64 to either side; short hair has no below."""
    found = below_long_hair(hair_of(slice(10, 20), slice(5, 45)))
    wanted = hair_of(slice(2, 28), slice(32, 64))
    assert torch.equal(found, wanted)
    assert not below_long_hair(hair_of(slice(10, 20), slice(5, 38))).any()
    both = torch.cat([hair_of(slice(10, 20), slice(5, 45)), hair_of(slice(10, 20), slice(5, 38))])
    assert long_hair(both).tolist() == [True, False]


def test_what_has_another_colour_than_the_hair_cannot_be_hair() -> None:
    hair = hair_of(slice(10, 26), slice(5, 44))
    image = torch.full((1, 3, 64, 64), -0.5)
    image[:, 1, 50:] = 0.4
    found = could_be_hair(image, hair)
    assert found[:, :50].all()
    assert not found[:, 50:].any()
    assert not could_be_hair(image, hair & False).any()


def test_lengthened_hair_is_hair_of_the_same_picture_below_it_and_where_there_is_room() -> None:
    hair = torch.cat([hair_of(slice(10, 26), slice(5, 44)), hair_of(slice(10, 26), slice(5, 30))])
    room = ~hair
    room[:, :, 48:] = False
    image = torch.full((2, 3, 64, 64), 0.2) + 0.6 * hair[:, None]
    made, added = lengthen(image, hair, room, torch.Generator().manual_seed(0))
    assert added[0].sum() > 40
    assert not added[1].any(), "short hair stays"
    assert torch.equal(made[1], image[1])
    assert not (added & ~room).any()
    assert not added[:, :40].any()
    assert made[0][:, added[0]].mean() > 0.4, "strands have the hair's colour, a little darker"
    far = F.max_pool2d(added[:1, None].float(), 3, 1, 1)[0, 0] == 0
    assert torch.equal(made[0][:, far], image[0][:, far])
    again, where = lengthen(image, hair, room, torch.Generator().manual_seed(0))
    assert torch.equal(again, made)
    assert torch.equal(where, added)
