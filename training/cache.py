# SPDX-License-Identifier: Apache-2.0
"""Rendered or aligned samples on disk, so that an epoch costs a read and not a render.

A cache is a folder of `.npy` arrays that are memory-mapped, filled in chunks, and named by a fingerprint of everything
that decides their contents. Building resumes after an interruption.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from faceedit.atomic import write_text
from faceedit.devices import resolve_device
from faceedit.labels import CELEBAMASK_HQ

Arrays = dict[str, NDArray[Any]]
Shapes = Mapping[str, tuple[tuple[int, ...], str]]

# Classes whose left and right exchange when an image is mirrored, as a lookup table.
_FLIP = np.array(CELEBAMASK_HQ.flip_permutation, dtype=np.uint8)


def default_cache_dir() -> Path:
    """$FACEEDIT_CACHE, else $XDG_CACHE_HOME/faceedit, else ~/.cache/faceedit."""
    if chosen := os.environ.get("FACEEDIT_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "faceedit"


def fingerprint(values: Mapping[str, Any], sources: list[Path]) -> str:
    """Twelve hex digits that change with any value and with any byte of the `sources` that make the contents."""
    digest = hashlib.blake2b(json.dumps(values, sort_keys=True, default=str).encode(), digest_size=6)
    for source in sorted(sources):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()


def file_states(files: Sequence[Path], root: Path) -> list[tuple[str, int, int]]:
    """What tells files from others of their names: path below root, bytes, time of the last change in ns."""
    states = ((path, path.stat()) for path in files)
    return [(str(path.relative_to(root)), state.st_size, state.st_mtime_ns) for path, state in states]


def report_refused(folder: str | Path, refused: int, total: int, report: Callable[[str], Any]) -> None:
    """Say how many of a folder's images are missing from what was made of it; nothing where none is."""
    if refused:
        report(f"{folder}: {refused} of {total} images could not be used")


def open_cache(folder: Path) -> Arrays:
    """The arrays of a finished cache, memory-mapped read-only."""
    names = json.loads((folder / "complete.json").read_text())["arrays"]
    return {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in names}


def rendered_at_once(chunk: int, size_px: int) -> int:
    """How many samples of size_px² one call of a renderer makes, a multiple of `chunk`: a CPU's caches hold few, a GPU
    is idle with few. A call launches nine thousand kernels, however many people it draws, and needs 0.7 kB a pixel."""
    if resolve_device("auto").type != "cuda":
        return chunk
    return max(chunk, min(128, 128 * 256**2 // size_px**2) // chunk * chunk)


def renderers() -> int:
    """How many threads render: one a core, but two before a GPU: more would wait for each other to launch."""
    return 2 if resolve_device("auto").type == "cuda" else torch.get_num_threads()


def build_cache(
    folder: Path,
    shapes: Shapes,
    chunk: int,
    fill: Callable[[int, int], dict[str, NDArray[Any]]],
    report: Callable[[str], Any],
    *,
    workers: int = 1,
) -> Arrays:
    """Fill arrays of `shapes` by `fill(start, stop)` for consecutive chunks of the first axis; no-op when complete.

    Args:    shapes maps a name to (shape, dtype), one first axis for all; report gets a line now and then; workers > 1
             calls `fill` from that many threads, each with one intra-op thread: a renderer of small images runs several
             times faster so than with every op split over the cores.
    Returns: the arrays, memory-mapped read-only.
    """
    if (folder / "complete.json").exists():
        return open_cache(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # Two runs that want the same data: the second waits for the first, and finds it complete.
    with FileLock(folder / "filling.lock"):
        if not (folder / "complete.json").exists():
            _fill_cache(folder, shapes, chunk, fill, report, workers)
    return open_cache(folder)


def _fill_cache(
    folder: Path,
    shapes: Shapes,
    chunk: int,
    fill: Callable[[int, int], dict[str, NDArray[Any]]],
    report: Callable[[str], Any],
    workers: int,
) -> None:
    total = next(iter(shapes.values()))[0][0]
    progress = folder / "progress.txt"
    done = int(progress.read_text()) if progress.exists() else 0
    mode = "r+" if done else "w+"
    arrays = {
        name: np.lib.format.open_memmap(folder / f"{name}.npy", mode=mode, dtype=dtype, shape=shape)
        for name, (shape, dtype) in shapes.items()
    }
    lines = 0
    spans = [(start, min(start + chunk, total)) for start in range(done, total, chunk)]
    for (start, stop), filled in zip(spans, _filled(fill, spans, workers), strict=True):
        for name, values in filled.items():
            arrays[name][start:stop] = values
        for array in arrays.values():
            array.flush()
        write_text(progress, str(stop))
        if stop * 10 // total > lines or stop == total:
            lines = stop * 10 // total
            report(f"cache {folder.name}: {stop} of {total}")
    write_text(folder / "complete.json", json.dumps({"arrays": list(shapes), "count": total}) + "\n")


def _filled(
    fill: Callable[[int, int], dict[str, NDArray[Any]]], spans: list[tuple[int, int]], workers: int
) -> Iterator[dict[str, NDArray[Any]]]:
    """`fill` of every span, in order, at most two spans a worker ahead of what was taken."""
    if workers == 1:
        yield from (fill(start, stop) for start, stop in spans)
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            waiting: deque[Future[dict[str, NDArray[Any]]]] = deque()
            for span in spans:
                waiting.append(pool.submit(fill, *span))
                if len(waiting) > 2 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)


def pack_image(image: Tensor) -> NDArray[np.uint8]:
    """N×3×S×S in [-1, 1] to uint8 N×S×S×3."""
    pixels = ((image.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous().cpu().numpy()


def unpack_image(pixels: NDArray[np.uint8] | Tensor) -> Tensor:
    """uint8 N×S×S×3 to N×3×S×S in [-1, 1], where a tensor lies or on the CPU."""
    return _as_tensor(pixels).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)


def _as_tensor(values: NDArray[np.uint8] | Tensor) -> Tensor:
    return values if isinstance(values, Tensor) else torch.from_numpy(np.array(values))  # a copy: maps are read-only


def pack_mask(mask: Tensor) -> NDArray[np.uint8]:
    """Soft mask N×19×S×S to uint8 N×S×S×3: the two strongest classes and the first one's share of their sum.

    An antialiased boundary mixes two classes almost everywhere, so this loses little and takes 1/25 of the space.
    """
    weights, classes = mask.float().topk(2, dim=1)
    share = (weights[:, 0] / weights.sum(1).clamp_min(1e-6) * 255).round()
    packed = torch.stack([classes[:, 0].float(), classes[:, 1].float(), share], dim=-1)
    return packed.to(torch.uint8).cpu().numpy()


def unpack_mask(packed: NDArray[np.uint8] | Tensor, num_classes: int = CELEBAMASK_HQ.num_classes) -> Tensor:
    """Inverse of `pack_mask`: N×19×S×S float summing to 1, where a tensor lies or on the CPU."""
    values = _as_tensor(packed).permute(3, 0, 1, 2)
    share = values[2][:, None].float() / 255
    shape = (share.shape[0], num_classes, *share.shape[2:])
    mask = torch.zeros(shape, device=share.device).scatter_(1, values[0][:, None].long(), share)
    return mask.scatter_add_(1, values[1][:, None].long(), 1 - share)


def flip_packed_mask(packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Mirror packed masks …×S×S×3 left to right, exchanging left and right classes."""
    flipped = packed[..., ::-1, :].copy()
    flipped[..., :2] = _FLIP[flipped[..., :2]]
    return flipped
