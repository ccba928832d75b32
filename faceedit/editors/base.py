# SPDX-License-Identifier: Apache-2.0
"""What an edit is asked for (request values), what it gives back (`EditedFace`), and the protocol that joins them.

An editor declares the request types it accepts; any other request is refused by `check_request` with an error that
names the editors which do accept it. Editors see aligned faces only: photos, detection and paste-back belong to
`faceedit.pipeline`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from faceedit.attributes import CELEBA, MAGGAN, check_attribute, complete_request
from faceedit.devices import resolve_device
from faceedit.errors import (
    OutOfRangeError,
    UnknownAttributeError,
    UnknownNameError,
    UsageError,
    closest_names,
    suggestion,
)

if TYPE_CHECKING:
    from faceedit.alignment import Alignment
    from faceedit.maskfacegan.outcome import Progress
    from faceedit.parsing import FaceRecord


@dataclass(frozen=True, slots=True)
class AttributeEdit:
    """Named attributes and the intensity each should have afterwards: 0 absent, 1 fully present.

    Both ends are commands: 1 always pushes towards the attribute and 0 always away from it, whatever a classifier
    believes the face has. A value between moves from the estimated present state to that intensity.
    `keep` names attributes that must not change along, "hair" the hair's own: what a request implies for them (setting
    one hair colour takes the others away) is left out, and an optimising editor holds them where the face has them.

    Raises: UsageError when empty; OutOfRangeError for a value outside [0, 1] or not finite.
    """

    values: Mapping[str, float]
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise UsageError(
                f"AttributeEdit: values must map names to numbers, got {type(self.values).__name__}; "
                'write e.g. {"Blond_Hair": 1.0}'
            )
        if not self.values:
            raise UsageError("AttributeEdit: values must name at least one attribute, got none; set e.g. Blond_Hair=1")
        for name in self.values:
            if not isinstance(name, str):
                raise UsageError(f"AttributeEdit: an attribute must be named, got {name!r}; write e.g. Blond_Hair")
        values = {
            name: _number(value, f"AttributeEdit: {name} must be a number between 0 and 1", f"try {name}=1.0")
            for name, value in self.values.items()
        }
        object.__setattr__(self, "values", values)
        for name, value in self.values.items():
            if not (math.isfinite(value) and 0.0 <= value <= 1.0):
                raise OutOfRangeError(
                    f"AttributeEdit: {name} must be between 0 and 1, got {value:g}; 0 removes it, 1 sets it fully"
                )


def _number(value: object, expected: str, advice: str) -> float:
    """A plain float, of numpy's and torch's numbers too. Raises UsageError."""
    try:
        return float("text" if isinstance(value, str | bytes) else value)  # type: ignore[arg-type]
    except (TypeError, ValueError, RuntimeError):
        raise UsageError(f"{expected}, got {value!r}; {advice}") from None


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
    """Scale one component (a class name of the editor's label scheme): 1 keeps its size.

    attributes: what is set along with it, if anything.
    Raises: UsageError when the scale is no number; OutOfRangeError unless 0.5 <= scale <= 2.
    """

    component: str
    scale: float
    attributes: AttributeEdit | None = None

    def __post_init__(self) -> None:
        scale = _number(self.scale, "ComponentSize: scale must be a number between 0.5 and 2", "1 keeps the size")
        object.__setattr__(self, "scale", scale)
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
    alignment:      the square of the photo that the images show; None: the face record's own.
    details:        what else the editor has to report, ready for JSON.
    opacity:        1×1×S×S in [0, 1]: how much of the photo's own detail `after` hides; None: all of it shows through.
    refine:         whether hair in `region` is refined against the photo; not where hair goes, since pixels in which it
                    mixes with what is beside it change whole.
    dyes:           whether hair gets another colour, which goes on outside the square (`faceedit.dyeing`); the images
                    are then in the face record's own alignment.
    """

    before: Tensor
    after: Tensor
    region: Tensor
    parts: tuple[str, ...]
    requested: Mapping[str, float] = field(default_factory=dict)
    alignment: Alignment | None = None
    details: Mapping[str, Any] = field(default_factory=dict)
    opacity: Tensor | None = None
    refine: bool = True
    dyes: bool = False


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


@runtime_checkable
class Watchable(Protocol):
    """An editor whose edits take long enough to be watched, and stopped. It has both methods, or is not watched."""

    def watch(
        self, observe: Callable[[Progress], None] | None, every: int = 10, should_stop: Callable[[], bool] | None = None
    ) -> None:
        """From now on report progress every `every` iterations and ask before each one whether to stop."""

    def caution(self, request: EditRequest) -> str:
        """What a person should know before waiting for this edit; "" for nothing."""


@dataclass(frozen=True, slots=True)
class EditorSpec:
    """How an editor is found and what it understands: its module and class, request types and attribute names.

    presets: names of its configurations, the first one is the default; () when there is nothing to choose.
    """

    name: str
    module: str
    class_name: str
    accepts: tuple[type, ...]
    attributes: tuple[str, ...] = ()
    presets: tuple[str, ...] = ()


EDITORS: dict[str, EditorSpec] = {
    "maggan": EditorSpec("maggan", "faceedit.editors.maggan", "MagGANEditor", (AttributeEdit,), MAGGAN),
    "maskfacegan": EditorSpec(
        "maskfacegan",
        "faceedit.editors.maskfacegan",
        "MaskFaceGANEditor",
        (AttributeEdit, ComponentSize),
        CELEBA,
        ("default", "code", "fast"),
    ),
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
    attributes = request if isinstance(request, AttributeEdit) else getattr(request, "attributes", None)
    if attributes is not None:
        for attribute in attributes.values:
            _check_known(spec, attribute, spec.attributes)
        complete_request(attributes.values, spec.attributes)
        for kept in attributes.keep:
            _check_known(spec, kept, (*spec.attributes, "hair"))


def _check_known(spec: EditorSpec, attribute: str, known: Sequence[str]) -> None:
    """Refuse an attribute outside the editor's vocabulary; another editor that knows it, or what is meant, is named."""
    every = {name for other in EDITORS.values() for name in other.attributes}
    meant = closest_names(attribute, sorted(every), 1, 0.8)  # the attribute itself where an editor has it
    if attribute not in known and meant and meant[0] not in known:
        able = " or ".join(other.name for other in EDITORS.values() if meant[0] in other.attributes)
        advice = f"the editor {able} knows " + ("it" if meant[0] == attribute else f"{meant[0]}")
        raise UnknownAttributeError(
            f"{spec.name}: attribute must be one of {', '.join(spec.attributes)}, got {attribute}; {advice}"
        )
    check_attribute(attribute, known)


def check_preset(spec: EditorSpec, preset: str) -> None:
    """Refuse a preset that the editor does not have. Raises UnknownNameError; "" is the editor's default."""
    if preset and preset not in spec.presets:
        advice = suggestion(preset, spec.presets) if spec.presets else "leave it out"
        raise UnknownNameError(f"{spec.name}: preset must be one of its configurations, got {preset!r}; {advice}")


def weight_files(editor: Editor) -> list[Path]:
    """The files that an editor's results depend on: its own list where it has several, else what its weights name."""
    from faceedit.registry import find

    files: Sequence[Path] = getattr(editor, "files", ())
    return list(files) if files else [find(editor.weights).path]


def load_editor(
    name: str, weights: str | Path = "starter", device: str | torch.device = "cpu", preset: str = ""
) -> Editor:
    """Load an editing system by name.

    Args:    name one of `EDITORS`; weights a tag of the registry ("starter" means "<name>-starter"), a registry name
             or a path to .safetensors (maskfacegan: or to a bundle, .json); device "cpu", "cuda", "cuda:N" or "auto";
             preset one of the editor's configurations, where it has some.
    Raises:  UnknownNameError, WeightsError, DeviceError.
    """
    spec = editor_spec(name)
    check_preset(spec, preset)
    editor_class = getattr(importlib.import_module(spec.module), spec.class_name)
    options = {"preset": preset} if preset else {}
    editor: Editor = editor_class.load(weights, resolve_device(device), **options)
    return editor
