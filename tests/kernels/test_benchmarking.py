# SPDX-License-Identifier: Apache-2.0
"""The benchmark's frame, with a clock that does not look at the time."""

import json
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from faceedit.kernels import native, noise_bias_act
from faceedit.kernels.benchmarking import SMALL, Benchmark, Case, benchmarks, draw, machine, report, suite
from faceedit.kernels.benchmarking.providers import missing, relative_error, step
from faceedit.kernels.benchmarking.timing import MOST_ROUNDS, Call, Spread, interleave, ratio
from faceedit.kernels.tensors import reused
from faceedit.networks.stylegan2 import StyleGAN2Config

needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


class Script:
    """A clock that says what it is told, and remembers who was asked in which order."""

    def __init__(self) -> None:
        self.order: list[object] = []
        self.ticks = count(1)

    def repeats(self, call: Call) -> int:
        return 1

    def sample(self, call: Call, repeats: int) -> float:
        self.order.append(call())
        return float(next(self.ticks))


def test_rounds_rotate_so_that_every_provider_comes_first() -> None:
    clock = Script()
    times = interleave({name: (lambda name=name: name) for name in "abc"}, clock, rounds=4, seconds=0.0)
    assert "".join(map(str, clock.order)) == "abcbcacababc"
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_short_rows_go_on_until_the_seconds_are_over_but_not_for_ever() -> None:
    clock = Script()
    times = interleave({"a": lambda: None}, clock, rounds=2, seconds=float("inf"))
    assert len(times["a"]) == MOST_ROUNDS


def test_ratio_is_the_median_of_the_rounds_and_noise_is_marked() -> None:
    found = ratio([2.0, 40.0, 4.0, 6.0, 8.0], [1.0, 20.0, 2.0, 3.0, 4.0])
    assert found == {"median": 2.0, "q1": 2.0, "q3": 2.0, "minima": 2.0, "noisy": False}
    assert ratio([2.0, 2.0, 2.0], [0.5, 1.0, 1.0])["noisy"]  # 2 by the median, 4 by the minima
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("actual", "expected", "error"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([3.0, 4.0], [0.0, 0.0], float("inf")),
        ([0.0, 5.5], [0.0, 5.0], 0.1),
        ([float("nan"), 1.0], [float("nan"), 1.0], 0.0),
        ([float("nan"), 1.0], [0.0, 1.0], float("inf")),
        ([float("inf"), 1.0], [float("-inf"), 1.0], float("inf")),
        ([1.0], [1.0, 1.0], float("inf")),
    ],
)
def test_relative_error(actual: list[float], expected: list[float], error: float) -> None:
    assert relative_error(torch.tensor(actual), torch.tensor(expected)) == pytest.approx(error)


def doubled(x: Tensor) -> Tensor:
    return x * 2


def broken(x: Tensor) -> Tensor:
    raise RuntimeError("no kernel\nfor this shape")


def toy(**changes: object) -> Benchmark:
    def build(side: int, dtype: torch.dtype) -> Case:
        case = Case((draw(1, 1, side, side).to(dtype),), doubled, doubled, (8 * side**2, 16 * side**2))
        return replace(case, **changes)  # type: ignore[arg-type]

    return Benchmark("toy", build, {"1@8": (8,)}, (4,), {"forward": 3.0})


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "CpuClock", Script)
    monkeypatch.setattr(suite, "peak_memory", lambda call, device: 1_000_000)


def records_of(benchmark: Benchmark, layer: str = SMALL, **settings: object) -> list[dict[str, object]]:
    chosen = suite.Settings(**({"providers": ("eager",), "rounds": 0} | settings))  # type: ignore[arg-type]
    return list(suite.run_layer(benchmark, layer, torch.float32, chosen))


def test_a_wrong_or_failing_provider_is_named_and_the_others_go_on() -> None:
    others = {"slightly off": lambda x: x * 2.01, "broken": broken, "right": lambda x: x + x}
    records = records_of(toy(others=others), passes=("forward",))
    assert {r["provider"]: r["status"] for r in records} == {
        "eager": "ok", "slightly off": "wrong", "broken": "failed", "right": "ok",
    }  # fmt: skip
    reasons = {r["provider"]: r.get("reason") for r in records}
    assert reasons["slightly off"] == "output 0 of slightly off is 0.005 from eager's, more than 1e-05"
    assert reasons["broken"] == "RuntimeError: no kernel for this shape"
    rates = {"copy_bytes_per_s": 1e9, "matrix": {}}
    assert "WRONG: output 0 of slightly off" in "\n".join(report.line(r, rates) for r in records)


def test_a_wrong_gradient_is_found_too() -> None:
    others = {"detached": lambda x: x + x.detach()}
    forward, backward = (r for r in records_of(toy(others=others)) if r["provider"] == "detached")
    assert (forward["status"], backward["status"]) == ("ok", "wrong")
    assert "gradient 0 of detached" in str(backward["reason"])


def test_passes_without_gradients_are_left_out() -> None:
    assert {r["pass"] for r in records_of(toy(wanted=()))} == {"forward"}
    assert {r["pass"] for r in records_of(toy(passes=("forward+backward",)))} == {"forward+backward"}


@pytest.mark.usefixtures("scripted")
def test_timed_records_hold_what_the_table_shows() -> None:
    others = {"another": doubled}
    records = records_of(toy(others=others), "1@8", rounds=3, seconds=0.0)
    assert json.loads(json.dumps(records)) == records
    first, second = (r for r in records if r["pass"] == "forward")
    assert (first["provider"], first["is_baseline"], first["ratio"]["median"]) == ("eager", True, 1.0)  # type: ignore[index]
    assert second["rounds"] == 3
    assert second["bytes_per_s"] == pytest.approx(8 * 64 / second["median_s"])  # type: ignore[operator]
    rates = {"copy_bytes_per_s": 1e9, "matrix": {"float32": 1e12}}
    assert "1.0" in report.line(second, rates)
    (line, _) = suite.summarise(records, {"toy": toy()})
    assert (line["provider"], line["layers"], line["target"]) == ("another", 1, None)


@pytest.mark.usefixtures("scripted")
def test_results_are_compared_without_tf32_and_timed_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    allowed = []

    def probe(x: Tensor) -> Tensor:
        allowed.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return x * 2

    records_of(toy(others={"probe": probe}, passes=("forward",)), "1@8", rounds=1, seconds=0.0)
    before = torch.backends.cuda.matmul.allow_tf32
    assert allowed[0] == (False, False)
    assert set(allowed[1:]) == {(True, before)}
    records_of(toy(others={"broken": broken}, passes=("forward",)))
    assert torch.backends.cudnn.allow_tf32


@needs_cpp
@pytest.mark.usefixtures("scripted")
def test_the_compiled_kernel_has_a_column_for_reused_outputs() -> None:
    records = records_of(toy(), "1@8", providers=("eager", "cpp"), rounds=1, seconds=0.0)
    assert ["reused_s" in record for record in records] == [False, True] * 2
    rates = {"copy_bytes_per_s": 1e9, "matrix": {"float32": 1e12}}
    values = [report.line(record, rates).split()[-1] for record in records[1::2]]
    assert values == [f"{record['reused_s'] * 1e3:.4g}" for record in records[1::2]]  # type: ignore[operator]
    assert report.header("cpu").split()[-2:] == ["reused", "ms"]


@needs_cpp
def test_reused_outputs_are_written_over() -> None:
    kept: list[Tensor] = []
    results = []
    for value in (1.0, 2.0):
        x = torch.full((1, 2, 3, 3), value, requires_grad=True)
        with reused(kept):
            y = noise_bias_act(x, gain=3.0)
            results.append((y.data_ptr(), y.detach().clone(), torch.autograd.grad(y.sum(), x)[0].clone()))
    (address, first, slope), (again, second, same) = results
    assert address == again
    assert torch.equal(2 * first, second)
    assert torch.equal(slope, torch.full_like(slope, 3.0))
    assert torch.equal(slope, same)
    with reused(kept):
        other = noise_bias_act(torch.ones(1, 2, 4, 4), gain=3.0)
    assert other.shape == (1, 2, 4, 4)
    assert len({t.data_ptr() for t in kept}) == len(kept)
    assert noise_bias_act(torch.ones(1, 2, 4, 4)).data_ptr() not in {t.data_ptr() for t in kept}


class Calls(TorchDispatchMode):
    """Count the operators that are called, and the values that they return."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.values = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.calls += 1
        self.values += sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result


def counted(call: Call) -> Calls:
    call()  # what is made once is made before
    with Calls() as calls:
        call()
    return calls


VALUE_S = 1e-4  # what a value takes to the clock below, in calls


class CallClock:
    """A clock to which an operator call takes a second, and each value it returns VALUE_S."""

    def repeats(self, call: Call) -> int:
        return 1

    def sample(self, call: Call, repeats: int) -> float:
        seen = counted(call)
        return seen.calls + VALUE_S * seen.values


@needs_cpp
@pytest.mark.parametrize("stage", ["latent", "noise"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bare_steps_make_the_calls_of_a_larger_one(stage: str, dtype: torch.dtype) -> None:
    benchmark = benchmarks()["optimization_step"]
    assert benchmark.bare is not None
    layer = (128, 512, 8, 32, 4, stage)

    def calls(arguments: tuple[object, ...]) -> int:
        return counted(step(benchmark.build(*arguments, dtype), "cpp", "cpu", backward=True)).calls

    assert sum(factor * calls(arguments) for arguments, factor in benchmark.bare(*layer)) == calls(layer)


@needs_cpp
def test_overhead_is_what_a_step_takes_without_its_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "CpuClock", CallClock)
    monkeypatch.setattr(suite, "peak_memory", lambda call, device: 1_000_000)
    layer = (64, 2048, 32, 64, 16, "latent")
    benchmark = replace(benchmarks()["optimization_step"], layers={"64 latent": layer})
    baseline, cpp = records_of(benchmark, "64 latent", providers=("cpp",), rounds=1, seconds=0.0)
    assert "overhead_share" not in baseline
    seen = counted(step(benchmark.case("64 latent", torch.float32), "cpp", "cpu", backward=True))
    share = seen.calls / (seen.calls + VALUE_S * seen.values)
    assert cpp["median_s"] == seen.calls + VALUE_S * seen.values
    # From above: the small steps return values too.
    assert 0 < share < cpp["overhead_share"] < 1.5 * share < 1  # type: ignore[operator]
    rates = {"copy_bytes_per_s": 1e9, "matrix": {"float32": 1e12}}
    assert report.line(cpp, rates).endswith(f" overhead {cpp['overhead_share']:.1%}")


def test_target_is_reached_or_missed_in_words() -> None:
    line = {"op": "toy", "dtype": "float32", "pass": "forward", "provider": "cpp", "layers": 3, "ratio": 2.5}
    line |= {"ratio_of_minima": 2.4, "ratio_to_compile": 1.2, "noisy_layers": 0, "target": 3.0}
    assert "target 3x MISSED" in "\n".join(report.summary([line]))
    assert "target 3x reached" in "\n".join(report.summary([line | {"ratio": 3.0}]))


def test_peak_memory_counts_what_lives_at_once() -> None:
    def call() -> tuple[Tensor, ...]:
        a = torch.empty(1 << 20, dtype=torch.uint8)
        b = torch.empty(1 << 20, dtype=torch.uint8)
        del a, b
        return (torch.empty(1 << 19, dtype=torch.uint8),)

    assert suite.peak_memory(call, "cpu") == 2 << 20  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("rate", "side", "samples"),
    [(1e12, 2048, 4 + 8), (1e9, 512, 2 + 3), (5e7, 256, 1 + 1)],  # a slow one is multiplied by small matrices, seldom
)
def test_a_slow_dtype_has_its_matrix_rate_soon(
    rate: float, side: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def sample(call: Any, repeats: int) -> float:
        seen.append(call.args[0].shape[0])
        return 2 * seen[-1] ** 3 / rate

    clock = machine.CpuClock()
    monkeypatch.setattr(clock, "sample", sample)
    monkeypatch.setattr(torch, "mm", lambda *_, **__: None)
    assert machine._matrix_rate(clock, "cpu", torch.float32, 2048) == pytest.approx(rate)
    assert seen[-1] == side
    assert len(seen) == samples


def test_a_provider_that_cannot_run_says_why() -> None:
    assert missing("eager", "cpu") == missing("compile", "cpu") == ""
    assert "needs CUDA tensors" in missing("cuda", "cpu") or "CUDA" in missing("cuda", "cpu")


def layers() -> Iterator[tuple[str, str]]:
    yield from ((op, layer) for op, benchmark in benchmarks().items() for layer in benchmark.layers)


def test_layers_are_named_alike_and_targets_name_passes() -> None:
    for op, layer in layers():
        assert layer != SMALL, op
    for benchmark in benchmarks().values():
        for key in benchmark.target:
            assert key.split()[0] in ("forward", "forward+backward"), benchmark.op


def shapes_of(op: str, prefix: str = "") -> set[tuple[int, ...]]:
    """The channels and sides of the layers so named, as the cases' inputs have them."""
    names = [layer for layer in benchmarks()[op].layers if layer.startswith(prefix)]
    arguments = [benchmarks()[op].layers[name] for name in names]
    return {tuple(value for value in values if type(value) is int)[:2] for values in arguments}  # type: ignore[misc]


def stylegan2_maps(least_px: int) -> set[tuple[int, int]]:
    configurations = (StyleGAN2Config(size_px=256, channel_base=16384), StyleGAN2Config())
    return {
        (configuration.width(level), 4 << level)
        for configuration in configurations
        for level in range(configuration.levels)
        if 4 << level >= least_px
    }


def test_medians_are_over_every_layer_of_the_networks_they_speak_for() -> None:
    assert stylegan2_maps(4) <= shapes_of("noise_bias_act")
    assert stylegan2_maps(8) <= shapes_of("fir_epilogue")
    assert stylegan2_maps(8) <= shapes_of("upfirdn2d")
    assert {(1024,), (512,), (256,)} == shapes_of("masked_mse") == shapes_of("noise_regularizer")
    # MaskGAN's generator: 64 channels at 512 px, doubled by each of four strides of 2; residual blocks; SFT after the
    # second and the fifth stride of the style encoder.
    assert {(64 << stride, 512 >> stride) for stride in range(5)} == shapes_of("norm_modulate", "in relu ")
    assert {(1024, 32)} == shapes_of("norm_modulate", "adain relu ") == shapes_of("norm_modulate", "adain 1")
    assert {(64, 128), (64, 16)} == shapes_of("norm_modulate", "sft ")
    assert len(benchmarks()["norm_modulate"].layers) == 9


@pytest.mark.parametrize("form", ["in relu", "adain relu", "adain", "sft"])
def test_maskgan_layers_are_its_own_formulas(form: str) -> None:
    """Scale and shift as they are, no affine parameters in the norm, and none in front of SFT."""
    case = benchmarks()["norm_modulate"].build(form, 3, 8, torch.float32)
    x, *operands = (t.double() for t in case.inputs)
    if form != "sft":
        mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
        x = (x - mean) / (variance + 1e-5).sqrt()
    gamma, beta = (t if t.dim() == 4 else t[..., None, None] for t in operands) if operands else (1.0, 0.0)
    expected = x * gamma + beta
    expected = expected.relu() if "relu" in form else expected
    for function in (case.ours, case.eager):
        actual = function(*case.inputs)
        assert isinstance(actual, Tensor)
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-6)
