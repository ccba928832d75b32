# SPDX-License-Identifier: Apache-2.0
"""Reading photos into upright 8-bit sRGB, and writing them back whole or not at all.

Inputs are hostile: sizes are checked from the header before anything is decoded, only the formats below are opened,
and whatever a decoder raises becomes an ImageReadError that names the file.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

from faceedit.atomic import replacing, unusable_name, unusable_target
from faceedit.errors import ImageReadError, ImageTooLargeError, ImageWriteError, UsageError
from faceedit.provenance import exif_value, save_arguments, states_model

Source: TypeAlias = str | os.PathLike[str] | Image.Image | NDArray[np.uint8]

READ_FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF")
LOSSY = frozenset({".jpg", ".jpeg", ".webp"})
"""Suffixes that are written with loss: pixels that an edit left alone are then near the photo's, not equal to them."""
WRITE_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".tif": "TIFF", ".tiff": "TIFF"}

# What a photographer would miss. Left out on purpose: GPS, serial numbers, maker notes, and the embedded thumbnail
# (which would show the photo before the edit).
_KEPT_EXIF = ("ImageDescription", "Make", "Model", "DateTime", "Artist", "Copyright")
_KEPT_EXIF_IFD = (
    "ExposureTime",
    "FNumber",
    "ISOSpeedRatings",
    "DateTimeOriginal",
    "DateTimeDigitized",
    "OffsetTime",
    "OffsetTimeOriginal",
    "FocalLength",
    "FocalLengthIn35mmFilm",
    "Flash",
    "LensModel",
)
_LONGEST_EXIF = 4096  # characters of one field; a JPEG has room for 64 KiB in all
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # TIFF 6.0, section 8, and one of its values
_TAG_IDS = {name: tag for tag, name in ExifTags.TAGS.items()}


@dataclass(frozen=True)
class ImageLimits:
    """What is refused unread: files over max_bytes, images over max_pixels (Pillow itself stops at 179 million)."""

    max_pixels: int = 80_000_000
    max_bytes: int = 256 * 1024 * 1024


@dataclass(frozen=True, eq=False)
class Photo:
    """An upright photo and what its file should keep.

    pixels uint8 (H,W,3) RGB in sRGB; alpha uint8 (H,W) or None; exif bytes with orientation 1 and no GPS, or None;
    icc_profile an sRGB profile when the source was colour-managed, or None; dpi (x, y) or None; name for messages;
    notes one line for each thing that reading changed or left out; has_provenance, whether the file says that a trained
    model made it or part of it.
    """

    pixels: NDArray[np.uint8]
    alpha: NDArray[np.uint8] | None = None
    exif: bytes | None = None
    icc_profile: bytes | None = None
    dpi: tuple[float, float] | None = None
    name: str = "image"
    notes: tuple[str, ...] = ()
    has_provenance: bool = False

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


def read_image(source: Source, limits: ImageLimits | None = None) -> Photo:
    """Read a path, a PIL image or a uint8 array (H,W), (H,W,1), (H,W,3) or (H,W,4) as a Photo.

    EXIF orientation is applied, an embedded ICC profile is converted to sRGB, 16 bits are rounded to 8, CMYK, grey and
    palette become RGB, alpha is split off, and of an animation the first frame is taken.
    Raises: ImageTooLargeError before decoding, ImageReadError for anything missing, empty, truncated or not an image.
    """
    limits = limits or ImageLimits()
    if isinstance(source, np.ndarray):
        return _from_array(source, limits)
    if isinstance(source, Image.Image):
        name = str(getattr(source, "filename", "") or "image")
        with _named_errors(name, limits):
            _check_pixels(source.size, limits, name)
            return _decode(source, name)
    path = Path(source)
    try:
        if path.is_dir():
            raise ImageReadError(f"read_image: source must be a file, got the folder {path}; name one photo in it")
        if not path.is_file() and path.exists():
            raise ImageReadError(f"read_image: source must be an ordinary file, got {path}; copy it to one")
        size = path.stat().st_size
        if size == 0:
            raise ImageReadError(f"read_image: source must be an image, got the empty file {path}; check the copy")
        if size > limits.max_bytes:
            raise ImageTooLargeError(
                f"read_image: source must have at most {limits.max_bytes} bytes, got {size} in {path}; shrink it first"
            )
        with path.open("rb") as file:
            return _read_file(file, str(path), limits)
    except OSError as error:
        raise ImageReadError(
            f"read_image: source must be a readable file, got {path} ({error.strerror or error}); check the path"
        ) from error


def readable_suffixes() -> frozenset[str]:
    """Suffixes of the files that `read_image` can read with the Pillow that is installed, in lower case."""
    Image.init()
    known = {name for name in READ_FORMATS if name in Image.OPEN} | {"MPO"}  # whose first picture is a JPEG
    suffixes = {suffix for suffix, name in Image.registered_extensions().items() if name in known}
    return frozenset(suffixes - {".pfm"})  # floats


def check_writable(path: str | os.PathLike[str]) -> None:
    """Refuse now what write_image could not write to later.

    Raises: UsageError for a suffix of no format; ImageWriteError for a folder, device or permission that forbids it.
    """
    path = Path(path)
    if reason := unusable_name(path):
        raise ImageWriteError(f"write_image: path must be writable, got {path} ({reason}); choose another place")
    if path.suffix.lower() not in WRITE_FORMATS:
        raise UsageError(
            f"write_image: path must end in one of {', '.join(WRITE_FORMATS)}, got {path}; change the suffix"
        )
    if path.is_dir():
        raise ImageWriteError(f"write_image: path must be a file, got the folder {path}; add a file name")
    if reason := unusable_target(path):
        raise ImageWriteError(f"write_image: path must be writable, got {path} ({reason}); choose another place")
    folder = Path(os.path.realpath(path)).parent  # a link is written through
    if not folder.is_dir():
        raise ImageWriteError(f"write_image: path must be in an existing folder, got {path}; create {folder}")
    if not os.access(folder, os.W_OK | os.X_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise ImageWriteError(f"write_image: path must be writable, got {path}; choose another place")


def write_image(
    path: str | os.PathLike[str],
    pixels: NDArray[np.uint8] | Image.Image,
    photo: Photo | None = None,
    provenance: bool = True,
) -> None:
    """Write pixels (H,W,3) uint8 RGB to path, in the format of its suffix (png, jpg, jpeg, webp, tif, tiff).

    The file appears whole or not at all: it is written beside the target under another name, then moved over it. A
    link stays one, a file keeps its permissions, and what is no regular file is refused.
    JPEG is written at quality 95 without chroma subsampling; PNG and TIFF are lossless (TIFF uncompressed, because
    Pillow's libtiff path fails on EXIF). Of `photo` the file keeps alpha (JPEG cannot: transparent parts go white),
    resolution, an sRGB profile if it had one, and the EXIF fields on camera, exposure, date and authorship. GPS
    position, maker notes, serial numbers, thumbnails and old XMP are deliberately not copied. With `provenance`, or
    where the photo's own file says so, an XMP packet says that a trained model made part of the picture.
    Raises: UsageError for another suffix; ImageWriteError when the target cannot be written; ValueError for another
            shape or dtype.
    """
    path = Path(path)
    check_writable(path)
    array = np.asarray(pixels.convert("RGB") if isinstance(pixels, Image.Image) else pixels)
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise ValueError(
            f"write_image: pixels must be uint8 of shape (H, W, 3), got {array.dtype} {array.shape}; convert them first"
        )
    image_format = WRITE_FORMATS[path.suffix.lower()]
    image = Image.fromarray(np.ascontiguousarray(array))
    arguments: dict[str, Any] = {}
    if photo is not None:
        if photo.alpha is not None and photo.alpha.shape == array.shape[:2]:
            image.putalpha(Image.fromarray(photo.alpha))
        if photo.exif is not None:
            arguments["exif"] = photo.exif
        if photo.icc_profile is not None:
            arguments["icc_profile"] = photo.icc_profile
        if photo.dpi is not None and image_format != "WEBP":
            arguments["dpi"] = photo.dpi
    if image_format == "JPEG":
        if image.mode == "RGBA":
            white = Image.new("RGB", image.size, "white")
            white.paste(image, mask=image.getchannel("A"))
            image = white
        arguments |= {"quality": 95, "subsampling": 0}
    elif image_format == "WEBP":
        arguments |= {"quality": 95}
    if provenance or (photo is not None and photo.has_provenance):
        arguments |= save_arguments(image_format, arguments.get("exif"))
    _replace(path, image, image_format, arguments)


def _replace(path: Path, image: Image.Image, image_format: str, arguments: dict[str, Any]) -> None:
    try:
        with replacing(path) as file:
            image.save(file, format=image_format, **arguments)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ImageWriteError(
            f"write_image: path must be writable as {image_format}, got {path} ({reason});"
            " choose another place or format"
        ) from error


def _read_file(file: BinaryIO, name: str, limits: ImageLimits) -> Photo:
    Image.init()
    formats = [known for known in READ_FORMATS if known in Image.OPEN]
    with _named_errors(name, limits), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns about sizes and damaged metadata that are dealt with below
        with Image.open(file, formats=formats) as image:
            _check_pixels(image.size, limits, name)
            return _decode(image, name)


@contextmanager
def _named_errors(name: str, limits: ImageLimits) -> Iterator[None]:
    """Turn whatever a decoder raises into an ImageReadError that names the file."""
    try:
        yield
    except (ImageReadError, MemoryError):  # a machine without memory says nothing about the file
        raise
    except Image.DecompressionBombError as error:
        raise ImageTooLargeError(
            f"read_image: source must have at most {limits.max_pixels} pixels, got {name} ({error}); shrink it first"
        ) from error
    except UnidentifiedImageError as error:
        raise ImageReadError(
            f"read_image: source must be an image ({', '.join(READ_FORMATS)}), got {name}, which is not; check the file"
        ) from error
    except Exception as error:  # decoders meet damaged files with OSError, SyntaxError, struct.error, KeyError, ...
        raise ImageReadError(
            f"read_image: source must be a whole image, got {name} ({_one_line(error)}); get an undamaged copy"
        ) from error


def _check_pixels(size: tuple[int, int], limits: ImageLimits, name: str) -> None:
    width, height = size
    if width * height > limits.max_pixels:
        raise ImageTooLargeError(
            f"read_image: source must have at most {limits.max_pixels} pixels, got {width} x {height} in {name};"
            " shrink it first"
        )
    if width < 1 or height < 1:
        raise ImageReadError(f"read_image: source must have pixels, got {width} x {height} in {name}; check the file")


def _from_array(array: NDArray[Any], limits: ImageLimits) -> Photo:
    grey = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 1)
    if array.dtype != np.uint8 or not (grey or (array.ndim == 3 and array.shape[2] in (3, 4))):
        raise ImageReadError(
            f"read_image: source must be uint8 of shape (H, W, 3), got {array.dtype} {array.shape}; convert it first"
        )
    _check_pixels((array.shape[1], array.shape[0]), limits, "array")
    if grey:
        array = np.repeat(array.reshape(*array.shape[:2], 1), 3, axis=2)
    alpha = np.ascontiguousarray(array[..., 3]) if array.shape[2] == 4 else None
    return Photo(np.array(array[..., :3], order="C"), alpha=alpha, name="array")


def _decode(image: Image.Image, name: str) -> Photo:
    notes: list[str] = []
    # Counting frames would read the whole file. The further images of an MPO are previews of the first.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        notes.append("animated: the first frame is used")
    source_format = image.format
    image.load()  # before the orientation is read: Pillow turns a TIFF upright while it loads it, and only a TIFF
    info = dict(image.info)
    try:
        exif = image.getexif()
        orientation = exif.get(ExifTags.Base.Orientation, 1)
        kept = _kept_exif(exif, notes)
    except Exception:  # damaged metadata is no reason to refuse the picture
        orientation, kept = 1, None
        notes.append("damaged EXIF: ignored")
    image = _to_8_bit(image, source_format, name)
    alpha = None
    if image.has_transparency_data:
        image = image if image.mode in ("RGBA", "LA") else image.convert("RGBA")
        alpha = image.getchannel("A")
        image = image.convert("RGB" if image.mode == "RGBA" else "L")
    rgb, profile = _to_srgb(image, info.get("icc_profile"), notes)
    turn = _TURNS.get(orientation if isinstance(orientation, int) else 1)
    if turn is not None:
        rgb = rgb.transpose(turn)
        alpha = alpha.transpose(turn) if alpha is not None else None
    return Photo(
        pixels=np.array(rgb),
        alpha=np.array(alpha) if alpha is not None else None,
        exif=kept,
        icc_profile=profile,
        dpi=_dpi(info.get("dpi")),
        name=name,
        notes=tuple(notes),
        has_provenance=states_model(info),
    )


# Values of the EXIF orientation tag (EXIF 2.32, 4.6.4) and what turns such an image upright.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _to_8_bit(image: Image.Image, source_format: str | None, name: str) -> Image.Image:
    """Grey images of more than 8 bits to mode L, or LA where one value is transparent; other modes unchanged (Pillow
    has decoded 16-bit colour to 8)."""
    if image.mode != "I" and image.mode != "F" and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image).astype(np.float64)
    if not np.isfinite(values).all() or values.min() < 0 or values.max() > 65535 or image.mode == "F":
        raise ImageReadError(
            f"read_image: source must have 8 or 16 bits a channel, got mode {image.mode} in {name} ({source_format});"
            " export it as 8-bit"
        )
    transparent = image.info.get("transparency")
    opaque = None if not isinstance(transparent, int) else np.where(values == transparent, 0, 255).astype(np.uint8)
    if source_format == "TIFF" and getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        values = 65535 - values  # which Pillow does for 8 bits, and not for 16
    grey = Image.fromarray(np.rint(values / 257.0).astype(np.uint8))
    return grey if opaque is None else Image.merge("LA", (grey, Image.fromarray(opaque)))


def _to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> tuple[Image.Image, bytes | None]:
    """RGB image in sRGB, and the profile to embed when writing (None for a source without one)."""
    if image.mode not in ("RGB", "L", "CMYK"):
        image = image.convert("RGB")
    if not profile:
        return image.convert("RGB"), None
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    try:
        conversion = ImageCms.buildTransform(
            ImageCms.ImageCmsProfile(BytesIO(profile)),
            srgb,
            image.mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if image.mode == "RGB" and _changes_nothing(conversion):
            return image, srgb.tobytes()  # a conversion to itself would only add rounding
        converted = ImageCms.applyTransform(image, conversion)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        notes.append("unusable ICC profile: colours taken as sRGB")
        return image.convert("RGB"), None
    assert converted is not None  # only in-place conversion returns nothing
    return converted, srgb.tobytes()


def _changes_nothing(conversion: ImageCms.ImageCmsTransform) -> bool:
    """Whether an RGB conversion leaves greys, primaries and their mixtures within a level of what they are.

    Only the content tells: profiles that are called "Linear sRGB" are not sRGB, and many that are sRGB are not called
    so. A level is what tabulated curves and rounded matrices of plain sRGB profiles differ by.
    """
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    colours = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(len(levels), -1, 3)
    shown = ImageCms.applyTransform(Image.fromarray(colours), conversion)
    assert shown is not None  # only in-place conversion returns nothing
    return int(np.abs(np.asarray(shown).astype(np.int16) - colours).max()) <= 1


def _kept_exif(exif: Image.Exif, notes: list[str]) -> bytes | None:
    kept = Image.Exif()
    parts = (
        (exif, kept, _KEPT_EXIF),
        (exif.get_ifd(ExifTags.IFD.Exif), kept.get_ifd(ExifTags.IFD.Exif), _KEPT_EXIF_IFD),
    )
    for source, target, names in parts:
        for name in names:
            value = source.get(_TAG_IDS[name])
            if value is None:
                continue
            if isinstance(value, str | bytes) and len(value) > _LONGEST_EXIF:
                notes.append(f"EXIF {name} of {len(value)} characters: left out")
            else:
                target[_TAG_IDS[name]] = exif_value(value)
    if not len(kept) and not target:
        return None
    kept[ExifTags.Base.Orientation] = 1
    return kept.tobytes()


def _dpi(value: Any) -> tuple[float, float] | None:
    try:
        x, y = (float(v) for v in value)
    except (TypeError, ValueError, ZeroDivisionError):
        return None
    # 1 is what Pillow says of a TIFF that states none.
    return (x, y) if all(math.isfinite(v) and 1 < v <= 30000 for v in (x, y)) else None


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text[:160] or type(error).__name__
