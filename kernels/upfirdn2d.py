# SPDX-License-Identifier: Apache-2.0
"""Upsample by zeros, pad, filter and downsample in one pass, without ever writing the zeros."""

from collections.abc import Iterable, Sequence
from operator import index
from reprlib import repr as short
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels import native
from faceedit.kernels.dispatch import backend_again, dispatcher, requested_backend
from faceedit.kernels.operator import define_op, mapped_slices, register_onnx_decomposition
from faceedit.kernels.tensors import (
    as_integer,
    as_number,
    check_floating,
    check_image,
    check_number,
    check_tensor,
    describe,
    empty,
    in_format,
    memory_format,
)

MAX_TAPS = 32  # per axis; kMaxFirTaps of csrc/upfirdn2d.h
ONE_THREAD = 1 << 17  # elements of output up to which waking a second CPU thread costs more than it saves


def upfirdn2d(
    x: Tensor,
    fir: Tensor,
    up: int = 1,
    down: int = 1,
    pad: int | Sequence[int] = 0,
    gain: float = 1.0,
    flip: bool = False,
) -> Tensor:
    """Insert up - 1 zeros after every sample, pad or crop, convolve with `fir`, keep every `down`-th sample.

    Args:     x (N,C,H,W) fp64|fp32|fp16|bf16, NCHW or channels_last; fir (kh,kw), or (k) for the same taps along both
              axes, 1 to 32 an axis; up, down 1 or 2; pad (x0,x1,y0,y1) or one number for all four sides of the
              upsampled image, negative crops; gain multiplies the filter; flip=True correlates.
    Returns:  (N, C, (H*up + y0 + y1 - kh)//down + 1, (W*up + x0 + x1 - kw)//down + 1), x's dtype and memory format;
              computed in fp32 (fp64 for fp64).
    Grad:     x, to any order, by the same kernel. fir has none: ValueError when it requires grad.
    Backends: eager (any device), cpu, cuda, triton. Against fp64 eager: fp32 1e-6 * max|y|, fp16 and bf16 1 ulp.
    Raises:   TypeError on a dtype that is not floating point, on a gain that is a bool (NVlabs' order), on a flip that
              is none; ValueError on shapes, up, down, pad, or no output pixel.
    Source:   Karras et al. 2020 (StyleGAN2), appendix B; its up/FIR/down with the zeros left out (polyphase).
    """
    if isinstance(gain, bool) or not isinstance(flip, bool):
        raise TypeError(
            f"upfirdn2d: gain must be a number and flip a bool, got gain={gain!r} and flip={flip!r}; "
            "NVlabs' order is flip_filter, gain: name them"
        )
    if not isinstance(gain, (float, int)):
        check_number("upfirdn2d", "gain", gain)
    up, down, sides = check_geometry("upfirdn2d", x, fir, up, down, pad)
    return upfirdn2d_op(x, fir, up, down, sides, as_number(gain), flip)


def _check_fir(op: str, fir: Tensor) -> None:
    if not isinstance(fir, Tensor):
        check_tensor(op, "fir", fir, "make it one with setup_filter; setup_filter([1]) changes nothing")
    if fir.dim() not in (1, 2):
        raise ValueError(f"{op}: fir must be of shape (kh, kw) or (k,), got {describe(fir)}; reshape it")
    if not fir.is_floating_point():
        check_floating(op, "fir", fir)


def _sides(op: str, pad: int | Sequence[int]) -> list[int]:
    """Return the padding of the four sides, integers of any library as Python's."""
    if isinstance(pad, int):
        return [pad] * 4
    given = pad if isinstance(pad, (tuple, list, Iterable)) else [pad] * 4
    try:
        sides = [side if type(side) is int else index(side) for side in given]
    except TypeError:
        raise TypeError(f"{op}: pad must be one number or (x0, x1, y0, y1), got {short(pad)}; give integers") from None
    if len(sides) != 4:
        raise ValueError(f"{op}: pad must be one number or (x0, x1, y0, y1), got {len(sides)} numbers; give all four")
    return sides


def check_geometry(
    op: str, x: Tensor, fir: Tensor, up: int, down: int, pad: int | Sequence[int]
) -> tuple[int, int, list[int]]:
    """Raise unless the filter can run; return up, down and the padding of the four sides."""
    check_image(op, "x", x)
    _check_fir(op, fir)
    if type(up) is not int or type(down) is not int:
        up, down = (as_integer(op, name, value, "pass 1 or 2") for name, value in (("up", up), ("down", down)))
    if fir.device != x.device:
        raise ValueError(f"{op}: fir must be on {x.device}, got {fir.device}; move it there")
    if min(fir.shape) < 1 or max(fir.shape) > MAX_TAPS:
        raise ValueError(f"{op}: fir must have 1 to {MAX_TAPS} taps an axis, got {describe(fir)}; shorten it")
    for name, value in (("up", up), ("down", down)):
        if value not in (1, 2):
            raise ValueError(f"{op}: {name} must be 1 or 2, got {value!r}; apply the op twice for 4")
    sides = _sides(op, pad)
    if min(x.shape[1:]) < 1:
        raise ValueError(f"{op}: x must be of at least one channel and one pixel, got {describe(x)}; check its shape")
    rows, columns = x.shape[2] * up + sides[2] + sides[3], x.shape[3] * up + sides[0] + sides[1]
    if rows < fir.shape[0] or columns < fir.shape[-1]:
        raise ValueError(
            f"{op}: fir must be no larger than the padded input of ({rows}, {columns}), got {describe(fir)}; pad more"
        )
    return up, down, sides


def output_shape(x: Tensor, fir: Tensor, up: int, down: int, pad: list[int]) -> tuple[int, int, int, int]:
    """Return the shape of upfirdn2d's result."""
    n, c, h, w = x.shape
    x0, x1, y0, y1 = pad
    return n, c, (h * up + y0 + y1 - fir.shape[0]) // down + 1, (w * up + x0 + x1 - fir.shape[-1]) // down + 1


def filtered(x: Tensor, fir: Tensor, up: int, down: int, pad: list[int], gain: float, flip: bool) -> Tensor:
    """Compute upfirdn2d by its definition, in fp32 or wider: zeros, padding, a depthwise convolution with stride."""
    n, c, h, w = x.shape
    x0, x1, y0, y1 = pad
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    z = x.to(dtype)
    if up == 2:
        z = F.pad(z.reshape(n, c, h, 1, w, 1), [0, 1, 0, 0, 0, 1]).reshape(n, c, h * 2, w * 2)
    z = F.pad(z, [max(x0, 0), max(x1, 0), max(y0, 0), max(y1, 0)])
    if min(pad) < 0:
        z = z[:, :, max(-y0, 0) : z.shape[2] - max(-y1, 0), max(-x0, 0) : z.shape[3] - max(-x1, 0)]
    taps = fir.to(dtype) if fir.dim() == 2 else fir.to(dtype)[:, None] * fir.to(dtype)[None, :]
    taps = taps * gain
    taps = taps if flip else taps.flip(0, 1)
    # `conv2d` correlates.
    return F.conv2d(z, taps[None, None].expand(c, 1, *taps.shape), stride=down, groups=c)


def reference(x: Tensor, fir: Tensor, up: int, down: int, pad: list[int], gain: float, flip: bool) -> Tensor:
    """Compute upfirdn2d in plain PyTorch: the oracle in fp64, and what ONNX export writes."""
    return filtered(x, fir, up, down, pad, gain, flip).to(x.dtype)


def _eager(x: Tensor, *arguments: Any) -> Tensor:
    return reference(x, *arguments).contiguous(memory_format=memory_format(x))


def native_geometry(
    x: Tensor, fir: Tensor, up: int, down: int, pad: list[int], gain: float, flip: bool, y: Tensor
) -> dict[str, Any]:
    """Return the fields of the native kernel that describe the filter. x and fir are as the kernel reads them."""
    (n, c, h, w), (_, _, out_h, out_w) = x.shape, y.shape
    return {
        "x": x.data_ptr(),
        "y": y.data_ptr(),
        "fir": fir.data_ptr(),
        "batch": n,
        "channels": c,
        "in_height": h,
        "in_width": w,
        "out_height": out_h,
        "out_width": out_w,
        "pad_x": pad[0],
        "pad_y": pad[2],
        "fir_height": fir.shape[0],
        "fir_width": fir.shape[-1],
        "up": up,
        "down": down,
        "dtype": native.DTYPE_CODES[x.dtype],
        "separable": fir.dim() == 1,
        "flip": flip,
        "channels_last": memory_format(x) is torch.channels_last,
        "fir_gain": gain,
    }


def _native(x: Tensor, fir: Tensor, up: int, down: int, pad: list[int], gain: float, flip: bool) -> Tensor:
    fmt = memory_format(x)
    x = x.contiguous(memory_format=fmt)
    taps = in_format(fir, torch.float32, torch.contiguous_format)
    y = empty(output_shape(x, fir, up, down, pad), x, x.dtype, fmt)
    native.module().upfirdn2d_fwd(
        native.target(y, ONE_THREAD), **native_geometry(x, taps, up, down, pad, gain, flip, y)
    )
    return y


def _triton(x: Tensor, *arguments: Any) -> Tensor:
    from faceedit.kernels import upfirdn2d_triton

    return upfirdn2d_triton.forward(x, *arguments)


_forward = dispatcher("upfirdn2d", eager=_eager, cpu=_native, cuda=_native, triton=_triton)


def _fake(x: Tensor, fir: Tensor, up: int, down: int, pad: list[int], gain: float, flip: bool) -> Tensor:
    return x.new_empty(output_shape(x, fir, up, down, pad)).contiguous(memory_format=memory_format(x))


upfirdn2d_op = define_op(
    "upfirdn2d(Tensor x, Tensor fir, int up, int down, int[] pad, float gain, bool flip) -> Tensor", _forward, _fake
)


def refuse_fir_gradient(op: str, ctx: Any) -> None:
    """Raise when the filter (argument 1) requires grad: the op has none for it."""
    if ctx.needs_input_grad[1]:
        raise ValueError(f"{op}: fir must not require grad, got requires_grad=True; detach it")


def transposed(
    grad: Tensor, fir: Tensor, up: int, down: int, pad: list[int], gain: float, flip: bool, height: int, width: int
) -> Tensor:
    """Return the gradient to upfirdn2d's x of (height, width): up and down swapped, filter turned, pads adjusted."""
    kh, kw = fir.shape[0], fir.shape[-1]
    x0, _, y0, _ = pad
    sides = [
        kw - 1 - x0,
        width * up - grad.shape[3] * down + x0 - up + 1,
        kh - 1 - y0,
        height * up - grad.shape[2] * down + y0 - up + 1,
    ]
    return upfirdn2d_op(grad, fir, down, up, sides, gain, not flip)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    refuse_fir_gradient("upfirdn2d", ctx)
    x, fir, *ctx.settings = inputs
    ctx.size = x.shape[2:]
    ctx.format = memory_format(x)
    ctx.backend = requested_backend()
    ctx.save_for_backward(fir)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    with backend_again(ctx.backend):
        gx = transposed(grad.contiguous(memory_format=ctx.format), *ctx.saved_tensors, *ctx.settings, *ctx.size)
    return gx, None, None, None, None, None, None


upfirdn2d_op.register_autograd(_autograd, setup_context=_setup_context)
register_onnx_decomposition(upfirdn2d_op, reference)


@upfirdn2d_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Tensor, int]:
    """Fold the mapped axis into N; one call a slice where the filter is mapped itself."""
    x, *others = arguments
    if in_dims[1] is not None:
        return mapped_slices(upfirdn2d_op, info, in_dims, arguments)
    y = upfirdn2d_op(x.movedim(in_dims[0], 0).flatten(0, 1), *others)
    return y.unflatten(0, (info.batch_size, -1)), 0


def setup_filter(
    taps: Sequence[float] | Sequence[Sequence[float]] | Tensor,
    *,
    normalize: bool = True,
    flip: bool = False,
    gain: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return taps, e.g. [1, 3, 3, 1], as a float32 filter for upfirdn2d that sums to `gain` over both axes.

    One axis of taps stays one axis: it serves rows and columns alike, so that it is known to be separable.
    """
    check_number("setup_filter", "gain", gain)
    # Numbers are scaled on the CPU: on "meta" arithmetic would import PyTorch's compiler, which takes seconds.
    is_tensor = isinstance(taps, Tensor)
    try:
        fir = torch.as_tensor(taps, dtype=torch.float32, device=device if is_tensor else "cpu")
    except (TypeError, ValueError) as error:
        raise type(error)(f"setup_filter: taps must be numbers, got {short(taps)}; [1] changes nothing") from None
    if fir.dim() not in (1, 2) or fir.numel() == 0:
        raise ValueError(f"setup_filter: taps must be of shape (kh, kw) or (k,), got {describe(fir)}; reshape them")
    if normalize:
        fir = fir / fir.sum()
    if flip:
        fir = fir.flip(tuple(range(fir.dim())))
    fir = fir * gain ** (fir.dim() / 2)
    return fir if is_tensor else fir.to(torch.get_default_device() if device is None else device)


def filter2d(x: Tensor, fir: Tensor, pad: int | Sequence[int] = 0, *, gain: float = 1.0, flip: bool = False) -> Tensor:
    """Filter an image to an image of the same size; `pad` comes on top. See upfirdn2d."""
    _check_fir("filter2d", fir)
    x0, x1, y0, y1 = _sides("filter2d", pad)
    kh, kw = fir.shape[0], fir.shape[-1]
    sides = (x0 + kw // 2, x1 + (kw - 1) // 2, y0 + kh // 2, y1 + (kh - 1) // 2)
    return upfirdn2d(x, fir, pad=sides, gain=gain, flip=flip)


def upsample2d(
    x: Tensor, fir: Tensor, pad: int | Sequence[int] = 0, *, gain: float = 1.0, flip: bool = False
) -> Tensor:
    """Upsample an image to twice its size, its brightness kept; `pad` comes on top. See upfirdn2d."""
    _check_fir("upsample2d", fir)
    x0, x1, y0, y1 = _sides("upsample2d", pad)
    kh, kw = fir.shape[0], fir.shape[-1]
    sides = (x0 + (kw + 1) // 2, x1 + (kw - 2) // 2, y0 + (kh + 1) // 2, y1 + (kh - 2) // 2)
    return upfirdn2d(x, fir, up=2, pad=sides, gain=gain * 4, flip=flip)


def downsample2d(
    x: Tensor, fir: Tensor, pad: int | Sequence[int] = 0, *, gain: float = 1.0, flip: bool = False
) -> Tensor:
    """Downsample an image to half its size; `pad` comes on top. See upfirdn2d."""
    _check_fir("downsample2d", fir)
    x0, x1, y0, y1 = _sides("downsample2d", pad)
    kh, kw = fir.shape[0], fir.shape[-1]
    sides = (x0 + (kw - 1) // 2, x1 + (kw - 2) // 2, y0 + (kh - 1) // 2, y1 + (kh - 2) // 2)
    return upfirdn2d(x, fir, down=2, pad=sides, gain=gain, flip=flip)
