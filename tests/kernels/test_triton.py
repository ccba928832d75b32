# SPDX-License-Identifier: Apache-2.0
"""Triton without a GPU: numbers under its interpreter, and compilation for sm_80 and sm_90.

Both need a process of their own: TRITON_INTERPRET is read when a kernel is decorated, and it excludes compiling.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.command_line import PACKAGE_ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]

TESTS = Path(__file__).parents[1]


def run_script(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=TESTS,
        env=os.environ | {"PYTHONPATH": f"{PACKAGE_ROOT}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


NUMBERS = """
import torch
from faceedit import kernels
from faceedit.kernels.masked_mse import RELAX, NORMALIZE, masked_mse, reference as mse_reference
from faceedit.kernels.noise_bias_act import ACTIVATIONS, noise_bias_act, reference
from support.kernel_cases import DTYPES, FORMATS, Place, check_against_oracle, draw

place, ran = Place("triton"), 0
for fmt in FORMATS:
    for dtype in DTYPES:
        for act in ACTIVATIONS:
            x = (draw(2, 35, 9, 8, seed=1) + 0.003).to(dtype)
            x = torch.where(x.abs() < 0.03, 0.5, x).to(memory_format=fmt)
            noise, strength = draw(1, 1, 9, 8, seed=3, low=3.0), torch.tensor(0.3)
            operands = [draw(2, 35, seed=2, low=0.5), noise, strength, draw(35, seed=4)]
            if act in ("relu", "lrelu"):
                operands = [operands[0], None, None, None]
            check_against_oracle(
                place,
                lambda *t: noise_bias_act(*t, act=act, gain=1.4, clamp=50.0),
                lambda *t: reference(*t, act, 0.2, 1.4, 50.0),
                [x, *operands], ("x", "scale", "noise", "strength", "bias"), dtype,
            )
            ran += kernels.last_backend("noise_bias_act_backward") == "triton"
        for relax in RELAX:
            for normalize in NORMALIZE:
                a = draw(2, 3, 19, 17, seed=1).to(dtype).to(memory_format=fmt)
                b = (draw(2, 3, 19, 17, seed=1) + draw(2, 3, 19, 17, seed=2, low=0.5)).to(dtype).to(memory_format=fmt)
                mask = draw(2, 1, 19, 17, seed=3, low=0.0)
                exclude, include = (draw(1, 1, 19, 17, seed=4) > 1), draw(2, 1, 19, 17, seed=5, low=-0.6)
                masks = {"exclude": exclude, "include": include}
                wide = [m.double() for m in (mask, exclude, include)]
                check_against_oracle(
                    place,
                    lambda a, b: masked_mse(a, b, mask, **masks, relax=relax, normalize=normalize),
                    lambda a, b: mse_reference(a, b, *wide, relax, normalize)[0],
                    [a, b], ("a", "b"), dtype,
                )
                ran += kernels.last_backend("masked_mse_backward") == "triton"

# From the saved output, with a clamp that binds; NaN and infinities.
bias = draw(35, seed=4)
x = draw(1, 35, 3, 3, seed=7) * 3
z = x + bias.view(1, -1, 1, 1)
x = torch.where((z.abs() < 0.02) | ((z - 1).abs() < 0.02) | ((0.2 * z + 1).abs() < 0.02), x + 0.1, x)
check_against_oracle(
    place,
    lambda x, b: noise_bias_act(x, bias=b, clamp=1.0),
    lambda x, b: reference(x, None, None, None, b, "lrelu", 0.2, 1.0, 1.0),
    [x, bias], ("x", "bias"), torch.float32,
)
x = torch.tensor([float("nan"), float("inf"), -float("inf"), 1.0]).view(1, 1, 1, 4)
with kernels.backend("triton"):
    y = noise_bias_act(x, clamp=2.0)
assert y.isnan().tolist() == [[[[True, False, False, False]]]] and y[0, 0, 0, 1:].tolist() == [2.0, -2.0, 1.0], y
print("ran", ran)
"""


def test_interpreter_matches_the_oracle() -> None:
    assert run_script(NUMBERS, TRITON_INTERPRET="1").split()[-2:] == ["ran", str(2 * 3 * (6 + 4))]


COMPILE = """
import itertools
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from faceedit.kernels import masked_mse_triton, noise_bias_act_triton

def compile_kernel(kernel, dtype, constants, targets=(80, 90)):
    # Pointers named here hold fp32 whatever the dtype of the images is.
    wide = ("scale", "noise", "strength", "bias", "sums", "rows", "squares", "weight", "inverse", "mask", "clude")
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith("_ptr"):
            narrow = not any(part in name for part in wide) and not (name == "grad_ptr" and "MASK" in constants)
            signature[name] = f"*{dtype if narrow else 'fp32'}"
        else:
            signature[name] = "fp32" if name in ("slope", "gain", "clamp") else "i32"
    for capability in targets:
        compiled = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", capability, 32))
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        print(kernel.fn.__name__, dtype, capability)

everything = dict.fromkeys(("SCALE", "NOISE", "STRENGTH", "BIAS", "CLAMP"), True)
for dtype, last in itertools.product(("fp32", "bf16"), (False, True)):
    forward = everything | {"ACT": 5, "CHANNELS_LAST": last, "BLOCK": 1024}
    compile_kernel(noise_bias_act_triton.forward_kernel, dtype, forward)
    backward = everything | {
        "ACT": 3, "CHANNELS_LAST": last, "FROM_INPUT": True, "WANT_SCALE": True, "WANT_ROWS": True, "WANT_BIAS": True,
        "BLOCK_P": 64, "BLOCK_C": 32,
    }
    compile_kernel(noise_bias_act_triton.backward_kernel, dtype, backward)
    masks = {"CHANNELS_LAST": last, "MASK": True, "EXCLUDE": True, "INCLUDE": True, "MINMAX": last, "BLOCK": 256}
    compile_kernel(masked_mse_triton.forward_kernel, dtype, masks)
    compile_kernel(masked_mse_triton.backward_kernel, dtype, masks | {"WANT_A": True, "WANT_B": True})
"""


def test_kernels_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    lines = run_script(COMPILE, TRITON_CACHE_DIR=str(tmp_path), TRITON_INTERPRET="0").splitlines()
    assert len(lines) == 2 * 2 * 4 * 2
