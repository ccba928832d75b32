# SPDX-License-Identifier: Apache-2.0
"""MaskFaceGAN: editing by optimising StyleGAN2's latent code and noise under mask, attribute and shape constraints.

config      every count, rate and weight; presets        networks   what is asked of generator, classifier and parser
plan        which regions and terms an edit has          masks      what is held, edited and blended
schedule    which terms act in which iteration           losses     each constraint, per edit
perceptual  masked LPIPS for edits of the whole face     optimizer  the stages; many edits in one batch
outcome     what is reported, given back and raised      graph      an iteration as a CUDA graph
benchmarking        whole edits, timed                   benchmark_networks  what they run on

Source: Pernus, Struc and Dobrisek, "High Resolution Face Editing with Masked GAN Latent Code Optimization", IEEE TIP
2023, and its released code; where the two disagree, `MaskFaceGANConfig` says which is followed.
"""

from faceedit.maskfacegan.config import PRESETS, MaskFaceGANConfig, preset
from faceedit.maskfacegan.plan import EditPlan, make_plan

__all__ = ["PRESETS", "EditPlan", "MaskFaceGANConfig", "make_plan", "preset"]
