# SPDX-License-Identifier: Apache-2.0
"""What the commands `python -m faceedit.training.…` share: errors as one line, exit codes, progress on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from faceedit.atomic import unusable_name
from faceedit.errors import INTERRUPTED, FaceEditError, OutOfRangeError, UsageError


def run_command(work: Callable[[], object]) -> int:
    """Print what `work` returns. Returns the exit code, by the rules of the command line (faceedit/errors.py).

    What faceedit refuses, a disk that does not take a report, and Ctrl-C are one line on stderr.
    """
    try:
        print(work())
    except FaceEditError as error:
        return _ended(str(error), error.exit_code)
    except OSError as error:
        return _ended(f"{error.strerror or type(error).__name__}{f': {error.filename}' if error.filename else ''}", 1)
    except KeyboardInterrupt:
        return _ended("interrupted", INTERRUPTED)
    return 0


def _ended(line: str, code: int) -> int:
    print(f"error: {' '.join(line.split())}", file=sys.stderr)
    return code


def progress(line: str) -> None:
    """Report a line of progress on stderr: stdout carries the result and nothing else."""
    print(line, file=sys.stderr)


def require_folder(command: str, option: str, folder: Path) -> None:
    """Raise UsageError unless `folder` could be made and written: asked before the work, whose report goes there."""
    reason = unusable_name(folder)
    if not reason:
        nearest = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
        if not nearest.is_dir():
            reason = f"{nearest} is a file"
        elif not os.access(nearest, os.W_OK | os.X_OK):
            reason = f"{nearest} cannot be written"
    if reason:
        raise UsageError(f"{command}: {option} must be a folder to write to, got {folder} ({reason}); name another")


def require_option(command: str, option: str, value: int, least: int, advice: str) -> None:
    """Raise OutOfRangeError unless a command's number is at least `least`."""
    if value < least:
        raise OutOfRangeError(f"{command}: {option} must be {least} or more, got {value}; {advice}")
