# SPDX-License-Identifier: Apache-2.0
"""One drawn face, the parser and editor for it, and a command line that uses them."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from support.command_line import Outcome, Run
from support.drawn_faces import DrawnFace, draw_face, palette_parser, small_editor

from faceedit.cli import main
from faceedit.editors.maggan import MagGANEditor
from faceedit.networks.parser import ParserConfig, ParserNet
from faceedit.parsing import FaceParser
from faceedit.registry import DIRECTORY_VARIABLE, pin_weights, save_weights


@pytest.fixture(scope="session")
def drawn() -> DrawnFace:
    return draw_face()


@pytest.fixture(scope="session")
def parser(drawn: DrawnFace) -> FaceParser:
    return palette_parser(drawn.box)


@pytest.fixture(scope="session")
def editor() -> MagGANEditor:
    return small_editor()


@pytest.fixture(scope="session")
def weights_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Registered weights of the real kinds: a tiny editor, and a parser file that only its checksum is read from."""
    folder = tmp_path_factory.mktemp("weights")
    facts = {"licence": "Apache-2.0", "training_data": "none", "source": "tests"}
    generator = small_editor().generator
    save_weights(folder / "m.safetensors", "maggan", generator.config, generator.state_dict(), **facts)
    config = ParserConfig()
    save_weights(folder / "p.safetensors", "parser", config, ParserNet(config).state_dict(), **facts)
    pin_weights("maggan-starter", folder / "m.safetensors")
    pin_weights("parser-starter", folder / "p.safetensors")
    return folder


@pytest.fixture
def run(
    weights_dir: Path, drawn: DrawnFace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Run]:
    """Run one command line in this process, with the parser that reads drawn faces."""
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(weights_dir))
    parser = palette_parser(drawn.box)
    parser.weights = "parser-starter"
    for module in ("faceedit.parsing", "faceedit.pipeline"):
        monkeypatch.setattr(f"{module}.load_parser", lambda *_: parser)
    monkeypatch.setattr(sys.modules["faceedit.cli.app"], "keep_freed_memory", lambda: False)  # it cannot be undone
    terminate = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(code, captured.out, captured.err)

    yield call
    signal.signal(signal.SIGTERM, terminate)


@pytest.fixture
def photo(tmp_path: Path, drawn: DrawnFace) -> Path:
    path = tmp_path / "in" / "me.png"
    path.parent.mkdir()
    Image.fromarray(drawn.pixels).save(path)
    return path
