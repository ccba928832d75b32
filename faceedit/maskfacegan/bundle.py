# SPDX-License-Identifier: Apache-2.0
"""The weights of a MaskFaceGAN editor: a small JSON file that names its networks.

    {"generator": "ffhq.safetensors", "classifier": "classifier.safetensors", "parser": "parser.safetensors",
     "encoder": "e4e.safetensors", "framing": "ffhq"}

Each network is a registry name or a path, relative to the file. The tag "starter" stands for the networks that this
project trains; a single generator's weights are taken with the starter classifier and parser.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from faceedit.alignment import Framing
from faceedit.config import MAX_JSON_BYTES, from_dict, parse_json, to_dict
from faceedit.errors import FaceEditError, UnknownNameError, WeightsError
from faceedit.maskfacegan.config import MaskFaceGANConfig, preset
from faceedit.maskfacegan.networks import AttributeJudge, Networks, RegionParser
from faceedit.maskfacegan.perceptual import StageFeatures
from faceedit.networks.classifier import AttributeClassifier
from faceedit.networks.folding import for_inference

# What each part is for an error message, how to come by it, and the kind that it has to be ("" where several will do).
_PARSER_KINDS = ("parser", "deeplab-parser", "fcn-parser", "region-unet-parser")
_PARTS = {
    "generator": ("a StyleGAN2 generator", "faceedit weights import stylegan2", "stylegan2"),
    "classifier": ("an attribute classifier", "faceedit weights import maskfacegan-classifier", ""),
    "parser": ("a face parser", "faceedit weights import maskfacegan-parser", ""),
    "encoder": ("an encoder", "faceedit weights import e4e", "e4e"),
    "features": ("a feature network", "faceedit weights list", "attribute-classifier"),
}


@dataclass(frozen=True, slots=True)
class Bundle:
    """Names of registered weights, or paths, of an editor's networks.

    encoder: "" for none.  features: an attribute classifier whose layers a global edit's perceptual term compares, ""
    for none.  framing: what the generator was trained on, FFHQ's square or the portrait crop (1.25 times as wide).
    config: fields of MaskFaceGANConfig that differ from the preset's.  caution: what to know before an edit of hair or
    of the whole face, whose pixels the generator makes alone.
    """

    generator: str = "stylegan2-starter"
    classifier: str = "maskfacegan-classifier-starter"
    parser: str = "parser-starter"
    encoder: str = ""
    features: str = "attribute-classifier-starter"
    framing: Framing = "ffhq"
    config: Mapping[str, Any] = field(default_factory=dict)
    caution: str = ""

    def configuration(self, preset_name: str) -> MaskFaceGANConfig:
        """The preset with the bundle's own fields. Raises UnknownNameError, UsageError for a field that is wrong."""
        return from_dict(MaskFaceGANConfig, {**to_dict(preset(preset_name)), **self.config}, where="config")

    def files(self) -> list[Path]:
        """The weights' files on this machine, in the order of the fields, without features that may be missing.

        Raises UnknownNameError, WeightsError.
        """
        from faceedit.registry import find

        named = {part: getattr(self, part) for part in _PARTS}
        if _lacks_features(self.features):
            named["features"] = ""
        return [find(name, _PARTS[part][2]).path for part, name in named.items() if name]


STARTER = Bundle(
    encoder="e4e-starter",
    config={"blend": "targets", "spread_weight": 0.03},
    caution="the starter generator has seen drawings only: hair and whole faces will look drawn; a bundle with an FFHQ "
    "generator gives photographic ones (docs/maskfacegan.md), --editor maggan dyes hair with what ships",
)
"""The networks that ship. Their generator has seen drawings alone, so that the photo's own skin stays."""


def read_bundle(weights: str | Path) -> Bundle:
    """The bundle that a name stands for: "starter", a .json file, or weights of a generator.

    Raises: WeightsError for a file that is missing or no bundle.
    """
    name = str(weights)
    if name in ("starter", "maskfacegan-starter"):
        return STARTER
    if not name.endswith(".json"):
        return Bundle(generator=name)
    path = Path(name)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_JSON_BYTES + 1)
        bundle = from_dict(Bundle, parse_json(text, where=path.name), where=path.name)
    except OSError as error:
        raise WeightsError(
            f"read_bundle: weights must be a readable file, got {path} ({error.strerror or error}); check the path"
        ) from error
    except (FaceEditError, ValueError) as error:
        raise WeightsError(f"read_bundle: {path} must be a bundle of networks, got {error}; correct it") from error
    beside = {
        part: str(path.parent / value)
        for part in _PARTS
        if (value := getattr(bundle, part)) and os.path.isfile(path.parent / value)
    }
    return replace(bundle, **beside)  # type: ignore[arg-type]


@torch.inference_mode(False)  # folding makes weights anew, and gradients are to pass them later
def load_networks(bundle: Bundle, device: torch.device) -> Networks:
    """The bundle's networks on a device, frozen.

    Raises: WeightsError that says what to train or import when one is missing or of another kind.
    """
    generator = _load("generator", bundle.generator, device)
    classifier = _load("classifier", bundle.classifier, device)
    if not hasattr(getattr(classifier, "config", None), "attributes"):
        raise WeightsError(
            f"maskfacegan: classifier must be an attribute classifier, got {type(classifier).__name__} in "
            f"{bundle.classifier}; name other weights"
        )
    parser: Any = _load("parser", bundle.parser, device)
    if parser.header.kind not in _PARSER_KINDS:
        raise WeightsError(
            f"maskfacegan: parser must be a face parser, got {parser.header.kind} in {bundle.parser}; name other "
            "weights"
        )
    encoder = _load("encoder", bundle.encoder, device) if bundle.encoder else None
    if encoder is not None:
        _check_encoder(generator, encoder, bundle)
    return Networks(
        generator,  # type: ignore[arg-type]
        RegionParser(_for_inference(parser)),
        AttributeJudge(_for_inference(classifier)),
        encoder,
        _features(bundle.features, device) if bundle.features else None,
    )


def _for_inference(network: Any) -> nn.Module:
    """What an iteration runs a thousand times, with as few passes as the network can do with."""
    if hasattr(network, "for_inference"):
        return network.for_inference()
    return network.to(memory_format=torch.channels_last)


def _check_encoder(generator: nn.Module, encoder: nn.Module, bundle: Bundle) -> None:
    wanted, given = ((c.num_ws, c.w_width) for c in (generator.config, encoder.config))  # type: ignore[union-attr]
    if given != wanted:
        raise WeightsError(
            f"maskfacegan: encoder must give {wanted[0]} styles of {wanted[1]} for {bundle.generator}, got {given[0]} "
            f"of {given[1]} from {bundle.encoder}; use an encoder of this generator, or none"
        )


def _load(part: str, weights: str, device: torch.device) -> nn.Module:
    from faceedit.registry import find, load_network

    what, how, kind = _PARTS[part]
    try:
        find(weights, kind)
    except (UnknownNameError, WeightsError) as error:
        if isinstance(error, WeightsError) and not (weights.endswith(".safetensors") and _is_missing(weights)):
            raise
        raise WeightsError(
            f"maskfacegan: {part} must be {what} that is installed, got {weights!r}; train one (docs/maskfacegan.md) "
            f"or run `{how}`, and name it in a bundle"
        ) from error
    return load_network(weights, device, kind=kind)


def _is_missing(path: str) -> bool:
    try:
        os.stat(path)
    except FileNotFoundError:
        return True
    except (OSError, ValueError):
        pass
    return False


def _lacks_features(weights: str) -> bool:
    """Whether these are the features that bundles have by default, and not installed. Global edits alone need them, and
    say so."""
    from faceedit.registry import list_weights

    return weights == Bundle().features and all(row.name != weights for row in list_weights())


def _features(weights: str, device: torch.device) -> StageFeatures | None:
    if _lacks_features(weights):
        return None
    network = _load("features", weights, device)
    assert isinstance(network, AttributeClassifier)
    return StageFeatures(for_inference(network.features), network.config.size_px)
