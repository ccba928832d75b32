# SPDX-License-Identifier: Apache-2.0
"""Tell which way a call of an op takes: through PyTorch's dispatcher, or straight to its body.

PyTorch's way to a registered op costs 10 to 20 microseconds a call: as much as a small layer. It is there for whoever
watches calls: tracers, transforms, modes, tensor subclasses, profilers. Where none of them does, nothing is lost by
calling the body. The questions asked here are those that the dispatcher answers from its sets of keys.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_keys_of: Any = getattr(torch._C, "_dispatch_keys", None)
_scope_keys: Any = getattr(torch._C, "_dispatch_tls_local_include_set", None)
_function_modes: Any = getattr(torch._C, "_len_torch_function_stack", None)
_profiling: Any = getattr(torch.autograd, "_profiler_enabled", None)
_interpreters: Any = getattr(getattr(torch._C, "_functorch", None), "get_interpreter_stack", None)
_is_batched: Any = getattr(getattr(torch._C, "_functorch", None), "is_legacy_batchedtensor", None)
_is_excluded: Any = getattr(torch._C, "_dispatch_tls_is_dispatch_key_excluded", None)
_autograd_key: Any = getattr(getattr(torch._C, "DispatchKey", None), "AutogradFunctionality", None)


def _key_sets() -> tuple[frozenset[int], frozenset[int]]:
    """Return the keys of scopes in which nothing watches and of ordinary dense tensors; none where one cannot tell.

    In inference mode each lacks what belongs to autograd.
    """
    if None in (_keys_of, _scope_keys, _function_modes, _profiling, _is_excluded, _autograd_key):
        return frozenset(), frozenset()
    try:
        keys, key = torch._C.DispatchKeySet, torch._C.DispatchKey
        scope = keys(key.BackendSelect)
        scopes = {scope.raw_repr(), scope.add(key.ADInplaceOrView).raw_repr()}
        tensors: set[int] = set()
        for dense, autocast, autograd in (
            (key.CPU, key.AutocastCPU, key.AutogradCPU),
            (key.CUDA, key.AutocastCUDA, key.AutogradCUDA),
        ):
            inference = keys(dense).add(autocast)
            tensors |= {inference.raw_repr(), inference.add(key.ADInplaceOrView).add(autograd).raw_repr()}
    except (AttributeError, TypeError):
        return frozenset(), frozenset()
    return frozenset(scopes), frozenset(tensors)


_quiet_scopes, _ordinary_keys = _key_sets()
_VALUES = frozenset((type(None), str, float, int, bool))  # what most arguments are: nothing is asked of them


def _is_quiet() -> bool:
    return bool(_quiet_scopes) and _scope_keys().raw_repr() in _quiet_scopes and not _function_modes()


def _is_differentiated() -> bool:
    """Return whether a transform of torch.func that differentiates (grad, vjp, jvp, jacrev, ...) is under way."""
    stack = None if _interpreters is None else _interpreters()
    return stack is not None and any(level.key().name in ("Grad", "Jvp") for level in stack)


def has_tangent(arguments: Iterable[Any]) -> bool:
    """Return whether forward-mode AD follows a tensor among these arguments, or in a list there."""
    if getattr(forward_ad, "_current_level", 0) < 0:
        return False
    for argument in arguments:
        if isinstance(argument, (list, tuple)):
            if has_tangent(argument):
                return True
        elif isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            return True
    return False


def way(arguments: tuple[Any, ...]) -> str:
    """Return how a call of an op with these arguments is to be made.

    "composed": as PyTorch's own operators, where forward-mode AD or a transform of torch.func differentiates the call:
    they need a rule for each op, which those operators have.
    "dispatched": through PyTorch, where a tracer, transform, mode or profiler of this thread would see the call, where
    a tensor is more than a dense CPU or CUDA tensor (a subclass, a wrapper, a negated view: its memory is not its
    value), where a gradient is wanted beside or within a list of tensors, which PyTorch knows how to spread out, and
    where one is wanted below autograd, in the body of another op.
    "recorded": through the op's autograd function. "plain": straight to its body.
    """
    if torch.compiler.is_compiling():
        return "dispatched"
    if getattr(forward_ad, "_current_level", 0) >= 0 and has_tangent(arguments):
        return "composed"
    if not _is_quiet() or _profiling():
        return "composed" if _is_differentiated() else "dispatched"
    watched = has_list = False
    for argument in arguments:
        kind = type(argument)
        if kind in _VALUES:
            continue
        if kind is Tensor or kind is Parameter:
            if _keys_of(argument).raw_repr() not in _ordinary_keys:
                return "dispatched"
            watched = watched or argument.requires_grad
        elif kind is list or kind is tuple:
            if argument and isinstance(argument[0], Tensor):
                has_list = True
                if way(tuple(argument)) != "plain":
                    return "dispatched"
        elif isinstance(argument, Tensor):
            return "dispatched"
    if not watched or not torch.is_grad_enabled():
        return "plain"
    return "dispatched" if has_list or _is_excluded(_autograd_key) else "recorded"


def holds_many(grad: Tensor) -> bool:
    """Return whether `grad` is many gradients at once, as torch.autograd.grad(is_grads_batched=True) hands them on.

    PyTorch's first vmap carries them, which knows no rule of ours: it calls an op once a slice, but not one that takes
    or returns a list of tensors. Such an op's gradient is then made of PyTorch's own operators.
    """
    return _is_batched is not None and _is_batched(grad)


def is_ordinary(tensor: Tensor) -> bool:
    """Return whether `tensor` is dense, of no subclass, and in the hands of no tracer, transform or mode."""
    if torch.compiler.is_compiling() or not _is_quiet():
        return False
    return type(tensor) in (Tensor, Parameter) and _keys_of(tensor).raw_repr() in _ordinary_keys
