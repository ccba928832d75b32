# SPDX-License-Identifier: Apache-2.0
"""Weights as rows of data: what there is, where it came from, and loading it strictly.

A weights file is safetensors with one JSON header under the metadata key "faceedit": everything about the network is
written there once. `index.json` beside the files pins each file's name, size and SHA-256. Nothing here ever unpickles.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faceedit.atomic import replacing, unusable_name, write_text
from faceedit.config import from_dict, parse_json, to_dict
from faceedit.errors import FaceEditError, UnknownNameError, UsageError, WeightsError, suggestion
from faceedit.networks import network_kind

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

METADATA_KEY = "faceedit"
FORMAT_VERSION = 1
MAX_FILE_BYTES = 12 * 2**20
MAX_TOTAL_BYTES = 64 * 2**20
PACKAGED = Path(__file__).parent / "weights"
DIRECTORY_VARIABLE = "FACEEDIT_WEIGHTS"

_MAX_CONFIG_INTEGER = 2**24  # beyond any width or size; what is computed from it, as 2**stages, stays computable

# SPDX identifiers, and references for the terms that have none. Weights under any other licence are not shipped.
LICENCES: frozenset[str] = frozenset(
    {
        "Apache-2.0",
        "MIT",
        "BSD-2-Clause",
        "BSD-3-Clause",
        "CC0-1.0",
        "CC-BY-4.0",
        "CC-BY-NC-SA-4.0",
        "LicenseRef-CelebAMask-HQ-non-commercial",
        "LicenseRef-NVIDIA-Source-Code-NC",
        "LicenseRef-unstated",
    }
)


@dataclass(frozen=True, slots=True)
class WeightsHeader:
    """What a weights file says of itself.

    Args: kind, one of `faceedit.networks.KINDS`; config, that kind's configuration as a plain dict; licence, one of
          LICENCES; training_data and recipe, what it was trained on and by; input_range, of the network's images;
          label_scheme and attributes, how masks and attribute columns are read ("" and () when it has none); metrics,
          recorded numbers; source, who made it; format, version of this header.
    """

    kind: str
    config: dict[str, Any]
    licence: str
    training_data: str
    source: str
    recipe: str = ""
    input_range: tuple[float, float] = (-1.0, 1.0)
    label_scheme: str = ""
    attributes: tuple[str, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    format: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        network_kind(self.kind)
        if self.licence not in LICENCES:
            raise UsageError(
                f"WeightsHeader: licence must be a known identifier, got {self.licence!r}; "
                f"{suggestion(self.licence, LICENCES)}"
            )
        if self.format != FORMAT_VERSION:
            raise UsageError(
                f"WeightsHeader: format must be {FORMAT_VERSION}, got {self.format}; use the faceedit that wrote the "
                "file"
            )


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One row of the registry.

    Args: name, what users type; file, name in the weights folder; sha256 and bytes, of that file; card, file name of
          the model card ("" for none); url, where it came from ("" when it ships with the package);
          path, where it is on this machine.
    """

    name: str
    file: str
    sha256: str
    bytes: int
    card: str = ""
    url: str = ""
    path: Path = field(default=Path(), compare=False)

    @property
    def header(self) -> WeightsHeader:
        """The file's own header. Raises WeightsError when the file is missing or not one of ours."""
        return read_header(self.path)


def directories() -> tuple[Path, ...]:
    """Folders that hold registered weights, first match wins: $FACEEDIT_WEIGHTS when set, then the package's own.

    Raises WeightsError when the variable names no folder.
    """
    override = os.environ.get(DIRECTORY_VARIABLE)
    if not override:
        return (PACKAGED,)
    folder = os.path.expanduser(override)
    if not os.path.isdir(folder):
        raise WeightsError(
            f"directories: {DIRECTORY_VARIABLE} must name a folder, got {override[:300]}; correct it or unset it"
        )
    return (Path(folder), PACKAGED)


def list_weights() -> tuple[WeightSpec, ...]:
    """Every registered row, in order of name.

    Files of $FACEEDIT_WEIGHTS that its index does not name (it need not have one) are rows as well, called as their
    stems and not pinned. Raises WeightsError for a folder that is none or an index that cannot be read.
    """
    rows: dict[str, WeightSpec] = {}
    for directory in directories():
        indexed = _read_index(directory)
        for row in indexed if directory == PACKAGED else [*indexed, *_unindexed(directory, indexed)]:
            rows.setdefault(row.name, row)
    return tuple(rows[name] for name in sorted(rows))


def find(name_or_path: str | os.PathLike[str], kind: str = "") -> WeightSpec:
    """The row of a registered name, or an unpinned row for a path to a safetensors file.

    Args:    kind, when given, lets "starter" stand for "<kind>-starter".
    Raises:  UnknownNameError with the nearest names; WeightsError for a path that is no file.
    """
    name = os.fspath(name_or_path)
    rows = {row.name: row for row in list_weights()}
    for candidate in (name, f"{kind}-{name}" if kind else name):
        if candidate in rows:
            return rows[candidate]
    path = Path(name)
    if reason := unusable_name(path):
        raise WeightsError(f"find: weights must be a registered name or a path, got {name} ({reason}); check the path")
    if path.suffix == ".safetensors" or path.is_file():
        if not path.is_file():
            raise WeightsError(f"find: weights must be a readable file, got {name}; check the path")
        return _unpinned(path)
    if not rows:
        raise UnknownNameError(
            f"find: weights must be registered, got {name!r}; none is installed, give a path instead"
        )
    raise UnknownNameError(f"find: weights must be a registered name or a path, got {name!r}; {suggestion(name, rows)}")


def describe(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """All that is known about some weights, as plain data: row, header and the text of the model card.

    Size and SHA-256 are the file's own; where the index pins another, "problem" says so, else it is "".

    Raises: UnknownNameError; WeightsError for a file that does not hold the network it describes. Values are not read.
    """
    row = find(name_or_path)
    header, shapes = _contents(row.path)
    _configured(header, shapes, row.path)
    card = row.path.parent / row.card if row.card else None
    digest = sha256_of(row.path)
    is_altered = row.sha256 not in ("", digest)
    return {
        "name": row.name,
        "file": str(row.path),
        "bytes": row.path.stat().st_size,
        "sha256": digest,
        "pinned": bool(row.sha256),
        "problem": f"the index pins {row.sha256[:12]}…, this is another file; install it again" if is_altered else "",
        "url": row.url,
        **to_dict(header),
        "card": card.read_text(encoding="utf-8", errors="replace") if card is not None and card.is_file() else "",
    }


def read_header(path: str | os.PathLike[str]) -> WeightsHeader:
    """The header of a weights file, without reading its tensors. Raises WeightsError."""
    return _contents(path)[0]


def _contents(path: str | os.PathLike[str]) -> tuple[WeightsHeader, dict[str, tuple[int, ...]]]:
    """A file's header and the shapes of its tensors."""
    import safetensors

    try:
        with safetensors.safe_open(os.fspath(path), framework="np") as file:
            metadata = file.metadata() or {}
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"read_header: weights must be a safetensors file, got {path} ({error}); check the file, or convert a "
            "checkpoint with `faceedit weights import`"
        ) from error
    if METADATA_KEY not in metadata:
        raise WeightsError(
            f"read_header: weights must carry a {METADATA_KEY} header, got {path} without one; convert it with "
            "`faceedit weights import`"
        )
    try:
        header = from_dict(WeightsHeader, parse_json(metadata[METADATA_KEY], where="header"), where="header")
    except (FaceEditError, ValueError) as error:
        raise WeightsError(f"read_header: header must be valid, got {path} ({error}); export the file again") from error
    if any(abs(number) > _MAX_CONFIG_INTEGER for number in _integers(header.config)):
        raise WeightsError(
            f"read_header: header must be valid, got {path} (config holds an integer beyond ±{_MAX_CONFIG_INTEGER}); "
            "export the file again"
        )
    return header, shapes


def _integers(value: Any) -> Iterator[int]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _integers(item)
    elif isinstance(value, int):
        yield value


def save_weights(
    path: str | os.PathLike[str],
    kind: str,
    config: Any,
    state_dict: "Mapping[str, Tensor]",
    *,
    licence: str,
    training_data: str,
    source: str,
    recipe: str = "",
    label_scheme: str = "",
    attributes: tuple[str, ...] = (),
    metrics: Mapping[str, float] | None = None,
    half: bool = True,
) -> WeightsHeader:
    """Write a network's weights with the header that describes them; an existing file is replaced at once or not at
    all.

    Args:    config, instance of the kind's configuration class; half, store matrices and kernels in fp16 (vectors, such
             as running variances, stay fp32: they weigh nothing and may exceed fp16).
    Raises:  WeightsError when config is not the kind's, or a value is not finite in the stored type; UsageError for an
             unknown licence.
    """
    import torch
    from safetensors.torch import save

    config_class, _ = network_kind(kind).classes()
    if not isinstance(config, config_class):
        raise WeightsError(
            f"save_weights: config must be {config_class.__name__} for {kind}, got {type(config).__name__}; pass its "
            "own"
        )
    header = WeightsHeader(
        kind=kind,
        config=to_dict(config),
        licence=licence,
        training_data=training_data,
        source=source,
        recipe=recipe,
        label_scheme=label_scheme,
        attributes=tuple(attributes),
        metrics={name: float(value) for name, value in (metrics or {}).items()},
    )
    tensors = {}
    for name, tensor in state_dict.items():
        stored = tensor.detach().to("cpu").contiguous().clone()
        if stored.is_floating_point():
            stored = stored.to(torch.float16 if half and stored.ndim > 1 else torch.float32)
            if not _is_finite(stored):
                raise WeightsError(
                    f"save_weights: {name} must be finite as {stored.dtype}, got infinity or NaN; train again or "
                    "pass half=False"
                )
        tensors[name] = stored
    try:
        with replacing(path) as file:
            file.write(save(tensors, metadata={METADATA_KEY: json.dumps(to_dict(header), sort_keys=True)}))
    except OSError as error:
        raise WeightsError(
            f"save_weights: path must be writable, got {path} ({error}); choose another folder"
        ) from error
    return header


def pin_weights(name: str, path: str | os.PathLike[str], *, card: str = "", url: str = "") -> WeightSpec:
    """Register a weights file: write or replace its row in the index of the folder that it lies in."""
    target = Path(path)
    read_header(target)
    row = WeightSpec(name, target.name, sha256_of(target), target.stat().st_size, card, url, target)
    rows = {other.name: other for other in _read_index(target.parent)} | {name: row}
    index = [{k: v for k, v in dataclasses.asdict(rows[n]).items() if k != "path"} for n in sorted(rows)]
    write_text(target.parent / "index.json", json.dumps(index, indent=2) + "\n")
    return row


def load_weights(network: "nn.Module", path: str | os.PathLike[str], sha256: str = "") -> None:
    """Fill a network from a file, strictly: same names, same shapes, nothing left over on either side, all finite.

    Values are converted to the dtype the network has. Raises WeightsError; the network is then unchanged.
    """
    import safetensors
    from safetensors.torch import load_file

    if sha256 and sha256_of(path) != sha256:
        raise WeightsError(
            f"load_weights: {path} must have SHA-256 {sha256[:12]}…, got another; install the file again"
        )
    try:
        stored = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(
            f"load_weights: weights must be a safetensors file, got {path} ({error}); check the file"
        ) from error
    wanted = network.state_dict()
    _check_fit(type(network).__name__, _shapes(wanted), _shapes(stored), path)
    values = {name: tensor.to(wanted[name].dtype) for name, tensor in stored.items()}
    for name, tensor in values.items():
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise WeightsError(
                f"load_weights: {name} in {path} must be finite as {tensor.dtype}, got infinity or NaN; get or train "
                "other weights"
            )
    network.load_state_dict(values, strict=True)


def load_network(
    name_or_path: str | os.PathLike[str], device: "str | torch.device" = "cpu", *, kind: str = ""
) -> "nn.Module":
    """Any single network, ready to run: fp32, in evaluation mode, parameters frozen, on `device`.

    Args:    name_or_path, a registered name or a safetensors file; kind, when given, the network it has to be.
    Returns: the module; its `header` attribute is the file's WeightsHeader.
    Raises:  UnknownNameError for a name that does not exist; WeightsError for a file that is missing, altered, damaged
             or of another kind; DeviceError for a device that is not here.
    """
    import torch

    from faceedit.devices import resolve_device

    place = resolve_device(device)
    row = find(name_or_path, kind)
    header, shapes = _contents(row.path)
    if kind and header.kind != kind:
        raise WeightsError(
            f"load_network: weights must hold a {kind}, got {header.kind} in {row.path}; name other weights"
        )
    network_class, config = _configured(header, shapes, row.path)
    with torch.inference_mode(False):  # weights made in that mode would pass no gradient to an image, ever
        network = network_class(config)
        load_weights(network, row.path, row.sha256)
        network.header = header  # type: ignore[assignment]
        return network.eval().requires_grad_(False).to(place)


def _configured(
    header: WeightsHeader, shapes: Mapping[str, tuple[int, ...]], path: Path
) -> "tuple[type[nn.Module], Any]":
    """Class and configuration of the network that a header describes, if tensors of these shapes fill it.

    What a file claims is compared with what it holds before anything of the claimed size is allocated. Raises
    WeightsError, whatever the constructor makes of the configuration.
    """
    from faceedit.labels import scheme
    from faceedit.networks.state_shapes import state_shapes

    config_class, network_class = network_kind(header.kind).classes()
    try:
        if header.label_scheme:
            scheme(header.label_scheme)
        config: Any = from_dict(config_class, header.config)
        wanted = state_shapes(network_class, config, len(shapes))
    except Exception as error:  # constructors meet hostile sizes with RuntimeError, TypeError, OverflowError, ...
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise WeightsError(
            f"load_network: configuration must be valid, got {path} ({reason}); export it again"
        ) from error
    _check_fit(network_class.__name__, wanted, shapes, path)
    return network_class, config


def _shapes(tensors: "Mapping[str, Tensor]") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_fit(
    network: str,
    wanted: Mapping[str, tuple[int, ...]],
    given: Mapping[str, tuple[int, ...]],
    path: str | os.PathLike[str],
) -> None:
    missing, surplus = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    reshaped = [name for name in sorted(wanted.keys() & given.keys()) if wanted[name] != given[name]]
    if missing or surplus or reshaped:
        raise WeightsError(
            f"load_weights: {path} must fit {network} exactly, got missing {_some(missing)}, "
            f"unexpected {_some(surplus)}, other shapes {_some(reshaped)}; use the weights of this configuration"
        )


def _is_finite(tensor: "Tensor") -> bool:
    """Whether no value is infinity or NaN: both are seen in the extremes, which take one pass and no memory."""
    return tensor.numel() == 0 or all(bool(bound.isfinite()) for bound in tensor.aminmax())


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file, in hexadecimal. Raises WeightsError when it cannot be read."""
    try:
        status = os.stat(path)
        return _digest(os.fspath(path), status.st_size, status.st_mtime_ns)
    except OSError as error:
        raise WeightsError(
            f"sha256_of: weights must be a readable file, got {path} ({error}); check the path"
        ) from error


@cache
def _digest(path: str, size: int, modified_ns: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_index(directory: Path) -> list[WeightSpec]:
    index = directory / "index.json"
    if not index.is_file():
        return []
    try:
        rows = [
            from_dict(WeightSpec, row, where=f"{index.name}[{i}]")
            for i, row in enumerate(parse_json(index.read_bytes(), where=index.name))
        ]
    except (FaceEditError, ValueError, OSError, TypeError) as error:
        raise WeightsError(
            f"list_weights: {index} must be a valid index, got {error}; install the package again"
        ) from error
    return [dataclasses.replace(row, path=directory / row.file) for row in rows]


def _unindexed(directory: Path, indexed: list[WeightSpec]) -> list[WeightSpec]:
    named = {row.file for row in indexed}
    files = [path for path in directory.glob("*.safetensors") if path.name not in named and path.is_file()]
    return [_unpinned(path) for path in files]


def _unpinned(path: Path) -> WeightSpec:
    return WeightSpec(path.stem, path.name, "", path.stat().st_size, path=path)


def _some(names: list[str]) -> str:
    return "none" if not names else ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
