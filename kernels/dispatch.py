# SPDX-License-Identifier: Apache-2.0
"""Choose which implementation of an op runs, and say why one cannot.

The choice is read inside the op's body, which tracers do not look into: no graph break, no guard, and a compiled graph
follows the scope it is called in.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import native

BACKENDS = ("eager", "cpu", "cuda", "triton")
NATIVE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_requested: ContextVar[str] = ContextVar("faceedit_kernels_backend", default="auto")
_last: dict[str, str] = {}
_ops: dict[str, "Dispatcher"] = {}


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every op inside the `with` block on one backend.

    Args:   name "auto" (the default: the fastest that can run), "eager", "cpu", "cuda" or "triton". Local to the
            context: other threads and tasks are not affected. A backward pass runs on its forward pass's backend.
    Raises: ValueError on another name. An op that the named backend cannot run raises RuntimeError, with the reason.
    """
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: name must be one of {('auto', *BACKENDS)}, got {name!r}; choose one of these")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


def requested_backend() -> str:
    """Return the name the surrounding `backend(...)` scope asked for, "auto" without one.

    A backward pass may run on another thread, which does not see the scope: the op saves this name with its tensors.
    While a graph is being traced the answer is "auto", since the graph will run in scopes not known yet.
    """
    return "auto" if torch.compiler.is_compiling() else _requested.get()


def backend_again(name: str) -> AbstractContextManager[Any]:
    """Return the scope of a backward pass whose forward pass ran under `name`: none where that is asked for anyway."""
    return nullcontext() if _requested.get() == name else backend(name)


def last_backend(op: str) -> str:
    """Return the backend that last ran `op` in this process, e.g. last_backend("masked_mse_backward").

    Raises: KeyError when the op has not run.
    """
    return _last[op]


def without_autocast(x: Tensor) -> AbstractContextManager[Any]:
    """Return a scope in which the convolutions and matrix products of PyTorch keep their operands' dtypes.

    An op states the dtype that it computes in: autocast would round its fp32 on the way.
    """
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else nullcontext()


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache  # looking for a module that is not there takes longer than the smallest ops
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _gpus_reason() -> str:
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    reasons = [native.cuda_device_reason(index) for index in range(torch.cuda.device_count())]
    return reasons[0] if reasons and all(reasons) else ""


def machine_reason(name: str, device: str | None, index: int | None = None) -> str:
    """Return why backend `name` cannot run tensors of `device` here; empty when it can.

    device: None for any, where one GPU of several is enough. index: which GPU, None where that is not known.
    """
    if name == "cpu":
        if device not in (None, "cpu"):
            return f"it needs CPU tensors, got {device}"
        return native.MISSING_REASON
    if name == "cuda":
        if reason := native.cuda_missing_reason():
            return reason
        if device not in (None, "cuda"):
            return f"it needs CUDA tensors, got {device}"
        if device is None:
            return _gpus_reason()
        return "" if index is None else native.cuda_device_reason(index)
    if name == "triton":
        if not _has_triton():
            return "triton is not installed"
        if device == "cpu" and not _interpreting():
            return "it runs CPU tensors only under TRITON_INTERPRET=1"
        if device not in (None, "cpu", "cuda"):
            return f"it needs CUDA tensors, got {device}"
        return "" if device or _interpreting() or torch.cuda.is_available() else "no CUDA device was found"
    return ""


@dataclass(frozen=True, slots=True)
class Dispatcher:
    """One op's implementations, by backend, eager and C++ among them.

    All take the same arguments; the first tensor, or the first of a list there, decides device and dtype.
    """

    name: str
    implementations: dict[str, Callable[..., Any]]
    dtypes: tuple[torch.dtype, ...] = NATIVE_DTYPES

    def reason(self, name: str, x: Tensor) -> str:
        """Return why backend `name` cannot run on `x`, an empty string when it can."""
        if name not in self.implementations:
            return f"{self.name} has no {name} implementation"
        if name != "eager" and x.dtype not in self.dtypes:
            known = ", ".join(str(dtype).removeprefix("torch.") for dtype in self.dtypes)
            return f"it runs {known}, got {str(x.dtype).removeprefix('torch.')}"
        return machine_reason(name, x.device.type, x.device.index)

    def choose(self, asked: str, x: Tensor) -> str:
        """Return the backend to run: the one asked for, or for "auto" the first that can."""
        if x.is_cpu and asked in ("auto", "cpu") and not native.MISSING_REASON and x.dtype in self.dtypes and x.numel():
            return "cpu"  # as below, without the questions that a CPU tensor does not raise
        if asked != "auto":
            if reason := self.reason(asked, x):
                raise RuntimeError(f"{self.name}: backend {asked!r} cannot run: {reason}; use backend('auto')")
            return "eager" if x.numel() == 0 else asked
        if x.numel() == 0:
            return "eager"
        order = ("cuda", "triton") if x.device.type == "cuda" else ("cpu",)
        return next((name for name in order if not self.reason(name, x)), "eager")

    def __call__(self, *arguments: Any, asked: str = "auto") -> Any:
        first = arguments[0]
        x = first if isinstance(first, Tensor) else first[0]
        chosen = self.choose(_requested.get() if asked == "auto" else asked, x)
        _last[self.name] = chosen
        run = self.implementations[chosen]
        if x.is_cuda and x.device.index != torch.cuda.current_device():
            # Kernels are launched on the current device, which is the caller's to choose: it is back afterwards.
            with torch.cuda.device(x.device), without_autocast(x):
                return run(*arguments)
        if torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            with without_autocast(x):
                return run(*arguments)
        return run(*arguments)


def dispatcher(
    name: str, *, dtypes: tuple[torch.dtype, ...] = NATIVE_DTYPES, **implementations: Callable[..., Any]
) -> Dispatcher:
    """Register the implementations of op `name`, keyed by backend. `dtypes`: what those other than eager run."""
    _ops[name] = Dispatcher(name, implementations, dtypes)
    return _ops[name]


def backends_report() -> dict[str, Any]:
    """Describe the build and, per op and backend, whether it can run on this machine and why not.

    Returns: {"build": native.build_report(), "ops": {op: {backend: {"available": bool, "reason": str}}}}, plain values.
    """
    ops: dict[str, dict[str, dict[str, Any]]] = {}
    for name, op in _ops.items():
        reasons = {b: machine_reason(b, None) if b in op.implementations else "not implemented" for b in BACKENDS}
        ops[name] = {b: {"available": not reason, "reason": reason} for b, reason in reasons.items()}
    return {"build": native.build_report(), "ops": ops}
