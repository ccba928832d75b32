# SPDX-License-Identifier: Apache-2.0
"""Measure every op against PyTorch: one list of cases for `faceedit bench kernels` and for tests/benchmarks.

cases/      one module an op: inputs, the op, the obvious PyTorch code, the layers, bytes and operations
case        what such a module writes down
providers   the ways to run a case (eager, compile, cpp, cuda, triton), each checked against its baseline first
timing      interleaved rounds and their statistics, on the CPU and with CUDA events
machine     what this machine is, and how fast it copies and multiplies
suite       run the list; report: the table a person reads
"""

from faceedit.kernels.benchmarking.case import SMALL, Benchmark, Case, draw, size_of
from faceedit.kernels.benchmarking.cases import benchmarks

__all__ = ["SMALL", "Benchmark", "Case", "benchmarks", "draw", "size_of"]
