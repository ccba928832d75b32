# SPDX-License-Identifier: Apache-2.0
"""Freed memory stays with the process, for the next tensors."""

from __future__ import annotations

import ctypes
import os
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Have glibc's allocator reuse what is freed instead of giving it back; return whether it now does.

    It returns large blocks to the kernel at once, and the kernel clears each page again for the next layer's result.
    Nothing is changed where the environment configures an allocator, or where malloc is not glibc's.
    """
    configured = "LD_PRELOAD" in os.environ or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if configured or any(name.startswith("MALLOC_") for name in os.environ) or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # No block is mapped by itself, and the heap is never cut back: 1 means accepted.
    return mallopt is not None and bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, -1))
