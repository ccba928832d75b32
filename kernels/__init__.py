# SPDX-License-Identifier: Apache-2.0
"""Fused operators for face editing networks, each with eager, C++, CUDA and Triton implementations.

Importing compiles nothing and touches no GPU. docs/kernels has one page per op; its switching.md says what replaces
the ops of other StyleGAN2 libraries.
"""

from faceedit.kernels.alpha_blend import alpha_blend
from faceedit.kernels.attribute_maps import attribute_maps, conv_attribute_maps
from faceedit.kernels.dispatch import backend, backends_report, last_backend
from faceedit.kernels.fir_epilogue import fir_epilogue
from faceedit.kernels.gates import gru_gate, reset_gate
from faceedit.kernels.kl import bernoulli_kl, gaussian_kl
from faceedit.kernels.masked_mse import masked_mse
from faceedit.kernels.modulated_conv2d import modulated_conv2d
from faceedit.kernels.noise_bias_act import noise_bias_act
from faceedit.kernels.noise_regularizer import noise_regularizer, normalize_noise_
from faceedit.kernels.norm_modulate import norm_modulate
from faceedit.kernels.normalization import adain, instance_norm_act, sft, spade
from faceedit.kernels.operator import decomposition_table
from faceedit.kernels.place_components import mask_centres, place_components
from faceedit.kernels.upfirdn2d import downsample2d, filter2d, setup_filter, upfirdn2d, upsample2d

__all__ = [
    "adain",
    "alpha_blend",
    "attribute_maps",
    "backend",
    "backends_report",
    "bernoulli_kl",
    "conv_attribute_maps",
    "decomposition_table",
    "downsample2d",
    "filter2d",
    "fir_epilogue",
    "gaussian_kl",
    "gru_gate",
    "instance_norm_act",
    "last_backend",
    "mask_centres",
    "masked_mse",
    "modulated_conv2d",
    "noise_bias_act",
    "noise_regularizer",
    "norm_modulate",
    "normalize_noise_",
    "place_components",
    "reset_gate",
    "setup_filter",
    "sft",
    "spade",
    "upfirdn2d",
    "upsample2d",
]
