# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2 checkpoints: NVlabs' pickles and state dicts (stylegan2-ada-pytorch, stylegan3) and rosinality's files.

Both families keep weights unscaled and filters alike, so conversion renames and drops axes of length one.
Sizes come from the tensors' shapes; what shapes do not tell (clamp, learning rate multiplier, group size) comes from a
pickle's own settings, or else is the paper's.
"""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from faceedit.errors import WeightsError
from faceedit.importers.checkpoints import Checkpoint, Record, State, flatten
from faceedit.importers.conversion import Converted, fill, shape_text, width
from faceedit.networks.stylegan2 import (
    MAX_PX,
    MIN_PX,
    Architecture,
    StyleGAN2Config,
    StyleGAN2Discriminator,
    StyleGAN2DiscriminatorConfig,
    StyleGAN2Generator,
    size_at,
)

PARTS: dict[str, tuple[str, str]] = {  # what the two families call it
    "ema": ("G_ema", "g_ema"),
    "generator": ("G", "g"),
    "discriminator": ("D", "d"),
}
_DEFAULT_FIR = (1.0, 3.0, 3.0, 1.0)
_RESAMPLING = (".resample_filter", ".blur.kernel", ".upsample.kernel", ".0.kernel")  # buffers that hold the filter
_AVERAGE_SAMPLES = 50_000
_NVLABS_BLOCK = re.compile(r"synthesis\.b[0-9]+\.")
_AFFINE = ("affine.weight", "affine.bias")


def convert(checkpoint: Checkpoint, part: str = "") -> Converted:
    """One network of a StyleGAN2 checkpoint.

    Args:    part, one of PARTS; "" for the averaged generator, or the generator when there is no average, or whatever
             single network the file is. Such a file does not say whether its generator is an average.
    Raises:  WeightsError when that is not there, or a tensor is missing, left over or of another shape.
    """
    found, content = _choose(checkpoint, part)
    state = flatten(checkpoint.name, content)
    converted = _convert(checkpoint, state, f"{found} of " if found else "")
    wanted = "stylegan2-discriminator" if part == "discriminator" else "stylegan2"
    if part and converted.kind != wanted:
        raise WeightsError(
            f"import_weights: {checkpoint.name} must hold the {part}, got a {converted.kind}; name another part"
        )
    return converted


def _convert(checkpoint: Checkpoint, state: State, word: str) -> Converted:
    """The network that these tensors are; word, what its origin begins with."""
    has = state.tensors.keys()
    if any(_NVLABS_BLOCK.match(key) for key in has):
        return _nvlabs_generator(state, f"{word}an NVlabs checkpoint")
    if "input.input" in has or "to_rgb1.bias" in has:
        average = _latent_average(checkpoint.content)
        return _rosinality_generator(state, average, f"{word}a rosinality checkpoint")
    if "b4.out.weight" in has or "b4.fc.weight" in has:
        return _nvlabs_discriminator(state, f"{word}an NVlabs checkpoint")
    if "final_linear.1.weight" in has or "final_conv.0.weight" in has:
        return _rosinality_discriminator(state, f"{word}a rosinality checkpoint")
    if any(key.startswith("synthesis.blocks.") for key in has) or {"blocks.0.conv0.weight", "logit.weight"} <= has:
        raise WeightsError(
            f"import_weights: {checkpoint.name} must be a checkpoint of NVlabs or rosinality, got one that is "
            "converted already; use it as it is"
        )
    known = "a StyleGAN3 generator" if "synthesis.input.freqs" in has else f"tensors like {next(iter(has))}"
    raise WeightsError(f"import_weights: {checkpoint.name} must hold a StyleGAN2 network, got {known}; check the file")


def _choose(checkpoint: Checkpoint, part: str) -> tuple[str, Any]:
    """The network asked for, and its name in the file; the whole file, without a name, when it is not divided."""
    content = checkpoint.content
    if isinstance(content, Record):
        return "", content
    if not isinstance(content, Mapping):
        raise WeightsError(
            f"import_weights: {checkpoint.name} must hold named networks or tensors, got {type(content).__name__}; "
            "check the file"
        )
    names = [name for pair in PARTS.values() for name in pair]
    divided = {name: content[name] for name in names if isinstance(content.get(name), Mapping | Record)}
    if not divided:  # safetensors has no nesting: a prefix tells
        for name in names:
            inside = {str(k)[len(name) + 1 :]: v for k, v in content.items() if str(k).startswith(f"{name}.")}
            if inside:
                divided[name] = inside
    if not divided:
        return "", content
    for wanted in (part,) if part else ("ema", "generator"):
        for name in PARTS[wanted]:
            if name in divided:
                return name, divided[name]
    raise WeightsError(
        f"import_weights: {checkpoint.name} must hold the {part or 'generator'}, got {', '.join(divided)}; name "
        "another part"
    )


def _latent_average(content: Any) -> Tensor | None:
    average = content.get("latent_avg") if isinstance(content, Mapping) else None
    return average if isinstance(average, Tensor) else None


def _nvlabs_generator(state: State, origin: str) -> Converted:
    if "mapping.embed.weight" in state.tensors:
        raise WeightsError(
            f"import_weights: {state.name} must be unconditional, got a generator of classes; use another checkpoint"
        )
    levels = _levels(state, {key.split(".")[1] for key in state.tensors if key.startswith("synthesis.b")})
    widths = tuple(width(state, f"synthesis.b{size_at(level)}.conv1.weight", 0) for level in range(levels))
    layers = sum(1 for key in state.tensors if key.startswith("mapping.fc") and key.endswith(".weight"))
    architecture: Architecture = "orig"
    if "synthesis.b8.skip.weight" in state.tensors:
        architecture = "resnet"
    elif "synthesis.b4.torgb.weight" in state.tensors:
        architecture = "skip"
    config = StyleGAN2Config(
        size_px=size_at(levels - 1),
        channels=_own_widths(widths),
        fir=_fir(state),
        clamp=_clamp(state, "synthesis.b4.conv1"),
        z_width=width(state, "mapping.fc0.weight", 1),
        w_width=width(state, "mapping.fc0.weight", 0),
        mapping_layers=layers,
        mapping_rate=_setting(state, "mapping.fc0.bias_gain", StyleGAN2Config().mapping_rate),
        architecture=architecture,
    )
    return _fill(StyleGAN2Generator, "stylegan2", config, state, dict(_nvlabs_generator_names(config)), origin)


def _nvlabs_generator_names(config: StyleGAN2Config) -> Iterator[tuple[str, str]]:
    for i in range(config.mapping_layers):
        yield from ((f"mapping.layers.{i}.{leaf}", f"mapping.fc{i}.{leaf}") for leaf in ("weight", "bias"))
    yield "mapping.average", "mapping.w_avg"
    yield "synthesis.const", "synthesis.b4.const"
    for level in range(config.levels):
        ours, theirs = f"synthesis.blocks.{level}", f"synthesis.b{size_at(level)}"
        for conv in ("conv0", "conv1") if level else ("conv1",):
            yield from ((f"{ours}.{conv}.{leaf}", f"{theirs}.{conv}.{leaf}") for leaf in ("weight", "bias", *_AFFINE))
            yield f"{ours}.{conv}.strength", f"{theirs}.{conv}.noise_strength"
            yield f"{ours}.{conv}.noise", f"{theirs}.{conv}.noise_const"
        if config.architecture == "skip" or level == config.levels - 1:
            yield from ((f"{ours}.torgb.{leaf}", f"{theirs}.torgb.{leaf}") for leaf in ("weight", "bias", *_AFFINE))
        if config.architecture == "resnet" and level:
            yield f"{ours}.skip.weight", f"{theirs}.skip.weight"


def _rosinality_generator(state: State, average: Tensor | None, origin: str) -> Converted:
    depth = sum(1 for key in state.tensors if re.fullmatch(r"to_rgbs\.[0-9]+\.bias", key))
    _check_levels(state, depth + 1)
    names = ["conv1.conv.weight", *(f"convs.{2 * level + 1}.conv.weight" for level in range(depth))]
    widths = tuple(width(state, name, 1) for name in names)
    config = StyleGAN2Config(
        size_px=size_at(depth),
        channels=_own_widths(widths),
        fir=_fir(state),
        z_width=width(state, "style.1.weight", 1),
        w_width=width(state, "style.1.weight", 0),
        mapping_layers=sum(1 for key in state.tensors if key.startswith("style.") and key.endswith(".weight")),
    )
    names_of = dict(_rosinality_generator_names(config))
    if average is not None:
        state.tensors["latent_avg"] = average
        return _fill(StyleGAN2Generator, "stylegan2", config, state, names_of, origin)
    # Files of a training run leave the average out; it is a property of the mapping network.
    state.tensors["latent_avg"] = torch.zeros(config.w_width)
    converted = _fill(StyleGAN2Generator, "stylegan2", config, state, names_of, origin)
    network = StyleGAN2Generator(config)
    network.load_state_dict(converted.state_dict)
    converted.state_dict["mapping.average"] = network.mapping.estimate_average(_AVERAGE_SAMPLES)
    origin = f"{origin}, average of w estimated from {_AVERAGE_SAMPLES} samples"
    return Converted(converted.kind, config, converted.state_dict, origin)


def _rosinality_generator_names(config: StyleGAN2Config) -> Iterator[tuple[str, str]]:
    conv = {
        "weight": "conv.weight",
        "bias": "activate.bias",
        "strength": "noise.weight",
        "affine.weight": "conv.modulation.weight",
        "affine.bias": "conv.modulation.bias",
    }
    rgb = {leaf: theirs for leaf, theirs in conv.items() if leaf != "strength"} | {"bias": "bias"}
    for i in range(config.mapping_layers):
        yield from ((f"mapping.layers.{i}.{leaf}", f"style.{i + 1}.{leaf}") for leaf in ("weight", "bias"))
    yield "mapping.average", "latent_avg"
    yield "synthesis.const", "input.input"
    layer = 0
    for level in range(config.levels):
        ours = f"synthesis.blocks.{level}"
        for i in range(2) if level else (1,):
            theirs = f"convs.{2 * (level - 1) + i}" if level else "conv1"
            yield from ((f"{ours}.conv{i}.{leaf}", f"{theirs}.{name}") for leaf, name in conv.items())
            yield f"{ours}.conv{i}.noise", f"noises.noise_{layer}"
            layer += 1
        theirs = f"to_rgbs.{level - 1}" if level else "to_rgb1"
        yield from ((f"{ours}.torgb.{leaf}", f"{theirs}.{name}") for leaf, name in rgb.items())


def _nvlabs_discriminator(state: State, origin: str) -> Converted:
    if "mapping.fc0.weight" in state.tensors:
        raise WeightsError(
            f"import_weights: {state.name} must be unconditional, got a discriminator of classes; use another "
            "checkpoint"
        )
    levels = _levels(state, {key.split(".")[0] for key in state.tensors})
    widths = [width(state, "b4.conv.weight", 0)]
    widths += [width(state, f"b{size_at(level)}.conv0.weight", 0) for level in range(1, levels)]
    architecture: Architecture = "orig"
    if "b8.skip.weight" in state.tensors:
        architecture = "resnet"
    elif "b4.fromrgb.weight" in state.tensors:
        architecture = "skip"
    config = StyleGAN2DiscriminatorConfig(
        size_px=size_at(levels - 1),
        channels=_own_widths(tuple(widths)),
        fir=_fir(state),
        clamp=_clamp(state, "b4.conv"),
        architecture=architecture,
        group_size=int(_setting(state, "b4.mbstd.group_size", StyleGAN2DiscriminatorConfig().group_size)),
    )
    names: dict[str, str] = {}
    both = ("weight", "bias")
    for i, level in enumerate(range(levels - 1, 0, -1)):
        theirs = f"b{size_at(level)}"
        for layer in ("conv0", "conv1", *(["fromrgb"] if i == 0 or architecture == "skip" else [])):
            names |= {f"blocks.{i}.{layer}.{leaf}": f"{theirs}.{layer}.{leaf}" for leaf in both}
        if architecture == "resnet":
            names[f"blocks.{i}.skip.weight"] = f"{theirs}.skip.weight"
    last = {"conv": "b4.conv", "hidden": "b4.fc", "logit": "b4.out"}
    if architecture == "skip":
        last["fromrgb"] = "b4.fromrgb"
    names |= {f"{ours}.{leaf}": f"{theirs}.{leaf}" for ours, theirs in last.items() for leaf in both}
    return _fill(StyleGAN2Discriminator, "stylegan2-discriminator", config, state, names, origin)


def _rosinality_discriminator(state: State, origin: str) -> Converted:
    depth = sum(1 for key in state.tensors if key.startswith("convs.") and key.endswith(".skip.1.weight"))
    _check_levels(state, depth + 1)
    widths = [width(state, "final_conv.0.weight", 0)]
    widths += [width(state, f"convs.{depth + 1 - level}.conv1.0.weight", 0) for level in range(1, depth + 1)]
    config = StyleGAN2DiscriminatorConfig(
        size_px=size_at(depth), channels=_own_widths(tuple(widths)), fir=_fir(state), architecture="resnet"
    )
    names = {"blocks.0.fromrgb.weight": "convs.0.0.weight", "blocks.0.fromrgb.bias": "convs.0.1.bias"}
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"convs.{i + 1}"
        names |= {
            f"{ours}.conv0.weight": f"{theirs}.conv1.0.weight",
            f"{ours}.conv0.bias": f"{theirs}.conv1.1.bias",
            f"{ours}.conv1.weight": f"{theirs}.conv2.1.weight",
            f"{ours}.conv1.bias": f"{theirs}.conv2.2.bias",
            f"{ours}.skip.weight": f"{theirs}.skip.1.weight",
        }
    names |= {"conv.weight": "final_conv.0.weight", "conv.bias": "final_conv.1.bias"}
    for i, layer in enumerate(("hidden", "logit")):
        names |= {f"{layer}.{leaf}": f"final_linear.{i}.{leaf}" for leaf in ("weight", "bias")}
    return _fill(StyleGAN2Discriminator, "stylegan2-discriminator", config, state, names, origin)


def _fill(
    network_class: type[nn.Module],
    kind: str,
    config: StyleGAN2Config | StyleGAN2DiscriminatorConfig,
    state: State,
    names: dict[str, str],
    origin: str,
) -> Converted:
    return fill(
        network_class,
        kind,
        config,
        state,
        origin,
        names=names,
        what="a StyleGAN2 network",
        ignored=lambda key: key.endswith(_RESAMPLING),
    )


def _levels(state: State, blocks: set[str]) -> int:
    """How many sizes there are, from block names such as b4, b8, b16."""
    sizes = sorted(int(name[1:]) for name in blocks if re.fullmatch(r"b[0-9]{1,5}", name))
    levels = len(sizes)
    _check_levels(state, levels)
    if sizes != [size_at(level) for level in range(levels)]:
        raise WeightsError(
            f"import_weights: {state.name} must have blocks 4, 8, 16, ..., got {sizes}; the file is incomplete"
        )
    return levels


def _check_levels(state: State, levels: int) -> None:
    if not MIN_PX <= size_at(max(levels, 1) - 1) <= MAX_PX:
        raise WeightsError(
            f"import_weights: {state.name} must be of {MIN_PX} to {MAX_PX} px, got {levels} sizes from 4 px on; use "
            "another checkpoint"
        )


def _own_widths(widths: tuple[int, ...]) -> tuple[int, ...]:
    """The widths, or nothing when they are config F's."""
    default = StyleGAN2Config(size_px=size_at(len(widths) - 1))
    return () if widths == tuple(default.width(level) for level in range(len(widths))) else widths


def _setting(state: State, key: str, default: float) -> float:
    """A positive number from a pickle's settings; the default where there is none."""
    value = state.settings.get(key)
    if value is None:
        return default
    if not isinstance(value, int | float) or not 0 < value < math.inf:
        raise WeightsError(
            f"import_weights: {key} of {state.name} must be a positive number, got {value!r}; the file is inconsistent"
        )
    return value


def _clamp(state: State, layer: str) -> float:
    """A layer's clamp, negative for none. Refuses activations that this project's layers do not have."""
    activation = state.settings.get(f"{layer}.activation", "lrelu")
    if activation != "lrelu":
        raise WeightsError(
            f"import_weights: activation of {state.name} must be lrelu, got {activation!r}; use another checkpoint"
        )
    return float(_setting(state, f"{layer}.conv_clamp", -1.0))


def _fir(state: State) -> tuple[float, ...]:
    """The taps of the resampling filter, from the first buffer that holds it; the default where none does."""
    for key, tensor in state.tensors.items():
        if key.endswith(_RESAMPLING):
            taps = tensor.detach().to(torch.float64)
            if taps.ndim == 1:
                taps = torch.outer(taps, taps)
            row = taps.sum(0) / taps.sum()
            if taps.shape != (4, 4) or not torch.allclose(torch.outer(row, row), taps / taps.sum(), atol=1e-6):
                raise WeightsError(
                    f"import_weights: {key} of {state.name} must be a separable filter of 4 taps, got "
                    f"{shape_text(tensor.shape)}; use another checkpoint"
                )
            default = torch.tensor(_DEFAULT_FIR, dtype=torch.float64) / sum(_DEFAULT_FIR)
            return _DEFAULT_FIR if torch.allclose(row, default, atol=1e-6) else tuple(row.tolist())
    return _DEFAULT_FIR
