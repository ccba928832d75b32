# SPDX-License-Identifier: Apache-2.0
"""torchvision's image networks without their heads, dilated so that features stay dense enough to label pixels."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from functools import partial
from typing import Literal, get_args

from torch import nn
from torchvision import models

from faceedit.errors import UnknownNameError, suggestion

DilatedBackbone = Literal["resnet50", "resnet101", "mobilenet_v3_large"]

_RESNET_CHANNELS = 2048
_MOBILENET_STRIDES = {8: 7, 16: 13}  # output stride -> first layer that must not halve


def dilated_backbone(name: DilatedBackbone, width: float, output_stride: int) -> tuple[nn.Module, int]:
    """Features (N,C,S/output_stride,S/output_stride) of images (N,3,S,S), and C.

    Args:    width, of the layers that torchvision lets one scale: the inner convolutions of a ResNet's bottlenecks, all
             layers of MobileNetV3; 1 is the published network.
    Raises:  ValueError on another name, a width that leaves a layer empty, or another output stride than 8 and 16.
    """
    if name not in (choices := get_args(DilatedBackbone)):
        raise UnknownNameError(
            f"dilated_backbone: name must be one of {', '.join(choices)}, got {name!r}; "
            f"{suggestion(str(name), choices)}"
        )
    if output_stride not in _MOBILENET_STRIDES:
        raise ValueError(f"dilated_backbone: output_stride must be 8 or 16, got {output_stride}; choose one of these")
    if not 1 / 16 <= width <= 4:
        raise ValueError(f"dilated_backbone: width must be in [1/16, 4], got {width}; 1 is the published network")
    if name == "mobilenet_v3_large":
        # With torchvision's momentum, 0.01, running statistics follow too slowly for a recipe of hundreds of steps.
        norm = partial(nn.BatchNorm2d, eps=1e-3, momentum=0.1)
        layers = models.mobilenet_v3_large(width_mult=width, num_classes=1, norm_layer=norm).features
        for first in (start for stride, start in _MOBILENET_STRIDES.items() if stride >= output_stride):
            _dilate(layers[first:])
        return layers, _last_width(layers)
    build = {"resnet50": models.resnet50, "resnet101": models.resnet101}[name]
    network = build(
        num_classes=1,
        replace_stride_with_dilation=[False, output_stride == 8, True],
        width_per_group=round(64 * width),
    )
    kept = [
        (child_name, child) for child_name, child in network.named_children() if child_name not in ("avgpool", "fc")
    ]
    return nn.Sequential(OrderedDict(kept)), _RESNET_CHANNELS


def _dilate(layers: Iterable[nn.Module]) -> None:
    """Undo the halving of the first strided convolution, and spread the taps of those behind it instead.

    The strided network's features stay what they were, and those between them join.
    """
    is_behind = False
    for layer in layers:
        for conv in layer.modules():
            if not isinstance(conv, nn.Conv2d) or conv.kernel_size == (1, 1):
                continue
            if is_behind:
                conv.dilation = (2 * conv.dilation[0],) * 2
                conv.padding = tuple(2 * int(reach) for reach in conv.padding)
            elif conv.stride != (1, 1):
                conv.stride, is_behind = (1, 1), True


def _last_width(layers: nn.Module) -> int:
    return [module for module in layers.modules() if isinstance(module, nn.Conv2d)][-1].out_channels
