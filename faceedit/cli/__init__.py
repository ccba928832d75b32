# SPDX-License-Identifier: Apache-2.0
"""The `faceedit` command. `main` is the console entry point; each command group lives in its own file.

Nothing here imports torch: every command imports what it needs when it runs, so `faceedit --help` answers at once.
"""

from faceedit.cli.app import app, main

__all__ = ["app", "main"]
