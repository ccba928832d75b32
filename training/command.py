# SPDX-License-Identifier: Apache-2.0
"""What the commands `python -m faceedit.training.…` share: errors as one line, exit codes, progress on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable

from faceedit.errors import INTERRUPTED, FaceEditError, OutOfRangeError


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


def require_option(command: str, option: str, value: int, least: int, advice: str) -> None:
    """Raise OutOfRangeError unless a command's number is at least `least`."""
    if value < least:
        raise OutOfRangeError(f"{command}: {option} must be {least} or more, got {value}; {advice}")
