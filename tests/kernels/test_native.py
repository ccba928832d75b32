# SPDX-License-Identifier: Apache-2.0
"""The compiled module: work split, instruction sets, argument checks, and what the CUDA compiler reported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import overread

from faceedit import kernels
from faceedit.kernels import native
from faceedit.kernels.tensors import poison

if not native.build_report()["cpp"]:
    pytest.skip(f"native module is missing: {native.MISSING_REASON}", allow_module_level=True)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.booleans(), st.integers(1, 2**21), st.integers(1, 4096))
def test_blocks_cover_every_pixel_once(cuda: bool, pixels: int, channels: int) -> None:
    blocks, size = native.module().plan_blocks(cuda, pixels, channels)
    assert (blocks - 1) * size < pixels <= blocks * size
    assert size <= (256 if cuda else 1024)  # the kernels' row buffers


def test_instruction_set_can_be_chosen_and_is_restored() -> None:
    before = native.module().isa()
    for name in native.module().isas():
        with native.isa(name):
            assert native.module().isa() == name
    assert native.module().isa() == before
    with pytest.raises(ValueError, match="must be an instruction set this processor runs"):
        native.module().set_isa("sse9")


def test_core_repeats_the_checks_and_names_the_argument() -> None:
    module, target = native.module(), (-1, 1, 0)
    good = dict.fromkeys(("x", "y", "scale", "noise", "strength", "bias", "act"), 0) | {
        "batch": 1, "channels": 1, "pixels": 1, "noise_stride": 0, "dtype": 0, "channels_last": False,
        "slope": 0.2, "gain": 1.0, "clamp": -1.0,
    }  # fmt: skip
    for change, message in (
        ({}, "x and y must not be null"),
        ({"pixels": 0}, "x must not be empty"),
        ({"dtype": 9}, "dtype is not supported"),
        ({"act": 7}, "act is not a known activation"),
        ({"noise_stride": 5}, "noise must have the pixels of x"),
    ):
        with pytest.raises(RuntimeError, match=f"noise_bias_act_fwd: {message}"):
            module.noise_bias_act_fwd(target, **(good | change))


def test_what_shows_an_instrumented_build_is_a_call_that_works() -> None:
    assert torch.equal(overread.doubled(overread.HELD), torch.full((overread.HELD,), 2.0))


def test_half_conversions_are_exact() -> None:
    """All 65536 bit patterns of both half types survive a round trip, and rounding is to nearest even."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = bits.view(dtype).view(1, 1, 256, 256)
        for isa in native.module().isas():
            with native.isa(isa), kernels.backend("cpu"):
                same = kernels.noise_bias_act(values, act="linear")
                # y = x * scale rounds once from float32: an odd factor meets every rounding case.
                wide = values.float().nan_to_num(1.0, 1.0, 1.0)
                scaled = kernels.noise_bias_act(wide.to(dtype), torch.tensor([[1.0009765]]), act="linear")
            assert torch.equal(same.isnan(), values.isnan())
            assert torch.equal(same.nan_to_num(7.0), values.nan_to_num(7.0))
            assert torch.equal(scaled, (wide * torch.tensor(1.0009765)).to(dtype))


def test_poison_shows_an_unwritten_output_and_a_stray_write() -> None:
    from faceedit.kernels.tensors import empty_float

    with poison() as guards:
        out = empty_float(torch.zeros(1), 3, 4)
        assert out.isnan().all()
        out.fill_(1.0)
        assert guards.untouched()
        buffer, _ = guards.buffers[0]
        buffer[-1] = 0.0
        assert not guards.untouched()


@pytest.mark.skipif(not native.build_report()["cuda"], reason="this build holds no CUDA kernels")
def test_cuda_kernels_do_not_spill() -> None:
    """Registers spilled to local memory turn a bandwidth-bound kernel into a slow one."""
    rows = native.cuda_resources()
    assert {row["architecture"] for row in rows} >= {"sm_80", "sm_86", "sm_89", "sm_90"}
    kernels_seen = " ".join(row["kernel"] for row in rows)
    assert all(stem in kernels_seen for stem in ("noise_bias_act", "masked_mse", "forward_kernel", "backward_kernel"))
    for row in rows:
        name = f"{row['kernel']} on {row['architecture']}"
        assert row["spill_stores"] == row["spill_loads"] == 0, f"{name} spills registers"
        assert row["registers"] <= most_registers(row["kernel"]), f"{name} needs {row['registers']} registers"


def most_registers(kernel: str) -> int:
    """What fits as many threads into a multiprocessor's 65536 registers as are to hide its memory's latency."""
    if "ModulatedLayer" not in kernel:
        return 64  # four blocks of 256
    if "Li64E" in kernel:
        return 255  # one block of 256: shared memory holds no more
    return 168 if "backward_kernel" in kernel else 80  # three blocks of 128, of 256
