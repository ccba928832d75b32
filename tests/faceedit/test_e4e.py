# SPDX-License-Identifier: Apache-2.0
"""The e4e encoder: both released layouts give the styles of the released formulation, and damage gives one error."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import e4e_original as original

from faceedit import registry
from faceedit.errors import UnknownNameError, WeightsError
from faceedit.importers import import_weights
from faceedit.networks.e4e import E4EConfig, E4EEncoder

TINY = E4EConfig(size_px=32, num_ws=9, w_width=5, base_width=4, blocks=(1, 2, 2, 1), head_width=6)


def image(count: int = 2, side: int = 32) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(8))


def average(rows: int) -> torch.Tensor:
    shape = (5,) if rows == 1 else (rows, 5)
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def official(state: original.State, latent_avg: torch.Tensor) -> dict[str, Any]:
    """e4e_ffhq_encode.pt: the encoder beside a decoder."""
    inside = {f"encoder.{key}": value for key, value in state.items()}
    return {
        "state_dict": inside | {"decoder.input.input": torch.randn(1, 4, 4, 4)},
        "latent_avg": latent_avg,
        "opts": Namespace(encoder_type="Encoder4Editing", start_from_latent_avg=True),
    }


def maskfacegan(state: original.State, latent_avg: torch.Tensor) -> dict[str, Any]:
    """MaskFaceGAN's e4e/state.pt."""
    return {"options": {"stylegan_size": 1024}, "encoder_state_dict": state, "latent_avg": latent_avg}


def imported(content: Any, tmp_path: Path) -> Any:
    torch.save(content, tmp_path / "e4e.pt")
    import_weights("e4e", tmp_path / "e4e.pt", tmp_path / "out.safetensors")
    return registry.load_network(tmp_path / "out.safetensors")


@pytest.mark.parametrize("layout", [official, maskfacegan])
@pytest.mark.parametrize("rows", [1, 9])
def test_imported_encoders_give_the_originals_styles(layout: Any, rows: int, tmp_path: Path) -> None:
    state = original.encoder_state()
    encoder = imported(layout(state, average(rows)), tmp_path)
    assert encoder.config == TINY
    theirs = original.encode(state, average(rows), image())
    assert theirs.std() > 0.1
    with torch.no_grad():
        torch.testing.assert_close(encoder(image()), theirs, rtol=0, atol=1e-4)


def test_default_configuration_has_the_released_names_and_shapes() -> None:
    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in E4EEncoder(E4EConfig()).state_dict().items()}
    assert {name.split(".")[1] for name in shapes if name.startswith("body.")} == {str(block) for block in range(24)}
    changes = {name for name in shapes if name.endswith("shortcut_layer.0.weight")}
    assert changes == {f"body.{block}.shortcut_layer.0.weight" for block in (3, 7, 21)}
    for name, shape in {
        "input_layer.0.weight": (64, 3, 3, 3),
        "body.6.res_layer.5.fc1.weight": (8, 128, 1, 1),
        "body.20.res_layer.3.weight": (256, 256, 3, 3),
        "body.23.res_layer.2.weight": (512,),
        "latlayer1.weight": (512, 256, 1, 1),
        "latlayer2.weight": (512, 128, 1, 1),
        "styles.17.linear.weight": (512, 512),
        "average": (18, 512),
    }.items():
        assert shapes[name] == shape, name
    for style, last in ((0, 6), (2, 6), (3, 8), (6, 8), (7, 10), (17, 10)):
        convs = [name for name in shapes if name.startswith(f"styles.{style}.convs.") and name.endswith("weight")]
        assert convs[-1] == f"styles.{style}.convs.{last}.weight"
        assert len(convs) == last // 2 + 1


def test_stages_add_differences_from_coarse_to_fine() -> None:
    torch.manual_seed(0)
    encoder = E4EEncoder(TINY).eval()
    encoder.average.copy_(average(9))
    with torch.no_grad():
        whole, none, some = encoder(image()), encoder(image(), stage=0), encoder(image(), stage=4)
    base = none - encoder.average
    torch.testing.assert_close(base, base[:, :1].expand(-1, 9, -1))
    torch.testing.assert_close(some[:, :5], whole[:, :5])
    torch.testing.assert_close(some[:, 5:], none[:, 5:])
    assert (whole[:, 1:] - none[:, 1:]).abs().amax((0, 2)).min() > 1e-3
    with torch.no_grad():
        assert torch.equal(encoder(image(), stage=99), whole)


def test_images_of_other_sizes_are_resized_by_encode_alone() -> None:
    torch.manual_seed(0)
    encoder = E4EEncoder(TINY).eval()
    large = image(side=64)
    with torch.no_grad():
        shrunk = torch.nn.functional.avg_pool2d(large, 2)
        torch.testing.assert_close(encoder.encode(large), encoder(shrunk), rtol=1e-4, atol=1e-5)
        assert encoder.encode(image(side=16)).shape == (2, 9, 5)
    with pytest.raises(ValueError, match=r"E4EEncoder: image must be \(N,3,32,32\), got \(2, 3, 64, 64\)"):
        encoder(large)


def damaged(content: dict[str, Any], change: str) -> dict[str, Any]:
    state = content["encoder_state_dict"]
    if change == "a missing tensor":
        del state["latlayer2.bias"]
    elif change == "a missing style":
        for key in [key for key in state if key.startswith("styles.4.")]:
            del state[key]
    elif change == "a surplus tensor":
        state["surprise"] = torch.ones(2)
    elif change == "another shape":
        state["body.2.res_layer.1.weight"] = torch.ones(2, 2, 3, 3)
    elif change == "no average":
        del content["latent_avg"]
    elif change == "another average":
        content["latent_avg"] = torch.ones(3, 5)
    elif change == "another network":
        content["encoder_state_dict"] = {"conv.weight": torch.ones(1)}
    else:
        content = {"weights": state}
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("a missing tensor", r"must hold latlayer2\.bias, got none"),
        ("a missing style", "must number styles from 0 on without gaps"),
        ("a surplus tensor", "must hold nothing but an e4e encoder, got surprise"),
        ("another shape", r"body\.2\.res_layer\.1\.weight of e4e\.pt must have the shape \(8,8,3,3\)"),
        ("no average", "must hold latent_avg, got NoneType"),
        ("another average", r"latent_avg of e4e\.pt must be \(5\) or \(9,5\), got \(3,5\)"),
        ("another network", r"must hold an e4e encoder, got tensors like conv\.weight"),
        ("another layout", "must hold encoder_state_dict, or state_dict with names in encoder"),
    ],
)
def test_damaged_files_are_refused(change: str, message: str, tmp_path: Path) -> None:
    content = damaged(maskfacegan(original.encoder_state(), average(1)), change)
    with pytest.raises(WeightsError, match=message):
        imported(content, tmp_path)
    assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("as_mapping", [True, False])
def test_encoders_of_other_kinds_are_refused_by_what_they_say(as_mapping: bool, tmp_path: Path) -> None:
    """pSp's has the tensors of e4e's, but each style is its own and no difference from the first."""
    options = {"encoder_type": "GradualStyleEncoder", "start_from_latent_avg": True}
    content = official(original.encoder_state(), average(1))
    content["opts"] = options if as_mapping else Namespace(**options)
    with pytest.raises(WeightsError, match=r"e4e\.pt must be Encoder4Editing, got 'GradualStyleEncoder'"):
        imported(content, tmp_path)


def test_an_encoder_that_does_not_start_from_the_average_keeps_none(tmp_path: Path) -> None:
    state = original.encoder_state()
    content = official(state, average(1))
    content["opts"] = {"encoder_type": "Encoder4Editing", "start_from_latent_avg": False}
    encoder = imported(content, tmp_path)
    assert not encoder.average.any()
    with torch.no_grad():
        theirs = original.encode(state, torch.zeros(5), image())
        torch.testing.assert_close(encoder(image()), theirs, rtol=0, atol=1e-4)


def test_there_is_one_part(tmp_path: Path) -> None:
    torch.save(official(original.encoder_state(), average(1)), tmp_path / "e4e.pt")
    with pytest.raises(UnknownNameError, match="part must be left out for e4e, got 'decoder'"):
        import_weights("e4e", tmp_path / "e4e.pt", tmp_path / "out.safetensors", part="decoder")
    header = import_weights("e4e", tmp_path / "e4e.pt", tmp_path / "out.safetensors")
    assert (header.kind, header.recipe) == ("e4e", "weights import e4e: the encoder of an official e4e file")


@pytest.mark.parametrize("fields", [{"size_px": 48}, {"size_px": 16}, {"blocks": (1, 1, 0, 1)}, {"base_width": 0}])
def test_impossible_configurations_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="E4EConfig"):
        E4EConfig(**fields)
