# SPDX-License-Identifier: Apache-2.0
"""`faceedit project` on a drawn face and a tiny untrained generator: what it writes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.command_line import BAD_FILES, Outcome, Run, read
from support.drawn_faces import DrawnFace
from support.stylegan2_tiny import tiny_generator

from faceedit.alignment import PORTRAIT_SCALE, align_ffhq
from faceedit.cli import output, projection
from faceedit.networks.e4e import E4EConfig, E4EEncoder
from faceedit.provenance import SOURCE_TYPE, read_provenance
from faceedit.registry import load_network, save_weights

FACTS = {"licence": "Apache-2.0", "training_data": "none", "source": "tests"}
SIDE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generator, an encoder of it, and one of a larger generator."""
    where = tmp_path_factory.mktemp("stylegan2")
    torch.manual_seed(0)
    generator = tiny_generator(SIDE)
    save_weights(where / "g.safetensors", "stylegan2", generator.config, generator.state_dict(), half=False, **FACTS)
    for name, layers in (("e", 6), ("other", 8)):
        config = E4EConfig(32, num_ws=layers, w_width=8, base_width=4, blocks=(1, 1, 1, 1), head_width=4)
        save_weights(where / f"{name}.safetensors", "e4e", config, E4EEncoder(config).state_dict(), **FACTS)
    return where


def test_what_is_written_is_what_the_generator_shows(run: Run, photo: Path, tmp_path: Path, folder: Path) -> None:
    out, latents = tmp_path / "out.png", tmp_path / "me.safetensors"
    options = ("--weights", folder / "g.safetensors", "--steps", 4, "--seed", 3)
    outcome = run("project", photo, "-o", out, *options, "--compare", "--save-latents", latents, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    pixels, sheet = read(out), read(tmp_path / "out_compare.png")
    assert pixels.shape == (SIDE, SIDE, 3)
    np.testing.assert_array_equal(sheet[:, SIDE:], pixels)
    stored = load_file(latents)
    generator = load_network(folder / "g.safetensors")
    noise = [stored[f"noise.{k}"] for k in range(len(generator.config.noise_px))]
    again = generator.synthesis(stored["ws"], noise)
    levels = ((again[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 0)
    np.testing.assert_allclose(pixels, levels, atol=0.51)
    with safe_open(latents, "np") as file:
        assert file.metadata() == {
            "weights": str(folder / "g.safetensors"), "framing": "ffhq", "encoder": "", "steps": "4", "seed": "3",
        }  # fmt: skip
    report = outcome.json()
    assert report["written"] == [str(out), str(tmp_path / "out_compare.png"), str(latents)]
    assert (report["steps"], report["size_px"], report["seed"], report["framing"]) == (4, SIDE, 3, "ffhq")
    assert report["distance"]["last"] < report["distance"]["first"]
    error = (sheet[:, :SIDE] / 127.5 - 1 - again[0].clamp(-1, 1).permute(1, 2, 0).numpy()) ** 2
    assert report["psnr_db"] == pytest.approx(10 * np.log10(4 / error.mean()), abs=1e-3)
    assert read_provenance(out).digital_source_type == SOURCE_TYPE


@pytest.mark.parametrize(
    ("bundled", "asked", "framing"),
    [
        (None, "", "ffhq"),
        (None, "portrait", "portrait"),
        ("portrait", "", "portrait"),
        ("portrait", "ffhq", "ffhq"),
    ],
)
def test_the_face_has_the_framing_of_the_generator(
    run: Run, photo: Path, drawn: DrawnFace, tmp_path: Path, folder: Path, bundled: str | None, asked: str, framing: str
) -> None:
    out, weights = tmp_path / "out.png", folder / "g.safetensors"
    if bundled is not None:
        weights = folder / f"{bundled}.json"
        weights.write_text(json.dumps({"generator": "g.safetensors", "framing": bundled}))
    options = ("--framing", asked) if asked else ()
    outcome = run("project", photo, "-o", out, "--weights", weights, "--steps", 1, "--compare", "--json", *options)
    assert outcome.json()["framing"] == framing
    height, width = drawn.pixels.shape[:2]
    # Landmarks are read off a parse, so the crop is not the true landmarks' to the pixel; the other crop is far off.
    shown = read(tmp_path / "out_compare.png")[:, :SIDE].astype(float)
    error = {
        name: np.abs(shown - align_ffhq(drawn.landmarks, (height, width), SIDE, scale).warp_image(drawn.pixels)).mean()
        for name, scale in (("ffhq", 1.0), ("portrait", PORTRAIT_SCALE))
    }
    assert error.pop(framing) < 0.5 * error.popitem()[1]


def test_the_seed_and_the_encoder_decide(run: Run, photo: Path, tmp_path: Path, folder: Path) -> None:
    def projected(name: str, *options: object) -> tuple[bytes, torch.Tensor]:
        latents = tmp_path / f"{name}.safetensors"
        chosen = ("--weights", folder / "g.safetensors", "--save-latents", latents, *options)
        assert run("project", photo, "-o", tmp_path / f"{name}.png", *chosen) == Outcome(0, "", "")
        return (tmp_path / f"{name}.png").read_bytes(), load_file(latents)["ws"]

    one, same, other = (
        projected(name, "--steps", 3, "--seed", seed)[0] for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert one == same != other
    # The warm-up begins at rate 0: one step leaves the styles where they started.
    _, start = projected("d", "--steps", 1, "--encoder", folder / "e.safetensors")
    _, average = projected("e", "--steps", 1)
    assert torch.equal(average[:, :1].expand_as(average), average)
    assert not torch.equal(start[:, :1].expand_as(start), start)


def test_progress_shows_the_loss_terms(
    run: Run, photo: Path, tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = []

    def recording() -> object:
        bars.append(output.progress_bar())
        return bars[-1]

    monkeypatch.setattr(projection, "progress_bar", recording)
    run("project", photo, "-o", tmp_path / "out.png", "--weights", folder / "g.safetensors", "--steps", 3)
    (task,) = bars[0].tasks
    assert (task.completed, task.total) == (3, 3)
    assert "distance" in task.description
    assert "noise" in task.description


@pytest.mark.parametrize(
    ("option", "value", "code", "word"),
    [
        ("--weights", "stylegan", 2, "registered name or a path"),
        ("--weights", "none.safetensors", 1, "none.safetensors"),
        ("--weights", "e.safetensors", 1, "must hold a stylegan2, got e4e"),
        ("--encoder", "g.safetensors", 1, "must hold a e4e, got stylegan2"),
        ("--encoder", "other.safetensors", 2, "must give 6 styles of 8"),
        ("--weights", "none.json", 1, "none.json"),
        ("--framing", "wide", 2, "ffhq, portrait"),
        ("--steps", "0", 2, "--steps"),
        ("--device", "gpu", 2, "cpu"),
        ("--face", "5", 1, "number of faces, 1"),
        ("--save-latents", "me.pt", 2, ".safetensors"),
        ("--save-latents", "nowhere/me.safetensors", 1, "writable folder"),
    ],
)
def test_wrong_options(
    run: Run, photo: Path, tmp_path: Path, folder: Path, option: str, value: str, code: int, word: str
) -> None:
    if option in ("--weights", "--encoder") and (folder / value).exists():
        value = str(folder / value)
    elif option == "--save-latents":
        value = str(tmp_path / value)
    before = sorted(tmp_path.rglob("*"))
    arguments = {"--weights": folder / "g.safetensors", "--steps": "1", option: value}
    flat = [part for pair in arguments.items() for part in pair]
    run("project", photo, "-o", tmp_path / "out.png", *flat).refused(code, word)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("name", [*BAD_FILES, "missing.jpg"])
def test_bad_photos_are_refused_in_one_line(run: Run, tmp_path: Path, folder: Path, name: str) -> None:
    bad, word = tmp_path / name, name
    if name in BAD_FILES:
        make, word = BAD_FILES[name]
        make(bad)
    run("project", bad, "-o", tmp_path / "out.png", "--weights", folder / "g.safetensors").refused(1, word)
    assert [path.name for path in tmp_path.iterdir() if path != bad] == []


def test_unwritable_output_is_refused(run: Run, photo: Path, tmp_path: Path, folder: Path) -> None:
    run("project", photo, "-o", tmp_path / "out.xyz", "--weights", folder / "g.safetensors").refused(2, "must end in")
