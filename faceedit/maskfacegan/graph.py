# SPDX-License-Identifier: Apache-2.0
"""One iteration as a CUDA graph: a launch instead of hundreds.

The iterations of a phase are alike, read nothing back and change tensors in place, so what was captured once may be
replayed. Nothing is thrown away to warm up: the first iterations run as usual, on the side stream that capturing needs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from faceedit.maskfacegan.outcome import OptimizationError

WARM_UP = 1  # iterations before capturing, in which libraries make their handles and Adam its moments


class GraphedIteration:
    """An iteration that is captured after `WARM_UP` calls and replayed from then on.

    Args:   iterate works in place on tensors of a CUDA device and synchronises nowhere.
    Raises: OptimizationError where it cannot be captured, as a network of one's own that reads a value back.
    """

    def __init__(self, iterate: Callable[[], None], device: torch.device) -> None:
        self._iterate, self._device = iterate, device
        self._stream = torch.cuda.Stream(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._calls = 0

    def __call__(self) -> None:
        self._calls += 1
        if self._calls <= WARM_UP:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._iterate()
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
            return
        if self._graph is None:
            self._graph = self._captured()
        self._graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                self._iterate()
        except RuntimeError as error:
            torch.cuda.set_stream(before)  # a capture that fails leaves its own behind
            cause = error.__context__ if isinstance(error.__context__, RuntimeError) else error
            reason = str(cause).splitlines()[0]
            raise OptimizationError(
                f"maskfacegan: an iteration must be capturable in a CUDA graph, got {reason}; use networks that read "
                "nothing back from the device, or cuda_graph=False"
            ) from error
        return graph
