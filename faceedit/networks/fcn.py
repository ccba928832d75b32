# SPDX-License-Identifier: Apache-2.0
"""A parser of MaskFaceGAN's component analysis: the fully convolutional network (Long et al. 2015), torchvision's."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Literal

from torch import nn
from torchvision.models.segmentation.fcn import FCNHead

from faceedit.networks.dilated_backbones import dilated_backbone
from faceedit.networks.region_parser import RegionParser, RegionParserConfig


@dataclass(frozen=True, slots=True)
class FCNConfig(RegionParserConfig):
    """Size of the parser. Args: backbone and width, as `dilated_backbone` takes them."""

    backbone: Literal["resnet50", "resnet101"] = "resnet50"
    width: float = 1.0


class FCNParser(RegionParser):
    """Regions of an aligned face.

    Flow:    ResNet at output stride 8 -> Conv3, BN, ReLU, Conv1 -> as RegionParser. There is no auxiliary head.
    Args:    image (N,3,S,S) in [-1, 1], any S.   Returns: logits (N,9,S,S) of the scheme "maskfacegan".
    Raises:  ValueError when the image is not square with three channels.
    Config:  FCNConfig, frozen.   Source: Pernuš et al. 2023, table VIII.
    """

    config: FCNConfig

    def __init__(self, config: FCNConfig) -> None:
        backbone, channels = dilated_backbone(config.backbone, config.width, output_stride=8)
        head = FCNHead(channels, config.num_classes)
        super().__init__(config, nn.Sequential(OrderedDict(backbone=backbone, classifier=head)))
