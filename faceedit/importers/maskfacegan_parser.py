# SPDX-License-Identifier: Apache-2.0
"""MaskFaceGAN's face parser, `face_parser/state.pt` of its release: DeepLabV3 over ResNet-50.

Our parser keeps the names of the released one. Depth and widths are read from the tensors; the pyramid's rates leave no
trace in them and are the paper's. The class weights of the training loss, which the file also holds, are left out.
"""

import re

from faceedit.errors import WeightsError
from faceedit.importers.checkpoints import Checkpoint, State, flatten
from faceedit.importers.conversion import Converted, fill, width
from faceedit.labels import MASKFACEGAN
from faceedit.networks.deeplab import DeepLabConfig, DeepLabParser
from faceedit.networks.dilated_backbones import DilatedBackbone

PARTS: tuple[str, ...] = ()
_WHAT = "MaskFaceGAN's face parser"
_DEPTHS: dict[int, DilatedBackbone] = {6: "resnet50", 23: "resnet101"}  # blocks of the third stage
_LOGITS = "model.classifier.4.weight"


def convert(checkpoint: Checkpoint, part: str = "") -> Converted:
    """The parser of a checkpoint. Raises WeightsError that names what is missing, left over or of another shape;
    `part` is always ""."""
    state = flatten(checkpoint.name, checkpoint.content)
    classes = width(state, _LOGITS, 0)
    if classes != MASKFACEGAN.num_classes:
        raise WeightsError(
            f"import_weights: {_LOGITS} of {state.name} must be of the {MASKFACEGAN.num_classes} classes "
            f"{', '.join(MASKFACEGAN.classes)}, got {classes}; use {_WHAT}"
        )
    config = DeepLabConfig(
        backbone=_backbone(state),
        width=width(state, "model.backbone.layer1.0.conv1.weight", 0) / 64,
        head_width=width(state, "model.classifier.1.weight", 0),
    )
    return fill(
        DeepLabParser,
        "deeplab-parser",
        config,
        state,
        _WHAT,
        what=_WHAT,
        ignored=lambda key: key == "loss.weight",
    )


def _backbone(state: State) -> DilatedBackbone:
    blocks = {m[1] for key in state.tensors if (m := re.match(r"model\.backbone\.layer3\.([0-9]{1,3})\.", key))}
    if len(blocks) not in _DEPTHS:
        raise WeightsError(
            f"import_weights: {state.name} must hold a ResNet of depth 50 or 101, got {len(blocks)} blocks in "
            f"model.backbone.layer3; use {_WHAT}"
        )
    return _DEPTHS[len(blocks)]
