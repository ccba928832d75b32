# SPDX-License-Identifier: Apache-2.0
"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """A file beside `path` that takes its place when the block ends well, and disappears when it does not.

    A symbolic link stays one: the file it points to is replaced. A file's permissions stay too.
    Whatever the block or the disk raises passes through, an OSError above all; `path` then is as it was. What exists
    and is no regular file is refused with a FileExistsError.
    """
    if (reason := unusable_target(path)) and not unusable_name(path):  # opening tells what is wrong with a name
        raise FileExistsError(errno.EEXIST, reason, str(path))
    target = Path(os.path.realpath(path))
    part = target.with_name(f".faceedit-{secrets.token_hex(6)}.part")
    try:
        # "x" creates the file with the user's own permissions, which tempfile would narrow.
        with part.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
            with suppress(OSError):  # a new file has no permissions to keep, and some disks know of none
                os.fchmod(file.fileno(), stat.S_IMODE(target.stat().st_mode))
        os.replace(part, target)
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


def unusable_target(path: str | os.PathLike[str]) -> str:
    """Why no file may be written at `path`: a name that is none, or something there that a file would replace for
    good; "" when one may."""
    if reason := unusable_name(path):
        return reason
    try:
        mode = os.stat(path).st_mode
    except (FileNotFoundError, PermissionError):
        return ""
    except OSError as error:
        return str(error.strerror or error)
    if stat.S_ISREG(mode):
        return ""
    return "it is a folder" if stat.S_ISDIR(mode) else "it is a device, pipe or socket, which a file would replace"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write UTF-8 text at once or not at all. Raises OSError."""
    with replacing(path) as file:
        file.write(text.encode("utf-8"))
