# SPDX-License-Identifier: Apache-2.0
"""On a GPU, kernels are held to fp32's tolerances and to bits: PyTorch's convolutions must then neither round to TF32
nor sum in an order of chance."""

from collections.abc import Iterator

import pytest
import torch

from faceedit.kernels.benchmarking.providers import without_tf32


@pytest.fixture(autouse=True, scope="module")
def _fp32_is_fp32() -> Iterator[None]:
    before, torch.backends.cudnn.deterministic = torch.backends.cudnn.deterministic, True
    with without_tf32():
        yield
    torch.backends.cudnn.deterministic = before
