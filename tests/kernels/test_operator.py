# SPDX-License-Identifier: Apache-2.0
"""How ops are registered: their own autograd kernel and PyTorch's give the same, and what has no gradient says so."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from faceedit.kernels import direct, native, operator
from faceedit.kernels.dispatch import Dispatcher, requested_backend
from faceedit.kernels.tensors import as_number


def _define(name: str) -> Any:
    """An op (x + y * 3, x * 2) whose gradient is written down, registered under `name`."""

    def body(x: Tensor, y: Tensor | None, factor: float) -> tuple[Tensor, Tensor]:
        return x + (0 if y is None else y * factor), x * 2

    dispatcher = Dispatcher(name, {"eager": body, "cpu": body})
    op = operator.define_op(
        f"{name}(Tensor x, Tensor? y, float factor) -> (Tensor, Tensor)",
        dispatcher,
        lambda x, y, factor: (torch.empty_like(x), torch.empty_like(x)),
    )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        x, _, ctx.factor = inputs
        ctx.backend = requested_backend()
        ctx.save_for_backward(x)

    def backward(ctx: Any, first: Tensor, second: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        assert x.shape == first.shape
        wants_y = ctx.needs_input_grad[1]
        return first + 2 * second, first * ctx.factor if wants_y else None, None

    op.register_autograd(backward, setup_context=setup_context)
    return op


@pytest.mark.parametrize(
    "absent", ["", "_quiet_scopes", "_below_autograd", "_after_autograd"], ids=lambda name: name or "none absent"
)
def test_gradients_arrive_without_what_a_pytorch_may_lack(absent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if absent:  # each of them is asked for on the way through the dispatcher only
        monkeypatch.setattr(direct, "_quiet_scopes", frozenset())
    if absent.endswith("_autograd"):
        monkeypatch.setattr(operator, absent, None)
        monkeypatch.setattr(operator, "_opaque", lambda body: body)
    op = _define(f"test_gradients{absent}")
    x, y = torch.arange(3.0).requires_grad_(), torch.ones(3).requires_grad_()
    first, second = op(x, y, 3.0)
    assert torch.equal(first, x + 3)
    assert torch.equal(second, 2 * x)
    gx, gy = torch.autograd.grad((first, second), (x, y), (torch.ones(3), torch.ones(3)))
    assert torch.equal(gx, torch.full((3,), 3.0))
    assert torch.equal(gy, torch.full((3,), 3.0))
    (gx,) = torch.autograd.grad(op(x, None, 3.0)[0].sum(), (x,), create_graph=True)
    assert torch.equal(gx, torch.ones(3))
    assert not op(x.detach(), None, 3.0)[0].requires_grad
    with torch.no_grad():
        assert not op(x, y, 3.0)[0].requires_grad
    with torch.inference_mode():
        assert torch.equal(op(torch.ones(2), None, 1.0)[1], torch.full((2,), 2.0))
    torch.library.opcheck(op.overload, (x, y, 3.0))


def test_without_the_exporters_table_the_public_one_still_holds_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    op = _define("test_decomposition")
    monkeypatch.setattr(operator, "_decompositions", {})
    with monkeypatch.context() as patch:
        patch.delattr(torch._decomp, "register_decomposition")
        operator.register_onnx_decomposition(op, torch.add)
    assert operator.decomposition_table()[op.overload] is torch.add


def test_an_op_without_a_gradient_says_so() -> None:
    x = torch.ones(1, 1, 2, 2, requires_grad=True)
    y = torch.ops.faceedit.gate_backward(x, x, x, None, None, None, None, None, "auto")[0]
    with pytest.raises(RuntimeError, match="faceedit::gate_backward has no gradient; detach its inputs"):
        y.sum().backward()


@pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")
@pytest.mark.parametrize(
    ("target", "fields", "error", "message"),
    [
        ((-1, 1), {}, TypeError, "the target must be the tuple"),
        ((-1, 1, 0), {"pixel": 1}, TypeError, "noise_bias_act_fwd: got an argument that is no field"),
        ((-1, 1, 0), {"x": "0"}, TypeError, None),
        ((-1, 1, 0), {"pixels": 1.5}, TypeError, None),
        ((-1, 1, 0), {"act": 2**31}, OverflowError, "a number does not fit its field"),
        ((-1, 1, 0), {"batch": 2**63}, OverflowError, None),
        ((-1, 1, 0), {"channels_last": 1}, TypeError, "a flag must be True or False"),
        ((-1, 1, 0), {"slope": "a"}, TypeError, None),
    ],
)
def test_native_arguments_of_a_wrong_kind_are_refused(
    target: tuple[int, ...], fields: dict[str, Any], error: type[Exception], message: str | None
) -> None:
    with pytest.raises(error, match=message):
        native.module().noise_bias_act_fwd(target, **fields)
    with pytest.raises(TypeError, match="the one positional argument is the target"):
        native.module().noise_bias_act_fwd()


@pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")
def test_native_arguments_are_found_by_name_in_any_order() -> None:
    x, y = torch.arange(4.0), torch.full((4,), 7.0)
    fields = {
        "clamp": -1.0, "".join(["gai", "n"]): 2, "pixels": 4, "channels": 1, "batch": 1, "y": y.data_ptr(),
        "x": x.data_ptr(),
    }  # fmt: skip
    native.module().noise_bias_act_fwd((-1, 1, 0), **fields)
    assert torch.equal(y, 2 * x)


def test_numbers_of_other_libraries_reach_backends_as_pythons() -> None:
    """Triton's launcher knows only those."""
    for value in (np.float32(2), np.float64(2), np.int64(2), Fraction(2)):
        assert type(as_number(value)) is float
    assert type(as_number(2)) is int
