# SPDX-License-Identifier: Apache-2.0
"""The gates of a convolutional recurrent unit, each one pass over memory.

gru_gate:   y = sigmoid(-z) * h + sigmoid(z) * tanh(c)    reset_gate: y = sigmoid(z) * h
1 - sigmoid(z) is computed as sigmoid(-z): where it is tiny, the subtraction would leave nothing of it.
Before its sigmoid or tanh a gate may pass a per-channel affine map: a bias, or a batch norm of a network in evaluation.
Both are one kernel: the reset gate is the one without a candidate c.
"""

from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import native
from faceedit.kernels.activations import tanh_slope
from faceedit.kernels.dispatch import dispatcher, requested_backend
from faceedit.kernels.operator import define_op, mapped_slices, register_onnx_decomposition
from faceedit.kernels.tensors import as_float, check_image, check_shape, describe, empty_like, in_format, memory_format

Gradients = tuple[Tensor, Tensor, Tensor]  # of h, z_pre, c_pre; empty where there is no c_pre


def gru_gate(
    h: Tensor,
    z_pre: Tensor,
    c_pre: Tensor,
    *,
    z_scale: Tensor | None = None,
    z_shift: Tensor | None = None,
    c_scale: Tensor | None = None,
    c_shift: Tensor | None = None,
) -> Tensor:
    """Return the new state of a gated unit: h where the update gate is shut, the candidate where it is open.

    z = z_pre * z_scale + z_shift;  c = c_pre * c_scale + c_shift;  y = sigmoid(-z) * h + sigmoid(z) * tanh(c)

    Args:     h, z_pre, c_pre (N,C,H,W) of one dtype, fp64|fp32|fp16|bf16, NCHW or channels_last; scales and shifts (C).
    Returns:  y with h's shape, dtype and memory format; computed in fp32 (fp64 for fp64).
    Grad:     h, z_pre and c_pre to second order. A scale or shift that requires grad is differentiated too, through the
              eager composition.
    Backends: eager (any device), cpu, cuda, triton. Against fp64 eager: fp32 2e-6, fp16 and bf16 1 ulp.
    Raises:   TypeError on a dtype; ValueError on shape or device.
    Source:   STGAN (Liu et al. 2019), section 3.2, the update of its selective transfer unit.
    """
    _check("gru_gate", h, {"z_pre": z_pre, "c_pre": c_pre})
    affine = {"z_scale": z_scale, "z_shift": z_shift, "c_scale": c_scale, "c_shift": c_shift}
    return _gate("gru_gate", h, z_pre, c_pre, affine)


def reset_gate(h: Tensor, r_pre: Tensor, *, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    """Return sigmoid(r_pre * scale + shift) * h: what a gated unit keeps of its state.

    Arguments, gradients, backends and errors as for gru_gate, with r_pre for z_pre. Source: STGAN, section 3.2.
    """
    _check("reset_gate", h, {"r_pre": r_pre})
    return _gate("reset_gate", h, r_pre, None, {"scale": scale, "shift": shift, "c_scale": None, "c_shift": None})


def _check(op: str, h: Tensor, others: dict[str, Tensor]) -> None:
    check_image(op, "h", h)
    for name, tensor in others.items():
        check_shape(op, name, tensor, h, tuple(h.shape))
        if tensor.dtype != h.dtype:
            raise TypeError(f"{op}: {name} must be of h's dtype {h.dtype}, got {describe(tensor)}; cast it first")


def _gate(op: str, h: Tensor, z: Tensor, c: Tensor | None, affine: dict[str, Tensor | None]) -> Tensor:
    for name, vector in affine.items():
        if vector is not None:
            check_shape(op, name, vector, h, (h.shape[1],))
    vectors = list(affine.values())
    if torch.is_grad_enabled() and any(vector is not None and vector.requires_grad for vector in vectors):
        return _eager(h, z, c, *vectors)
    return _op(h, z, c, *vectors)


def _compute_dtype(h: Tensor) -> torch.dtype:
    return torch.float64 if h.dtype == torch.float64 else torch.float32


def _affine(pre: Tensor, scale: Tensor | None, shift: Tensor | None) -> Tensor:
    dtype = _compute_dtype(pre)
    value = pre.to(dtype)
    if scale is not None:
        value = value * scale.to(dtype)[None, :, None, None]
    return value if shift is None else value + shift.to(dtype)[None, :, None, None]


def reference(
    h: Tensor,
    z: Tensor,
    c: Tensor | None,
    z_scale: Tensor | None,
    z_shift: Tensor | None,
    c_scale: Tensor | None,
    c_shift: Tensor | None,
) -> Tensor:
    """Compute either gate in plain PyTorch: the oracle in fp64, and what ONNX export writes."""
    hidden, gate = h.to(_compute_dtype(h)), _affine(z, z_scale, z_shift)
    update = torch.sigmoid(gate)
    if c is None:
        return (update * hidden).to(h.dtype)
    return (torch.sigmoid(-gate) * hidden + update * torch.tanh(_affine(c, c_scale, c_shift))).to(h.dtype)


def _eager(h: Tensor, *arguments: Any) -> Tensor:
    return reference(h, *arguments).contiguous(memory_format=memory_format(h))


def _call(h: Tensor, z: Tensor, c: Tensor | None, vectors: list[Tensor | None], fmt: torch.memory_format) -> Any:
    """Return the kernel's arguments, and the tensors that they point to, to be kept until it has run."""
    images = [None if t is None else t.contiguous(memory_format=fmt) for t in (h, z, c)]
    floats = [as_float(vector) for vector in vectors]
    n, channels, height, width = h.shape
    names = ("h", "z", "c", "z_scale", "z_shift", "c_scale", "c_shift")
    call = {name: native.address(t) for name, t in zip(names, [*images, *floats], strict=True)} | {
        "batch": n,
        "channels": channels,
        "pixels": height * width,
        "dtype": native.DTYPE_CODES[h.dtype],
        "channels_last": fmt is torch.channels_last,
    }
    return call, (images, floats)


def _native(h: Tensor, z: Tensor, c: Tensor | None, *vectors: Tensor | None) -> Tensor:
    fmt = memory_format(h)
    call, kept = _call(h, z, c, list(vectors), fmt)
    y = empty_like(h, fmt)
    native.module().gate_fwd(native.target(h, 16384), **call, y=y.data_ptr())
    del kept
    return y


def _triton(h: Tensor, *arguments: Any) -> Tensor:
    from faceedit.kernels import gates_triton

    return gates_triton.forward(h, *arguments)


_forward = dispatcher("gate", eager=_eager, cpu=_native, cuda=_native, triton=_triton)


def _fake(h: Tensor, *arguments: Any) -> Tensor:
    return torch.empty_like(h, memory_format=memory_format(h))


_op = define_op(
    "gate(Tensor h, Tensor z, Tensor? c, Tensor? z_scale, Tensor? z_shift, Tensor? c_scale, Tensor? c_shift) -> Tensor",
    _forward,
    _fake,
)


def backward_reference(
    h: Tensor,
    grad: Tensor,
    z: Tensor,
    c: Tensor | None,
    z_scale: Tensor | None,
    z_shift: Tensor | None,
    c_scale: Tensor | None,
    c_shift: Tensor | None,
) -> Gradients:
    """Compute the gradients in plain PyTorch: the oracle, the eager backend, and the path differentiated again."""
    dtype = _compute_dtype(h)
    g, hidden, gate = grad.to(dtype), h.to(dtype), _affine(z, z_scale, z_shift)
    update, kept = torch.sigmoid(gate), torch.sigmoid(-gate)
    if c is None:
        gh, gz, gc = g * update, g * hidden * update * kept, None
    else:
        candidate = _affine(c, c_scale, c_shift)
        gh, gz = g * kept, g * (torch.tanh(candidate) - hidden) * update * kept
        gc = _affine(g * update * tanh_slope(candidate), c_scale, None)
    gz = _affine(gz, z_scale, None)
    return gh.to(h.dtype), gz.to(h.dtype), h.new_empty(0) if gc is None else gc.to(h.dtype)


def _backward_eager(h: Tensor, *arguments: Any) -> Gradients:
    fmt = memory_format(h)
    gh, gz, gc = backward_reference(h, *arguments)
    gc = gc.contiguous(memory_format=fmt) if gc.dim() == 4 else gc
    return gh.contiguous(memory_format=fmt), gz.contiguous(memory_format=fmt), gc


def _backward_native(h: Tensor, grad: Tensor, z: Tensor, c: Tensor | None, *vectors: Tensor | None) -> Gradients:
    fmt = memory_format(h)
    call, kept = _call(h, z, c, list(vectors), fmt)
    grad = in_format(grad, h.dtype, fmt)
    gh, gz, gc = empty_like(h, fmt), empty_like(h, fmt), None if c is None else empty_like(h, fmt)
    native.module().gate_bwd(
        native.target(h, 16384),
        **call,
        grad=grad.data_ptr(),
        grad_h=gh.data_ptr(),
        grad_z=gz.data_ptr(),
        grad_c=native.address(gc),
    )
    del kept
    return gh, gz, h.new_empty(0) if gc is None else gc


def _backward_triton(h: Tensor, *arguments: Any) -> Gradients:
    from faceedit.kernels import gates_triton

    return gates_triton.backward(h, *arguments)


_backward = dispatcher(
    "gate_backward", eager=_backward_eager, cpu=_backward_native, cuda=_backward_native, triton=_backward_triton
)


def _backward_fake(h: Tensor, grad: Tensor, z: Tensor, c: Tensor | None, *others: Any) -> Gradients:
    gh, gz, gc = (torch.empty_like(h, memory_format=memory_format(h)) for _ in range(3))
    return gh, gz, h.new_empty(0) if c is None else gc


_backward_op = define_op(
    "gate_backward(Tensor h, Tensor grad, Tensor z, Tensor? c, Tensor? z_scale, Tensor? z_shift, Tensor? c_scale, "
    "Tensor? c_shift, str backend) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.backend = requested_backend()
    ctx.save_for_backward(*inputs)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if any(ctx.needs_input_grad[3:]):
        raise RuntimeError(
            "gate: a scale or shift that requires grad must go through faceedit.kernels.gru_gate or reset_gate, got a "
            "direct call of the op; call the function"
        )
    h, *others = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph=True: the gradient is itself differentiated
        gradients = backward_reference(h, grad, *others)
    else:
        gradients = _backward_op(h, grad, *others, ctx.backend)
    wanted = ctx.needs_input_grad[:3]
    return *(g if want else None for g, want in zip(gradients, wanted, strict=True)), None, None, None, None


_op.register_autograd(_autograd, setup_context=_setup_context)
register_onnx_decomposition(_op, reference)


@_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> Any:
    return mapped_slices(_op, info, in_dims, arguments)
