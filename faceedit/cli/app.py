# SPDX-License-Identifier: Apache-2.0
"""The typer application and its entry point: environment, error lines and exit codes.

Exit codes: 0 done, 1 could not be done, 2 asked wrongly, 130 interrupted. Every failure is one line on stderr.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from faceedit import __version__
from faceedit.cli import batch, bench, doctor, editing, faces, projection, synthesis, train, weights
from faceedit.cli.memory import keep_freed_memory
from faceedit.cli.output import print_error
from faceedit.errors import INTERRUPTED, FaceEditError

# typer may carry its own copy of click, so the base of its usage errors is taken from a public subclass.
_ClickException: type[Exception] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)


class _Commands(TyperGroup):
    """The commands; one that Ctrl-C or SIGTERM ends says so, for typer would end it without a word."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            print_error("interrupted")
            raise typer.Exit(INTERRUPTED) from None


app = typer.Typer(
    name="faceedit",
    cls=_Commands,
    help="Edit portraits under the guidance of a semantic face mask.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
app.command("edit")(editing.edit)
app.command("batch")(batch.batch)
app.command("parse")(faces.parse)
app.command("align")(faces.align)
app.command("project")(projection.project)
app.command("sample")(synthesis.sample)
app.command("synth")(synthesis.synth)
app.command("train")(train.train)
app.add_typer(weights.app, name="weights")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.doctor)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"faceedit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand in ("edit", "batch", "project"):  # which make tensors of the same sizes over and over
        keep_freed_memory()


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def configure_environment() -> None:
    """Settings that torch reads once, while it is imported. Values already in the environment win.

    Transparent huge pages halve the time of large activations (page faults dominate otherwise). OpenMP's threads wait
    awake for some tenths of a millisecond, long enough to get from one layer to the next, and then sleep: asleep at
    once, they are woken for every layer; awake for longer, they stall each parallel region for a scheduler quantum
    where other programs keep the cores busy.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; the installed script passes it to `sys.exit`."""
    configure_environment()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _interrupt)
    try:
        outcome = app(args=arguments, prog_name="faceedit", standalone_mode=False)
    except FaceEditError as error:
        print_error(error)
        return error.exit_code
    except _ClickException as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]  # the whole help, on stderr
            return 2
        print_error(getattr(error, "format_message", error.__str__)())
        return int(getattr(error, "exit_code", 2))
    except (typer.Abort, KeyboardInterrupt):
        print_error("interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away; leave quietly and keep the interpreter from flushing into the pipe.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk under stdout; what concerns a photo or weights has an error of its own
        print_error(f"{error.strerror or type(error).__name__}{f': {error.filename}' if error.filename else ''}")
        return 1
    except (MemoryError, RuntimeError) as error:
        # torch has no class of its own for memory that the CPU cannot give.
        if not isinstance(error, MemoryError) and not re.search("out of memory|not enough memory|allocate", str(error)):
            raise
        print_error("out of memory; use a smaller photo or ask for less at once")
        return 1
    return outcome if isinstance(outcome, int) else 0
