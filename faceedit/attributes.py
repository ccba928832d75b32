# SPDX-License-Identifier: Apache-2.0
"""Attribute names: CelebA's 40, the lists that the systems edit, and which attributes exclude each other."""

from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from faceedit.errors import UnknownAttributeError, UsageError, suggestion


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CELEBA: tuple[str, ...] = _words(
    """5_o_Clock_Shadow Arched_Eyebrows Attractive Bags_Under_Eyes Bald Bangs Big_Lips Big_Nose Black_Hair Blond_Hair
    Blurry Brown_Hair Bushy_Eyebrows Chubby Double_Chin Eyeglasses Goatee Gray_Hair Heavy_Makeup High_Cheekbones
    Male Mouth_Slightly_Open Mustache Narrow_Eyes No_Beard Oval_Face Pale_Skin Pointy_Nose Receding_Hairline Rosy_Cheeks
    Sideburns Smiling Straight_Hair Wavy_Hair Wearing_Earrings Wearing_Hat Wearing_Lipstick Wearing_Necklace
    Wearing_Necktie Young"""
)
"""CelebA's 40 attributes; index = column of `list_attr_celeba.txt` (whose −1/1 become 0/1)."""

MAGGAN: tuple[str, ...] = _words(
    """Bald Bangs Black_Hair Blond_Hair Brown_Hair Bushy_Eyebrows Eyeglasses Male Mouth_Slightly_Open Mustache No_Beard
    Pale_Skin Young"""
)
"""The 13 attributes of MagGAN and STGAN, in their order."""

MASKFACEGAN_LOCAL: tuple[str, ...] = _words(
    """Wearing_Lipstick Mouth_Slightly_Open Smiling Bushy_Eyebrows Arched_Eyebrows Narrow_Eyes Pointy_Nose Big_Nose
    Black_Hair Brown_Hair Blond_Hair Gray_Hair Wavy_Hair Straight_Hair"""
)
"""MaskFaceGAN's 14 attributes that belong to one region of the face."""

MASKFACEGAN_GLOBAL: tuple[str, ...] = ("Male", "Young", "Pale_Skin")
"""MaskFaceGAN's 3 attributes of the whole face."""

_BY_LOWER_CASE = {name.lower(): name for name in CELEBA}
CLASSIFIER_ORDER: tuple[str, ...] = tuple(
    _BY_LOWER_CASE[name]
    for name in _words(
        """blurry sideburns wearing_earrings bald goatee mustache 5_o_clock_shadow arched_eyebrows no_beard
    heavy_makeup male wearing_lipstick black_hair high_cheekbones smiling mouth_slightly_open oval_face bushy_eyebrows
    attractive young gray_hair brown_hair blond_hair pale_skin chubby double_chin big_nose bags_under_eyes
    wearing_necklace wearing_necktie rosy_cheeks bangs wavy_hair straight_hair wearing_hat big_lips narrow_eyes
    pointy_nose receding_hairline eyeglasses"""
    )
)
"""CelebA's 40 in the order of the heads of MaskFaceGAN's classifier (its released code; there in lower case)."""

_HAIR_COLOURS = ("Black_Hair", "Blond_Hair", "Brown_Hair", "Gray_Hair")
_CLEARED_BY: dict[str, tuple[str, ...]] = {
    "Bald": ("Bangs",),
    "Receding_Hairline": ("Bangs",),
    "Bangs": ("Bald", "Receding_Hairline"),
    "Straight_Hair": ("Wavy_Hair",),
    "Wavy_Hair": ("Straight_Hair",),
    **{colour: tuple(other for other in _HAIR_COLOURS if other != colour) for colour in _HAIR_COLOURS},
}


def check_attribute(name: str, allowed: Iterable[str] = CELEBA) -> str:
    """`name` when it is allowed. Raises UnknownAttributeError that lists the closest allowed names."""
    names = tuple(allowed)
    if name not in names:
        raise UnknownAttributeError(
            f"check_attribute: name must be a known attribute, got {name!r}; {suggestion(name, names)}"
        )
    return name


def attribute_index(name: str, names: Sequence[str] = CELEBA) -> int:
    """Position of an attribute in a list of names. Raises UnknownAttributeError that lists the closest ones."""
    return names.index(check_attribute(name, names))


def conflicting(name: str) -> tuple[str, ...]:
    """The attributes that have to be 0 once `name` is set to 1 (STGAN's rule).

    Mustache and No_Beard are deliberately not among them.
    """
    return _CLEARED_BY.get(check_attribute(name), ())


def resolve_conflicts(attributes: Tensor, raised: str, names: Sequence[str] = MAGGAN) -> Tensor:
    """Target attributes after `raised` was set to 1: a copy with that column 1 and the conflicting columns 0.

    Args:    attributes (…,A), values in [0, 1], columns as in names; raised, one of names.
    Raises:  UnknownAttributeError; ValueError when A is not len(names).
    """
    if attributes.shape[-1] != len(names):
        raise ValueError(
            f"resolve_conflicts: attributes must be (…,{len(names)}), got {tuple(attributes.shape)}; "
            "pass the names of its columns"
        )
    target = attributes.clone()
    target[..., attribute_index(raised, names)] = 1
    for name in conflicting(raised):
        if name in names:
            target[..., names.index(name)] = 0
    return target


def complete_request(request: Mapping[str, float], allowed: Sequence[str] = MAGGAN) -> dict[str, float]:
    """A request with what follows from it: every attribute raised above one half clears the ones it conflicts with.

    What the request names itself stays as it asks. Raises UnknownAttributeError for a name that is not allowed,
    UsageError when two attributes are raised together that exclude each other.
    """
    completed = {check_attribute(name, allowed): float(value) for name, value in request.items()}
    raised = [name for name, value in completed.items() if value > 0.5]
    for name in raised:
        for other in conflicting(name):
            if other in raised:
                raise UsageError(
                    f"complete_request: attributes must not exclude each other, got {name} and {other}; "
                    "ask for one of them"
                )
            if other in allowed:
                completed.setdefault(other, 0.0)
    return completed
