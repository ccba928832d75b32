# SPDX-License-Identifier: Apache-2.0
"""The compiled module `_C`, what was built into it, and why it is missing when it is."""

import importlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before _C: both ask for libgomp.so.1, and torch's copy must be the one that serves the process

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.uint8: 3, torch.bool: 3}


@cache  # asked at every call on a GPU where no CUDA kernels were built
def _build_info() -> dict[str, Any]:
    try:
        return json.loads(Path(__file__).with_name("build_info.json").read_text())
    except (OSError, ValueError):  # no record, or half of one: "native" is neither True nor False
        return {
            "native": None,
            "cuda": False,
            "reason": _never_built(),
            "cuda_reason": "the native module was not built",
        }


def _never_built() -> str:
    if (Path(__file__).resolve().parents[1] / "pyproject.toml").exists():
        return (
            "this is the source tree, not the installed package; run elsewhere after `pip install .`, "
            "or build here: `python setup.py build_ext --inplace`"
        )
    return "never built; run `pip install .` in the source tree"


def _load() -> tuple[ModuleType | None, str]:
    info = _build_info()
    if info["native"] is False:  # a module beside this record is an older build's
        return None, info["reason"]
    try:
        return importlib.import_module("faceedit.kernels._C"), ""
    except ImportError as error:
        return None, str(error) if info["native"] else info["reason"]


_C, MISSING_REASON = _load()


def module() -> Any:
    """Return the compiled module; RuntimeError with the reason when there is none."""
    if _C is None:
        raise RuntimeError(f"faceedit.kernels: native module is missing: {MISSING_REASON}")
    return _C


def cuda_missing_reason() -> str:
    """Return why CUDA kernels are not in this build, or an empty string."""
    if _C is None:
        return f"the native module is missing: {MISSING_REASON}"
    if _C.cuda_architectures:
        return ""
    return _build_info()["cuda_reason"] or "this build holds no CUDA kernels"


@cache
def _capability(index: int) -> tuple[int, int] | None:
    """Return a GPU's compute capability, None without GPUs: a fake tensor may name one that is not there."""
    return torch.cuda.get_device_capability(index) if torch.cuda.is_available() else None


@cache
def _runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Return whether a build for `architectures`, as CMake names them, runs on a GPU of that compute capability.

    Machine code (real) runs on its major version from its minor on, PTX (virtual) on everything from it on.
    """
    for architecture in architectures.split():
        found = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", architecture)
        if found is None:  # "native", "all": made for the GPUs of the machine that built it, or for every one
            return True
        built, variant, kind = (int(found[1]), int(found[2])), found[3], found[4]
        if variant == "a":  # one GPU's own instructions
            runs = capability == built
        else:
            runs = capability >= built and (capability[0] == built[0] or (kind != "-real" and not variant))
        if runs:
            return True
    return False


def cuda_device_reason(index: int) -> str:
    """Return why the CUDA kernels of this build cannot run on the GPU `index`, or an empty string."""
    capability = _capability(index)
    if _C is None or capability is None or _runs_on(_C.cuda_architectures, capability):
        return ""
    built = [name.removesuffix("-real").replace("-virtual", "+PTX") for name in _C.cuda_architectures.split()]
    return f"built for {', '.join(f'sm_{name}' for name in built)}, this GPU is sm_{capability[0]}{capability[1]}"


def build_report() -> dict[str, Any]:
    """Describe the build in plain values, for `faceedit doctor` and benchmark records."""
    return {
        "cpp": _C is not None,
        "cpp_reason": MISSING_REASON,
        "compiler": _C.compiler if _C else "",
        "isa": _C.isa() if _C else "",
        "isas": list(_C.isas()) if _C else [],
        "cuda": bool(_C and _C.cuda_architectures),
        "cuda_reason": cuda_missing_reason(),
        "cuda_compiler": _C.cuda_compiler if _C else "",
        "cuda_architectures": _C.cuda_architectures.split() if _C else [],
    }


def cuda_resources() -> list[dict[str, Any]]:
    """Return what ptxas reported per kernel and architecture when the CUDA kernels were compiled."""
    return _build_info().get("cuda_resources", [])


@contextmanager
def isa(name: str) -> Iterator[None]:
    """Use another instruction set's CPU kernels for the whole process, to test or compare them."""
    before = module().isa()
    module().set_isa(name)
    try:
        yield
    finally:
        module().set_isa(before)


def target(x: torch.Tensor, elements: int = 65536) -> tuple[int, int, int]:
    """Say where a call on `x` runs: the CPU with torch's thread count, or x's CUDA device on the current stream.

    elements: up to how many one thread is faster; fewer for an op that computes much for each.
    Returns: (device, -1 for the CPU; threads; stream), the first argument of every function of the module.
    """
    if x.is_cpu:
        # Below this, starting a team costs more than it saves.
        return -1, torch.get_num_threads() if x.numel() > elements else 1, 0
    return x.device.index, 1, torch.cuda.current_stream(x.device).cuda_stream


def place(on_cpu: bool) -> tuple[int, int, int]:
    """Return a target for asking how large a workspace is, which depends on shapes and on the kind of device alone.

    Callers remember the answers (`functools.lru_cache`): asking takes as long as a small layer's kernel.
    """
    return (-1, 1, 0) if on_cpu else (0, 1, 0)


def address(tensor: torch.Tensor | None) -> int:
    """Return the data pointer, 0 for an absent operand."""
    return 0 if tensor is None else tensor.data_ptr()


def readable_mask(mask: torch.Tensor) -> torch.Tensor:
    """Return a mask as native kernels read it: contiguous, in a dtype they know."""
    return (mask if mask.dtype in DTYPE_CODES else mask.float()).contiguous()


def mask_operand(mask: torch.Tensor | None, batch: int) -> tuple[int, int, int]:
    """Return (address, stride, dtype) of a readable mask, as MaskOperand takes it; zeros for an absent one."""
    if mask is None:
        return 0, 0, 0
    stride = mask.shape[2] * mask.shape[3] if mask.shape[0] == batch else 0
    return mask.data_ptr(), stride, DTYPE_CODES[mask.dtype]
