# SPDX-License-Identifier: Apache-2.0
"""The e4e encoder as it is released: names of the official file, and its arithmetic as plain functions of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def batch_norm_state(name: str, width: int, draw: torch.Generator) -> State:
    return {
        f"{name}.weight": torch.rand(width, generator=draw) + 0.5,
        f"{name}.bias": torch.randn(width, generator=draw) * 0.2,
        f"{name}.running_mean": torch.randn(width, generator=draw) * 0.2,
        f"{name}.running_var": torch.rand(width, generator=draw) + 0.5,
        f"{name}.num_batches_tracked": torch.tensor(7),
    }


def encoder_state(
    base: int = 4,
    blocks: tuple[int, ...] = (1, 2, 2, 1),
    styles: int = 9,
    head: int = 6,
    w_width: int = 5,
    size_px: int = 32,
    seed: int = 0,
) -> State:
    """Random tensors under the names of an official file, without its `encoder.`."""
    draw = torch.Generator().manual_seed(seed)

    def kernel(out: int, into: int, side: int) -> Tensor:
        return torch.randn(out, into, side, side, generator=draw) / (into * side * side) ** 0.5

    state: State = {"input_layer.0.weight": kernel(base, 3, 3), **batch_norm_state("input_layer.1", base, draw)}
    state["input_layer.2.weight"] = torch.rand(base, generator=draw)
    before, number = base, 0
    for stage, count in enumerate(blocks):
        for _ in range(count):
            width, name = base << stage, f"body.{number}"
            if before != width:
                state[f"{name}.shortcut_layer.0.weight"] = kernel(width, before, 1)
                state |= batch_norm_state(f"{name}.shortcut_layer.1", width, draw)
            state |= batch_norm_state(f"{name}.res_layer.0", before, draw)
            state[f"{name}.res_layer.1.weight"] = kernel(width, before, 3)
            state[f"{name}.res_layer.2.weight"] = torch.rand(width, generator=draw)
            state[f"{name}.res_layer.3.weight"] = kernel(width, width, 3)
            state |= batch_norm_state(f"{name}.res_layer.4", width, draw)
            narrow = max(1, width // 16)
            state[f"{name}.res_layer.5.fc1.weight"] = kernel(narrow, width, 1)
            state[f"{name}.res_layer.5.fc2.weight"] = kernel(width, narrow, 1)
            before, number = width, number + 1
    top = base << 3
    for layer, stage in ((1, 2), (2, 1)):
        state[f"latlayer{layer}.weight"] = kernel(top, base << stage, 1)
        state[f"latlayer{layer}.bias"] = torch.randn(top, generator=draw) * 0.2
    for style in range(styles):
        side = size_px // (16 if style < 3 else 8 if style < 7 else 4)
        into, conv = top, 0
        while side > 1:
            state[f"styles.{style}.convs.{conv}.weight"] = kernel(head, into, 3)
            state[f"styles.{style}.convs.{conv}.bias"] = torch.randn(head, generator=draw) * 0.2
            into, conv, side = head, conv + 2, side // 2
        state[f"styles.{style}.linear.weight"] = torch.randn(w_width, head, generator=draw)
        state[f"styles.{style}.linear.bias"] = torch.randn(w_width, generator=draw)
    return state


def encode(state: State, average: Tensor, image: Tensor, blocks: tuple[int, ...] = (1, 2, 2, 1)) -> Tensor:
    """The released network's styles (N,L,W)."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, state[f"{name}.weight"], state[f"{name}.bias"])

    def bottleneck(x: Tensor, name: str, stride: int) -> Tensor:
        if f"{name}.shortcut_layer.0.weight" in state:
            short = F.conv2d(x, state[f"{name}.shortcut_layer.0.weight"], stride=stride)
            short = norm(short, f"{name}.shortcut_layer.1")
        else:
            short = x[:, :, ::stride, ::stride]
        y = F.conv2d(norm(x, f"{name}.res_layer.0"), state[f"{name}.res_layer.1.weight"], padding=1)
        y = F.prelu(y, state[f"{name}.res_layer.2.weight"])
        y = norm(F.conv2d(y, state[f"{name}.res_layer.3.weight"], stride=stride, padding=1), f"{name}.res_layer.4")
        gate = F.adaptive_avg_pool2d(y, 1)
        gate = F.conv2d(
            F.relu(F.conv2d(gate, state[f"{name}.res_layer.5.fc1.weight"])), state[f"{name}.res_layer.5.fc2.weight"]
        )
        return y * torch.sigmoid(gate) + short

    def head(x: Tensor, style: int) -> Tensor:
        conv = 0
        while f"styles.{style}.convs.{conv}.weight" in state:
            name = f"styles.{style}.convs.{conv}"
            x = F.leaky_relu(F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2, padding=1), 0.01)
            conv += 2
        weight = state[f"styles.{style}.linear.weight"]
        return F.linear(x.flatten(1), weight / weight.shape[1] ** 0.5, state[f"styles.{style}.linear.bias"])

    def enlarged(x: Tensor, like: Tensor) -> Tensor:
        return F.interpolate(x, size=like.shape[2:], mode="bilinear", align_corners=True)

    x = norm(F.conv2d(image, state["input_layer.0.weight"], padding=1), "input_layer.1")
    x = F.prelu(x, state["input_layer.2.weight"])
    number, taps = 0, []
    for count in blocks:
        for block in range(count):
            x = bottleneck(x, f"body.{number}", 1 if block else 2)
            number += 1
        taps.append(x)
    _, c1, c2, c3 = taps
    p2 = enlarged(c3, c2) + F.conv2d(c2, state["latlayer1.weight"], state["latlayer1.bias"])
    p1 = enlarged(p2, c1) + F.conv2d(c1, state["latlayer2.weight"], state["latlayer2.bias"])
    styles = len({name.split(".")[1] for name in state if name.startswith("styles.")})
    w = head(c3, 0)
    rows = [w]
    for style in range(1, styles):
        rows.append(w + head(c3 if style < 3 else p2 if style < 7 else p1, style))
    return torch.stack(rows, 1) + average
