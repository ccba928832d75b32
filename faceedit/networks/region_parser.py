# SPDX-License-Identifier: Apache-2.0
"""What MaskFaceGAN asks of a face parser, whatever architecture is inside."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from faceedit.config import check_choices
from faceedit.labels import MASKFACEGAN, scheme
from faceedit.networks.folding import for_inference
from faceedit.networks.resizing import resample, resize_square


@dataclass(frozen=True, slots=True)
class RegionParserConfig:
    """What every region parser has.

    Args:   size_px, side that images are resized to; label_scheme, whose classes the channels are.
    Raises: UnknownNameError for a scheme or a backbone that does not exist; ValueError on a size.
    """

    size_px: int = 512
    label_scheme: str = MASKFACEGAN.name

    def __post_init__(self) -> None:
        check_choices(self)
        scheme(self.label_scheme)
        if self.size_px < 32 or self.size_px % 32:
            raise ValueError(
                f"{type(self).__name__}: size_px must be a multiple of 32, got {self.size_px}; the layers halve five "
                "times"
            )

    @property
    def num_classes(self) -> int:
        """How many channels the logits have."""
        return scheme(self.label_scheme).num_classes


class RegionParser(nn.Module):
    """Label every pixel of an aligned face, at any size.

    Flow:    resize to config.size_px (area average downwards, bilinear upwards); model; logits to config.size_px, then
             to the image's size, both bilinearly.
    Args:    image (N,3,S,S) in [-1, 1].   Returns: logits (N,C,S,S), C classes of config.label_scheme.
    Raises:  ValueError when the image is not square with three channels.
    Source:  Pernuš et al. 2023, released code. MaskFaceGAN takes the softmax at 512² and resizes that: pass a 512²
             image for its very masks.
    """

    def __init__(self, config: RegionParserConfig, model: nn.Module) -> None:
        super().__init__()
        self.config = config
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        x = resize_square(image, self.config.size_px, type(self).__name__)
        logits = self.model(x)
        for side in (self.config.size_px, image.shape[-1]):
            if logits.shape[-1] != side:
                logits = resample(logits, side, "bilinear")
        return logits

    def for_inference(self) -> RegionParser:
        """A frozen copy with fewer passes, in channels_last; see `for_inference`. Gradients still reach the image."""
        return for_inference(self)
