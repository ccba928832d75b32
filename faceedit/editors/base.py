# SPDX-License-Identifier: Apache-2.0
"""What an edit is asked for (request values), what it gives back (`EditedFace`), and the protocol that joins them.

An editor declares the request types it accepts; any other request is refused by `check_request` with an error that
names the editors which do accept it. Editors see aligned faces only: photos, detection and paste-back belong to
`faceedit.pipeline`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from torch import Tensor

from faceedit.attributes import MAGGAN, complete_request
from faceedit.devices import resolve_device
from faceedit.errors import OutOfRangeError, UnknownNameError, UsageError, suggestion

if TYPE_CHECKING:
    from faceedit.parsing import FaceRecord


@dataclass(frozen=True, slots=True)
class AttributeEdit:
    """Named attributes and the intensity each should have afterwards: 0 absent, 1 fully present.

    Both ends are commands: 1 always pushes towards the attribute and 0 always away from it, whatever a classifier
    believes the face has. A value between moves from the estimated present state to that intensity.

    Raises: UsageError when empty; OutOfRangeError for a value outside [0, 1] or not finite.
    """

    values: Mapping[str, float]

    def __post_init__(self) -> None:
        if not self.values:
            raise UsageError("AttributeEdit: values must name at least one attribute, got none; set e.g. Blond_Hair=1")
        for name, value in self.values.items():
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise OutOfRangeError(
                    f"AttributeEdit: {name} must be between 0 and 1, got {value:g}; 0 removes it, 1 sets it fully"
                )


@dataclass(frozen=True, slots=True)
class MaskEdit:
    """A new label map for the aligned face: int64 1×S×S in the CelebAMask-HQ scheme."""

    labels: Tensor


@dataclass(frozen=True, slots=True)
class ExemplarEdit:
    """Take the named regions (class names of the label scheme) from another face; optionally filter attributes.

    keep / drop: attributes of the exemplar that must, or must not, be carried over.
    """

    exemplar: FaceRecord
    regions: tuple[str, ...]
    keep: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ComponentSize:
    """Scale one component (a class name of the label scheme): 1 keeps its size.

    Raises: OutOfRangeError unless 0.5 <= scale <= 2.
    """

    component: str
    scale: float

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and 0.5 <= self.scale <= 2.0):
            raise OutOfRangeError(
                f"ComponentSize: scale must be between 0.5 and 2, got {self.scale:g}; 1 keeps the size"
            )


EditRequest = AttributeEdit | MaskEdit | ExemplarEdit | ComponentSize


@dataclass(frozen=True, slots=True)
class EditedFace:
    """One edited aligned face.

    before, after:  1×3×S×S in [-1, 1]: the editor's input and output at the editor's own resolution.
    region:         1×1×S×S in [0, 1]: where the request is allowed to show; 0 keeps the photo's pixels.
    parts:          names of the label scheme's classes that `region` was built from.
    requested:      the signed attribute difference that was applied, by name (empty for non-attribute requests).
    """

    before: Tensor
    after: Tensor
    region: Tensor
    parts: tuple[str, ...]
    requested: Mapping[str, float] = field(default_factory=dict)


@runtime_checkable
class Editor(Protocol):
    """One editing system, ready to use: a network, its weights and the requests it understands."""

    @property
    def name(self) -> str:
        """Registry name, e.g. "maggan"."""

    @property
    def weights(self) -> str:
        """The weights in use: registry name or path, for reports."""

    @property
    def accepts(self) -> tuple[type, ...]:
        """The request types that `apply` takes."""

    @property
    def device(self) -> torch.device:
        """Where the network lives."""

    def apply(self, face: FaceRecord, request: EditRequest, seed: int = 0) -> EditedFace:
        """Edit one aligned face. Raises UsageError for a request type outside `accepts`."""


@dataclass(frozen=True, slots=True)
class EditorSpec:
    """How an editor is found and what it understands: its module and class, request types and attribute names."""

    name: str
    module: str
    class_name: str
    accepts: tuple[type, ...]
    attributes: tuple[str, ...] = ()


EDITORS: dict[str, EditorSpec] = {
    "maggan": EditorSpec("maggan", "faceedit.editors.maggan", "MagGANEditor", (AttributeEdit,), MAGGAN),
}


def editor_spec(name: str) -> EditorSpec:
    """The editor called `name`; UnknownNameError with the closest names otherwise."""
    if name not in EDITORS:
        raise UnknownNameError(
            f"load_editor: name must be one of the editors, got {name!r}; {suggestion(name, EDITORS)}"
        )
    return EDITORS[name]


def check_request(spec: EditorSpec, request: EditRequest) -> None:
    """Refuse a request that the editor cannot carry out, before any weights are read.

    Raises: UsageError for a kind of request it does not accept (names the editors that do) or for attributes that
            exclude each other; UnknownAttributeError for an attribute outside its vocabulary.
    """
    if not isinstance(request, spec.accepts):
        wanted = " or ".join(accepted.__name__ for accepted in spec.accepts)
        able = [other.name for other in EDITORS.values() if isinstance(request, other.accepts)]
        advice = f"use the editor {' or '.join(able)}" if able else "no installed editor accepts it"
        raise UsageError(f"{spec.name}: request must be {wanted}, got {type(request).__name__}; {advice}")
    if isinstance(request, AttributeEdit):
        complete_request(request.values, spec.attributes)


def load_editor(name: str, weights: str | Path = "starter", device: str | torch.device = "cpu") -> Editor:
    """Load an editing system by name.

    Args:    name one of `EDITORS`; weights a tag of the registry ("starter" means "<name>-starter"), a registry name
             or a path to .safetensors; device "cpu", "cuda", "cuda:N" or "auto".
    Raises:  UnknownNameError, WeightsError, DeviceError.
    """
    spec = editor_spec(name)
    editor_class = getattr(importlib.import_module(spec.module), spec.class_name)
    editor: Editor = editor_class.load(weights, resolve_device(device))
    return editor
