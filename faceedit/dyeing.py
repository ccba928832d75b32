# SPDX-License-Identifier: Apache-2.0
"""Carrying a dye on to hair outside the square that an editor sees: where that hair is, and what colour it gets.

Where: wider squares around the same head are parsed. A parser that learned heads of one size takes clothes there for
hair, so its parses are weighed together, and against how common a pixel's colour is in hair that is known and in all
that is not (naive Bayes); of what they find, only what hangs together with the hair inside counts. What colour: the one
that the editor gave such a colour inside, by a linear map in CIE Lab, fitted robustly.
"""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from faceedit.alignment import Alignment, PhotoRegion
from faceedit.compositing import Composite, border_fade, paste_back
from faceedit.editors.base import EditedFace
from faceedit.labels import CELEBAMASK_HQ
from faceedit.matting import refine_mask
from faceedit.networks.resizing import resize
from faceedit.parsing import FEATURES, FaceParser, FaceRecord, image_tensor, inside_photo

SQUARES = ((1.5, 0.1), (1.9, 0.3))
"""The wider squares: side, and how far the centre lies below the editor's, in sides of the editor's square. Hair hangs
further than it rises. At twice the side the starter parser hardly tells jackets from hair."""

NEAR, LEAST_PX = 1 / 16, 8
"""Hair is looked for outside where the crop shows this much of it so near to its border, in sides of the crop, or twice
as near to the lower one: parses lose long hair on its way there."""

_RASTER_PX = 320  # of the last square, in which hair outside is found and dyed
_LEAST_SAMPLES = 50  # pixels of hair, from which a map between colours can be learned
_HAIR = CELEBAMASK_HQ.id("hair")
_MISTAKEN = [CELEBAMASK_HQ.id(part) for part in ("background", "cloth", "neck", "neck_l")]  # what hair is taken for

_NEVER = [CELEBAMASK_HQ.id(part) for part in (*FEATURES, "eye_g", "ear_r", "hat", "cloth")]
_MISSED_PX, _BESIDE_PX = 8, 25  # of the crop: how far beside its hair a parse misses some, and what that is told from
_SURE_BESIDE = 0.1  # a parse is believed no further there

_SURE_PARSE, _PRIOR = 1e-2, -1.0  # a parse is believed no further; logit, since little outside is hair
_BINS, _LOW, _RANGE = (12, 24, 24), (0, -60, -60), (100, 120, 120)  # of Lab
_RARE_HAIR, _RARE_REST = 1e-4, 4e-4  # added to shares of colours: what was met nowhere is likelier no hair
_TRUST, _MOST = 1.5, 4.0  # in the colours' logarithmic ratio, and how large that counts at most
_OWN_SHARE = 0.02  # of the hair inside that a patch must hold to be the head's own
_SMOOTH_PX, _CONTRAST = 1.2, 2.0

_RIDGE = 4.0  # variance below which a direction of the hair's colours teaches little
_REACH = 1 / 12  # of the editor's side, over which what the map misses at the border fades


def continue_dye(
    done: Composite, pixels: NDArray[np.uint8], face: FaceRecord, edited: EditedFace, parser: FaceParser
) -> Composite:
    """The composite `done` of a photo, uint8 (H,W,3), with the edit's new hair colour carried on to what it left out.

    That is hair beyond the square, or where the edit fades towards its border; nothing is parsed unless hair comes near
    that, inside the photo. And it is hair inside that the parse missed: beside the hair that it shows, where colours
    tell, and where the wider parses show it. What the editor changed in full stays.
    Args: face, the record that was edited, and edited, with that record's own alignment.
    """
    square, hair = face.alignment, _plane(face.mask[:, _HAIR])
    before, after, weight = _samples(edited, hair * border_fade(square.size_px))
    if (weight > 0.5).sum() < _LEAST_SAMPLES:
        return done
    missed = _missed_beside(face)
    found = _outside(face, pixels, missed, parser) if comes_near(hair, square) else None
    raster, old, whole, own = found or (square, _pixels(face.crop), hair + missed, 1 - missed)

    dye = Dye(before, after, weight)
    new = dye(old) + _missed_by_map(after - dye(before), weight, square.resized(before.shape[0]).within(raster))
    new = old + whole[..., None] * (np.clip(new, -1, 1) - old)
    further = paste_back(done.pixels, old, new, raster, whole, detail=_share(done, pixels, raster, whole, own))
    return Composite(further.pixels, done.region.joined(further.region))


def _outside(
    face: FaceRecord, pixels: NDArray[np.uint8], missed: NDArray[np.float32], parser: FaceParser
) -> tuple[Alignment, NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]] | None:
    """A raster that holds the head's hair outside the square, the photo on it (S,S,3), all the hair (S,S), and which
    share of it the editor changed (S,S); None where there is none. missed: hair inside that the parse missed."""
    square, hair = face.alignment, _plane(face.mask[:, _HAIR])
    wide = square.enlarged(*SQUARES[-1], _RASTER_PX)
    within, inside = square.within(wide), inside_photo(wide)
    known = within.unwarp_soft(hair).full()
    seen = within.unwarp_soft(inside_photo(square)).full()
    parsed = _parsed(pixels, square, wide, parser)
    crop = _pixels(image_tensor(wide.warp_image(pixels)))
    likely = inside * _likely_hair(crop, parsed, known * seen, inside * (1 - known * seen))
    further = likely * within.unwarp_soft(_plane(face.mask[:, _MISTAKEN].sum(1))).full()
    further = np.maximum(further, within.unwarp_soft(missed).full())
    own = within.unwarp_soft(border_fade(square.size_px)).full()
    whole = _hanging_together(likely + own * (known + further - likely), known * own)
    return (wide, crop, whole, own * (1 - further)) if ((whole > 0.5) & (own < 0.5)).sum() >= LEAST_PX else None


def _missed_beside(face: FaceRecord) -> NDArray[np.float32]:
    """Hair (S,S) in [0, 1] of the crop that its parse leaves out, close to the hair that it shows: fringes and rims in
    colours that are common in hair, and not in what is beside it."""
    hair = _plane(face.mask[:, _HAIR])
    beside = cv2.dilate((hair > 0.5).astype(np.uint8), np.ones((_BESIDE_PX, _BESIDE_PX), np.uint8))
    parsed = np.clip(hair, _SURE_BESIDE, 1 - _SURE_BESIDE)
    logits = np.log(parsed / (1 - parsed)) - _PRIOR / 2  # beside hair, hair is not so rare
    likely = _likely_hair(_pixels(face.crop), logits, hair, (1 - hair) * beside)
    away = cv2.distanceTransform((hair <= 0.5).astype(np.uint8), cv2.DIST_L2, 5)
    near = np.clip(2 - away / _MISSED_PX, 0, 1)
    other = cv2.dilate(_plane(face.mask[:, _NEVER].sum(1)), np.ones((5, 5), np.uint8))
    return np.asarray(np.clip(likely * near * (1 - other) - hair, 0, 1), dtype=np.float32)


def comes_near(hair: NDArray[Any], square: Alignment) -> bool:
    """Whether hair (S,S) in [0, 1] of a square comes near its border, inside the photo."""
    outer, margin = hair > 0.5, round(NEAR * square.size_px)
    outer[margin : -2 * margin, margin:-margin] = False
    return int(outer.sum()) >= LEAST_PX and int(inside_photo(square)[outer].sum()) >= LEAST_PX


class Dye:
    """What an edit made of hair's colours, learned from an aligned crop, for other pixels of the same hair.

    Args: before, after (S,S,3) in [-1, 1]; weight (S,S) in [0, 1], how surely a pixel shows hair that was changed in
          full; those above 0.5 teach.
    Raises: ValueError when no pixel does, or on shapes.
    """

    def __init__(self, before: NDArray[Any], after: NDArray[Any], weight: NDArray[Any]) -> None:
        if before.shape != after.shape or before.shape != (*weight.shape, 3) or not (weight > 0.5).any():
            raise ValueError(
                "Dye: before, after and weight must be (S, S, 3), (S, S, 3) and (S, S), weight somewhere above 0.5, got"
                f" {before.shape}, {after.shape}, {weight.shape}, at most {weight.max(initial=0):g}; pass crops of hair"
            )
        on = weight > 0.5
        source, sure = _lab(before)[on], np.square(weight[on], dtype=np.float64)[:, None]
        change = _lab(after)[on] - source  # it, and not the colour, is fitted: where nothing changed, nothing will
        self._low, self._high = np.percentile(source, (1, 99), axis=0).astype(np.float32)
        trust = np.ones_like(sure)
        for _ in range(4):  # reweighted: what was parsed as hair and is none follows another map
            share = sure * trust / (sure * trust).sum()
            middle, usual = (share * source).sum(0), (share * change).sum(0)
            spread = (share * (source - middle)).T
            slopes = np.linalg.solve(spread @ (source - middle) + _RIDGE * np.eye(3), spread @ (change - usual))
            off = np.linalg.norm(change - usual - (source - middle) @ slopes, axis=1, keepdims=True)
            trust = 1 / (1 + np.square(off / (2 * np.median(off) + 1e-3)))
        self._slopes, self._constant = slopes.astype(np.float32), (usual - middle @ slopes).astype(np.float32)

    def __call__(self, crop: NDArray[Any]) -> NDArray[np.float32]:
        """A crop (S,S,3) in [-1, 1] as if all of it were such hair, same range."""
        lab = _lab(crop)
        made = lab + np.clip(lab, self._low, self._high) @ self._slopes + self._constant
        return np.clip(cv2.cvtColor(made, cv2.COLOR_LAB2RGB) * 2 - 1, -1, 1).astype(np.float32)


def _parsed(pixels: NDArray[np.uint8], square: Alignment, wide: Alignment, parser: FaceParser) -> NDArray[np.float32]:
    """Logits of hair on the wide raster: the mean of what the squares show there."""
    squares = [square.enlarged(*where, square.size_px) for where in SQUARES]
    crops = torch.cat([image_tensor(one.warp_image(pixels)) for one in squares])
    # Two sizes steady one another better than one and its mirror image do, and cost the same.
    hair = parser.parse_crop(crops, flip_average=False)[:, _HAIR].cpu().numpy()
    total, count = np.zeros((2, wide.size_px, wide.size_px), np.float32)
    for one, plane in zip(squares, hair, strict=True):
        within = one.within(wide)
        weight = within.unwarp_soft(border_fade(one.size_px)).full()
        sure = np.clip(within.unwarp_soft(plane).full(), _SURE_PARSE, 1 - _SURE_PARSE)
        total += weight * np.log(sure / (1 - sure))
        count += weight
    none = np.log(_SURE_PARSE) * np.clip(1 - count, 0, 1)
    return np.asarray(total / np.maximum(count, 1) + none, dtype=np.float32)


def _likely_hair(
    crop: NDArray[np.float32], parsed: NDArray[np.float32], hair: NDArray[np.float32], rest: NDArray[np.float32]
) -> NDArray[np.float32]:
    """How likely a pixel (S,S) is hair, in [0, 1], from its parse and its colour.

    hair and rest: how far a pixel belongs to what is known to be hair, and to all that is not. That holds the hair to
    be found, too, but more clothes and background; a colour rarer in it than in hair speaks for hair.
    """
    bins = ((_lab(crop) - _LOW) / _RANGE * _BINS).astype(np.intp)
    index = np.ravel_multi_index(tuple(np.moveaxis(np.clip(bins, 0, np.array(_BINS) - 1), -1, 0)), _BINS)
    ratio = (_frequency(index, np.square(hair)) + _RARE_HAIR) / (_frequency(index, np.square(rest)) + _RARE_REST)
    told = np.clip(np.log(ratio), -_MOST, _MOST).astype(np.float32)
    logits = cv2.GaussianBlur(parsed + _TRUST * told + _PRIOR, (0, 0), _SMOOTH_PX)
    return np.asarray(1 / (1 + np.exp(-_CONTRAST * logits)), dtype=np.float32)


def _frequency(index: NDArray[np.intp], weight: NDArray[np.float32]) -> NDArray[np.float64]:
    """The share of each pixel's colour in all weighted pixels, smoothed over neighbouring colours."""
    count: NDArray[Any] = np.bincount(index.ravel(), weight.ravel(), int(np.prod(_BINS))).reshape(_BINS)
    for axis in range(3):
        wider = np.pad(count, [(1, 1) if axis == other else (0, 0) for other in range(3)], mode="edge")
        below, middle, above = (np.take(wider, np.arange(k, k + _BINS[axis]), axis) for k in range(3))
        count = (below + 2 * middle + above) / 4
    return np.asarray((count / max(count.sum(), 1e-6)).ravel()[index])


def _hanging_together(soft: NDArray[np.float32], known: NDArray[np.float32]) -> NDArray[np.float32]:
    """Of hair (S,S), the patches that hold enough of the known hair, most of which is the head's: not a neighbour's."""
    count, patches = cv2.connectedComponents((soft > 0.5).astype(np.uint8), connectivity=4)
    held = np.bincount(patches[known > 0.5], minlength=count)
    held[0] = 0
    own = np.isin(patches, np.nonzero(held > _OWN_SHARE * held.sum())[0])
    return np.asarray(soft * cv2.dilate(own.astype(np.uint8), np.ones((5, 5), np.uint8)), dtype=np.float32)


def _samples(
    edited: EditedFace, weight: NDArray[np.float32]
) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.float32]]:
    """The editor's crops (S,S,3), and a weight of the face record's crop at their size (S,S)."""
    before, after = (_pixels(crop) for crop in (edited.before, edited.after))
    return before, after, _plane(resize(torch.from_numpy(weight)[None, None], before.shape[0])[:, 0])


def _missed_by_map(rest: NDArray[Any], weight: NDArray[Any], within: Alignment) -> NDArray[np.float32]:
    """What the map leaves of the editor's colours (S,S,3), spread over the raster to where that is not known: it would
    be a seam. It fades with the distance from hair that was changed in full, which weight (S,S) tells."""
    sure = np.clip((weight - 0.75) / 0.2, 0, 1)
    planes = np.concatenate([rest * sure[..., None], sure[..., None]], -1)
    raster = within.unwarp_image(planes, (0, 0, *within.photo_size)).values
    spread = cv2.GaussianBlur(raster, (0, 0), _REACH * within.size_px / within.scale)
    return np.asarray(spread[..., :3] / (spread[..., 3:] + 0.05), dtype=np.float32)


def _share(
    done: Composite, pixels: NDArray[np.uint8], wide: Alignment, whole: NDArray[Any], own: NDArray[Any]
) -> PhotoRegion:
    """How far each photo pixel is hair that the editor left: `own` (S,S), on the wide raster, is how far it did not."""
    region = wide.unwarp_soft(whole)
    alpha = refine_mask(pixels[region.slices()], region.values)
    left = wide.unwarp_soft(own, region.box).values
    alpha *= np.subtract(1, left, out=left)
    np.minimum(alpha, np.subtract(1, done.region.on(region.box), out=left), out=alpha)
    return PhotoRegion(alpha, region.box, region.photo_size)


def _lab(crop: NDArray[Any]) -> NDArray[np.float32]:
    return np.asarray(cv2.cvtColor(np.clip(crop.astype(np.float32) / 2 + 0.5, 0, 1), cv2.COLOR_RGB2LAB))


def _pixels(crop: Tensor) -> NDArray[np.float32]:
    """1×3×S×S to S×S×3."""
    return _plane(crop.movedim(1, -1))


def _plane(tensor: Tensor) -> NDArray[np.float32]:
    return np.ascontiguousarray(tensor[0].float().cpu().numpy())
