# SPDX-License-Identifier: Apache-2.0
"""What commands write besides photos: masks and small text files, each whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from faceedit.errors import ImageWriteError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from faceedit.labels import LabelScheme


@contextmanager
def _replacing(path: Path) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block ends well, and disappears when it does not."""
    part = path.with_name(f".faceedit-{secrets.token_hex(6)}.part")
    try:
        with part.open("xb") as file:
            yield file
        os.replace(part, path)
    except OSError as error:
        raise ImageWriteError(
            f"write: path must be writable, got {path} ({error.strerror or error}); choose another place"
        ) from error
    finally:
        part.unlink(missing_ok=True)


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


def make_folder(path: Path) -> None:
    """Create a folder and its parents. Raises ImageWriteError when that is impossible."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ImageWriteError(
            f"write: folder must be creatable, got {path} ({error.strerror or error}); choose another place"
        ) from error
