# SPDX-License-Identifier: Apache-2.0
"""Label schemes as values: class names, colours, conversions and left/right swaps.

Four published schemes (Lee et al. 2020 in two id orders, Smith et al. 2013, Pernus et al. 2023). A label map is int64
`N×H×W`, a soft mask float `N×C×H×W` summing to 1 over C; the scheme they follow travels beside them, a `LabelScheme`.

Left and right are anatomical in CelebAMask-HQ (the person's left eye lies in the right half of the image) and those of
the image in Helen. Helen's classes are therefore named `image_left_eye` and so on, and the conversion crosses over.
Some names mislead: `l_lip` is the *lower* lip, `neck_l` a neck*lace*, `ear_r` an ea*r*-*r*ing.
"""

from dataclasses import dataclass
from functools import cache
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from faceedit.errors import OutOfRangeError, UnknownNameError, UsageError, suggestion

Colour = tuple[int, int, int]
LabelMap = TypeVar("LabelMap", Tensor, np.ndarray)


@dataclass(frozen=True)
class LabelScheme:
    """The classes of a face parse, in id order.

    Args: name as `scheme()` finds it; classes, index = id; palette, one RGB colour a class in 0..255; mirrored, the
          pairs of classes that change places when the image is flipped.
    """

    name: str
    classes: tuple[str, ...]
    palette: tuple[Colour, ...]
    mirrored: tuple[tuple[str, str], ...]

    @property
    def num_classes(self) -> int:
        """How many classes there are; ids are 0..num_classes-1."""
        return len(self.classes)

    @property
    def flip_permutation(self) -> tuple[int, ...]:
        """`permutation[id]` is the id that class takes in the horizontally flipped image; its own inverse."""
        order = list(range(self.num_classes))
        for left, right in self.mirrored:
            order[self.id(left)], order[self.id(right)] = self.id(right), self.id(left)
        return tuple(order)

    def id(self, name: str) -> int:
        """The id of a class name. Raises UnknownNameError that lists the closest names."""
        try:
            return self.classes.index(name)
        except ValueError:
            raise UnknownNameError(
                f"LabelScheme.id: name must be a class of {self.name}, got {name!r}; {suggestion(name, self.classes)}"
            ) from None

    def colorize(self, labels: Tensor | np.ndarray) -> np.ndarray:
        """Colours of a label map (…,H,W) as uint8 RGB (…,H,W,3). Raises OutOfRangeError for an id the scheme lacks."""
        ids = _as_array(labels)
        _check_ids("colorize", ids, self)
        return np.asarray(self.palette, dtype=np.uint8)[ids.astype(np.int64)]

    def png_palette(self) -> list[int]:
        """The palette of an indexed PNG: 256 RGB triples in one flat list, black beyond the scheme's classes."""
        flat = [channel for colour in self.palette for channel in colour]
        return flat + [0] * (768 - len(flat))


# Colours of CelebAMask-HQ's own visualisation, by class name. The other schemes show a part in the colour
# that it has here, so that one legend serves every overlay.
_COLOURS: dict[str, Colour] = {
    "background": (0, 0, 0),
    "skin": (204, 0, 0),
    "nose": (76, 153, 0),
    "eye_g": (204, 204, 0),
    "l_eye": (51, 51, 255),
    "r_eye": (204, 0, 204),
    "l_brow": (0, 255, 255),
    "r_brow": (51, 255, 255),
    "l_ear": (102, 51, 0),
    "r_ear": (255, 0, 0),
    "mouth": (102, 204, 0),
    "u_lip": (255, 255, 0),
    "l_lip": (0, 0, 153),
    "hair": (0, 0, 204),
    "hat": (255, 51, 153),
    "ear_r": (0, 204, 204),
    "neck_l": (0, 51, 0),
    "neck": (255, 153, 51),
    "cloth": (0, 204, 0),
}
_ANATOMICAL_PAIRS = (("l_eye", "r_eye"), ("l_brow", "r_brow"), ("l_ear", "r_ear"))

CELEBAMASK_HQ = LabelScheme("celebamask-hq", tuple(_COLOURS), tuple(_COLOURS.values()), _ANATOMICAL_PAIRS)
"""CelebAMask-HQ, 19 classes in MaskGAN's order: the library's default."""

# zllrunning/face-parsing.PyTorch: the same nineteen parts under other ids.
_ZLL_ORDER = (0, 1, 6, 7, 4, 5, 3, 8, 9, 15, 2, 10, 11, 12, 17, 16, 18, 13, 14)
_ZLL_CLASSES = tuple(CELEBAMASK_HQ.classes[index] for index in _ZLL_ORDER)
CELEBAMASK_HQ_ZLL = LabelScheme(
    "celebamask-hq-zll", _ZLL_CLASSES, tuple(_COLOURS[part] for part in _ZLL_CLASSES), _ANATOMICAL_PAIRS
)
"""CelebAMask-HQ, the same 19 classes in the order of the public BiSeNet parser."""

# Helen class -> the CelebAMask-HQ class it is: image left is the person's right.
_HELEN_PARTS = {
    "background": "background",
    "skin": "skin",
    "image_left_brow": "r_brow",
    "image_right_brow": "l_brow",
    "image_left_eye": "r_eye",
    "image_right_eye": "l_eye",
    "nose": "nose",
    "u_lip": "u_lip",
    "mouth": "mouth",
    "l_lip": "l_lip",
    "hair": "hair",
}
HELEN = LabelScheme(
    "helen",
    tuple(_HELEN_PARTS),
    tuple(_COLOURS[part] for part in _HELEN_PARTS.values()),
    (("image_left_brow", "image_right_brow"), ("image_left_eye", "image_right_eye")),
)
"""Helen (Smith et al. 2013), 11 classes; left and right are those of the image."""

# MaskFaceGAN class -> the CelebAMask-HQ classes it joins (the first one lends its colour).
_MASKFACEGAN_PARTS = {
    "background": ("background", "hat"),
    "mouth": ("mouth", "u_lip", "l_lip"),
    "eyebrows": ("l_brow", "r_brow"),
    "eyes": ("l_eye", "r_eye"),
    "hair": ("hair",),
    "nose": ("nose",),
    "skin": ("skin", "eye_g"),
    "ears": ("l_ear", "r_ear", "ear_r"),
    "belowface": ("neck", "neck_l", "cloth"),
}
MASKFACEGAN = LabelScheme(
    "maskfacegan",
    tuple(_MASKFACEGAN_PARTS),
    tuple(_COLOURS[parts[0]] for parts in _MASKFACEGAN_PARTS.values()),
    (),
)
"""MaskFaceGAN's parser, 9 classes; left and right are joined, so nothing converts back from it."""

SCHEMES: tuple[LabelScheme, ...] = (CELEBAMASK_HQ, CELEBAMASK_HQ_ZLL, HELEN, MASKFACEGAN)


def scheme(name: str) -> LabelScheme:
    """The scheme of that name. Raises UnknownNameError that lists the closest names."""
    for candidate in SCHEMES:
        if candidate.name == name:
            return candidate
    names = [candidate.name for candidate in SCHEMES]
    raise UnknownNameError(f"scheme: name must be a known label scheme, got {name!r}; {suggestion(name, names)}")


@cache
def conversion_table(src: LabelScheme, dst: LabelScheme) -> tuple[int, ...]:
    """`table[id in src]` is the id in dst.

    Classes that the target lacks go to what lies around them: for Helen, glasses and ears become skin, and
    hat, ear-rings, neck, necklace and clothes background. Raises UsageError when src joins parts that dst tells apart.
    """
    if src == dst:
        return tuple(range(src.num_classes))
    if src == MASKFACEGAN:
        raise UsageError(
            f"conversion_table: src must tell left from right and lip from mouth to become {dst.name}, got {src.name}; "
            f"parse with a {CELEBAMASK_HQ.name} parser instead"
        )
    parts = [_HELEN_PARTS[label] for label in src.classes] if src == HELEN else list(src.classes)
    return tuple(dst.id(_class_of_part(part, dst)) for part in parts)


def convert_labels(labels: LabelMap, src: LabelScheme, dst: LabelScheme) -> LabelMap:
    """A label map of any shape in another scheme; tensor or array, dtype kept.

    Raises: OutOfRangeError for an id that src lacks (checked on the CPU only: on a GPU it would synchronise);
            UsageError when the conversion is not defined.
    """
    return _map_ids("convert_labels", labels, src, conversion_table(src, dst))


def convert_soft(mask: Tensor, src: LabelScheme, dst: LabelScheme) -> Tensor:
    """A soft mask (…,C,H,W) of src as one of dst: probabilities of joined classes add up, so the sum over C stays.

    Differentiable. Raises ValueError when C is not src's class count, UsageError when the conversion is not defined.
    """
    _check_channels("convert_soft", mask, src)
    table = conversion_table(src, dst)
    # Views and sums: an index would be copied to the device at every call, which a CUDA graph cannot capture.
    channels = mask.unbind(-3)
    joined: list[list[Tensor]] = [[] for _ in range(dst.num_classes)]
    for channel, target in zip(channels, table, strict=True):
        joined[target].append(channel)
    nothing = torch.zeros_like(channels[0])
    return torch.stack([sum(parts[1:], parts[0]) if parts else nothing for parts in joined], -3)


def flip_labels(labels: LabelMap, scheme: LabelScheme = CELEBAMASK_HQ) -> LabelMap:
    """The label map (…,H,W) of the horizontally flipped image: mirrored, and left and right classes exchanged."""
    flipped = torch.flip(labels, dims=(-1,)) if isinstance(labels, Tensor) else np.ascontiguousarray(labels[..., ::-1])
    return _map_ids("flip_labels", flipped, scheme, scheme.flip_permutation)


def flip_soft(mask: Tensor, scheme: LabelScheme = CELEBAMASK_HQ) -> Tensor:
    """The soft mask (…,C,H,W) of the horizontally flipped image: mirrored, and left and right channels exchanged."""
    _check_channels("flip_soft", mask, scheme)
    return torch.flip(mask, dims=(-1,))[..., list(scheme.flip_permutation), :, :]


def _class_of_part(part: str, dst: LabelScheme) -> str:
    """The class of dst that a CelebAMask-HQ part falls into."""
    if dst == MASKFACEGAN:
        return next(label for label, joined in _MASKFACEGAN_PARTS.items() if part in joined)
    if dst == HELEN:
        if part in ("eye_g", "l_ear", "r_ear"):
            return "skin"
        return next((label for label, same in _HELEN_PARTS.items() if same == part), "background")
    return part


def _map_ids(function: str, labels: LabelMap, src: LabelScheme, table: tuple[int, ...]) -> LabelMap:
    if isinstance(labels, Tensor):
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            raise TypeError(
                f"{function}: labels must be of an integer type, got {labels.dtype}; take the arg-max of a soft mask"
            )
        if labels.device.type == "cpu":
            _check_ids(function, labels.numpy(), src)
        return torch.tensor(table, dtype=labels.dtype, device=labels.device)[labels.long()]
    ids = _as_array(labels)
    if not np.issubdtype(ids.dtype, np.integer):
        raise TypeError(
            f"{function}: labels must be of an integer type, got {ids.dtype}; take the arg-max of a soft mask"
        )
    _check_ids(function, ids, src)
    return np.asarray(table, dtype=ids.dtype)[ids.astype(np.int64)]


def _as_array(labels: Tensor | np.ndarray) -> np.ndarray:
    return labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)


def _check_ids(function: str, ids: np.ndarray, src: LabelScheme) -> None:
    if ids.size and (int(ids.min()) < 0 or int(ids.max()) >= src.num_classes):
        raise OutOfRangeError(
            f"{function}: labels must be ids of {src.name} in 0..{src.num_classes - 1}, "
            f"got {int(ids.min())}..{int(ids.max())}; name the scheme that the mask was written in"
        )


def _check_channels(function: str, mask: Tensor, src: LabelScheme) -> None:
    if mask.ndim < 3 or mask.shape[-3] != src.num_classes:
        raise ValueError(
            f"{function}: mask must be (…,{src.num_classes},H,W) for {src.name}, got {tuple(mask.shape)}; "
            "name the scheme that the mask was made in"
        )
