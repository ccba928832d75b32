# SPDX-License-Identifier: Apache-2.0
"""Edit portraits under the guidance of a semantic face mask.

    import faceedit
    editor = faceedit.load_editor("maggan", weights="starter", device="cpu")
    result = faceedit.edit("me.jpg", attributes={"Blond_Hair": 1.0}, editor=editor)
    result.save("out.png")

Importing this costs nothing: each public name is looked up when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from faceedit import kernels
    from faceedit.editors.base import load_editor
    from faceedit.errors import FaceEditError
    from faceedit.pipeline import EditResult, edit
    from faceedit.registry import list_weights, load_network

__all__ = [
    "EditResult",
    "FaceEditError",
    "__version__",
    "edit",
    "kernels",
    "list_weights",
    "load_editor",
    "load_network",
]

_HOMES = {
    "EditResult": "faceedit.pipeline",
    "FaceEditError": "faceedit.errors",
    "edit": "faceedit.pipeline",
    "list_weights": "faceedit.registry",
    "load_editor": "faceedit.editors.base",
    "load_network": "faceedit.registry",
}


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("faceedit.kernels")
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'faceedit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
