# SPDX-License-Identifier: Apache-2.0
"""From the tensors of a checkpoint to the state of one of our networks, strictly: what every importer ends with."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from faceedit.errors import WeightsError
from faceedit.importers.checkpoints import State

_MAX_WIDTH = 1 << 14
_COUNTER = "num_batches_tracked"  # of batch normalisation; older files leave it out, and only training reads it


@dataclass(frozen=True, slots=True)
class Converted:
    """A checkpoint's network as ours: its kind, configuration and state; origin, a few words on where it came from."""

    kind: str
    config: Any
    state_dict: dict[str, Tensor]
    origin: str


def fill(
    network_class: Callable[[Any], nn.Module],
    kind: str,
    config: Any,
    state: State,
    origin: str,
    *,
    names: Mapping[str, str] | None = None,
    what: str = "",
    ignored: Callable[[str], bool] = lambda key: False,
) -> Converted:
    """The state of our network from a checkpoint's tensors; every tensor is used, and every shape fits.

    Args:    names, the file's name for each of ours (default: they are the same); what, how messages call such a file
             (default: kind); ignored, which of the file's names hold nothing that the network needs.
    Returns: floats in fp32; a batch counter that is absent is 0. Axes of length one do not count as a difference.
    Raises:  WeightsError that names what is missing, left over or of another shape.
    """
    with torch.device("meta"):
        wanted = network_class(config).state_dict()
    names = {ours: ours for ours in wanted} if names is None else names
    missing = [names[ours] for ours in wanted if names[ours] not in state.tensors and not ours.endswith(_COUNTER)]
    if missing:
        raise WeightsError(
            f"import_weights: {state.name} must hold {_listed(missing)}, got none; the file is incomplete"
        )
    used = {names[ours] for ours in wanted}
    surplus = [key for key in state.tensors if key not in used and not ignored(key)]
    if surplus:
        raise WeightsError(
            f"import_weights: {state.name} must hold nothing but {what or kind}, got {_listed(surplus)}; check what "
            "it is"
        )
    converted = {}
    for ours, tensor in wanted.items():
        if names[ours] not in state.tensors:
            converted[ours] = torch.zeros((), dtype=torch.int64)
            continue
        theirs = state.tensors[names[ours]]
        if [n for n in theirs.shape if n != 1] != [n for n in tensor.shape if n != 1]:
            raise WeightsError(
                f"import_weights: {names[ours]} of {state.name} must have the shape {shape_text(tensor.shape)} at "
                f"{config.size_px} px, got {shape_text(theirs.shape)}; the file is inconsistent"
            )
        converted[ours] = plain(state, names[ours], tensor.dtype).reshape(tensor.shape)
    return Converted(kind, config, converted, origin)


def plain(state: State, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """A tensor of the file as floats of that dtype, or as integers for an integer one.

    Refuses kinds that no checkpoint has, and views by which a small file would become large.
    """
    tensor = state.tensor(key)
    fits = tensor.is_floating_point() if dtype.is_floating_point else tensor.dtype == dtype
    is_plain = tensor.layout == torch.strided and tensor.device.type == "cpu" and fits
    if not is_plain or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        expected = "floats" if dtype.is_floating_point else "integers"
        raise WeightsError(
            f"import_weights: {key} of {state.name} must be a plain tensor of {expected}, got {tensor.dtype} of shape "
            f"{shape_text(tensor.shape)} in another form; save it as one"
        )
    return tensor.detach().to(dtype)


def width(state: State, key: str, axis: int) -> int:
    """The length of one axis of a layer's weight. Raises WeightsError when it has no such axis or an absurd one."""
    tensor = state.tensor(key)
    if tensor.ndim <= axis or not 1 <= tensor.shape[axis] <= _MAX_WIDTH:
        raise WeightsError(
            f"import_weights: {key} of {state.name} must be a layer's weight, got shape {shape_text(tensor.shape)}; "
            "the file is inconsistent"
        )
    return tensor.shape[axis]


def shape_text(shape: Iterable[int]) -> str:
    """A shape as messages write it."""
    return f"({','.join(map(str, shape))})"


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{' and more' if len(names) > 3 else ''}"
