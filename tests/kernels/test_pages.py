# SPDX-License-Identifier: Apache-2.0
"""What the pages of docs/kernels say of defaults, dtypes and export, held against the code."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from faceedit import kernels

FOLDER = Path(__file__).parents[2] / "docs" / "kernels"

# The functions that a page's table of arguments speaks of.
TABLES: dict[str, tuple[Callable[..., Any], ...]] = {
    "fir_epilogue": (kernels.fir_epilogue,),
    "gates": (kernels.gru_gate, kernels.reset_gate),
    "masked_mse": (kernels.masked_mse,),
    "modulated_conv2d": (kernels.modulated_conv2d,),
    "noise_bias_act": (kernels.noise_bias_act,),
    "noise_regularizer": (kernels.noise_regularizer,),
    "norm_modulate": (kernels.norm_modulate,),
    "upfirdn2d": (kernels.upfirdn2d,),
}
# What None and a negative clamp stand for, where a page says so in place of "none".
MEANT = {"strength": "1", "fir": "[1, 3, 3, 1] / 8"}
NUMBERS = {"√2": 2**0.5}


def rows(page: str, *header: str) -> list[list[str]]:
    """The cells of the one table of a page whose head has these columns."""
    table = re.search(rf"^\| {re.escape(' | '.join(header))} \|\n\|[-|]+\|\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert table is not None, header
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[1].splitlines()]


def is_default(name: str, said: str, default: Any) -> bool:
    if default is inspect.Parameter.empty:
        return said == ""
    if default is None:
        return said in ("none", MEANT.get(name))
    if isinstance(default, bool):
        return said.lower() == str(default).lower()
    if isinstance(default, str):
        return said == default
    if name == "clamp" and default < 0:
        return said == "none"
    return said != "" and said != "none" and math.isclose(NUMBERS.get(said) or float(said), default)


@pytest.mark.parametrize("stem", TABLES)
def test_a_table_has_every_argument_and_its_default(stem: str) -> None:
    page = (FOLDER / f"{stem}.md").read_text()
    second = next(word for word in ("values", "shape") if f"| argument | {word} | default |" in page)
    said: dict[str, str] = {}
    for names, _, default in rows(page, "argument", second, "default"):
        arguments = re.findall(r"`(\w+)`", names)
        values = re.split(r", (?![^\[]*\])", default)
        said |= dict(zip(arguments, values if len(values) > 1 else values * len(arguments), strict=True))
    parameters = [item for function in TABLES[stem] for item in inspect.signature(function).parameters.items()]
    assert set(said) == {name for name, _ in parameters}
    for name, parameter in parameters:
        assert is_default(name, said[name], parameter.default), f"{name}: {said[name]!r}, not {parameter.default!r}"


def test_the_names_of_norm_modulate_have_the_defaults_of_their_table() -> None:
    page, head = (FOLDER / "norm_modulate.md").read_text(), ("`norm`", "`one_plus`", "`act`")
    table = {cells[0].strip("`"): cells[1:] for cells in rows(page, "function", *head, "gamma and beta are called")}
    assert set(table) == {"norm_modulate", "instance_norm_act", "adain", "sft", "spade"}
    x, gamma, beta = torch.randn(3, 2, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    for function, (norm, one_plus, act, names) in table.items():
        call = getattr(kernels, function)
        settings = {"norm": norm.split(",")[0], "one_plus": one_plus.startswith("true"), "act": act}
        torch.testing.assert_close(call(x, gamma, beta), kernels.norm_modulate(x, gamma, beta, **settings))
        parameters = inspect.signature(call).parameters
        assert ("one_plus" in parameters) is not one_plus.endswith("fixed"), function
        assert list(parameters)[1:3] == re.findall(r"`(\w+)`", names), function
        can_lack_them = parameters[list(parameters)[1]].default is None
        assert can_lack_them is names.endswith("may be left out"), function


ONE = [0.1, 0.7, 0.3, 0.9, 0.2, 0.6, 0.4, 0.8, 0.5]


def _image(dtype: torch.dtype) -> Tensor:
    return torch.tensor(ONE, dtype=torch.float64).to(dtype).reshape(1, 1, 3, 3)


WIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "alpha_blend": lambda x: kernels.alpha_blend(x, x.square(), x.sqrt()),
    "attribute_maps": lambda x: kernels.attribute_maps(x[0, :, :1, 0] / 3, x, x[0, 0, :1, :1]),
    "fir_epilogue": lambda x: kernels.fir_epilogue(x, x[0, 0] / 3, bias=x[0, 0, 0, :1]),
    "gates": lambda x: kernels.gru_gate(x, x.sqrt(), x / 3),
    "kl": lambda x: kernels.bernoulli_kl(x[0, 0], x[0, 0].square()) + kernels.gaussian_kl(x[0, 0], x[0, 0] / 3),
    "masked_mse": lambda x: kernels.masked_mse(x, x.sqrt(), x),
    "noise_bias_act": lambda x: kernels.noise_bias_act(x, bias=x[0, 0, 0, :1] / 3),
    "norm_modulate": kernels.norm_modulate,
    "upfirdn2d": lambda x: kernels.upfirdn2d(x, x[0, 0] / 3),
}


@pytest.mark.parametrize("stem", WIDE)
def test_arithmetic_and_losses_are_fp64_for_fp64(stem: str) -> None:
    single, double = WIDE[stem](_image(torch.float32)), WIDE[stem](_image(torch.float64))
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    assert not torch.equal(double.float().double(), double), "computed in fp32"
    torch.testing.assert_close(single.double(), double, rtol=1e-5, atol=1e-6)
    page = " ".join((FOLDER / f"{stem}.md").read_text().split())
    said = re.findall(r"(?:arithmetic (?:is|are)|returns \(N\) in|result \(N\),) fp32(.{0,6})", page, re.IGNORECASE)
    assert said == [" (fp64"], "where x is fp64, or for fp64"


@pytest.mark.slow
def test_the_code_of_the_overview_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(module)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", (FOLDER / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    assert any("decomposition_table" in block for block in blocks)
    assert any("backends_report" in block and "last_backend" in block for block in blocks)
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(block, scope)
    assert (tmp_path / "layer.onnx").is_file()
