# SPDX-License-Identifier: Apache-2.0
"""What MaskFaceGAN asks of an attribute classifier, whatever architecture is inside."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from faceedit.attributes import CLASSIFIER_ORDER, check_attribute
from faceedit.config import check_choices
from faceedit.networks.folding import for_inference
from faceedit.networks.resizing import resize_square

# Of CelebA's images in [0, 1], as MaskFaceGAN's released code has them.
_MEAN = (0.5061, 0.4254, 0.3828)
_STD = (0.2661, 0.2453, 0.2413)


@dataclass(frozen=True, slots=True)
class AttributeNetworkConfig:
    """What every attribute classifier has.

    Args:   attributes, CelebA names in the order of the outputs; size_px, side that images are resized to.
    Raises: UnknownAttributeError on a name that is not CelebA's; ValueError on none, on one given twice and on a size.
    """

    attributes: tuple[str, ...] = CLASSIFIER_ORDER
    size_px: int = 224

    def __post_init__(self) -> None:
        check_choices(self)
        for name in self.attributes:
            check_attribute(name)
        if not self.attributes or len(set(self.attributes)) < len(self.attributes):
            raise ValueError(
                f"{type(self).__name__}: attributes must be different names, got {self.attributes}; name each once"
            )
        if self.size_px < 32 or self.size_px % 32:
            raise ValueError(
                f"{type(self).__name__}: size_px must be a multiple of 32, got {self.size_px}; the layers halve five "
                "times"
            )


class AttributeNetwork(nn.Module, ABC):
    """Logits of facial attributes, of an image of any size.

    Flow:    resize to config.size_px (area average downwards, bilinear upwards), [0, 1], CelebA's mean and deviation;
             then `logits`.
    Args:    image (N,3,S,S) in [-1, 1].   Returns: logits (N, len(config.attributes)), in the order of the names.
    Raises:  ValueError when the image is not square with three channels.
    Source:  Pernuš et al. 2023, section III-B.
    """

    celeba_mean: Tensor
    celeba_std: Tensor

    def __init__(self, config: AttributeNetworkConfig) -> None:
        super().__init__()
        self.config = config
        self.register_buffer("celeba_mean", torch.tensor(_MEAN))
        self.register_buffer("celeba_std", torch.tensor(_STD))

    @abstractmethod
    def logits(self, x: Tensor) -> Tensor:
        """Logits (N,A) of normalised images x (N,3,P,P), P = config.size_px."""

    def forward(self, image: Tensor) -> Tensor:
        x = resize_square(image, self.config.size_px, type(self).__name__)
        mean, std = (value[:, None, None] for value in (self.celeba_mean, self.celeba_std))
        return self.logits((x * 0.5 + (0.5 - mean)) / std)

    @torch.no_grad()
    def probabilities(self, image: Tensor) -> Tensor:
        """Probabilities (N,A) of an image (N,3,S,S) in [-1, 1]."""
        return self(image).sigmoid()

    def for_inference(self) -> AttributeNetwork:
        """A frozen copy with fewer passes, in channels_last; see `for_inference`. Gradients still reach the image."""
        return for_inference(self)

    def select(self, names: str | Sequence[str]) -> AttributeNetwork:
        """A network of these attributes alone, in this order, that shares its layers with this one.

        Its logits equal this network's columns bit for bit. Select after moving to a device: buffers are not moved with
        the other network's. Raises UnknownAttributeError for a name that this network does not have.
        """
        return AttributeColumns(self, self._known(names))

    def _known(self, names: str | Sequence[str]) -> tuple[str, ...]:
        chosen = (names,) if isinstance(names, str) else tuple(names)
        return tuple(check_attribute(name, self.config.attributes) for name in chosen)


class AttributeColumns(AttributeNetwork):
    """Some columns of a network whose attributes share all layers, so that there is nothing to leave out."""

    def __init__(self, network: AttributeNetwork, names: tuple[str, ...]) -> None:
        super().__init__(replace(network.config, attributes=names))
        self.celeba_mean, self.celeba_std = network.celeba_mean, network.celeba_std
        self.network = network
        self.columns = [network.config.attributes.index(name) for name in names]
        self.train(network.training)

    def logits(self, x: Tensor) -> Tensor:
        logits = self.network.logits(x)
        return torch.stack([logits[:, column] for column in self.columns], 1)  # no index is copied to the device
