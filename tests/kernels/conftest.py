# SPDX-License-Identifier: Apache-2.0
"""On a GPU, kernels are held to fp32's tolerances, so PyTorch's convolutions must not round to TF32 meanwhile."""

from collections.abc import Iterator

import pytest

from faceedit.kernels.benchmarking.providers import without_tf32


@pytest.fixture(autouse=True, scope="module")
def _fp32_is_fp32() -> Iterator[None]:
    with without_tf32():
        yield
