# SPDX-License-Identifier: Apache-2.0
"""The XMP statement survives every format, and hostile packets are harmless."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from faceedit.errors import ImageReadError
from faceedit.images import WRITE_FORMATS, read_image, write_image
from faceedit.provenance import SOURCE_TYPE, Provenance, parse_packet, read_provenance, xmp_packet

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)


@pytest.mark.parametrize("suffix", WRITE_FORMATS)
def test_every_format_carries_the_statement(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"out{suffix}"
    write_image(path, PIXELS)
    found = read_provenance(path)
    assert found is not None
    assert found.digital_source_type == SOURCE_TYPE
    assert found.creator_tool is not None
    assert found.creator_tool.startswith("faceedit")
    assert xmp_packet() in path.read_bytes(), "readers that scan for the packet find it uncompressed"
    write_image(path, PIXELS, provenance=False)
    assert read_provenance(path) is None


def test_the_statement_survives_reading_and_writing_again_with_exif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x013B] = "A. Photographer"
    Image.fromarray(PIXELS).save(tmp_path / "a.tiff", exif=exif)
    write_image(tmp_path / "b.tiff", PIXELS, read_image(tmp_path / "a.tiff"))
    assert read_provenance(tmp_path / "b.tiff") is not None
    assert Image.open(tmp_path / "b.tiff").getexif()[0x013B] == "A. Photographer"


def test_old_xmp_is_not_copied(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(
        tmp_path / "a.jpg", xmp=b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>home address</x:xmpmeta>"
    )
    write_image(tmp_path / "b.jpg", PIXELS, read_image(tmp_path / "a.jpg"))
    assert b"home address" not in (tmp_path / "b.jpg").read_bytes()


def test_statements_written_as_elements_are_read() -> None:
    packet = (
        b'<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#"><rdf:Description'
        b' xmlns:i="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"><i:DigitalSourceType>made</i:DigitalSourceType>'
        b"</rdf:Description></rdf:RDF>"
    )
    assert parse_packet(packet) == Provenance("made", None)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"not xml",
        b"<a><b></a>",
        b'<!DOCTYPE a [<!ENTITY b "cc"><!ENTITY c "&b;&b;">]><a>&c;</a>',
    ],
)
def test_malformed_packets_say_nothing(packet: bytes) -> None:
    assert parse_packet(packet) is None


def test_a_file_that_is_no_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "letter.jpg"
    path.write_text("a letter")
    with pytest.raises(ImageReadError, match=r"letter\.jpg"):
        read_provenance(path)
