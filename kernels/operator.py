# SPDX-License-Identifier: Apache-2.0
"""Define an op once: its schema is written down here and nowhere else."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from faceedit.kernels.dispatch import Dispatcher

_decompositions: dict[Any, Callable[..., Any]] = {}


def define_op(
    schema: str, implementations: Dispatcher, fake: Callable[..., Any], mutates: Iterable[str] = ()
) -> CustomOpDef:
    """Register `faceedit::<name>` with PyTorch.

    Args: schema as `name(Tensor x, float slope) -> Tensor`. implementations takes the schema's arguments by position,
          but for a last `str backend`: a backward op is told there which backend its forward pass ran under, since it
          may run on another thread. fake returns empty tensors of the right shapes, dtypes and strides.
    """
    name, _, rest = schema.partition("(")
    told = "str backend)" in rest

    def body(*arguments: Any) -> Any:
        return implementations(*arguments[:-1], asked=arguments[-1]) if told else implementations(*arguments)

    op = torch.library.custom_op(f"faceedit::{name}", body, mutates_args=mutates, schema=f"({rest}")
    op.register_fake(fake)
    return op


def register_onnx_decomposition(op: Any, reference: Callable[..., Any]) -> None:
    """Let torch.onnx.export write `op` as the standard operators of its eager reference.

    Only the ONNX exporter reads that table: compiled graphs and exported programs keep the op.
    """
    _decompositions[op] = reference
    torch._decomp.register_decomposition([op])(reference)


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """Return what `ExportedProgram.run_decompositions` needs to write every op here as standard operators."""
    return {**torch.export.default_decompositions(), **_decompositions}


def mapped_first(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Return a vmapped operand with the mapped axis in front, repeated `size` times where it is not mapped."""
    if tensor is None:
        return None
    return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def mapped_slices(op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    """Run `op` once a slice of the mapped axis and stack: the vmap rule of last resort, any op, any operand.

    Returns: (output or outputs, out_dims) as register_vmap wants them.
    """
    size = info.batch_size

    def slice_of(value: Any, dim: Any, index: int) -> Any:
        if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [slice_of(v, d, index) for v, d in zip(value, dim, strict=True)]
        return value.select(dim, index) if isinstance(value, Tensor) and dim is not None else value

    rows = [op(*(slice_of(value, dim, i) for value, dim in zip(arguments, in_dims, strict=True))) for i in range(size)]
    if isinstance(rows[0], Tensor):
        return torch.stack(rows), 0
    return tuple(torch.stack(column) for column in zip(*rows, strict=True)), tuple(0 for _ in rows[0])
