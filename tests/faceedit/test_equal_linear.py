# SPDX-License-Identifier: Apache-2.0
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from faceedit.networks.equal_linear import EqualLinear, styles_of
from faceedit.networks.stylegan2 import StyleGAN2Config, SynthesisNetwork


def _layers() -> tuple[nn.ModuleList, list[int]]:
    torch.manual_seed(3)
    layers = nn.ModuleList(EqualLinear(6, width, init=1.0) for width in (5, 3, 8, 1))
    return layers, [0, 1, 1, 2]


@pytest.mark.parametrize("count", [0, 1, 3])
def test_frozen_layers_give_together_what_each_gives_alone(count: int) -> None:
    layers, rows = _layers()
    ws = torch.randn(count, 4, 6, requires_grad=True)
    alone = styles_of(list(layers), rows, ws, [1.0, 0.5, 1.0, 3.0])
    grads = [torch.randn_like(styles) for styles in alone]
    (one,) = torch.autograd.grad(alone, ws, grads)
    layers.requires_grad_(False)
    together = styles_of(list(layers), rows, ws, [1.0, 0.5, 1.0, 3.0])
    (other,) = torch.autograd.grad(together, ws, grads)
    for a, b in zip(alone, together, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6)
        assert b.is_contiguous()
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-6)
    assert not other[:, 3].any()  # a row that no layer reads


def test_trained_layers_get_their_gradients() -> None:
    layers, rows = _layers()
    sum(styles.sum() for styles in styles_of(list(layers), rows, torch.ones(2, 4, 6))).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in layers.parameters())


def _network(architecture: str = "skip") -> SynthesisNetwork:
    torch.manual_seed(1)
    config = StyleGAN2Config(size_px=16, channel_base=64, channel_max=8, w_width=8, architecture=architecture)  # type: ignore[arg-type]
    network = SynthesisNetwork(config)
    for parameter in network.parameters():
        nn.init.normal_(parameter)
    return network


def test_a_hook_on_a_frozen_layer_is_called() -> None:
    network = _network().requires_grad_(False)
    ws = torch.ones(1, network.config.num_ws, 8)
    before, affine = network(ws, noise="zero"), network.blocks[1].conv0.affine
    handle = affine.register_forward_hook(lambda module, inputs, output: output * 0)
    assert not torch.equal(network(ws, noise="zero"), before)
    handle.remove()
    assert torch.equal(network(ws, noise="zero"), before)


def test_a_traced_call_leaves_nothing_behind() -> None:
    network = _network().requires_grad_(False)
    ws = torch.ones(3, network.config.num_ws, 8)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert network(mode.from_tensor(ws), noise="zero").shape == (3, 3, 16, 16)
    assert type(network(ws, noise="zero")) is Tensor


def test_a_wrapped_block_keeps_its_styles() -> None:
    network = _network().requires_grad_(False)
    ws = torch.randn(1, network.config.num_ws, 8)
    before = network(ws, noise="zero")
    network.blocks[1] = torch.compile(network.blocks[1], backend="eager")
    assert torch.equal(network(ws, noise="zero"), before)


@pytest.mark.parametrize("architecture", ["skip", "resnet", "orig"])
def test_a_frozen_generator_draws_what_a_trained_one_draws(architecture: str) -> None:
    network = _network(architecture)

    def drawn() -> tuple[Tensor, Tensor]:
        ws = torch.randn(2, network.config.num_ws, 8, generator=torch.Generator().manual_seed(2)).requires_grad_()
        image = network(ws)
        return image, torch.autograd.grad(image.square().mean(), ws)[0]

    one = drawn()
    network.requires_grad_(False)
    for a, b in zip(one, drawn(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-4 * float(a.detach().abs().max()))


def test_heavy_layers_on_a_cpu_are_called_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights side by side would be copied at every call."""
    layers, rows = _layers()
    layers.requires_grad_(False)
    joined = []
    real = torch.cat
    monkeypatch.setattr(torch, "cat", lambda *arguments, **names: joined.append(arguments) or real(*arguments, **names))
    light = styles_of(list(layers), rows, torch.ones(2, 4, 6))
    assert joined
    joined.clear()
    monkeypatch.setattr("faceedit.networks.equal_linear.MOST_JOINED", 6 * 17 - 1)
    for one, other in zip(light, styles_of(list(layers), rows, torch.ones(2, 4, 6)), strict=True):
        torch.testing.assert_close(other, one)
    assert not joined
