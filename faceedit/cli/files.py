# SPDX-License-Identifier: Apache-2.0
"""What commands write besides photos: masks, tensors and small text files, each whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from faceedit.atomic import replacing, unusable_target
from faceedit.errors import ImageWriteError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from faceedit.labels import LabelScheme


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """`atomic.replacing`, whose OSError becomes an ImageWriteError that names the file."""
    try:
        with replacing(path) as file:
            yield file
    except OSError as error:
        raise ImageWriteError(
            f"write: path must be writable, got {path} ({error.strerror or error}); choose another place"
        ) from error


def check_folder(path: Path) -> None:
    """Raise ImageWriteError now if `path` could not be written later, before any work is done for it."""
    if reason := unusable_target(path):
        raise ImageWriteError(f"write: path must be writable, got {path} ({reason}); choose another place")
    folder = os.path.dirname(os.path.realpath(path))
    if not os.path.isdir(folder) or not os.access(folder, os.W_OK | os.X_OK):
        raise ImageWriteError(f"write: path must be a file in a writable folder, got {path}; choose another place")


def check_distinct(command: str, files: Mapping[str, Path | None]) -> None:
    """Raise UsageError where two of a command's files are one: a result would replace the photo or another result.

    Args: files by what the command line calls them; None is a file that was not asked for.
    """
    seen: dict[Path, str] = {}
    for name, path in files.items():
        if path is None:
            continue
        other = seen.setdefault(Path(os.path.realpath(path)), name)
        if other != name:
            raise UsageError(
                f"{command}: {name} must be a file of its own, got {path}, which is {other} too; choose another name"
            )


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text. Raises ImageWriteError when it cannot be written."""
    with _replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_mask(path: Path, labels: NDArray[np.uint8], scheme: LabelScheme) -> None:
    """Write a label map (uint8 H×W) as an indexed PNG with the scheme's palette. Raises ImageWriteError."""
    from PIL import Image

    image = Image.fromarray(labels).convert("L")
    image.putpalette(scheme.png_palette())  # turns L into P: the pixel values stay the class ids
    with _replacing(path) as file:
        image.save(file, format="PNG", optimize=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write a safetensors file with metadata. Raises ImageWriteError when it cannot be written."""
    from safetensors.torch import save

    with _replacing(path) as file:
        file.write(save({name: one.cpu().contiguous() for name, one in tensors.items()}, metadata=dict(about)))


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises ImageWriteError when that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageWriteError(
            f"write: folder must be creatable, got {path} ({error.strerror or error}); choose another place"
        ) from error
