# SPDX-License-Identifier: Apache-2.0
"""modulated_conv2d's layer in one kernel. On a CPU, where "auto" never takes it, as the plain loops that say what the
CUDA kernels compute: what is tested there is the code around them."""

from typing import Any

import pytest
import torch
from support.compare import assert_close
from support.kernel_cases import PLACES, Place
from support.modulated_conv2d_cases import TOLERANCE, away_from_kinks, check_frozen, inputs, oracle
from torch import Tensor

from faceedit.kernels import modulated_layer_native, native
from faceedit.kernels.modulated_conv2d import modulated_conv2d

NATIVE = [place for place in PLACES if getattr(place, "values", [Place("eager")])[0].backend in ("cpu", "cuda")]
DTYPES = [torch.bfloat16, torch.float16]
pytestmark = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layer's kernels, also on a CPU; the list has a name for every call of them."""
    calls: list[str] = []
    on_gpu = modulated_layer_native.fits

    def fits(x: Tensor, weight: Tensor) -> bool:
        if x.is_cuda:
            return on_gpu(x, weight)
        small = x.dtype in modulated_layer_native.DTYPES and weight.shape[0] == weight.shape[1]
        return small and weight.shape[0] in modulated_layer_native.LEAST_MULTIPROCESSORS and weight.shape[2] == 3

    def spied(name: str) -> Any:
        real = getattr(modulated_layer_native, name)

        def call(*arguments: Any) -> Any:
            calls.append(name)
            return real(*arguments)

        return call

    for name in ("forward", "backward"):
        monkeypatch.setattr(modulated_layer_native, name, spied(name))
    monkeypatch.setattr(modulated_layer_native, "fits", fits)
    return calls


def need(place: Place, channels: int) -> None:
    if place.device == "cuda" and not modulated_layer_native.gpu_holds(0, channels):
        pytest.skip(f"this GPU is too small for layers of {channels} channels")


def operands(place: Place, dtype: torch.dtype = torch.bfloat16, **shape: int) -> tuple[Tensor, Tensor, Tensor]:
    """x, channels_last, weight and styles."""
    x, weight, styles, *_ = inputs(**{"i": 32, "o": 32} | shape)
    assert x is not None
    assert weight is not None
    assert styles is not None
    x = x.to(place.device, dtype).contiguous(memory_format=torch.channels_last)
    return x, weight.to(place.device), styles.to(place.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("place", NATIVE)
def test_matches_reference(place: Place, channels: int, dtype: torch.dtype, taken: list[str]) -> None:
    """Sides that squares of 16 pixels do not divide, and two samples of different styles."""
    need(place, channels)
    tensors = away_from_kinks(inputs(n=2, i=channels, o=channels, h=19, w=34))
    check_frozen(place, tensors, dtype)
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize(("h", "w"), [(1, 2), (1, 40), (33, 2), (16, 16)])
@pytest.mark.parametrize("place", NATIVE)
def test_every_shape(place: Place, h: int, w: int, taken: list[str]) -> None:
    check_frozen(place, away_from_kinks(inputs(n=1, i=32, o=32, h=h, w=w)), torch.bfloat16)
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize(("n", "h", "w"), [(1, 470, 500), (8, 200, 210), (140, 40, 20)])
@pytest.mark.parametrize("channels", [32, 64])
@pytest.mark.parametrize("place", NATIVE)
def test_more_squares_than_blocks_of_threads(
    place: Place, channels: int, n: int, h: int, w: int, taken: list[str]
) -> None:
    """A block goes through several squares, in turns of two buffers; more samples than blocks still have one each."""
    if place.device == "cpu":
        pytest.skip("the plain loops have no blocks")
    need(place, channels)
    check_frozen(place, away_from_kinks(inputs(n=n, i=channels, o=channels, h=h, w=w)), torch.bfloat16)
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize("present", range(16), ids=lambda bits: f"{bits:04b}")
@pytest.mark.parametrize("place", NATIVE)
def test_every_subset_of_operands(place: Place, present: int, taken: list[str]) -> None:
    has_noise, has_strength, has_bias, has_rgb = (bool(present >> bit & 1) for bit in range(4))
    tensors = inputs(n=3, i=32, o=32, h=5, w=7)
    if not has_rgb:
        tensors[6:] = [None, None]
    keep = [True, True, True, has_noise, has_noise and has_strength, has_bias, True, True]
    chosen = [t if kept else None for t, kept in zip(tensors, keep, strict=True)]
    # Linear, since without noise there is nothing to move away from a kink with.
    check_frozen(place, chosen, torch.float16, act="linear", gain=1.4, demodulate=bool(present % 5))
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize(("act", "slope", "gain", "clamp"), [("relu", 0.2, 1.4, -1.0), ("lrelu", 0.1, 1.4, 2.0)])
@pytest.mark.parametrize("place", NATIVE)
def test_activations(place: Place, act: str, slope: float, gain: float, clamp: float, taken: list[str]) -> None:
    tensors = away_from_kinks(inputs(n=2, i=32, o=32, h=9, w=6), clamp=clamp)
    check_frozen(place, tensors, torch.bfloat16, act=act, slope=slope, gain=gain, clamp=clamp)
    assert taken == ["forward", "backward"]


@pytest.mark.parametrize("place", NATIVE)
def test_a_trained_weight_has_its_gradient_from_a_convolution(place: Place, taken: list[str]) -> None:
    x, weight, styles = operands(place)
    modulated_conv2d(x, weight.requires_grad_(), styles).sum().backward()
    assert weight.grad is not None
    assert taken == ["forward"]


@pytest.mark.parametrize("place", NATIVE)
def test_a_smooth_activation_keeps_its_input_and_so_its_convolution(place: Place, taken: list[str]) -> None:
    """On the way forward; the data gradient is that of any activation."""
    tensors = inputs(n=2, i=32, o=32)
    check_frozen(place, tensors, torch.bfloat16, act="silu")
    assert taken == ["backward"]


@pytest.mark.parametrize("place", NATIVE)
def test_an_output_that_comes_back_in_another_format(place: Place, taken: list[str]) -> None:
    """Hooks that move what is saved elsewhere need not keep its memory format."""
    x, weight, styles = operands(place)
    gradients = []
    for restore in (lambda t: t, lambda t: t.contiguous() if t.grad_fn is None and t.dim() == 4 else t):
        leaves = [x.clone(memory_format=torch.channels_last).requires_grad_(), styles.clone().requires_grad_()]
        kept = {leaf.data_ptr() for leaf in leaves} | {weight.data_ptr()}

        def unpack(t: Tensor, restore: Any = restore, kept: set[int] = kept) -> Tensor:
            return t if t.data_ptr() in kept else restore(t.detach())

        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            y = modulated_conv2d(leaves[0], weight, leaves[1])
        gradients.append(torch.autograd.grad(y.float().square().sum(), leaves))
    for once, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, once)
    assert taken == ["forward", "backward"] * 2


@pytest.mark.parametrize("place", NATIVE)
def test_a_weight_that_lies_at_an_odd_address(place: Place, taken: list[str]) -> None:
    x, weight, styles = operands(place)
    room = torch.empty(weight.numel() + 1, dtype=x.dtype, device=x.device)
    odd = room[1:].view(32, 3, 3, 32).permute(0, 3, 1, 2)
    odd.copy_(weight)
    torch.testing.assert_close(
        modulated_conv2d(x, odd, styles), modulated_conv2d(x, odd.clone(memory_format=torch.channels_last), styles)
    )
    assert taken == ["forward"] * 2


@pytest.mark.parametrize("place", NATIVE)
def test_an_image_that_lies_at_an_odd_address(place: Place, taken: list[str]) -> None:
    """It keeps PyTorch's convolution where the kernels copy 16 bytes at a time."""
    x, weight, styles = operands(place)
    n, c, h, w = x.shape
    odd = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(n, h, w, c).permute(0, 3, 1, 2)
    odd.copy_(x)
    wanted = modulated_conv2d(x, weight, styles)
    del taken[:]
    assert_close("y", modulated_conv2d(odd, weight, styles), wanted.double(), relative_l2=TOLERANCE[x.dtype][0])
    assert taken == ([] if place.device == "cuda" else ["forward"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("act", ["linear", "lrelu", "relu"])
@pytest.mark.parametrize("place", NATIVE)
def test_what_is_not_finite_stays_where_it_is(place: Place, act: str, value: float, taken: list[str]) -> None:
    x, weight, styles = operands(place, n=1, h=9, w=20)
    x[0, 3, 4, 17] = value
    y = modulated_conv2d(x, weight, styles, act=act)
    expected = oracle(act=act)(*(t.double().cpu() for t in (x, weight, styles)))
    assert torch.equal(y.isfinite().cpu(), expected.isfinite())
    assert torch.equal(y.isnan().cpu(), expected.isnan())
    assert taken == ["forward"]


def test_shared_memory_is_what_the_kernels_take() -> None:
    """2 bytes a value of the weight and of two squares with their borders, and five float vectors."""
    for channels in modulated_layer_native.LEAST_MULTIPROCESSORS:
        taken = native.module().modulated_layer_shared_bytes(channels)
        assert taken == 2 * (9 * channels * channels + 2 * 18 * 18 * channels) + 5 * 4 * channels


def test_a_workspace_depends_on_the_shape_alone() -> None:
    """A row of sums for each block of threads that runs at once on the largest GPU; the plain loops need none."""
    size = modulated_layer_native._sums_size
    for channels, blocks in ((32, 396), (64, 132)):
        for n in (1, 3, 8, 1000):
            rows = n * max(1, min(blocks // n, 64 * 64))
            assert size(False, torch.Size((n, channels, 1024, 1024)), True) == rows * channels
        assert size(False, torch.Size((2, channels, 17, 16)), True) == 2 * 2 * channels
        assert size(False, torch.Size((2, channels, 16, 16)), False) == 0
        assert size(True, torch.Size((2, channels, 16, 16)), True) == 0
