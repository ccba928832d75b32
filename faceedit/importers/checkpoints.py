# SPDX-License-Identifier: Apache-2.0
"""Reading checkpoint files of any origin without ever running what they contain.

Three formats, told apart by their first bytes: safetensors; PyTorch's own (zip or legacy), read with `weights_only`;
and plain pickles, read by `_Reader`, which knows a dozen harmless names and refuses every other one. NVlabs' persistent
objects, whose pickles carry their classes' source code, become `Record`s: data without behaviour.
"""

import argparse
import io
import os
import pickle
import pickletools
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from faceedit.errors import WeightsError

_ZIP = b"PK\x03\x04"
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # PyTorch's magic number, pickled
_SAFETENSORS_HEADER = 8  # bytes of the length in front of the JSON header
_SCALARS = (bool, int, float, str)
_DEEPEST, _MOST_LEAVES = 40, 50_000  # far beyond any network; a few hundred bytes of pickle can claim 2^100 of them


@dataclass(frozen=True, slots=True)
class Record:
    """An object of some class, as data: the class's name and the attributes that were saved."""

    class_name: str
    state: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A file's name, for messages, and its content: mappings, tensors, records and scalars."""

    name: str
    content: Any


@dataclass(frozen=True, slots=True)
class State:
    """One network of a checkpoint, flat: tensors and scalar settings under dotted names."""

    name: str
    tensors: dict[str, Tensor]
    settings: dict[str, Any]

    def tensor(self, key: str) -> Tensor:
        """The tensor of that name. Raises WeightsError that names it."""
        if key not in self.tensors:
            raise WeightsError(f"import_weights: {self.name} must hold {key}, got none; the file is incomplete")
        return self.tensors[key]


def read_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The contents of a checkpoint file. Raises WeightsError for one that is missing, damaged or not harmless."""
    name = Path(path).name
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LEGACY))
            file.seek(0)
            if start[_SAFETENSORS_HEADER : _SAFETENSORS_HEADER + 1] == b"{":
                return Checkpoint(name, _read_safetensors(path))
            if start.startswith((_ZIP, _LEGACY)):
                return Checkpoint(name, _read_torch(file, name))
            return Checkpoint(name, _read_pickle(file, name))
    except OSError as error:
        raise WeightsError(
            f"import_weights: file must be readable, got {path} ({error.strerror or error}); check the path"
        ) from error


def flatten(name: str, content: Any) -> State:
    """One network as flat names: from a mapping of tensors, with or without nesting, or from a tree of records.

    A leading "module." of data-parallel training goes. Raises WeightsError when there is no tensor in it.
    """
    state = State(name, {}, {})
    for number, (key, value) in enumerate(_leaves("", content)):
        if number >= _MOST_LEAVES:
            raise WeightsError(
                f"import_weights: {name} must hold fewer than {_MOST_LEAVES} values, got more; check the file"
            )
        plain = key.removeprefix("module.")
        if isinstance(value, Tensor):
            state.tensors[plain] = value
        else:
            state.settings[plain] = value
    if not state.tensors:
        raise WeightsError(f"import_weights: {name} must hold a network's tensors, got none; check the file")
    return state


def _leaves(prefix: str, value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if depth > _DEEPEST:
        raise WeightsError(
            f"import_weights: a network must be nested at most {_DEEPEST} deep, got more at {prefix[:40]!r}; "
            "check the file"
        )
    if isinstance(value, Record):
        for group in ("_parameters", "_buffers", "_modules"):
            yield from _leaves(prefix, value.state.get(group) or {}, depth + 1)
        yield from ((f"{prefix}{key}", item) for key, item in value.state.items() if isinstance(item, _SCALARS))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            below = f"{prefix}{key}"
            if isinstance(item, Record | Mapping):
                yield from _leaves(f"{below}.", item, depth + 1)
            elif isinstance(item, (Tensor, *_SCALARS)):
                yield below, item


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    import safetensors
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except safetensors.SafetensorError as error:
        raise WeightsError(
            f"import_weights: {Path(path).name} must be a whole safetensors file, got {error}; fetch it again"
        ) from error


def _read_torch(file: Any, name: str) -> Any:
    try:
        # Training scripts keep their command line in an argparse.Namespace: attributes and nothing else.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can make the reader raise anything, an OSError too
        found = re.search(r"GLOBAL:? (\S+)", str(error))
        if found:
            raise _refused(name, found.group(1)) from error
        raise _damaged(name, error) from error


def _read_pickle(file: Any, name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of typed storages, which old pickles consist of
            _check_memo(file)
            return _Reader(file, name).load()
    except (WeightsError, OSError):
        raise
    except Exception as error:  # a hostile pickle can make any allowed class raise anything
        raise _damaged(name, error) from error


def _check_memo(file: Any) -> None:
    """Refuse a pickle that numbers its objects beyond their count: the reader would allocate room up to that number."""
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(argument or 0) > count:
            raise pickle.UnpicklingError("an object numbered beyond the last one")
    file.seek(0)


def _refused(name: str, class_name: str) -> WeightsError:
    return WeightsError(
        f"import_weights: {name} must hold tensors and plain data only, got {class_name}; nothing of it was run, "
        "do not trust this file"
    )


def _damaged(name: str, error: Exception) -> WeightsError:
    reason = (str(error) or type(error).__name__).strip().splitlines()[0]
    return WeightsError(f"import_weights: {name} must be a whole checkpoint, got {reason[:160]}; fetch it again")


class _Call:
    """A function that a pickle may call. It has no attributes that the pickle could write to."""

    __slots__ = ("_function",)
    _function: Callable[..., Any]

    def __init__(self, function: Callable[..., Any]) -> None:
        object.__setattr__(self, "_function", function)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(name)

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)


class _Inert:
    """What stands for an object that is of no use here: it takes any arguments and state and keeps its first ones."""

    __slots__ = ("arguments",)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __setstate__(self, state: Any) -> None:
        pass


class _Reader(pickle.Unpickler):
    """Builds tensors, containers, numbers and Records. Any name that is not in the table is refused, never imported."""

    def __init__(self, file: Any, name: str) -> None:
        super().__init__(file)
        self._name = name
        table: dict[str, Any] = {
            "collections.OrderedDict": OrderedDict,
            "builtins.set": set,
            "dnnlib.util.EasyDict": dict,
            "torch.Size": torch.Size,
            "torch.storage._load_from_bytes": _Call(_storage),
            "torch._utils._rebuild_tensor_v2": _Call(_tensor),
            "torch._utils._rebuild_parameter": _Call(_parameter),
            "torch_utils.persistence._reconstruct_persistent_obj": _Call(_record),
            "numpy.dtype": _Call(_Inert),
            "numpy.ndarray": _Call(_Inert),
        }
        for multiarray in ("numpy.core.multiarray", "numpy._core.multiarray"):
            table[f"{multiarray}.scalar"] = _Call(_number)
            table[f"{multiarray}._reconstruct"] = _Call(_Inert)
        self._table = table

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in self._table:
            return self._table[full]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full.startswith("dnnlib.tflib."):
            raise WeightsError(
                f"import_weights: {self._name} must be a PyTorch checkpoint, got {full} of TensorFlow; convert it with "
                "the legacy converter of its own project first"
            )
        raise _refused(self._name, full)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError("a reference to data outside the file")


def _storage(data: bytes) -> Any:
    storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a storage that is none")
    return storage


def _tensor(storage: Any, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    if not isinstance(storage, torch.storage.TypedStorage):
        raise pickle.UnpicklingError("a tensor without storage")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if min((offset, 0, *size, *stride)) < 0 or (0 not in size and last >= len(storage)):
        raise pickle.UnpicklingError("a tensor larger than its storage")
    whole = torch.empty(0, dtype=storage.dtype).set_(storage.untyped())
    return whole.as_strided(tuple(size), tuple(stride), offset)


def _parameter(data: Any, *_: Any) -> Tensor:
    if not isinstance(data, Tensor):
        raise pickle.UnpicklingError("a parameter that is no tensor")
    return data


def _number(dtype: Any, data: Any) -> float:
    code = dtype.arguments[0]
    if not isinstance(code, str) or not re.fullmatch(r"[fiu][1248]|b1", code):
        raise pickle.UnpicklingError(f"a number of type {code!r}")
    return np.frombuffer(data, dtype=code).item()


def _record(meta: Any) -> Record:
    if not isinstance(meta, dict) or not isinstance(meta.get("class_name"), str):
        raise pickle.UnpicklingError("a persistent object without a class name")
    state = meta.get("state")
    return Record(meta["class_name"], state if isinstance(state, dict) else {})
