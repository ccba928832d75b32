# SPDX-License-Identifier: Apache-2.0
"""MaskFaceGAN's attribute classifier: a tree whose branches specialise towards one attribute a leaf.

An edit asks for one attribute or a few, whose path through the tree is a fraction of the whole: `select` keeps that
path alone. Names of parameters are those of the released file, and a pruned tree keeps the names of its full one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from faceedit.attributes import CLASSIFIER_ORDER
from faceedit.networks.attribute_network import AttributeNetwork, AttributeNetworkConfig

_HALVINGS = 5


class _Group(NamedTuple):
    """One depth of the tree: its layers in letters (c convolution, M max pooling), and each copy's parent above it."""

    name: str
    layers: str
    parents: tuple[int, ...]


def _parents(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split()))


# As released. Leaf i is attribute i of CLASSIFIER_ORDER.
_CONV_GROUPS = (
    _Group("01-06", "ccMccMcc", _parents("0")),
    _Group("06-11", "cMcccMc", _parents("0 0")),
    _Group("11-12", "c", _parents("0 0 1")),
    _Group("12-13", "cM", _parents("0 0 0 0 1 1 1 1 1 2")),
)
_FC_GROUPS = (
    _Group("13-14", "", _parents("0 1 1 1 2 2 3 4 4 4 5 5 6 6 6 7 8 9")),
    _Group("14-15", "", _parents("0 1 2 2 3 3 3 3 4 4 5 6 7 7 7 8 8 9 9 9 10 10 11 11 11 12 13 13 14 15 16 16 17")),
    _Group(
        "15-16",
        "",
        _parents(
            "0 1 1 2 2 3 4 5 6 7 7 7 8 8 8 9 10 11 12 13 14 15 16 17 18 19 20 21 22 23 24 25 26 27 28 29 29 30 31 32"
        ),
    ),
)
_GROUPS = (*_CONV_GROUPS, *_FC_GROUPS)


@dataclass(frozen=True, slots=True)
class AttributeTreeConfig(AttributeNetworkConfig):
    """Size of the tree; the defaults are MaskFaceGAN's.

    Args: attributes, which leaves there are, and the order of the outputs; size_px, a multiple of 32; width, channels
          of every convolution; hidden_width, units of every fully connected layer.
    """

    width: int = 64
    hidden_width: int = 128

    def __post_init__(self) -> None:
        AttributeNetworkConfig.__post_init__(self)
        if self.width < 1 or self.hidden_width < 1:
            raise ValueError(
                f"AttributeTreeConfig: width and hidden_width must be positive, got {self.width} and "
                f"{self.hidden_width}; the released network has 64 and 128"
            )


class AttributeTreeClassifier(AttributeNetwork):
    """Logits of facial attributes, each from its own path of the tree.

    Flow:    (Conv3, ReLU, BN)* with max pooling, /4 -> 2 branches, /16 -> 3 -> 10, /32 -> (FC, ReLU, BN) 18 -> 33 ->
             FC, one leaf an attribute. Only what leads to config.attributes exists.
    Args:    image (N,3,S,S) in [-1, 1], any S.   Returns: logits (N, len(config.attributes)).
    Raises:  ValueError when the image is not square with three channels.
    Config:  AttributeTreeConfig, frozen.   Recipe: training/recipes/maskfacegan-classifier-starter.yaml.
    Source:  Pernuš et al. 2023 (as released; the tree has 8,830,248 parameters at the default size).
    """

    config: AttributeTreeConfig

    def __init__(self, config: AttributeTreeConfig) -> None:
        super().__init__(config)
        self.leaves = tuple(CLASSIFIER_ORDER.index(name) for name in config.attributes)
        kept = _copies(self.leaves)
        self.conv_layers, self.fc_layers = nn.ModuleDict(), nn.ModuleDict()
        channels = 3
        for group in _CONV_GROUPS:
            self.conv_layers[group.name] = nn.ModuleDict(
                {str(copy): _convolutions(group.layers, channels, config.width) for copy in kept[group.name]}
            )
            channels = config.width
        units = config.width * (config.size_px >> _HALVINGS) ** 2
        for group in _FC_GROUPS:
            is_leaf = group is _FC_GROUPS[-1]
            self.fc_layers[group.name] = nn.ModuleDict(
                {str(copy): _connected(units, 0 if is_leaf else config.hidden_width) for copy in kept[group.name]}
            )
            units = config.hidden_width

    def logits(self, x: Tensor) -> Tensor:
        outputs = {0: x}
        for group in _CONV_GROUPS:
            outputs = _grow(self.conv_layers[group.name], group.parents, outputs)
        outputs = {copy: value.flatten(1) for copy, value in outputs.items()}
        for group in _FC_GROUPS:
            outputs = _grow(self.fc_layers[group.name], group.parents, outputs)
        return torch.cat([outputs[leaf] for leaf in self.leaves], dim=1)

    def select(self, names: str | Sequence[str]) -> AttributeTreeClassifier:
        """The part of the tree that leads to these attributes, in this order; it shares its layers with this one.

        Its logits equal this network's columns bit for bit. Select after moving to a device: buffers are not moved with
        the other network's. Raises UnknownAttributeError for a name that this network does not have.
        """
        with torch.device("meta"):
            part = AttributeTreeClassifier(replace(self.config, attributes=self._known(names)))
        part.celeba_mean, part.celeba_std = self.celeba_mean, self.celeba_std
        kept = {path for path, _ in part._branches()}
        for path, module in self._branches():
            if path in kept:
                part.set_submodule(path, module)
        return part.train(self.training)

    def _branches(self) -> Iterator[tuple[str, nn.Module]]:
        """Every copy of every group, with its path."""
        for layers in ("conv_layers", "fc_layers"):
            for group, copies in self.get_submodule(layers).named_children():
                yield from ((f"{layers}.{group}.{copy}", module) for copy, module in copies.named_children())


def _copies(leaves: Sequence[int]) -> dict[str, list[int]]:
    """Which copies of each group lie on the way to these leaves."""
    kept, wanted = {}, set(leaves)
    for group in reversed(_GROUPS):
        kept[group.name] = sorted(wanted)
        wanted = {group.parents[copy] for copy in wanted}
    return kept


def _grow(group: nn.Module, parents: tuple[int, ...], above: dict[int, Tensor]) -> dict[int, Tensor]:
    """The output of each copy, from that of its parent."""
    return {int(copy): module(above[parents[int(copy)]]) for copy, module in group.named_children()}


def _convolutions(layers: str, channels: int, width: int) -> nn.Sequential:
    built: list[nn.Module] = []
    for letter in layers:
        if letter == "M":
            built.append(nn.MaxPool2d(2))
        else:
            built += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU(inplace=True), nn.BatchNorm2d(width)]
            channels = width
    return nn.Sequential(*built)


def _connected(inputs: int, outputs: int) -> nn.Sequential:
    """Linear, ReLU, BN; for no outputs the leaf, one linear logit."""
    if not outputs:
        return nn.Sequential(nn.Linear(inputs, 1))
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(inplace=True), nn.BatchNorm1d(outputs))
