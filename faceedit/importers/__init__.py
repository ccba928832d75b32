# SPDX-License-Identifier: Apache-2.0
"""Other people's checkpoints as this project's weights files. `KINDS` names what can be read; each has one module.

A module has `PARTS`, the networks that its checkpoints may hold (empty where that is one), and
`convert(checkpoint, part)`. Nothing in here ever runs what a file says: see `faceedit.importers.checkpoints`.
"""

import importlib
import os
from pathlib import Path

from faceedit.errors import UnknownNameError, WeightsError, suggestion
from faceedit.importers.checkpoints import read_checkpoint
from faceedit.registry import WeightsHeader, save_weights, sha256_of

KINDS: dict[str, str] = {
    "e4e": "faceedit.importers.e4e",
    "stylegan2": "faceedit.importers.stylegan2",
    "maskfacegan-classifier": "faceedit.importers.maskfacegan_classifier",
    "maskfacegan-parser": "faceedit.importers.maskfacegan_parser",
}


def import_weights(
    kind: str,
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    part: str = "",
    licence: str = "LicenseRef-unstated",
    training_data: str = "unstated",
) -> WeightsHeader:
    """Convert a checkpoint and write it as a weights file; an existing file is replaced at once or not at all.

    Args:    kind, one of KINDS; part, which network of a checkpoint that holds several ("" for the usual one); licence,
             training_data, what the weights came with: no checkpoint says so itself.
    Returns: the header of the file written. Tensors are stored in fp32, so that nothing is lost.
    Raises:  UnknownNameError for a kind or part that does not exist; WeightsError for a file that is missing, damaged,
             hostile or of another network, and for an output that cannot be written; UsageError for an unknown licence.
    """
    if kind not in KINDS:
        raise UnknownNameError(
            f"import_weights: kind must be one that can be read, got {kind!r}; {suggestion(kind, KINDS)}"
        )
    module = importlib.import_module(KINDS[kind])
    if part and not module.PARTS:
        raise UnknownNameError(
            f"import_weights: part must be left out for {kind}, got {part!r}; its checkpoints hold one network"
        )
    if part and part not in module.PARTS:
        raise UnknownNameError(
            f"import_weights: part must be one of {', '.join(module.PARTS)}, got {part!r}; "
            f"{suggestion(part, module.PARTS)}"
        )
    if Path(output).suffix != ".safetensors":
        raise WeightsError(f"import_weights: output must end in .safetensors, got {output}; rename it")
    checkpoint = read_checkpoint(path)
    converted = module.convert(checkpoint, part)
    return save_weights(
        output,
        converted.kind,
        converted.config,
        converted.state_dict,
        licence=licence,
        training_data=training_data,
        source=f"{Path(path).name} (SHA-256 {sha256_of(path)})",
        recipe=f"weights import {kind}: {converted.origin}",
        label_scheme=getattr(converted.config, "label_scheme", ""),
        attributes=getattr(converted.config, "attributes", ()),
        half=False,
    )
