# SPDX-License-Identifier: Apache-2.0
"""A parser of MaskFaceGAN's component analysis: a U-Net (Ronneberger et al. 2015), this project's compact one."""

from __future__ import annotations

from dataclasses import dataclass

from faceedit.networks.parser import ParserConfig, ParserNet
from faceedit.networks.region_parser import RegionParser, RegionParserConfig


@dataclass(frozen=True, slots=True)
class RegionUNetConfig(RegionParserConfig):
    """Size of the parser. Args: widths and blocks, as `ParserConfig` has them: five levels, from 1/2 to 1/32."""

    widths: tuple[int, ...] = ParserConfig().widths
    blocks: tuple[int, ...] = ParserConfig().blocks

    def __post_init__(self) -> None:
        RegionParserConfig.__post_init__(self)
        if len(self.widths) != 5 or len(self.blocks) != 5 or min(*self.widths, *self.blocks) < 1:
            raise ValueError(
                f"RegionUNetConfig: widths and blocks must be five positive numbers each, got {self.widths} and "
                f"{self.blocks}; give one for each level from 1/2 to 1/32"
            )


class RegionUNetParser(RegionParser):
    """Regions of an aligned face, by `ParserNet` with their number of classes.

    Args:    image (N,3,S,S) in [-1, 1], any S.   Returns: logits (N,9,S,S) of the scheme "maskfacegan".
    Raises:  ValueError when the image is not square with three channels.
    Config:  RegionUNetConfig, frozen.   Source: Pernuš et al. 2023, table VIII.
    """

    config: RegionUNetConfig

    def __init__(self, config: RegionUNetConfig) -> None:
        super().__init__(
            config, ParserNet(ParserConfig(config.size_px, config.num_classes, config.widths, config.blocks))
        )
