# SPDX-License-Identifier: Apache-2.0
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from faceedit import kernels
from faceedit.kernels import benchmarking, dispatch, native

X = torch.zeros(1, 2, 3, 3)
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


def ran(name: str, x: torch.Tensor = X) -> str:
    with kernels.backend(name):
        kernels.noise_bias_act(x)
    return kernels.last_backend("noise_bias_act")


@needs_cpp
def test_automatic_choice_takes_the_compiled_kernel() -> None:
    assert ran("auto") == "cpu"
    assert ran("eager") == "eager"


def test_automatic_choice_falls_back_for_float64_and_empty_input() -> None:
    assert ran("auto", X.double()) == "eager"
    assert ran("auto", X[:0]) == "eager"


@pytest.mark.parametrize(
    ("name", "x", "reason"),
    [
        ("cuda", X, "it needs CUDA tensors, got cpu|native module is missing|CUDA"),
        ("triton", X, "TRITON_INTERPRET=1|triton is not installed"),
        ("cpu", X.double(), "it runs float32, float16, bfloat16, got float64"),
    ],
)
def test_forced_backend_that_cannot_run_names_the_reason(name: str, x: torch.Tensor, reason: str) -> None:
    with kernels.backend(name), pytest.raises(RuntimeError, match=f"backend '{name}' cannot run: .*({reason})"):
        kernels.noise_bias_act(x)


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="name must be one of"), kernels.backend("gpu"):
        pass


@needs_cpp
def test_scope_ends_with_the_block_and_stays_in_its_thread() -> None:
    with pytest.raises(KeyError), kernels.backend("eager"):
        raise KeyError
    assert dispatch.requested_backend() == "auto"
    seen: list[str] = []
    with kernels.backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.requested_backend()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@needs_cpp
def test_backward_runs_where_the_forward_was_asked_to() -> None:
    for name in ("eager", "cpu"):
        x = X.clone().requires_grad_()
        with kernels.backend(name):
            y = kernels.noise_bias_act(x)
        y.sum().backward()
        assert kernels.last_backend("noise_bias_act_backward") == name


def test_another_device_is_current_while_an_op_runs_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are launched on the current device. Fake tensors stand in for those of two GPUs."""
    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            self.index = device.index

        def __enter__(self) -> None:
            current.append(self.index)

        def __exit__(self, *_: object) -> None:
            current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    seen = []
    op = dispatch.Dispatcher("looking", {"eager": lambda x: seen.append((x.device.index, current[-1]))})
    with FakeTensorMode():
        for index in (0, 1):
            op(torch.empty(2, device=f"cuda:{index}"))
            assert current == [0]
    assert seen == [(0, 0), (1, 1)]


class OnGpu:
    """A CUDA tensor, as far as the choice looks at one."""

    is_cpu, is_cuda, dtype, device = False, True, torch.float32, torch.device("cuda", 0)

    def numel(self) -> int:
        return 1


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A stand-in for a GPU and for a build: what they are is written into the dictionary."""
    state: dict[str, Any] = {"capability": (8, 0), "architectures": "80-real 86-real 90-virtual", "asked": 0}

    def capability(index: int) -> tuple[int, int]:
        state["asked"] += 1
        return state["capability"]

    core = native._C or SimpleNamespace(
        compiler="", cuda_compiler="", isa=lambda: "baseline", isas=lambda: ["baseline"], cuda_architectures=""
    )

    class Build:
        def __getattr__(self, name: str) -> Any:
            return state["architectures"] if name == "cuda_architectures" else getattr(core, name)

    monkeypatch.setattr(native, "_C", Build())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(dispatch, "_has_triton", lambda: False)
    forget = (native._capability.cache_clear, native._build_info.cache_clear)
    for clear in forget:
        clear()
    yield state
    for clear in forget:
        clear()


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        ("80-real 86-real 90-virtual", (7, 5), False),
        ("80-real 86-real 90-virtual", (8, 0), True),
        ("80-real 86-real 90-virtual", (8, 9), True),
        ("80-real 86-real 90-virtual", (9, 0), True),
        ("80-real 86-real 90-virtual", (12, 0), True),
        ("80-real", (9, 0), False),
        ("86-real", (8, 0), False),
        ("80", (9, 0), True),
        ("100-real", (10, 3), True),
        ("90a-real", (9, 0), True),
        ("90a-virtual", (10, 0), False),
        ("100f-virtual", (10, 3), True),
        ("100f-virtual", (12, 0), False),
        ("native", (7, 5), True),
    ],
)
def test_automatic_choice_asks_whether_the_build_holds_code_for_this_gpu(
    gpu: dict[str, Any], architectures: str, capability: tuple[int, int], runs: bool
) -> None:
    gpu.update(architectures=architectures, capability=capability)
    op = dispatch.Dispatcher("looking", {"eager": lambda x: x, "cuda": lambda x: x})
    assert op.choose("auto", OnGpu()) == ("cuda" if runs else "eager")  # type: ignore[arg-type]
    state = kernels.backends_report()["ops"]["noise_bias_act"]["cuda"]
    assert state["available"] is runs
    for _ in range(3):
        op.choose("auto", OnGpu())  # type: ignore[arg-type]
    assert gpu["asked"] == 1


def test_a_gpu_that_the_build_is_not_for_is_named(gpu: dict[str, Any]) -> None:
    gpu["capability"] = (7, 5)
    reason = "built for sm_80, sm_86, sm_90\\+PTX, this GPU is sm_75"
    with pytest.raises(RuntimeError, match=f"backend 'cuda' cannot run: {reason}"):
        dispatch._ops["noise_bias_act"].choose("cuda", OnGpu())  # type: ignore[arg-type]
    assert dispatch.machine_reason("cuda", None) == reason.replace("\\", "")


def test_why_there_are_no_cuda_kernels_is_read_from_disk_once(
    gpu: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a build serves GPUs through Triton: every op asks."""
    gpu["architectures"] = ""
    reads = []

    def read_text(path: Path) -> str:
        reads.append(path)
        return '{"native": true, "cuda": false, "reason": "", "cuda_reason": "no nvcc"}'

    monkeypatch.setattr(Path, "read_text", read_text)
    for _ in range(3):
        assert dispatch.machine_reason("cuda", "cuda", 0) == "no nvcc"
    assert len(reads) == 1


def test_report_is_plain_and_covers_every_op() -> None:
    report = kernels.backends_report()
    assert json.loads(json.dumps(report)) == report
    assert {"noise_bias_act", "noise_bias_act_backward", "masked_mse", "masked_mse_backward"} <= set(report["ops"])
    for backends in report["ops"].values():
        assert set(backends) == set(dispatch.BACKENDS)
        assert backends["eager"] == {"available": True, "reason": ""}
        for state in backends.values():
            assert state["available"] is not bool(state["reason"])


def test_every_public_op_has_a_page_and_a_benchmark(request: pytest.FixtureRequest) -> None:
    # Names on top of an op that is measured: upfirdn2d, norm_modulate.
    wrappers = {"downsample2d", "filter2d", "setup_filter", "upsample2d"}
    wrappers |= {"instance_norm_act", "sft"}
    measured = benchmarking.benchmarks()
    folder = request.config.rootpath / "docs" / "kernels"
    pages = [page.read_text() for page in folder.glob("*.md") if page.stem != "switching"]
    for name in set(kernels.__all__) - {"backend", "backends_report", "decomposition_table", "last_backend"}:
        assert any(f"{name}(" in page for page in pages), f"no page of docs/kernels says anything of {name}"
        assert name in measured or name in wrappers, f"{name} has no case in kernels/benchmarking/cases"
