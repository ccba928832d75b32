# SPDX-License-Identifier: Apache-2.0
"""A run's batches, one a step: made where the loop runs, or ahead of it by processes of their own."""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Generator

from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from faceedit.errors import UsageError

Batch = dict[str, Tensor]
Seed = Callable[[int], None]


class _Steps(Dataset[Batch]):
    """Step k's batch at index k."""

    def __init__(self, make: Callable[[int], Batch], seed: Seed) -> None:
        self._make, self._seed = make, seed

    def __getitem__(self, step: int) -> Batch:
        self._seed(step)
        return self._make(step)


def batches(
    make: Callable[[int], Batch], steps: range, *, workers: int, seed: Seed, pinned: bool = False
) -> Generator[Batch, None, None]:
    """Yield `make(step)` of every step in order, whatever `workers` is.

    Args:   make is a function of the step alone and gives CPU tensors; workers 0 calls it between the steps, more make
            batches ahead in that many forked processes of one thread each; seed sets a step's global generators, and is
            called before `make`; pinned, in page-locked memory, from which a GPU copies while it computes.
    Raises: UsageError where workers are asked for and processes cannot be forked.
    """
    data = _Steps(make, seed)
    if workers == 0:
        yield from (data[step] for step in steps)
        return
    if "fork" not in multiprocessing.get_all_start_methods():
        raise UsageError(
            f"train: trainer.workers must be 0 where processes cannot be forked, got {workers}; set trainer.workers=0"
        )
    # A task holds memory-mapped arrays and networks: a forked worker has them without a copy.
    yield from DataLoader(
        data,
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        prefetch_factor=3,
        pin_memory=pinned,
        multiprocessing_context="fork",
        worker_init_fn=_start_worker,
    )


def _start_worker(worker: int) -> None:
    """Ctrl-C is for the loop, which then ends its workers; OpenCV's pool of threads does not survive a fork."""
    import cv2

    del worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    cv2.setNumThreads(0)
