# SPDX-License-Identifier: Apache-2.0
"""`faceedit doctor`: what this installation can do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from faceedit.cli import options
from faceedit.cli.output import print_json


def doctor(json: options.Json = False) -> None:
    """Report versions, compiled kernels, each op's backends, weights and extras; exit code 1 if no photo can be edited.

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
    lines += [f"UNUSABLE: {name}: {reason}; reinstall its package" for name, reason in report["unusable"].items()]
    devices = report["devices"]
    lines.append(f"devices: cpu ({devices['cpu_threads']} threads), cuda: {', '.join(devices['cuda']) or 'none'}")
    lines.append("")
    lines += _describe_kernels(report["kernels"])
    lines.append("")
    folders = "".join(f", {'then' if i else 'of'} {folder}" for i, folder in enumerate(report["weights_folders"]))
    lines.append(f"weights{folders}:" if report["weights"] else "weights: none installed; reinstall the package")
    for row in report["weights"]:
        fine = "ok" if row["pinned"] else "ok, not pinned"
        state = fine if row["verified"] else f"UNUSABLE: {row['problem']}"
        lines.append(f"  {row['name']:<24} {row['bytes'] / 2**20:6.1f} MiB  {state}")
    lines.append("")
    lines.append("extras:")
    for name, extra in report["extras"].items():
        missing = f"missing {', '.join(extra['missing'])}; pip install 'faceedit[{name}]'"
        lines.append(f"  {name:<10} {'installed' if extra['installed'] else missing} (gives {extra['gives']})")
    return lines


def _describe_kernels(kernels: Mapping[str, Any]) -> list[str]:
    build = kernels["build"]
    compiled = f"yes ({build['compiler']}; running {build['isa']} of {', '.join(build['isas'])})"
    architectures = f"yes ({', '.join(build['cuda_architectures'])}; {build['cuda_compiler']})"
    lines = [
        f"C++ kernels: {compiled if build['cpp'] else 'no: ' + build['cpp_reason']}",
        f"CUDA kernels: {architectures if build['cuda'] else 'no: ' + build['cuda_reason']}",
        "ops:",
    ]
    for name, backends in kernels["ops"].items():
        usable = [backend for backend, state in backends.items() if state["available"]]
        lines.append(f"  {name:<24} runs on {', '.join(usable)}")
        lines += [
            f"  {'':<24}   not {backend}: {state['reason']}"
            for backend, state in backends.items()
            if not state["available"]
        ]
    return lines
