# SPDX-License-Identifier: Apache-2.0
"""Frozen dataclasses as the only source of configuration: strict reading from plain mappings, and back.

Recipes, command-line overrides and weights headers all fill a dataclass through `from_dict`, so a misspelt key or a
value of the wrong type is an error everywhere and a default is written in one place only.
"""

import dataclasses
import json
import math
import reprlib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from faceedit.errors import OutOfRangeError, UnknownNameError, UsageError, suggestion

T = TypeVar("T")

MAX_JSON_BYTES = 2**20
MAX_NESTING = 32


class OwnKeyError(OutOfRangeError):
    """A dataclass refuses the value of one of its own keys, which it calls by their bare names.

    Args: function and key, as messages begin; reason, what comes after. `from_dict`, which knows where the dataclass
          stands in a recipe, raises it `below` there.
    """

    def __init__(self, function: str, key: str, reason: str) -> None:
        super().__init__(function, key, reason)  # as `args`, so that it can be pickled
        self.function, self.key, self.reason = function, key, reason

    def __str__(self) -> str:
        return f"{self.function}: {self.key} {self.reason}"

    def below(self, where: str) -> "OwnKeyError":
        """The same error, its key under that path; the first name of the path is what the whole is called."""
        path = where.partition(".")[2]
        return OwnKeyError(self.function, f"{path}.{self.key}" if path else self.key, self.reason)


_shown = reprlib.Repr()  # values in messages, which someone else's file must not fill with megabytes
_shown.maxstring = _shown.maxlong = _shown.maxother = 120
_shown.maxdict = _shown.maxlist = _shown.maxtuple = 12


def parse_json(text: str | bytes, *, where: str) -> Any:
    """Plain data from JSON of unknown origin: at most MAX_JSON_BYTES long and MAX_NESTING containers deep.

    Raises: UsageError, which calls the text `where`.
    """
    if len(text) > MAX_JSON_BYTES:
        raise UsageError(f"parse_json: {where} must have at most {MAX_JSON_BYTES} bytes, got {len(text)}; shorten it")
    deep = f"parse_json: {where} must nest at most {MAX_NESTING} lists and mappings, got more; flatten it"
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise UsageError(deep) from error
    except ValueError as error:
        raise UsageError(f"parse_json: {where} must be JSON, got {_shown.repr(text)} ({error}); correct it") from error
    level = [value]
    for _ in range(MAX_NESTING + 1):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer if isinstance(outer, list) else ())
        ]
        if not level:
            return value
    raise UsageError(deep)


def from_dict(cls: type[T], mapping: Mapping[str, Any], *, where: str = "") -> T:
    """An instance of a dataclass from a plain mapping; fields that the mapping leaves out keep their defaults.

    Nested dataclasses are read from nested mappings, tuples from lists, a float from an integer, a path from a string;
    nothing else converts.

    Args:    cls, a dataclass; mapping, as YAML or JSON gives it; where, what errors call this mapping (default: the
             class).
    Raises:  UnknownNameError for a key that is no field, with the nearest ones; UsageError for a missing or a wrong
             value, and for whatever the dataclass itself refuses.
    """
    where = where or cls.__name__
    if not isinstance(mapping, Mapping):
        raise UsageError(f"from_dict: {where} must be a mapping, got {_shown.repr(mapping)}; write its keys below it")
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}  # type: ignore[arg-type]
    for key in mapping:
        if key not in fields:
            raise UnknownNameError(
                f"from_dict: {where} must have known keys only, got {key!r}; {suggestion(str(key), fields)}"
            )
    kinds = typing.get_type_hints(cls)
    missing = [
        name
        for name, field in fields.items()
        if name not in mapping and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise UsageError(
            f"from_dict: {where} must give {', '.join(missing)}, got {_shown.repr(list(mapping))}; add what is missing"
        )
    values = {key: _convert(kinds[key], value, f"{where}.{key}") for key, value in mapping.items()}
    try:
        return cls(**values)
    except OwnKeyError as error:
        raise error.below(where) from error
    except (ValueError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(str(error)) from error
    except ArithmeticError as error:
        raise UsageError(f"from_dict: {where} must be numbers to compute with, got {error}; correct them") from error


def to_dict(config: Any) -> dict[str, Any]:
    """A dataclass as plain dicts, lists and scalars, ready for JSON or YAML; `from_dict` reads it back to an equal
    value."""
    return {field.name: _plain(getattr(config, field.name)) for field in dataclasses.fields(config) if field.init}


def check_choices(config: Any) -> None:
    """Refuse a value that is none of its field's `Literal` choices, which Python itself takes; for `__post_init__`.

    Raises: UnknownNameError that lists the closest ones.
    """
    kinds = typing.get_type_hints(type(config))
    for field in dataclasses.fields(config):
        if typing.get_origin(kinds[field.name]) is not typing.Literal:
            continue
        value, choices = getattr(config, field.name), typing.get_args(kinds[field.name])
        if value not in choices:
            raise UnknownNameError(
                f"{type(config).__name__}: {field.name} must be one of {', '.join(map(str, choices))}, got "
                f"{_shown.repr(value)}; {suggestion(str(value), [str(choice) for choice in choices])}"
            )


def without_infinities(value: Any) -> Any:
    """Plain data for JSON, which has neither NaN nor infinity: None in their place, lists for tuples."""
    if isinstance(value, Mapping):
        return {key: without_infinities(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [without_infinities(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return to_dict(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    return value


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` as the annotated type `kind`, or UsageError."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if kind is Path and isinstance(value, str):
        return Path(value)
    if dataclasses.is_dataclass(kind):
        return value if isinstance(value, kind) else from_dict(kind, value, where=where)  # type: ignore[arg-type]
    if origin is typing.Literal:
        if value in arguments:
            return value
        hint = suggestion(str(value), [str(choice) for choice in arguments])
        raise UsageError(
            f"from_dict: {where} must be one of {', '.join(map(repr, arguments))}, got {_shown.repr(value)}; {hint}"
        )
    if origin in (typing.Union, types.UnionType):
        return _convert_union(arguments, value, where)
    if origin is tuple and isinstance(value, Sequence) and not isinstance(value, str):
        kinds = [arguments[0]] * len(value) if arguments[1:] == (...,) else list(arguments)
        if len(kinds) == len(value):
            pairs = zip(kinds, value, strict=True)
            return tuple(_convert(item_kind, item, f"{where}[{i}]") for i, (item_kind, item) in enumerate(pairs))
    elif origin in (list, Sequence):
        if isinstance(value, Sequence) and not isinstance(value, str):
            return [_convert(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    elif origin is not None and issubclass(origin, Mapping) and isinstance(value, Mapping):
        return {key: _convert(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    elif origin is None and _is_scalar(kind, value):
        try:
            return float(value) if kind is float else value
        except OverflowError as error:
            raise UsageError(
                f"from_dict: {where} must be a float, got {_shown.repr(value)}; give a smaller number"
            ) from error
    expected = getattr(kind, "__name__", None) if origin is None else str(kind)
    raise UsageError(f"from_dict: {where} must be {expected}, got {_shown.repr(value)}; give a value of that type")


def _convert_union(choices: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and type(None) in choices:
        return None
    failure: UsageError | None = None
    for choice in choices:
        if choice is type(None):
            continue
        try:
            return _convert(choice, value, where)
        except UsageError as error:
            failure = error
    raise failure or UsageError(f"from_dict: {where} must be null, got {_shown.repr(value)}; leave it out")


def _is_scalar(kind: Any, value: Any) -> bool:
    if not isinstance(kind, type):
        return False
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)
