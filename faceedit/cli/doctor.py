# SPDX-License-Identifier: Apache-2.0
"""`faceedit doctor`: what this installation can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from faceedit.cli import options
from faceedit.cli.output import print_json


def doctor(json: options.Json = False) -> None:
    """Report versions, compiled kernels, every op's backends, weights and extras. Exit code 1 if photos can't be edited.

    Example: faceedit doctor --json
    """
    from faceedit.doctor import examine, is_healthy

    report = examine()
    if json:
        print_json(report)
    else:
        for line in describe(report):
            typer.echo(line)
    if not is_healthy(report):
        raise typer.Exit(1)


def describe(report: Mapping[str, Any]) -> list[str]:
    """The report as lines a person reads."""
    lines = [f"faceedit {report['faceedit']}, Python {report['python']}, {report['platform']}"]
    lines.append(", ".join(f"{name} {number or 'missing'}" for name, number in report["packages"].items()))
    devices = report["devices"]
    lines.append(f"devices: cpu ({devices['cpu_threads']} threads), cuda: {', '.join(devices['cuda']) or 'none'}")
    lines.append("")
    lines += [f"{key}: {value}" for key, value in report["kernels"]["build"].items()]
    for name, backends in report["kernels"]["ops"].items():
        lines.append(f"  {name:<24} " + ", ".join(f"{backend}: {state}" for backend, state in backends.items()))
    lines.append("")
    lines.append("weights:" if report["weights"] else "weights: none installed; reinstall the package")
    for row in report["weights"]:
        state = "ok" if row["verified"] else f"UNUSABLE: {row['problem']}"
        lines.append(f"  {row['name']:<24} {row['bytes'] / 2**20:6.1f} MiB  {state}")
    lines.append("")
    lines.append("extras:")
    for name, extra in report["extras"].items():
        state = (
            "installed"
            if extra["installed"]
            else f"missing {', '.join(extra['missing'])}; pip install 'faceedit[{name}]'"
        )
        lines.append(f"  {name:<10} {state} (gives {extra['gives']})")
    return lines
