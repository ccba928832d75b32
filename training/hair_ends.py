# SPDX-License-Identifier: Apache-2.0
"""Where long hair ends on photos, which nobody has said: a teacher that lost the ends is not believed there, and hair
that is painted further down shows what they look like."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.training.degradation import smooth_field

_MOUTH = 0.62  # its row in an aligned crop, as a share of the side; short hair ends above it
_EARS = 0.5  # where one side's hair may have ended, if the other's reaches the mouth
_STRAND = 0.12  # of the side: this much of the hair above is repeated, there and back


def long_hair(hair: Tensor) -> Tensor:
    """Which of N×S×S (booleans) reach below the mouth, N booleans: a hundredth of that part of the picture at least."""
    size = hair.shape[-1]
    return hair[:, round(_MOUTH * size) :].float().mean((1, 2)) > 0.01


def below_long_hair(hair: Tensor) -> Tensor:
    """Where `long_hair`, booleans N×S×S, has ended: further down in the columns in which it reaches half of the height,
    or an eighth of the side beside them."""
    size = hair.shape[-1]
    low = (hair & long_hair(hair)[:, None, None]).float()
    low[:, : round(_EARS * size)] = 0
    reach = size // 8
    return F.max_pool1d(low.cummax(1).values, 2 * reach + 1, stride=1, padding=reach) > 0


def could_be_hair(image: Tensor, hair: Tensor) -> Tensor:
    """Where pixels of N×3×S×S in [-1, 1] have a colour that hair, booleans N×S×S of the same pictures, has too: within
    two and a half deviations (of at least 0.08) of its mean in every channel; nowhere without hair. N×S×S."""
    weight = hair[:, None].to(image)
    area = weight.sum((2, 3), keepdim=True)
    mean = (image * weight).sum((2, 3), keepdim=True) / area.clamp(min=1)
    spread = (((image - mean).square() * weight).sum((2, 3), keepdim=True) / area.clamp(min=1)).sqrt().clamp(min=0.08)
    return ((image - mean).abs() < 2.5 * spread).all(1) & (area[:, 0] > 0)


def lengthen(image: Tensor, hair: Tensor, room: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Let `long_hair` run on over what lies below it: strands of the hair above, repeated there and
    back, spread outwards and waved at random, of random length with a ragged end, a little darker further down.

    Args:    image N×3×S×S in [0, 1]; hair and room booleans N×S×S, where hair is and where more may lie; generator, of
             the CPU.
    Returns: the images, and where hair was added, N×S×S.
    """
    count, size = len(image), image.shape[-1]
    place = image.device

    def each(low: float, high: float) -> Tensor:
        return (low + (high - low) * torch.rand(count, generator=generator)).to(place).view(-1, 1, 1)

    rows = torch.arange(size, device=place).view(1, -1, 1)
    columns = torch.arange(size, device=place).view(1, 1, -1)
    ends = (hair * rows).amax(1)  # N×S, the last row of hair in each column
    ragged = smooth_field(count, 12, size, generator, 1, place)[:, 0, size // 2]
    length = each(0.06, 0.42).view(-1, 1) * size * (1 + 0.5 * ragged)
    depth = ((rows / size - _EARS) / (1 - _EARS)).clamp(min=0)
    middle = (size - 1) / 2
    wave = each(0, 0.03) * size * torch.sin(2 * math.pi * (each(0.5, 2.5) * rows / size + each(0, 1)))
    strand = middle + (columns - middle) / (1 + each(0, 0.7) * depth) + wave * depth  # the column it comes from
    strand = strand.round().clamp(0, size - 1).long()
    start, far = (values[:, None].expand(-1, size, -1).gather(2, strand) for values in (ends, length))
    below = rows - start
    added = (start >= _EARS * size) & long_hair(hair)[:, None, None] & (below > 0) & (below <= far) & room
    turn = max(2, round(_STRAND * size))
    back = turn - (torch.remainder(below, 2 * turn) - turn).abs()  # 0 at the end of the hair, up to `turn`, and back
    row = (start - 2 - back).clamp(0, size - 1)
    at = (row * size + strand).flatten(1)
    added &= hair.flatten(1).gather(1, at).view_as(hair)
    colour = image.flatten(2).gather(2, at[:, None].expand(-1, 3, -1)).view_as(image)
    colour = colour * (1 - each(0, 0.35) * (below / far.clamp(min=1)).clamp(0, 1))[:, None]
    soft = F.avg_pool2d(F.pad(added[:, None].float(), (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return image + soft * (colour - image), added
