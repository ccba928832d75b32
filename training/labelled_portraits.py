# SPDX-License-Identifier: Apache-2.0
"""Rendered portraits with exact label maps, cached on disk: what face parsers are trained and judged on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faceedit.devices import resolve_device
from faceedit.training import cache
from faceedit.training import synthetic as portraits
from faceedit.training.data import SPLIT_SEEDS

_CHUNK = 4
_PEOPLE_SEED = 100  # the parsers' own people: nobody that an editor or a test meets


@dataclass(frozen=True, slots=True)
class LabelledPortraits:
    """people; images uint8 P×S×S×3 and labels uint8 P×S×S of the CelebAMask-HQ scheme, both on disk."""

    people: portraits.PortraitParameters
    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]

    def __len__(self) -> int:
        return len(self.images)

    def read(self, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Images N×3×S×S in [-1, 1] and int64 labels N×S×S."""
        labels = np.stack([self.labels[row] for row in rows]).astype(np.int64)
        return cache.unpack_image(np.stack([self.images[row] for row in rows])), torch.from_numpy(labels)

    def batches(self, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Everyone, `count` at a time, as `read` gives them."""
        return (self.read(rows) for rows in self.chunks(count))

    def chunks(self, count: int) -> Iterator[list[int]]:
        """Everyone's row, `count` at a time."""
        return (list(range(start, min(start + count, len(self)))) for start in range(0, len(self), count))


def labelled_portraits(
    split: str, people: int, size_px: int, cache_dir: Path | None, report: Callable[[str], Any]
) -> LabelledPortraits:
    """`people` portraits of a split ("train" or "test"), rendered at the first call; every third pair of training
    chunks has regions of random colour."""
    seed = _PEOPLE_SEED if split == "train" else SPLIT_SEEDS[split]
    renderer = list(Path(portraits.__file__ or "").parent.glob("*.py"))
    values = {"split": split, "size": size_px, "people": people, "seed": seed, "version": 1}
    everyone, place = portraits.sample_parameters(people, seed), resolve_device("auto")

    def fill(start: int, stop: int) -> dict[str, np.ndarray]:
        rows = torch.arange(start, stop)
        tinted = (rows // _CHUNK // 2 % 3 == 0) & (split == "train")
        images = np.empty((stop - start, size_px, size_px, 3), dtype=np.uint8)
        labels = np.empty((stop - start, size_px, size_px), dtype=np.uint8)
        for chosen, seed in ((tinted, 1), (~tinted, None)):
            if chosen.any():
                batch = portraits.render(everyone.select(rows[chosen]).to(place), size_px, tint_seed=seed)
                images[chosen.numpy()] = cache.pack_image(batch.image)
                labels[chosen.numpy()] = batch.labels.to(torch.uint8).cpu().numpy()
        return {"images": images, "labels": labels}

    shapes = {"images": ((people, size_px, size_px, 3), "uint8"), "labels": ((people, size_px, size_px), "uint8")}
    name = f"parser-{split}-{size_px}px-{cache.fingerprint(values, renderer)}"
    folder = (cache_dir or cache.default_cache_dir()) / name
    at_once = cache.rendered_at_once(_CHUNK, size_px)
    arrays = cache.build_cache(folder, shapes, at_once, fill, report, workers=cache.renderers())
    return LabelledPortraits(everyone, arrays["images"], arrays["labels"])
