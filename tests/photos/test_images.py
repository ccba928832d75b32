# SPDX-License-Identifier: Apache-2.0
"""Every kind of photo that users have, every kind of file that is none, and writing whole or not at all."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ExifTags, GifImagePlugin, Image, ImageCms, TiffImagePlugin
from skimage import data

from faceedit.errors import ImageReadError, ImageTooLargeError, ImageWriteError, UsageError
from faceedit.images import WRITE_FORMATS, ImageLimits, Photo, check_writable, read_image, write_image

ASTRONAUT = data.astronaut()
GRADIENT = np.stack(np.meshgrid(np.arange(0, 256, 4), np.arange(0, 240, 5)), -1).astype(np.uint8)
RGB = np.dstack([GRADIENT, 255 - GRADIENT[..., :1]])


def png_header(width: int, height: int, colour_type: int = 2) -> bytes:
    """A PNG that claims to be huge and whose pixel data is a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(30_000, 30_000), (10_000, 10_000), (9_000, 9_000)])
def test_oversized_png_is_refused_from_its_header(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(*size))
    with pytest.raises(ImageTooLargeError, match="80000000 pixels") as caught:
        read_image(path)
    assert str(path) in str(caught.value)


def test_refusal_comes_before_decoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decode(self: Image.Image) -> None:
        raise AssertionError("decoded")

    path = tmp_path / "big.png"
    path.write_bytes(png_header(9_000, 9_000))
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", decode)
    with pytest.raises(ImageTooLargeError):
        read_image(path)


@pytest.mark.filterwarnings("error")
def test_refusal_prints_no_warning(tmp_path: Path) -> None:
    path = tmp_path / "big.png"
    path.write_bytes(png_header(10_000, 10_000))  # between Pillow's warning and its error
    with pytest.raises(ImageTooLargeError):
        read_image(path)


def test_limits_are_adjustable_and_apply_to_every_source(tmp_path: Path) -> None:
    limits = ImageLimits(max_pixels=100)
    path = tmp_path / "a.png"
    Image.fromarray(RGB).save(path)
    for source in (path, Image.fromarray(RGB), RGB):
        with pytest.raises(ImageTooLargeError, match="at most 100 pixels"):
            read_image(source, limits)
    with pytest.raises(ImageTooLargeError, match="at most 50 bytes"):
        read_image(path, ImageLimits(max_bytes=50))


def truncated(image_format: str) -> bytes:
    from io import BytesIO

    buffer = BytesIO()
    Image.fromarray(ASTRONAUT).save(buffer, format=image_format)
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


BAD_FILES = {
    "text.jpg": b"this is a letter, not a photo\n" * 10,
    "empty.jpg": b"",
    "cut.jpg": truncated("JPEG"),
    "cut.png": truncated("PNG"),
    "cut.webp": truncated("WEBP"),
    "cut.tiff": truncated("TIFF"),
    "magic.jpg": b"\xff\xd8\xff\xe0",
    "zeros.png": b"\0" * 4096,
    "page.png": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "program.jpg": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_whole_image_is_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    with pytest.raises(ImageReadError) as caught:
        read_image(path)
    message = str(caught.value)
    assert message.startswith("read_image: source must be")
    assert str(path) in message
    assert "\n" not in message
    assert caught.value.exit_code == 1


def test_missing_files_folders_and_pipes_are_named(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "none.jpg", tmp_path, tmp_path / "pipe.jpg", tmp_path / "none" / "deeper.jpg"):
        with pytest.raises(ImageReadError, match="read_image") as caught:
            read_image(path)
        assert str(path) in str(caught.value)


def test_a_truncated_pil_image_is_refused_too(tmp_path: Path) -> None:
    path = tmp_path / "cut.jpg"
    path.write_bytes(BAD_FILES["cut.jpg"])
    with Image.open(path) as image, pytest.raises(ImageReadError, match=r"cut\.jpg"):
        read_image(image)


@pytest.mark.parametrize(
    "array", [np.zeros((4, 4, 3), np.float32), np.zeros((4, 4, 2), np.uint8), np.zeros(4, np.uint8)]
)
def test_arrays_of_another_kind_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ImageReadError, match=r"uint8 of shape \(H, W, 3\)"):
        read_image(array)
    with pytest.raises(ImageReadError, match="must have pixels"):
        read_image(np.zeros((0, 4, 3), np.uint8))


# --- what is read ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".bmp", ".ppm"])
def test_lossless_files_paths_images_and_arrays_agree(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.fromarray(RGB).save(path)
    for source in (path, str(path), Image.fromarray(RGB), RGB):
        photo = read_image(source)
        np.testing.assert_array_equal(photo.pixels, RGB)
        assert photo.alpha is None
        assert photo.size == RGB.shape[:2]


def test_the_array_is_copied() -> None:
    array = RGB.copy()
    photo = read_image(array)
    array[:] = 0
    np.testing.assert_array_equal(photo.pixels, RGB)


def test_grey_and_palette_become_rgb(tmp_path: Path) -> None:
    grey = RGB[..., 0]
    np.testing.assert_array_equal(read_image(grey).pixels, np.dstack([grey] * 3))
    np.testing.assert_array_equal(read_image(Image.fromarray(grey)).pixels, np.dstack([grey] * 3))
    palette = Image.fromarray(RGB).quantize(64)
    palette.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_image(tmp_path / "p.png").pixels, np.asarray(palette.convert("RGB")))
    bits = Image.fromarray(grey > 100)
    np.testing.assert_array_equal(read_image(bits).pixels[..., 1], (grey > 100) * np.uint8(255))


def test_sixteen_bits_are_rounded_to_eight(tmp_path: Path) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    for name in ("a.png", "a.tiff"):
        Image.fromarray(values).save(tmp_path / name)
        assert (read_image(tmp_path / name).pixels[..., 0] == np.rint(values / 257)).all()


def test_sixteen_bits_of_which_zero_is_white_are_no_negative(tmp_path: Path) -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[262] = 0  # WhiteIsZero; Pillow writes such 16-bit values as they are given
    Image.fromarray(np.array([[0, 257, 65535]], np.uint16)).save(tmp_path / "a.tiff", tiffinfo=tags)
    assert read_image(tmp_path / "a.tiff").pixels[0, :, 0].tolist() == [255, 254, 0]


def test_the_transparent_grey_of_sixteen_bits_is_kept(tmp_path: Path) -> None:
    Image.fromarray(np.array([[1000, 30000, 30001]], np.uint16)).save(tmp_path / "a.png", transparency=30000)
    photo = read_image(tmp_path / "a.png")
    assert photo.alpha is not None
    assert photo.alpha.tolist() == [[255, 0, 255]]
    assert photo.pixels[0, :, 0].tolist() == [4, 117, 117]


def test_floating_point_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(ImageReadError, match="8 or 16 bits"):
        read_image(tmp_path / "f.tiff")


@pytest.mark.parametrize("suffix", [".jpg", ".tiff"])
def test_cmyk_becomes_rgb(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"ink{suffix}"
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(path, quality=100)
    red = read_image(path).pixels.reshape(-1, 3).mean(0)
    assert red[0] > 230
    assert red[1:].max() < 40


def test_alpha_is_split_off_and_restored_where_the_format_allows(tmp_path: Path) -> None:
    alpha = np.ascontiguousarray(RGB[..., 1])
    Image.fromarray(np.dstack([RGB, alpha])).save(tmp_path / "a.png")
    photo = read_image(tmp_path / "a.png")
    np.testing.assert_array_equal(photo.pixels, RGB)
    np.testing.assert_array_equal(photo.alpha, alpha)
    for name in ("out.png", "out.tiff"):
        write_image(tmp_path / name, photo.pixels, photo)
        np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / name)), np.dstack([RGB, alpha]))
    write_image(tmp_path / "out.jpg", photo.pixels, photo)
    flat = np.asarray(Image.open(tmp_path / "out.jpg")).astype(int)
    assert flat[0, 0].min() > 240, "a transparent corner goes white"


@pytest.mark.parametrize("mode", ["LA", "P", "PA"])
def test_transparency_of_other_modes_is_kept(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(np.dstack([RGB[..., 0], RGB[..., 1]])).convert("RGBA")
    image = image.convert(mode) if mode != "P" else Image.fromarray(RGB).quantize(8)
    if mode == "P":
        image.info["transparency"] = 0
    photo = read_image(image)
    assert photo.alpha is not None
    np.testing.assert_array_equal(photo.alpha, np.asarray(image.convert("RGBA"))[..., 3])


def test_the_first_frame_of_an_animation_is_used_and_noted(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    photo = read_image(tmp_path / "a.gif")
    assert tuple(photo.pixels[4, 4]) == (255, 0, 0)
    assert photo.notes == ("animated: the first frame is used",)


def test_a_long_animation_is_not_read_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frames = [Image.new("RGB", (1, 1), ("red", "green")[number % 2]) for number in range(200)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    monkeypatch.setattr(GifImagePlugin.GifImageFile, "n_frames", property(lambda _: pytest.fail("frames counted")))
    assert read_image(tmp_path / "a.gif").notes == ("animated: the first frame is used",)


def test_a_field_of_exif_that_fills_a_jpeg_is_left_out(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.ImageDescription] = "x" * 70_000
    exif[ExifTags.Base.Artist] = "A. Painter"
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    photo = read_image(tmp_path / "a.png")
    assert photo.notes == ("EXIF ImageDescription of 70000 characters: left out",)
    write_image(tmp_path / "out.jpg", photo.pixels, photo)
    kept = Image.open(tmp_path / "out.jpg").getexif()
    assert kept[ExifTags.Base.Artist] == "A. Painter"
    assert ExifTags.Base.ImageDescription not in kept


def test_memory_that_cannot_be_had_is_not_the_files_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.png")

    def starved(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr("faceedit.images._to_8_bit", starved)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


ORIENTED: dict[str, tuple[str, dict[str, Any]]] = {
    "png": (".png", {}),
    "jpg": (".jpg", {"quality": 100, "subsampling": 0}),
    "webp": (".webp", {"lossless": True}),
    "tif": (".tif", {}),
    "tif by libtiff": (".tif", {"compression": "tiff_lzw"}),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ORIENTED)
def test_exif_orientation_is_applied_once(tmp_path: Path, kind: str, orientation: int) -> None:
    suffix, options = ORIENTED[kind]
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    exif[ExifTags.Base.Make] = "Maker"
    path = tmp_path / f"o{suffix}"
    Image.fromarray(RGB).save(path, exif=exif, **options)
    upright = {
        1: RGB,
        2: RGB[:, ::-1],
        3: RGB[::-1, ::-1],
        4: RGB[::-1],
        5: RGB.transpose(1, 0, 2),
        6: np.rot90(RGB, -1),
        7: RGB[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(RGB),
    }[orientation]
    photo = read_image(path)
    np.testing.assert_allclose(photo.pixels.astype(int), upright, atol=4 if suffix == ".jpg" else 0)
    with Image.open(path) as opened:  # as a caller may have left it: its EXIF read, its pixels not
        opened.getexif()
        np.testing.assert_array_equal(read_image(opened).pixels, photo.pixels)
    for name in ("out.png", "out.tif"):
        write_image(tmp_path / name, photo.pixels, photo)
        np.testing.assert_array_equal(read_image(tmp_path / name).pixels, photo.pixels)
        assert Image.open(tmp_path / name).getexif()[ExifTags.Base.Orientation] == 1


def test_damaged_exif_does_not_refuse_the_picture(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12garbage", quality=95)
    assert read_image(tmp_path / "a.jpg").pixels.shape == RGB.shape


def wide_gamut_profile() -> bytes:
    """A display profile unlike sRGB, made from it by exchanging the red and green primaries."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    entries = [128 + 4 + 12 * i for i in range(count)]
    tags = {bytes(profile[e : e + 4]): e for e in entries}
    red, green = tags[b"rXYZ"], tags[b"gXYZ"]
    profile[red : red + 4], profile[green : green + 4] = b"gXYZ", b"rXYZ"
    description = struct.unpack(">I", profile[tags[b"desc"] + 4 : tags[b"desc"] + 8])[0]
    size = struct.unpack(">I", profile[tags[b"desc"] + 8 : tags[b"desc"] + 12])[0]
    text = bytes(profile[description : description + size])
    profile[description : description + size] = text.replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be"))
    return bytes(profile)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff"])
def test_an_icc_profile_is_converted_to_srgb(tmp_path: Path, suffix: str) -> None:
    """With the red and green primaries exchanged, pure file-red is shown as green."""
    path = tmp_path / f"icc{suffix}"
    Image.new("RGB", (32, 32), (230, 20, 20)).save(path, icc_profile=wide_gamut_profile(), quality=100)
    photo = read_image(path)
    shown = photo.pixels.reshape(-1, 3).mean(0)
    assert shown[1] > 200
    assert shown[0] < 90
    write_image(tmp_path / "out.png", photo.pixels, photo)
    assert Image.open(tmp_path / "out.png").info["icc_profile"] == photo.icc_profile
    np.testing.assert_array_equal(read_image(tmp_path / "out.png").pixels, photo.pixels)


def test_an_srgb_profile_changes_nothing_and_a_broken_one_is_noted(tmp_path: Path) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(RGB).save(tmp_path / "s.png", icc_profile=srgb)
    np.testing.assert_array_equal(read_image(tmp_path / "s.png").pixels, RGB)
    Image.fromarray(RGB).save(tmp_path / "b.png", icc_profile=b"nonsense" * 40)
    broken = read_image(tmp_path / "b.png")
    np.testing.assert_array_equal(broken.pixels, RGB)
    assert "ICC" in broken.notes[0]


def renamed_srgb(curve: bytes, name: str = "sRGB") -> bytes:
    """Pillow's sRGB profile with another transfer curve and description."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", profile[128:132])[0]
    for entry in range(132, 132 + 12 * count, 12):
        if profile[entry + 1 : entry + 4] == b"TRC":
            profile[entry + 4 : entry + 12] = struct.pack(">II", len(profile), len(curve))
    profile = profile.replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))
    profile += curve + b"\0" * (-len(curve) % 4)
    profile[:4] = struct.pack(">I", len(profile))
    return bytes(profile)


def encoded(linear: np.ndarray) -> np.ndarray:
    """sRGB's transfer function (IEC 61966-2-1) from linear light to signal, both in [0, 1]."""
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_a_linear_profile_is_converted_although_it_is_called_srgb(tmp_path: Path) -> None:
    straight = struct.pack(">4sII", b"curv", 0, 0)  # no entries: the identity
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    Image.fromarray(ramp).save(tmp_path / "linear.png", icc_profile=renamed_srgb(straight))
    shown = read_image(tmp_path / "linear.png").pixels.astype(float)
    np.testing.assert_allclose(shown, 255 * encoded(ramp / 255), atol=1)


def test_an_srgb_profile_under_another_name_changes_nothing(tmp_path: Path) -> None:
    """A coarse table of the curve: converting by it moves some colours by a level."""
    values = np.interp(np.linspace(0, 1, 24), encoded(np.linspace(0, 1, 4096)), np.linspace(0, 1, 4096))
    table = struct.pack(">4sII", b"curv", 0, 24) + np.rint(values * 65535).astype(">u2").tobytes()
    Image.fromarray(RGB).save(tmp_path / "other.png", icc_profile=renamed_srgb(table, "uRGB"))
    photo = read_image(tmp_path / "other.png")
    np.testing.assert_array_equal(photo.pixels, RGB)
    assert photo.icc_profile is not None
    assert photo.notes == ()


# --- what is written ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", WRITE_FORMATS)
def test_every_writable_format_round_trips(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"OUT{suffix.upper()}"
    write_image(path, ASTRONAUT)
    back = read_image(path).pixels.astype(int)
    limit = 0 if WRITE_FORMATS[suffix] in ("PNG", "TIFF") else 4
    assert np.abs(back - ASTRONAUT).mean() <= limit
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_jpeg_keeps_full_chroma(tmp_path: Path) -> None:
    write_image(tmp_path / "a.jpg", ASTRONAUT)
    with Image.open(tmp_path / "a.jpg") as image:
        assert [component[1:3] for component in image.layer] == [(1, 1)] * 3


def test_authorship_and_resolution_stay_position_and_thumbnail_go(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Artist] = "A. Photographer"
    exif[ExifTags.Base.Make] = "Maker"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.DateTimeOriginal] = "2024:05:06 07:08:09"
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.BodySerialNumber] = "serial-4711"
    exif.get_ifd(ExifTags.IFD.GPSInfo)[ExifTags.GPS.GPSLatitudeRef] = "N"
    path = tmp_path / "a.jpg"
    Image.fromarray(ASTRONAUT).save(path, exif=exif, dpi=(300, 300))
    photo = read_image(path)
    for name in ("o.jpg", "o.png", "o.tiff", "o.webp"):
        out = tmp_path / name
        write_image(out, photo.pixels, photo)
        with Image.open(out) as image:
            written = image.getexif()
            assert written[ExifTags.Base.Artist] == "A. Photographer"
            details = written.get_ifd(ExifTags.IFD.Exif)
            assert details[ExifTags.Base.DateTimeOriginal] == "2024:05:06 07:08:09"
            assert not written.get_ifd(ExifTags.IFD.GPSInfo)
            if name != "o.webp":
                assert image.info["dpi"] == pytest.approx((300, 300), abs=0.1)
        assert b"serial-4711" not in out.read_bytes()


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_names_keep_their_bytes_whatever_their_encoding(tmp_path: Path, suffix: str) -> None:
    fields = {
        ExifTags.Base.Artist: "Jürgen Müller".encode(),
        ExifTags.Base.Copyright: "© Müller".encode("latin-1"),
        ExifTags.Base.Make: b"Maker",
    }
    exif = Image.Exif()
    for tag, value in fields.items():
        exif[tag] = value
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel] = PlainBytes("Objektiv Ü")
    Image.fromarray(RGB).save(tmp_path / "in.jpg", exif=exif)
    photo = read_image(tmp_path / "in.jpg")
    write_image(tmp_path / f"out{suffix}", photo.pixels, photo)
    with Image.open(tmp_path / f"out{suffix}") as written:
        kept = written.getexif()
        assert {tag: kept[tag].encode("latin-1") for tag in fields} == fields
        assert kept.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.LensModel].encode("latin-1") == "Objektiv Ü".encode()


class PlainBytes(str):
    """Text that Pillow writes in UTF-8, as cameras and editors do, and marks as text."""

    def encode(self, encoding: str = "utf-8", errors: str = "strict") -> bytes:
        return super().encode("utf-8")


def test_a_resolution_that_no_file_states_is_not_written(tmp_path: Path) -> None:
    Image.fromarray(RGB).save(tmp_path / "a.tif")
    photo = read_image(tmp_path / "a.tif")
    assert photo.dpi is None
    write_image(tmp_path / "out.png", photo.pixels, photo)
    assert "dpi" not in Image.open(tmp_path / "out.png").info


UNWRITABLE = [f"{'x' * 300}.png", "none/out.png", "file.txt/out.png", "folder.png", "pipe.png", "gone.png"]


@pytest.mark.parametrize("name", UNWRITABLE)
def test_unwritable_targets_are_named_and_leave_nothing(tmp_path: Path, name: str) -> None:
    (tmp_path / "file.txt").write_text("x")
    (tmp_path / "folder.png").mkdir()
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "gone.png").symlink_to(tmp_path / "no folder" / "gone.png")
    before = sorted(tmp_path.rglob("*"))
    for attempt in (check_writable, lambda path: write_image(path, RGB)):
        with pytest.raises(ImageWriteError, match="write_image: path must") as caught:
            attempt(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", ["out.xyz", "out"])
def test_a_suffix_of_no_format_is_a_wrong_request(tmp_path: Path, name: str) -> None:
    for attempt in (check_writable, lambda path: write_image(path, RGB)):
        with pytest.raises(UsageError, match=r"must end in one of \.png"):
            attempt(tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_a_link_is_written_through_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "album").mkdir()
    real, link = tmp_path / "album" / "real.png", tmp_path / "link.png"
    link.symlink_to(real)
    for mode in (0o666 & ~_umask(), 0o640, 0o604):
        write_image(link, RGB)
        assert link.is_symlink()
        assert read_image(real).size == RGB.shape[:2]
        assert real.stat().st_mode & 0o777 == mode
        real.chmod(0o640 if mode != 0o640 else 0o604)
    assert [path.name for path in real.parent.iterdir()] == ["real.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ImageWriteError, match="must be writable"):
        check_writable(tmp_path / "a.png")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_keeps_the_old_file_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    path = tmp_path / "out.png"
    path.write_bytes(b"the old picture")

    def save(self: Image.Image, file: object, **arguments: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise failure

    monkeypatch.setattr(Image.Image, "save", save)
    with pytest.raises(ImageWriteError if isinstance(failure, OSError) else KeyboardInterrupt):
        write_image(path, RGB)
    assert path.read_bytes() == b"the old picture"
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_sizes_a_format_cannot_hold_are_a_typed_error(tmp_path: Path) -> None:
    with pytest.raises(ImageWriteError, match="WEBP"):
        write_image(tmp_path / "long.webp", np.zeros((1, 17_000, 3), np.uint8))
    assert not list(tmp_path.iterdir())


def test_pixels_of_another_kind_are_rejected(tmp_path: Path) -> None:
    for pixels in (RGB.astype(np.float32), RGB[..., 0], RGB[:0]):
        with pytest.raises(ValueError, match="pixels must be uint8"):
            write_image(tmp_path / "a.png", pixels)


def test_a_photo_of_another_size_lends_no_alpha(tmp_path: Path) -> None:
    photo = Photo(RGB, alpha=RGB[..., 0])
    write_image(tmp_path / "sheet.png", ASTRONAUT, photo)
    assert Image.open(tmp_path / "sheet.png").mode == "RGB"
