# SPDX-License-Identifier: Apache-2.0
"""A call goes straight to an op's body where nothing watches, and through PyTorch's dispatcher where something does."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from faceedit import kernels
from faceedit.kernels import direct


def _image(**options: Any) -> Tensor:
    return torch.arange(24.0).reshape(1, 2, 3, 4).sub(11.5).requires_grad_(options.get("grad", False))


def _act(x: Tensor) -> Tensor:
    return kernels.noise_bias_act(x, bias=torch.ones(2, device=x.device), act="lrelu")


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The ways that calls of ops took, in order."""
    taken: list[str] = []

    def way(arguments: tuple[Any, ...]) -> str:
        taken.append(direct.way(arguments))
        return taken[-1]

    monkeypatch.setattr("faceedit.kernels.operator.way", way)
    return taken


def test_plain_tensors_go_straight_and_a_wanted_gradient_is_recorded(ways: list[str]) -> None:
    x = _image(grad=True)
    _act(_image())
    y = _act(x)
    y.sum().backward()  # the backward op is called with grad mode off
    with torch.no_grad():
        _act(x)
    with torch.inference_mode():
        _act(torch.ones(1, 2, 2, 2))
    _act(torch.nn.Parameter(_image()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _act(x)
    assert ways == ["plain", "recorded", "plain", "plain", "plain", "recorded", "recorded"]
    assert not _act(_image()).requires_grad


def test_lists_of_tensors_go_straight_unless_one_requires_grad(ways: list[str]) -> None:
    maps = [torch.randn(1, 1, 16, 16), torch.randn(1, 1, 8, 8)]
    kernels.noise_regularizer(maps)
    maps[1].requires_grad_()
    kernels.noise_regularizer(maps).sum().backward()
    assert ways == ["plain", "dispatched", "plain"]
    assert maps[1].grad is not None
    features, centres = torch.randn(1, 3, 8, 8, requires_grad=True), torch.tensor([[[4, 4]]], dtype=torch.int32)
    kernels.place_components([torch.randn(1, 2, 4, 4)], centres, features).sum().backward()
    assert ways[3] == "dispatched"
    assert features.grad is not None
    assert torch.equal(features.grad, torch.ones_like(features))


def test_below_autograd_nothing_is_recorded() -> None:
    with torch._C._AutoDispatchBelowAutograd():
        assert not _act(_image(grad=True)).requires_grad


@pytest.mark.parametrize("grad", [False, True], ids=["plain", "recorded"])
def test_both_ways_give_the_same_bits(grad: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def results() -> list[Tensor]:
        x = _image(grad=grad)
        style = torch.linspace(0.5, 1.5, 2)[None].requires_grad_(grad)
        layers = (
            kernels.noise_bias_act(x, style, torch.ones(1, 1, 3, 4), torch.tensor(0.3), gain=1.4, clamp=8.0),
            kernels.norm_modulate(x, style, act="lrelu"),
            kernels.upfirdn2d(x, kernels.setup_filter([1, 3, 3, 1]), up=2, pad=(2, 1, 2, 1)),
            kernels.masked_mse(x, x.detach() * 0.5),
        )
        return [*layers, *torch.autograd.grad(sum(y.square().sum() for y in layers), (x, style))] if grad else [*layers]

    straight = results()
    monkeypatch.setattr(direct, "_quiet_scopes", frozenset())
    for one, other in zip(straight, results(), strict=True):
        assert torch.equal(one, other)
        assert one.stride() == other.stride()


class _Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.functions: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def test_modes_see_the_op() -> None:
    overload = torch.ops.faceedit.noise_bias_act.default
    with _Seen() as seen:
        _act(_image())
    assert overload in seen.ops
    with _Called() as called:
        _act(_image())
    assert overload in called.functions


def test_tracers_and_profilers_see_the_op() -> None:
    overload = torch.ops.faceedit.noise_bias_act.default
    graph = make_fx(_act)(_image()).graph
    assert overload in [node.target for node in graph.nodes]
    with FakeTensorMode():
        fake = _act(torch.empty(1, 2, 3, 4))
    assert type(fake) is not Tensor
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        _act(_image())
    assert "faceedit::noise_bias_act" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.vmap(_act)(x[None])[0],
        lambda x: _act(torch._neg_view(x)),
        lambda x: _act(x.as_subclass(type("Tagged", (Tensor,), {}))),
        lambda x: _act(x.to("meta")),
    ],
    ids=["vmap", "negated view", "subclass", "meta"],
)
def test_what_is_more_than_a_plain_tensor_is_dispatched(call: Callable[[Tensor], Tensor], ways: list[str]) -> None:
    found = call(_image())
    assert ways[0] == "dispatched"
    assert found.shape == (1, 2, 3, 4)


def test_a_negated_view_is_read_as_its_value() -> None:
    assert torch.equal(_act(torch._neg_view(_image())), _act(-_image()))


@pytest.mark.parametrize(
    "absent", ["_keys_of", "_scope_keys", "_function_modes", "_profiling", "_is_excluded", "_autograd_key"]
)
def test_where_a_pytorch_cannot_tell_every_call_is_dispatched(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, absent, None)
    scopes, tensors = direct._key_sets()
    assert not scopes
    assert not tensors
    monkeypatch.setattr(direct, "_quiet_scopes", scopes)
    assert direct.way((_image(),)) == "dispatched"


def test_where_the_keys_have_other_names_every_call_is_dispatched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "DispatchKey", object())
    assert direct._key_sets() == (frozenset(), frozenset())
