# SPDX-License-Identifier: Apache-2.0
"""Ops under forward-mode AD and the transforms of torch.func, against their own reverse mode in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support import kernel_cases
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

from faceedit import kernels


def draw(*shape: int, seed: int) -> Tensor:
    return kernel_cases.draw(*shape, seed=seed).double()


FIR = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=torch.float64) / 8
OTHER, MASK, STYLES = draw(2, 4, 6, 6, seed=2), draw(2, 1, 6, 6, seed=3).abs(), draw(2, 4, seed=4)
WEIGHT, RELATION = draw(3, 4, 3, 3, seed=5), draw(5, 4, seed=6)
STRENGTH = torch.tensor(0.3, dtype=torch.float64)
CENTRES = torch.tensor([[[2, 3], [5, 5]], [[0, 4], [3, 1]]], dtype=torch.int32)
ATTRIBUTES, CONV = draw(2, 5, seed=7), draw(2, 5, 1, 1, seed=8)

LOSSES: dict[str, Callable[[Tensor], Tensor]] = {
    "noise_bias_act": lambda x: kernels.noise_bias_act(
        x, STYLES, MASK, STRENGTH, STYLES[0], gain=1.5, clamp=0.9
    ).square(),
    "upfirdn2d": lambda x: kernels.upfirdn2d(x, FIR, 2, 1, (2, 1, 2, 1)).square(),
    "fir_epilogue": lambda x: kernels.fir_epilogue(x, FIR, pad=2, bias=STYLES[0]).square(),
    "modulated_conv2d": lambda x: kernels.modulated_conv2d(
        x, WEIGHT, STYLES, noise=MASK[:1], bias=STYLES[0, :3]
    ).square(),
    "modulated_conv2d of styles": lambda x: kernels.modulated_conv2d(OTHER, WEIGHT, x[:, :, 0, 0], up=2).square(),
    "modulated_conv2d to RGB": lambda x: kernels.modulated_conv2d(
        x, WEIGHT, STYLES, down=2, rgb_weight=WEIGHT[:, :3, 0, 0], rgb_styles=STYLES[:, :3]
    )[1].square(),
    "modulated_conv2d of weights": lambda x: kernels.modulated_conv2d(
        OTHER, x.mT.reshape(4, 4, 3, 6)[..., :3], STYLES
    ).square(),
    "norm_modulate": lambda x: kernels.adain(x, STYLES, STYLES).pow(3),
    "spade": lambda x: kernels.spade(x, x * 0.1, OTHER).pow(3),
    "masked_mse": lambda x: kernels.masked_mse(x, OTHER, MASK),
    "noise_regularizer": lambda x: kernels.noise_regularizer([x[:, :1], x[:, 1:2]]),
    "place_components": lambda x: kernels.place_components([x[:, :2], x[:, 2:, :3]], CENTRES, x).square(),
    "alpha_blend": lambda x: kernels.alpha_blend(x, OTHER, MASK).square(),
    "attribute_maps": lambda x: kernels.attribute_maps(ATTRIBUTES, x, RELATION).square(),
    "conv_attribute_maps": lambda x: kernels.conv_attribute_maps(ATTRIBUTES, x, RELATION, CONV).square(),
    "bernoulli_kl": lambda x: kernels.bernoulli_kl(x.flatten(1), torch.full((2, 144), 0.9, dtype=torch.float64)),
    "gaussian_kl": lambda x: kernels.gaussian_kl(x.flatten(1), x.flatten(1) * 0.1),
}
X, DIRECTION = draw(2, 4, 6, 6, seed=1), draw(2, 4, 6, 6, seed=9)


@pytest.fixture(params=LOSSES)
def loss(request: pytest.FixtureRequest) -> Callable[[Tensor], Tensor]:
    function = LOSSES[request.param]
    return lambda x: function(x).sum()


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def reverse(loss: Callable[[Tensor], Tensor]) -> Tensor:
    x = X.clone().requires_grad_()
    return torch.autograd.grad(loss(x), x)[0]


def test_reverse_mode_transforms(loss: Callable[[Tensor], Tensor]) -> None:
    expected = reverse(loss)
    close(grad(loss)(X), expected, 1e-9)
    close(jacrev(loss)(X), expected, 1e-9)
    value, pull = vjp(loss, X)
    close(pull(torch.ones_like(value))[0], expected, 1e-9)
    close(vmap(grad(loss))(torch.stack([X, X + 0.1]))[0], expected, 1e-9)
    both = grad(lambda x: vmap(loss)(torch.stack([x, x])).sum())(X)
    close(both, 2 * expected, 1e-9)


def test_forward_mode(loss: Callable[[Tensor], Tensor]) -> None:
    """It was silently zero once: no op has a rule of its own for it."""
    expected = (reverse(loss) * DIRECTION).sum()
    assert expected.abs() > 1e-6
    close(jvp(loss, (X,), (DIRECTION,))[1], expected, 1e-9)
    close(linearize(loss, X)[1](DIRECTION), expected, 1e-9)
    close((jacfwd(lambda t: loss(X + t * DIRECTION))(torch.zeros((), dtype=torch.float64))), expected, 1e-9)
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(X.clone().requires_grad_(requires_grad), DIRECTION)
            found = forward_ad.unpack_dual(loss(dual)).tangent
        assert found is not None
        close(found, expected, 1e-9)


@pytest.mark.parametrize("name", LOSSES)
def test_many_gradients_at_a_time(name: str) -> None:
    """With is_grads_batched PyTorch's first vmap carries them, which has a rule for few operators."""
    x = X.clone().requires_grad_()
    y = LOSSES[name](x)
    many = torch.stack([draw(*y.shape, seed=seed) for seed in (1, 2, 3)])
    expected = torch.stack([torch.autograd.grad(y, x, one, retain_graph=True)[0] for one in many])
    for create_graph in (False, True):
        (found,) = torch.autograd.grad(y, x, many, is_grads_batched=True, retain_graph=True, create_graph=create_graph)
        close(found, expected, 1e-9)


def test_second_derivatives(loss: Callable[[Tensor], Tensor]) -> None:
    def along(t: Tensor) -> Tensor:
        return loss(X + t[0] * DIRECTION + t[1] * OTHER)

    found = hessian(along)(torch.zeros(2, dtype=torch.float64))
    mixed = jvp(grad(along), (torch.zeros(2, dtype=torch.float64),), (torch.tensor([1.0, 0.0], dtype=torch.float64),))[
        1
    ]
    close(found[:, 0], mixed, 1e-8)
    close(found, found.mT, 1e-8)


def test_a_scope_without_tangents_keeps_the_kernels() -> None:
    with forward_ad.dual_level():
        plain = kernels.noise_bias_act(X.float())
    assert torch.equal(plain, kernels.noise_bias_act(X.float()))
    with forward_ad.dual_level():
        kernels.noise_bias_act(forward_ad.make_dual(X.float(), DIRECTION.float()))
        assert kernels.last_backend("noise_bias_act") == "eager"


def test_the_bare_op_refuses_a_tangent() -> None:
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(X, DIRECTION)
        with pytest.raises(NotImplementedError, match=r"faceedit.noise_bias_act has no forward-mode derivative"):
            torch.ops.faceedit.noise_bias_act(dual, None, None, None, None, "lrelu", 0.2, 1.0, -1.0)


def test_maps_of_noise_under_vmap() -> None:
    """The regulariser's gradient and the normalisation in place, an axis mapped in front or behind."""
    first, second = (draw(2, 1, side, side, seed=side).requires_grad_() for side in (16, 32))
    loss = kernels.noise_regularizer([first, second])
    rows = vmap(lambda v: torch.autograd.grad(loss, [first, second], v, retain_graph=True))(torch.eye(2).double())
    for index, chosen in enumerate(torch.eye(2).double()):
        alone = torch.autograd.grad(loss, [first, second], chosen, retain_graph=True)
        for row, one in zip(rows, alone, strict=True):
            assert torch.equal(row[index], one)

    for axis in (0, 2):
        maps = draw(3, 2, 1, 8, 8, seed=3)
        shared = draw(2, 1, 8, 8, seed=4)
        expected, expected_shared = [one.clone() for one in maps], shared.clone()
        kernels.normalize_noise_([expected_shared])
        for one in expected:
            kernels.normalize_noise_([one])
        mapped = maps.movedim(0, axis).contiguous()
        vmap(lambda one, shared=shared: (kernels.normalize_noise_([one, shared]), one)[1], in_dims=axis)(mapped)
        assert torch.equal(mapped.movedim(axis, 0), torch.stack(expected))
        assert torch.equal(shared, expected_shared)
