# SPDX-License-Identifier: Apache-2.0
"""Aligned faces for StyleGAN2: FFHQ's framing of synthetic portraits, and plain folders."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from faceedit.errors import OutOfRangeError, UsageError
from faceedit.training import synthetic
from faceedit.training.aligned import AlignedConfig, AlignedFaces, central_square
from faceedit.training.data import SPLIT_SEEDS

SIZE = 32


def quiet(line: str) -> None:
    """A report that keeps test output readable."""


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> AlignedFaces:
    config = AlignedConfig(size_px=SIZE, people=12, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return AlignedFaces(config, quiet)


def test_portraits_are_framed_by_the_rule_of_ffhq(faces: AlignedFaces) -> None:
    """Against the rule written out: half side max(2 eye to eye, 1.8 eyes to mouth), a tenth of the way to the mouth."""
    people = synthetic.sample_parameters(12, SPLIT_SEEDS["train"])
    large_px = 4 * SIZE
    drawn = synthetic.render(people, large_px)
    errors, unaligned = [], []
    for row in range(12):
        left, right, _, mouth_left, mouth_right = drawn.landmarks[row].double()
        eyes, mouth = (left + right) / 2, (mouth_left + mouth_right) / 2
        across = right - left
        down = mouth - eyes
        half = max(2 * across.norm(), 1.8 * down.norm())
        direction = across - torch.stack([-down[1], down[0]])
        direction = direction / direction.norm()
        upright = torch.stack([-direction[1], direction[0]])
        steps = (torch.arange(SIZE, dtype=torch.float64) + 0.5) * 2 / SIZE - 1
        x, y = steps[None, :, None] * half, steps[:, None, None] * half
        points = eyes + 0.1 * down + x * direction + y * upright
        grid = ((points + 0.5) * 2 / large_px - 1)[None].float()
        soft = F.avg_pool2d(F.pad(drawn.image[row : row + 1], (1, 2, 1, 2), mode="replicate"), 4, 1)
        expected = F.grid_sample(soft, grid, padding_mode="reflection", align_corners=False)
        inner = slice(4, -4)
        image = faces.read([row])
        errors.append((image - expected)[..., inner, inner].square().mean())
        plain = F.interpolate(drawn.image[row : row + 1], (SIZE, SIZE), mode="area")
        unaligned.append((plain - expected)[..., inner, inner].square().mean())
    assert torch.stack(errors).mean() < 0.1 * torch.stack(unaligned).mean()


def test_scale_shows_more_around_the_face(faces: AlignedFaces) -> None:
    wider = AlignedConfig(size_px=SIZE, people=12, scale=1.25, cache_dir=faces.config.cache_dir)
    wide, near = AlignedFaces(wider, quiet).read(range(12)), faces.read(range(12))
    # The middle 1/1.25 of the wider framing is FFHQ's.
    middle = F.interpolate(wide, (40, 40), mode="bilinear", antialias=True)[..., 4:36, 4:36]
    assert (middle - near).square().mean() < 0.5 * (wide - near).square().mean()


def test_sampling_mirrors_half_and_follows_the_generator(faces: AlignedFaces) -> None:
    one, same = (faces.sample(64, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, same)
    everyone = faces.read(range(12))
    straight = (one[:, None] == everyone[None]).flatten(2).all(2).any(1)
    mirrored = (one.flip(3)[:, None] == everyone[None]).flatten(2).all(2).any(1)
    assert (straight ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_batches_hold_each_image_once(faces: AlignedFaces) -> None:
    batches = list(faces.batches(100, size=5))
    assert [len(batch) for batch in batches] == [5, 5, 2]
    assert torch.equal(torch.cat(batches), faces.read(range(12)))
    assert len(torch.cat(list(faces.batches(6)))) == 6


def test_folder_is_read_shrunk_and_cached(tmp_path: Path) -> None:
    folder = tmp_path / "faces"
    (folder / "more").mkdir(parents=True)
    wide = np.zeros((40, 80, 3), dtype=np.uint8)
    wide[:, 20:60] = (255, 0, 127)
    Image.fromarray(wide).save(folder / "a.png")
    Image.new("L", (64, 64), 200).save(folder / "more" / "b.png")
    (folder / "c.jpg").write_bytes(b"not an image")
    config = AlignedConfig(size_px=16, folder=str(folder), cache_dir=str(tmp_path / "cache"), mirror=False)
    for _ in range(2):  # the second time from the cache
        lines: list[str] = []
        faces = AlignedFaces(config, lines.append)
        assert (len(faces), faces.refused) == (2, 1)
        assert lines[-1] == f"{folder}: 1 of 3 images could not be used"
    assert faces.description == "2 images of a folder"
    red, grey = faces.read([0, 1])
    torch.testing.assert_close(red.mean((1, 2)), torch.tensor([1.0, -1.0, 127 / 127.5 - 1]))
    torch.testing.assert_close(grey, torch.full((3, 16, 16), 200 / 127.5 - 1))


def test_other_images_of_the_same_names_and_sizes_are_other_images(tmp_path: Path) -> None:
    means = []
    for number, grey in enumerate((10, 240)):
        folder = tmp_path / str(grey)
        folder.mkdir()
        Image.new("RGB", (32, 32), (grey,) * 3).save(folder / "000.bmp")
        os.utime(folder / "000.bmp", ns=(number, number))
        config = AlignedConfig(size_px=16, folder=str(folder), cache_dir=str(tmp_path / "cache"))
        means.append(AlignedFaces(config, quiet).read([0]).mean().item())
    assert means == pytest.approx([10 / 127.5 - 1, 240 / 127.5 - 1])


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    config = AlignedConfig(size_px=16, folder=str(tmp_path), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UsageError, match=r"images\.folder must hold images"):
        AlignedFaces(config, quiet)
    (tmp_path / "a.png").write_bytes(b"no")
    with pytest.raises(UsageError, match="must hold readable images"):
        AlignedFaces(config, quiet)
    with pytest.raises(OutOfRangeError, match="scale must be in"):
        AlignedConfig(scale=0)
    with pytest.raises(OutOfRangeError, match=r"seed_offset must be 0 or in \[188, 900000\) for 6000 people, got 187"):
        AlignedConfig(people=6000, seed_offset=187)
    assert AlignedConfig(people=6000, seed_offset=188).seed_offset == 188


def test_central_square_keeps_the_middle() -> None:
    pixels = np.zeros((10, 4, 3), dtype=np.uint8)
    pixels[3:7] = 9
    assert (central_square(pixels, 4) == 9).all()
