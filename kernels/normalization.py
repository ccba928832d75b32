# SPDX-License-Identifier: Apache-2.0
"""`norm_modulate` under the names papers give its cases."""

from torch import Tensor

from faceedit.kernels.norm_modulate import norm_modulate


def instance_norm_act(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    act: str = "lrelu",
    slope: float = 0.2,
) -> Tensor:
    """Instance norm, its affine parameters and an activation: act(instance_norm(x) * weight + bias).

    Args:   x (N,C,H,W); weight, bias (C) as nn.InstanceNorm2d(affine=True) keeps them, or None.
    Differs from F.instance_norm: a plane of one pixel is no error, it normalises to 0.
    The rest is `norm_modulate`'s.
    """
    return norm_modulate(x, weight, bias, one_plus=False, eps=eps, act=act, slope=slope)


def adain(
    x: Tensor,
    scale: Tensor,
    shift: Tensor,
    *,
    one_plus: bool = False,
    eps: float = 1e-5,
    act: str = "linear",
    slope: float = 0.2,
) -> Tensor:
    """Adaptive instance norm: act(instance_norm(x) * scale + shift) with one scale and shift a sample and channel.

    Args:   x (N,C,H,W); scale, shift (N,C): a style's deviations and means, or what a layer predicts from a code;
            one_plus for layers that predict scale - 1.
    The rest is `norm_modulate`'s. Source: Huang and Belongie 2017, eq. 8.
    """
    return norm_modulate(x, scale, shift, one_plus=one_plus, eps=eps, act=act, slope=slope)


def sft(
    x: Tensor, gamma: Tensor, beta: Tensor, *, one_plus: bool = True, act: str = "linear", slope: float = 0.2
) -> Tensor:
    """Spatial feature transform, without a norm: act(x * (1 + gamma) + beta), gamma and beta maps.

    Args:   x (N,C,H,W); gamma, beta of x's shape, or (N,1,H,W); one_plus=False scales by gamma itself, as the paper's
            formula reads (its layers, and most since, scale by 1 + gamma).
    The rest is `norm_modulate`'s. Source: Wang et al. 2018 (SFT-GAN), eq. 4.
    """
    return norm_modulate(x, gamma, beta, norm="none", one_plus=one_plus, act=act, slope=slope)


def spade(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    mean: Tensor | None = None,
    rstd: Tensor | None = None,
    eps: float = 1e-5,
    act: str = "linear",
    slope: float = 0.2,
) -> Tensor:
    """Spatially adaptive denormalisation: act(norm(x) * (1 + gamma) + beta), gamma and beta maps.

    Args:   x (N,C,H,W); gamma, beta of x's shape, or (N,1,H,W). mean, rstd (C): batch norm, of this batch in training
            (they receive gradients) or running ones in evaluation; None: instance norm.
    The rest is `norm_modulate`'s. Source: Park et al. 2019, eq. 1.
    """
    norm = "instance" if mean is None and rstd is None else "given"
    return norm_modulate(x, gamma, beta, norm=norm, mean=mean, rstd=rstd, eps=eps, act=act, slope=slope)
