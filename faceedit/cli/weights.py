# SPDX-License-Identifier: Apache-2.0
"""`faceedit weights`: what is installed, and what each file says about itself."""

from __future__ import annotations

import typer

app = typer.Typer(help="List and describe weights.", no_args_is_help=True, rich_markup_mode=None)
