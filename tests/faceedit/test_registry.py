# SPDX-License-Identifier: Apache-2.0
import dataclasses
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from support.command_line import PACKAGE_ROOT

from faceedit import registry
from faceedit.attributes import MAGGAN
from faceedit.config import from_dict, to_dict
from faceedit.errors import DeviceError, UnknownNameError, UsageError, WeightsError
from faceedit.networks import KINDS, network_kind
from faceedit.networks.classifier import AttributeClassifier, AttributeClassifierConfig
from faceedit.networks.maggan import MagGANConfig, MagGANGenerator

TINY = AttributeClassifierConfig(attributes=MAGGAN, size_px=16, base_width=2, stages=3, hidden_width=8)
ORIGIN = {"licence": "Apache-2.0", "training_data": "nothing: random values", "source": "a test"}
PACKAGED = [row for row in registry.list_weights() if row.path.parent == registry.PACKAGED]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv(registry.DIRECTORY_VARIABLE, str(tmp_path))
    return tmp_path


@pytest.fixture
def classifier():
    torch.manual_seed(0)
    return AttributeClassifier(TINY)


def save(folder, classifier, name="attribute-classifier-tiny", **changes):
    path = folder / f"{name}.safetensors"
    options = {**ORIGIN, "attributes": MAGGAN, "metrics": {"accuracy": 0.5}, **changes}
    registry.save_weights(path, "attribute-classifier", TINY, classifier.state_dict(), **options)
    return path


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_every_kind_builds_from_its_default_configuration(kind):
    config_class, network_class = kind.classes()
    config = config_class()
    with torch.device("meta"):
        network = network_class(config)
    assert network.state_dict()
    assert from_dict(config_class, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize("row", PACKAGED, ids=lambda row: row.name)
def test_packaged_row_is_true(row):
    assert row.path.stat().st_size == row.bytes <= registry.MAX_FILE_BYTES
    assert registry.sha256_of(row.path) == row.sha256
    assert row.header.licence in registry.LICENCES
    assert row.header.training_data
    assert (registry.PACKAGED / row.card).is_file(), "every packaged network needs its card"
    network = registry.load_network(row.name)
    assert all(value.isfinite().all() for value in network.state_dict().values() if value.is_floating_point())


def test_loading_packaged_weights_does_not_import_pytorchs_compiler(tmp_path):
    # It takes seconds, of the few that a whole edit has. Arithmetic on "meta" imports it, and torchvision, which the
    # parser that is left out needs.
    names = [row.name for row in PACKAGED if row.header.kind != "deeplab-parser"]
    program = (
        "import sys; from faceedit import registry;"
        " [registry.load_network(name) for name in sys.argv[1:]]; sys.exit('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *names],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(PACKAGE_ROOT)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_packaged_weights_are_small_and_declared():
    files = sorted(path for path in registry.PACKAGED.iterdir() if path.suffix not in (".md", ".json", ".py"))
    files = [path for path in files if path.is_file()]
    assert {path.name for path in files} == {row.file for row in PACKAGED}
    assert sum(path.stat().st_size for path in files) <= registry.MAX_TOTAL_BYTES


def test_saved_network_loads_by_name_and_by_path(folder, classifier):
    path = save(folder, classifier)
    registry.pin_weights("attribute-classifier-tiny", path)
    for handle in ("attribute-classifier-tiny", str(path), path):
        network = registry.load_network(handle)
        assert not network.training
        assert not any(parameter.requires_grad for parameter in network.parameters())
        assert network.config == TINY
        assert network.header.attributes == MAGGAN
        assert network.header.metrics == {"accuracy": 0.5}
        for name, value in classifier.state_dict().items():
            half = value.half().to(value.dtype) if value.is_floating_point() and value.ndim > 1 else value
            assert torch.equal(network.state_dict()[name], half), name


def test_full_precision_is_exact(folder, classifier):
    network = registry.load_network(save(folder, classifier, half=False))
    assert all(torch.equal(network.state_dict()[name], value) for name, value in classifier.state_dict().items())


def test_a_network_loaded_in_inference_mode_passes_gradients(folder, classifier):
    path = save(folder, classifier)
    with torch.inference_mode():
        network = registry.load_network(path)
    image = torch.zeros(1, 3, 16, 16, requires_grad=True)
    network(image).sum().backward()
    assert image.grad is not None


def test_kind_completes_a_short_name(folder, classifier):
    registry.pin_weights("attribute-classifier-tiny", save(folder, classifier))
    assert registry.find("tiny", "attribute-classifier").name == "attribute-classifier-tiny"
    assert isinstance(registry.load_network("tiny", kind="attribute-classifier"), AttributeClassifier)
    with pytest.raises(WeightsError, match="must hold a maggan"):
        registry.load_network(folder / "attribute-classifier-tiny.safetensors", kind="maggan")


def test_pinning_replaces_its_own_row_only(folder, classifier):
    registry.pin_weights("one", save(folder, classifier, "one"))
    registry.pin_weights("two", save(folder, classifier, "two"))
    registry.pin_weights("one", save(folder, classifier, "three"), card="one.md")
    (folder / "one.md").write_text("What it cannot do.")
    assert [(row.name, row.file) for row in registry.list_weights() if row.path.parent == folder] == [
        ("one", "three.safetensors"),
        ("two", "two.safetensors"),
    ]
    described = registry.describe("one")
    assert described["card"] == "What it cannot do."
    assert described["pinned"]
    assert described["licence"] == "Apache-2.0"
    assert json.dumps(described)


def test_altered_file_is_refused(folder, classifier):
    path = save(folder, classifier)
    registry.pin_weights("tiny", path)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="SHA-256"):
        registry.load_network("tiny")


def test_describe_tells_the_files_own_checksum(folder, classifier):
    path = save(folder, classifier)
    registry.pin_weights("tiny", path, card="tiny.md")
    (folder / "tiny.md").write_bytes("ein Gerät".encode("latin-1"))
    known = registry.describe("tiny")
    assert (known["sha256"], known["problem"]) == (registry.sha256_of(path), "")
    assert known["card"] == "ein Ger\ufffdt"
    save(folder, classifier, training_data="something else")
    altered = registry.describe("tiny")
    assert altered["sha256"] == registry.sha256_of(path) != known["sha256"]
    assert altered["bytes"] == path.stat().st_size
    assert altered["problem"].startswith(f"the index pins {known['sha256'][:12]}")


def test_unknown_name_suggests(folder, classifier):
    registry.pin_weights("classifier-tiny", save(folder, classifier))
    with pytest.raises(UnknownNameError, match="classifier-tiny"):
        registry.load_network("clasifier-tiny")
    with pytest.raises(WeightsError, match="readable file"):
        registry.load_network(folder / "absent.safetensors")
    with pytest.raises(WeightsError, match="maggan"):
        network_kind("magan")


def write(path, tensors, header):
    save_file(
        tensors, path, metadata={registry.METADATA_KEY: header if isinstance(header, str) else json.dumps(header)}
    )


def test_partial_weights_are_refused_and_change_nothing(folder, classifier):
    header = to_dict(registry.read_header(save(folder, classifier)))
    state = {name: value.numpy() for name, value in classifier.state_dict().items()}
    other = AttributeClassifier(TINY)
    before = {name: value.clone() for name, value in other.state_dict().items()}
    cases = {
        "missing logits.bias": {name: value for name, value in state.items() if name != "logits.bias"},
        "unexpected extra": {**state, "extra": np.zeros(1, np.float32)},
        "other shapes logits.bias": {**state, "logits.bias": np.zeros(40, np.float32)},
    }
    for text, tensors in cases.items():
        write(folder / "bad.safetensors", tensors, header)
        with pytest.raises(WeightsError, match=text):
            registry.load_network(folder / "bad.safetensors")
        with pytest.raises(WeightsError, match=text):
            registry.load_weights(other, folder / "bad.safetensors")
    assert all(torch.equal(other.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("value", [np.float32("nan"), np.float32("-inf"), np.float64(1e300)], ids=str)
def test_values_that_are_not_finite_are_refused_and_change_nothing(folder, classifier, value):
    header = to_dict(registry.read_header(save(folder, classifier)))
    state = {name: tensor.numpy() for name, tensor in classifier.state_dict().items()}
    name = "logits.weight"
    state[name] = np.where(np.arange(state[name].size).reshape(state[name].shape) == 5, value, state[name])
    write(folder / "bad.safetensors", state, header)
    with pytest.raises(WeightsError, match=r"logits\.weight in .*bad\.safetensors must be finite"):
        registry.load_network(folder / "bad.safetensors")
    other = AttributeClassifier(TINY)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(WeightsError, match="finite"):
        registry.load_weights(other, folder / "bad.safetensors")
    assert all(torch.equal(other.state_dict()[name], tensor) for name, tensor in before.items())


def test_bad_files_and_headers_are_refused(folder, classifier):
    header = to_dict(registry.read_header(save(folder, classifier)))
    tensors = {"a": np.zeros(1, np.float32)}
    bad_headers = {
        "lisence": {**header, "lisence": "MIT"},
        "licence must be a known": {**header, "licence": "Proprietary"},
        "known network": {**header, "kind": "diffusion"},
        "format must be": {**header, "format": 2},
        "base_width": {**header, "config": {**header["config"], "bass_width": 1}},
        "Expecting value": "not json",
    }
    for text, bad in bad_headers.items():
        write(folder / "bad.safetensors", tensors, bad)
        with pytest.raises(WeightsError, match=text):
            registry.load_network(folder / "bad.safetensors")
    save_file(tensors, folder / "bare.safetensors")
    with pytest.raises(WeightsError, match="weights import"):
        registry.load_network(folder / "bare.safetensors")
    (folder / "text.safetensors").write_text("hello")
    with pytest.raises(WeightsError, match="safetensors file"):
        registry.load_network(folder / "text.safetensors")
    torch.save(classifier.state_dict(), folder / "pickle.safetensors")
    with pytest.raises(WeightsError, match="safetensors file"):
        registry.load_network(folder / "pickle.safetensors")


DEEP = "[" * 100_000
HOSTILE = {
    "nests without end": DEEP,
    "nests deeply": {"config": json.loads("[" * 40 + "]" * 40)},
    "is long": '"' + "x" * 2**20 + '"',
    "a metric no float can hold": {"metrics": {"x": 10**400}},
    "a negative width": {"config": {"base_width": -4}},
    "a width of a petabyte": {"config": {"base_width": 2**22}},
    "a width that overflows": {"config": {"base_width": 10**400}},
    "stages without end": {"config": {"size_px": 0, "base_width": 0, "stages": 2**23}},
    "stages that no machine can count": {"config": {"size_px": 0, "stages": 10**12}},
    "an unknown scheme": {"label_scheme": "nope"},
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_hostile_headers_are_refused_in_one_short_line(folder, classifier, case):
    header, changes = to_dict(registry.read_header(save(folder, classifier))), HOSTILE[case]
    if isinstance(changes, dict):
        config = changes.get("config", {})
        changes = (
            header | changes | {"config": header["config"] | config if isinstance(config, dict) else {"x": config}}
        )
    path = folder / "bad.safetensors"
    write(path, {name: value.numpy() for name, value in classifier.state_dict().items()}, changes)
    for read in (registry.load_network, registry.describe):
        with pytest.raises(WeightsError, match=r"bad\.safetensors") as refusal:
            read(path)
        assert len(str(refusal.value).splitlines()) == 1
        assert len(str(refusal.value)) < 1000


def test_a_networks_own_scheme_that_does_not_exist_is_a_weights_error(folder):
    config = MagGANConfig(size_px=16, base_width=4, max_width=8, encoder_stages=3, stu_units=2)
    path = folder / "g.safetensors"
    registry.save_weights(path, "maggan", config, MagGANGenerator(config).state_dict(), **ORIGIN)
    state = {name: value.numpy() for name, value in MagGANGenerator(config).state_dict().items()}
    header = to_dict(registry.read_header(path))
    write(path, state, header | {"config": header["config"] | {"label_scheme": "nope"}})
    with pytest.raises(WeightsError, match="known label scheme"):
        registry.load_network(path)


@pytest.mark.parametrize("value", ["absent", "file.txt", "n" * 5000], ids=("absent", "a file", "too long"))
def test_a_folder_that_is_none_is_named(tmp_path, monkeypatch, value):
    (tmp_path / "file.txt").touch()
    monkeypatch.setenv(registry.DIRECTORY_VARIABLE, str(tmp_path / value))
    for use in (registry.list_weights, lambda: registry.load_network("parser-starter")):
        with pytest.raises(WeightsError, match=r"FACEEDIT_WEIGHTS must name a folder, got .*; correct it or unset it"):
            use()


def test_files_without_an_index_go_by_their_own_names(tmp_path, classifier, monkeypatch):
    """In the user's folder, which may be written from the home folder on."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(registry.DIRECTORY_VARIABLE, "~/weights")
    folder = tmp_path / "weights"
    folder.mkdir()
    save(folder, classifier, "mine")
    registry.pin_weights("pinned", save(folder, classifier, "other"))
    rows = {row.name: row for row in registry.list_weights() if row.path.parent == folder}
    assert {name: bool(row.sha256) for name, row in rows.items()} == {"mine": False, "pinned": True}
    assert isinstance(registry.load_network("mine"), AttributeClassifier)
    assert not registry.describe("mine")["pinned"]


def test_bad_index_is_named(folder):
    for text in ("[{}]", "7", DEEP):
        (folder / "index.json").write_text(text)
        with pytest.raises(WeightsError, match=r"index\.json"):
            registry.list_weights()


def test_save_refuses_what_cannot_be_stored(folder, classifier):
    with pytest.raises(UsageError, match="Apache"):
        save(folder, classifier, licence="Apache")
    with pytest.raises(WeightsError, match="MagGANConfig"):
        registry.save_weights(folder / "x.safetensors", "maggan", TINY, {}, **ORIGIN)
    with torch.no_grad():
        classifier.logits.weight[0, 0] = 1e6
    with pytest.raises(WeightsError, match=r"logits\.weight must be finite"):
        save(folder, classifier)
    with pytest.raises(WeightsError, match="writable"):
        save(folder / "absent", classifier, half=False)
    assert list(folder.iterdir()) == []


def test_generator_survives_the_round_trip(folder):
    config = MagGANConfig(size_px=16, base_width=4, max_width=8, encoder_stages=3, stu_units=2, output="residual")
    torch.manual_seed(0)
    network = MagGANGenerator(config).eval()
    path = folder / "g.safetensors"
    registry.save_weights(path, "maggan", config, network.state_dict(), label_scheme=config.label_scheme, **ORIGIN)
    loaded = registry.load_network(path)
    assert loaded.config == config
    sample = torch.rand(1, 3, 16, 16), torch.ones(1, 13), torch.rand(1, 19, 16, 16).softmax(1)
    # fp16 weights carry 11 bits.
    torch.testing.assert_close(loaded(*sample), network(*sample), rtol=0, atol=2e-3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.header.licence = "MIT"


def test_devices_are_named_and_refused_as_everywhere() -> None:
    assert next(registry.load_network("parser-starter", "auto").parameters()).device.type in ("cpu", "cuda")
    with pytest.raises(UsageError, match="device must be cpu, cuda, cuda:N or auto, got 'gpu'"):
        registry.load_network("parser-starter", "gpu")
    with pytest.raises(DeviceError, match="device must exist on this machine, got 'cuda:99'"):
        registry.load_network("parser-starter", "cuda:99")
