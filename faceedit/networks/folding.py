# SPDX-License-Identifier: Apache-2.0
"""Fewer passes over features where the weights no longer change: normalisation, bias and activation join others."""

import copy
from typing import Any, Self, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from faceedit.kernels import frozen_conv, noise_bias_act

Network = TypeVar("Network", bound=nn.Module)

# By name: to import torchvision takes half a second, which networks without its blocks need not wait for.
_RESIDUAL_BLOCKS = ("torchvision.models.resnet.BasicBlock", "torchvision.models.resnet.Bottleneck")
_POOLED_BRANCH = "torchvision.models.segmentation.deeplabv3.ASPPPooling"


def for_inference(network: Network) -> Network:
    """A frozen copy of a network for inference, in evaluation mode and channels_last. Gradients still reach its input.

    - A BatchNorm2d registered right after the Conv2d that feeds it becomes part of the convolution.
    - In an nn.Sequential a convolution's bias and the ReLU after it are one pass, and a BatchNorm2d that is left, as
      one behind the ReLU, is another; so are the bias and the ReLU at the end of torchvision's residual blocks, where
      all their normalisations were folded. On a CPU, where the convolution adds the bias itself, what can be done in
      place is.
    - On a CPU 3x3 convolutions of enough pixels are the kernel library's: those above, and without gradient any.
    - The pooled branch of torchvision's ASPP keeps the layout of what it pools, its gradient too.

    Anything else stays as it is. Values differ by rounding. Writes to the copy's weights through `.data` may go unseen:
    write to the tensors themselves under `torch.no_grad()`.
    """
    with torch.inference_mode(False):  # weights made in that mode would pass no gradient to an input
        folded = copy.deepcopy(network).eval().requires_grad_(False)
        for module in list(folded.modules()):
            _fold_batch_norms(module)
        for module in list(folded.modules()):
            if isinstance(module, nn.Sequential) and _is_plain_sequence(module):
                _join(module)  # another forward may read what lies between two layers
        _replace(folded)
        return folded.to(memory_format=torch.channels_last)


def adds_bias(x: Tensor) -> bool:
    """Whether convolutions of x add a bias on their way: oneDNN's do, cuDNN's leave it to a slow pass of PyTorch's."""
    return x.device.type == "cpu"


def is_quick(conv: nn.Conv2d, x: Tensor) -> bool:
    """Whether `frozen_conv.conv3x3` is what convolves x fastest."""
    return _is_plain3x3(conv) and frozen_conv.pays(x, conv.weight)


class QuickConv(nn.Conv2d):
    """A convolution, the kernel library's where that is quicker. Its parameters are those of a convolution.

    With gradient it is PyTorch's: the kernel library's reads its own output on the way back, and what follows may write
    over it, as an activation in place does.
    """

    @classmethod
    def of(cls, conv: nn.Conv2d) -> Self:
        """The same convolution, whose parameters it shares."""
        joined = copy.copy(conv)
        joined.__class__ = cls
        return cast(Self, joined)

    def forward(self, x: Tensor) -> Tensor:
        if not (x.requires_grad and torch.is_grad_enabled()) and is_quick(self, x):
            return frozen_conv.conv3x3(x, self.weight, self.bias, "linear")
        return super().forward(x)


class ConvBiasReLU(QuickConv):
    """A convolution with bias, then ReLU: conv and one pass."""

    def forward(self, x: Tensor) -> Tensor:
        if is_quick(self, x):
            return frozen_conv.conv3x3(x, self.weight, self.bias, "relu")
        if adds_bias(x):
            return F.relu(self._conv_forward(x, self.weight, self.bias), inplace=True)
        return noise_bias_act(self._conv_forward(x, self.weight, None), bias=self.bias, act="relu")


class ChannelAffine(nn.Module):
    """A batch normalisation of fixed statistics: x (N,C,H,W) times and plus a number a channel."""

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.BatchNorm2d) -> None:
        super().__init__()
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var + norm.eps).rsqrt() * (1.0 if norm.weight is None else norm.weight.detach())
        self.register_buffer("scale", scale[None])
        self.register_buffer("shift", (0.0 if norm.bias is None else norm.bias.detach()) - norm.running_mean * scale)

    def forward(self, x: Tensor) -> Tensor:
        return noise_bias_act(x, self.scale.expand(x.shape[0], -1), bias=self.shift, act="linear")


class ResidualBlock(nn.Module):
    """torchvision's BasicBlock or Bottleneck with folded normalisations: ReLU(branch + way round).

    The biases of the last convolution and of the way round are added with the ReLU, in one pass.
    """

    bias: Tensor

    def __init__(self, block: Any) -> None:
        super().__init__()
        block = copy.deepcopy(block)  # layers may be shared, and some lose their biases here
        *inner, self.last = _convolutions(block)
        self.inner = nn.Sequential(*map(ConvBiasReLU.of, inner))
        self.way_round = nn.Identity() if block.downsample is None else block.downsample
        ends = [self.last, *_last_of(block.downsample)]
        self.register_buffer("bias", sum(conv.bias.detach() for conv in ends))
        for conv in ends:
            conv.bias = None

    def forward(self, x: Tensor) -> Tensor:
        last, inner = self.last, self.inner(x)
        if is_quick(last, inner):  # whose backward pass reads its output: no sum in place
            return F.relu(
                frozen_conv.conv3x3(inner, last.weight, self.bias, "linear") + self.way_round(x), inplace=True
            )
        if adds_bias(x):
            return F.relu(last._conv_forward(inner, last.weight, self.bias).add_(self.way_round(x)), inplace=True)
        return noise_bias_act(last(inner).add_(self.way_round(x)), bias=self.bias, act="relu")


class PooledBranch(nn.Module):
    """torchvision's ASPPPooling: layers on the mean of each channel, spread over all positions, channels_last.

    The original enlarges one pixel bilinearly, which is contiguous; its neighbours in the pyramid, and the gradients of
    what they all read, would each be reordered to be joined with it.
    """

    def __init__(self, pooling: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.Sequential(*list(pooling)[1:])

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.permute(0, 2, 3, 1).flatten(1, 2).mean(1)[:, :, None, None]
        spread = self.layers(pooled).expand(-1, -1, *x.shape[2:])
        return spread.contiguous(memory_format=torch.channels_last)


def _children(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Children under every name they have; `named_children` leaves out all but the first."""
    return [(name, child) for name, child in module._modules.items() if child is not None]


def _name(thing: Any) -> str:
    """Of a class or function, with its module's; of another callable anything."""
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', '')}"


def _is_plain_sequence(layers: nn.Sequential) -> bool:
    """Whether its layers are what it computes, one after the other."""
    forward = type(layers).forward
    return forward is nn.Sequential.forward or _name(forward) == f"{_POOLED_BRANCH}.forward"


def _is_plain3x3(conv: nn.Conv2d) -> bool:
    """Whether `frozen_conv.conv3x3` is the same convolution."""
    plain = conv.kernel_size == (3, 3) and conv.stride == conv.padding == conv.dilation == (1, 1) and conv.groups == 1
    return plain and conv.padding_mode == "zeros"


def _has_statistics(norm: nn.Module) -> bool:
    """Whether it is a BatchNorm2d that in evaluation mode does not depend on the batch."""
    return isinstance(norm, nn.BatchNorm2d) and norm.running_mean is not None


def _convolutions(block: Any) -> list[Any]:
    return [conv for name in ("conv1", "conv2", "conv3") if (conv := getattr(block, name, None)) is not None]


def _last_of(way_round: nn.Module | None) -> list[Any]:
    """The layer that a way round ends with, identities apart; none where there is none."""
    return [] if way_round is None else [layer for layer in way_round.children() if type(layer) is not nn.Identity][-1:]


def _has_only_biases(block: Any) -> bool:
    """Whether convolutions with biases, ReLUs and a sum are all that a residual block is."""
    norms = [child for name, child in _children(block) if name.startswith("bn")]
    convs = [*_convolutions(block), *_last_of(block.downsample)]
    return (
        type(block.relu) is nn.ReLU
        and all(type(norm) is nn.Identity for norm in norms)
        and all(type(conv) is nn.Conv2d and conv.bias is not None for conv in convs)
        and (block.downsample is None or type(block.downsample) is nn.Sequential)
    )


def _fold_batch_norms(module: nn.Module) -> None:
    previous: tuple[str, nn.Module] | None = None
    for name, child in _children(module):
        if _has_statistics(child) and previous is not None and isinstance(previous[1], nn.Conv2d):
            norm = cast(nn.BatchNorm2d, child)
            setattr(module, previous[0], fuse_conv_bn_eval(previous[1], norm).requires_grad_(False))
            setattr(module, name, nn.Identity())
        previous = (name, child)


def _replace(network: nn.Module) -> None:
    """Put what is quicker in the place of torchvision's blocks, and then of the convolutions that are left."""
    for quicker in (_quicker_block, _quicker_convolution):  # blocks are known by their plain convolutions
        made: dict[nn.Module, nn.Module | None] = {}  # of a module that stands in several places
        for module in list(network.modules()):
            for name, child in _children(module):
                if child not in made:
                    made[child] = quicker(child)
                if (replacement := made[child]) is not None:
                    setattr(module, name, replacement)


def _quicker_block(block: nn.Module) -> nn.Module | None:
    if _name(type(block)) in _RESIDUAL_BLOCKS and _has_only_biases(block):
        return ResidualBlock(block)
    return PooledBranch(cast(nn.Sequential, block)) if _name(type(block)) == _POOLED_BRANCH else None


def _quicker_convolution(conv: nn.Module) -> nn.Module | None:
    return QuickConv.of(conv) if type(conv) is nn.Conv2d and _is_plain3x3(conv) else None


def _join(layers: nn.Sequential) -> None:
    """Join what stands behind each other in a Sequential, where positions are names: what has gone is an identity."""
    conv: str | None = None
    for name, child in _children(layers):
        if conv is not None and type(child) is nn.ReLU:
            setattr(layers, conv, ConvBiasReLU.of(cast(nn.Conv2d, layers.get_submodule(conv))))
            setattr(layers, name, nn.Identity())
        elif _has_statistics(child):
            setattr(layers, name, ChannelAffine(cast(nn.BatchNorm2d, child)))
        if not isinstance(child, nn.Identity):
            conv = name if type(child) is nn.Conv2d and child.bias is not None else None
