# SPDX-License-Identifier: Apache-2.0
"""`faceedit weights`: what is installed, what each file says about itself, and other people's checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from faceedit.cli import options
from faceedit.cli.files import check_distinct
from faceedit.cli.output import print_json
from faceedit.errors import FaceEditError

if TYPE_CHECKING:
    from faceedit.registry import WeightSpec

app = typer.Typer(
    help="List, describe and import weights.\n\nExample: faceedit weights list",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@app.command("list")
def list_(json: options.Json = False) -> None:
    """List the registered weights.

    Example: faceedit weights list
    """
    from faceedit.registry import list_weights

    rows = [_row(spec) for spec in list_weights()]
    if json:
        print_json(rows)
        return
    for row in rows:
        typer.echo(
            f"{row['name']:<24} UNUSABLE: {row['problem']}"
            if row["problem"]
            else f"{row['name']:<24} {row['kind']:<12} {row['mib']:6.1f} MiB  {row['licence']:<12} "
            f"{row['training_data']}"
        )


def _row(spec: WeightSpec) -> dict[str, Any]:
    """What the list says of one file; a file that cannot be read is a row with a problem, for the others still can."""
    kind, licence, training_data, problem = "unknown", "", "", ""
    try:
        header = spec.header
        kind, licence, training_data = header.kind, header.licence, header.training_data
    except FaceEditError as error:
        problem = str(error)
    return {
        "name": spec.name,
        "kind": kind,
        "mib": round(spec.bytes / 2**20, 2),
        "licence": licence,
        "training_data": training_data,
        "problem": problem,
    }


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
        if value == "":  # no problem; no address, for what ships with the package
            continue
        typer.echo(f"{key + ':':<16} {value}")
    if card:
        typer.echo(f"\n{card.rstrip()}")


@app.command("import")
def import_(
    kind: Annotated[
        str, typer.Argument(help="e4e, stylegan2, maskfacegan-classifier or maskfacegan-parser.", show_default=False)
    ],
    file: Annotated[Path, typer.Argument(help="The checkpoint: .pkl, .pt or .safetensors.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="The .safetensors file to write.", show_default=False)],
    part: Annotated[
        str,
        typer.Option(
            "--part",
            help="Which network of the file, for stylegan2: ema (the usual one), generator or discriminator.",
            show_default=False,
        ),
    ] = "",
    licence: Annotated[
        str, typer.Option("--licence", help="The licence that the weights came with, an SPDX identifier.")
    ] = "LicenseRef-unstated",
    training_data: Annotated[
        str, typer.Option("--training-data", metavar="TEXT", help="What the weights were trained on.")
    ] = "unstated",
    json: options.Json = False,
) -> None:
    """Convert a checkpoint of another project; nothing that the file contains is ever run.

    Example: faceedit weights import stylegan2 ffhq.pkl -o ffhq.safetensors
    """
    from faceedit.config import to_dict
    from faceedit.importers import import_weights

    check_distinct("weights import", {"FILE": file, "--output": output})
    header = import_weights(kind, file, output, part=part, licence=licence, training_data=training_data)
    if json:
        print_json({"file": str(output), **to_dict(header)})
        return
    typer.echo(f"{output}: {header.kind}, {header.config['size_px']} px, from {header.recipe.partition(': ')[2]}")
