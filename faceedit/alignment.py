# SPDX-License-Identifier: Apache-2.0
"""Similarity transforms between a photo and an aligned face crop, and resampling both ways.

Pixel-centre rule, used by every point and matrix here: integer coordinates are pixel *centres*, x then y, so an image
W pixels wide spans x = -0.5 … W - 0.5. Changing resolution by a factor s therefore maps x to (x + 0.5) * s - 0.5.
Sizes are (height, width); boxes are half-open (x0, y0, x1, y1) in whole pixels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from faceedit.errors import FaceError

Array: TypeAlias = NDArray[Any]
Box: TypeAlias = tuple[int, int, int, int]
Framing = Literal["ffhq", "portrait"]
"""What a generator was trained on: FFHQ's square, or the crop that parsing and editing use, 1.25 times as wide."""
FRAMINGS: tuple[Framing, ...] = get_args(Framing)

PORTRAIT_SCALE = 1.25
"""How much larger than FFHQ's square the crop is that parsing and editing use."""

TEMPLATES: dict[str, tuple[int, tuple[tuple[float, float], ...]]] = {
    # name: (square side in px, five points: image-left eye, image-right eye, nose tip, left and right mouth corner).
    # Gu et al. 2019: eyes and mouth are the fall-back centres of the published code; nose and corners are inferred.
    "portrait": (256, ((96.0, 116.0), (160.0, 116.0), (128.0, 150.0), (103.0, 184.0), (153.0, 184.0))),
}


@dataclass(frozen=True, eq=False)
class PhotoRegion:
    """Values on a rectangle of a photo; the rest of the photo is zero.

    values (h,w) or (C,h,w) for box (x0, y0, x1, y1) with h = y1 - y0, w = x1 - x0; photo_size (height, width).
    """

    values: Array
    box: Box
    photo_size: tuple[int, int]

    def full(self) -> Array:
        """The same values on the whole photo, (H,W) or (C,H,W), zero outside the box."""
        x0, y0, x1, y1 = self.box
        whole = np.zeros((*self.values.shape[:-2], *self.photo_size), self.values.dtype)
        whole[..., y0:y1, x0:x1] = self.values
        return whole

    def on(self, box: Box) -> Array:
        """The values (h,w) on another box of the photo, zero where this region has none."""
        out = np.zeros((box[3] - box[1], box[2] - box[0]), self.values.dtype)
        left, top = max(box[0], self.box[0]), max(box[1], self.box[1])
        right, bottom = min(box[2], self.box[2]), min(box[3], self.box[3])
        if left < right and top < bottom:
            out[top - box[1] : bottom - box[1], left - box[0] : right - box[0]] = self.values[
                top - self.box[1] : bottom - self.box[1], left - self.box[0] : right - self.box[0]
            ]
        return out

    def joined(self, other: PhotoRegion) -> PhotoRegion:
        """The sum of two regions (h,w) of a photo, on the smallest box that holds both."""
        (x0, y0), (x1, y1) = np.minimum(self.box[:2], other.box[:2]), np.maximum(self.box[2:], other.box[2:])
        box: Box = (int(x0), int(y0), int(x1), int(y1))
        total = self.on(box)
        total += other.on(box)
        return PhotoRegion(total, box, self.photo_size)

    def slices(self) -> tuple[slice, slice]:
        """Row and column slices of the box, to index the photo."""
        x0, y0, x1, y1 = self.box
        return slice(y0, y1), slice(x0, x1)


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where a square face crop lies in a photo.

    matrix (2,3) float64 takes photo points to crop points; size_px is the crop's side; photo_size is (height, width).
    Images are resampled bicubically, masks bilinearly, labels by nearest neighbour; whichever direction shrinks is
    prefiltered (area average, then Gaussian). Photo pixels beyond the border are mirrored; crop pixels are zero.
    """

    matrix: NDArray[np.float64]
    size_px: int
    photo_size: tuple[int, int]

    def __post_init__(self) -> None:
        matrix = np.array(self.matrix, dtype=np.float64)
        if matrix.shape != (2, 3) or not np.isfinite(matrix).all() or abs(np.linalg.det(matrix[:, :2])) < 1e-12:
            raise FaceError(
                f"Alignment: matrix must be finite, invertible and of shape (2, 3), got {matrix.tolist()};"
                " check the landmarks"
            )
        matrix.setflags(write=False)
        object.__setattr__(self, "matrix", matrix)

    @property
    def inverse(self) -> NDArray[np.float64]:
        """The (2,3) matrix from crop points to photo points."""
        return np.asarray(cv2.invertAffineTransform(self.matrix), dtype=np.float64)

    @property
    def scale(self) -> float:
        """Crop pixels per photo pixel; above 1 the crop magnifies."""
        return float(np.sqrt(abs(np.linalg.det(self.matrix[:, :2]))))

    @property
    def angle_deg(self) -> float:
        """In-plane rotation of the face in the photo, degrees, positive clockwise as seen."""
        return float(np.degrees(np.arctan2(self.inverse[1, 0], self.inverse[0, 0])))

    def to_crop(self, points: ArrayLike) -> NDArray[np.float64]:
        """Photo points (…,2) to crop points."""
        return _transform(self.matrix, points)

    def to_photo(self, points: ArrayLike) -> NDArray[np.float64]:
        """Crop points (…,2) to photo points."""
        return _transform(self.inverse, points)

    def resized(self, size_px: int) -> Alignment:
        """The same square of the photo sampled with another number of pixels."""
        factor = size_px / self.size_px
        resize = np.array([[factor, 0, 0.5 * factor - 0.5], [0, factor, 0.5 * factor - 0.5], [0, 0, 1]])
        return Alignment((resize @ np.vstack([self.matrix, [0, 0, 1]]))[:2], size_px, self.photo_size)

    def enlarged(self, times: float, down: float, size_px: int) -> Alignment:
        """A square `times` as wide, moved down by a share of this one's side, and sampled with size_px pixels."""
        side = self.size_px
        step, middle = times * side / size_px, (side - 1) / 2
        start = middle - step * (size_px - 1) / 2
        larger = np.array([[step, 0, start], [0, step, start + down * side], [0, 0, 1]])
        matrix = np.linalg.inv(larger) @ np.vstack([self.matrix, [0, 0, 1]])
        return Alignment(matrix[:2], size_px, self.photo_size)

    def within(self, other: Alignment) -> Alignment:
        """This crop as one of another crop's raster, in place of the photo."""
        to_photo = np.vstack([other.inverse, [0, 0, 1]])
        return Alignment(self.matrix @ to_photo, self.size_px, (other.size_px, other.size_px))

    def photo_box(self) -> Box:
        """Smallest box of photo pixels that holds the whole crop, clipped to the photo; may be empty."""
        low, high = -0.5, self.size_px - 0.5
        corners = self.to_photo([(low, low), (high, low), (high, high), (low, high)])
        height, width = self.photo_size
        x0, y0 = np.clip(np.floor(corners.min(0)), 0, (width, height)).astype(int)
        x1, y1 = np.clip(np.ceil(corners.max(0)) + 1, (x0, y0), (max(width, x0), max(height, y0))).astype(int)
        return int(x0), int(y0), int(x1), int(y1)

    def in_photo_fraction(self, weights: Array | None = None) -> float:
        """Share of the crop that the photo covers, in [0, 1]; with weights (S,S) >= 0, the share of their sum."""
        steps = np.arange(self.size_px)
        points = self.to_photo(np.stack(np.meshgrid(steps, steps), axis=-1))
        height, width = self.photo_size
        limit = np.array([width - 0.5, height - 0.5])
        inside = ((points >= -0.5) & (points <= limit)).all(-1)
        if weights is None:
            return float(inside.mean())
        total = float(weights.sum())
        return float((weights * inside).sum() / total) if total > 0 else 0.0

    def warp_image(self, pixels: Array) -> Array:
        """Photo (H,W,C) or (H,W), uint8 or float, to the crop (S,S[,C]) in the same dtype."""
        self._check_photo(pixels.shape[:2], "warp_image")
        source = pixels if pixels.dtype == np.uint8 else pixels.astype(np.float32, copy=False)
        crop = _resample(source, self.inverse, (self.size_px, self.size_px), cv2.INTER_CUBIC, "mirror")
        return crop.astype(pixels.dtype, copy=False)

    def warp_labels(self, labels: Array) -> Array:
        """Photo label map (H,W) of any integer dtype to the crop (S,S), nearest neighbour."""
        self._check_photo(labels.shape, "warp_labels")
        steps = np.arange(self.size_px)
        points = np.rint(self.to_photo(np.stack(np.meshgrid(steps, steps), axis=-1))).astype(np.int64)
        height, width = self.photo_size
        return np.asarray(labels[_mirror(points[..., 1], height), _mirror(points[..., 0], width)])

    def warp_soft(self, mask: Array) -> NDArray[np.float32]:
        """Photo mask (H,W) or (C,H,W) in [0, 1] to the crop (S,S) or (C,S,S), float32."""
        self._check_photo(mask.shape[-2:], "warp_soft")
        size = (self.size_px, self.size_px)
        return _per_channel(mask, lambda plane: _resample(plane, self.inverse, size, cv2.INTER_LINEAR, "mirror"))

    def unwarp_image(self, crop: Array, box: Box | None = None) -> PhotoRegion:
        """Crop (S,S,C) float to float32 (h,w,C) on `box` (default: photo_box()); zero beyond the crop.

        Unlike a mask's, these values keep channels last; use them with `slices()`.
        """
        self._check_crop(crop.shape[:2], "unwarp_image")
        box = self.photo_box() if box is None else box
        values = _resample(crop.astype(np.float32, copy=False), *self._into(box), cv2.INTER_CUBIC, "zero")
        return PhotoRegion(values, box, self.photo_size)

    def unwarp_soft(self, mask: Array, box: Box | None = None) -> PhotoRegion:
        """Crop mask (S,S) or (C,S,S) in [0, 1] to float32 on `box` (default: photo_box()); zero beyond the crop."""
        self._check_crop(mask.shape[-2:], "unwarp_soft")
        box = self.photo_box() if box is None else box
        target = self._into(box)
        values = _per_channel(mask, lambda plane: _resample(plane, *target, cv2.INTER_LINEAR, "zero"))
        return PhotoRegion(values, box, self.photo_size)

    def unwarp_classes(self, soft: Array) -> PhotoRegion:
        """Crop soft mask (C,S,S) to the likeliest class of each photo pixel, uint8 on photo_box(); 0 beyond the crop.

        Each class is resampled in turn and compared with the best so far, so boundaries are as smooth as the soft mask
        and memory does not grow with C.
        """
        self._check_crop(soft.shape[-2:], "unwarp_classes")
        box = self.photo_box()
        best = self.unwarp_soft(soft[0], box).values
        classes = np.zeros(best.shape, np.uint8)
        for index in range(1, soft.shape[0]):
            plane = self.unwarp_soft(soft[index], box).values
            wins = plane > best
            classes[wins] = index
            np.maximum(best, plane, out=best)
        return PhotoRegion(classes, box, self.photo_size)

    def _into(self, box: Box) -> tuple[NDArray[np.float64], tuple[int, int]]:
        """Matrix from points of the box's own raster to crop points, and the raster's (height, width)."""
        x0, y0, x1, y1 = box
        matrix = self.matrix.copy()
        matrix[:, 2] += self.matrix[:, :2] @ np.array([x0, y0], dtype=np.float64)
        return matrix, (y1 - y0, x1 - x0)

    def _check_photo(self, size: tuple[int, ...], function: str) -> None:
        if tuple(size) != tuple(self.photo_size):
            raise ValueError(
                f"{function}: array must have the photo's height and width {self.photo_size}, got {tuple(size)};"
                " align the photo that is warped"
            )

    def _check_crop(self, size: tuple[int, ...], function: str) -> None:
        if tuple(size) != (self.size_px, self.size_px):
            raise ValueError(
                f"{function}: array must have the crop's height and width {(self.size_px, self.size_px)},"
                f" got {tuple(size)}; use resized() for another crop size"
            )


def umeyama(source: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """Least-squares similarity transform (2,3) that takes source points (n,2) to target points (n,2).

    Never a reflection. Source: Umeyama 1991, "Least-squares estimation of transformation parameters", eqs. 39-43.
    Raises FaceError when the source points coincide.
    """
    p, q = np.asarray(source, dtype=np.float64), np.asarray(target, dtype=np.float64)
    if p.shape != q.shape or p.ndim != 2 or p.shape[1] != 2 or len(p) < 2:
        raise ValueError(f"umeyama: source and target must both be (n, 2) with n >= 2, got {p.shape} and {q.shape}")
    p_mean, q_mean = p.mean(0), q.mean(0)
    variance = ((p - p_mean) ** 2).sum() / len(p)
    if not np.isfinite(q).all() or not variance > 1e-12:
        raise FaceError("umeyama: source must be finite points that do not all coincide; check the landmarks")
    u, d, vt = np.linalg.svd((q - q_mean).T @ (p - p_mean) / len(p))
    signs = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt)) or 1.0])
    linear = (d * signs).sum() / variance * (u * signs) @ vt
    return np.column_stack([linear, q_mean - linear @ p_mean])


def align_to_template(landmarks: ArrayLike, photo_size: tuple[int, int], name: str, size_px: int) -> Alignment:
    """Alignment that takes five landmarks (5,2) as near as a similarity can to a named template scaled to size_px."""
    side, points = TEMPLATES[name]
    target = (np.array(points) + 0.5) * (size_px / side) - 0.5
    return Alignment(umeyama(_five(landmarks, "align_to_template"), target), size_px, photo_size)


def align_ffhq(landmarks: ArrayLike, photo_size: tuple[int, int], size_px: int, scale: float = 1.0) -> Alignment:
    """FFHQ's crop from the five landmarks (5,2), enlarged `scale` times about its centre.

    The square has half side max(2.0 |eye to eye|, 1.8 |eyes to mouth|), stands upright on the mean of the eye line
    and the mouth axis, and is centred a tenth of the way from eyes to mouth. Source: FFHQ data set tool (Karras et al.
    2019); its points are pixel centres and its square's sides are the crop's outer edges, as here.
    """
    left_eye, right_eye, _, left_mouth, right_mouth = _five(landmarks, "align_ffhq")
    eyes, mouth = (left_eye + right_eye) / 2, (left_mouth + right_mouth) / 2
    eye_to_eye, eye_to_mouth = right_eye - left_eye, mouth - eyes
    across = eye_to_eye - _quarter_turn(eye_to_mouth)
    length = float(np.hypot(*across))
    half = max(2.0 * float(np.hypot(*eye_to_eye)), 1.8 * float(np.hypot(*eye_to_mouth))) * scale
    if length < 1e-6 or half < 1e-6:
        raise FaceError(
            "align_ffhq: landmarks must be an upright eye line and mouth, got points that cancel; check the landmarks"
        )
    return _square(eyes + 0.1 * eye_to_mouth, across / length * half, size_px, photo_size)


def portrait_alignment(
    landmarks: ArrayLike, photo_size: tuple[int, int], size_px: int = 256, scale: float = PORTRAIT_SCALE
) -> Alignment:
    """The framing that parsing and editing use: FFHQ's square enlarged, so that hair and ears are inside."""
    return align_ffhq(landmarks, photo_size, size_px, scale)


def rough_alignment(
    box: tuple[float, float, float, float],
    photo_size: tuple[int, int],
    size_px: int = 256,
    scale: float = PORTRAIT_SCALE,
    angle_deg: float = 0.0,
) -> Alignment:
    """The same framing guessed from a detection box (x, y, w, h) turned by angle_deg about its centre.

    In a frontal-face box of side w the eyes stand about 0.4 w apart and 0.4 w below the top, so that FFHQ's
    square has a side of 1.6 w and its centre lies 0.06 w above the box's. Good for a first parse, never for an edit.
    """
    x, y, w, h = box
    half = 0.8 * float(np.sqrt(w * h)) * scale
    turn = np.radians(angle_deg)
    across = half * np.array([np.cos(turn), np.sin(turn)])
    centre = np.array([x + w / 2, y + h / 2]) - 0.5 - 0.06 * h * np.array([-np.sin(turn), np.cos(turn)])
    return _square(centre, across, size_px, photo_size)


def _square(
    centre: NDArray[np.float64], across: NDArray[np.float64], size_px: int, photo_size: tuple[int, int]
) -> Alignment:
    """Alignment of the square with this centre whose half side, pointing to its right edge, is `across`."""
    axes = np.column_stack([across, _quarter_turn(across)]) * (2.0 / size_px)
    middle = (size_px - 1) / 2
    to_photo = np.column_stack([axes, centre - axes @ np.array([middle, middle])])
    matrix = np.asarray(cv2.invertAffineTransform(to_photo), dtype=np.float64)
    return Alignment(matrix, size_px, (int(photo_size[0]), int(photo_size[1])))


def _five(landmarks: ArrayLike, function: str) -> NDArray[np.float64]:
    points = np.asarray(landmarks, dtype=np.float64)
    if points.shape != (5, 2):
        raise ValueError(f"{function}: landmarks must be of shape (5, 2), got {points.shape}; pass eyes, nose, mouth")
    if not np.isfinite(points).all():
        raise FaceError(f"{function}: landmarks must be finite, got {points.tolist()}; find the face again")
    return points


def _quarter_turn(v: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.array([-v[1], v[0]])


def _transform(matrix: NDArray[np.float64], points: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(points, dtype=np.float64) @ matrix[:, :2].T + matrix[:, 2]


def _per_channel(mask: Array, resample: Any) -> NDArray[np.float32]:
    mask = mask.astype(np.float32, copy=False)
    if mask.ndim == 2:
        return np.asarray(resample(mask))
    return np.stack([resample(plane) for plane in mask])


def _mirror(index: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Indices reflected about the first and last pixel (edge not repeated) into 0 … size - 1."""
    if size == 1:
        return np.zeros_like(index)
    folded = np.abs(index) % (2 * (size - 1))
    return np.minimum(folded, 2 * (size - 1) - folded)


def _window(source: Array, box: Box, border: Literal["mirror", "zero"]) -> Array:
    """The box of an image (H,W[,C]) that may reach beyond its border."""
    x0, y0, x1, y1 = box
    height, width = source.shape[:2]
    if x0 >= 0 and y0 >= 0 and x1 <= width and y1 <= height:
        return source[y0:y1, x0:x1]
    if border == "mirror":
        rows, columns = _mirror(np.arange(y0, y1), height), _mirror(np.arange(x0, x1), width)
        return source.take(rows, axis=0).take(columns, axis=1)
    window = np.zeros((y1 - y0, x1 - x0, *source.shape[2:]), source.dtype)
    left, top, right, bottom = max(x0, 0), max(y0, 0), min(x1, width), min(y1, height)
    if left < right and top < bottom:
        window[top - y0 : bottom - y0, left - x0 : right - x0] = source[top:bottom, left:right]
    return window


def _resample(
    source: Array,
    to_source: NDArray[np.float64],
    size: tuple[int, int],
    interpolation: int,
    border: Literal["mirror", "zero"],
) -> Array:
    """Sample an image (H,W[,C], uint8 or float32) at to_source @ (x, y, 1) for every pixel of a (h,w) raster.

    Only the window of the source that the raster covers is touched, which is what keeps large photos cheap.
    """
    height, width = size
    if height == 0 or width == 0:
        return np.zeros((height, width, *source.shape[2:]), source.dtype)
    step = float(np.sqrt(abs(np.linalg.det(to_source[:, :2]))))  # source pixels per output pixel
    factor = max(int(step + 1e-6), 1)
    corners = _transform(to_source, [(0, 0), (width - 1, 0), (width - 1, height - 1), (0, height - 1)])
    margin = 6 * factor
    x0, y0 = (int(v) for v in np.floor(corners.min(0)) - margin)
    columns, rows = (-(-int(v) // factor) for v in np.ceil(corners.max(0)) + margin + 1 - (x0, y0))
    window = _window(source, (x0, y0, x0 + columns * factor, y0 + rows * factor), border)
    matrix = to_source.copy()
    matrix[:, 2] -= (x0, y0)
    if factor > 1:
        window = cv2.resize(window, (columns, rows), interpolation=cv2.INTER_AREA)
        matrix = matrix / factor
        matrix[:, 2] += 0.5 / factor - 0.5
    rest = step / factor
    if rest > 1.01:
        # Widens a unit sampling kernel to the output's pixel pitch: variances of the two kernels add up.
        window = cv2.GaussianBlur(window, (0, 0), sigmaX=0.5 * float(np.sqrt(rest**2 - 1)))
    flags = interpolation | cv2.WARP_INVERSE_MAP
    return np.asarray(
        cv2.warpAffine(
            np.ascontiguousarray(window), matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE
        )
    )
