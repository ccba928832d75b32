# SPDX-License-Identifier: Apache-2.0
"""What Triton kernels are checked with where there is no GPU; one module an op, found by its name.

Each module has `numbers() -> int`, which compares with the oracle under the interpreter and says how many rows ran on
Triton, `ROWS`, how many that must be, and `compile_all() -> None`, which calls `compile_kernel`. By hand:

TRITON_INTERPRET=1 python -m support.triton_cases numbers noise_bias_act     (from tests/)
TRITON_INTERPRET=0 python -m support.triton_cases compile noise_bias_act
TRITON_INTERPRET=1 python -m support.triton_cases drawn                      (every op at drawn sizes)
"""

import re
from pathlib import Path
from typing import Any

CASES = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


# Kernels that index all of their operands' elements, whose number may pass 32 bits in one sample.
FLAT = {
    ("alpha_blend_triton", "forward_kernel"),
    ("noise_bias_act_triton", "forward_kernel"),
    ("place_components_triton", "crop_kernel"),
    ("place_components_triton", "place_kernel"),
    ("upfirdn2d_triton", "forward_kernel"),
}


def compile_kernel(kernel: Any, constants: dict[str, Any], types: dict[str, str], **options: int) -> None:
    """Compile for sm_80 and sm_90. `types` gives Triton types by argument; else `*_ptr` is *fp32, a number i32.

    options: those of the launch, as num_warps.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    unknown = set(constants) | set(types)
    assert unknown <= set(kernel.arg_names), f"{kernel.fn.__name__} has no {unknown - set(kernel.arg_names)}"
    signature = {
        name: "constexpr" if name in constants else types.get(name, "*fp32" if name.endswith("_ptr") else "i32")
        for name in kernel.arg_names
    }
    for capability in (80, 90):
        source = ASTSource(kernel, signature, constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert f".target sm_{capability}" in compiled.asm["ptx"]
        if (kernel.fn.__module__.rpartition(".")[2], kernel.fn.__name__) in FLAT:
            narrow = re.findall(
                r".*arith\.muli %\w+, %(?!c\d+_i32).*[ x<]i32\b.*", compiled.asm["ttir"]
            )  # a side times 2 is none
            assert not narrow, f"{kernel.fn.__name__} multiplies in 32 bits: {narrow}"
        print("compiled", kernel.fn.__name__, capability)
