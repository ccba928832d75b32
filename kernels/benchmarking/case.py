# SPDX-License-Identifier: Apache-2.0
"""What an op writes down to be measured."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import Parameter

Outputs = Tensor | Sequence[Tensor]
Function = Callable[..., Outputs]

PASSES = ("forward", "forward+backward")
DTYPES = (torch.float32, torch.bfloat16)
SMALL = "small"  # the layer on which the frame itself is tested


@dataclass(frozen=True, slots=True)
class Case:
    """One op on one layer in one dtype.

    inputs: CPU tensors; every function here is called with them, moved to the device, by position. A list argument of
    the op is spread out. ours, eager: the op, and the obvious PyTorch code for the same result. moved: bytes that must
    cross the memory bus at least once, forward and forward+backward. flops: the same for arithmetic, 0 where memory
    bounds the op. wanted: positions of the inputs that get a gradient; None: all floating point ones; (): forward only.
    others: more formulations, by name. baseline: the provider that ratios and results are compared with, and that
    torch.compile compiles. tolerance: relative L2 of outputs and of gradients against it; None: by dtype. passes: those
    worth a row. frozen: positions of the inputs that are weights which nothing trains: what is made from them is kept.
    """

    inputs: Sequence[Tensor]
    ours: Function
    eager: Function
    moved: tuple[int, int]
    flops: tuple[int, int] = (0, 0)
    wanted: tuple[int, ...] | None = None
    others: Mapping[str, Function] = field(default_factory=dict)
    baseline: str = "eager"
    tolerance: tuple[float, float] | None = None
    passes: tuple[str, ...] = PASSES
    frozen: tuple[int, ...] = ()

    def differentiable(self) -> tuple[int, ...]:
        """Return the positions of the inputs that get a gradient."""
        if self.wanted is not None:
            return self.wanted
        return tuple(i for i, tensor in enumerate(self.inputs) if tensor.is_floating_point())


@dataclass(frozen=True, slots=True)
class Benchmark:
    """An op and the layers it is measured on.

    build(*arguments, dtype) makes the case of a layer; layers: its arguments by the layer's name, as `32@1024`
    (channels@side), the most telling first: a quick run takes only that. small: arguments that take milliseconds, for
    the test of the frame. target: how many times faster than the baseline the C++ kernel must be on a CPU, by pass or
    by `pass dtype`, in the median over the layers (none: not stated). bare(*arguments): small layers and factors, by
    which the calls that `ours` makes there add up to those on that layer, and so does what Python and dispatch cost.
    """

    op: str
    build: Callable[..., Case]
    layers: Mapping[str, tuple[object, ...]]
    small: tuple[object, ...]
    target: Mapping[str, float] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = DTYPES
    bare: Callable[..., Sequence[tuple[tuple[object, ...], float]]] | None = None

    def case(self, layer: str, dtype: torch.dtype) -> Case:
        """Return the case of a layer by name; `small` is the small one."""
        return self.build(*self.arguments(layer), dtype)

    def arguments(self, layer: str) -> tuple[object, ...]:
        """Return what `build` makes of a layer by name, the dtype aside."""
        return self.small if layer == SMALL else self.layers[layer]


def draw(*shape: int, seed: int = 0, channels_last: bool = False) -> Tensor:
    """Return standard normal values, the same for the same shape and seed."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.contiguous(memory_format=torch.channels_last) if channels_last else values


def frozen(weight: Tensor) -> Parameter:
    """Return a weight as a frozen network holds it."""
    return Parameter(weight, requires_grad=False)


def size_of(*tensors: Tensor | None) -> int:
    """Return how many bytes the tensors hold together."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
