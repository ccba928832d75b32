# SPDX-License-Identifier: Apache-2.0
"""Masks of a batch of edits: sums of region probabilities, relaxed by what the edit has made of the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from faceedit.errors import FaceError
from faceedit.labels import MASKFACEGAN
from faceedit.maskfacegan.config import MaskFaceGANConfig
from faceedit.maskfacegan.networks import resize_mask
from faceedit.maskfacegan.plan import EditPlan


class MissingRegionError(FaceError):
    """The part that an edit is about is not in the picture, e.g. the hair of a bald head."""


def selection(choices: Sequence[Sequence[str]], device: torch.device) -> Tensor:
    """One row of 0/1 per edit over the nine classes, (N,9)."""
    rows = torch.zeros(len(choices), MASKFACEGAN.num_classes)
    for row, classes in enumerate(choices):
        rows[row, [MASKFACEGAN.id(label) for label in classes]] = 1
    return rows.to(device)


def region(probabilities: Tensor, rows: Tensor) -> Tensor:
    """Probability of belonging to the selected classes: (N,9,H,W), (N,9) -> (N,1,H,W) in [0, 1]."""
    return (probabilities * rows[:, :, None, None]).sum(1, keepdim=True).clamp(0, 1)


@dataclass
class EditMasks:
    """The masks of N edits. Those that follow the edit are updated in place, so that a captured graph sees them.

    appearance: (N,1,S,S), S_skin(I).   released: (N,1,S,S), what the edit took from it, S_tar(I_G); 0 at first. The
                appearance term weighs clamp(appearance - released, 0, 1), paper eq. 7.
    outline:    (N,1,s,s) at the parser's size: first_outline = S_shape(I), and where hair may grow, later clamp(
                S_shape(I) + S_shape(I_G), 0, 1), paper eq. 8. The same classes of the generated image are compared.
    blend:      (N,1,S,S), B without what follows the generated image.
    target, shape, follows, component: (N,9) selections.   portion: (N), the sized component's share of the input.
    is_dynamic, grows_shape: (N,1,1,1), 1 where the edit's masks follow.
    """

    appearance: Tensor
    released: Tensor
    outline: Tensor
    blend: Tensor
    target: Tensor
    shape: Tensor
    follows: Tensor
    component: Tensor
    portion: Tensor
    is_dynamic: Tensor
    grows_shape: Tensor
    first_outline: Tensor

    @classmethod
    def of(cls, probabilities: Tensor, plans: Sequence[EditPlan], size_px: int) -> EditMasks:
        """From the parse (N,9,s,s) of the input images, for images of size_px."""
        device = probabilities.device

        def rows(name: str) -> Tensor:
            return selection([getattr(plan, name) for plan in plans], device)

        def flags(name: str) -> Tensor:
            return torch.tensor([float(getattr(plan, name)) for plan in plans], device=device).view(-1, 1, 1, 1)

        appearance = resize_mask(region(probabilities, rows("appearance")), size_px)
        component = selection([(plan.component,) if plan.component else () for plan in plans], device)
        outline = region(probabilities, rows("shape"))
        return cls(
            appearance=appearance,
            released=torch.zeros_like(appearance),
            outline=outline.clone(),
            blend=resize_mask(region(probabilities, rows("blend")), size_px),
            target=rows("target"),
            shape=rows("shape"),
            follows=rows("follows"),
            component=component,
            portion=portion(probabilities, component),
            is_dynamic=flags("is_dynamic"),
            grows_shape=flags("grows_shape"),
            first_outline=outline,
        )

    def relax(self, probabilities: Tensor) -> None:
        """Follow the parse (N,9,s,s) of the generated images: release what the target covers now, let hair grow."""
        made = region(probabilities, self.target) * self.is_dynamic
        self.released.copy_(resize_mask(made, self.released.shape[-1]))
        grown = region(probabilities, self.shape) * self.grows_shape
        self.outline.copy_((self.first_outline + grown).clamp(0, 1))

    def blend_with(self, probabilities: Tensor) -> Tensor:
        """B (N,1,S,S) given the parse of the final generated images."""
        followed = resize_mask(region(probabilities, self.follows), self.blend.shape[-1])
        return (self.blend + followed).clamp(0, 1)


def portion(probabilities: Tensor, rows: Tensor) -> Tensor:
    """Share of the picture that the selected classes cover (paper, eq. 5): (N,9,H,W), (N,9) -> (N)."""
    return (probabilities.mean((2, 3)) * rows).sum(1)


def check_regions(probabilities: Tensor, plans: Sequence[EditPlan], config: MaskFaceGANConfig) -> None:
    """Raise MissingRegionError where a target class of an edit covers less than `config.min_region_share`.

    A global edit needs the face's skin alone. Reads the shares back once, before anything is optimised.
    """
    shares = probabilities.mean((2, 3)).tolist()
    for share, plan in zip(shares, plans, strict=True):
        for label in ("skin",) if plan.is_global else plan.target:
            covered = share[MASKFACEGAN.id(label)]
            if covered < config.min_region_share:
                asked = ", ".join(plan.values) or f"the size of {plan.component}"
                raise MissingRegionError(
                    f"maskfacegan: {label} must be in the picture to edit {asked}, got {covered:.2%} of the crop; "
                    "use a photo that shows it, or another attribute"
                )
