# SPDX-License-Identifier: Apache-2.0
"""What this installation can do, and why not where it cannot: versions, compiled kernels, weights, extras."""

from __future__ import annotations

import importlib
import importlib.util
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from faceedit import __version__


@dataclass(frozen=True, slots=True)
class Extra:
    """An optional group of dependencies: the modules that show it is there, and what it gives."""

    modules: tuple[str, ...]
    gives: str


EXTRAS: Mapping[str, Extra] = {
    "train": Extra(("lightning", "torchmetrics", "tensorboard", "filelock"), "faceedit train"),
    "export": Extra(("onnx", "onnxscript", "onnxruntime"), "export of editors and operators to ONNX"),
    "dev": Extra(
        ("pytest", "xdist", "pytest_benchmark", "hypothesis", "ruff", "mypy", "importlinter", "skimage"),
        "the tests, the benchmarks and the checks of .ci/run",
    ),
}

PACKAGES = ("torch", "torchvision", "numpy", "pillow", "opencv-python-headless", "safetensors", "omegaconf", "triton")

# What an edit with the default editor cannot do without; the rest of the report is about more, or faster.
NEEDED_MODULES = ("cv2", "torchvision", "PIL")
NEEDED_WEIGHTS = ("maggan-starter", "parser-starter")


def examine() -> dict[str, Any]:
    """Everything `faceedit doctor` reports, JSON-ready. Never raises over a missing part: that is what it reports."""
    return {
        "faceedit": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: _version(name) for name in PACKAGES},
        "unusable": _unusable(),
        "devices": _devices(),
        "kernels": _kernels(),
        "weights_folders": _weights_folders(),
        "weights": _weights(),
        "extras": {name: _extra(extra) for name, extra in EXTRAS.items()},
    }


def is_healthy(report: Mapping[str, Any]) -> bool:
    """Can this installation edit a photo? Compiled kernels and extras are faster or more, never required."""
    verified = {row["name"] for row in report["weights"] if row["verified"]}
    return not report["unusable"] and verified.issuperset(NEEDED_WEIGHTS)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _unusable() -> dict[str, str]:
    """The needed modules that cannot be imported, and why: a package may be there without the libraries it asks for."""
    reasons = {}
    for name in NEEDED_MODULES:
        try:
            importlib.import_module(name)
        except Exception as error:  # OSError and RuntimeError too, from compiled parts
            reasons[name] = " ".join(f"{type(error).__name__}: {error}".split())
    return reasons


def _devices() -> dict[str, Any]:
    import torch

    found = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {"cpu_threads": torch.get_num_threads(), "cuda": found, "torch_cuda": torch.version.cuda}


def _kernels() -> dict[str, Any]:
    from faceedit.kernels import backends_report

    return backends_report()


def _extra(extra: Extra) -> dict[str, Any]:
    missing = [name for name in extra.modules if importlib.util.find_spec(name) is None]
    return {"installed": not missing, "missing": missing, "gives": extra.gives}


def _weights_folders() -> list[str]:
    """Where weights are looked for, in this order; none where $FACEEDIT_WEIGHTS is wrong, as the weights' row says."""
    from faceedit.errors import FaceEditError
    from faceedit.registry import directories

    try:
        return [str(folder) for folder in directories()]
    except FaceEditError:
        return []


def _weights() -> list[dict[str, Any]]:
    """Every registered file, read and compared with its pinned checksum, if it has one."""
    from faceedit.errors import FaceEditError
    from faceedit.registry import list_weights, sha256_of

    try:
        specs = list_weights()
    except FaceEditError as error:
        registry = {"name": "registry", "kind": "unknown", "path": "", "bytes": 0, "pinned": True, "verified": False}
        return [{**registry, "problem": str(error)}]
    rows = []
    for spec in specs:
        problem = ""
        try:
            if spec.sha256 not in ("", sha256_of(spec.path)):
                problem = "its SHA-256 differs from the registry's; reinstall the package"
            kind = spec.header.kind
        except FaceEditError as error:
            problem, kind = str(error), "unknown"
        rows.append(
            {
                "name": spec.name,
                "kind": kind,
                "path": str(spec.path),
                "bytes": spec.bytes,
                "pinned": bool(spec.sha256),
                "verified": not problem,
                "problem": problem,
            }
        )
    return rows
