# SPDX-License-Identifier: Apache-2.0
"""Batch normalisation as part of the convolution before it: fewer passes where the weights no longer change."""

import copy
from typing import TypeVar

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Network = TypeVar("Network", bound=nn.Module)


def fold_batch_norm(network: Network) -> Network:
    """A frozen copy of a network for inference, in evaluation mode and channels_last.

    Wherever a BatchNorm2d is registered right after the Conv2d that feeds it, the convolution takes its scale and shift
    and the normalisation becomes an identity. A normalisation that follows anything else stays as it is.
    """
    folded = copy.deepcopy(network).eval().requires_grad_(False)
    for module in list(folded.modules()):
        previous: tuple[str, nn.Module] | None = None
        for name, child in list(module.named_children()):
            if isinstance(child, nn.BatchNorm2d) and previous is not None and isinstance(previous[1], nn.Conv2d):
                setattr(module, previous[0], fuse_conv_bn_eval(previous[1], child).requires_grad_(False))
                setattr(module, name, nn.Identity())
            previous = (name, child)
    return folded.to(memory_format=torch.channels_last)
