# SPDX-License-Identifier: Apache-2.0
"""What MaskFaceGAN asks of its networks, and the steps around them: sizes, label schemes, pruning, freezing."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from faceedit.attributes import check_attribute
from faceedit.errors import WeightsError
from faceedit.labels import CELEBAMASK_HQ, MASKFACEGAN, LabelScheme, convert_soft, scheme
from faceedit.maskfacegan.perceptual import Features
from faceedit.networks.folding import ConvBiasReLU
from faceedit.networks.resizing import resample, resize

Noise = Sequence[Tensor] | str


class Generator(Protocol):
    """Latent code and noise to images; `faceedit.networks.stylegan2.StyleGAN2Generator` is one."""

    config: Any  # size_px, num_ws, w_width, noise_px
    mapping: Any  # average (w_width); estimate_average(samples, seed)

    @property
    def synthesis(self) -> Callable[..., Tensor]:
        """(ws (N,L,W), noise=maps | "zero") -> image (N,3,S,S) around [-1, 1]."""


def resize_mask(mask: Tensor, size_px: int) -> Tensor:
    """Masks at another size, bilinearly both ways, as the released code has them."""
    if mask.shape[-2:] == (size_px, size_px):
        return mask
    return resample(mask, size_px, "bilinear")


class RegionParser:
    """Probabilities of the nine regions.

    Args: network maps (N,3,s,s) in [-1, 1] to logits (N,C,s,s); size_px, the side it is given (default: its
          `config.size_px`, else 512); labels, its scheme, MaskFaceGAN's or one that converts to it (default: the one
          its configuration or its file's header names, else by the number of classes).
    """

    def __init__(self, network: nn.Module, size_px: int | None = None, labels: LabelScheme | None = None) -> None:
        self.network = _frozen(network)
        self.size_px = size_px or _size_of(network, 512)
        self.scheme = labels or _scheme_of(network)
        self.is_half = False

    def __call__(self, image: Tensor) -> Tensor:
        """(N,3,S,S) in [-1, 1] to (N,9,s,s), fp32, sum 1 over regions; differentiable in the image."""
        logits = _run(self.network, resize(image, self.size_px), self.is_half)
        if logits.ndim != 4 or logits.shape[1] != self.scheme.num_classes:
            raise WeightsError(
                f"RegionParser: network must give {self.scheme.num_classes} classes of {self.scheme.name}, got logits "
                f"{tuple(logits.shape)}; use a parser of that label scheme"
            )
        probabilities = logits.softmax(1)
        return probabilities if self.scheme == MASKFACEGAN else convert_soft(probabilities, self.scheme, MASKFACEGAN)


class AttributeJudge:
    """Logits of some attributes, by a network that may know more.

    Args: network maps (N,3,s,s) in [-1, 1] to logits (N,A) in the order of `config.attributes`; with `select(names)` it
          can be pruned to what some of them need.
    Raises: UnknownAttributeError (`select`) that lists the closest attributes that the network knows.
    """

    def __init__(self, network: nn.Module, names: Sequence[str] | None = None) -> None:
        config: Any = network.config
        self.network = _frozen(network)
        self.known: tuple[str, ...] = tuple(config.attributes)
        self.names = self.known if names is None else tuple(names)
        self.size_px = _size_of(network, None)
        self._columns = [self.known.index(check_attribute(name, self.known)) for name in self.names]
        self.is_half = False

    def select(self, names: Sequence[str]) -> AttributeJudge:
        """The judge of these attributes alone, without the branches that only others need."""
        wanted = tuple(dict.fromkeys(check_attribute(name, self.known) for name in names))
        prune: Any = getattr(self.network, "select", None)
        judge = AttributeJudge(self.network if prune is None else prune(wanted), wanted)
        judge.is_half = self.is_half
        return judge

    def __call__(self, image: Tensor) -> Tensor:
        """(N,3,S,S) in [-1, 1] to logits (N, len(names)), fp32; differentiable in the image."""
        logits = _run(self.network, image if self.size_px is None else resize(image, self.size_px), self.is_half)
        if self._columns == list(range(len(self.known))):
            return logits
        return torch.stack([logits[:, column] for column in self._columns], 1)  # no index is copied to the device


@dataclass(frozen=True)
class Networks:
    """The networks of an editor, in evaluation mode and frozen: no weight gradient is ever computed.

    generator, parser and classifier as above; encoder maps (N,3,256,256) in [-1, 1] to ws (N,L,W), or None; features,
    the maps that a global edit's perceptual term compares, or None where none is installed.
    """

    generator: Generator
    parser: RegionParser
    classifier: AttributeJudge
    encoder: Callable[[Tensor], Tensor] | None = None
    features: Features | None = None

    def __post_init__(self) -> None:
        for network in (self.generator, self.encoder):
            if isinstance(network, nn.Module):
                _frozen(network)

    @property
    def device(self) -> torch.device:
        """Where the generator lives; the others have to be there too."""
        average: Tensor = self.generator.mapping.average
        return average.device


def encode(encoder: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Latent codes (N,L,W) of images (N,3,S,S) in [-1, 1], at the side the encoder was trained for (e4e: 256)."""
    with torch.no_grad():
        return encoder(resize(image, _size_of(encoder, 256)))


@contextlib.contextmanager
def in_precision(networks: Networks, dtype: str) -> Iterator[Networks]:
    """The networks in float32, or with convolutions in bfloat16.

    The generator's from 32 px on; the parser's and the classifier's by autocast. Logits, statistics and losses stay
    fp32. The networks given are not changed: other edits may be running on them.
    """
    if dtype == "float32":
        yield networks
        return
    from faceedit.networks.stylegan2 import Precision

    synthesis: Any = copy.copy(networks.generator.synthesis)
    synthesis.precision = Precision("bfloat16", from_px=_HALF_FROM_PX)
    generator: Any = copy.copy(networks.generator)
    if isinstance(generator, nn.Module):
        generator._modules = generator._modules.copy()  # else the copy's synthesis would become the original's too
    generator.synthesis = synthesis
    parser, classifier = copy.copy(networks.parser), copy.copy(networks.classifier)
    parser.network, classifier.network = _halved(parser.network), _halved(classifier.network)
    parser.is_half = classifier.is_half = True
    yield replace(networks, generator=generator, parser=parser, classifier=classifier)


# After 100 steps (1024 px, an H100) an attribute's loss was 1.3 % from float32's with 64 and with 32 px, 2.1 % with 4.
_HALF_FROM_PX = 32

_means: weakref.WeakKeyDictionary[Any, dict[Any, Tensor]] = weakref.WeakKeyDictionary()


def mean_latent(mapping: Any, samples: int) -> Tensor:
    """The mean of w (W) over random latents, the same whenever asked; 0 samples: the average kept with the weights.

    It is remembered as long as the mapping network lives and its weights are not written to.
    """
    if not samples:
        average: Tensor = mapping.average
        return average
    state = tuple((weight._version, weight.data_ptr()) for weight in mapping.parameters())
    known = _means.setdefault(mapping, {})
    if (samples, state) not in known:
        for key in [key for key in known if key[1] != state]:
            del known[key]
        known[samples, state] = mapping.estimate_average(samples)
    return known[samples, state]


def _run(network: nn.Module, image: Tensor, is_half: bool) -> Tensor:
    """The network's output in fp32. Autocast keeps no copies of weights: a captured graph must not hold stale ones."""
    with torch.autocast(image.device.type, torch.bfloat16, enabled=is_half, cache_enabled=False):
        return network(image).float()


_halves: weakref.WeakKeyDictionary[nn.Module, tuple[list[_Written], nn.Module]] = weakref.WeakKeyDictionary()


def _halved(network: nn.Module) -> nn.Module:
    """A copy whose convolutions hold the weights that autocast would round anew in every pass.

    It is remembered as long as the network lives and its tensors stay as they are; nothing writes to the copy's.
    PyTorch counts no write through `weight.data`: after one, or after exchanging layers, load the network anew. Of
    inference tensors it counts none at all, and nothing is remembered.
    """
    tensors = [*network.parameters(), *network.buffers()]
    if any(tensor.is_inference() for tensor in tensors):
        return _make_halved(network)
    known = _halves.get(network)
    if known is None or len(known[0]) != len(tensors) or not all(map(_Written.is_as, known[0], tensors)):
        known = _halves[network] = [_Written.of(tensor) for tensor in tensors], _make_halved(network)
    return known[1]


@dataclass(frozen=True)
class _Written:
    """What tells whether a tensor was written to or given another storage; an address alone may be another's by now."""

    storage: weakref.ref[torch.UntypedStorage]
    address: int
    version: int

    @classmethod
    def of(cls, tensor: Tensor) -> _Written:
        return cls(weakref.ref(tensor.untyped_storage()), tensor.data_ptr(), tensor._version)

    def is_as(self, tensor: Tensor) -> bool:
        same = self.storage() is tensor.untyped_storage()
        return same and self.address == tensor.data_ptr() and self.version == tensor._version


def _make_halved(network: nn.Module) -> nn.Module:
    network = copy.deepcopy(network)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.weight.data = module.weight.data.to(torch.bfloat16)
            if module.bias is not None and type(module) is not ConvBiasReLU:  # that adds it in float32
                module.bias.data = module.bias.data.to(torch.bfloat16)
    return network


def _frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def _size_of(network: Any, default: Any) -> Any:
    return getattr(getattr(network, "config", None), "size_px", default)


def _scheme_of(network: nn.Module) -> LabelScheme:
    """The scheme that its configuration names, else its file's header, else by its number of classes: nine are
    MaskFaceGAN's, nineteen CelebAMask-HQ's. Raises WeightsError for a scheme of another number of classes."""
    config: Any = getattr(network, "config", None)
    named = getattr(config, "label_scheme", "") or getattr(getattr(network, "header", None), "label_scheme", "")
    if named:
        found = scheme(named)
        count = getattr(config, "num_classes", found.num_classes)
        if count != found.num_classes:
            raise WeightsError(
                f"RegionParser: network must have the {found.num_classes} classes of {named}, which its file names, "
                f"got {count}; use another parser"
            )
        return found
    by_count = {known.num_classes: known for known in (MASKFACEGAN, CELEBAMASK_HQ)}
    count = getattr(config, "num_classes", MASKFACEGAN.num_classes)
    if count not in by_count:
        raise WeightsError(
            f"RegionParser: network must have 9 classes of {MASKFACEGAN.name} or 19 of {CELEBAMASK_HQ.name}, got "
            f"{count}; use another parser"
        )
    return by_count[count]
