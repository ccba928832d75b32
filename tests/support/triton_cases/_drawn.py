# SPDX-License-Identifier: Apache-2.0
"""Every op at drawn sizes, on Triton under its interpreter; check_drawn sees to it that it runs there."""

from hypothesis import given, settings
from support.kernel_cases import Place
from support.op_cases import CASES, Case, check_drawn, drawn_cases


def run(examples: int = 4) -> list[str]:
    """Check that many calls of every case that has kernels against float64; return the cases' names."""

    def check(case: Case) -> None:
        check_drawn(case, Place("triton"))

    names = [case.name for case in CASES if not case.composed]
    for name in names:
        drawn = given(drawn_cases(name, largest=17))(check)
        settings(max_examples=examples, deadline=None, derandomize=True, database=None)(drawn)()
    return names
