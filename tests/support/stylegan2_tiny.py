# SPDX-License-Identifier: Apache-2.0
"""A StyleGAN2 generator small enough to train and to invert in a test."""

from __future__ import annotations

from faceedit.networks.stylegan2 import StyleGAN2Config, StyleGAN2Generator


def tiny_generator(size_px: int = 16) -> StyleGAN2Generator:
    """Untrained, 16 channels at most, w of 8; draws from torch's global generator."""
    config = StyleGAN2Config(
        size_px=size_px, channel_base=8 * size_px, channel_max=16, z_width=8, w_width=8, mapping_layers=2
    )
    return StyleGAN2Generator(config)
