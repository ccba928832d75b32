# SPDX-License-Identifier: Apache-2.0
"""The `maskfacegan` editor: attributes and sizes by optimising StyleGAN2 under masks; `faceedit.maskfacegan` does it.

The generated image goes back into the photo through the blending mask B (paper, eq. 12), which the pipeline's
compositing applies at the photo's own resolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from faceedit.alignment import Alignment, Framing
from faceedit.editors.base import EDITORS, AttributeEdit, ComponentSize, EditedFace, EditRequest, check_request
from faceedit.errors import UsageError
from faceedit.maskfacegan.bundle import load_networks, read_bundle
from faceedit.maskfacegan.config import MaskFaceGANConfig
from faceedit.maskfacegan.networks import Networks
from faceedit.maskfacegan.optimizer import optimize
from faceedit.maskfacegan.outcome import EditOutcome, Observer, OptimizationError
from faceedit.maskfacegan.plan import EditPlan, make_plan, target_probability
from faceedit.networks.resizing import resize
from faceedit.parsing import FaceRecord, image_tensor


@dataclass(frozen=True, slots=True)
class _Task:
    """One face, ready: its image (1,3,S,S) in the generator's framing, where that lies in the photo, and the plan."""

    image: Tensor
    alignment: Alignment
    plan: EditPlan


class MaskFaceGANEditor:
    """Editing by optimisation.

    Args: networks, frozen; config, how to optimise; framing, the crop that the generator was trained on; weights, their
          name for reports; preset, the configuration's; files, what the networks were read from; caution, said before
          an edit of hair or of the whole face.
    """

    name = "maskfacegan"
    accepts: tuple[type, ...] = (AttributeEdit, ComponentSize)

    def __init__(
        self,
        networks: Networks,
        config: MaskFaceGANConfig | None = None,
        framing: Framing = "portrait",
        weights: str = "custom",
        preset: str = "default",
        files: Sequence[Path] = (),
        caution: str = "",
    ) -> None:
        self.networks, self.config, self.framing = networks, config or MaskFaceGANConfig(), framing
        self.weights, self.preset, self.files = weights, preset, tuple(files)
        self._caution = caution
        self.device = networks.device
        self.watch(None)

    @classmethod
    def load(cls, weights: str | Path, device: torch.device, preset: str = "default") -> MaskFaceGANEditor:
        """From "starter", a bundle (.json) or a generator's weights. Raises WeightsError, UnknownNameError."""
        bundle = read_bundle(weights)
        config = bundle.configuration(preset)
        networks = load_networks(bundle, device)
        listing = [Path(weights)] if str(weights).endswith(".json") else []
        return cls(networks, config, bundle.framing, str(weights), preset, [*listing, *bundle.files()], bundle.caution)

    def watch(self, observe: Observer | None, every: int = 10, should_stop: Callable[[], bool] | None = None) -> None:
        """Report progress of the edits to come, with pictures, every `every` iterations; ask whether to stop."""
        self._observe, self._every, self._should_stop = observe, every, should_stop

    def caution(self, request: EditRequest) -> str:
        """What a person should know before waiting for this edit; "" for nothing. Raises as `apply` for the request."""
        plan = self._plan(request)
        return self._caution if plan.is_global or "hair" in plan.target else ""

    def apply(self, face: FaceRecord, request: EditRequest, seed: int = 0) -> EditedFace:
        """Edit one aligned face.

        Raises: UsageError and its kin for the request, also for an attribute that this classifier does not know;
                MissingRegionError; EditCancelledError; OptimizationError.
        """
        (edited,) = self.apply_many([face], [request], seed)
        if isinstance(edited, OptimizationError):
            raise edited
        return edited

    def apply_many(
        self, faces: Sequence[FaceRecord], requests: Sequence[EditRequest], seed: int = 0, batch: int = 8
    ) -> list[EditedFace | OptimizationError]:
        """Edit many faces, one request each, together; each comes out as it would alone, up to rounding.

        An edit whose optimisation failed is an OptimizationError in its place. Raises as `apply` otherwise.
        """
        tasks = [self._task(face, request) for face, request in zip(faces, requests, strict=True)]
        outcomes = optimize(
            self.networks,
            torch.cat([task.image for task in tasks]),
            [task.plan for task in tasks],
            self.config,
            seed=seed,
            observe=self._observe,
            every=self._every,
            should_stop=self._should_stop,
            batch=batch,
        )
        return [
            outcome if isinstance(outcome, OptimizationError) else self._edited(task, outcome)
            for task, outcome in zip(tasks, outcomes, strict=True)
        ]

    def _task(self, face: FaceRecord, request: EditRequest) -> _Task:
        plan = self._plan(request)
        side = self.networks.generator.config.size_px
        alignment = face.framed(self.framing, side)
        if face.pixels is not None:
            image = image_tensor(alignment.warp_image(face.pixels))
        elif self.framing == "portrait":
            image = resize(face.crop, side)
        else:
            raise UsageError(
                f"maskfacegan: face must come with its photo to be cropped as {self.framing}, got the crop alone; "
                "parse it from the photo"
            )
        return _Task(image, alignment, plan)

    def _plan(self, request: EditRequest) -> EditPlan:
        check_request(EDITORS[self.name], request)
        assert isinstance(request, AttributeEdit | ComponentSize)
        edit = request if isinstance(request, AttributeEdit) else request.attributes
        size = request if isinstance(request, ComponentSize) else None
        plan = make_plan(
            {} if edit is None else edit.values,
            component="" if size is None else size.component,
            scale=0.0 if size is None else size.scale,
            keep=() if edit is None else edit.keep,
            config=self.config,
        )
        if plan.attributes:
            self.networks.classifier.select(plan.attributes)  # refuses what this classifier does not know
        return plan

    @torch.no_grad()
    def _edited(self, task: _Task, outcome: EditOutcome) -> EditedFace:
        plan, config = task.plan, self.config
        pictures = {"before": task.image.to(self.device), "generated": outcome.generated, "after": outcome.image}
        seen: dict[str, dict[str, float]] = {}
        if plan.attributes:
            judge = self.networks.classifier.select(plan.attributes)
            seen = {
                moment: dict(zip(judge.names, judge(picture)[0].sigmoid().tolist(), strict=True))
                for moment, picture in pictures.items()
            }
        wanted = {name: target_probability(value, config.epsilon) for name, value in plan.values.items()}
        details: dict[str, Any] = {
            "preset": self.preset,
            "framing": self.framing,
            "size_px": task.image.shape[-1],
            "is_global": plan.is_global,
            "target_regions": list(plan.target),
            "kept": list(plan.keep),
            "wanted_probability": {name: round(value, 4) for name, value in wanted.items()},
            "classifier": {moment: {n: round(p, 4) for n, p in values.items()} for moment, values in seen.items()},
            "losses": outcome.losses,
            "iterations": outcome.iterations,
            "seconds": {stage: round(value, 4) for stage, value in outcome.seconds.items()},
        }
        if outcome.held_from >= 0:
            details["noise_held_from"] = outcome.held_from
        return EditedFace(
            before=task.image,
            after=outcome.generated.cpu(),
            region=outcome.blend.cpu(),
            parts=plan.parts,
            requested={name: wanted[name] - seen["before"][name] for name in plan.values},
            alignment=task.alignment,
            details=details,
        )
