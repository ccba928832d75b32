# SPDX-License-Identifier: Apache-2.0
"""From a photo to parsed, aligned faces: detection proposals, then the parser's own masks decide.

    detect → rough crop → parse → landmarks from the mask → align → parse again → verify

A cascade is fast but imprecise, so its boxes only frame a first parse. Landmarks read off that parse give the
alignment, and a face counts only when the second, aligned parse shows a plausible one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from faceedit.alignment import Alignment, Framing, align_ffhq, portrait_alignment, rough_alignment
from faceedit.detection import FaceBox, FaceSearch, Proposals
from faceedit.devices import resolve_device
from faceedit.errors import FaceCutOffError, FaceError, FaceTooSmallError, NoFaceError, OutOfRangeError, WeightsError
from faceedit.labels import CELEBAMASK_HQ, flip_soft
from faceedit.landmarks import landmarks_from_mask
from faceedit.networks.folding import for_inference

CROP_PX = 256
"""Side of the aligned crop that is parsed and edited."""

MIN_EYE_DISTANCE_PX = 8.0
"""Eyes nearer than this in the photo leave brows and lids less than two pixels; nothing useful can be parsed."""

MIN_SURENESS = 0.75
"""Least mean probability of the winning class where it is a brow, an eye, the nose or the mouth. With the starter
parser portraits lie between 0.82 and 0.91, a cat's face at 0.71, a retina scan at 0.49."""

MIN_VISIBLE = 0.85
"""Least share of the middle of the face that must lie inside the photo."""

_MOST_EYE_DISTANCES = 3.5  # side of a face's box; in 126 portraits it was 2.4 to 3.4
_CLEARLY_LARGER = 1.25  # tilted heads before upright faces; a face is itself boxed this much larger when turned

# Brows to lower lip and cheek to cheek, as shares of the aligned crop: (top, bottom), (left, right).
_FACE_MIDDLE = ((0.40, 0.78), (0.30, 0.70))

FEATURES = ("nose", "l_eye", "r_eye", "l_brow", "r_brow", "mouth", "u_lip", "l_lip")
FACE_PARTS = ("skin", "eye_g", *FEATURES)


@dataclass(frozen=True, slots=True, eq=False)
class FaceRecord:
    """One face of a photo, aligned and parsed.

    box:        the detection that led here, photo pixels.
    landmarks:  (5,2) float64, photo pixels: image-left eye, image-right eye, nose tip, left and right mouth corner.
    alignment:  photo -> 256×256 crop (FFHQ's square enlarged 1.25 times).
    crop:       1×3×256×256 in [-1, 1].
    mask:       1×19×256×256 in [0, 1], sum 1 over classes, CelebAMask-HQ scheme.
    pixels:     the photo itself, uint8 H×W×3, for editors that need more than the crop; None when it is not at hand.
    """

    box: FaceBox
    landmarks: NDArray[np.float64]
    alignment: Alignment
    crop: Tensor
    mask: Tensor
    pixels: NDArray[np.uint8] | None = None

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The crop's label map, uint8 256×256."""
        return label_map(self.mask)

    def framed(self, framing: Framing, size_px: int) -> Alignment:
        """Where the face lies in another framing or at another size: photo -> size_px × size_px crop."""
        if framing == "portrait":
            return self.alignment.resized(size_px)
        return align_ffhq(self.landmarks, self.alignment.photo_size, size_px)

    def photo_labels(self) -> NDArray[np.uint8]:
        """The label map at the photo's own size, uint8 H×W; 0 outside the crop. The masks move, not the arg-max."""
        return self.alignment.unwarp_classes(self.mask[0].cpu().numpy()).full()


@dataclass(frozen=True, slots=True, eq=False)
class AlignedFace:
    """A face whose landmarks are known and whose crop is still to be parsed."""

    box: FaceBox
    landmarks: NDArray[np.float64]
    alignment: Alignment


def image_tensor(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 H×W×3 to float32 1×3×H×W in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float().div(127.5).sub(1.0)


def label_map(mask: Tensor) -> NDArray[np.uint8]:
    """The most likely class a pixel: soft mask 1×C×S×S to uint8 S×S."""
    # On a CPU a quarter of the time of argmax; of equal ones both take the first.
    return np.asarray(mask[0].max(0).indices.to(torch.uint8).cpu())


class FaceParser:
    """A parsing network with the steps around it.

    Args: network maps N×3×256×256 in [-1, 1] to logits N×19×256×256; weights is its name for reports; flip_average
          also parses the mirrored crop and averages (costs one more forward, steadies boundaries and left/right);
          detect proposes boxes for a photo H×W×3.
    """

    def __init__(
        self,
        network: nn.Module,
        weights: str = "custom",
        flip_average: bool = True,
        detect: Callable[[NDArray[np.uint8]], Proposals] = FaceSearch,
    ) -> None:
        self.network = network.eval()
        self.weights = weights
        self.flip_average = flip_average
        self.detect = detect
        self.device = next((p.device for p in network.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def parse_crop(self, crop: Tensor, flip_average: bool | None = None) -> Tensor:
        """Soft mask N×19×S×S of crops N×3×S×S in [-1, 1], on the crop's device; flip_average, unless None, in place of
        the parser's own."""
        images = crop.to(self.device)
        if not (self.flip_average if flip_average is None else flip_average):
            return self.network(images).float().softmax(1).to(crop.device)
        both = self.network(torch.cat([images, images.flip(-1)])).float().softmax(1)
        direct, mirrored = both.chunk(2)
        return ((direct + flip_soft(mirrored, CELEBAMASK_HQ)) / 2).to(crop.device)

    def find_face(self, pixels: NDArray[np.uint8], index: int = 0) -> FaceRecord:
        """Face number `index` of a photo H×W×3: 0 is the largest, 1 the next (`face_size`).

        Raises: OutOfRangeError for a negative index; NoFaceError, FaceTooSmallError or FaceCutOffError.
        """
        return self.parse(pixels, self.find(pixels, index))

    def find(self, pixels: NDArray[np.uint8], index: int = 0) -> AlignedFace:
        """Locate and align face number `index`; the same errors as `find_face`."""
        if index < 0:
            raise OutOfRangeError(f"find_face: face must be 0 or more, got {index}; 0 is the largest face")
        refusals: list[FaceError] = []
        count = 0
        for face in self._faces(pixels, refusals):
            if count == index:
                return face
            count += 1
        if count:
            raise NoFaceError(
                f"find_face: face must be below the number of faces, {count}, got {index}; 0 is the largest"
            )
        # The most specific refusal explains more than "no face": a face was there, but too small or cut off.
        for reason in refusals:
            if not isinstance(reason, NoFaceError):
                raise reason
        raise NoFaceError(
            "find_face: photo must show a frontal face, got none; use a photo where eyes and mouth are visible"
        )

    def _faces(self, pixels: NDArray[np.uint8], refusals: list[FaceError]) -> Iterator[AlignedFace]:
        """The faces of a photo, largest first; what was no face leaves its reason in `refusals`.

        Looking at a box costs two parses, and a search for tilted heads as much again. So the first face is given out
        when no larger box of the usual search, and no confident one of a clearly larger tilted head, is left; whoever
        wants a further one waits for the whole search. Guesses for a portrait come where no box was a face.
        """
        search = self.detect(pixels)
        boxes = list(search.first())
        found: list[AlignedFace] = []
        waiting: list[AlignedFace] = []  # of those found, the ones that are still to be given out
        self._look(pixels, boxes, found, waiting, refusals)
        if waiting:
            boxes += search.larger(_CLEARLY_LARGER * max(map(face_size, waiting)))
            self._look(pixels, boxes, found, waiting, refusals)
            yield _take_largest(waiting)
        boxes += search.rest()
        self._look(pixels, boxes, found, waiting, refusals)
        while waiting:
            yield _take_largest(waiting)
            self._look(pixels, boxes, found, waiting, refusals)
        if not found:
            for guess in portrait_guesses((pixels.shape[0], pixels.shape[1])):
                self._look(pixels, [guess], found, waiting, refusals)
                if waiting:
                    yield waiting.pop()

    def _look(
        self,
        pixels: NDArray[np.uint8],
        boxes: list[FaceBox],
        found: list[AlignedFace],
        waiting: list[AlignedFace],
        refusals: list[FaceError],
    ) -> None:
        """Take boxes off the list and look at them until none is left that is larger than all faces that wait."""
        while True:
            least = max(map(face_size, waiting), default=0.0)
            box = next((box for box in boxes if box.side > least), None)
            if box is None:
                return
            boxes.remove(box)
            try:
                face = self._align(pixels, box)
            except FaceError as refusal:
                refusals.append(refusal)
                continue
            if not any(_same_face(face, other) for other in found):
                found.append(face)
                waiting.append(face)

    def parse(self, pixels: NDArray[np.uint8], face: AlignedFace) -> FaceRecord:
        """Parse an aligned face. Raises NoFaceError when it shows none, FaceCutOffError when much of it is outside."""
        middle = np.zeros((CROP_PX, CROP_PX), np.float32)
        rows, columns = (slice(round(low * CROP_PX), round(high * CROP_PX)) for low, high in _FACE_MIDDLE)
        middle[rows, columns] = 1
        visible = face.alignment.in_photo_fraction(middle)
        if visible < MIN_VISIBLE:
            raise FaceCutOffError(
                f"find_face: face must lie inside the photo, got {visible:.0%} of it; use a photo that shows it whole"
            )
        crop, mask = self._parse_photo(pixels, face.alignment)
        check_plausible(mask)
        return FaceRecord(face.box, face.landmarks, face.alignment, crop, mask, pixels)

    def _parse_photo(self, pixels: NDArray[np.uint8], alignment: Alignment) -> tuple[Tensor, Tensor]:
        """Crop and soft mask of one square. Beyond its border the photo is mirrored, and parsed as background."""
        crop = image_tensor(alignment.warp_image(pixels))
        mask = self.parse_crop(crop)
        inside = torch.from_numpy(inside_photo(alignment))
        mask = mask * inside
        mask[:, :1] += 1 - inside
        return crop, mask

    def _align(self, pixels: NDArray[np.uint8], box: FaceBox) -> AlignedFace:
        size: tuple[int, int] = (pixels.shape[0], pixels.shape[1])
        if box.landmarks is not None:
            alignment = portrait_alignment(box.landmarks, size, CROP_PX)
        else:
            alignment = rough_alignment((box.x, box.y, box.w, box.h), size, CROP_PX, angle_deg=box.angle_deg)
        landmarks: NDArray[np.float64] | None = None
        for _ in range(2):
            _, mask = self._parse_photo(pixels, alignment)
            check_plausible(mask)
            points = landmarks_from_mask(mask[0])
            if points is None:
                raise NoFaceError("find_face: proposal must show eyes, nose and mouth, got none; it is no face")
            landmarks = alignment.to_photo(np.asarray(points))
            alignment = portrait_alignment(landmarks, size, CROP_PX)
        assert landmarks is not None
        if feature_sureness(mask) < MIN_SURENESS:
            raise NoFaceError(
                "find_face: proposal must parse as a face, got a doubtful one; use a sharper, frontal photo"
            )
        distance = float(np.linalg.norm(landmarks[1] - landmarks[0]))
        if distance < MIN_EYE_DISTANCE_PX:
            raise FaceTooSmallError(
                f"find_face: eyes must be {MIN_EYE_DISTANCE_PX:g} px apart, got {distance:.1f}; use a larger photo"
            )
        height, width = size
        if ((landmarks < -0.5) | (landmarks > np.array([width, height]) - 0.5)).any():
            raise FaceCutOffError(
                "find_face: eyes, nose and mouth must lie inside the photo, got some outside; use the whole photo"
            )
        return AlignedFace(box, landmarks, alignment)


def inside_photo(alignment: Alignment) -> NDArray[np.float32]:
    """1 where a crop pixel's centre lies in the photo, else 0; float32 S×S."""
    columns = np.arange(alignment.size_px)
    inside = np.ones((alignment.size_px, alignment.size_px), bool)
    # Axis by axis, by broadcasting: an array of points takes 16 times as long.
    for (by_column, by_row, offset), size in zip(alignment.inverse, reversed(alignment.photo_size), strict=True):
        position = by_column * columns + (by_row * columns + offset)[:, None]
        inside &= (position >= -0.5) & (position <= size - 0.5)
    return inside.astype(np.float32)


def portrait_guesses(photo_size: tuple[int, int]) -> Iterator[FaceBox]:
    """Boxes that suppose what portraits have in common: one face near the middle, a little above the centre."""
    height, width = photo_size
    for share in (0.5, 0.36, 0.7):
        side = share * min(height, width)
        for centre in (0.45, 0.35):
            yield FaceBox(width / 2 - side / 2, centre * height - side / 2, side, side, 0.0)


def face_probability(mask: Tensor) -> Tensor:
    """Probability of belonging to the face itself (no hair, ears, neck): N×C×H×W to H×W of the first sample."""
    return mask[0, [CELEBAMASK_HQ.id(part) for part in FACE_PARTS]].sum(0)


def feature_sureness(mask: Tensor) -> float:
    """Mean probability of the winning class over the pixels of a soft mask 1×19×S×S that show a brow, an eye, the nose
    or the mouth; 0 where there are none. What only resembles a face has its features in doubtful patches."""
    probability, label = mask[0].max(0)
    features = torch.tensor([CELEBAMASK_HQ.id(part) for part in FEATURES], device=mask.device)
    shown = torch.isin(label, features)
    return float(probability[shown].mean()) if shown.any() else 0.0


def check_plausible(mask: Tensor) -> None:
    """Raise NoFaceError unless the soft mask 1×19×S×S has enough skin, some eyes, and a nose or a mouth.

    Not both: a moustache or a blurred, closed mouth can leave the parse without lips.
    """
    share: dict[str, float] = dict(zip(CELEBAMASK_HQ.classes, mask[0].mean((1, 2)).tolist(), strict=True))
    face = float(face_probability(mask).mean())
    eyes = share["l_eye"] + share["r_eye"] + share["eye_g"]
    middle = share["nose"] + share["mouth"] + share["u_lip"] + share["l_lip"]
    if face < 0.06 or eyes < 5e-4 or middle < 2e-3:
        raise NoFaceError(
            "find_face: proposal must look like a face, got too little skin, eyes, nose or mouth; it is no face"
        )


def face_size(face: AlignedFace) -> float:
    """What faces are numbered by, photo pixels: the side of the box that led to it, unless that reaches far beyond."""
    return min(face.box.side, _MOST_EYE_DISTANCES * float(np.linalg.norm(face.landmarks[1] - face.landmarks[0])))


def _take_largest(faces: list[AlignedFace]) -> AlignedFace:
    return faces.pop(max(range(len(faces)), key=lambda i: face_size(faces[i])))


def _same_face(face: AlignedFace, other: AlignedFace) -> bool:
    """Two proposals that lead to the same landmarks: eye centres nearer than half an eye distance."""
    centre, other_centre = face.landmarks[:2].mean(0), other.landmarks[:2].mean(0)
    reach = 0.5 * float(np.linalg.norm(other.landmarks[1] - other.landmarks[0]))
    return float(np.linalg.norm(centre - other_centre)) < max(reach, 1.0)


@lru_cache(maxsize=4)
def load_parser(device: str = "cpu", weights: str = "parser-starter") -> FaceParser:
    """The parser with registry weights on a device; loaded once a process.

    Raises: WeightsError, also for a parser of other classes than CelebAMask-HQ's; DeviceError.
    """
    from faceedit.registry import load_network

    network: Any = load_network(weights, resolve_device(device), kind="parser")
    classes, named = network.config.num_classes, network.header.label_scheme
    if classes != CELEBAMASK_HQ.num_classes or named not in ("", CELEBAMASK_HQ.name):
        raise WeightsError(
            f"load_parser: weights must label the {CELEBAMASK_HQ.num_classes} classes of {CELEBAMASK_HQ.name}, got "
            f"{classes}{named and f' of {named}'} in {weights}; use a parser of that label scheme"
        )
    return FaceParser(for_inference(network), weights)
