# SPDX-License-Identifier: Apache-2.0
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.compare import assert_close
from support.exporting import check_export, check_onnx
from support.kernel_cases import DTYPES, FORMATS, PLACES, Place, check_against_oracle, draw, run
from torch import Tensor
from torch.nn import functional as F

from faceedit import kernels
from faceedit.kernels import native
from faceedit.kernels.attribute_maps import attribute_maps, conv_attribute_maps, reference
from faceedit.kernels.tensors import memory_format

OP = torch.ops.faceedit.attribute_maps.default
needs_cpp = pytest.mark.skipif(not native.build_report()["cpp"], reason="native module is missing")


def inputs(
    n: int, a: int, k: int, h: int, w: int, dtype: torch.dtype, fmt: torch.memory_format = torch.contiguous_format
) -> tuple[Tensor, Tensor, Tensor]:
    probs = draw(n, k, h, w, seed=1, low=0.1).to(dtype).to(memory_format=fmt)
    return draw(n, a, seed=2, low=0.5), probs, draw(a, k, seed=3, low=0.0)


def test_reference_agrees_with_explicit_sums() -> None:
    attr, probs, relation = (t.double() for t in inputs(2, 3, 4, 2, 3, torch.float64))
    maps = reference(probs, attr, relation)
    for n, a, y, x in ((0, 0, 0, 0), (1, 2, 1, 2), (1, 0, 0, 1)):
        by_hand = sum(float(relation[a, k] * probs[n, k, y, x]) for k in range(4)) * float(attr[n, a])
        assert float(maps[n, a, y, x]) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize("is_per_sample", [False, True], ids=["one", "per_sample"])
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("place", PLACES)
def test_matches_reference(place: Place, dtype: torch.dtype, fmt: torch.memory_format, is_per_sample: bool) -> None:
    attr, probs, relation = inputs(2, 13, 19, 15, 19, dtype, fmt)
    relation = draw(2, 13, 19, seed=4, low=0.0) if is_per_sample else relation
    check_against_oracle(
        place,
        lambda attr, probs: attribute_maps(attr, probs, relation.to(probs.device)),
        lambda attr, probs: reference(probs, attr, relation.double()),
        [attr, probs],
        ("attr", "probs"),
        dtype,
    )


shapes = st.tuples(st.integers(0, 3), st.integers(1, 20), st.integers(1, 40), st.integers(1, 37), st.integers(1, 37))


@needs_cpp
@settings(max_examples=40, deadline=None, derandomize=True)
@given(shapes, st.sampled_from(DTYPES), st.sampled_from(["nchw", "nhwc", "sliced", "offset", "expanded"]))
def test_any_shape_and_stride(shape: tuple[int, int, int, int, int], dtype: torch.dtype, layout: str) -> None:
    attr, probs, relation = inputs(*shape, dtype, torch.channels_last if layout == "nhwc" else torch.contiguous_format)
    if layout == "sliced":
        probs = torch.cat([probs, probs + 1], 1)[:, ::2][:, : shape[2]]
    elif layout == "offset":
        probs = torch.cat([probs.new_zeros(1), probs.flatten()])[1:].view(probs.shape)
    elif layout == "expanded" and shape[0]:
        probs = probs[:1].expand(probs.shape)
    with kernels.backend("cpu"):
        maps = attribute_maps(attr, probs, relation)
    expected = reference(probs.double(), attr.double(), relation.double())
    assert_close("maps", maps, expected, relative_l2={torch.float32: 2e-6}.get(dtype, 4e-3))
    assert maps.is_contiguous(memory_format=memory_format(probs))


@pytest.mark.parametrize("place", PLACES)
def test_nan_and_infinity_stay_in_their_pixel(place: Place) -> None:
    attr, probs, relation = inputs(2, 3, 4, 5, 6, torch.float32)
    probs[0, 1, 2, 3], probs[1, 0, 4, 5] = float("nan"), float("inf")
    relation[2] = 0
    maps, _ = run(place, lambda a, p: attribute_maps(a, p, relation.to(p.device)), [attr, probs])
    assert_close("maps", maps, reference(probs.double(), attr.double(), relation.double()), relative_l2=2e-6)
    assert int((~maps.isfinite()).sum()) == 6


@pytest.mark.parametrize("place", PLACES)
def test_gradient_of_one_operand_only(place: Place) -> None:
    attr, probs, relation = inputs(2, 3, 5, 7, 6, torch.float32)
    both = run(place, lambda a, p: attribute_maps(a, p, relation.to(p.device)), [attr, probs])[1]
    of_attr = run(place, lambda a: attribute_maps(a, probs.to(a.device), relation.to(a.device)), [attr])[1]
    of_probs = run(place, lambda p: attribute_maps(attr.to(p.device), p, relation.to(p.device)), [probs])[1]
    for alone, expected in zip((of_attr[0], of_probs[0]), both, strict=True):
        assert alone is not None
        assert expected is not None
        assert_close("gradient", alone, expected, relative_l2=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_no_attributes_make_no_maps(place: Place) -> None:
    attr, probs, relation = torch.zeros(2, 0), torch.rand(2, 3, 4, 5), torch.zeros(0, 3)
    maps, (of_attr, of_probs) = run(place, lambda a, p: attribute_maps(a, p, relation.to(p.device)), [attr, probs])
    assert maps.shape == (2, 0, 4, 5)
    assert of_attr is not None
    assert of_attr.shape == (2, 0)
    assert of_probs is not None
    assert not of_probs.any()


def test_gradcheck_and_gradgradcheck() -> None:
    attr, probs, relation = (t.double().requires_grad_() for t in inputs(2, 3, 4, 2, 3, torch.float64))
    per_sample = draw(2, 3, 4, seed=7).double().requires_grad_()
    for relates in (relation.detach(), relation, per_sample):
        assert torch.autograd.gradcheck(attribute_maps, (attr, probs, relates))
        assert torch.autograd.gradgradcheck(attribute_maps, (attr, probs, relates))


@pytest.mark.parametrize(("kernel", "stride", "padding"), [(1, 1, 0), (3, 1, 1), (4, 2, 1)])
@pytest.mark.parametrize("is_per_sample", [False, True], ids=["one", "per_sample"])
@pytest.mark.parametrize("parts", [5, 19], ids=["folded", "made"])
def test_folding_into_a_convolution_equals_convolving_the_maps(
    kernel: int, stride: int, padding: int, is_per_sample: bool, parts: int
) -> None:
    attr, probs, relation = inputs(3, 13, parts, 8, 10, torch.float32)
    relation = draw(3, 13, parts, seed=4) if is_per_sample else relation
    weight, bias = draw(6, 13, kernel, kernel, seed=5), draw(6, seed=6)
    tensors = [t.requires_grad_() for t in (attr, probs, relation, weight, bias)]
    expected = F.conv2d(attribute_maps(attr, probs, relation), weight, bias, stride, padding)
    actual = conv_attribute_maps(*tensors, stride=stride, padding=padding)
    assert_close("output", actual, expected.double(), relative_l2=2e-6)
    wanted = torch.autograd.grad(expected.sum(), tensors)
    for a, b in zip(torch.autograd.grad(actual.sum(), tensors), wanted, strict=True):
        assert_close("gradient", a, b, relative_l2=1e-5)
    assert conv_attribute_maps(attr[:0], probs[:0], relation[:0] if is_per_sample else relation, weight).shape[0] == 0


@pytest.mark.parametrize("is_per_sample", [False, True], ids=["one", "per_sample"])
def test_many_gradients_of_a_relation_at_a_time(is_per_sample: bool) -> None:
    attr, probs, relation = inputs(2, 3, 4, 5, 6, torch.float32)
    relation = relation.expand(2, 3, 4).clone() if is_per_sample else relation
    tensors = [t.requires_grad_() for t in (attr, probs, relation)]
    weight = draw(2, 3, 1, 1, seed=8)
    for y in (attribute_maps(*tensors), conv_attribute_maps(*tensors, weight)):
        many = draw(3, *y.shape, seed=9)
        rows = torch.autograd.grad(y, tensors, many, is_grads_batched=True, retain_graph=True)
        for index, one in enumerate(many):
            for row, alone in zip(rows, torch.autograd.grad(y, tensors, one, retain_graph=True), strict=True):
                assert_close("gradient", row[index], alone, relative_l2=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fmt", FORMATS, ids=["nchw", "nhwc"])
def test_opcheck(fmt: torch.memory_format, dtype: torch.dtype) -> None:
    attr, probs, relation = inputs(2, 3, 4, 5, 6, dtype, fmt)
    torch.library.opcheck(OP, (probs.requires_grad_(), attr.requires_grad_(), relation))
    torch.library.opcheck(OP, (probs[:0], attr[:0], relation))
    torch.library.opcheck(OP, (probs.detach(), attr, relation.expand(2, 3, 4).contiguous()))


@pytest.mark.slow
def test_compiles_without_a_graph_break() -> None:
    def step(attr: Tensor, probs: Tensor) -> Tensor:
        return attribute_maps(attr, probs * 2, relation).square().sum()

    attr, probs, relation = inputs(2, 3, 4, 5, 6, torch.float32)
    leaves = (attr.requires_grad_(), probs.requires_grad_())
    expected = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for actual, wanted in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert_close("gradient", actual, wanted, relative_l2=1e-6)


def test_exports_to_standard_operators() -> None:
    small, large = inputs(2, 3, 4, 5, 6, torch.float32), inputs(5, 3, 4, 5, 6, torch.float32)
    check_export(attribute_maps, OP, small, large, per_sample={0, 1})


def test_conv_attribute_maps_exports_to_standard_operators() -> None:
    """The batch is fixed. With as many parts as attributes or fewer it is PyTorch's own operators from the start."""
    attr, probs, relation = inputs(2, 3, 4, 5, 6, torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, attr: Tensor, probs: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            return conv_attribute_maps(attr, probs, relation[:, : probs.shape[1]], weight, bias, padding=1)

    for parts, keeps in ((3, False), (4, True)):
        operands = (attr, probs[:, :parts], draw(7, 3, 3, 3, seed=4), draw(7, seed=5))
        program = torch.export.export(Layer(), operands)
        assert any(node.target is OP for node in program.graph.nodes) == keeps
        check_onnx(program, Layer(), [operands])


def test_vmap_equals_a_loop() -> None:
    attr, (_, probs, relation) = draw(4, 2, 3, seed=1), inputs(2, 3, 4, 5, 6, torch.float32)
    folded = torch.vmap(lambda a: attribute_maps(a, probs, relation))(attr)
    assert torch.equal(folded, torch.stack([attribute_maps(a, probs, relation) for a in attr]))


@needs_cpp
def test_same_bits_at_any_thread_count_and_batch_size() -> None:
    attr, probs, relation = inputs(2, 13, 19, 41, 43, torch.float32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            maps, gradients = run(Place("cpu"), lambda a, p: attribute_maps(a, p, relation), [attr, probs])
            results.append([maps, *(g for g in gradients if g is not None)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    alone, gradients = run(Place("cpu"), lambda a, p: attribute_maps(a, p, relation), [attr[1:], probs[1:]])
    assert torch.equal(alone[0], results[0][0][1])
    assert gradients[0] is not None
    assert torch.equal(gradients[0][0], results[0][1][1])


@needs_cpp
def test_core_repeats_the_checks_and_names_the_argument() -> None:
    module, target = native.module(), (-1, 1, 0)
    good = {"batch": 1, "attributes": 2, "parts": 3, "pixels": 1}
    for change, message in (
        ({}, "probs, attr, relation and out must not be null"),
        ({"dtype": 9}, "dtype is not supported"),
        ({"parts": 0}, "probs must not be empty"),
        ({"relation_stride": 5}, "relation must be dense"),
    ):
        with pytest.raises(RuntimeError, match=f"attribute_maps_fwd: {message}"):
            module.attribute_maps_fwd(target, **(good | change))
    for change, message in (
        ({"grad": 0}, "grad must not be null"),
        ({"grad_probs": 64}, "grad_probs needs the transposed weights"),
        ({"grad_attr": 64}, "grad_attr needs probs, relation and workspace"),
    ):
        with pytest.raises(RuntimeError, match=f"attribute_maps_bwd: {message}"):
            module.attribute_maps_bwd(target, **(good | {"grad": 64} | change))


ATTR, PROBS, RELATION = torch.zeros(2, 3), torch.zeros(2, 4, 5, 6), torch.zeros(3, 4)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"probs": PROBS[0]}, ValueError, "probs must be of shape"),
        ({"probs": PROBS.int()}, TypeError, "probs must be floating point"),
        ({"attr": ATTR.int()}, TypeError, "attr must be floating point"),
        ({"attr": ATTR[0]}, ValueError, r"attr must be of shape \(2, A\)"),
        ({"attr": ATTR[:1]}, ValueError, r"attr must be of shape \(2, 3\), got float32 of shape \(1, 3\)"),
        ({"relation": RELATION.mT}, ValueError, r"relation must be of shape \(3, 4\) or \(2, 3, 4\)"),
        ({"relation": RELATION.bool()}, TypeError, "relation must be floating point"),
        ({"relation": [[0.0]]}, TypeError, r"relation must be a tensor, got \[\[0.0\]\]"),
    ],
)
def test_rejects(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"attr": ATTR, "probs": PROBS, "relation": RELATION} | change
    with pytest.raises(error, match=f"attribute_maps: {message}"):
        attribute_maps(**arguments)


def test_folding_rejects_a_weight_of_other_inputs_or_dtype_and_a_bias_of_another_length() -> None:
    with pytest.raises(ValueError, match=r"conv_attribute_maps: weight must be of shape \(O, 3, kh, kw\)"):
        conv_attribute_maps(ATTR, PROBS, RELATION, torch.zeros(6, 4, 1, 1))
    with pytest.raises(TypeError, match="conv_attribute_maps: weight must be floating point, got int32"):
        conv_attribute_maps(ATTR, PROBS, RELATION, torch.zeros(6, 3, 1, 1).int())
    with pytest.raises(ValueError, match=r"conv_attribute_maps: bias must be of shape \(6,\)"):
        conv_attribute_maps(ATTR, PROBS, RELATION, torch.zeros(6, 3, 1, 1), torch.zeros(3))
    with pytest.raises(TypeError, match="conv_attribute_maps: weight must be a tensor, got None"):
        conv_attribute_maps(ATTR, PROBS, RELATION, None)
