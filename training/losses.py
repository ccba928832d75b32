# SPDX-License-Identifier: Apache-2.0
"""Losses of the GAN editors. Reductions are plain means, unless a docstring says otherwise."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_FAINTEST = 0.05  # of an edit, mean over its region
_FAINT = 1e-4, 0.01  # mean squares of a faint edit
_LINE = 20  # a pixel's detail counts fully from a twentieth on
_UNCHANGED = 0.002  # a share of a feature map's mean that is rounding
_TINY = 1e-6


def masked_l1(image: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """mean |mask ⊙ (image − target)| over every element, so a small region weighs little (L_mre, MagGAN eq. 3).

    Args:    image, target N×C×H×W; mask N×1×H×W in [0, 1].
    """
    return (mask * (image - target)).abs().mean()


def region_l1(image: Tensor, target: Tensor, region: Tensor, source: Tensor | None = None) -> Tensor:
    """|image − target| averaged inside each sample's soft region, then over the samples that have one.

    Unlike `masked_l1` a small region (brows) counts as much as a large one (hair). 0 when no sample has a region. With
    `source` each sample's error is a share of |source − target|, what doing nothing would leave (at least 0.05 of the
    range [-1, 1]), so that a faint edit (a wrinkle) counts as much as a strong one (another hair colour).
    """
    area = region.sum(dim=(1, 2, 3))

    def mean_inside(error: Tensor) -> Tensor:
        return (region * error.abs()).mean(dim=1).sum(dim=(1, 2)) / area.clamp_min(_TINY)

    inside = mean_inside(image - target)
    if source is not None:
        inside = inside / mean_inside(source - target).clamp_min(_FAINTEST)
    # Below one pixel a region is the tail of a blurred boundary, and its average would be noise.
    present = (area >= 1).to(inside.dtype)
    return (inside * present).sum() / present.sum().clamp_min(1)


def faint_squared_share(image: Tensor, target: Tensor, source: Tensor, region: Tensor) -> Tensor:
    """(image − target)² inside each sample's soft region as a share of (source − target)², what doing nothing leaves:
    the mean over the samples whose change is there but faint (mean square 1e-4 to 0.01, a wrinkle), 0 without any.

    A thin line whose place is not quite sure is best left out by an absolute error; a square asks for its mean, faint
    and wide, and counts the few pixels of a fold more than the whole skin's slight tint. Strong changes have no say:
    their mean is a blur.

    Args: image, target, source N×C×H×W in [-1, 1]; region N×1×H×W in [0, 1].
    """
    area = region.sum(dim=(1, 2, 3))

    def mean_inside(error: Tensor) -> Tensor:
        return (region * error.square()).mean(dim=1).sum(dim=(1, 2)) / area.clamp_min(_TINY)

    change = mean_inside(source - target)
    faint = ((area >= 1) & (change >= _FAINT[0]) & (change <= _FAINT[1])).to(change.dtype)
    return (faint * mean_inside(image - target) / change.clamp_min(_FAINT[0])).sum() / faint.sum().clamp_min(1)


def detail_share(image: Tensor, target: Tensor, source: Tensor, region: Tensor) -> Tensor:
    """`region_l1` with a source, of what is finer than 5×5 pixels and where the true edit changes that: lines, strands,
    edges. Of an aged face the folds, without the tint of the skin around them; 0 when no sample has any.

    Args: image, target, source N×C×H×W in [-1, 1]; region N×1×H×W in [0, 1].
    """
    made, true, before = (
        x - F.avg_pool2d(x, 5, stride=1, padding=2, count_include_pad=False) for x in (image, target, source)
    )
    change = (before - true).abs().mean(1, keepdim=True)
    moved = region * (change * _LINE).clamp(max=1)
    left = (moved * (made - true).abs().mean(1, keepdim=True)).sum(dim=(1, 2, 3))
    whole = (moved * change).sum(dim=(1, 2, 3))
    present = (moved.sum(dim=(1, 2, 3)) >= 1).to(left.dtype)
    return (present * left / whole.clamp_min(_TINY)).sum() / present.sum().clamp_min(1)


def feature_share(made: Sequence[Tensor], target: Sequence[Tensor], source: Sequence[Tensor]) -> Tensor:
    """|φ(made) − φ(target)| as a share of |φ(source) − φ(target)|, each a mean per map and sample: 1 is doing nothing.

    The mean over maps and over the samples whose features the true edit changes at all.

    Args: one N×C×H×W map a layer, of the three pictures.
    """
    shares = []
    for found, after, before in zip(made, target, source, strict=True):
        change = (before.float() - after.float()).abs().mean(dim=(1, 2, 3))
        error = (found.float() - after.float()).abs().mean(dim=(1, 2, 3))
        present = (change > _UNCHANGED * after.float().abs().mean(dim=(1, 2, 3))).float()
        shares.append((present * error / change.clamp_min(_TINY)).sum() / present.sum().clamp_min(1))
    return torch.stack(shares).mean()


def moved_pixels(source: Tensor, target: Tensor) -> Tensor:
    """Where an edit changes a pixel, N×1×S×S: from 0 at no difference to 1 at a twentieth of the range [-1, 1]."""
    return ((target - source).abs().mean(1, keepdim=True) * 10).clamp(max=1)


def attribute_bce(logits: Tensor, attributes: Tensor, weight: Tensor | None = None) -> Tensor:
    """Binary cross-entropy, mean over attributes and samples (MagGAN eqs. 9 and 10; 10's printed minus is an error).

    Args:    logits, attributes N×A, attributes in [0, 1]; weight N×A or N×1 ≥ 0 leaves out what is unknown.
    Returns: the weighted mean; 0 when every weight is 0.
    """
    if weight is None:
        return F.binary_cross_entropy_with_logits(logits, attributes)
    losses = F.binary_cross_entropy_with_logits(logits, attributes, reduction="none")
    weight = weight.expand_as(losses)
    return (losses * weight).sum() / weight.sum().clamp_min(_TINY)


def wgan_critic_loss(real: Tensor, made: Tensor) -> Tensor:
    """E D(x̂) − E D(x), what the critic minimises (MagGAN eq. 7 without the penalty)."""
    return made.mean() - real.mean()


def wgan_generator_loss(made: Tensor) -> Tensor:
    """−E D(x̂) (MagGAN eq. 8)."""
    return -made.mean()


def gradient_penalty(
    critic: Callable[[Tensor], Tensor], real: Tensor, made: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """E (‖∇D(x_int)‖₂ − 1)², x_int = x + α (x̂ − x), α ~ U(0, 1) per sample (without λ).

    Args:    critic maps N×C×H×W to one value a sample; real, made N×C×H×W; generator draws α on the CPU.
    Returns: scalar, differentiable in the critic's weights; no gradient reaches real or made.
    """
    alpha = torch.rand(real.shape[0], generator=generator).to(real).view(-1, *[1] * (real.ndim - 1))
    between = torch.lerp(real.detach(), made.detach(), alpha).requires_grad_(True)
    (slope,) = torch.autograd.grad(critic(between).sum(), between, create_graph=True)
    return (slope.flatten(1).norm(dim=1) - 1).square().mean()


def logistic_generator_loss(made: Tensor) -> Tensor:
    """E softplus(−D(G(z))), the non-saturating loss (Goodfellow et al. 2014)."""
    return F.softplus(-made).mean()


def logistic_critic_loss(real: Tensor, made: Tensor) -> Tensor:
    """E softplus(D(G(z))) + E softplus(−D(x))."""
    return F.softplus(made).mean() + F.softplus(-real).mean()


def squared_slopes(critic: Callable[[Tensor], Tensor], image: Tensor) -> tuple[Tensor, Tensor]:
    """The critic's logits for images N×C×H×W, and ‖∇D(x)‖² of each, N values: R1 is γ/2 times their mean.

    Both are differentiable in the critic's weights; no gradient reaches the image. Source: Mescheder et al. 2018 (R1).
    """
    seen = image.detach().requires_grad_(True)
    with torch.enable_grad():
        logits = critic(seen)
        (slope,) = torch.autograd.grad(logits.sum(), seen, create_graph=True)
    return logits, slope.square().sum(dim=(1, 2, 3))


def path_lengths(image: Tensor, ws: Tensor, direction: Tensor) -> Tensor:
    """‖Jᵀy‖ of images made from styles, N values: how far an image moves for a step in w (Karras et al. 2020, eq. 4).

    Args:    image N×C×H×W, computed from ws N×L×W; direction y, normal, of the image's shape.
    Returns: lengths, differentiable in the generator's weights: √(mean over layers of ‖∂(image·y)/∂w_l‖² / HW).
    """
    scaled = direction / (image.shape[2] * image.shape[3]) ** 0.5
    (slope,) = torch.autograd.grad((image * scaled).sum(), ws, create_graph=True)
    return slope.square().sum(2).mean(1).sqrt()
