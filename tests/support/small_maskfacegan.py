# SPDX-License-Identifier: Apache-2.0
"""Weights of a MaskFaceGAN editor of the real kinds, tiny and untrained, and the bundle that names them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from faceedit.networks.classifier import AttributeClassifier, AttributeClassifierConfig
from faceedit.networks.parser import ParserConfig, ParserNet
from faceedit.networks.stylegan2 import StyleGAN2Config, StyleGAN2Generator
from faceedit.registry import save_weights

SIZE_PX = 32
ATTRIBUTES = ("Smiling", "Blond_Hair", "Black_Hair", "Wavy_Hair", "Young")
STEPS = {
    "latent_steps": 8, "semantic_start": 3, "dynamic_stop": 6, "noise_start": 6, "encoder_start": 2,
    "latent_rate": 0.05, "mean_samples": 64, "noise_steps": 4,
}  # fmt: skip


def write_bundle(folder: Path, name: str = "bundle.json", **changes: object) -> Path:
    """Networks and a bundle in `folder`; what the networks are worth is nothing, what they take part in is real."""
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "tests"}
    if not (folder / "g.safetensors").exists():
        torch.manual_seed(5)
        config = StyleGAN2Config(
            size_px=SIZE_PX, channel_base=256, channel_max=8, z_width=8, w_width=8, mapping_layers=2
        )
        generator = StyleGAN2Generator(config)
        for key, parameter in generator.named_parameters():
            if key.endswith("strength"):
                nn.init.constant_(parameter, 0.1)
        save_weights(folder / "g.safetensors", "stylegan2", config, generator.state_dict(), half=False, **facts)
        classifier_config = AttributeClassifierConfig(ATTRIBUTES, size_px=16, base_width=4, stages=2, hidden_width=8)
        classifier = AttributeClassifier(classifier_config)
        save_weights(
            folder / "c.safetensors", "attribute-classifier", classifier_config, classifier.state_dict(), **facts
        )
        parser_config = ParserConfig(size_px=32, widths=(4, 4, 4, 4, 4), blocks=(1, 1, 1, 1, 1))
        save_weights(folder / "p.safetensors", "parser", parser_config, ParserNet(parser_config).state_dict(), **facts)
    bundle = {
        "generator": "g.safetensors",
        "classifier": "c.safetensors",
        "parser": "p.safetensors",
        "features": "c.safetensors",
        "framing": "portrait",
        "config": STEPS,
    }
    path = folder / name
    path.write_text(json.dumps(bundle | changes))
    return path
