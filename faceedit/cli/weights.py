# SPDX-License-Identifier: Apache-2.0
"""`faceedit weights`: what is installed, and what each file says about itself."""

from __future__ import annotations

from typing import Annotated

import typer

from faceedit.cli import options
from faceedit.cli.output import print_json

app = typer.Typer(help="List and describe weights.", no_args_is_help=True, rich_markup_mode=None)


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the registered weights.

    Example: faceedit weights list
    """
    from faceedit.registry import list_weights

    rows = [
        {
            "name": row.name,
            "kind": row.header.kind,
            "mib": round(row.bytes / 2**20, 2),
            "licence": row.header.licence,
            "training_data": row.header.training_data,
        }
        for row in list_weights()
    ]
    if json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(
            f"{row['name']:<24} {row['kind']:<12} {row['mib']:6.1f} MiB  {row['licence']:<12} {row['training_data']}"
        )


@app.command("show")
def show(
    name: Annotated[str, typer.Argument(help="A registered name or a .safetensors file.", show_default=False)],
    json: options.Json = False,
) -> None:
    """Show everything recorded about some weights: configuration, data, metrics, licence and model card.

    Example: faceedit weights show parser-starter
    """
    from faceedit.registry import describe

    known = describe(name)
    if json:
        print_json(known)
        return
    card = known.pop("card")
    for key, value in known.items():
        typer.echo(f"{key + ':':<16} {value}")
    if card:
        typer.echo(f"\n{card.rstrip()}")
