# SPDX-License-Identifier: Apache-2.0
"""MaskFaceGAN's attribute classifier, `attribute_classifier/state.pt` of its release.

Our tree keeps the names of the released one, so conversion checks more than it changes. Widths and the size of the
images are read from the tensors.
"""

from math import isqrt

from faceedit.importers.checkpoints import Checkpoint, flatten
from faceedit.importers.conversion import Converted, fill, width
from faceedit.networks.attribute_tree import AttributeTreeClassifier, AttributeTreeConfig

PARTS: tuple[str, ...] = ()
_FIRST_CONV, _FIRST_FC = "conv_layers.01-06.0.0.weight", "fc_layers.13-14.0.0.weight"


def convert(checkpoint: Checkpoint, part: str = "") -> Converted:
    """The tree of a checkpoint, all forty leaves. Raises WeightsError that names what is missing, left over or of
    another shape; `part` is always ""."""
    state = flatten(checkpoint.name, checkpoint.content)
    channels = width(state, _FIRST_CONV, 0)
    area = width(state, _FIRST_FC, 1) // channels
    config = AttributeTreeConfig(
        size_px=32 * max(isqrt(area), 1), width=channels, hidden_width=width(state, _FIRST_FC, 0)
    )
    return fill(
        AttributeTreeClassifier,
        "attribute-tree",
        config,
        state,
        "MaskFaceGAN's attribute classifier",
        what="MaskFaceGAN's attribute classifier",
    )
