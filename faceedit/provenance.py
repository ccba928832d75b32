# SPDX-License-Identifier: Apache-2.0
"""Provenance of edited photos: an XMP packet that says a trained model made part of the picture.

The term is IPTC's digital source type "compositeWithTrainedAlgorithmicMedia" (IPTC NewsCodes, Photo Metadata Standard
2023.2), the one that platforms read to label AI-edited media. The packet carries nothing from the photo itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.sax.saxutils import quoteattr

from PIL import ExifTags, Image, PngImagePlugin

from faceedit.errors import ImageReadError

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
PNG_KEYWORD = "XML:com.adobe.xmp"
TIFF_XMP_TAG = 700
_IPTC = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
_XMP = "http://ns.adobe.com/xap/1.0/"
_RDF = "http://www.w3.org/1999/02/22-rdf-syntax-ns#"


@dataclass(frozen=True)
class Provenance:
    """What a file says of its own origin; an absent statement is None."""

    digital_source_type: str | None
    creator_tool: str | None


def creator_tool() -> str:
    """The tool name written into files: "faceedit <version>", or "faceedit" alone in an uninstalled source tree."""
    try:
        return f"faceedit {version('faceedit')}"
    except PackageNotFoundError:
        return "faceedit"


def xmp_packet() -> bytes:
    """The XMP packet of an edited photo, UTF-8."""
    return (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/">'
        f'<rdf:RDF xmlns:rdf="{_RDF}">'
        f'<rdf:Description rdf:about="" xmlns:xmp="{_XMP}" xmlns:Iptc4xmpExt="{_IPTC}"'
        f" xmp:CreatorTool={quoteattr(creator_tool())}"
        f' Iptc4xmpExt:DigitalSourceType="{SOURCE_TYPE}"/>'
        '</rdf:RDF></x:xmpmeta><?xpacket end="w"?>'
    ).encode()


class _Latin1(str):
    """Text that every encoder writes as the bytes it was read from: Pillow reads EXIF text as Latin-1, and writes
    question marks for all of it that is not ASCII."""

    __slots__ = ()

    def encode(self, encoding: str = "latin-1", errors: str = "replace") -> bytes:
        return super().encode("latin-1", "replace")


def exif_value(value: Any) -> Any:
    """An EXIF value as Pillow read it, made such that Pillow writes the same bytes, whatever their encoding."""
    return _Latin1(value) if isinstance(value, str) and not value.isascii() else value


def save_arguments(image_format: str, exif: bytes | None = None) -> dict[str, Any]:
    """Keyword arguments that make `PIL.Image.save` embed the packet, and exif, in a PNG, JPEG, WEBP or TIFF file."""
    arguments: dict[str, Any] = {} if exif is None else {"exif": exif}
    packet = xmp_packet()
    if image_format == "PNG":
        chunks = PngImagePlugin.PngInfo()
        chunks.add_itxt(PNG_KEYWORD, packet.decode())
        return arguments | {"pnginfo": chunks}
    if image_format == "TIFF":  # where both are tags of the one directory
        tags = Image.Exif()
        if exif is not None:
            tags.load(exif)
            for directory in (tags, tags.get_ifd(ExifTags.IFD.Exif)):
                for tag, value in list(directory.items()):
                    directory[tag] = exif_value(value)
        tags[TIFF_XMP_TAG] = packet
        return {"exif": tags}
    return arguments | {"xmp": packet}


def read_provenance(path: str | Path) -> Provenance | None:
    """The provenance stated in a file's XMP packet; None when it has no packet or one that cannot be parsed.

    Raises ImageReadError when the file is not an image.
    """
    try:
        with Image.open(path, formats=("PNG", "JPEG", "WEBP", "TIFF")) as image:
            packet = _packet_of(image.info)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ImageReadError(
            f"read_provenance: path must be a PNG, JPEG, WebP or TIFF file, got {path} ({error}); check the file"
        ) from error
    return parse_packet(packet) if packet else None


def _packet_of(info: Mapping[Any, Any]) -> bytes:
    packet = info.get("xmp") or info.get(PNG_KEYWORD)
    return packet.encode() if isinstance(packet, str) else packet if isinstance(packet, bytes) else b""


def states_model(info: Mapping[Any, Any]) -> bool:
    """Whether a file with this `PIL.Image.Image.info` says that a trained model made it or part of it."""
    stated = parse_packet(_packet_of(info))
    return ((stated and stated.digital_source_type) or "").lower().endswith("trainedalgorithmicmedia")


def parse_packet(packet: bytes) -> Provenance | None:
    """Read the two statements from an XMP packet, written as attributes or as elements; None when it is malformed."""
    if b"<!" in packet:  # XMP has no declarations, and entity definitions are how XML bombs are made
        return None
    try:
        root = ElementTree.fromstring(packet.strip(b"\x00 \r\n\t"))
    except ElementTree.ParseError:
        return None
    found: dict[str, str | None] = {"type": None, "tool": None}
    names = {"type": f"{{{_IPTC}}}DigitalSourceType", "tool": f"{{{_XMP}}}CreatorTool"}
    for description in root.iter(f"{{{_RDF}}}Description"):
        for key, name in names.items():
            child = description.find(name)
            text = description.get(name) or (child.text if child is not None else None)
            found[key] = found[key] or text
    return Provenance(found["type"], found["tool"])
