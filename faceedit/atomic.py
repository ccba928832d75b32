# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block ends well, and disappears when it does not.

    Whatever the block or the disk raises passes through, an OSError above all; `path` then is as it was.
    """
    part = Path(path).with_name(f".faceedit-{secrets.token_hex(6)}.part")
    try:
        # "x" creates the file with the user's own permissions, which tempfile would narrow.
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        with suppress(OSError):  # a part that was never made must not hide why
            part.unlink(missing_ok=True)


def unusable_name(path: str | os.PathLike[str]) -> str:
    """Why the system takes `path` for no file's name at all (too long, say); "" when it does, whatever lies there."""
    try:
        os.lstat(path)
    except (FileNotFoundError, PermissionError):
        return ""
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return ""


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text at once or not at all. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
