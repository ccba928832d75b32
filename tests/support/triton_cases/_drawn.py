# SPDX-License-Identifier: Apache-2.0
"""Every op at drawn sizes, on Triton under its interpreter."""

from collections import Counter
from contextlib import suppress

from hypothesis import given, settings
from support.kernel_cases import Place
from support.op_cases import OPERATIONS, Case, check_drawn, drawn_cases

from faceedit import kernels


def run(examples: int = 5) -> Counter[str]:
    """Check that many calls of every op against float64; return how many ran on Triton, by op."""
    ran: Counter[str] = Counter()

    def check(case: Case) -> None:
        check_drawn(case, Place("triton"))
        with suppress(KeyError):  # nothing has run of an empty batch
            ran[case.operation] += kernels.last_backend(case.kernel) == "triton"

    for operation in OPERATIONS:
        drawn = given(drawn_cases(largest=17, operations=(operation,)))(check)
        settings(max_examples=examples, deadline=None, derandomize=True, database=None)(drawn)()
    return ran
