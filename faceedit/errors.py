# SPDX-License-Identifier: Apache-2.0
"""Typed errors. Each message is one line: `<function>: <argument> must be <expected>, got <actual>; <what to do>`.

`exit_code` is what the command line returns: 2 when the request itself is wrong (fix the command), 1 when a
well-formed request could not be carried out (fix the photo, the disk or the installation).
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

INTERRUPTED = 130
"""The exit code of what Ctrl-C or SIGTERM ended."""


class FaceEditError(Exception):
    """Base of every error that faceedit raises on purpose; anything else that escapes is a bug."""

    exit_code: int = 1


class UsageError(FaceEditError, ValueError):
    """The request is wrong whatever the photo: an option, a combination or a value that no input can satisfy."""

    exit_code = 2


class UnknownNameError(UsageError):
    """A name (editor, scheme, weights, configuration key) that does not exist."""


class UnknownAttributeError(UnknownNameError):
    """An attribute name outside the editor's vocabulary."""


class OutOfRangeError(UsageError):
    """A number outside its documented range."""


class ImageReadError(FaceEditError):
    """The source is missing, empty, truncated, or not an image."""


class ImageTooLargeError(ImageReadError):
    """The source exceeds the byte or pixel limit; refused from its header, before decoding."""


class ImageWriteError(FaceEditError):
    """The destination cannot be written."""


class FaceError(FaceEditError):
    """Something about the face in the photo forbids the edit."""


class NoFaceError(FaceError):
    """No face was found, or fewer than the requested index."""


class FaceTooSmallError(FaceError):
    """The face has too few pixels to be parsed or edited."""


class FaceCutOffError(FaceError):
    """Too much of the face lies outside the photo."""


class WeightsError(FaceEditError):
    """Weights are missing, damaged, fail their checksum, belong to another network, or give no finite image."""


class MissingExtraError(FaceEditError, ImportError):
    """An optional dependency is not installed; the message names the extra to install."""


class DeviceError(FaceEditError):
    """The requested device or backend cannot run here."""


def closest_names(name: str, allowed: Iterable[str], count: int = 3, cutoff: float = 0.4) -> list[str]:
    """Up to `count` allowed names that resemble `name`, best first, ignoring case, spaces and dashes."""
    plain = {candidate.lower().replace("-", "_").replace(" ", "_"): candidate for candidate in allowed}
    wanted = name.lower().replace("-", "_").replace(" ", "_")
    return [plain[match] for match in get_close_matches(wanted, plain, n=count, cutoff=cutoff)]


def suggestion(name: str, allowed: Iterable[str], count: int = 3) -> str:
    """The `<what to do>` part of an unknown-name message: the closest names, or all of them when none is close."""
    names = list(allowed)
    close = closest_names(name, names, count)
    return f"did you mean {' or '.join(close)}?" if close else f"use one of {', '.join(names)}"
