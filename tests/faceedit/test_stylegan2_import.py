# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the two public families give the images of their own formulation, and hostile files give one error."""

from __future__ import annotations

import argparse
import os
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from support import stylegan2_originals as originals
from support.command_line import Run

from faceedit import registry
from faceedit.errors import UnknownNameError, UsageError, WeightsError
from faceedit.importers import import_weights
from faceedit.importers.checkpoints import flatten, read_checkpoint
from faceedit.importers.stylegan2 import convert
from faceedit.networks.stylegan2 import StyleGAN2Config, StyleGAN2Discriminator, StyleGAN2Generator

WIDTHS = (9, 8, 7, 6, 5)  # 4 to 64 px
Z = 7


def latents(width: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(5))


def faces(count: int, size_px: int) -> torch.Tensor:
    """Noise, each image stronger than the last, so that random critics tell them apart."""
    return torch.randn(count, 3, size_px, size_px) * torch.arange(1.0, 1 + count)[:, None, None, None] * 4


def imported(path: Path, tmp_path: Path, **options) -> torch.nn.Module:
    import_weights("stylegan2", path, tmp_path / "out.safetensors", **options)
    return registry.load_network(tmp_path / "out.safetensors")


def same(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


def varied(ws: torch.Tensor) -> torch.Tensor:
    """Another w for every layer, so that one taken for another shows."""
    return ws + torch.randn(ws.shape, generator=torch.Generator().manual_seed(6)) * 0.3


# Parity


@pytest.mark.parametrize("layout", ["pickle", "pt", "pt-nested", "safetensors", "safetensors-prefixed"])
@pytest.mark.parametrize("levels", [2, 5])
def test_nvlabs_images(layout: str, levels: int, tmp_path: Path) -> None:
    state = originals.nvlabs_generator(WIDTHS[:levels])
    other = originals.nvlabs_generator(WIDTHS[:levels], seed=1)
    path = tmp_path / f"net.{layout.partition('-')[0]}"
    if layout == "pickle":
        ema, last = (originals.persistent(s, "raise SystemExit('ran')") for s in (state, other))
        originals.write_nvlabs_pickle(path, {"G": last, "D": None, "G_ema": ema, "augment_pipe": None})
    elif layout.startswith("pt"):
        torch.save({"G": other, "G_ema": state} if layout == "pt-nested" else state, path)
    else:
        prefix = "G_ema." if layout == "safetensors-prefixed" else ""
        save_file({prefix + key: value for key, value in state.items()}, path)
    network = imported(path, tmp_path)
    assert isinstance(network, StyleGAN2Generator)
    assert network.config == StyleGAN2Config(
        size_px=2 << levels, channels=WIDTHS[:levels], z_width=Z, w_width=6, mapping_layers=2
    )
    z = latents(Z)
    w = originals.nvlabs_ws(state, z)
    ws = network.mapping(z)
    torch.testing.assert_close(ws, w[:, None].expand_as(ws), rtol=0, atol=1e-5)
    truncated = torch.lerp(state["mapping.w_avg"], w, 0.5)
    torch.testing.assert_close(network.mapping(z, truncation=0.5)[:, 3], truncated, rtol=0, atol=1e-5)
    ws = varied(ws)
    same(network.synthesis(ws), originals.nvlabs_images(state, ws))


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_nvlabs_settings_and_variants(architecture: str, tmp_path: Path) -> None:
    state = originals.nvlabs_generator(WIDTHS[:3], architecture=architecture, taps=(1.0, 2.0, 4.0, 1.0))
    settings = {
        "synthesis.b4.conv1.conv_clamp": 1.5,
        "synthesis.b4.conv1.activation": "lrelu",
        "synthesis.b4.conv1.act_gain": np.sqrt(2),
        "synthesis.b4.use_fp16": np.float32(0.5),
        "mapping.fc0.bias_gain": 0.02,
    }
    originals.write_nvlabs_pickle(tmp_path / "net.pkl", {"G": originals.persistent(state, "1/0", settings)})
    network = imported(tmp_path / "net.pkl", tmp_path)
    assert network.config.architecture == architecture
    assert (network.config.clamp, network.config.mapping_rate) == (1.5, 0.02)
    z = latents(Z)
    torch.testing.assert_close(network.mapping.w(z), originals.nvlabs_ws(state, z, 0.02), rtol=0, atol=1e-5)
    ws = varied(network.mapping(z))
    image = originals.nvlabs_images(state, ws, clamp=1.5)
    same(network.synthesis(ws), image)
    assert (image - originals.nvlabs_images(state, ws)).abs().max() > 0.1  # the clamp was reached


@pytest.mark.parametrize("levels", [2, 3, 5])
def test_rosinality_images(levels: int, tmp_path: Path) -> None:
    state, average = originals.rosinality_generator(WIDTHS[:levels]), torch.randn(6)
    torch.save({"g_ema": state, "latent_avg": average}, tmp_path / "net.pt")
    network = imported(tmp_path / "net.pt", tmp_path)
    assert network.config.size_px == 2 << levels
    assert torch.equal(network.mapping.average, average)
    z = latents(6)
    torch.testing.assert_close(network.mapping.w(z), originals.rosinality_w(state, z), rtol=0, atol=1e-5)
    ws = varied(network.mapping(z))
    same(network.synthesis(ws), originals.rosinality_images(state, ws))


def test_config_f_widths_are_recognised(tmp_path: Path) -> None:
    state = originals.rosinality_generator((512, 512), w=512, layers=1)
    torch.save({"g_ema": state, "latent_avg": torch.zeros(512)}, tmp_path / "net.pt")
    converted = convert(read_checkpoint(tmp_path / "net.pt"))
    assert converted.config == StyleGAN2Config(size_px=8, mapping_layers=1)


def test_rosinality_training_file(tmp_path: Path) -> None:
    """Three networks, an optimiser and a command line inside; no average of w."""
    weight = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.Adam([weight])
    weight.square().sum().backward()
    optimiser.step()
    generator, averaged = (originals.rosinality_generator(WIDTHS[:2], seed=seed) for seed in (0, 1))
    critic = originals.rosinality_discriminator(WIDTHS[:2])
    content = {"g": generator, "d": critic, "g_ema": averaged, "g_optim": optimiser.state_dict()}
    for is_zip in (True, False):
        path = tmp_path / "550000.pt"
        arguments = argparse.Namespace(size=8)
        torch.save({**content, "args": arguments}, path, _use_new_zipfile_serialization=is_zip)
        network = imported(path, tmp_path)
        assert "estimated" in network.header.recipe
        expected = originals.rosinality_w(averaged, torch.randn(20_000, 6)).mean(0)
        torch.testing.assert_close(network.mapping.average, expected, rtol=0, atol=0.1)
        ws = network.mapping(latents(6))
        same(network.synthesis(ws), originals.rosinality_images(averaged, ws))
        network = imported(path, tmp_path, part="generator")
        ws = network.mapping(latents(6))
        same(network.synthesis(ws), originals.rosinality_images(generator, ws))
        network = imported(path, tmp_path, part="discriminator")
        image = faces(4, 8)
        same(network(image), originals.rosinality_logits(critic, image))


@pytest.mark.parametrize("architecture", ["resnet", "skip", "orig"])
def test_nvlabs_discriminator(architecture: str, tmp_path: Path) -> None:
    state = originals.nvlabs_discriminator(WIDTHS[:4], architecture)
    critic = originals.persistent(state, "", {"b4.mbstd.group_size": 2})
    originals.write_nvlabs_pickle(tmp_path / "net.pkl", {"D": critic, "G_ema": None})
    network = imported(tmp_path / "net.pkl", tmp_path, part="discriminator")
    assert isinstance(network, StyleGAN2Discriminator)
    assert (network.config.group_size, network.config.architecture) == (2, architecture)
    image = faces(6, 32)
    same(network(image), originals.nvlabs_logits(state, image, group_size=2))


# The command


def test_import_command(run: Run, tmp_path: Path) -> None:
    state = originals.nvlabs_generator(WIDTHS[:2])
    originals.write_nvlabs_pickle(tmp_path / "net.pkl", {"G_ema": originals.persistent(state, "")})
    out = tmp_path / "net.safetensors"
    options = ("--licence", "LicenseRef-NVIDIA-Source-Code-NC", "--training-data", "FFHQ")
    outcome = run("weights", "import", "stylegan2", tmp_path / "net.pkl", "-o", out, *options)
    assert outcome.code == 0, outcome.err
    assert outcome.out == f"{out}: stylegan2, 8 px, from G_ema of an NVlabs checkpoint\n"
    shown = run("weights", "show", out, "--json").json()
    assert shown["kind"] == "stylegan2"
    assert shown["config"]["channels"] == [9, 8]
    assert (shown["licence"], shown["training_data"]) == ("LicenseRef-NVIDIA-Source-Code-NC", "FFHQ")
    assert "net.pkl (SHA-256 " in shown["source"]
    assert "'size_px': 8" in run("weights", "show", out).out
    again = run("weights", "import", "stylegan2", tmp_path / "net.pkl", "-o", out, "--json")
    assert again.json()["config"]["size_px"] == 8
    for arguments, code, words in (
        (("stylegan3", tmp_path / "net.pkl", "-o", out), 2, "stylegan2"),
        (("stylegan2", tmp_path / "net.pkl", "-o", out, "--part", "emma"), 2, "ema"),
        (("stylegan2", tmp_path / "absent.pkl", "-o", out), 1, "absent.pkl"),
        (("stylegan2", tmp_path, "-o", out), 1, "readable"),
        (("stylegan2", tmp_path / "net.pkl", "-o", tmp_path / "net.pt"), 1, ".safetensors"),
        (("stylegan2", tmp_path / "net.pkl", "-o", out, "--licence", "MTI"), 2, "MIT"),
    ):
        run("weights", "import", *arguments).refused(code, words)


# Bad files


class Malicious:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def refused(path: Path, tmp_path: Path, match: str, part: str = "") -> None:
    out = tmp_path / "refused.safetensors"
    with pytest.raises(WeightsError, match=match) as caught:
        import_weights("stylegan2", path, out, part=part)
    assert "\n" not in str(caught.value)
    assert not out.exists()


@pytest.mark.parametrize("form", ["pickle", "zip", "legacy"])
def test_tampered_files_run_nothing(form: str, tmp_path: Path) -> None:
    path, trace = tmp_path / "net.pkl", tmp_path / "it-ran"
    state = originals.nvlabs_generator(WIDTHS[:2]) | {"mapping.fc0.weight": Malicious(trace)}
    if form == "pickle":
        content = originals.persistent({}, "", {"settings": Malicious(trace)})
        originals.write_nvlabs_pickle(path, {"G_ema": content})
    else:
        torch.save({"G_ema": state}, path, _use_new_zipfile_serialization=form == "zip")
    refused(path, tmp_path, r"got (posix|nt)\.system; nothing of it was run")
    assert not trace.exists()
    pickle.loads(pickle.dumps(Malicious(trace)))  # it does work where it is let through
    assert trace.exists()


def test_a_storage_inside_a_pickle_is_not_trusted(tmp_path: Path) -> None:
    trace = tmp_path / "it-ran"
    inner = tmp_path / "inner.pt"
    torch.save(Malicious(trace), inner)

    class Smuggled:
        def __reduce__(self):
            return torch.storage._load_from_bytes, (inner.read_bytes(),)

    (tmp_path / "net.pkl").write_bytes(pickle.dumps({"G_ema": Smuggled()}))
    refused(tmp_path / "net.pkl", tmp_path, "system|whole checkpoint")
    assert not trace.exists()


NAMES = (
    "builtins.eval",
    "builtins.getattr",
    "builtins.__import__",
    "os.system",
    "torch.load",
    "torch.hub.load",
    "torch._utils._rebuild_tensor_v2.__globals__",
    "collections.OrderedDict.fromkeys",
    "numpy.load",
    "faceedit.importers.checkpoints.Record",
    "training.networks.Generator",
)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_other_name_is_refused(name: str, protocol: int, tmp_path: Path) -> None:
    module, _, attribute = name.rpartition(".")
    if protocol == 2:
        data = b"\x80\x02c" + f"{module}\n{attribute}\n".encode() + b"."
    else:
        texts = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, attribute))
        data = b"\x80\x04" + texts + b"\x93."
    (tmp_path / "net.pkl").write_bytes(data)
    before = set(sys.modules)
    refused(tmp_path / "net.pkl", tmp_path, f"got {name};")
    assert "training" not in set(sys.modules) - before


def test_a_pickle_cannot_change_what_it_may_call(tmp_path: Path) -> None:
    """BUILD sets attributes of the object on the stack; allowed functions and classes must not take them."""
    for module, name in (
        ("torch._utils", "_rebuild_tensor_v2"),
        ("torch_utils.persistence", "_reconstruct_persistent_obj"),
        ("collections", "OrderedDict"),
        ("numpy", "dtype"),
    ):
        for state in (b"}\x8c\x01aK\x01s", b"N}\x8c\x01aK\x01s\x86"):
            data = b"\x80\x04c" + f"{module}\n{name}\n".encode() + state + b"b."
            (tmp_path / "net.pkl").write_bytes(data)
            refused(tmp_path / "net.pkl", tmp_path, "whole checkpoint")


def test_a_tensor_stays_within_its_storage(tmp_path: Path) -> None:
    class Outside:
        def __init__(self, *layout):
            self.layout = layout

        def __reduce__(self):
            storage = torch.zeros(4)._typed_storage()
            return torch._utils._rebuild_tensor_v2, (storage, *self.layout, False, None)

    for layout in ((0, (100,), (1,)), (3, (2,), (1,)), (-1, (2,), (1,)), (0, (2, 2), (2,)), (0, (2,), (-1,))):
        (tmp_path / "net.pkl").write_bytes(pickle.dumps({"a": Outside(*layout)}))
        refused(tmp_path / "net.pkl", tmp_path, "whole checkpoint")


@pytest.mark.parametrize(
    ("shape", "words"), [("deep", "nested at most"), ("wide", "fewer than"), ("endless", "nested")]
)
def test_a_small_file_cannot_claim_endless_contents(shape: str, words: str, tmp_path: Path) -> None:
    content: dict = {"weight": torch.zeros(2), "n": 1}
    if shape == "endless":
        content["again"] = content
    else:
        for _ in range(60 if shape == "deep" else 18):
            content = {"a": content} if shape == "deep" else {"a": content, "b": content}
    with pytest.raises(WeightsError, match=words):
        flatten("G_ema", content)


def test_a_number_cannot_take_all_memory(tmp_path: Path) -> None:
    for put in (b"r\xff\xff\xff\x7f", b"p2147483647\n", b"q\x09"):
        (tmp_path / "net.pkl").write_bytes(b"\x80\x03}" + put + b".")
        refused(tmp_path / "net.pkl", tmp_path, "numbered beyond the last one")


@pytest.mark.parametrize("form", ["pkl", "zip", "legacy"])
def test_damaged_bytes_end_in_one_error(form: str, tmp_path: Path) -> None:
    path, state = tmp_path / "net", originals.nvlabs_generator((2, 2))
    if form == "pkl":
        originals.write_nvlabs_pickle(path, {"G_ema": originals.persistent(state, "", {"gain": np.sqrt(2)})})
    else:
        torch.save({"G_ema": state}, path, _use_new_zipfile_serialization=form == "zip")
    whole, draw, refusals = path.read_bytes(), random.Random(0), []
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(draw.choice((1, 3, 9))):
            damaged[draw.randrange(len(damaged))] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            convert(read_checkpoint(path))  # values may change unnoticed in a pickle, which has no checksum
        except WeightsError as error:
            refusals.append(str(error))
    assert len(refusals) > 10
    assert not any("\n" in message for message in refusals)


@pytest.mark.parametrize("form", ["pkl", "pt", "safetensors"])
def test_truncated_and_foreign_files(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"net.{form}"
    state = originals.nvlabs_generator(WIDTHS[:2])
    if form == "pkl":
        originals.write_nvlabs_pickle(path, {"G_ema": originals.persistent(state, "")})
    elif form == "pt":
        torch.save(state, path)
    else:
        save_file(state, path)
    whole = path.read_bytes()
    for size in (len(whole) // 2, len(whole) - 9, 40):
        path.write_bytes(whole[:size])
        refused(path, tmp_path, rf"net\.{form} must be a whole")
    for content in (b"", b"hello, this is text\n", b"\x89PNG\r\n\x1a\n" * 9):
        path.write_bytes(content)
        refused(path, tmp_path, rf"net\.{form} must be a whole")


def test_what_is_wrong_with_a_network_is_named(tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    ada, rosinality = originals.nvlabs_generator(WIDTHS[:3]), originals.rosinality_generator(WIDTHS[:3])
    critic = originals.nvlabs_discriminator(WIDTHS[:3])
    without = {key: value for key, value in ada.items() if not key.startswith("synthesis.b8.")}
    cases = [
        ("must hold synthesis.b8.conv0.noise_strength", ada, "synthesis.b8.conv0.noise_strength", None),
        ("must hold mapping.w_avg", ada, "mapping.w_avg", None),
        ("must hold noises.noise_3", rosinality, "noises.noise_3", None),
        ("must hold convs.1.conv.weight", rosinality, "convs.1.conv.weight", None),
        ("must hold b8.conv1.bias", critic, "b8.conv1.bias", None),
        (r"noise_const of net.pt must have the shape \(1,1,16,16\) at 16 px, got \(32,32\)", ada,
         "synthesis.b16.conv1.noise_const", torch.zeros(32, 32)),
        ("torgb.weight of net.pt must have the shape", ada, "synthesis.b4.torgb.weight", torch.zeros(1, 9, 1, 1)),
        ("must be unconditional", ada, "mapping.embed.weight", torch.zeros(6, 10)),
        ("must be unconditional", critic, "mapping.fc0.weight", torch.zeros(6, 10)),
        ("nothing but a StyleGAN2 network, got synthesis.b8.extra", ada, "synthesis.b8.extra", torch.zeros(1)),
        ("must have blocks 4, 8, 16", ada, "synthesis.b64.conv1.weight", torch.zeros(3, 3, 3, 3)),
        ("separable filter of 4 taps", ada, "synthesis.b8.conv0.resample_filter", torch.eye(4)),
        ("plain tensor of floats", ada, "synthesis.b4.const", torch.zeros(1).expand(9, 4, 4)),
        ("plain tensor of floats", ada, "mapping.w_avg", torch.zeros(6, dtype=torch.int64)),
        ("conv1.weight of net.pt must be a layer's weight", ada, "synthesis.b4.conv1.weight", torch.zeros(())),
        ("finite", ada, "synthesis.b4.conv1.bias", torch.full((9,), torch.nan)),
    ]  # fmt: skip
    for match, state, key, value in cases:
        changed = {k: v for k, v in state.items() if k != key} | ({} if value is None else {key: value})
        # The filter is read from the first buffer that holds it.
        torch.save({key: changed.pop(key), **changed} if value is not None else changed, path)
        refused(path, tmp_path, match)
    for match, content in (
        ("must have blocks", without),
        ("must be of 8 to 1024 px", originals.nvlabs_generator(WIDTHS[:1])),
        ("must be of 8 to 1024 px", originals.nvlabs_generator((1,) * 10)),
        ("must be of 8 to 1024 px", originals.rosinality_generator((1,) * 10)),
        ("must hold the generator, got D", {"D": critic}),
        ("must hold a StyleGAN2 network, got tensors like fc.weight", {"fc.weight": torch.zeros(1)}),
        ("must hold a StyleGAN2 network, got a StyleGAN3 generator", {"synthesis.input.freqs": torch.zeros(1)}),
        ("must hold named networks or tensors, got Tensor", torch.zeros(3)),
        ("must hold a network's tensors, got none", {"G_ema": {"epoch": 3}}),
    ):
        torch.save(content, path)
        refused(path, tmp_path, match)
    torch.save({"G_ema": ada}, path)
    refused(path, tmp_path, "must hold the discriminator, got G_ema", part="discriminator")


def test_a_part_is_what_an_undivided_file_holds(tmp_path: Path) -> None:
    """Whether a generator is an average, such a file does not say."""
    path = tmp_path / "net.pt"
    generator, critic = originals.nvlabs_generator(WIDTHS[:2]), originals.nvlabs_discriminator(WIDTHS[:2])
    for state, part, found in (
        (generator, "discriminator", "stylegan2"),
        (originals.rosinality_generator(WIDTHS[:2]), "discriminator", "stylegan2"),
        (critic, "ema", "stylegan2-discriminator"),
        (critic, "generator", "stylegan2-discriminator"),
    ):
        torch.save(state, path)
        refused(path, tmp_path, f"must hold the {part}, got a {found};", part=part)
    assert isinstance(imported(path, tmp_path, part="discriminator"), StyleGAN2Discriminator)
    torch.save(generator, path)
    assert all(isinstance(imported(path, tmp_path, part=part), StyleGAN2Generator) for part in ("ema", "generator"))


@pytest.mark.parametrize("part", ["generator", "discriminator"])
def test_a_file_that_is_converted_already_says_so(part: str, tmp_path: Path) -> None:
    path = tmp_path / "net.pt"
    torch.save({"G": originals.nvlabs_generator(WIDTHS[:2]), "D": originals.nvlabs_discriminator(WIDTHS[:2])}, path)
    import_weights("stylegan2", path, tmp_path / "ours.safetensors", part=part)
    refused(tmp_path / "ours.safetensors", tmp_path, "got one that is converted already; use it as it is")


def test_settings_that_cannot_be(tmp_path: Path) -> None:
    state, path = originals.nvlabs_generator(WIDTHS[:2]), tmp_path / "net.pkl"
    for match, settings in (
        ("bias_gain of net.pkl must be a positive number, got 'much'", {"mapping.fc0.bias_gain": "much"}),
        ("conv_clamp of net.pkl must be a positive number, got -1", {"synthesis.b4.conv1.conv_clamp": -1}),
        ("activation of net.pkl must be lrelu, got 'swish'", {"synthesis.b4.conv1.activation": "swish"}),
    ):
        originals.write_nvlabs_pickle(path, {"G_ema": originals.persistent(state, "", settings)})
        refused(path, tmp_path, match)


def test_tensorflow_pickles_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "net.pkl").write_bytes(b"\x80\x02cdnnlib.tflib.network\nNetwork\n.")
    refused(tmp_path / "net.pkl", tmp_path, "got dnnlib.tflib.network.Network of TensorFlow")


def test_unknown_kind_part_and_licence(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="did you mean stylegan2"):
        import_weights("stylegan", tmp_path / "x", tmp_path / "y.safetensors")
    with pytest.raises(UnknownNameError, match="discriminator"):
        import_weights("stylegan2", tmp_path / "x", tmp_path / "y.safetensors", part="discrimnator")
    torch.save(originals.nvlabs_generator(WIDTHS[:2]), tmp_path / "net.pt")
    with pytest.raises(UsageError, match="licence"):
        import_weights("stylegan2", tmp_path / "net.pt", tmp_path / "y.safetensors", licence="none")
