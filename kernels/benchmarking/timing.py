# SPDX-License-Identifier: Apache-2.0
"""Time providers against each other: a round runs each once, in rotating order, so that drift meets them all alike."""

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Call = Callable[[], object]

MOST_ROUNDS = 200
SHORTEST_S = 200e-6  # a sample repeats a shorter call until it is this long
NOISY = 1.25


class Clock(Protocol):
    """How long one call takes."""

    def repeats(self, call: Call) -> int:
        """Return how many calls make one sample."""

    def sample(self, call: Call, repeats: int) -> float:
        """Return seconds a call."""


class CpuClock:
    """Wall time."""

    def repeats(self, call: Call) -> int:
        once = self.sample(call, 1)
        return max(1, min(1000, round(SHORTEST_S / max(once, 1e-9))))

    def sample(self, call: Call, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        return (time.perf_counter() - start) / repeats


class CudaClock:
    """CUDA events on the current stream. `cold`: the caches are flushed before every call."""

    LAUNCHES = 20
    FLUSH_BYTES = 128 << 20

    def __init__(self, cold: bool = True) -> None:
        self.flush = torch.empty(self.FLUSH_BYTES, dtype=torch.uint8, device="cuda") if cold else None

    def repeats(self, call: Call) -> int:
        return self.LAUNCHES

    def sample(self, call: Call, repeats: int) -> float:
        if self.flush is None:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(repeats):
                call()
            end.record()
            end.synchronize()
            return start.elapsed_time(end) / repeats / 1e3
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
        for start, end in pairs:
            self.flush.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3


def graph_of(call: Call) -> Call:
    """Capture one call in a CUDA graph and return its replay. The graph and its outputs live as long as the replay."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    before = torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            kept = call()
    except BaseException:
        torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
        raise

    def replay() -> object:
        graph.replay()
        return kept

    return replay


def interleave(calls: Mapping[str, Call], clock: Clock, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Return seconds a call by name and round: at least `rounds` rounds, and more until `seconds` have passed."""
    names = list(calls)
    repeats = {name: clock.repeats(calls[name]) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    began = time.perf_counter()
    done = 0
    while done < rounds or (done < MOST_ROUNDS and time.perf_counter() - began < seconds):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(clock.sample(calls[name], repeats[name]))
        done += 1
    return times


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles."""

    median: float
    q1: float
    q3: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return those of `values`."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, q1, q3)


def ratio(baseline: Sequence[float], times: Sequence[float]) -> dict[str, Any]:
    """Return how many times faster `times` is: by the median of the rounds' ratios, and by the minima.

    `noisy` when the two differ by more than a quarter: something else ran on the machine.
    """
    spread = Spread.of([b / t for b, t in zip(baseline, times, strict=True)])
    minima = min(baseline) / min(times)
    return {
        "median": spread.median,
        "q1": spread.q1,
        "q3": spread.q3,
        "minima": minima,
        "noisy": max(spread.median, minima) > NOISY * min(spread.median, minima),
    }
