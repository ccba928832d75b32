# SPDX-License-Identifier: Apache-2.0
"""What an optimisation reports while it runs, gives back, and raises."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from faceedit.errors import FaceEditError

Stage = Literal["source", "latent", "noise", "blend"]
TERMS = ("appearance", "semantics", "shape", "size", "perceptual", "spread", "noise")


class EditCancelledError(FaceEditError):
    """The edit was stopped from outside before it was done."""


class OptimizationError(FaceEditError):
    """The optimisation lost its footing (NaN or infinity) before the edit was made."""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a batch is: before anything ("source"), after an iteration, or after blending ("blend").

    iteration counts within the stage (from an encoder the latent stage begins at 300); done and total count iterations
    of both stages; edits, positions of the batch's plans in the call; losses, (N) of each term that acted, unweighted;
    image (N,3,S,S), the iteration's I_G; I for "source" and I' for "blend".
    """

    stage: Stage
    iteration: int
    done: int
    total: int
    edits: tuple[int, ...]
    losses: Mapping[str, Tensor]
    image: Tensor


@dataclass(frozen=True, slots=True)
class EditOutcome:
    """One edit.

    image:      I' (1,3,S,S) in [-1, 1], blended; exactly the source where blend is 0.
    generated:  I_G (1,3,S,S).     blend: B (1,1,S,S).     ws: (1,L,W).     noise: the maps (1,1,r,r).
    losses:     the last value of each term that acted, unweighted.
    iterations: of each stage.   held_from: the noise iteration from which on the maps were held at their last finite
                state; -1 when all went well.
    """

    image: Tensor
    generated: Tensor
    blend: Tensor
    ws: Tensor
    noise: tuple[Tensor, ...]
    losses: Mapping[str, float]
    iterations: Mapping[str, int]
    seconds: Mapping[str, float]
    held_from: int = -1


Observer = Callable[[Progress], None]
