# SPDX-License-Identifier: Apache-2.0
"""What a network's state would be, found out without the memory that it takes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

_CALLS_A_TENSOR, _CALLS_BESIDES = 30, 1000  # of torch; constructors of all kinds make 2 to 11 a tensor of their state


class _AtMost(TorchFunctionMode):
    """Lets this thread call torch `calls` times, and skips what fills a tensor with values, as torch.nn.init does.

    They do not matter here, and `Tensor.normal_` imports PyTorch's compiler on "meta", which takes seconds.
    """

    def __init__(self, calls: int) -> None:
        super().__init__()
        self.calls = self.left = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.left -= 1
        if self.left < 0:
            raise ValueError(f"state_shapes: network must be built in {self.calls} steps, got more; it is too deep")
        kwargs = kwargs or {}
        if func is torch.Tensor.normal_ or getattr(func, "__module__", "") == nn.init.__name__:
            return kwargs["tensor"] if "tensor" in kwargs else args[0]
        return func(*args, **kwargs)


def state_shapes(network: Callable[[Any], nn.Module], config: Any, tensors: int) -> dict[str, tuple[int, ...]]:
    """Shapes by name of the state of `network(config)`, built on the device "meta", which allocates nothing.

    Args:    tensors, how many the state may have at most, roughly: a constructor that would build very many more is
             stopped, since a number of layers takes time where their sizes take none.
    Raises:  ValueError beyond that; else whatever the constructor makes of a configuration that describes no network:
             RuntimeError for negative sizes or such that overflow, and others.
    """
    with torch.device("meta"), _AtMost(_CALLS_A_TENSOR * tensors + _CALLS_BESIDES):
        skeleton = network(config)
    return {name: tuple(value.shape) for name, value in skeleton.state_dict().items()}
