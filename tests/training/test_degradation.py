# SPDX-License-Identifier: Apache-2.0
"""Changes of domain randomisation: what JPEG loses against a real coder, and that nothing but the generator decides."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from faceedit.labels import CELEBAMASK_HQ
from faceedit.training.degradation import flip_some, photograph
from faceedit.training.jpeg import jpeg


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
    assert np.abs(ours - coded).mean() < 0.4 * np.abs(pixels - coded).mean()


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
def test_a_gpu_photographs_too() -> None:
    """The same draws on both devices; only the sensor's noise is drawn by the device itself."""
    image = picture(64, 64)[None].repeat(6, 1, 1, 1)
    here, there = (photograph(image.to(place), torch.Generator().manual_seed(5)).cpu() for place in ("cpu", "cuda"))
    assert (here - there).abs().mean() < 0.03
