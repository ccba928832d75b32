# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.toy_task import FakeFace

from faceedit.attributes import CELEBA, MAGGAN, attribute_index
from faceedit.errors import FaceTooSmallError, OutOfRangeError, UnknownAttributeError, UsageError
from faceedit.labels import flip_soft
from faceedit.registry import find
from faceedit.relations import influence_mask
from faceedit.training import cache
from faceedit.training import synthetic as portraits
from faceedit.training.data import (
    AugmentConfig,
    PairConfig,
    SyntheticConfig,
    SyntheticPortraits,
    ask_for_what_is_there,
    sample_pairs,
)
from faceedit.training.photos import PhotosConfig, UnlabelledPhotos, _parser_identity

PLAIN = AugmentConfig(flip=False, gain=0, gamma=0, tint=0, noise=0, soften_mask_share=0)


def quiet(line: str) -> None:
    """A report that keeps test output readable."""


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> SyntheticPortraits:
    config = SyntheticConfig(size_px=32, people=20, variants=3, cache_dir=str(tmp_path_factory.mktemp("cache")))
    return SyntheticPortraits(config, report=quiet)


def two_class_mask() -> torch.Tensor:
    """Two classes a pixel, in shares that eight bits hold exactly."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(19, (2, 1, 8, 8), generator=generator)
    second = (first + torch.randint(1, 19, first.shape, generator=generator)) % 19
    share = torch.randint(128, 256, first.shape, generator=generator) / 255
    return torch.zeros(2, 19, 8, 8).scatter_(1, first, share).scatter_add_(1, second, 1 - share)


def test_mask_survives_packing_and_mirrors_like_a_soft_mask() -> None:
    mask = two_class_mask()
    packed = cache.pack_mask(mask)
    assert torch.allclose(cache.unpack_mask(packed), mask, atol=1e-6)
    assert torch.allclose(cache.unpack_mask(cache.flip_packed_mask(packed)), flip_soft(mask), atol=1e-6)


def test_image_survives_packing() -> None:
    pixels = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    assert np.array_equal(cache.pack_image(cache.unpack_image(pixels)), pixels)


def test_cache_resumes_after_a_failure_and_then_only_reads(tmp_path: Path) -> None:
    asked: list[int] = []

    def fill(start: int, stop: int) -> dict[str, Any]:
        asked.append(start)
        if len(asked) == 2:
            raise OSError("disk full")
        return {"values": np.arange(start, stop)}

    shapes = {"values": ((10,), "int64")}
    with pytest.raises(OSError, match="disk full"):
        cache.build_cache(tmp_path / "c", shapes, 4, fill, quiet)
    first = cache.build_cache(tmp_path / "c", shapes, 4, fill, quiet)
    again = cache.build_cache(tmp_path / "c", shapes, 4, fill, quiet)
    assert asked == [0, 4, 4, 8]
    assert np.array_equal(first["values"], np.arange(10))
    assert np.array_equal(again["values"], np.arange(10))


def test_two_runs_fill_a_cache_once(tmp_path: Path) -> None:
    asked: list[int] = []
    both_started = threading.Barrier(2)

    def fill(start: int, stop: int) -> dict[str, np.ndarray]:
        asked.append(start)
        return {"values": np.arange(start, stop)}

    def run() -> None:
        both_started.wait()
        cache.build_cache(tmp_path / "c", {"values": ((10,), "int64")}, 1, fill, quiet)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asked == list(range(10))


def test_fingerprint_depends_on_values_and_sources(tmp_path: Path) -> None:
    source = tmp_path / "a.py"
    source.write_text("1")
    one = cache.fingerprint({"x": 1}, [source])
    assert one == cache.fingerprint({"x": 1}, [source]) != cache.fingerprint({"x": 2}, [source])
    source.write_text("2")
    assert one != cache.fingerprint({"x": 1}, [source])


def test_families_hold_the_person_and_single_flips(families: SyntheticPortraits) -> None:
    people = portraits.sample_parameters(16, families.seed)
    drawn = portraits.render(people, 32)
    assert np.array_equal(families.images[:16, 0], cache.pack_image(drawn.image))
    assert (families.flipped[:, 0] == -1).all()
    for person in range(len(families)):
        names = [MAGGAN[position] for position in families.flipped[person, 1:]]
        assert len(set(names)) == 3
        for member, name in enumerate(names, start=1):
            column = attribute_index(name)
            before, after = families.attributes[person, [0, member], column]
            # What a hat hides, or a bald head lacks, may not show although it was set.
            hidden = name in ("Bangs", "Black_Hair", "Blond_Hair", "Brown_Hair")
            assert before != after or hidden
    person, member = 3, 2
    name = MAGGAN[families.flipped[person, member]]
    value = 1 - int(portraits.attributes_of(people)[person, attribute_index(name)])
    expected = portraits.render(portraits.with_attribute(people.select(slice(person, person + 1)), name, value), 32)
    assert np.array_equal(families.images[person, member], cache.pack_image(expected.image)[0])


def test_splits_share_nobody(families: SyntheticPortraits) -> None:
    test = SyntheticPortraits(families.config, "test", report=quiet)
    train_people = {image.tobytes() for image in families.images[:, 0]}
    assert not train_people & {image.tobytes() for image in test.images[:, 0]}


def test_tinted_families_keep_masks_and_attributes(tmp_path: Path, families: SyntheticPortraits) -> None:
    config = SyntheticConfig(size_px=32, people=16, variants=1, tinted_share=0.5, cache_dir=str(tmp_path))
    data = SyntheticPortraits(config, report=quiet)
    assert 0 < data.tinted.sum() < 16
    plain = families.images[:16, 0]
    same = (data.images[:, 0] == plain).all(axis=(1, 2, 3))
    assert np.array_equal(same, ~data.tinted[:, 0])
    assert np.array_equal(data.masks[:, 0], families.masks[:16, 0])


def test_no_pair_asks_for_a_look_that_the_source_does_not_tell(families: SyntheticPortraits) -> None:
    """What was taken off is never put on again: which glasses they were is not in the source."""
    batch = sample_pairs(families, 400, torch.Generator().manual_seed(4), PairConfig(0.5, terse_share=0.0), PLAIN)
    members = {families.images[where].tobytes(): where for where in np.ndindex(20, 4)}
    sources, targets = cache.pack_image(batch["source"]), cache.pack_image(batch["target"])
    undone = 0
    for row in range(400):
        person, source = members[sources[row].tobytes()]
        if source and members[targets[row].tobytes()] == (person, 0):
            assert batch["difference"][row, families.flipped[person, source]] <= 0
            undone += 1
    assert undone > 20


@pytest.mark.parametrize(("times", "weight"), [(1, 9.0), (2, 4.5)])
def test_emphasised_attributes_are_drawn_more_often(families: SyntheticPortraits, times: int, weight: float) -> None:
    """A weight of 9 on one attribute, or half of it twice, gives its pairs nine times the share of the others."""
    config = PairConfig(0.0, terse_share=0.0, emphasis=("Eyeglasses",) * times, emphasis_weight=weight)
    batch = sample_pairs(families, 4000, torch.Generator().manual_seed(4), config, PLAIN)
    flips = families.flipped[:, 1:] == families.config.attributes.index("Eyeglasses")
    expected = 9 * flips.sum() / (flips.size + 8 * flips.sum())
    found = (batch["difference"][:, MAGGAN.index("Eyeglasses")] != 0).float().mean()
    assert abs(found - expected) < 0.1
    assert abs(flips.mean() - expected) > 0.2


def test_fewer_backward_pairs_add_more(families: SyntheticPortraits) -> None:
    column = MAGGAN.index("Eyeglasses")
    shares = []
    for backwards in (1.0, 0.0):
        config = PairConfig(0.0, terse_share=0.0, backwards_share=backwards)
        batch = sample_pairs(families, 2000, torch.Generator().manual_seed(4), config, PLAIN)
        asked = batch["difference"][:, column]
        shares.append(((asked > 0).sum() / (asked != 0).sum()).item())
    assert shares[0] == 0  # glasses that were added are taken off, and those that were taken off stay so
    assert shares[1] > 0.3


def test_unknown_emphasis_is_refused() -> None:
    with pytest.raises(UnknownAttributeError, match="Eyeglases"):
        PairConfig(emphasis=("Eyeglases",))


def test_pairs_are_edits_of_one_person(families: SyntheticPortraits) -> None:
    batch = sample_pairs(families, 64, torch.Generator().manual_seed(1), PairConfig(0.5, terse_share=0.0), PLAIN)
    columns = [attribute_index(name) for name in MAGGAN]
    pixels = cache.pack_image(batch["source"]), cache.pack_image(batch["target"])
    owners: dict[bytes, list[tuple[int, int]]] = {}
    for person, member in np.ndindex(20, 4):  # what a hat hides makes two members look alike
        owners.setdefault(families.images[person, member].tobytes(), []).append((person, member))
    for row in range(64):
        candidates = [
            (person, source, target)
            for person, source in owners[pixels[0][row].tobytes()]
            for other, target in owners[pixels[1][row].tobytes()]
            if person == other
        ]
        bits = families.attributes[:, :, columns].astype(int)
        changes = [(bits[person, target] - bits[person, source]).tolist() for person, source, target in candidates]
        assert batch["difference"][row].tolist() in changes
        person, source, _ = candidates[0]
        assert torch.equal(batch["mask"][row], cache.unpack_mask(families.masks[person, source][None])[0])
    assert torch.equal(batch["influence"], influence_mask(batch["difference"], batch["mask"]))
    assert (batch["difference"].abs().sum(1) > 1).any()


def test_asking_for_what_is_there_changes_nothing(families: SyntheticPortraits) -> None:
    plain = sample_pairs(families, 400, torch.Generator().manual_seed(1), PairConfig(), PLAIN)
    plain["attributes"][:, MAGGAN.index("Male")] = 0.6  # nobody knows
    batch = ask_for_what_is_there(plain, 0.5, torch.Generator().manual_seed(2))
    idle = (batch["target"] == batch["source"]).flatten(1).all(1) & (batch["difference"].abs().sum(1) == 1)
    assert 0.35 < idle.float().mean() < 0.65
    asked = batch["difference"][idle]
    assert torch.equal((asked * (2 * batch["attributes"][idle] - 1)).sum(1), torch.ones(len(asked)))
    assert (asked[:, MAGGAN.index("Male")] == 0).all()
    assert 0.1 < (asked.sum(1) > 0).float().mean() < 0.9
    assert torch.equal(batch["target_attributes"][idle], batch["attributes"][idle])
    assert torch.equal(batch["influence"], influence_mask(batch["difference"], batch["mask"]))
    for name, values in plain.items():
        assert torch.equal(batch[name][~idle], values[~idle]), name


def test_terse_pairs_name_only_what_was_asked(families: SyntheticPortraits) -> None:
    full, terse = (
        sample_pairs(families, 64, torch.Generator().manual_seed(1), PairConfig(0.0, terse_share=share), PLAIN)
        for share in (0.0, 1.0)
    )
    assert torch.equal(full["source"], terse["source"])
    dropped = (full["difference"] != terse["difference"]).any(1)
    assert dropped.any()
    assert (terse["difference"][dropped].abs().sum(1) <= 1).all()
    kept = terse["difference"] != 0
    assert torch.equal(terse["difference"][kept], full["difference"][kept])


def test_source_and_target_share_augmentation_and_mirroring(families: SyntheticPortraits) -> None:
    draw = torch.Generator().manual_seed(2)
    strong = AugmentConfig(gain=0.4, gamma=0.4, tint=0.2, noise=0.1, soften_mask_share=0)
    batch = sample_pairs(families, 64, draw, PairConfig(), strong)
    again = sample_pairs(families, 64, torch.Generator().manual_seed(2), PairConfig(), strong)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    # Away from what the edit may touch, the two stay equal: on the background, unless hair comes or goes.
    hair = [MAGGAN.index(name) for name in ("Bald", "Bangs", "Male", "Young")]
    quiet_rows = (batch["difference"][:, hair] == 0).all(1) & (batch["difference"].abs().sum(1) > 0)
    ground = (batch["mask"][:, :1] > 0.999) & quiet_rows[:, None, None, None]
    assert ground.sum() > 1000
    gap = ((batch["source"] - batch["target"]).abs() * ground).amax(1)
    assert (gap > 0.02).float().sum() / ground.sum() < 0.02


def test_fading_takes_colour_from_both_pictures_alike_and_no_light(families: SyntheticPortraits) -> None:
    draws = [torch.Generator().manual_seed(3) for _ in range(2)]
    plain = sample_pairs(families, 64, draws[0], PairConfig(), PLAIN)
    faded = sample_pairs(families, 64, draws[1], PairConfig(), replace(PLAIN, fading=1.0))
    kept = {name: _saturation(faded[name]) / _saturation(plain[name]) for name in ("source", "target")}
    torch.testing.assert_close(kept["source"], kept["target"], rtol=1e-3, atol=1e-3)
    assert kept["source"].min() < 0.2 < 0.9 < kept["source"].max() <= 1.001
    light = torch.tensor([0.299, 0.587, 0.114])
    for name in kept:
        before, after = (torch.einsum("nchw,c->nhw", batch[name], light) for batch in (plain, faded))
        torch.testing.assert_close(after, before, atol=1e-3, rtol=0)


def _saturation(image: torch.Tensor) -> torch.Tensor:
    """Mean distance between a pixel's largest and smallest channel, one value a picture."""
    return (image.amax(1) - image.amin(1)).mean((1, 2))


def test_softened_masks_still_sum_to_one(families: SyntheticPortraits) -> None:
    soft = AugmentConfig(soften_mask_share=1.0)
    batch = sample_pairs(families, 16, torch.Generator().manual_seed(0), PairConfig(), soft)
    assert torch.allclose(batch["mask"].sum(1), torch.ones(16, 32, 32), atol=1e-4)
    assert ((batch["mask"] > 0.01) & (batch["mask"] < 0.99)).float().mean() > 0.01


def test_impossible_synthetic_configs_are_refused() -> None:
    with pytest.raises(UsageError, match="must be ones that synthetic portraits show"):
        SyntheticConfig(attributes=("Attractive",), variants=1)
    with pytest.raises(OutOfRangeError, match="variants must be at most"):
        SyntheticConfig(variants=14)
    for offset in (1, 187, 900_000, -1):
        with pytest.raises(OutOfRangeError, match=r"seed_offset must be 0 or in \[188, 900000\) for 3000 people, got"):
            SyntheticConfig(people=3000, seed_offset=offset)
    assert len(CELEBA) == 40


def test_people_past_an_offset_are_others(tmp_path: Path) -> None:
    drawn = []
    for offset in (0, 2):  # the least that is taken
        config = SyntheticConfig(size_px=16, people=20, variants=0, seed_offset=offset, cache_dir=str(tmp_path))
        drawn.append(SyntheticPortraits(config, report=quiet).landmarks().flatten(1))
    assert torch.cdist(*drawn).min() > 0


def test_photos_are_prepared_once_and_refusals_are_counted(tmp_path: Path) -> None:
    folder = tmp_path / "photos" / "deep"
    folder.mkdir(parents=True)
    for number in range(5):
        (folder / f"{number}.jpg").write_bytes(b"x" * (number + 1))
    (folder / "notes.txt").write_text("no photo")
    seen: list[str] = []

    def find_face(path: Path) -> FakeFace:
        seen.append(path.name)
        if path.name == "2.jpg":
            raise FaceTooSmallError("find_face: too small")
        return FakeFace(int(path.stem))

    config = PhotosConfig(folder=str(tmp_path / "photos"), size_px=32, cache_dir=str(tmp_path / "cache"))
    lines: list[list[str]] = [[], []]
    photos, again = (UnlabelledPhotos(config, find_face, report=report.append) for report in lines)
    assert [report[-1] for report in lines] == [f"{tmp_path / 'photos'}: 1 of 5 images could not be used"] * 2
    assert seen == [f"{number}.jpg" for number in range(5)]
    assert (len(again), again.refused) == (4, 1)
    image, mask = photos.read([0, 2], np.array([False, True]))
    straight = torch.nn.functional.interpolate(FakeFace(3).crop, size=(32, 32), mode="area").flip(-1)
    assert torch.allclose(image[1], straight[0], atol=1 / 127)
    assert torch.allclose(mask.sum(1), torch.ones(2, 32, 32), atol=1e-4)
    batch = photos.sample(8, torch.Generator().manual_seed(0), AugmentConfig())
    assert batch["image"].shape == (8, 3, 32, 32)
    assert set(batch["position"].tolist()) <= {0, 1, 2, 3}


def test_a_folder_without_photos_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"photos\.folder must hold photos"):
        UnlabelledPhotos(PhotosConfig(folder=str(tmp_path)), lambda path: FakeFace(0), report=quiet)


def test_another_parser_of_the_same_path_makes_a_new_cache(tmp_path: Path) -> None:
    weights, seen = tmp_path / "parser.safetensors", []
    (tmp_path / "0.jpg").write_bytes(b"x")
    config = PhotosConfig(str(tmp_path), size_px=32, parser=str(weights), cache_dir=str(tmp_path / "cache"))
    for content in (b"one", b"one", b"other"):
        weights.write_bytes(content)
        UnlabelledPhotos(config, lambda path: seen.append(path) or FakeFace(0), report=quiet)
    assert len(seen) == 2
    assert _parser_identity("parser-starter") == f"parser-starter {find('parser-starter').sha256}"
