# SPDX-License-Identifier: Apache-2.0
"""MaskFaceGAN's classifier and parser in plain PyTorch from the released files' tensor names, and states with random
values in their layouts. Written from tables of the released files alone: no code of the networks under test is used."""

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]

HEADS = """
blurry sideburns wearing_earrings bald goatee mustache 5_o_clock_shadow arched_eyebrows no_beard heavy_makeup
male wearing_lipstick black_hair high_cheekbones smiling mouth_slightly_open oval_face bushy_eyebrows
attractive young gray_hair brown_hair blond_hair pale_skin chubby double_chin big_nose bags_under_eyes
wearing_necklace wearing_necktie rosy_cheeks bangs wavy_hair straight_hair wearing_hat big_lips narrow_eyes
pointy_nose receding_hairline eyeglasses
"""

# Slots of the convolutions and of the poolings, and the parent of each copy.
CONV_GROUPS = {
    "01-06": ((0, 3, 7, 10, 14, 17), (6, 13), [0]),
    "06-11": ((0, 4, 7, 10, 14), (3, 13), [0, 0]),
    "11-12": ((0,), (), [0, 0, 1]),
    "12-13": ((0,), (3,), [0, 0, 0, 0, 1, 1, 1, 1, 1, 2]),
}
FC_GROUPS = {
    "13-14": [0, 1, 1, 1, 2, 2, 3, 4, 4, 4, 5, 5, 6, 6, 6, 7, 8, 9],
    "14-15": [
        *(0, 1, 2, 2, 3, 3, 3, 3, 4, 4, 5, 6, 7, 7, 7, 8, 8),
        *(9, 9, 9, 10, 10, 11, 11, 11, 12, 13, 13, 14, 15, 16, 16, 17),
    ],
    "15-16": [0, 1, 1, 2, 2, 3, 4, 5, 6, *[7] * 3, *[8] * 3, *range(9, 29), 29, 29, 30, 31, 32],
}


def random_norm(state: State, name: str, channels: int) -> None:
    state[f"{name}.weight"] = torch.rand(channels) + 0.5
    state[f"{name}.bias"] = torch.randn(channels) * 0.2
    state[f"{name}.running_mean"] = torch.randn(channels) * 0.2
    state[f"{name}.running_var"] = torch.rand(channels) + 0.5
    state[f"{name}.num_batches_tracked"] = torch.tensor(7)


def random_conv(state: State, name: str, inputs: int, outputs: int, kernel: int, bias: bool = False) -> None:
    state[f"{name}.weight"] = torch.randn(outputs, inputs, kernel, kernel) * (2 / (inputs * kernel**2)) ** 0.5
    if bias:
        state[f"{name}.bias"] = torch.randn(outputs) * 0.2


def normed(x: Tensor, state: State, name: str) -> Tensor:
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean, variance, weight, bias = (
        state[f"{name}.{leaf}"].reshape(shape) for leaf in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def tree_state(width: int = 6, hidden: int = 10, side: int = 2, seed: int = 0) -> State:
    """The classifier's file; images are 32 * side px."""
    torch.manual_seed(seed)
    state: State = {
        "celeba_mean": torch.tensor([0.51, 0.42, 0.38]).reshape(1, 3, 1, 1),
        "celeba_std": torch.tensor([0.27, 0.25, 0.24]).reshape(1, 3, 1, 1),
    }
    inputs = 3
    for group, (slots, _, parents) in CONV_GROUPS.items():
        for copy in range(len(parents)):
            before = inputs
            for slot in slots:
                random_conv(state, f"conv_layers.{group}.{copy}.{slot}", before, width, 3, bias=True)
                random_norm(state, f"conv_layers.{group}.{copy}.{slot + 2}", width)
                before = width
        inputs = width
    inputs = width * side * side
    for group, parents in FC_GROUPS.items():
        for copy in range(len(parents)):
            name, outputs = f"fc_layers.{group}.{copy}", 1 if group == "15-16" else hidden
            state[f"{name}.0.weight"] = torch.randn(outputs, inputs) * (2 / inputs) ** 0.5
            state[f"{name}.0.bias"] = torch.randn(outputs) * 0.2
            if outputs > 1:
                random_norm(state, f"{name}.2", outputs)
        inputs = hidden
    return state


def tree_logits(state: State, image: Tensor, side: int = 2) -> dict[str, Tensor]:
    """Logits (N,) by lower-case head name; image (N,3,S,S) in [0, 1]."""
    x = F.adaptive_avg_pool2d(image, 32 * side)
    x = (x - state["celeba_mean"]) / state["celeba_std"]
    above = [x]
    for group, (slots, pools, parents) in CONV_GROUPS.items():
        here = []
        for copy, parent in enumerate(parents):
            y = above[parent]
            for slot in range(max(slots) + 4):
                name = f"conv_layers.{group}.{copy}"
                if slot in slots:
                    y = F.conv2d(y, state[f"{name}.{slot}.weight"], state[f"{name}.{slot}.bias"], padding=1)
                    y = normed(y.clamp(min=0), state, f"{name}.{slot + 2}")
                if slot in pools:
                    y = F.max_pool2d(y, 2)
            here.append(y)
        above = here
    above = [y.reshape(len(image), -1) for y in above]
    for group, parents in FC_GROUPS.items():
        here = []
        for copy, parent in enumerate(parents):
            name = f"fc_layers.{group}.{copy}"
            y = above[parent] @ state[f"{name}.0.weight"].t() + state[f"{name}.0.bias"]
            here.append(y if group == "15-16" else normed(y.clamp(min=0), state, f"{name}.2"))
        above = here
    return {head: y[:, 0] for head, y in zip(HEADS.split(), above, strict=True)}


# Blocks, inner width at 64 channels a group, and the dilation of the first and of the other blocks (output stride 8).
STAGES = {"layer1": (3, 1, 1, 1), "layer2": (4, 2, 1, 1), "layer3": (6, 4, 1, 2), "layer4": (3, 8, 2, 4)}


def parser_state(group: int = 8, head: int = 6, classes: int = 9, depths: tuple[int, ...] = (), seed: int = 0) -> State:
    """The parser's file, with the class weights of its training loss."""
    torch.manual_seed(seed)
    state: State = {"loss.weight": torch.rand(classes)}

    def block(conv: str, norm: str, inputs: int, outputs: int, kernel: int) -> None:
        random_conv(state, f"model.{conv}", inputs, outputs, kernel)
        random_norm(state, f"model.{norm}", outputs)

    block("backbone.conv1", "backbone.bn1", 3, 64, 7)
    before = 64
    for number, (stage, (blocks, times, _, _)) in enumerate(STAGES.items()):
        for i in range(depths[number] if depths else blocks):
            name, inner, after = f"backbone.{stage}.{i}", group * times, 256 * times
            for j, (inputs, outputs, kernel) in enumerate(
                ((before, inner, 1), (inner, inner, 3), (inner, after, 1)), 1
            ):
                block(f"{name}.conv{j}", f"{name}.bn{j}", inputs, outputs, kernel)
            state[f"model.{name}.bn3.weight"] *= 0.3  # or sixteen residual blocks would sum up to thousands
            if i == 0:
                block(f"{name}.downsample.0", f"{name}.downsample.1", before, after, 1)
            before = after
    for i, kernel in enumerate((1, 3, 3, 3)):
        block(f"classifier.0.convs.{i}.0", f"classifier.0.convs.{i}.1", before, head, kernel)
    block("classifier.0.convs.4.1", "classifier.0.convs.4.2", before, head, 1)
    block("classifier.0.project.0", "classifier.0.project.1", 5 * head, head, 1)
    block("classifier.1", "classifier.2", head, head, 3)
    random_conv(state, "model.classifier.4", head, classes, 1, bias=True)
    return state


def parser_logits(state: State, image: Tensor, size_px: int) -> Tensor:
    """Logits (N,9,P,P); image (N,3,S,S) in [0, 1], P = size_px."""

    def conv(x: Tensor, name: str, norm: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight = state[f"model.{name}.weight"]
        reach = weight.shape[-1] // 2 * dilation
        return normed(F.conv2d(x, weight, None, stride, reach, dilation), state, f"model.{norm}")

    x = F.adaptive_avg_pool2d(image, size_px) * 2 - 1
    x = conv(x, "backbone.conv1", "backbone.bn1", stride=2).clamp(min=0)
    x = F.max_pool2d(x, 3, 2, 1)
    for stage, (blocks, _, first, other) in STAGES.items():
        for i in range(blocks):
            name, stride = f"backbone.{stage}.{i}", 2 if stage == "layer2" and i == 0 else 1
            y = conv(x, f"{name}.conv1", f"{name}.bn1").clamp(min=0)
            y = conv(y, f"{name}.conv2", f"{name}.bn2", stride, other if i else first).clamp(min=0)
            y = conv(y, f"{name}.conv3", f"{name}.bn3")
            x = conv(x, f"{name}.downsample.0", f"{name}.downsample.1", stride) if i == 0 else x
            x = (x + y).clamp(min=0)
    scales = [
        conv(x, f"classifier.0.convs.{i}.0", f"classifier.0.convs.{i}.1", dilation=rate).clamp(min=0)
        for i, rate in enumerate((1, 12, 24, 36))
    ]
    pooled = conv(x.mean((2, 3), keepdim=True), "classifier.0.convs.4.1", "classifier.0.convs.4.2").clamp(min=0)
    x = torch.cat([*scales, pooled.expand_as(scales[0])], 1)
    x = conv(x, "classifier.0.project.0", "classifier.0.project.1").clamp(min=0)
    x = conv(x, "classifier.1", "classifier.2").clamp(min=0)
    x = F.conv2d(x, state["model.classifier.4.weight"], state["model.classifier.4.bias"])
    return F.interpolate(x, size=(size_px, size_px), mode="bilinear", align_corners=False)
