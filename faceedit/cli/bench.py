# SPDX-License-Identifier: Apache-2.0
"""`faceedit bench`: measure this installation."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from faceedit.cli.files import check_folder, write_text
from faceedit.cli.output import progress_bar
from faceedit.errors import DeviceError, FaceEditError, UnknownNameError, UsageError, suggestion

app = typer.Typer(
    help="Measure this installation.\n\nExample: faceedit bench kernels --quick",
    no_args_is_help=True,
    rich_markup_mode=None,
)

DTYPES = ("float32", "bfloat16")


@app.command("kernels")
def kernels(
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write every number there too.")] = None,
    op: Annotated[list[str] | None, typer.Option("--op", metavar="NAME", help="Only this op. Repeatable.")] = None,
    layer: Annotated[
        list[str] | None, typer.Option("--layer", metavar="NAME", help="Only this layer, as 32@1024. Repeatable.")
    ] = None,
    dtype: Annotated[
        list[str] | None, typer.Option("--dtype", help=f"Only this one of {', '.join(DTYPES)}. Repeatable.")
    ] = None,
    provider: Annotated[
        list[str] | None,
        typer.Option("--provider", help="Only this one of eager, compile, cpp, cuda, triton. Repeatable."),
    ] = None,
    device: Annotated[str, typer.Option("--device", "-d", help="cpu, cuda or auto.")] = "auto",
    threads: Annotated[int, typer.Option("--threads", min=1, help="CPU threads of every provider.")] = 2,
    rounds: Annotated[int, typer.Option("--rounds", min=1, help="Least rounds a row.")] = 15,
    seconds: Annotated[float, typer.Option("--seconds", min=0.0, help="Least measuring time of a row's rounds.")] = 1.0,
    quick: Annotated[
        bool, typer.Option("--quick", help="The first layer of each op, in fewer rounds, without torch.compile.")
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Only compare results, on small shapes or those of --layer, and without torch.compile."
        ),
    ] = False,
    default_allocator: Annotated[
        bool, typer.Option("--default-allocator", help="Without huge pages, as PyTorch is by default.")
    ] = False,
) -> None:
    """Time every kernel against PyTorch, forward and backward, and compare its results first.

    A row is an op, a layer, a dtype, a pass and a provider. Exit code 1 if any result is wrong, or if no provider that
    was named can run.

    Example: faceedit bench kernels --quick
    """
    # Read once, while torch is imported; the whole table has one setting, whatever the shell has.
    os.environ["THP_MEM_ALLOC_ENABLE"] = "0" if default_allocator else "1"
    os.environ["OMP_WAIT_POLICY"] = "passive"
    os.environ["GOMP_SPINCOUNT"] = "0"
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler that reads peak memory is talkative
    if json is not None:
        check_folder(json)
    from json import dumps

    import torch

    from faceedit.devices import resolve_device
    from faceedit.kernels import benchmarking
    from faceedit.kernels.benchmarking import machine, providers, report, suite

    known = benchmarking.benchmarks()
    ops = _choose("kernels", "op", op, known)
    dtypes = [getattr(torch, name) for name in _choose("kernels", "dtype", dtype, DTYPES)]
    layers = _choose("kernels", "layer", layer, {name for op in ops for name in known[op].layers}) if layer else None
    wanted = _choose("kernels", "provider", provider, providers.PROVIDERS)
    if (quick or check) and not provider:
        wanted.remove("compile")
    rows = []
    for benchmark in (known[name] for name in ops):
        names = [name for name in benchmark.layers if layers is None or name in layers]
        names = [benchmarking.SMALL] if check and layers is None else names[: 1 if quick else None]
        rows += [(benchmark, name, kind) for name in names for kind in dtypes if kind in benchmark.dtypes]
    place = resolve_device(device).type
    reasons = {name: reason for name in wanted if (reason := providers.missing(name, place))}
    if len(reasons) == len(wanted):  # else the baseline would run alone and pass for them
        told = ", ".join(f"{name} ({reason})" for name, reason in reasons.items())
        raise DeviceError(
            f"bench kernels: --provider must name one that can run on {place}, got {told}; name another, or a --device"
        )
    settings = suite.Settings(
        place,
        wanted,
        rounds=0 if check else (min(rounds, 5) if quick else rounds),
        seconds=min(seconds, 0.2) if quick else seconds,
    )
    torch.set_num_threads(threads)
    rates = machine.measure_rates(place, dtypes, small=check)
    described = machine.describe(place)
    for text in report.introduction(described, rates, reasons):
        typer.echo(text)
    typer.echo(report.header(place))
    records: list[dict[str, Any]] = []

    def keep(is_complete: bool) -> list[dict[str, Any]]:
        """Write what was measured so far, whole or not at all, and return its summary."""
        lines = suite.summarise(records, known)
        if json is not None:
            document = {
                "complete": is_complete, "machine": described, "load_after": machine.load(), "rates": rates,
                "missing": reasons,
                "settings": {
                    "device": place, "threads": threads, "rounds": settings.rounds, "seconds": settings.seconds
                },
                "summary": lines, "rows": records,
            }  # fmt: skip
            write_text(json, dumps(document, indent=1) + "\n")
        return lines

    with progress_bar() as progress:
        for benchmark, name, kind in progress.track(rows, description="measuring"):
            for record in suite.run_layer(benchmark, name, kind, settings):
                records.append(record)
                typer.echo(report.line(record, rates))
            keep(is_complete=False)
    for text in report.summary(keep(is_complete=True)):
        typer.echo(text)
    bad = [record for record in records if record["status"] != "ok"]
    if bad:
        raise FaceEditError(f"bench kernels: {len(bad)} of {len(records)} rows failed; they are named in the table")


@app.command("maskfacegan")
def maskfacegan(
    json: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write every number there too, after every row.")
    ] = None,
    size: Annotated[
        int, typer.Option("--size", help="1024 or 256: the published networks; 16: toys that only show that it runs.")
    ] = 1024,
    batch: Annotated[
        list[int] | None, typer.Option("--batch", min=1, help="Images edited together. Repeatable; 1 and 8 without it.")
    ] = None,
    attribute: Annotated[
        list[str] | None,
        typer.Option("--attribute", help="A local attribute. Repeatable; Smiling and Wavy_Hair without it."),
    ] = None,
    row: Annotated[
        list[str] | None,
        typer.Option("--row", help="Only this one of bf16-graph, public, fp32-eager, fp32-graph. Repeatable."),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            "--steps", min=4, help="Cut the schedule down to so many steps of both stages; 1501, all, without it."
        ),
    ] = None,
    public_steps: Annotated[
        int, typer.Option("--public-steps", min=4, help="The same for the public formulation, which is slow.")
    ] = 150,
    device: Annotated[str, typer.Option("--device", "-d", help="cpu, cuda or auto.")] = "auto",
    seed: Annotated[int, typer.Option("--seed", help="Of weights, source images and noise.")] = 0,
) -> None:
    """Time whole MaskFaceGAN edits, beside the public implementations' formulation, on random weights.

    A row is a batch, a formulation and an attribute. Exit code 1 if any row failed.

    Example: faceedit bench maskfacegan --device cuda --json edits.json
    """
    if json is not None:
        check_folder(json)
    from json import dumps

    from faceedit.attributes import MASKFACEGAN_LOCAL
    from faceedit.devices import resolve_device
    from faceedit.kernels.benchmarking import machine
    from faceedit.maskfacegan import benchmarking
    from faceedit.maskfacegan.benchmark_networks import SIZES

    if size not in SIZES:
        raise UsageError(f"bench maskfacegan: --size must be one of {', '.join(map(str, SIZES))}, got {size}")
    full = benchmarking.FULL_STEPS
    if max(steps or full, public_steps) > full:
        raise UsageError(
            f"bench maskfacegan: --steps and --public-steps must be at most {full}, the whole schedule, got "
            f"{steps or full} and {public_steps}"
        )
    defaults = benchmarking.Settings()
    settings = benchmarking.Settings(
        size,
        batch or defaults.batches,
        _choose("maskfacegan", "attribute", attribute, MASKFACEGAN_LOCAL) if attribute else defaults.attributes,
        _choose("maskfacegan", "row", row, benchmarking.FORMULATIONS),
        steps or full,
        public_steps,
        seed,
    )
    place = resolve_device(device)
    described = machine.describe(place.type)
    for text in benchmarking.introduction(described, settings):
        typer.echo(text)
    records: list[benchmarking.Record] = []

    def keep(is_complete: bool) -> list[benchmarking.Record]:
        """Write what was measured so far, whole or not at all, and return it with its comparisons."""
        compared = benchmarking.compare(records)
        if json is not None:
            document = {
                "complete": is_complete, "machine": described, "load_after": machine.load(),
                "settings": asdict(settings) | {"device": str(place)}, "rows": compared,
            }  # fmt: skip
            write_text(json, dumps(document, indent=1) + "\n")
        return compared

    with progress_bar() as progress:
        task = progress.add_task("measuring", total=len(settings.cases()))
        for record in benchmarking.measure(settings, place):
            records.append(record)
            typer.echo(benchmarking.line(record))
            keep(is_complete=False)
            progress.advance(task)
    for text in benchmarking.summary(keep(is_complete=True)):
        typer.echo(text)
    bad = [record for record in records if record["status"] != "ok"]
    if bad:
        raise FaceEditError(f"bench maskfacegan: {len(bad)} of {len(records)} rows failed; they are named in the table")


def _choose(command: str, option: str, asked: list[str] | None, known: Any) -> list[str]:
    """Return the names asked for, all known ones without any. Raises UnknownNameError on another name."""
    for name in asked or ():
        if name not in known:
            raise UnknownNameError(
                f"bench {command}: --{option} must be a known {option}, got {name!r}; {suggestion(name, known)}"
            )
    return list(asked or known)
