# SPDX-License-Identifier: Apache-2.0
"""The constraints, one value per edit (N): no edit of a batch enters another one's loss.

Images are in [-1, 1] here and in [0, 1] in the paper; the appearance terms are divided by four, so that weights and
values are the published ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from faceedit.kernels import bernoulli_kl, masked_mse, noise_regularizer
from faceedit.maskfacegan.config import MaskFaceGANConfig
from faceedit.maskfacegan.masks import EditMasks, portion, region
from faceedit.maskfacegan.networks import AttributeJudge
from faceedit.maskfacegan.perceptual import Features, masked_lpips
from faceedit.maskfacegan.plan import EditPlan, target_probability

_UNIT_RANGE = 0.25  # squared error of [-1, 1] to that of [0, 1]
_LEAST_SHARE = 1e-6  # of the picture, below which a component's size has no logarithm


def appearance(image: Tensor, source: Tensor, masks: EditMasks) -> Tensor:
    """L_M: mean of clamp(S_skin(I) - S_tar(I_G), 0, 1) · (I_G - I)² over all pixels and channels (paper, eqs. 2, 7)."""
    return _UNIT_RANGE * masked_mse(image, source, masks.appearance, exclude=masks.released)


def shape(probabilities: Tensor, masks: EditMasks) -> Tensor:
    """L_S: mean of (outline - S_shape(I_G))² over the parser's pixels (paper, eqs. 4, 8); 0 for plans without shape."""
    return masked_mse(region(probabilities, masks.shape), masks.outline)


def size(probabilities: Tensor, masks: EditMasks, scales: Tensor) -> Tensor:
    """L_P: KL(α s_tar(I) ‖ s_tar(I_G)) of the component's share of the picture (paper, eq. 6); 0 where α is 0.

    Both shares stand for two-point distributions, as in the semantic term.
    """
    made = torch.logit(portion(probabilities, masks.component), eps=_LEAST_SHARE)
    wanted = (scales * masks.portion).clamp(0, 1)
    return bernoulli_kl(made[:, None], wanted[:, None]) * (scales > 0)


def spread(ws: Tensor) -> Tensor:
    """Mean squared distance of the layers' codes (N,L,W) from their mean: 0 in W, where all layers have one code.

    Not in the paper. e4e's encoder is held near W in this way, by offsets from one code (Tov et al. 2021,
    arXiv:2102.02766).
    """
    return (ws - ws.mean(1, keepdim=True)).square().mean((1, 2))


def noise(maps: Sequence[Tensor], config: MaskFaceGANConfig) -> Tensor:
    """L_R: autocorrelation of neighbours at every scale of every map (paper, eq. 11, squared)."""
    return noise_regularizer(maps, stop=config.noise_stop_px)


@dataclass(frozen=True)
class Semantics:
    """L_C: KL(y ‖ C(I_G)) averaged over an edit's attributes (paper, eq. 3), for edits with attributes of their own.

    judge gives the union's logits (N,A); columns (N,K) picks each edit's, padded with column 0; targets (N,K) are the
    probabilities wanted; shares (N,K) is 1/K_n, 0 in the padding.
    """

    judge: AttributeJudge
    columns: Tensor
    targets: Tensor
    shares: Tensor

    @classmethod
    def of(
        cls, classifier: AttributeJudge, plans: Sequence[EditPlan], source: Tensor, config: MaskFaceGANConfig
    ) -> Semantics:
        """From the plans; what an edit keeps is set to the classifier's decision on its source image (N,3,S,S).

        Raises: UnknownAttributeError for an attribute that the classifier does not know.
        """
        names = list(dict.fromkeys(name for plan in plans for name in plan.attributes))
        judge = classifier.select(names)
        longest = max((len(plan.attributes) for plan in plans), default=0)
        columns = torch.zeros(len(plans), longest, dtype=torch.int64)
        targets, shares = torch.zeros(len(plans), longest), torch.zeros(len(plans), longest)
        with torch.no_grad():
            seen = (judge(source) > 0).tolist() if any(plan.keep for plan in plans) else None
        for row, plan in enumerate(plans):
            for k, name in enumerate(plan.attributes):
                column = names.index(name)
                intensity = plan.values[name] if seen is None or name in plan.values else float(seen[row][column])
                columns[row, k] = column
                targets[row, k] = target_probability(intensity, config.epsilon)
                shares[row, k] = 1 / len(plan.attributes)
        device = source.device
        return cls(judge, columns.to(device), targets.to(device), shares.to(device))

    def __call__(self, image: Tensor) -> Tensor:
        """(N) of images (N,3,S,S)."""
        logits = self.judge(image).gather(1, self.columns)
        each = bernoulli_kl(logits.reshape(-1, 1), self.targets.reshape(-1, 1)).view_as(logits)
        return (each * self.shares).sum(1)


@dataclass(frozen=True)
class Perception:
    """The appearance term of a global edit: masked LPIPS against the source's features, computed once."""

    features: Features
    source: list[Tensor]

    @classmethod
    def of(cls, features: Features, source: Tensor) -> Perception:
        """Against images (N,3,S,S)."""
        with torch.no_grad():
            return cls(features, features(source))

    def __call__(self, image: Tensor, masks: EditMasks) -> Tensor:
        """(N) of images (N,3,S,S)."""
        return masked_lpips(self.features, image, self.source, masks.appearance)
