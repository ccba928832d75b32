# SPDX-License-Identifier: Apache-2.0
"""A small call of every op, as a network makes it: what is an activation, what a parameter, what a constant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from support.kernel_cases import TOLERANCE
from torch import Tensor

from faceedit import kernels

N, C, K, A, SIDE = 2, 4, 3, 5, 8
FIR = kernels.setup_filter([1, 3, 3, 1])
# Of a convolution in half precision with a kink behind it, which a rounded sum may lie on the other side of.
CONVOLUTION_TOLERANCE = {torch.float16: (5e-3, 2e-2), torch.bfloat16: (1e-2, 5e-2)}
CENTRES = torch.tensor([[[3, 2], [7, 7]], [[0, 5], [4, -2]]], dtype=torch.int32)


@dataclass(frozen=True)
class Case:
    """One call: what it is made of, and what comes out.

    activations are shapes of what a convolution or linear layer produced, in autocast's dtype; parameters of what stays
    fp32 and is trained; constants of what stays fp32 and is not, in [0, 1]. `op` takes them in that order. result: the
    output's dtype, None for that of the activations. convolves: in the activations' dtype, so that their rounding shows
    in a result of fp32 too. resizes: a mask that has a gradient, bilinearly.
    """

    name: str
    op: Callable[..., Tensor]
    activations: tuple[tuple[int, ...], ...]
    parameters: tuple[tuple[int, ...], ...] = ()
    constants: tuple[tuple[int, ...], ...] = ()
    result: torch.dtype | None = None
    convolves: bool = False
    resizes: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def operation(self) -> str:
        return self.name.split()[0]

    @property
    def has_gradient(self) -> bool:
        return self.operation not in ("mask_centres", "normalize_noise_")

    def tolerance(self, half: torch.dtype, result: torch.dtype) -> tuple[float, float]:
        """Return the bounds on relative L2 against float64, of the output and of gradients."""
        if self.convolves:
            return CONVOLUTION_TOLERANCE[half]
        return TOLERANCE[result][0], TOLERANCE[half][1]


def _layer(x: Tensor, weight: Tensor, styles: Tensor, noise: Tensor, strength: Tensor, bias: Tensor) -> Tensor:
    return kernels.modulated_conv2d(x, weight, styles, noise=noise, strength=strength, bias=bias)  # type: ignore[return-value]


def _layer_up(x: Tensor, styles: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.modulated_conv2d(x, weight, styles, bias=bias, up=2)  # type: ignore[return-value]


def _layer_down(x: Tensor, styles: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return kernels.modulated_conv2d(x, weight, styles, bias=bias, down=2, act="silu")  # type: ignore[return-value]


def _layer_rgb(x: Tensor, weight: Tensor, styles: Tensor, rgb_weight: Tensor, rgb_styles: Tensor) -> Tensor:
    return kernels.modulated_conv2d(x, weight, styles, rgb_weight=rgb_weight, rgb_styles=rgb_styles)[1]


def _normalized(*noises: Tensor) -> Tensor:
    maps = [noise.detach().clone() for noise in noises]
    kernels.normalize_noise_(maps)
    return torch.cat(maps, 1)


IMAGE, ROW, MASK, WIDE = (N, C, SIDE, SIDE), (N, C), (N, 1, SIDE, SIDE), (N, C, 2 * SIDE, 2 * SIDE)
PARTS, WEIGHT = (N, K, SIDE, SIDE), (6, C, 3, 3)
CASES = [
    Case("upfirdn2d", lambda x: kernels.upfirdn2d(x, FIR.to(x.device), pad=2), (IMAGE,)),
    Case("filter2d", lambda x: kernels.filter2d(x, FIR.to(x.device)), (IMAGE,)),
    Case("upsample2d", lambda x: kernels.upsample2d(x, FIR.to(x.device)), (IMAGE,)),
    Case("downsample2d", lambda x: kernels.downsample2d(x, FIR.to(x.device)), (IMAGE,)),
    Case(
        "fir_epilogue",
        lambda x, skip, scale, noise, strength, bias: kernels.fir_epilogue(
            x,
            FIR.to(x.device),
            up=2,
            pad=(2, 1, 2, 1),
            scale=scale,
            noise=noise,
            strength=strength,
            bias=bias,
            add=skip,
            act="silu",  # smooth: in front of a kink the filtered image, rounded, may lie on its other side
        ),
        (IMAGE, WIDE),
        (ROW, (N, 1, 2 * SIDE, 2 * SIDE), (), (C,)),
    ),
    Case("noise_bias_act", kernels.noise_bias_act, (IMAGE,), (ROW, (1, 1, SIDE, SIDE), (1,), (C,))),
    Case("noise_bias_act bias", lambda x, bias: kernels.noise_bias_act(x, bias=bias), (IMAGE,), ((C,),)),
    Case("modulated_conv2d", _layer, (IMAGE,), (WEIGHT, ROW, (1, 1, SIDE, SIDE), (), (6,)), convolves=True),
    Case("modulated_conv2d up", _layer_up, (IMAGE, ROW), (WEIGHT, (6,)), convolves=True),
    Case("modulated_conv2d down", _layer_down, (IMAGE, ROW), (WEIGHT, (6,)), convolves=True),
    Case(
        "modulated_conv2d rgb",
        _layer_rgb,
        (IMAGE,),
        (WEIGHT, ROW, (3, 6), (N, 6)),
        result=torch.float32,
        convolves=True,
    ),
    Case("norm_modulate", lambda x, g, b: kernels.norm_modulate(x, g, b, act="silu"), (IMAGE,), (MASK, ROW)),
    Case("instance_norm_act", kernels.instance_norm_act, (IMAGE,), ((C,), (C,))),
    Case("adain", kernels.adain, (IMAGE,), (ROW, ROW)),
    Case("adain of a linear layer", kernels.adain, (IMAGE, ROW, ROW)),
    Case("sft", kernels.sft, (IMAGE, IMAGE, MASK)),
    Case("sft of maps in fp32", kernels.sft, (IMAGE,), (IMAGE, MASK)),
    Case("spade", kernels.spade, (IMAGE, IMAGE, IMAGE)),
    Case(
        "spade over batch norm",
        lambda x, g, b, m, r: kernels.spade(x, g, b, mean=m, rstd=r),
        (IMAGE, IMAGE, IMAGE),
        (),
        ((C,), (C,)),
    ),
    Case("masked_mse", kernels.masked_mse, (IMAGE,), (), (IMAGE, MASK), torch.float32),
    Case(
        "masked_mse of a trained mask",
        lambda a, m, b, e, i: kernels.masked_mse(a, b, torch.sigmoid(m), exclude=e, include=i, relax="minmax"),
        (IMAGE,),
        ((N, 1, SIDE // 2, SIDE // 2),),
        (IMAGE, MASK, (1, 1, SIDE, SIDE)),
        torch.float32,
        resizes=True,
    ),
    Case("bernoulli_kl", kernels.bernoulli_kl, ((N, A),), (), ((N, A), (A,)), torch.float32),
    Case(
        "bernoulli_kl of a trained weight",
        lambda x, w, t: kernels.bernoulli_kl(x, t, w),
        ((N, A),),
        ((A,),),
        ((N, A),),
        torch.float32,
    ),
    Case("gaussian_kl", kernels.gaussian_kl, ((N, A), (N, A)), result=torch.float32),
    Case("gaussian_kl of two dtypes", kernels.gaussian_kl, ((N, A),), ((N, A),), result=torch.float32),
    Case(
        "place_components",
        lambda a, b, m: kernels.place_components([a, b], CENTRES.to(a.device), m),
        ((N, 2, 5, 4), (N, 3, 2, 3), IMAGE),
    ),
    Case("mask_centres", kernels.mask_centres, (), (), (PARTS,), torch.int32),
    Case("mask_centres of a half mask", lambda x: kernels.mask_centres(x.clamp(0, 1)), (PARTS,), result=torch.int32),
    Case(
        "noise_regularizer",
        lambda *maps: kernels.noise_regularizer(maps, stop=2),
        (),
        (MASK, (N, 1, 4, 4)),
        (),
        torch.float32,
    ),
    Case(
        "noise_regularizer of half maps",
        lambda *maps: kernels.noise_regularizer(maps, stop=2),
        (MASK, (N, 1, 4, 4)),
        result=torch.float32,
    ),
    Case("normalize_noise_", _normalized, (MASK, MASK)),
    Case("normalize_noise_ of parameters", _normalized, (), (MASK, MASK), result=torch.float32),
    Case("alpha_blend", kernels.alpha_blend, (IMAGE,), (), (IMAGE, MASK)),
    Case(
        "alpha_blend under a trained mask",
        lambda f, b, m: kernels.alpha_blend(f, b, m, feather=1),
        (IMAGE, IMAGE, MASK),
    ),
    Case(
        "gru_gate",
        lambda h, z, c, s, t: kernels.gru_gate(h, z, c, z_scale=s, z_shift=t, c_scale=t),
        (IMAGE,) * 3,
        (),
        ((C,), (C,)),
    ),
    Case(
        "gru_gate of a trained norm",
        lambda h, z, c, s, t: kernels.gru_gate(h, z, c, z_scale=s, c_shift=t),
        (IMAGE,) * 3,
        ((C,), (C,)),
    ),
    Case("reset_gate", lambda h, r, s, t: kernels.reset_gate(h, r, scale=s, shift=t), (IMAGE,) * 2, (), ((C,), (C,))),
    Case("reset_gate of a trained norm", lambda h, r, s: kernels.reset_gate(h, r, scale=s), (IMAGE,) * 2, ((C,),)),
    Case("attribute_maps", lambda p, a, r: kernels.attribute_maps(a, p, r), (PARTS,), ((N, A),), ((A, K),)),
    Case(
        "attribute_maps of a trained relation",
        lambda p, a, r: kernels.attribute_maps(a, p, r),
        (PARTS,),
        ((N, A), (N, A, K)),
    ),
    Case(
        "conv_attribute_maps",
        lambda p, a, r, w, b: kernels.conv_attribute_maps(a, p, r, w, b, padding=1),
        (PARTS,),
        ((N, A), (A, K), (6, A, 3, 3), (6,)),
        convolves=True,
    ),
    Case(
        "conv_attribute_maps of nobody",
        lambda p, a, r, w, b: kernels.conv_attribute_maps(a, p, r, w, b, padding=1),
        ((0, K, SIDE, SIDE),),
        ((0, A), (A, K), (6, A, 3, 3), (6,)),
    ),
]
