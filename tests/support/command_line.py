# SPDX-License-Identifier: Apache-2.0
"""Running the command line in tests, and the files that it must refuse."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

import faceedit

PACKAGE_ROOT = Path(faceedit.__file__).parents[1]
SET = ("--set", "Blond_Hair=1")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    def json(self) -> Any:
        """What a command with --json printed; where it printed nothing, the test says how the command ended."""
        assert self.out.strip(), self
        return json.loads(self.out)

    def refused(self, code: int, *words: str) -> None:
        """One line on stderr with these words, nothing on stdout, this exit code."""
        assert self.code == code, self
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in self.err
        for word in words:
            assert word in self.err, self.err


Run = Callable[..., Outcome]


def read(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def subprocess_run(*arguments: str, cwd: Path, timeout_s: float = 120) -> Outcome:
    environment = os.environ | {"PYTHONPATH": str(PACKAGE_ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "faceedit", *arguments],
        cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s, check=False,
    )  # fmt: skip
    return Outcome(done.returncode, done.stdout, done.stderr)


def huge_png(path: Path) -> None:
    """A PNG whose header says 30,000 × 30,000; there is almost nothing behind it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    )


def truncated_jpeg(path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


BAD_FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "text.jpg": (lambda path: path.write_text("this is no picture\n") and None, "text.jpg"),
    "truncated.jpg": (truncated_jpeg, "truncated"),
    "empty.png": (lambda path: path.touch(), "empty"),
    "huge.png": (huge_png, "pixels"),
    "landscape.png": (lambda path: Image.new("RGB", (320, 240), (90, 140, 60)).save(path), "face"),
}
