# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2 as the two public families compute it, in plain PyTorch from their own tensor names, and files in their
layouts: per-sample weights in a grouped convolution, zeros inserted before a depthwise filter, NCHW, fp32."""

import math
import pickle
import sys
import types
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]
RESAMPLING = (1.0, 3.0, 3.0, 1.0)


def filter_2d(taps=RESAMPLING) -> Tensor:
    row = torch.tensor(taps)
    return torch.outer(row, row) / row.sum() ** 2


def filtered(x: Tensor, kernel: Tensor, pad: tuple[int, int], up: int = 1, down: int = 1) -> Tensor:
    """Zeros between the samples, zeros around them, true convolution, every down-th sample."""
    n, c, h, w = x.shape
    if up > 1:
        spread = x.new_zeros(n, c, h * up, w * up)
        spread[:, :, ::up, ::up] = x
        x = spread
    x = F.pad(x, [*pad, *pad])
    return F.conv2d(x, kernel.flip(0, 1)[None, None].repeat(c, 1, 1, 1), groups=c)[:, :, ::down, ::down]


def lrelu(x: Tensor) -> Tensor:
    return torch.where(x >= 0, x, 0.2 * x) * math.sqrt(2)


def linear(x: Tensor, state: State, name: str, rate: float = 1.0) -> Tensor:
    weight = state[f"{name}.weight"]
    return x @ (weight * rate / math.sqrt(weight.shape[1])).t() + state[f"{name}.bias"] * rate


def mapped(z: Tensor, state: State, names: list[str], rate: float) -> Tensor:
    x = z / (z.square().mean(1, keepdim=True) + 1e-8).sqrt()
    for name in names:
        x = lrelu(linear(x, state, name, rate))
    return x


def modulated(x: Tensor, weight: Tensor, styles: Tensor, kernel: Tensor, up: bool, demodulate: bool) -> Tensor:
    n, o, i, k = styles.shape[0], *weight.shape[:3]
    own = weight[None] * styles[:, None, :, None, None]
    if demodulate:
        own = own / (own.square().sum((2, 3, 4), keepdim=True) + 1e-8).sqrt()
    grouped = x.reshape(1, n * i, *x.shape[2:])
    if up:
        y = F.conv_transpose2d(grouped, own.transpose(1, 2).reshape(n * i, o, k, k), stride=2, groups=n)
        return filtered(y.reshape(n, o, *y.shape[2:]), kernel * 4, (1, 1))
    y = F.conv2d(grouped, own.reshape(n * o, i, k, k), padding=k // 2, groups=n)
    return y.reshape(n, o, *y.shape[2:])


def clamped(x: Tensor, clamp: float | None) -> Tensor:
    return x if clamp is None else x.clamp(-clamp, clamp)


# NVlabs


def nvlabs_generator(widths, z=7, w=6, layers=2, architecture="skip", taps=RESAMPLING, seed=0) -> State:
    torch.manual_seed(seed)
    state: State = {}

    def affine(name, inputs):
        state[f"{name}.affine.weight"] = torch.randn(inputs, w)
        state[f"{name}.affine.bias"] = torch.ones(inputs) + torch.randn(inputs) * 0.1

    def conv(name, inputs, outputs, size):
        affine(name, inputs)
        state[f"{name}.weight"] = torch.randn(outputs, inputs, 3, 3)
        state[f"{name}.noise_strength"] = torch.randn([]) * 0.3
        state[f"{name}.noise_const"] = torch.randn(size, size)
        state[f"{name}.bias"] = torch.randn(outputs) * 0.2
        state[f"{name}.resample_filter"] = filter_2d(taps)

    for i in range(layers):
        state[f"mapping.fc{i}.weight"] = torch.randn(w, w if i else z) * 100
        state[f"mapping.fc{i}.bias"] = torch.randn(w) * 10
    state["mapping.w_avg"] = torch.randn(w)
    below = 0
    for level, width in enumerate(widths):
        name, size = f"synthesis.b{4 << level}", 4 << level
        state[f"{name}.resample_filter"] = filter_2d(taps)
        if level:
            conv(f"{name}.conv0", below, width, size)
        else:
            state[f"{name}.const"] = torch.randn(width, 4, 4)
        conv(f"{name}.conv1", width, width, size)
        if architecture == "skip" or level == len(widths) - 1:
            affine(f"{name}.torgb", width)
            state[f"{name}.torgb.weight"] = torch.randn(3, width, 1, 1)
            state[f"{name}.torgb.bias"] = torch.randn(3) * 0.2
        if architecture == "resnet" and level:
            state[f"{name}.skip.weight"] = torch.randn(width, below, 1, 1)
            state[f"{name}.skip.resample_filter"] = filter_2d(taps)
        below = width
    return state


def nvlabs_ws(state: State, z: Tensor, rate: float = 0.01) -> Tensor:
    return mapped(z, state, [f"mapping.fc{i}" for i in range(sum("mapping.fc" in key for key in state) // 2)], rate)


def nvlabs_images(state: State, ws: Tensor, clamp: float | None = None) -> Tensor:
    """ws (N,L,W); noise maps are the stored ones."""

    def layer(name, x, w, up=False, gain=1.0):
        styles = linear(w, state, f"{name}.affine")
        x = modulated(x, state[f"{name}.weight"], styles, state[f"{name}.resample_filter"], up, True)
        x = x + state[f"{name}.noise_const"] * state[f"{name}.noise_strength"] + state[f"{name}.bias"][:, None, None]
        return clamped(lrelu(x) * gain, clamp and clamp * gain)

    x = image = None
    level = 0
    while f"synthesis.b{4 << level}.conv1.weight" in state:
        name = f"synthesis.b{4 << level}"
        kernel = state[f"{name}.resample_filter"]
        is_residual = f"{name}.skip.weight" in state
        if level:
            shortcut = None
            if is_residual:
                weight = state[f"{name}.skip.weight"]
                y = F.conv2d(x, weight / math.sqrt(weight.shape[1]))
                shortcut = filtered(y, kernel * 4, (2, 1), up=2) * math.sqrt(0.5)
            x = layer(f"{name}.conv0", x, ws[:, 2 * level - 1], up=True)
            x = layer(f"{name}.conv1", x, ws[:, 2 * level], gain=math.sqrt(0.5) if is_residual else 1.0)
            x = x if shortcut is None else x + shortcut
        else:
            x = layer(f"{name}.conv1", state[f"{name}.const"].repeat(len(ws), 1, 1, 1), ws[:, 0])
        if f"{name}.torgb.weight" in state:
            weight = state[f"{name}.torgb.weight"]
            styles = linear(ws[:, 2 * level + 1], state, f"{name}.torgb.affine") / math.sqrt(weight.shape[1])
            rgb = modulated(x, weight, styles, kernel, False, False) + state[f"{name}.torgb.bias"][:, None, None]
            rgb = clamped(rgb, clamp)
            image = rgb if image is None else filtered(image, kernel * 4, (2, 1), up=2) + rgb
        level += 1
    return image


def nvlabs_discriminator(widths, architecture="resnet", seed=0) -> State:
    torch.manual_seed(seed)
    state: State = {}

    def conv(name, inputs, outputs, k, has_bias=True):
        state[f"{name}.weight"] = torch.randn(outputs, inputs, k, k)
        state[f"{name}.resample_filter"] = filter_2d()
        if has_bias:
            state[f"{name}.bias"] = torch.randn(outputs) * 0.2

    top = len(widths) - 1
    for level in range(top, 0, -1):
        name, width = f"b{4 << level}", widths[level]
        state[f"{name}.resample_filter"] = filter_2d()
        if level == top or architecture == "skip":
            conv(f"{name}.fromrgb", 3, width, 1)
        conv(f"{name}.conv0", width, width, 3)
        conv(f"{name}.conv1", width, widths[level - 1], 3)
        if architecture == "resnet":
            conv(f"{name}.skip", width, widths[level - 1], 1, has_bias=False)
    width = widths[0]
    if architecture == "skip":
        conv("b4.fromrgb", 3, width, 1)
    conv("b4.conv", width + 1, width, 3)
    state["b4.fc.weight"], state["b4.fc.bias"] = torch.randn(width, width * 16), torch.randn(width)
    state["b4.out.weight"], state["b4.out.bias"] = torch.randn(1, width), torch.randn(1)
    return state


def equal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, kernel: Tensor, down: bool = False) -> Tensor:
    weight = weight / math.sqrt(weight[0].numel())
    k = weight.shape[-1]
    if down:
        y = F.conv2d(filtered(x, kernel, (2, 2) if k == 3 else (1, 1)), weight, stride=2)
    else:
        y = F.conv2d(x, weight, padding=k // 2)
    return y if bias is None else lrelu(y + bias[:, None, None])


def with_deviation(x: Tensor, group_size: int) -> Tensor:
    group = min(group_size, len(x))
    y = x.reshape(group, -1, 1, *x.shape[1:])
    spread = (y.var(0, unbiased=False) + 1e-8).sqrt().mean((2, 3, 4)).repeat(group, 1)
    return torch.cat([x, spread[:, :, None, None].expand(-1, -1, 4, 4)], 1)


def nvlabs_logits(state: State, image: Tensor, group_size: int = 4) -> Tensor:
    def conv(name, x, down=False):
        return equal_conv(x, state[f"{name}.weight"], state.get(f"{name}.bias"), filter_2d(), down)

    x, size = None, image.shape[-1]
    while size >= 4:
        if f"b{size}.fromrgb.weight" in state:
            seen = conv(f"b{size}.fromrgb", image)
            x = seen if x is None else x + seen
        if size > 4:
            y = conv(f"b{size}.conv1", conv(f"b{size}.conv0", x), down=True)
            is_residual = f"b{size}.skip.weight" in state
            x = (y + conv(f"b{size}.skip", x, down=True)) * math.sqrt(0.5) if is_residual else y
            image = filtered(image, filter_2d(), (1, 1), down=2)
        size //= 2
    x = conv("b4.conv", with_deviation(x, group_size)).flatten(1)
    return linear(lrelu(linear(x, state, "b4.fc")), state, "b4.out")


# rosinality


def rosinality_generator(widths, w=6, layers=2, seed=0) -> State:
    torch.manual_seed(seed)
    state: State = {}

    def conv(name, inputs, outputs, k):
        state[f"{name}.weight"] = torch.randn(1, outputs, inputs, k, k)
        state[f"{name}.modulation.weight"] = torch.randn(inputs, w)
        state[f"{name}.modulation.bias"] = torch.ones(inputs) + torch.randn(inputs) * 0.1

    def styled(name, inputs, outputs, up):
        conv(f"{name}.conv", inputs, outputs, 3)
        if up:
            state[f"{name}.conv.blur.kernel"] = filter_2d() * 4
        state[f"{name}.noise.weight"] = torch.randn(1) * 0.3
        state[f"{name}.activate.bias"] = torch.randn(outputs) * 0.2

    def to_rgb(name, inputs, up):
        state[f"{name}.bias"] = torch.randn(1, 3, 1, 1) * 0.2
        if up:
            state[f"{name}.upsample.kernel"] = filter_2d() * 4
        conv(f"{name}.conv", inputs, 3, 1)

    for i in range(layers):
        state[f"style.{i + 1}.weight"], state[f"style.{i + 1}.bias"] = torch.randn(w, w) * 100, torch.randn(w) * 10
    state["input.input"] = torch.randn(1, widths[0], 4, 4)
    styled("conv1", widths[0], widths[0], up=False)
    to_rgb("to_rgb1", widths[0], up=False)
    for i in range(2 * len(widths) - 1):
        size = 4 << (i + 1) // 2
        state[f"noises.noise_{i}"] = torch.randn(1, 1, size, size)
    for k, (below, width) in enumerate(pairwise(widths)):
        styled(f"convs.{2 * k}", below, width, up=True)
        styled(f"convs.{2 * k + 1}", width, width, up=False)
        to_rgb(f"to_rgbs.{k}", width, up=True)
    return state


def rosinality_w(state: State, z: Tensor) -> Tensor:
    layers = sum(key.startswith("style.") for key in state) // 2
    return mapped(z, state, [f"style.{i + 1}" for i in range(layers)], 0.01)


def rosinality_images(state: State, latent: Tensor) -> Tensor:
    """latent (N,L,W); noise maps are the stored ones."""

    def conv(name, x, w, up=False, demodulate=True):
        weight = state[f"{name}.weight"][0]
        styles = linear(w, state, f"{name}.modulation") / math.sqrt(weight[0].numel())
        return modulated(x, weight, styles, filter_2d(), up, demodulate)

    def styled(name, x, w, noise, up=False):
        x = conv(f"{name}.conv", x, w, up) + state[f"{name}.noise.weight"] * state[f"noises.noise_{noise}"]
        return lrelu(x + state[f"{name}.activate.bias"][:, None, None])

    def to_rgb(name, x, w, image):
        rgb = conv(f"{name}.conv", x, w, demodulate=False) + state[f"{name}.bias"]
        return rgb if image is None else rgb + filtered(image, state[f"{name}.upsample.kernel"], (2, 1), up=2)

    x = styled("conv1", state["input.input"].repeat(len(latent), 1, 1, 1), latent[:, 0], 0)
    image = to_rgb("to_rgb1", x, latent[:, 1], None)
    k = 0
    while f"to_rgbs.{k}.bias" in state:
        x = styled(f"convs.{2 * k}", x, latent[:, 2 * k + 1], 2 * k + 1, up=True)
        x = styled(f"convs.{2 * k + 1}", x, latent[:, 2 * k + 2], 2 * k + 2)
        image = to_rgb(f"to_rgbs.{k}", x, latent[:, 2 * k + 3], image)
        k += 1
    return image


def rosinality_discriminator(widths, seed=0) -> State:
    torch.manual_seed(seed)
    state = {"convs.0.0.weight": torch.randn(widths[-1], 3, 1, 1), "convs.0.1.bias": torch.randn(widths[-1]) * 0.2}
    for i, level in enumerate(range(len(widths) - 1, 0, -1), start=1):
        width, below = widths[level], widths[level - 1]
        state |= {
            f"convs.{i}.conv1.0.weight": torch.randn(width, width, 3, 3),
            f"convs.{i}.conv1.1.bias": torch.randn(width) * 0.2,
            f"convs.{i}.conv2.0.kernel": filter_2d(),
            f"convs.{i}.conv2.1.weight": torch.randn(below, width, 3, 3),
            f"convs.{i}.conv2.2.bias": torch.randn(below) * 0.2,
            f"convs.{i}.skip.0.kernel": filter_2d(),
            f"convs.{i}.skip.1.weight": torch.randn(below, width, 1, 1),
        }
    width = widths[0]
    state |= {"final_conv.0.weight": torch.randn(width, width + 1, 3, 3), "final_conv.1.bias": torch.randn(width)}
    state |= {"final_linear.0.weight": torch.randn(width, width * 16), "final_linear.0.bias": torch.randn(width)}
    return state | {"final_linear.1.weight": torch.randn(1, width), "final_linear.1.bias": torch.randn(1)}


def rosinality_logits(state: State, image: Tensor) -> Tensor:
    def conv(name, bias, x, down=False):
        return equal_conv(x, state[f"{name}.weight"], bias and state[f"{bias}.bias"], filter_2d(), down)

    x, i = conv("convs.0.0", "convs.0.1", image), 1
    while f"convs.{i}.skip.1.weight" in state:
        y = conv(f"convs.{i}.conv2.1", f"convs.{i}.conv2.2", conv(f"convs.{i}.conv1.0", f"convs.{i}.conv1.1", x), True)
        x = (y + conv(f"convs.{i}.skip.1", None, x, True)) / math.sqrt(2)
        i += 1
    x = conv("final_conv.0", "final_conv.1", with_deviation(x, 4)).flatten(1)
    return linear(lrelu(linear(x, state, "final_linear.0")), state, "final_linear.1")


# Files


class Persistent:
    """Pickles as NVlabs' persistent objects do: a call of a function of theirs, with source code and state inside."""

    def __init__(self, class_name: str, state: dict, source: str):
        self.meta = {
            "type": "class",
            "version": 6,
            "module_src": source,
            "class_name": class_name,
            "state": state,
        }

    def __reduce__(self):
        return sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj, (self.meta,), None


def persistent(state: State, source: str, settings: dict | None = None) -> Persistent:
    """A tree of persistent modules with these tensors under their dotted names, and settings under theirs."""
    tree: dict = {}
    for name, value in {**state, **(settings or {})}.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value

    def build(node: dict, name: str) -> Persistent:
        buffers = ("resample_filter", "noise_const", "w_avg")
        tensors = {k: v for k, v in node.items() if isinstance(v, Tensor)}
        attributes = {k: v for k, v in node.items() if not isinstance(v, Tensor | dict)}
        return Persistent(
            name,
            {
                "training": False,
                "_parameters": {k: torch.nn.Parameter(v) for k, v in tensors.items() if k not in buffers},
                "_buffers": {k: v for k, v in tensors.items() if k in buffers},
                "_non_persistent_buffers_set": set(),
                "_modules": {k: build(v, f"Some{k.capitalize()}") for k, v in node.items() if isinstance(v, dict)},
                "_init_args": (),
                **attributes,
            },
            source,
        )

    return build(tree, "Generator")


def write_nvlabs_pickle(path: Path, networks: dict, protocol: int = 3) -> None:
    """Their modules exist only while the file is written, as on a machine that never had them."""
    package, module = types.ModuleType("torch_utils"), types.ModuleType("torch_utils.persistence")
    library, util = types.ModuleType("dnnlib"), types.ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("their code must not run")

    _reconstruct_persistent_obj.__module__ = module.__name__
    _reconstruct_persistent_obj.__qualname__ = "_reconstruct_persistent_obj"
    easy = type("EasyDict", (dict,), {"__module__": "dnnlib.util", "__qualname__": "EasyDict"})
    module._reconstruct_persistent_obj, util.EasyDict = _reconstruct_persistent_obj, easy
    modules = {"torch_utils": package, "torch_utils.persistence": module, "dnnlib": library, "dnnlib.util": util}
    sys.modules.update(modules)
    try:
        content = {"training_set_kwargs": easy(class_name="training.dataset.ImageFolderDataset"), **networks}
        path.write_bytes(pickle.dumps(content, protocol))
    finally:
        for name in modules:
            del sys.modules[name]
