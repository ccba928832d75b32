# SPDX-License-Identifier: Apache-2.0
"""One module an op, found by its name; each has `BENCHMARKS`, a list of what it measures."""

import importlib
import pkgutil

from faceedit.kernels.benchmarking.case import Benchmark


def benchmarks() -> dict[str, Benchmark]:
    """Return every op's benchmark by the op's name, in alphabetical order."""
    found: dict[str, Benchmark] = {}
    for module in pkgutil.iter_modules(__path__):
        for benchmark in importlib.import_module(f"{__name__}.{module.name}").BENCHMARKS:
            found[benchmark.op] = benchmark
    return dict(sorted(found.items()))
