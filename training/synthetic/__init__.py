# SPDX-License-Identifier: Apache-2.0
"""Procedural portraits with exact masks, attributes, landmarks and counterfactuals (docs/synthetic-portraits.md)."""

from faceedit.training.synthetic.parameters import (
    SUPPORTED_ATTRIBUTES,
    PortraitParameters,
    attributes_of,
    sample_parameters,
    with_attribute,
)
from faceedit.training.synthetic.render import PortraitBatch, render

__all__ = [
    "SUPPORTED_ATTRIBUTES",
    "PortraitBatch",
    "PortraitParameters",
    "attributes_of",
    "render",
    "sample_parameters",
    "with_attribute",
]
