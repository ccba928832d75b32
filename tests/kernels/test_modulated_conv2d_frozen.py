# SPDX-License-Identifier: Apache-2.0
"""What `modulated_conv2d` keeps of a frozen weight: when it is made, for whom, and when it goes."""

import threading
import weakref

import pytest
import torch
from support.compare import assert_close
from support.kernel_cases import draw
from support.modulated_conv2d_cases import (
    RESAMPLINGS,
    TOLERANCE,
    away_from_kinks,
    inputs,
    needs_cpp,
    oracle,
)
from torch import Tensor

from faceedit.kernels import modulated_conv2d_native
from faceedit.kernels import modulated_conv2d_parts as parts
from faceedit.kernels.modulated_conv2d import modulated_conv2d


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_changed_weight_is_seen(dtype: torch.dtype) -> None:
    """With all that is kept of it: sums, copies, and fp16's lengths of its filters."""
    x, weight, styles, *_ = inputs()
    assert x is not None
    assert weight is not None
    assert styles is not None
    x = x.to(dtype)
    for change in (
        lambda: weight.mul_(torch.linspace(0.5, 2, 3)),
        lambda: weight.mul_(1e4),
        lambda: setattr(weight, "data", torch.ones_like(weight)),
        lambda: weight[0].zero_(),
    ):
        modulated_conv2d(x, weight, styles)
        change()
        y = modulated_conv2d(x, weight, styles)
        assert_close("y", y, oracle()(x.double(), weight.double(), styles.double()), relative_l2=TOLERANCE[dtype][0])


@needs_cpp
def test_what_is_kept_in_fp16_of_a_frozen_weight_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    real = parts.over_lengths
    monkeypatch.setattr(parts, "over_lengths", lambda *arguments: made.append(arguments) or real(*arguments))
    x, weight, styles, *_ = inputs()
    assert x is not None
    assert styles is not None
    for _ in range(2):
        modulated_conv2d(x.to(torch.float16), weight, styles.clone().requires_grad_()).sum().backward()
    assert len(made) == 1
    assert set(parts._made[id(weight)].tensors) == {
        "squares",
        "lengths",
        (torch.float16, torch.contiguous_format, False, True),
    }


def test_what_one_cuda_stream_made_another_waits_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for tensors and streams: what is made once must be ready, and live, wherever it is read."""
    log: list[str] = []

    class Stream:
        def __init__(self, name: str) -> None:
            self.name = name

        def record_event(self) -> str:
            return f"made on {self.name}"

        def wait_event(self, event: str) -> None:
            log.append(f"{self.name} waits for: {event}")

    class Made:
        is_cuda, device = True, "cuda:0"

        def record_stream(self, stream: Stream) -> None:
            log.append(f"in use on {stream.name}")

    streams = {name: Stream(name) for name in ("a", "b")}
    weight = torch.zeros(1)
    known, made = parts._Made(weakref.ref(weight), weakref.ref(weight.untyped_storage()), 0, 0), Made()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["a"])
    known.keep("squares", made)  # type: ignore[arg-type]
    assert known.take("squares") is made
    assert log == []
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams["b"])
    assert known.take("squares") is made
    assert log == ["b waits for: made on a", "in use on b"]


def test_what_is_kept_is_seen_with_its_stream_and_event_or_not_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recording an event lets other threads run: one that looks then must not find half of an entry."""
    seen = []

    class Stream:
        def record_event(self) -> str:
            seen.append(dict(known.tensors))
            known.tensors.setdefault("squares", (other, "other stream", "other event"))
            return "event"

        def wait_event(self, event: str) -> None:
            seen.append(event)

    class Made:
        is_cuda, device = True, "cuda:0"

        def record_stream(self, stream: Stream) -> None: ...

    weight, other = torch.zeros(1), Made()
    known = parts._Made(weakref.ref(weight), weakref.ref(weight.untyped_storage()), 0, 0)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())
    known.keep("squares", Made())  # type: ignore[arg-type]
    assert known.take("squares") is other  # with what belongs to it
    assert seen == [{}, "other event"]


def test_threads_that_meet_at_a_frozen_weight_make_one_of_each() -> None:
    weight, made, found = torch.ones(3), [], []
    both = threading.Barrier(2)

    def make(w: Tensor) -> Tensor:
        made.append(w)
        threading.Event().wait(0.05)  # the other thread comes by
        return w * 2

    def work() -> None:
        both.wait()
        found.append(parts.from_weight(weight, "doubled", make))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert found[0] is found[1]


def test_captures_of_the_same_weight_hold_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for a weight and what is made of it: a server captures again and again."""

    class Storage: ...

    class Weight:
        is_cuda, requires_grad, device, _version = True, False, "cuda:0", 0

        def is_inference(self) -> bool:
            return False

        def untyped_storage(self) -> Storage:
            return storage

        def data_ptr(self) -> int:
            return 1

        def detach(self) -> "Weight":
            return self

    class Stream:
        def record_event(self) -> str:
            return "event"

    weight, storage, stream, made = Weight(), Storage(), Stream(), Weight()
    capturing = [False]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[0])
    for capturing[0] in (False, True, True, True):
        assert parts.from_weight(weight, "made", lambda _: made) is made  # type: ignore[arg-type, return-value]
    assert len(parts._made[id(weight)].captured) == 1


@needs_cpp
def test_what_is_kept_of_a_weight_goes_with_it() -> None:
    x, weight, styles, *_ = inputs()
    assert weight is not None
    before = len(parts._made)
    modulated_conv2d(x, weight, styles)
    assert len(parts._made) == before + 1
    del weight
    assert len(parts._made) == before
    with torch.inference_mode():  # no version counter: nothing is kept
        modulated_conv2d(x, torch.ones(7, 5, 3, 3), styles)
    assert len(parts._made) == before


@needs_cpp
def test_other_memory_under_the_same_weight_is_noticed() -> None:
    """An allocator may give new weights the place of the old ones; autograd's counter has seen nothing."""
    x, styles = torch.randn(1, 16, 8, 8).contiguous(memory_format=torch.channels_last), torch.ones(1, 16)
    place = torch.empty(16, 16, 3, 3).numpy()
    weight = torch.nn.Parameter(torch.from_numpy(place), requires_grad=False)
    for value in (1.0, -2.0):
        place[...] = value
        weight.data = torch.from_numpy(place)  # another storage at the same address
        torch.testing.assert_close(modulated_conv2d(x, weight, styles), modulated_conv2d(x, weight.clone(), styles))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("up", "down"), RESAMPLINGS)
def test_a_style_without_gradient_costs_no_pass_over_the_data_gradient(
    up: int, down: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One large sample: its weight is scaled, as on the way forward. fp16 divides gradients, and scales them after."""
    passed = []
    real = modulated_conv2d_native.style_backward
    monkeypatch.setattr(
        modulated_conv2d_native, "style_backward", lambda *given: passed.append(given[-1]) or real(*given)
    )
    side = 70 if up == 1 else 40
    x, weight, styles, noise, strength, bias, *_ = away_from_kinks(
        inputs(n=1, i=4, o=6, h=side, w=side, up=up, down=down), up=up, down=down
    )
    assert x is not None
    assert weight is not None
    assert styles is not None
    leaf = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    y = modulated_conv2d(leaf, weight, styles, noise=noise, strength=strength, bias=bias, up=up, down=down)
    wide = x.double().requires_grad_()
    given = (None if t is None else t.double() for t in (weight, styles, noise, strength, bias))
    expected = oracle(up=up, down=down)(wide, *given)
    seeds = draw(*y.shape, seed=9, low=0.5)
    (found,) = torch.autograd.grad(y, leaf, seeds.to(dtype))
    (wanted,) = torch.autograd.grad(expected, wide, seeds.double())
    assert_close("gradient of x", found, wanted, relative_l2=TOLERANCE[dtype][1])
    assert passed == ([False] if dtype == torch.float16 else [])
