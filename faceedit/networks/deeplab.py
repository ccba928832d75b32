# SPDX-License-Identifier: Apache-2.0
"""MaskFaceGAN's face parser: DeepLabV3 (Chen et al. 2017) over a dilated network of torchvision's."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP

from faceedit.networks.dilated_backbones import DilatedBackbone, dilated_backbone
from faceedit.networks.region_parser import RegionParser, RegionParserConfig


@dataclass(frozen=True, slots=True)
class DeepLabConfig(RegionParserConfig):
    """Size of the parser; the defaults are MaskFaceGAN's, torchvision's `deeplabv3_resnet50`.

    Args: backbone, width, output_stride, as `dilated_backbone` takes them; head_width, channels of the pyramid and the
          head; rates, dilations of the pyramid's three convolutions, in features.
    """

    backbone: DilatedBackbone = "resnet50"
    width: float = 1.0
    output_stride: int = 8
    head_width: int = 256
    rates: tuple[int, ...] = (12, 24, 36)

    def __post_init__(self) -> None:
        RegionParserConfig.__post_init__(self)
        if self.head_width < 1 or not self.rates or min(self.rates) < 1:
            raise ValueError(
                f"DeepLabConfig: head_width and rates must be positive, got {self.head_width} and {self.rates}; the "
                "released parser has 256 and (12, 24, 36)"
            )


class DeepLabParser(RegionParser):
    """Regions of an aligned face.

    Flow:    dilated backbone /8 -> atrous spatial pyramid pooling -> Conv3, BN, ReLU, Conv1 -> as RegionParser.
             There is no auxiliary head.
    Args:    image (N,3,S,S) in [-1, 1], any S.   Returns: logits (N,9,S,S) of the scheme "maskfacegan".
    Raises:  ValueError when the image is not square with three channels. Training needs N > 1: the pyramid normalises
             pooled features over the batch alone.
    Config:  DeepLabConfig, frozen.   Recipe: training/recipes/maskfacegan-parser-starter.yaml.
    Source:  Chen et al. 2017, as MaskFaceGAN released it. Names of parameters are those of the released file.
    """

    config: DeepLabConfig

    def __init__(self, config: DeepLabConfig) -> None:
        backbone, channels = dilated_backbone(config.backbone, config.width, config.output_stride)
        width = config.head_width
        head = nn.Sequential(
            ASPP(channels, config.rates, width),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, config.num_classes, 1),
        )
        super().__init__(config, nn.Sequential(OrderedDict(backbone=backbone, classifier=head)))
