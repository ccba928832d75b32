# SPDX-License-Identifier: Apache-2.0
"""The attribute classifier that judges edits (STGAN's, Liu et al. 2019).

Trained apart from every editor: it measures edit success and reports attribute probabilities before and after an edit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from faceedit.attributes import CELEBA, check_attribute


@dataclass(frozen=True, slots=True)
class AttributeClassifierConfig:
    """Size of the classifier; the defaults are STGAN's.

    Args: attributes, CelebA names in the order of the outputs; size_px, input side; base_width, channels of the first
          pair of convolutions, doubling from pair to pair; stages, pairs; hidden_width, units before the outputs.
    """

    attributes: tuple[str, ...] = CELEBA
    size_px: int = 128
    base_width: int = 16
    stages: int = 5
    hidden_width: int = 512

    def __post_init__(self) -> None:
        for name in self.attributes:
            check_attribute(name)
        if self.size_px % 2**self.stages:
            raise ValueError(
                f"AttributeClassifierConfig: size_px must be a multiple of 2**stages, got {self.size_px} and "
                f"{self.stages}; "
                "use fewer stages"
            )


class AttributeClassifier(nn.Module):
    """Logits of facial attributes.

    Flow:    pairs of (Conv3, BN, ReLU), max pooling after each pair; FC, ReLU; FC.
    Args:    image (N,3,S,S) in [-1, 1], S = config.size_px.   Returns: logits (N, len(config.attributes)).
    Raises:  ValueError when the image has another size; `probabilities` resizes.
    Config:  AttributeClassifierConfig.
    """

    def __init__(self, config: AttributeClassifierConfig) -> None:
        super().__init__()
        self.config = config
        layers: list[nn.Module] = []
        channels = 3
        for stage in range(config.stages):
            for _ in range(2):
                width = config.base_width * 2**stage
                layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        side = config.size_px // 2**config.stages
        self.hidden = nn.Linear(channels * side * side, config.hidden_width)
        self.logits = nn.Linear(config.hidden_width, len(config.attributes))

    def forward(self, image: Tensor) -> Tensor:
        side = self.config.size_px
        if image.ndim != 4 or image.shape[1:] != (3, side, side):
            raise ValueError(
                f"AttributeClassifier: image must be (N,3,{side},{side}), got {tuple(image.shape)}; call "
                "probabilities to resize"
            )
        return self.logits(self.embedding(image))

    def embedding(self, image: Tensor) -> Tensor:
        """The units before the outputs (N, hidden_width), of an image of the network's own size."""
        return F.relu(self.hidden(self.features(image).flatten(1)))

    @torch.no_grad()
    def probabilities(self, image: Tensor) -> Tensor:
        """Probabilities (N,A) of an image (N,3,H,W) of any size in [-1, 1], resized with antialiasing first.

        Raises ValueError on another shape.
        """
        if image.ndim != 4 or image.shape[1] != 3 or not image.shape[2] * image.shape[3]:
            raise ValueError(
                f"AttributeClassifier.probabilities: image must be (N,3,H,W), got {tuple(image.shape)}; add a batch "
                "axis or convert it to RGB"
            )
        side = (self.config.size_px, self.config.size_px)
        if image.shape[-2:] != side:
            image = F.interpolate(image, side, mode="bilinear", align_corners=False, antialias=True)
        return self(image).sigmoid()
