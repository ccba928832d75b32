# SPDX-License-Identifier: Apache-2.0
"""What this machine is, and the two rates that bound every op on it: copying and multiplying matrices."""

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from faceedit.kernels import native
from faceedit.kernels.benchmarking.timing import Clock, CpuClock, CudaClock

ENVIRONMENT = (
    "CUDA_VISIBLE_DEVICES", "GOMP_SPINCOUNT", "KMP_AFFINITY", "LD_PRELOAD", "MKL_NUM_THREADS", "OMP_NUM_THREADS",
    "OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "TORCHINDUCTOR_FREEZING", "TRITON_INTERPRET",
)  # fmt: skip
TRIES = 8
LONGEST_PRODUCT_S = 1.0  # of matrices: from 1/8 of it on, no larger ones are tried


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _processor() -> str:
    named = (line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """Return the commit of the source tree this package lies in, `+` added where files differ; empty outside git."""
    package = Path(__file__).resolve().parent
    if not _output("git", "-C", str(package), "ls-files", "--error-unmatch", Path(__file__).name):
        return ""
    head = _output("git", "-C", str(package), "rev-parse", "HEAD")
    return head + ("+" if _output("git", "-C", str(package), "status", "--porcelain") else "")


def load() -> float | None:
    """Return how many processes wanted to run in the last minute: more than one beside the benchmark blurs it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def describe(device: str) -> dict[str, Any]:
    """Return machine, versions, commit and environment in plain values."""
    gpu: dict[str, Any] = {}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        clocks = "--query-gpu=driver_version,clocks.sm,clocks.mem,power.limit"
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "driver_clocks_power": _output("nvidia-smi", clocks, "--format=csv,noheader", "--id=0"),
            "tf32": {"matmul": torch.backends.cuda.matmul.allow_tf32, "conv": torch.backends.cudnn.allow_tf32},
        }
    return {
        "processor": _processor(),
        "logical_cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "huge_pages": " ".join(_lines("/sys/kernel/mm/transparent_hugepage/enabled")),
        "load": load(),
        "platform": platform.platform(),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if device == "cuda" else None,
        "build": native.build_report(),
        "commit": commit(),
        "environment": {name: os.environ[name] for name in ENVIRONMENT if name in os.environ},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def measure_rates(device: str, dtypes: Iterable[torch.dtype], small: bool = False) -> dict[str, Any]:
    """Return the copy bandwidth (bytes read and written a second) and the matrix rate by dtype (operations a second).

    Both are the best of several tries on operands too large for the caches, but for a dtype that the processor does not
    multiply: there PyTorch takes minutes for such a product, and smaller ones tell as much. `small` uses toy operands.
    """
    clock = CudaClock(cold=False) if device == "cuda" else CpuClock()
    source = torch.ones((1 << 10) if small else (1 << 26), device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    seconds = min(clock.sample(lambda: target.copy_(source), 1) for _ in range(TRIES))
    side = 32 if small else (8192 if device == "cuda" else 2048)
    return {
        "copy_bytes_per_s": 2 * source.numel() * source.element_size() / seconds,
        "matrix": {str(dtype).removeprefix("torch."): _matrix_rate(clock, device, dtype, side) for dtype in dtypes},
    }


def _matrix_rate(clock: Clock, device: str, dtype: torch.dtype, most: int) -> float:
    side = min(most, 256)
    while True:
        a = torch.randn(side, side, device=device).to(dtype)  # zeros and ones draw less power and clock higher
        product = torch.empty_like(a)
        multiply = partial(torch.mm, a, a, out=product)
        multiply()
        seconds = clock.sample(multiply, 1)
        if side == most or 8 * seconds > LONGEST_PRODUCT_S:
            break
        side *= 2
    tries = min(TRIES, int(LONGEST_PRODUCT_S / seconds))
    return 2 * side**3 / min([seconds, *(clock.sample(multiply, 1) for _ in range(tries))])
