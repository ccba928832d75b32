# SPDX-License-Identifier: Apache-2.0
"""Which torch device a name means, checked to exist."""

from __future__ import annotations

import torch

from faceedit.errors import DeviceError, UsageError


def resolve_device(device: str | torch.device) -> torch.device:
    """The torch device called `device`: "cpu", "cuda", "cuda:N", or "auto" for CUDA when there is one, else the CPU.

    Raises: UsageError for a name that is no such device; DeviceError for one that this machine lacks.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = None
    if resolved is None or resolved.type not in ("cpu", "cuda"):
        raise UsageError(f"resolve_device: device must be cpu, cuda, cuda:N or auto, got {str(device)!r}; try cpu")
    if resolved.type == "cuda" and not (resolved.index or 0) < torch.cuda.device_count():
        raise DeviceError(f"resolve_device: device must exist on this machine, got {str(device)!r}; use cpu")
    return resolved
