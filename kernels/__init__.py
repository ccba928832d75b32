# SPDX-License-Identifier: Apache-2.0
"""Fused operators for face editing networks, each with eager, C++, CUDA and Triton implementations.

Importing compiles nothing and touches no GPU. See docs/kernels for one page per op.
"""

from faceedit.kernels.alpha_blend import alpha_blend
from faceedit.kernels.dispatch import backend, backends_report, last_backend
from faceedit.kernels.masked_mse import masked_mse
from faceedit.kernels.noise_bias_act import noise_bias_act
from faceedit.kernels.norm_modulate import norm_modulate
from faceedit.kernels.operator import decomposition_table

__all__ = [
    "alpha_blend",
    "backend",
    "backends_report",
    "decomposition_table",
    "last_backend",
    "masked_mse",
    "noise_bias_act",
    "norm_modulate",
]
