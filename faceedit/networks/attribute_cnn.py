# SPDX-License-Identifier: Apache-2.0
"""The classifiers that MaskFaceGAN's component analysis puts in the tree's place: VGG and ResNet, torchvision's."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torchvision import models
from torchvision.models import vgg

from faceedit.networks.attribute_network import AttributeNetwork, AttributeNetworkConfig

_VGG_PLANS = {"vgg16": "D", "vgg19": "E"}  # torchvision's letters
_VGG_POOLED, _VGG_HIDDEN = 7, 4096


@dataclass(frozen=True, slots=True)
class AttributeCNNConfig(AttributeNetworkConfig):
    """Which network.

    Args: backbone, torchvision's name; width, of all layers of a VGG, of the inner convolutions of a ResNet's
          bottlenecks; 1 is the published network, and the only one for ResNet-34, which has no bottlenecks.
    """

    backbone: Literal["vgg16", "vgg19", "resnet34", "resnet50", "resnet101"] = "resnet50"
    width: float = 1.0

    def __post_init__(self) -> None:
        AttributeNetworkConfig.__post_init__(self)
        if not 1 / 64 <= self.width <= 4 or (self.backbone == "resnet34" and self.width != 1):
            raise ValueError(
                f"AttributeCNNConfig: width must be in [1/64, 4], and 1 for resnet34, got {self.width} for "
                f"{self.backbone}; 1 is the published network"
            )


class AttributeCNN(AttributeNetwork):
    """Logits of facial attributes: one fully connected layer on top of a network that all attributes share.

    Args:    image (N,3,S,S) in [-1, 1], any S.   Returns: logits (N, len(config.attributes)).
    Raises:  ValueError when the image is not square with three channels.
    Config:  AttributeCNNConfig, frozen.
    Source:  Pernuš et al. 2023, table VII; VGG of Simonyan and Zisserman 2015, ResNet of He et al. 2016. The
             normalisation of the input is the tree's.
    """

    config: AttributeCNNConfig

    def __init__(self, config: AttributeCNNConfig) -> None:
        super().__init__(config)
        outputs = len(config.attributes)
        if config.backbone == "resnet34":
            self.model: nn.Module = models.resnet34(num_classes=outputs)
        elif config.backbone in _VGG_PLANS:
            self.model = _vgg(_VGG_PLANS[config.backbone], config.width, outputs)
        else:
            build = {"resnet50": models.resnet50, "resnet101": models.resnet101}[config.backbone]
            self.model = build(num_classes=outputs, width_per_group=round(64 * config.width))

    def logits(self, x: Tensor) -> Tensor:
        return self.model(x)


def _vgg(plan: str, width: float, outputs: int) -> nn.Sequential:
    """torchvision's VGG with widths scaled; its class builds a head of 120 million weights whatever the features."""
    layers = [entry if isinstance(entry, str) else max(round(entry * width), 1) for entry in vgg.cfgs[plan]]
    channels, hidden = layers[-2], max(round(_VGG_HIDDEN * width), 1)
    assert isinstance(channels, int)
    head = nn.Sequential(
        *(nn.Linear(channels * _VGG_POOLED**2, hidden), nn.ReLU(inplace=True), nn.Dropout()),
        *(nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout()),
        nn.Linear(hidden, outputs),
    )
    network = nn.Sequential(
        OrderedDict(
            features=vgg.make_layers(layers),
            avgpool=nn.AdaptiveAvgPool2d(_VGG_POOLED),
            flatten=nn.Flatten(),
            classifier=head,
        )
    )
    for module in network.modules():  # without normalisation, PyTorch's own start would fade out on the way up
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            assert module.bias is not None
            nn.init.zeros_(module.bias)
    return network
