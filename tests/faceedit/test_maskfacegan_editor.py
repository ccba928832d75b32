# SPDX-License-Identifier: Apache-2.0
"""The editor end to end on tiny networks of the real kinds: weights, requests, the pipeline and the command line."""

from __future__ import annotations

import csv
import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support.command_line import Run, read
from support.drawn_faces import DrawnFace
from support.small_maskfacegan import ATTRIBUTES, SIZE_PX, STEPS, write_bundle

from faceedit.editors import AttributeEdit, ComponentSize, Editor, load_editor
from faceedit.editors.base import EDITORS, EditedFace, Watchable
from faceedit.editors.maggan import attribute_difference
from faceedit.editors.maskfacegan import MaskFaceGANEditor
from faceedit.errors import UnknownAttributeError, UnknownNameError, UsageError, WeightsError
from faceedit.maskfacegan.bundle import STARTER, Bundle, read_bundle
from faceedit.maskfacegan.config import PRESETS
from faceedit.maskfacegan.outcome import EditCancelledError, OptimizationError, Progress
from faceedit.maskfacegan.trajectory import Trajectory
from faceedit.parsing import FaceParser, FaceRecord
from faceedit.pipeline import edit
from faceedit.registry import DIRECTORY_VARIABLE, pin_weights

SMILE = AttributeEdit({"Smiling": 1.0})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture
def editor(bundle: Path) -> MaskFaceGANEditor:
    loaded = load_editor("maskfacegan", bundle)
    assert isinstance(loaded, MaskFaceGANEditor)
    return loaded


@pytest.fixture(scope="module")
def face(drawn: DrawnFace, parser: FaceParser) -> FaceRecord:
    return parser.find_face(drawn.pixels)


def test_the_editor_satisfies_both_protocols(editor: MaskFaceGANEditor) -> None:
    assert isinstance(editor, Editor)
    assert isinstance(editor, Watchable)
    assert editor.accepts == EDITORS["maskfacegan"].accepts
    assert EDITORS["maskfacegan"].presets == tuple(PRESETS)


def test_an_edit_reports_what_was_wanted_and_what_came(editor: MaskFaceGANEditor, face: FaceRecord) -> None:
    edited = editor.apply(face, SMILE)
    assert edited.before.shape == edited.after.shape == (1, 3, SIZE_PX, SIZE_PX)
    assert edited.region.shape == (1, 1, SIZE_PX, SIZE_PX)
    assert edited.parts == ("mouth", "skin")
    details = edited.details
    assert details["iterations"] == {"latent": 8, "noise": 4}
    assert set(details["losses"]) == {"appearance", "semantics", "noise"}
    assert details["wanted_probability"] == {"Smiling": 0.95}
    assert set(details["classifier"]) == {"before", "generated", "after"}
    present = details["classifier"]["before"]["Smiling"]
    assert edited.requested["Smiling"] == pytest.approx(0.95 - present, abs=1e-4)
    json.dumps(details)


def test_the_photo_is_cropped_at_the_generators_size(bundle: Path, face: FaceRecord, editor: MaskFaceGANEditor) -> None:
    framed = load_editor("maskfacegan", write_bundle(bundle.parent, "ffhq.json", framing="ffhq"))
    wide, narrow = (e.apply(face, SMILE).alignment for e in (editor, framed))
    assert wide is not None
    assert narrow is not None
    assert narrow.scale == pytest.approx(1.25 * wide.scale)
    assert wide.scale == pytest.approx(face.alignment.scale * SIZE_PX / 256)
    bare = replace(face, pixels=None)
    near = editor.apply(bare, SMILE).before - editor.apply(face, SMILE).before
    assert near.abs().mean() < 0.05
    with pytest.raises(UsageError, match="with its photo"):
        framed.apply(bare, SMILE)


def test_many_edits_together_are_each_alone(editor: MaskFaceGANEditor, face: FaceRecord) -> None:
    """Matrix products of three rows may round otherwise than those of one; see test_maskfacegan_optimizer."""
    requests = [
        SMILE,
        ComponentSize("mouth", 1.5, AttributeEdit({"Blond_Hair": 1.0}, keep=("Smiling",))),
        AttributeEdit({"Young": 0.0}),
    ]
    together = editor.apply_many([face] * 3, requests)
    for request, batched in zip(requests, together, strict=True):
        alone = editor.apply(face, request)
        assert isinstance(batched, EditedFace)
        torch.testing.assert_close(batched.after, alone.after, rtol=0, atol=1e-3)
        assert batched.parts == alone.parts
    assert together[1].details["kept"] == ["Smiling"]
    assert together[2].details["is_global"]


def test_presets_and_the_bundles_own_counts_join(bundle: Path) -> None:
    fast = load_editor("maskfacegan", bundle, preset="code")
    assert isinstance(fast, MaskFaceGANEditor)
    assert (fast.config.compat, fast.config.latent_steps, fast.preset) == (True, STEPS["latent_steps"], "code")
    assert Bundle().configuration("fast") == PRESETS["fast"]
    with pytest.raises(UnknownNameError, match="fast"):
        load_editor("maskfacegan", bundle, preset="quick")
    with pytest.raises(UnknownNameError, match="leave it out"):
        load_editor("maggan", preset="fast")


def test_edits_and_loading_are_the_same_under_modes_without_gradients(
    bundle: Path, editor: MaskFaceGANEditor, face: FaceRecord
) -> None:
    for request in (SMILE, AttributeEdit({"Young": 0.0})):
        plain = editor.apply(face, request).after
        for mode in (torch.inference_mode, torch.no_grad):
            with mode():
                assert torch.equal(editor.apply(face, request).after, plain), mode
                loaded = load_editor("maskfacegan", bundle)
            assert isinstance(loaded, MaskFaceGANEditor)
            assert torch.equal(loaded.apply(face, request).after, plain), mode


# What is refused


def test_missing_starter_weights_say_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr("faceedit.registry.PACKAGED", tmp_path)
    with pytest.raises(WeightsError, match=r"stylegan2-starter.*train one.*faceedit weights import stylegan2"):
        load_editor("maskfacegan")


def test_registered_weights_that_are_damaged_are_not_called_missing(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    file = tmp_path / "mine.safetensors"
    file.write_bytes((bundle.parent / "g.safetensors").read_bytes())
    pin_weights("mine", file)
    listing = write_bundle(bundle.parent, "registered.json", generator="mine")
    load_editor("maskfacegan", listing)
    whole = file.read_bytes()
    for damage, words in ((whole[:-1] + b"!", "must have SHA-256"), (b"text", "must be a safetensors file")):
        file.write_bytes(damage)
        with pytest.raises(WeightsError, match=words):
            load_editor("maskfacegan", listing)
    file.write_bytes((bundle.parent / "c.safetensors").read_bytes())
    with pytest.raises(WeightsError, match="must hold a stylegan2, got attribute-classifier"):
        load_editor("maskfacegan", listing)
    (tmp_path / "index.json").write_text("[")
    with pytest.raises(WeightsError, match="must be a valid index"):
        load_editor("maskfacegan", listing)


def test_the_files_of_a_bundle_are_those_that_were_loaded(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(DIRECTORY_VARIABLE, str(tmp_path))
    monkeypatch.setattr("faceedit.registry.PACKAGED", tmp_path)
    for name in ("g", "c"):
        (tmp_path / f"{name}.safetensors").write_bytes((bundle.parent / f"{name}.safetensors").read_bytes())
    pin_weights("stylegan2-starter", tmp_path / "g.safetensors")
    tagged = write_bundle(bundle.parent, "tagged.json", generator="starter", features=Bundle().features)
    loaded = load_editor("maskfacegan", tagged)
    assert isinstance(loaded, MaskFaceGANEditor)
    assert loaded.networks.features is None
    assert [path.name for path in loaded.files] == ["tagged.json", "g.safetensors", "c.safetensors", "p.safetensors"]
    pin_weights("attribute-classifier-starter", tmp_path / "c.safetensors")
    tagged = write_bundle(bundle.parent, "tagged.json", generator="starter", features="starter")
    assert read_bundle(tagged).files()[-1] == tmp_path / "c.safetensors"
    assert load_editor("maskfacegan", tagged).networks.features is not None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"generator": "p.safetensors"}, "must hold a stylegan2"),
        ({"classifier": "p.safetensors"}, "must be an attribute classifier, got ParserNet"),
        ({"parser": "nothing-parser"}, "a face parser that is installed"),
        ({"parser": "g.safetensors"}, r"parser must be a face parser, got stylegan2 in .*g\.safetensors"),
        ({"generator": "ffhq.safetensors"}, "run `faceedit weights import stylegan2`"),
        ({"encoder": "g.safetensors"}, "must hold a e4e"),
        ({"encoder": "e4e-starter"}, r"must give 8 styles of 8 for .*g\.safetensors, got 12 of 128 from e4e-starter"),
        ({"generatr": "g.safetensors"}, "did you mean generator"),
        ({"framing": "wide"}, "framing must be one of"),
        ({"config": {"latent_step": 5}}, "did you mean latent_steps"),
        ({"config": {"epsilon": 0.9}}, "epsilon must lie"),
        ({"config": {"epsilon": 10**400}}, "epsilon must be a float"),
        ({"generator": "g" * 5000}, "too long"),
    ],
)
def test_wrong_bundles_are_refused_in_one_line(bundle: Path, changes: dict, words: str) -> None:
    with pytest.raises((WeightsError, UsageError), match=words) as refusal:
        load_editor("maskfacegan", write_bundle(bundle.parent, "wrong.json", **changes))
    assert len(str(refusal.value).splitlines()) == 1


def test_bundles_that_are_no_files(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="readable file"):
        read_bundle(tmp_path / "none.json")
    for text in ("{", "[" * 100_000, '{"config": ' + "[" * 60 + "]" * 60 + "}", '"' + "x" * 2**20 + '"'):
        (tmp_path / "broken.json").write_text(text)
        with pytest.raises(WeightsError, match="must be a bundle") as refusal:
            read_bundle(tmp_path / "broken.json")
        assert len(str(refusal.value)) < 1000
    assert read_bundle("starter") == STARTER
    assert read_bundle("ffhq.safetensors") == Bundle(generator="ffhq.safetensors")


def test_a_parser_of_another_scheme_is_refused(editor: MaskFaceGANEditor, face: FaceRecord) -> None:
    broken = editor.networks.parser
    broken.network = torch.nn.Conv2d(3, 11, 1)
    with pytest.raises(WeightsError, match="19 classes of celebamask-hq"):
        editor.apply(face, SMILE)


def test_requests_the_classifier_cannot_judge_are_refused(editor: MaskFaceGANEditor, face: FaceRecord) -> None:
    with pytest.raises(UnknownAttributeError, match="Wavy_Hair"):
        editor.apply(face, AttributeEdit({"Straight_Hair": 1.0}))
    with pytest.raises(UnknownAttributeError, match="Young"):
        editor.apply(face, AttributeEdit({"Smiling": 1.0}, keep=("Youngg",)))
    with pytest.raises(UnknownNameError, match="eyebrows"):
        editor.apply(face, ComponentSize("eyebrow", 1.5))


def test_a_lost_optimisation_is_an_error(editor: MaskFaceGANEditor, face: FaceRecord) -> None:
    with torch.no_grad():
        editor.networks.generator.synthesis.const.fill_(torch.nan)
    with pytest.raises(OptimizationError, match="Smiling at iteration 0"):
        editor.apply(face, SMILE)


def test_watching_and_cancelling(editor: MaskFaceGANEditor, face: FaceRecord) -> None:
    seen: list[Progress] = []
    editor.watch(seen.append, every=4)
    editor.apply(face, SMILE)
    assert [p.stage for p in seen] == ["source", "latent", "latent", "latent", "noise", "noise", "blend"]
    editor.watch(None, should_stop=lambda: True)
    with pytest.raises(EditCancelledError, match="after 0 of 12"):
        editor.apply(face, SMILE)


def test_maggan_keeps_what_it_is_told_to() -> None:
    present = {"Black_Hair": 0.9, "Brown_Hair": 0.8}
    assert attribute_difference({"Blond_Hair": 1.0}, present, ("Black_Hair",)) == {
        "Blond_Hair": 1.0,
        "Brown_Hair": -1.0,
    }
    assert attribute_difference({"Blond_Hair": 1.0}, present, ("hair",)) == {"Blond_Hair": 1.0}


# Trajectory


def progress(stage: str, done: int, edits: tuple[int, ...] = (0,)) -> Progress:
    image = torch.full((len(edits), 3, 16, 16), done / 100)
    return Progress(stage, done, done, 100, edits, {}, image)


def test_a_trajectory_keeps_a_few_frames_and_both_ends() -> None:
    trajectory = Trajectory(count=5)
    trajectory(progress("source", 0))
    for done in range(1, 101):
        trajectory(progress("latent" if done <= 60 else "noise", done))
        trajectory(progress("latent", done, edits=(1,)))
    trajectory(progress("blend", 100))
    captions = [caption for caption, _ in trajectory.frames]
    assert captions == ["input", "w 1", "w 26", "w 51", "n 76", "n 100", "result"]
    strip = trajectory.strip()
    assert strip.shape == (16 + 18, 7 * 16, 3)
    assert strip.dtype == np.uint8
    assert strip[0, ::16, 0].tolist() == sorted(strip[0, ::16, 0].tolist())


def test_losses_fall_on_networks_of_the_real_kinds(bundle: Path, face: FaceRecord) -> None:
    counts = {"latent_steps": 40, "semantic_start": 20, "dynamic_stop": 30, "noise_start": 30, "noise_steps": 10}
    longer = load_editor("maskfacegan", write_bundle(bundle.parent, "longer.json", config=STEPS | counts))
    assert isinstance(longer, MaskFaceGANEditor)
    trajectory = Trajectory()
    longer.watch(trajectory, every=1)
    edited = longer.apply(face, ComponentSize("mouth", 1.5, AttributeEdit({"Blond_Hair": 1.0})))
    curves = {
        (stage, name): [values[name] for at, _, values in trajectory.losses if at == stage and name in values]
        for stage in ("latent", "noise")
        for name in edited.details["losses"]
    }
    assert {key: len(curve) for key, curve in curves.items() if curve} == {
        ("latent", "appearance"): 40, ("latent", "semantics"): 20, ("latent", "shape"): 20, ("latent", "size"): 20,
        ("noise", "appearance"): 10, ("noise", "noise"): 10,
    }  # fmt: skip
    alone = curves["latent", "appearance"][:20]  # the masked error is all that acts until then
    assert alone[-1] < 0.5 * alone[0]
    for term in (("latent", "size"), ("noise", "noise")):
        assert curves[term][-1] < curves[term][0]


# Pipeline and command line


def test_pixels_outside_the_region_stay(editor: MaskFaceGANEditor, drawn: DrawnFace, parser: FaceParser) -> None:
    result = edit(drawn.pixels, {"Smiling": 1.0}, editor=editor, parser=parser)
    outside = result.region == 0
    assert outside.any()
    assert (result.pixels[outside] == drawn.pixels[outside]).all()
    assert (result.pixels != drawn.pixels).any()
    assert result.report["details"]["iterations"]["latent"] == 8
    sized = edit(drawn.pixels, request=ComponentSize("mouth", 1.5), editor=editor, parser=parser)
    assert sized.report["requested"] == {"component": "mouth", "scale": 1.5}


def test_the_command_edits_reports_and_draws_the_trajectory(
    run: Run, photo: Path, drawn: DrawnFace, bundle: Path, tmp_path: Path
) -> None:
    out, strip = tmp_path / "out.png", tmp_path / "strip.png"
    outcome = run(
        "edit", photo, "-o", out, "-e", "maskfacegan", "-w", bundle, "--set", "Smiling=1", "--size", "mouth=1.5",
        "--keep", "Young", "--preset", "fast", "--save-trajectory", strip, "--json",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    report = outcome.json()
    assert report["requested"] == {"component": "mouth", "scale": 1.5, "Smiling": 1.0}
    assert report["details"]["kept"] == ["Young"]
    assert report["details"]["preset"] == "fast"
    assert report["weights"]["editor"] == str(bundle)
    assert report["written"] == [str(out), str(strip), str(tmp_path / "strip.csv")]
    assert read(out).shape == drawn.pixels.shape
    height, width = read(strip).shape[:2]
    assert height == SIZE_PX + 18
    assert width % SIZE_PX == 0
    assert width // SIZE_PX == 2 + 7  # both ends, and the iterations, thinned out
    steps = [("latent", str(i)) for i in range(8)] + [("noise", str(i)) for i in range(4)]
    with (tmp_path / "strip.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["stage"], row["iteration"]) for row in rows] == steps
    acts = {name: [bool(row[name]) for row in rows] for name in list(rows[0])[2:]}
    late = [False] * 3 + [True] * 5 + [False] * 4
    assert acts == {"appearance": [True] * 12, "semantics": late, "size": late, "noise": [False] * 8 + [True] * 4}
    last = {name: next(row[name] for row in reversed(rows) if row[name]) for name in acts}
    assert {name: float(value) for name, value in last.items()} == report["details"]["losses"]


def test_a_bundle_warns_of_what_its_generator_makes_alone(run: Run, photo: Path, bundle: Path, tmp_path: Path) -> None:
    """Before edits of hair and of the whole face, on stderr, and nowhere else."""
    wary = write_bundle(bundle.parent, "wary.json", caution="drawn, not photographed")
    for options, is_warned in ((("Blond_Hair=1",), True), (("Young=1",), True), (("Smiling=1",), False)):
        outcome = run("edit", photo, "-o", tmp_path / "out.png", "-e", "maskfacegan", "-w", wary, "--set", *options)
        assert outcome.code == 0, outcome.err
        assert (outcome.err.splitlines()[:1] == ["note: drawn, not photographed"]) == is_warned
    assert "drawings only" in STARTER.caution


def test_batches_are_done_again_when_the_bundle_changes(run: Run, photo: Path, bundle: Path, tmp_path: Path) -> None:
    listing = write_bundle(bundle.parent, "batch.json")
    command = ("batch", photo.parent, tmp_path / "out", "-e", "maskfacegan", "-w", listing, "--json")
    asked = (*command, "--size", "mouth=1.5")
    counts = []
    for changes in ({}, {}, {"config": STEPS | {"noise_steps": 1}}):
        write_bundle(bundle.parent, "batch.json", **changes)
        outcome = run(*asked)
        assert outcome.code == 0, outcome.err
        report = outcome.json()
        counts.append((report["edited"], report["skipped"]))
    assert counts == [(1, 0), (0, 1), (1, 0)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--set", "Smilling=1"), ("Smiling",)),
        (("--size", "mouth"), ("PART=SCALE",)),
        (("--size", "mouth=big"), ("PART=SCALE",)),
        (("--size", "mouth=3"), ("between 0.5 and 2",)),
        (("--size", "skin=1.5"), ("part that can be edited",)),
        (("--size", "mouth=1.5", "--keep", "hair"), ("must go with --set",)),
        (("--set", "Smiling=1", "--keep", "hiar"), ("hair",)),
        (("--set", "Smiling=1", "--preset", "quick"), ("quick", "fast")),
        (("--set", "Big_Nose=1"), ("Big_Nose", ATTRIBUTES[0])),
    ],
)
def test_wrong_requests_are_one_line(
    run: Run, photo: Path, bundle: Path, tmp_path: Path, options: tuple[str, ...], words: tuple[str, ...]
) -> None:
    out = tmp_path / "out.png"
    run("edit", photo, "-o", out, "-e", "maskfacegan", "-w", bundle, *options).refused(2, *words)
    assert not out.exists()


def test_other_editors_refuse_what_only_this_one_does(run: Run, photo: Path, tmp_path: Path) -> None:
    out = ("edit", photo, "-o", tmp_path / "out.png")
    run(*out, "--size", "mouth=1.5").refused(2, "use the editor maskfacegan")
    run(*out, "--set", "Bald=1", "--save-trajectory", tmp_path / "t.png").refused(2, "use maskfacegan")
    run(*out, "--set", "Bald=1", "--preset", "fast").refused(2, "leave it out")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"min_region_share": 0.9}, "mouth must be in the picture to edit Smiling"),
        ({"latent_rate": 1e30}, "got NaN or infinity for Smiling at iteration"),
    ],
)
def test_an_edit_that_cannot_be_made_writes_nothing(
    run: Run, photo: Path, bundle: Path, tmp_path: Path, config: dict, words: str
) -> None:
    weights = write_bundle(bundle.parent, "lost.json", config=STEPS | config)
    before = sorted(tmp_path.rglob("*"))
    options = ("--set", "Smiling=1", "--save-trajectory", tmp_path / "t.png", "--report", tmp_path / "r.json")
    run("edit", photo, "-o", tmp_path / "o.png", "-e", "maskfacegan", "-w", weights, *options).refused(1, words)
    assert sorted(tmp_path.rglob("*")) == before


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_pickle_in_place_of_weights_is_not_read(run: Run, photo: Path, bundle: Path, tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    (bundle.parent / "g.pkl").write_bytes(pickle.dumps(Malicious(trace)))
    listing = write_bundle(bundle.parent, "pickle.json", generator="g.pkl")
    for weights in (bundle.parent / "g.pkl", listing):
        edit_it = ("edit", photo, "-o", tmp_path / "o.png", "-e", "maskfacegan", "-w", weights, "--set", "Smiling=1")
        run(*edit_it).refused(1, "g.pkl", "faceedit weights import")
        run("project", photo, "-o", tmp_path / "p.png", "-w", weights).refused(1, "g.pkl", "faceedit weights import")
    assert not trace.exists()


def test_missing_weights_are_one_line(run: Run, photo: Path, tmp_path: Path) -> None:
    run("edit", photo, "-o", tmp_path / "o.png", "-e", "maskfacegan", "-w", "none.json", "--set", "Smiling=1").refused(
        1, "none.json"
    )
