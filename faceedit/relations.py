# SPDX-License-Identifier: Apache-2.0
"""Which facial parts an attribute concerns: MagGAN's AR⁺/AR⁻ and MaskFaceGAN's attribute → region table.

MagGAN (Wei et al. 2020) edits only the parts that an attribute's change may touch. Two 0/1 matrices over attribute ×
part say which: AR⁺ when the attribute is raised, AR⁻ when it is lowered. The authors' own matrices were never
published; the tables below follow the rule that their examples show: *a part is listed when its pixels may have to
change colour or identity*. Raising Bald touches the hair that disappears; lowering it touches what hair would grow
over. Hats, clothes and necklaces are never listed. Tables are kept by part name, so they serve any label scheme that
has those parts.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from faceedit.attributes import MAGGAN, check_attribute
from faceedit.errors import UnknownNameError, UsageError, suggestion
from faceedit.kernels import attribute_maps
from faceedit.labels import CELEBAMASK_HQ, MASKFACEGAN, LabelScheme

_BROWS = "l_brow r_brow"
_EYES = "l_eye r_eye"
_EARS = "l_ear r_ear"
_LIPS = "u_lip l_lip"
_FACE = f"skin {_BROWS} {_EYES} {_EARS} nose mouth {_LIPS} neck hair"

# attribute: (parts touched when it is raised, parts touched when it is lowered).
_PAPER: dict[str, tuple[str, str]] = {
    "Bald": ("hair", f"background skin {_EARS} ear_r"),  # hair becomes skin; hair grows over these
    "Bangs": (f"skin {_BROWS} hair", f"{_BROWS} hair"),  # hair falls over the forehead; bangs become forehead
    "Black_Hair": ("hair", "hair"),
    "Blond_Hair": ("hair", "hair"),
    "Brown_Hair": ("hair", "hair"),
    "Bushy_Eyebrows": (f"skin {_BROWS}", _BROWS),  # brows grow onto skin; brow pixels become skin
    "Eyeglasses": (f"skin {_BROWS} {_EYES} eye_g nose", f"{_BROWS} {_EYES} eye_g nose"),
    "Male": (f"{_FACE} ear_r", _FACE),  # ear-rings may go, none need come
    "Mouth_Slightly_Open": (f"skin mouth {_LIPS}", f"skin mouth {_LIPS}"),  # the chin moves too
    "Mustache": ("skin u_lip", "skin u_lip"),  # facial hair is labelled skin
    "No_Beard": (f"skin {_LIPS} neck", f"skin {_LIPS} neck"),
    "Pale_Skin": ("skin", "skin"),
    "Young": (_FACE, _FACE),
}

# What `natural` adds, for pictures rather than for comparing MRE with the paper.
_NATURAL_ADDS: dict[str, tuple[str, str]] = {
    "Pale_Skin": (f"nose {_EARS} neck", f"nose {_EARS} neck"),  # otherwise the nose keeps its tone
    "Bangs": ("", "skin"),
    "Eyeglasses": (f"hair {_EARS}", f"hair {_EARS} skin"),  # temple arms
    "Male": ("", "background"),  # hair may lengthen
}

# The parts of `natural` that `graded` counts half: a change may grow onto them but does not start there. A condition
# that paints lips and all skin alike does not say where the mouth is.
_MARGINS: dict[str, tuple[str, str]] = {
    "Bald": ("", f"background {_EARS} ear_r"),
    "Bangs": (f"skin {_BROWS}", f"skin {_BROWS}"),
    "Bushy_Eyebrows": ("skin", ""),
    "Eyeglasses": (f"skin nose hair {_EARS}", f"skin nose hair {_EARS} {_BROWS} {_EYES}"),
    "Male": (f"{_EYES} {_EARS} nose mouth neck ear_r", f"{_EYES} {_EARS} nose mouth neck background"),
    "Mouth_Slightly_Open": ("skin", "skin"),
    "Mustache": ("skin", "skin"),
    "No_Beard": (f"{_LIPS} neck", f"{_LIPS} neck"),
    "Pale_Skin": ("", ""),
    "Young": (f"{_BROWS} {_EARS} nose mouth {_LIPS}", f"{_BROWS} {_EARS} nose mouth {_LIPS}"),
}
_MARGIN = 0.5

PRESETS: tuple[str, ...] = ("paper", "natural", "graded")


class Relations(NamedTuple):
    """AR⁺ and AR⁻: float in [0, 1], 13×K each; rows as `attributes.MAGGAN`, columns as a label scheme's ids."""

    plus: Tensor
    minus: Tensor


def related_parts(attribute: str, preset: str = "paper") -> tuple[frozenset[str], frozenset[str]]:
    """CelebAMask-HQ part names that raising and lowering a MagGAN attribute may change.

    Raises UnknownAttributeError, and UnknownNameError for a preset that does not exist.
    """
    check_attribute(attribute, MAGGAN)
    if preset not in PRESETS:
        raise UnknownNameError(
            f"related_parts: preset must be a known preset, got {preset!r}; {suggestion(preset, PRESETS)}"
        )
    more = _NATURAL_ADDS.get(attribute, ("", "")) if preset != "paper" else ("", "")
    raised, lowered = (
        frozenset(f"{parts} {extra}".split()) for parts, extra in zip(_PAPER[attribute], more, strict=True)
    )
    return raised, lowered


def relation_matrices(scheme: LabelScheme = CELEBAMASK_HQ, preset: str = "paper") -> Relations:
    """AR⁺ and AR⁻ with columns in the order of `scheme`, a fresh fp32 pair on the CPU.

    "graded" is "natural" with 0.5 for the parts that a change only grows onto; the others hold 0 and 1.

    Args:    scheme, one that has the 19 CelebAMask-HQ parts, in any order; preset, one of PRESETS.
    Raises:  UsageError for a scheme without those parts, UnknownNameError for an unknown preset.
    """
    if set(scheme.classes) != set(CELEBAMASK_HQ.classes):
        raise UsageError(
            f"relation_matrices: scheme must have the {CELEBAMASK_HQ.num_classes} parts of {CELEBAMASK_HQ.name}, "
            f"got {scheme.name}; convert the mask first"
        )
    matrices = torch.zeros(2, len(MAGGAN), scheme.num_classes, device="cpu")
    for row, attribute in enumerate(MAGGAN):
        for sign, parts in enumerate(related_parts(attribute, preset)):
            matrices[sign, row, [scheme.id(part) for part in parts]] = 1
            margin = _MARGINS.get(attribute, ("", ""))[sign].split() if preset == "graded" else []
            matrices[sign, row, [scheme.id(part) for part in margin]] = _MARGIN
    return Relations(matrices[0], matrices[1])


@cache
def _default_relations() -> Relations:
    return relation_matrices()


def _relations_like(relations: Relations | None, mask: Tensor) -> Relations:
    plus, minus = relations if relations is not None else _default_relations()
    return Relations(plus.to(mask), minus.to(mask))


def _check_pair(function: str, attribute_difference: Tensor, mask: Tensor, relations: Relations) -> None:
    rows, parts = relations.plus.shape
    if attribute_difference.ndim != 2 or attribute_difference.shape[1] != rows:
        raise ValueError(
            f"{function}: attribute_difference must be (N,{rows}), got {tuple(attribute_difference.shape)}; "
            "one column for each MagGAN attribute"
        )
    if mask.ndim != 4 or mask.shape[1] != parts or mask.shape[0] != attribute_difference.shape[0]:
        raise ValueError(
            f"{function}: mask must be ({attribute_difference.shape[0]},{parts},H,W), got {tuple(mask.shape)}; "
            "pass one soft mask a sample in the scheme of the relations"
        )


def _related(attribute_difference: Tensor, relations: Relations) -> Tensor:
    """N×13×K: the row of AR⁺ where the attribute rises, of AR⁻ where it falls, zeros where it stays."""
    difference = attribute_difference.to(relations.plus).unsqueeze(-1)
    return (difference > 0).to(difference) * relations.plus + (difference < 0).to(difference) * relations.minus


def _dilate(region: Tensor, dilate_px: int) -> Tensor:
    if dilate_px < 0:
        raise ValueError(
            f"influence_mask: dilate_px must be 0 or more, got {dilate_px}; use 0 to leave regions as they are"
        )
    return F.max_pool2d(region, 2 * dilate_px + 1, stride=1, padding=dilate_px) if dilate_px else region


def influence_mask(
    attribute_difference: Tensor, mask: Tensor, relations: Relations | None = None, *, dilate_px: int = 0
) -> Tensor:
    """Where the asked attributes may change the image: Σ_p mask_p · min(1, Σ_i AR_{i,p}).

    Args:    attribute_difference (N,13), only its signs count; mask (N,K,H,W) soft, summing to 1 over K; relations as
             `relation_matrices` gives them (default: paper, CelebAMask-HQ order); dilate_px, its growth.
    Returns: (N,1,H,W) in [0, 1], dtype of mask; exactly 0 where no attribute changes. Differentiable in mask.
    Raises:  ValueError on shapes.
    Source:  MagGAN eqs. (2), (4), (5); the sum runs over the 19 parts.
    """
    relations = _relations_like(relations, mask)
    _check_pair("influence_mask", attribute_difference, mask, relations)
    # A part that counts half may change as much as any: the rows become 0/1, and the maximum is min(1, sum).
    parts = (_related(attribute_difference, relations) > 0).amax(dim=1).to(mask)
    region = torch.einsum("nk,nkhw->nhw", parts, mask).unsqueeze(1).clamp(0, 1)
    return _dilate(region, dilate_px)


def preserve_mask(
    attribute_difference: Tensor, mask: Tensor, relations: Relations | None = None, *, dilate_px: int = 0
) -> Tensor:
    """M(att_diff, x) of MagGAN eqs. (4)-(5): one minus `influence_mask`, exactly 1 where no attribute changes."""
    return 1 - influence_mask(attribute_difference, mask, relations, dilate_px=dilate_px)


def mask_guided_conditioning(
    attribute_difference: Tensor, mask: Tensor, relations: Relations | None = None, *, dilate_px: int = 0
) -> Tensor:
    """MagGAN's spatial condition: each attribute's difference, painted on the parts it concerns.

    out[n,i,h,w] = difference[n,i] · Σ_p mask[n,p,h,w] · AR^{sign(difference)}_{i,p}

    Args:    as `influence_mask`; here the size of the difference counts, it is the intensity.
    Returns: (N,13,H,W), dtype of mask. With all-ones matrices it equals the vector tiled over the image.
    Raises:  ValueError on shapes.
    Source:  MagGAN eq. (12). Area-averaging the mask first and conditioning after gives the same, the map being linear.
    """
    relations = _relations_like(relations, mask)
    _check_pair("mask_guided_conditioning", attribute_difference, mask, relations)
    related, intensity = _related(attribute_difference, relations), attribute_difference.to(mask)
    if dilate_px == 0:
        return attribute_maps(intensity, mask, related)
    regions = torch.einsum("nak,nkhw->nahw", related, mask)
    return _dilate(regions, dilate_px) * intensity[:, :, None, None]


@dataclass(frozen=True)
class RegionRule:
    """How MaskFaceGAN confines one attribute.

    Args: target, classes of the MaskFaceGAN scheme that are edited; appearance, classes that join target in the
          appearance, blending and shape masks; shape_weight, λ_S of the target-shape term; is_dynamic, whether the
          masks follow the edit; updates_shape, whether the shape mask follows too; is_global, an attribute of the
          whole face.
    """

    target: tuple[str, ...]
    appearance: tuple[str, ...] = ()
    shape_weight: float = 0.0
    is_dynamic: bool = True
    updates_shape: bool = False
    is_global: bool = False


_HAIR_COLOUR = RegionRule(("hair",), shape_weight=0.5)
_HAIR_SHAPE = RegionRule(("hair",), appearance=("ears",), shape_weight=0.5, updates_shape=True)
_GLOBAL = RegionRule(
    ("mouth", "eyebrows", "eyes", "hair", "nose", "ears"),
    appearance=tuple(name for name in MASKFACEGAN.classes if name != "background"),
    is_dynamic=False,
    is_global=True,
)

MASKFACEGAN_REGIONS: Mapping[str, RegionRule] = MappingProxyType(
    {
        **{name: RegionRule(("mouth",)) for name in ("Wearing_Lipstick", "Mouth_Slightly_Open", "Smiling", "Big_Lips")},
        **{name: RegionRule(("eyebrows",)) for name in ("Bushy_Eyebrows", "Arched_Eyebrows")},
        "Narrow_Eyes": RegionRule(("eyes",)),
        **{name: RegionRule(("nose",)) for name in ("Pointy_Nose", "Big_Nose")},
        **dict.fromkeys(("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair"), _HAIR_COLOUR),
        **dict.fromkeys(("Wavy_Hair", "Straight_Hair"), _HAIR_SHAPE),
    }
)
"""Rules of the 14 local attributes and of Big_Lips, which the released code maps to the mouth as well."""


def maskfacegan_region(attribute: str) -> RegionRule:
    """The rule of a CelebA attribute: its own when it is local, that of the whole face for any other.

    Raises UnknownAttributeError.
    """
    return MASKFACEGAN_REGIONS.get(check_attribute(attribute), _GLOBAL)
