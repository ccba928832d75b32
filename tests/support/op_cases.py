# SPDX-License-Identifier: Apache-2.0
"""A small call of every op, as a network makes it: what is an activation, what a parameter, what a constant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from support.compare import assert_close
from support.kernel_cases import TOLERANCE, Place, draw
from torch import Tensor

from faceedit import kernels
from faceedit.kernels import native
from faceedit.kernels.tensors import poison

FIR = kernels.setup_filter([1, 3, 3, 1])
# Of a convolution in half precision with a kink behind it, which a rounded sum may lie on the other side of.
CONVOLUTION_TOLERANCE = {torch.float16: (5e-3, 2e-2), torch.bfloat16: (1e-2, 5e-2)}
CENTRES = torch.tensor([[[3, 2], [7, 7]], [[0, 5], [4, -2]]], dtype=torch.int32)
# The field's names, and the op that each is.
KERNEL_OF = dict.fromkeys(("filter2d", "upsample2d", "downsample2d"), "upfirdn2d") | dict.fromkeys(
    ("instance_norm_act", "adain", "sft", "spade"), "norm_modulate"
)
KERNEL_OF |= dict.fromkeys(("gru_gate", "reset_gate"), "gate")


@dataclass(frozen=True)
class Case:
    """One call: what it is made of, and what comes out.

    activations are shapes of what a convolution or linear layer produced, in autocast's dtype; parameters of what stays
    fp32 and is trained; constants of what stays fp32 and is not, in [0, 1]. `op` takes them in that order. result: the
    output's dtype, None for that of the activations. convolves: in the activations' dtype, so that their rounding shows
    in a result of fp32 too. resizes: a mask that has a gradient, bilinearly. composed: eager's composition of PyTorch's
    operators, whatever the backend: what is trained has no kernel for its gradient, or nothing is left to do.
    """

    name: str
    op: Callable[..., Tensor]
    activations: tuple[tuple[int, ...], ...]
    parameters: tuple[tuple[int, ...], ...] = ()
    constants: tuple[tuple[int, ...], ...] = ()
    result: torch.dtype | None = None
    convolves: bool = False
    resizes: bool = False
    composed: bool = False

    def __str__(self) -> str:
        return self.name

    @property
    def operation(self) -> str:
        return self.name.split()[0]

    @property
    def kernel(self) -> str:
        """The name by which its backend is recorded."""
        return KERNEL_OF.get(self.operation, self.operation)

    @property
    def takes_statistics(self) -> bool:
        return self.kernel == "norm_modulate" and self.operation != "sft" and self.name != "spade over batch norm"

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


def cases(n: int = 2, c: int = 4, parts: int = 3, attributes: int = 5, h: int = 8, w: int = 8) -> list[Case]:
    """Return a call of every op: n images of c channels, h by w pixels; masks of some parts; some attributes."""
    image, row, mask, wide = (n, c, h, w), (n, c), (n, 1, h, w), (n, c, 2 * h, 2 * w)
    half = mask if h % 2 or w % 2 else (n, 1, h // 2, w // 2)
    masks, weight, relation = (n, parts, h, w), (6, c, 3, 3), (attributes, parts)
    side = 1 << (max(h, w, 2) - 1).bit_length()  # noise maps are squares whose side is a power of two
    centres = CENTRES.repeat(-(-n // 2), 1, 1)[:n]
    return [
        Case("upfirdn2d", lambda x: kernels.upfirdn2d(x, FIR.to(x.device), pad=2), (image,)),
        Case("filter2d", lambda x: kernels.filter2d(x, FIR.to(x.device)), (image,)),
        Case("upsample2d", lambda x: kernels.upsample2d(x, FIR.to(x.device)), (image,)),
        Case("downsample2d", lambda x: kernels.downsample2d(x, FIR.to(x.device)), (image,)),
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
            (image, wide),
            (row, (n, 1, 2 * h, 2 * w), (), (c,)),
        ),
        Case("noise_bias_act", kernels.noise_bias_act, (image,), (row, (1, 1, h, w), (1,), (c,))),
        Case("noise_bias_act bias", lambda x, bias: kernels.noise_bias_act(x, bias=bias), (image,), ((c,),)),
        Case("modulated_conv2d", _layer, (image,), (weight, row, (1, 1, h, w), (), (6,)), convolves=True),
        Case("modulated_conv2d up", _layer_up, (image, row), (weight, (6,)), convolves=True),
        Case("modulated_conv2d down", _layer_down, (image, row), (weight, (6,)), convolves=True),
        Case(
            "modulated_conv2d rgb",
            _layer_rgb,
            (image,),
            (weight, row, (3, 6), (n, 6)),
            result=torch.float32,
            convolves=True,
        ),
        Case("norm_modulate", lambda x, g, b: kernels.norm_modulate(x, g, b, act="silu"), (image,), (mask, row)),
        Case("instance_norm_act", kernels.instance_norm_act, (image,), ((c,), (c,))),
        Case("adain", kernels.adain, (image,), (row, row)),
        Case("adain of a linear layer", kernels.adain, (image, row, row)),
        Case("sft", kernels.sft, (image, image, mask)),
        Case("sft of maps in fp32", kernels.sft, (image,), (image, mask)),
        Case("spade", kernels.spade, (image, image, image)),
        Case(
            "spade over batch norm",
            lambda x, g, b, m, r: kernels.spade(x, g, b, mean=m, rstd=r),
            (image, image, image),
            (),
            ((c,), (c,)),
        ),
        Case("masked_mse", kernels.masked_mse, (image,), (), (image, mask), torch.float32),
        Case(
            "masked_mse of a trained mask",
            lambda a, m, b, e, i: kernels.masked_mse(a, b, torch.sigmoid(m), exclude=e, include=i, relax="minmax"),
            (image,),
            (half,),
            (image, mask, (1, 1, h, w)),
            torch.float32,
            resizes=True,
            composed=True,
        ),
        Case(
            "bernoulli_kl",
            kernels.bernoulli_kl,
            ((n, attributes),),
            (),
            ((n, attributes), (attributes,)),
            torch.float32,
        ),
        Case(
            "bernoulli_kl of a trained weight",
            lambda x, w, t: kernels.bernoulli_kl(x, t, w),
            ((n, attributes),),
            ((attributes,),),
            ((n, attributes),),
            torch.float32,
            composed=True,
        ),
        Case("gaussian_kl", kernels.gaussian_kl, ((n, attributes), (n, attributes)), result=torch.float32),
        Case(
            "gaussian_kl of two dtypes",
            kernels.gaussian_kl,
            ((n, attributes),),
            ((n, attributes),),
            result=torch.float32,
        ),
        Case(
            "place_components",
            lambda a, b, m: kernels.place_components([a, b], centres.to(a.device), m),
            ((n, 2, 5, 4), (n, 3, 2, 3), image),
        ),
        Case("mask_centres", kernels.mask_centres, (), (), (masks,), torch.int32),
        Case(
            "mask_centres of a half mask", lambda x: kernels.mask_centres(x.clamp(0, 1)), (masks,), result=torch.int32
        ),
        Case(
            "noise_regularizer",
            lambda *maps: kernels.noise_regularizer(maps, stop=2),
            (),
            ((n, 1, side, side), (n, 1, 4, 4)),
            (),
            torch.float32,
        ),
        Case(
            "noise_regularizer of half maps",
            lambda *maps: kernels.noise_regularizer(maps, stop=2),
            ((n, 1, side, side), (n, 1, 4, 4)),
            result=torch.float32,
        ),
        Case("normalize_noise_", _normalized, (mask, mask)),
        Case("normalize_noise_ of parameters", _normalized, (), (mask, mask), result=torch.float32),
        Case("alpha_blend", kernels.alpha_blend, (image,), (), (image, mask)),
        Case(
            "alpha_blend under a trained mask",
            lambda f, b, m: kernels.alpha_blend(f, b, m, feather=1),
            (image, image, mask),
        ),
        Case(
            "gru_gate",
            lambda h, z, c, s, t: kernels.gru_gate(h, z, c, z_scale=s, z_shift=t, c_scale=t),
            (image,) * 3,
            (),
            ((c,), (c,)),
        ),
        Case(
            "gru_gate of a trained norm",
            lambda h, z, c, s, t: kernels.gru_gate(h, z, c, z_scale=s, c_shift=t),
            (image,) * 3,
            ((c,), (c,)),
            composed=True,
        ),
        Case(
            "reset_gate", lambda h, r, s, t: kernels.reset_gate(h, r, scale=s, shift=t), (image,) * 2, (), ((c,), (c,))
        ),
        Case(
            "reset_gate of a trained norm",
            lambda h, r, s: kernels.reset_gate(h, r, scale=s),
            (image,) * 2,
            ((c,),),
            composed=True,
        ),
        Case(
            "attribute_maps", lambda p, a, r: kernels.attribute_maps(a, p, r), (masks,), ((n, attributes),), (relation,)
        ),
        Case(
            "attribute_maps of a trained relation",
            lambda p, a, r: kernels.attribute_maps(a, p, r),
            (masks,),
            ((n, attributes), (n, *relation)),
        ),
        Case(
            "conv_attribute_maps",
            lambda p, a, r, w, b: kernels.conv_attribute_maps(a, p, r, w, b, padding=1),
            (masks,),
            ((n, attributes), relation, (6, attributes, 3, 3), (6,)),
            convolves=True,
            composed=True,
        ),
        Case(
            "conv_attribute_maps of nobody",
            lambda p, a, r, w, b: kernels.conv_attribute_maps(a, p, r, w, b, padding=1),
            ((0, parts, h, w),),
            ((0, attributes), relation, (6, attributes, 3, 3), (6,)),
            composed=True,
        ),
    ]


CASES = cases()
IMAGE = (2, 4, 8, 8)


def inputs_of(case: Case) -> list[Tensor]:
    """Draw a case's operands in fp32; what is trained requires grad."""
    trained = [*case.activations, *case.parameters]
    tensors = [draw(*shape, seed=seed).requires_grad_() for seed, shape in enumerate(trained)]
    return tensors + [draw(*shape, seed=40 + i, low=0.0) for i, shape in enumerate(case.constants)]


@st.composite
def drawn_cases(choose: st.DrawFn, name: str, largest: int = 33) -> Case:
    """Choose sizes of the case of that name, about the edges of tiles, an empty batch among them."""
    edges = [size for size in (2, 3, 5, 7, 8, 9, 15, 16, 17, 33) if size <= largest]
    # Demodulation takes the style out of a layer of one channel: its gradient is rounding then.
    channels = edges if name.startswith("modulated_conv2d") else [*edges, 1]
    chosen = cases(
        n=choose(st.sampled_from([2, 1, 3, 0])),
        c=choose(st.sampled_from(channels)),
        parts=choose(st.integers(1, 7)),
        attributes=choose(st.integers(1, 9)),
        h=choose(st.sampled_from(edges)),
        w=choose(st.sampled_from(edges)),
    )
    return next(case for case in chosen if case.name == name)


@contextmanager
def at(place: Place) -> Iterator[None]:
    """A scope in which ops run on a place's backend and instruction set, and may write to their own buffers alone."""
    with ExitStack() as scope:
        if place.isa:
            scope.enter_context(native.isa(place.isa))
        scope.enter_context(kernels.backend(place.backend))
        guards = scope.enter_context(poison())
        yield
        assert guards.untouched(), "a kernel wrote outside a buffer"


def uneven(y: Tensor) -> Tensor:
    """Sum with unequal weights: a normalised plane has the same sum, and the same sum of squares, whatever it held."""
    return (torch.linspace(0.5, 1.5, y.numel(), dtype=y.dtype, device=y.device).view(y.shape) * y).sum()


def as_inputs(inputs: Sequence[Tensor], *to: Any) -> list[Tensor]:
    """Return new leaves, moved or cast by Tensor.to; what is trained still is."""
    return [t.detach().to(*to).clone().requires_grad_(t.requires_grad) for t in inputs]


def results_of(case: Case, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return a case's result and the gradients of what is trained."""
    y = case.op(*inputs)
    trained = [t for t in inputs if t.requires_grad]
    return [y.detach(), *(torch.autograd.grad(uneven(y), trained, materialize_grads=True) if y.requires_grad else [])]


def check_drawn(case: Case, place: Place) -> None:
    """Compare a case's result and gradients at a place, in fp32, with eager's in float64."""
    inputs = inputs_of(case)
    expected = results_of(case, as_inputs(inputs, torch.float64))
    with at(place):
        found = results_of(case, as_inputs(inputs, place.device))
    if not case.composed and found[0].numel():
        assert kernels.last_backend(case.kernel) == place.backend
    forward, backward = TOLERANCE[torch.float32]
    if case.convolves:  # it adds up 9 C products
        forward, backward = 1e-5, 1e-4
    elif case.takes_statistics:  # the gradient that a norm leaves of a plane of four pixels is what cancels
        backward = 1e-4
    elif case.kernel in (
        "bernoulli_kl",
        "gaussian_kl",
    ):  # a divergence that is small is a difference of terms that are not
        forward, backward = 1e-5, 1e-5
    for index, (actual, wanted) in enumerate(zip(found, expected, strict=True)):
        name = f"gradient {index - 1}" if index else "result"
        assert_close(name, actual, wanted, relative_l2=backward if index else forward)
