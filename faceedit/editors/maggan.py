# SPDX-License-Identifier: Apache-2.0
"""The `maggan` editor: attributes by a signed difference, confined to the facial parts that each concerns.

Source: Wei et al. 2020 (MagGAN); network in `faceedit.networks.maggan`, part relations in `faceedit.relations`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.attributes import MAGGAN, complete_request
from faceedit.classification import STARTER, attribute_probabilities, load_classifier
from faceedit.editors.base import EDITORS, AttributeEdit, EditedFace, EditRequest, check_request
from faceedit.labels import CELEBAMASK_HQ
from faceedit.networks.classifier import AttributeClassifier
from faceedit.networks.maggan import EditLayers, MagGANGenerator
from faceedit.networks.resizing import resize
from faceedit.parsing import FaceRecord
from faceedit.relations import Relations, influence_mask, mask_guided_conditioning, related_parts, relation_matrices

# `natural` adds the parts that people expect to change along (nose, ears and neck with the skin tone); the paper's own
# matrices remain what training losses and the MRE metric use.
PRESET = "natural"
# What a change takes away whole: the photo's own detail there must not come back with its pixels.
_REMOVED = {"Bald": (1, "hair"), "Eyeglasses": (-1, "eye_g"), "Mouth_Slightly_Open": (-1, "mouth")}
_DYES = ("Black_Hair", "Blond_Hair", "Brown_Hair")
_OPEN_MOUTH = 0.3  # of the lips and what lies between them: the gap of a mouth that is open


def attribute_difference(
    requested: Mapping[str, float], present: Mapping[str, float], keep: Collection[str] = ()
) -> dict[str, float]:
    """The signed difference, in [-1, 1], that takes a face to the requested intensities.

    A requested 1 gives +1 and a requested 0 gives -1 whatever `present` says: the request is a command, and the
    estimate may be wrong. A value v between gives v - s, where s is the estimated state, 0 or 1. Attributes that the
    request rules out (Black_Hair when Blond_Hair is set) get -1 only if they are estimated to be there.

    Args: requested name -> value in [0, 1]; present name -> probability, unknown ones count as absent; keep, names that
          make way for nothing ("hair": all hair attributes).
    Raises: UnknownAttributeError; UsageError when requested attributes exclude each other.
    """
    difference: dict[str, float] = {}
    for name, value in complete_request(requested, MAGGAN).items():
        state = 1.0 if present.get(name, 0.0) >= 0.5 else 0.0
        if name not in requested:
            kept = name in keep or ("hair" in keep and name.endswith("_Hair"))
            change = 0.0 if kept else -state
        elif value in (0.0, 1.0):
            change = 2.0 * value - 1.0
        else:
            change = value - state
        if change:
            difference[name] = change
    return difference


def shown_by_mask(requested: Mapping[str, float], mask: Tensor) -> tuple[str, ...]:
    """Attributes requested in full that the mask 1×19×H×W shows to be there: an open mouth. To open it again would
    draw a second one."""
    lips = mask[0, [CELEBAMASK_HQ.id(part) for part in ("u_lip", "l_lip")]].sum()
    gap = mask[0, CELEBAMASK_HQ.id("mouth")].sum()
    asked = requested.get("Mouth_Slightly_Open") == 1.0
    return ("Mouth_Slightly_Open",) if asked and gap > 0 and gap >= _OPEN_MOUTH * (gap + lips) else ()


def taken_away(change: Mapping[str, float], mask: Tensor, size_px: int) -> Tensor:
    """Where, and how far, a change takes a part of the mask 1×19×H×W away, 1×1×S×S in [0, 1]: strands, frames and teeth
    are gone with it, however little of them the network's own pixels can show."""
    gone = mask.new_zeros(1, 1, size_px, size_px)
    for name, (sign, part) in _REMOVED.items():
        if (amount := sign * change.get(name, 0.0)) > 0:
            where = resize(mask[:, CELEBAMASK_HQ.id(part)][:, None], size_px)
            # Single strands reach past the mask's rim.
            gone = torch.maximum(gone, amount * F.max_pool2d(where, 5, 1, 2))
    return gone.clamp(0, 1)


class MagGANEditor:
    """Attribute editing by MagGAN's generator.

    Args: generator in any configuration that reads CelebAMask-HQ masks; weights is its name for reports; classifier
          estimates which attributes the face has (None: none of them is assumed); files, what the networks were read
          from.
    """

    name = "maggan"
    accepts: tuple[type, ...] = (AttributeEdit,)

    def __init__(
        self,
        generator: MagGANGenerator,
        weights: str = "custom",
        classifier: AttributeClassifier | None = None,
        files: Sequence[Path] = (),
    ) -> None:
        self.generator = generator.eval()
        self.weights = weights
        self.classifier = classifier
        self.files = tuple(files)
        self.device = generator.relation_plus.device
        # What the generator learned to read, unless that is the paper's.
        preset = generator.config.relation_preset
        own = relation_matrices(CELEBAMASK_HQ, PRESET if preset == "paper" else preset)
        self.relations = Relations(*(matrix.to(self.device) for matrix in own))

    @classmethod
    def load(cls, weights: str | Path, device: torch.device) -> MagGANEditor:
        """Load from the registry: the tag "starter", a registry name or a path. Raises WeightsError."""
        from faceedit.registry import find, load_network

        generator = load_network(weights, device, kind="maggan")
        assert isinstance(generator, MagGANGenerator)
        row = find(weights, "maggan")
        classifier = load_classifier(str(device))
        files = [row.path] if classifier is None else [row.path, find(STARTER).path]
        return cls(generator, row.name if row.sha256 else str(row.path), classifier, files)

    def forward(self, image: Tensor, difference: Tensor, mask: Tensor) -> Tensor:
        """The pure graph that is exported and served: N×3×S×S, N×13, N×19×H×W -> N×3×S×S in [-1, 1]."""
        return self._layers(image, difference, mask).image

    def _layers(self, image: Tensor, difference: Tensor, mask: Tensor) -> EditLayers:
        half = resize(mask, self.generator.config.size_px // 2)
        return self.generator.layers(image, mask_guided_conditioning(difference, half, self.relations))

    @torch.no_grad()
    def apply(self, face: FaceRecord, request: EditRequest, seed: int = 0) -> EditedFace:
        """Set the requested attributes of one aligned face. Deterministic: the seed changes nothing here.

        What the mask shows to be there already is left as it is; `details["already_there"]` names it.
        """
        check_request(EDITORS[self.name], request)
        assert isinstance(request, AttributeEdit)
        present = attribute_probabilities(self.classifier, face.crop) if self.classifier is not None else {}
        shown = shown_by_mask(request.values, face.mask)
        change = attribute_difference(request.values, present, request.keep)
        change = {name: value for name, value in change.items() if name not in shown}
        difference = torch.tensor([[change.get(name, 0.0) for name in MAGGAN]])
        side = (self.generator.config.size_px, self.generator.config.size_px)
        before = F.interpolate(face.crop, size=side, mode="bilinear", antialias=True, align_corners=False)
        mask = face.mask.to(self.device)
        after, opacity = self._layers(before.to(self.device), difference.to(self.device), mask)
        gone = taken_away(change, mask, side[0])
        output = self.generator.config.output
        hides_detail = output == "layered" or (output == "residual" and bool(gone.any()))
        # The region shows only what was asked for: an attribute that merely makes way stays inside the same parts.
        asked = torch.tensor([[change.get(name, 0.0) if name in request.values else 0.0 for name in MAGGAN]])
        region = influence_mask(asked.to(self.device), mask, self.relations)
        region = torch.maximum(region, resize(gone, region.shape[-1])).cpu()
        return EditedFace(
            before,
            after.cpu(),
            region,
            _touched_parts(change, request.values),
            change,
            details={"already_there": list(shown)} if shown else {},
            opacity=torch.maximum(opacity, gone).cpu() if hides_detail else None,
            refine=change.get("Bald", 0.0) <= 0,
            dyes=change.get("Bald", 0.0) <= 0 and any(name in change for name in _DYES if name in request.values),
        )


def _touched_parts(change: Mapping[str, float], requested: Mapping[str, float]) -> tuple[str, ...]:
    """Class names, in id order, of every part that a requested change may touch."""
    touched: set[str] = set()
    for name, amount in change.items():
        if name in requested:
            raised, lowered = related_parts(name, PRESET)
            touched |= raised if amount > 0 else lowered
    return tuple(part for part in CELEBAMASK_HQ.classes if part in touched)
