# SPDX-License-Identifier: Apache-2.0
"""Network families, one file each. `KINDS` names those that a weights file can hold; nothing is imported until asked
for."""

import importlib
from dataclasses import dataclass
from typing import Any

from faceedit.errors import WeightsError, suggestion


@dataclass(frozen=True, slots=True)
class NetworkKind:
    """A network family that weights can belong to: where its configuration and its module class are defined.

    Args: name, what a weights header says; module, import path; config, network, names in that module. The network is
          built as `network(config)`.
    """

    name: str
    module: str
    config: str
    network: str

    def classes(self) -> tuple[type, type]:
        """The configuration class and the module class."""
        module = importlib.import_module(self.module)
        return getattr(module, self.config), getattr(module, self.network)


KINDS: dict[str, NetworkKind] = {
    kind.name: kind
    for kind in (
        NetworkKind("parser", "faceedit.networks.parser", "ParserConfig", "ParserNet"),
        NetworkKind("maggan", "faceedit.networks.maggan", "MagGANConfig", "MagGANGenerator"),
        NetworkKind(
            "maggan-discriminator", "faceedit.networks.maggan", "MagGANDiscriminatorConfig", "MagGANDiscriminator"
        ),
        NetworkKind(
            "attribute-classifier", "faceedit.networks.classifier", "AttributeClassifierConfig", "AttributeClassifier"
        ),
        NetworkKind(
            "attribute-tree", "faceedit.networks.attribute_tree", "AttributeTreeConfig", "AttributeTreeClassifier"
        ),
        NetworkKind("attribute-cnn", "faceedit.networks.attribute_cnn", "AttributeCNNConfig", "AttributeCNN"),
        NetworkKind("deeplab-parser", "faceedit.networks.deeplab", "DeepLabConfig", "DeepLabParser"),
        NetworkKind("fcn-parser", "faceedit.networks.fcn", "FCNConfig", "FCNParser"),
        NetworkKind("region-unet-parser", "faceedit.networks.region_unet", "RegionUNetConfig", "RegionUNetParser"),
        NetworkKind("e4e", "faceedit.networks.e4e", "E4EConfig", "E4EEncoder"),
        NetworkKind("stylegan2", "faceedit.networks.stylegan2", "StyleGAN2Config", "StyleGAN2Generator"),
        NetworkKind(
            "stylegan2-discriminator",
            "faceedit.networks.stylegan2",
            "StyleGAN2DiscriminatorConfig",
            "StyleGAN2Discriminator",
        ),
    )
}


def network_kind(name: Any) -> NetworkKind:
    """The kind of that name. Raises WeightsError that lists the closest ones."""
    if name not in KINDS:
        raise WeightsError(f"network_kind: name must be a known network, got {name!r}; {suggestion(str(name), KINDS)}")
    return KINDS[name]
