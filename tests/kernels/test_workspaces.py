# SPDX-License-Identifier: Apache-2.0
"""Ops ask how large a workspace is by the shape alone: the answers are those of the whole call, on a GPU too."""

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import native

if not native.build_report()["cpp"]:
    pytest.skip(f"native module is missing: {native.MISSING_REASON}", allow_module_level=True)

PLACES = {"cpu": native.place(True), "cuda": native.place(False)}
CACHES = {
    "noise_bias_act": ("_workspace_size",),
    "norm_modulate": ("_forward_size", "_backward_size"),
    "masked_mse": ("_workspace_size",),
    "modulated_conv2d_native": ("_epilogue_size", "_style_size"),
}


class Recorder:
    """The compiled module, which compares each call with the question that was asked before it."""

    def __init__(self) -> None:
        self.module, self.asked, self.checked = native.module(), {}, 0  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(target: tuple[int, int, int], **fields: Any) -> Any:
            if name.endswith("_workspace"):
                self.asked[name] = fields
            elif (question := f"{name}_workspace") in dir(self.module):
                whole = {key: value for key, value in fields.items() if key != "workspace"}
                for place in PLACES.values():
                    size, asked = getattr(self.module, question)(place, **whole), self.asked.get(question)
                    # Not asked: the op knows that it is 0.
                    assert size == (0 if asked is None else getattr(self.module, question)(place, **asked)), name
                    self.checked += 1
            return getattr(self.module, name)(target, **fields)

        return call


def _image(*shape: int, last: bool) -> Tensor:
    x = torch.randn(shape)
    return (x.contiguous(memory_format=torch.channels_last) if last else x).requires_grad_()


def _runs(shape: tuple[int, ...], last: bool) -> list[Callable[[], Tensor]]:
    n, c, h, w = shape
    x, y = _image(*shape, last=last), _image(*shape, last=last)
    row, column, noise = torch.randn(n, c).requires_grad_(), torch.randn(c).requires_grad_(), torch.randn(1, 1, h, w)
    strength, weight = torch.tensor(0.5, requires_grad=True), torch.randn(4, c, 3, 3)
    return [
        lambda: kernels.instance_norm_act(x),
        lambda: kernels.adain(x, row, row * 2),
        lambda: kernels.sft(x, y, y * 2),
        lambda: kernels.norm_modulate(x.detach(), row, y, norm="none"),
        lambda: kernels.norm_modulate(x, y, norm="given", mean=column, rstd=column * column),
        lambda: kernels.noise_bias_act(x),
        lambda: kernels.noise_bias_act(x, bias=column),
        lambda: kernels.noise_bias_act(x, row, noise, strength, column),
        lambda: kernels.masked_mse(x, y.detach(), noise.sigmoid()),
        lambda: kernels.modulated_conv2d(x, weight, row),  # type: ignore[list-item, return-value]
        lambda: kernels.modulated_conv2d(x, weight, row.detach(), noise=noise, strength=strength),  # type: ignore[list-item, return-value]
        lambda: kernels.modulated_conv2d(x, weight, row, rgb_weight=torch.randn(3, 4), rgb_styles=row[:, :4])[1],
    ]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(1, 4, 3, 5), (2, 40, 16, 16), (1, 5, 190, 190)], ids=str)
def test_a_size_asked_for_the_shape_is_that_of_the_call(
    shape: tuple[int, ...], last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    monkeypatch.setattr(native, "module", lambda: recorder)
    for run in _runs(shape, last):
        recorder.asked.clear()
        for op, caches in CACHES.items():
            for name in caches:
                getattr(importlib.import_module(f"faceedit.kernels.{op}"), name).cache_clear()
        run().sum().backward()
    assert recorder.checked > 20
