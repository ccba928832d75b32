# SPDX-License-Identifier: Apache-2.0
"""Memory formats, argument checks and output allocation shared by every op."""

import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from operator import index
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Return the format an op computes and answers in for the image-like `x` (N,C,H,W).

    channels_last only when x is that and not plainly contiguous too: a tensor with C = 1 or H = W = 1 is both.
    """
    if x.is_contiguous() or x.dim() != 4:
        return torch.contiguous_format
    try:
        is_channels_last = x.is_contiguous(memory_format=torch.channels_last)
    except RuntimeError:  # a wrapper of torch.vmap, which answers for the plain format only
        is_channels_last = False
    return torch.channels_last if is_channels_last else torch.contiguous_format


def as_float(tensor: Tensor | None) -> Tensor | None:
    """Return a per-channel vector, map or scalar as native kernels read it: float32, contiguous."""
    if tensor is None or (tensor.dtype is torch.float32 and tensor.is_contiguous()):
        return tensor
    return tensor.to(torch.float32).contiguous()


def in_format(tensor: Tensor, dtype: torch.dtype, fmt: torch.memory_format) -> Tensor:
    """Return `tensor` in this dtype and format: itself where it is so already."""
    if tensor.dtype is dtype and tensor.is_contiguous(memory_format=fmt):
        return tensor
    return tensor.to(dtype).contiguous(memory_format=fmt)


def in_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `tensor` in this dtype: itself where it has it already."""
    return tensor if tensor.dtype is dtype else tensor.to(dtype)


def apart_from(y: Tensor, x: Tensor) -> Tensor:
    """Return y, copied where it may lie in x's memory: an op never returns its input."""
    try:
        shared = y.data_ptr() == x.data_ptr()
    except RuntimeError:  # a wrapper of torch.func, which does not show its memory
        shared = True
    return y.clone() if shared else y


def flat_planes(x: Tensor) -> Tensor:
    """Return (N,C,H,W) as (N,C,H*W), differentiable. Not by `flatten`: many gradients at a time do not have it."""
    n, c, h, w = x.shape
    return x.reshape(n, c, h * w)


def describe(tensor: Tensor) -> str:
    """Return dtype and shape as error messages show them, e.g. `float32 of shape (2, 3)`."""
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def check_tensor(op: str, name: str, value: object, hint: str = "make it one with torch.as_tensor") -> None:
    """Raise unless `value` is a tensor; `hint` says what to do."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {short(value)}; {hint}")


def check_number(op: str, name: str, value: object, hint: str = "pass one as Python's or NumPy's") -> None:
    """Raise unless `value` is a number. A tensor is none: its gradient would be lost."""
    if not isinstance(value, (float, int)) and not isinstance(value, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"{op}: {name} must be a number, got {short(value)}; {hint}")


def as_number(value: Any) -> Any:
    """Return a number as every backend takes it: NumPy's and other libraries' as Python's, a traced one as it is."""
    return value if type(value) in (float, int) or isinstance(value, (torch.SymInt, torch.SymFloat)) else float(value)


def as_integer(op: str, name: str, value: Any, hint: str) -> Any:
    """Return an argument that must be an integer, Python's or another library's; TypeError for anything else."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        return index(value)
    except TypeError:
        raise TypeError(f"{op}: {name} must be an integer, got {short(value)}; {hint}") from None


def as_list(op: str, name: str, tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return an argument that must be several tensors as a list."""
    try:
        return list(tensors)
    except TypeError:
        raise TypeError(f"{op}: {name} must be a list of tensors, got {short(tensors)}; put one into a list") from None


def check_image(op: str, name: str, x: Tensor) -> None:
    """Raise unless x is a floating point (N,C,H,W) tensor."""
    if not isinstance(x, Tensor):
        check_tensor(op, name, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} must be of shape (N, C, H, W), got {describe(x)}; add the missing axes")
    if not x.is_floating_point():
        check_floating(op, name, x)


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Raise unless `tensor` is a floating point tensor: another dtype, complex among them, would lose values."""
    check_tensor(op, name, tensor)
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: {name} must be floating point, got {describe(tensor)}; cast it first")


def check_shape(
    op: str, name: str, tensor: Tensor, x: Tensor, *allowed: tuple[int, ...], any_dtype: bool = False
) -> None:
    """Raise unless `tensor` is floating point, has one of the allowed shapes and lies on x's device.

    any_dtype: of whatever dtype, which the caller looks at.
    """
    if not isinstance(tensor, Tensor):
        check_tensor(op, name, tensor)
    given = tensor.shape
    for shape in allowed:
        # Lengths first: comparing sizes of another rank would tie a traced graph to their values.
        if len(given) == len(shape) and given == shape:
            break
    else:
        wanted = " or ".join(dict.fromkeys(str(tuple(shape)) for shape in allowed))
        raise ValueError(f"{op}: {name} must be of shape {wanted}, got {describe(tensor)}; reshape or expand it")
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} must be on {x.device}, got {tensor.device}; move it there")
    if not any_dtype and not tensor.dtype.is_floating_point:
        check_floating(op, name, tensor)


def check_mask(op: str, name: str, mask: Tensor, x: Tensor, halved: bool = False) -> None:
    """Raise unless `mask` weighs the pixels of x: (N,1,H,W) or (1,1,H,W), floating point, uint8 or bool.

    halved: half of an even height and width will do too.
    """
    check_tensor(op, name, mask)
    n, _, h, w = x.shape
    allowed = [(n, 1, h, w), (1, 1, h, w)]
    if halved and mask.shape not in allowed and h % 2 == w % 2 == 0:
        allowed += [(n, 1, h // 2, w // 2), (1, 1, h // 2, w // 2)]
    check_shape(op, name, mask, x, *allowed, any_dtype=True)
    if not mask.is_floating_point() and mask.dtype not in (torch.uint8, torch.bool):
        raise TypeError(f"{op}: {name} must be floating point, uint8 or bool, got {describe(mask)}; cast it")


@dataclass(slots=True)
class Guards:
    """The buffers handed out while outputs were poisoned, for a test to look round their edges."""

    buffers: list[tuple[Tensor, int]] = field(default_factory=list)

    def untouched(self) -> bool:
        """Return whether every guard band still holds nothing but the fill value."""
        return all(
            bool(_filled(buffer[:GUARD]).all() and _filled(buffer[GUARD + used :]).all())
            for buffer, used in self.buffers
        )


def _filled(values: Tensor) -> Tensor:
    return values.isnan() if values.is_floating_point() else values == INTEGER_POISON


INTEGER_POISON = 171  # fits every integer dtype; an unlikely result
GUARD = 64  # elements either side of a poisoned buffer

Allocate = Callable[[tuple[int, ...], Tensor, torch.dtype, torch.memory_format], Tensor]
_allocate: Allocate | None = None  # in place of PyTorch's, inside `poison()` or `reused()`


@contextmanager
def _allocating(allocate: Allocate) -> Iterator[None]:
    global _allocate
    before, _allocate = _allocate, allocate
    try:
        yield
    finally:
        _allocate = before


@contextmanager
def poison() -> Iterator[Guards]:
    """Fill outputs and workspaces with NaN (integers: 171) between guard bands, before a kernel runs: for tests.

    An element the kernel fails to write stays NaN; a write outside the buffer shows in `Guards.untouched()`.
    """
    guards = Guards()

    def allocate(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype, fmt: torch.memory_format) -> Tensor:
        layout = torch.empty(shape, device="meta", dtype=dtype, memory_format=fmt)
        fill = float("nan") if dtype.is_floating_point else INTEGER_POISON
        buffer = torch.full((layout.numel() + 2 * GUARD,), fill, device=like.device, dtype=dtype)
        guards.buffers.append((buffer, layout.numel()))
        return buffer[GUARD : GUARD + layout.numel()].as_strided(layout.shape, layout.stride(), GUARD)

    with _allocating(allocate):
        yield guards


@contextmanager
def reused(kept: list[Tensor]) -> Iterator[None]:
    """Hand out the tensors of `kept` in order and add what is missing: for a benchmark that repeats a call.

    Results of the last run with the same list are overwritten.
    """
    position = 0

    def allocate(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype, fmt: torch.memory_format) -> Tensor:
        nonlocal position
        found = kept[position] if position < len(kept) else None
        if found is None or found.shape != shape or found.dtype != dtype or not found.is_contiguous(memory_format=fmt):
            found = torch.empty(shape, device=like.device, dtype=dtype, memory_format=fmt)
            kept[position:] = [found]
        position += 1
        return found.detach()  # a tensor of its own, which autograd may mark as it likes

    with _allocating(allocate):
        yield


def empty(shape: tuple[int, ...], like: Tensor, dtype: torch.dtype, fmt: torch.memory_format) -> Tensor:
    """Allocate an output or workspace on like's device, uninitialised (poisoned inside `poison()`)."""
    if _allocate is None:
        return torch.empty(shape, device=like.device, dtype=dtype, memory_format=fmt)
    return _allocate(shape, like, dtype, fmt)


class _Scratch(threading.local):
    buffer: Tensor | None = None


_scratch = _Scratch()
MOST_SCRATCH = 2**24  # floats that a thread keeps at most


def scratch(like: Tensor, size: int) -> Tensor:
    """Return float32 values on the CPU, uninitialised, for use within the calling kernel alone.

    The thread's own, kept from call to call: the system hands out fresh memory page by page, which takes as long as a
    small layer's kernel. Of at least `size`.
    """
    if _allocate is not None or size > MOST_SCRATCH:
        return empty_float(like, size)
    kept = _scratch.buffer
    if kept is None or kept.numel() < size:
        kept = _scratch.buffer = torch.empty(size, dtype=torch.float32, device="cpu")
    return kept


def empty_like(x: Tensor, fmt: torch.memory_format) -> Tensor:
    """Allocate an output of x's shape and dtype in format `fmt`."""
    if _allocate is None:
        return torch.empty_like(x, memory_format=fmt)
    return empty(tuple(x.shape), x, x.dtype, fmt)


def empty_float(like: Tensor, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Allocate a float32 (or wider) vector, map or workspace."""
    if _allocate is None:
        return like.new_empty(shape, dtype=dtype)
    return empty(shape, like, dtype, torch.contiguous_format)
