# SPDX-License-Identifier: Apache-2.0
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
"""Triton bodies of attribute_maps. Imported only when the triton backend runs."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from faceedit.kernels.tensors import as_float, empty, empty_float, memory_format

BLOCK = 128


@triton.jit
def mix_kernel(
    in_ptr, out_ptr, weights_ptr, factor_ptr, inputs, outputs, pixels, blocks, weights_stride,
    FACTOR: tl.constexpr, INPUTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # out[j] = factor[j] * the sum over i of weights[j, i] * in[i], for one block of pixels of one sample.
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    q = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, INPUTS)
    inside = (i < inputs)[:, None] & (q < pixels)[None, :]
    values = tl.load(in_ptr + (sample * inputs + i)[:, None] * pixels + q[None, :], mask=inside, other=0.0)
    values = values.to(tl.float32)
    for j in range(outputs):
        weights = tl.load(weights_ptr + sample * weights_stride + j * inputs + i, mask=i < inputs, other=0.0)
        total = tl.sum(weights[:, None] * values, axis=0)
        if FACTOR:
            total = total * tl.load(factor_ptr + sample * outputs + j)
        tl.store(out_ptr + (sample * outputs + j) * pixels + q, total.to(out_ptr.dtype.element_ty), mask=q < pixels)


@triton.jit
def sums_kernel(
    probs_ptr, grad_ptr, sums_ptr, relation_ptr, parts, attributes, pixels, blocks, relation_stride,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A block's share of the gradient to every attribute, in its own row; nothing is atomic.
    program = tl.program_id(0).to(tl.int64)
    sample = program // blocks
    q = (program % blocks) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, PARTS)
    inside = (k < parts)[:, None] & (q < pixels)[None, :]
    values = tl.load(probs_ptr + (sample * parts + k)[:, None] * pixels + q[None, :], mask=inside, other=0.0)
    values = values.to(tl.float32)
    for a in range(attributes):
        weights = tl.load(relation_ptr + sample * relation_stride + a * parts + k, mask=k < parts, other=0.0)
        region = tl.sum(weights[:, None] * values, axis=0)
        grad = tl.load(grad_ptr + (sample * attributes + a) * pixels + q, mask=q < pixels, other=0.0).to(tl.float32)
        tl.store(sums_ptr + program * attributes + a, tl.sum(grad * region, axis=0))


def _mix(values: Tensor, weights: Tensor, factor: Tensor | None, outputs: int) -> Tensor:
    n, inputs, h, w = values.shape
    out = empty((n, outputs, h, w), values, values.dtype, torch.contiguous_format)
    blocks = triton.cdiv(h * w, BLOCK)
    mix_kernel[(n * blocks,)](
        values, out, weights, weights if factor is None else factor, inputs, outputs, h * w, blocks,
        outputs * inputs if weights.dim() == 3 else 0,
        FACTOR=factor is not None, INPUTS=triton.next_power_of_2(inputs), BLOCK=BLOCK,
    )  # fmt: skip
    return out


def forward(probs: Tensor, attr: Tensor, relation: Tensor) -> Tensor:
    """Run the forward kernel; arguments as the op's."""
    attr_f, relation_f = as_float(attr), as_float(relation)
    assert relation_f is not None
    out = _mix(probs.contiguous(), relation_f, attr_f, attr.shape[1])
    return out.contiguous(memory_format=memory_format(probs))


def backward(probs: Tensor, grad: Tensor, attr: Tensor, relation: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor]:
    """Run the backward kernels; arguments as the backward op's."""
    planes, grad = probs.contiguous(), grad.to(probs.dtype).contiguous()
    attr_f, relation_f = attr.detach().float(), relation.detach().float().contiguous()
    n, parts, h, w = probs.shape
    gprobs, gattr = probs.new_empty(0), attr.new_empty(0)
    if wanted[0]:
        transposed = (attr_f[:, :, None] * relation_f).mT.contiguous()
        gprobs = _mix(grad, transposed, None, parts).contiguous(memory_format=memory_format(probs))
    if wanted[1]:
        blocks, attributes = triton.cdiv(h * w, BLOCK), attr.shape[1]
        sums = empty_float(probs, n, blocks, attributes)
        sums_kernel[(n * blocks,)](
            planes, grad, sums, relation_f, parts, attributes, h * w, blocks,
            attributes * parts if relation.dim() == 3 else 0,
            PARTS=triton.next_power_of_2(parts), BLOCK=BLOCK,
        )  # fmt: skip
        gattr = sums.sum(1).to(attr.dtype)
    return gprobs, gattr
