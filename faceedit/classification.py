# SPDX-License-Identifier: Apache-2.0
"""Attribute probabilities of an aligned face: what an edit starts from, and what its report measures."""

from __future__ import annotations

from functools import lru_cache

from torch import Tensor

from faceedit.devices import resolve_device
from faceedit.networks.classifier import AttributeClassifier
from faceedit.networks.folding import for_inference

STARTER = "attribute-classifier-starter"


def attribute_probabilities(classifier: AttributeClassifier, crop: Tensor) -> dict[str, float]:
    """Probability of each of the classifier's attributes for one aligned face 1×3×S×S in [-1, 1]."""
    device = next(classifier.parameters()).device
    return dict(
        zip(classifier.config.attributes, classifier.probabilities(crop.to(device))[0].float().tolist(), strict=True)
    )


@lru_cache(maxsize=4)
def load_classifier(device: str = "cpu") -> AttributeClassifier | None:
    """The starter classifier, or None where its weights are not installed: edits work without it, unmeasured."""
    from faceedit.registry import list_weights, load_network

    if not any(spec.name == STARTER for spec in list_weights()):
        return None
    network = load_network(STARTER, resolve_device(device), kind="attribute-classifier")
    assert isinstance(network, AttributeClassifier)
    return for_inference(network)
