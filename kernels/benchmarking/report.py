# SPDX-License-Identifier: Apache-2.0
"""The benchmark as lines a person reads."""

from collections.abc import Iterable, Sequence
from typing import Any

_HEADER = (
    f"{'op':<20} {'layer':<18} {'dtype':<8} {'pass':<16} {'provider':<14} {'median ms':>10} {'IQR ms':>19} "
    f"{'ratio':>6} {'IQR':>13} {'minima':>6} {'GB/s':>7} {'copy':>5} {'GFLOP/s':>8} {'matrix':>6} {'peak MB':>8}"
)
_CUDA_HEADER = f" {'warm ms':>9} {'graph ms':>9} {'graph cold':>10}"
_CPU_HEADER = f" {'reused ms':>9}"


def header(device: str) -> str:
    """Return the table's first line."""
    return _HEADER + (_CUDA_HEADER if device == "cuda" else _CPU_HEADER)


def introduction(description: dict[str, Any], rates: dict[str, Any], missing: dict[str, str]) -> Iterable[str]:
    """Yield what the table's numbers were measured on, and what is not in it."""
    machine = description["gpu"].get("name") or description["processor"]
    revision = description["commit"][:12] or "unknown"
    yield f"{machine}, {description['threads']} threads, torch {description['torch']}, commit {revision}"
    yield f"environment: {' '.join(f'{k}={v}' for k, v in description['environment'].items()) or 'nothing set'}"
    matrix = ", ".join(f"{dtype} {rate / 1e9:.0f} GFLOP/s" for dtype, rate in rates["matrix"].items())
    yield f"copy {rates['copy_bytes_per_s'] / 1e9:.1f} GB/s (read and written); matrix product {matrix}"
    for provider, reason in missing.items():
        yield f"no {provider}: {reason}"
    yield "ratio: times faster than the first provider of the row, median of the rounds' ratios; `noisy`: that and the"
    yield "ratio of minima differ by more than a quarter. GB/s: the bytes that must move at least. peak: beyond inputs."
    yield "overhead: at most this share of a step is Python and dispatch; the same calls on tensors of next to nothing."
    yield "reused: the median where the op writes over its last results, to memory that the process already has."


def line(record: dict[str, Any], rates: dict[str, Any]) -> str:
    """Return one record as a line of the table."""
    start = (
        f"{record['op']:<20} {record['layer']:<18} {record['dtype']:<8} {record['pass']:<16} {record['provider']:<14}"
    )
    if record["status"] != "ok":
        return f"{start} {record['status'].upper()}: {record['reason']}"
    if "ratio" not in record:
        return f"{start} agrees to {record['relative_error']:.1e}"
    ratio, copy = record["ratio"], record["bytes_per_s"] / rates["copy_bytes_per_s"]
    multiply = record["flops_per_s"] / rates["matrix"].get(record["dtype"], float("inf"))
    iqr = f"{record['q1_s'] * 1e3:.4g} - {record['q3_s'] * 1e3:.4g}"
    ratio_iqr = f"{ratio['q1']:.2f} - {ratio['q3']:.2f}"
    text = (
        f"{start} {record['median_s'] * 1e3:>10.4g} {iqr:>19} {ratio['median']:>6.2f} {ratio_iqr:>13} "
        f"{ratio['minima']:>6.2f} {record['bytes_per_s'] / 1e9:>7.1f} {copy:>5.0%} {record['flops_per_s'] / 1e9:>8.0f} "
        f"{multiply:>6.0%} {record['peak_bytes'] / 1e6:>8.1f}"
    )
    if "warm_s" in record:
        columns = [record["warm_s"], record["graph_s"], record["graph_cold_s"]]
        text += "".join(f" {'-' if s is None else format(s * 1e3, '.4g'):>9}" for s in columns)
    elif "reused_s" in record:
        text += f" {record['reused_s'] * 1e3:>9.4g}"
    if "overhead_share" in record:
        text += f" overhead {record['overhead_share']:.1%}"
    return text + (" noisy" if ratio["noisy"] else "")


def summary(lines: Sequence[dict[str, Any]]) -> Iterable[str]:
    """Yield the median over the layers of each op, with its target where it has one."""
    yield ""
    yield "median over the layers:"
    for row in lines:
        text = f"{row['op']:<20} {row['dtype']:<8} {row['pass']:<16} {row['provider']:<14} {row['ratio']:>6.2f}x"
        text += f" (minima {row['ratio_of_minima']:.2f}x) over {row['layers']} layers"
        if row["ratio_to_compile"] is not None and row["provider"] != "compile":
            text += f", {row['ratio_to_compile']:.2f}x compile"
        if row["target"] is not None:
            text += f", target {row['target']:g}x {'reached' if row['ratio'] >= row['target'] else 'MISSED'}"
        if row["noisy_layers"]:
            text += f", {row['noisy_layers']} noisy"
        yield text
