# SPDX-License-Identifier: Apache-2.0
"""One file per editing system behind one small protocol; see `base` for requests and results."""

from faceedit.editors.base import (
    AttributeEdit,
    ComponentSize,
    EditedFace,
    Editor,
    EditRequest,
    ExemplarEdit,
    MaskEdit,
    load_editor,
)

__all__ = [
    "AttributeEdit",
    "ComponentSize",
    "EditRequest",
    "EditedFace",
    "Editor",
    "ExemplarEdit",
    "MaskEdit",
    "load_editor",
]
