# SPDX-License-Identifier: Apache-2.0
"""The e4e encoder, from the official file (`e4e_ffhq_encode.pt`) or MaskFaceGAN's (`e4e/state.pt`).

The official file keeps the encoder under `encoder.`, beside a decoder, which is left out; MaskFaceGAN's holds nothing
else. Both have the average w apart; it counts unless the options say that styles are whole. Ours has the same names,
and sizes are read from the tensors.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from faceedit.errors import WeightsError
from faceedit.importers.checkpoints import Checkpoint, State, flatten
from faceedit.importers.conversion import Converted, fill, plain, shape_text, width
from faceedit.networks.e4e import E4EConfig, E4EEncoder

PARTS: tuple[str, ...] = ()
_WHAT = "an e4e encoder"
_KIND = "Encoder4Editing"
_STAGES = 4


def convert(checkpoint: Checkpoint, part: str = "") -> Converted:
    """The encoder of a checkpoint. Raises WeightsError that names what is missing, left over or of another shape;
    `part` is always ""."""
    layout, content, average = _encoder(checkpoint)
    options = _options(checkpoint)
    state = flatten(checkpoint.name, content)
    if "input_layer.0.weight" not in state.tensors:
        raise WeightsError(
            f"import_weights: {state.name} must hold {_WHAT}, got tensors like {next(iter(state.tensors))}; check the "
            "file"
        )
    config = _configuration(state)
    if options.get("start_from_latent_avg", True):
        state.tensors["average"] = _average(state, average, config)
    else:  # its styles are whole, not differences from the average
        state.tensors["average"] = torch.zeros(config.num_ws, config.w_width)
    return fill(E4EEncoder, "e4e", config, state, f"the encoder of {layout}", what=_WHAT)


def _encoder(checkpoint: Checkpoint) -> tuple[str, Any, Any]:
    """Which layout the file has, the encoder's tensors, and the average w."""
    content = checkpoint.content
    if isinstance(content, Mapping):
        average = content.get("latent_avg")
        if isinstance(content.get("encoder_state_dict"), Mapping):
            return "a MaskFaceGAN file", content["encoder_state_dict"], average
        if isinstance(content.get("state_dict"), Mapping):
            inside = {
                key.removeprefix("encoder."): value
                for key, value in content["state_dict"].items()
                if str(key).startswith("encoder.")
            }
            if inside:
                return "an official e4e file", inside, average
    raise WeightsError(
        f"import_weights: {checkpoint.name} must hold encoder_state_dict, or state_dict with names in encoder., got "
        "neither; check the file"
    )


def _options(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """The training options that a file keeps, as official ones do; {} for none. Raises WeightsError for an encoder of
    another kind: pSp's has the same tensors, and reads them otherwise."""
    kept = checkpoint.content.get("opts")
    options = kept if isinstance(kept, Mapping) else vars(kept) if isinstance(kept, argparse.Namespace) else {}
    kind = options.get("encoder_type", _KIND)
    if kind != _KIND:
        raise WeightsError(
            f"import_weights: {checkpoint.name} must be {_KIND}, got {str(kind)[:80]!r} as its encoder_type; use an "
            "encoder that e4e trained"
        )
    return options


def _configuration(state: State) -> E4EConfig:
    depths = _numbers(state, r"body\.([0-9]{1,3})\.")
    widths = [width(state, f"body.{block}.res_layer.3.weight", 0) for block in range(depths)]
    base = width(state, "input_layer.0.weight", 0)
    blocks = tuple(widths.count(base << stage) for stage in range(_STAGES))
    if widths != sorted(widths) or sum(blocks) != depths or min(blocks) < 1:
        raise WeightsError(
            f"import_weights: body of {state.name} must have four stages of doubling width, got {widths}; check the "
            "file"
        )
    halvings = len({key for key in state.tensors if re.fullmatch(r"styles\.0\.convs\.[0-9]{1,2}\.weight", key)})
    if not 1 <= halvings <= 6:
        raise WeightsError(
            f"import_weights: styles.0 of {state.name} must halve a map one to six times, got {halvings}; check what "
            "it is"
        )
    return E4EConfig(
        size_px=16 << halvings,
        num_ws=_numbers(state, r"styles\.([0-9]{1,3})\."),
        w_width=width(state, "styles.0.linear.weight", 0),
        base_width=base,
        blocks=(blocks[0], blocks[1], blocks[2], blocks[3]),
        head_width=width(state, "styles.0.convs.0.weight", 0),
    )


def _numbers(state: State, pattern: str) -> int:
    """How many modules of a list there are, 0 … n − 1. Raises WeightsError when one of them is missing."""
    found = {int(match[1]) for key in state.tensors if (match := re.match(pattern, key))}
    if not found or found != set(range(len(found))):
        raise WeightsError(
            f"import_weights: {state.name} must number {pattern.partition(chr(92))[0]} from 0 on without gaps, got "
            f"{sorted(found)[:5]}; the file is incomplete"
        )
    return len(found)


def _average(state: State, average: Any, config: E4EConfig) -> Tensor:
    """The average w as one row a style; the files have one row for all, or one for each."""
    if not isinstance(average, Tensor):
        raise WeightsError(
            f"import_weights: {state.name} must hold latent_avg, got {type(average).__name__}; the file is incomplete"
        )
    state.tensors["latent_avg"] = average
    values = plain(state, "latent_avg")
    del state.tensors["latent_avg"]
    rows = values.reshape(-1, values.shape[-1]) if values.ndim else values.reshape(1, 1)
    if rows.shape not in ((1, config.w_width), (config.num_ws, config.w_width)):
        raise WeightsError(
            f"import_weights: latent_avg of {state.name} must be ({config.w_width}) or ({config.num_ws},"
            f"{config.w_width}), got {shape_text(values.shape)}; the file is inconsistent"
        )
    return rows.expand(config.num_ws, -1).clone()
