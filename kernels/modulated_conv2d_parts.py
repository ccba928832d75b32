# SPDX-License-Identifier: Apache-2.0
"""What every backend of modulated_conv2d shares: its geometry, its vectors, weights made ready, the convolution.

The convolution is PyTorch's (oneDNN, cuDNN) unless a backend has a layer of its own; what it brings besides are the
passes over activations around it.
"""

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels.direct import is_ordinary
from faceedit.kernels.tensors import in_format
from faceedit.kernels.upfirdn2d import filtered

EPSILON = 1e-8  # under the root of the demodulation
LEAST_LENGTH = 2.0**-18  # of a filter, in fp16: demodulation multiplies what is shorter by EPSILON^-1/2 at most
# fp16, backward: how large the gradient may be that goes into a convolution. A data gradient adds at most outputs *
# kernel such values, the filters being of length 1, and a FIR multiplies one by 4.
GRADIENT_LIMIT = 4.0
SUM_LIMIT = 2.0**15  # and what a weight's gradient adds up to at most, every term at its largest
STEEPEST = 1.1  # slope of any activation but lrelu's own; silu's is


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Geometry:
    """Kernel size and resampling. At most one of up and down is 2."""

    kernel: int
    up: int
    down: int

    def output_size(self, h: Any, w: Any) -> tuple[Any, Any]:
        return (2 * h, 2 * w) if self.up == 2 else (h // 2, w // 2) if self.down == 2 else (h, w)

    @property
    def fir_pad(self) -> int:
        """Pixels added on each side before the FIR: after the transposed convolution, or before the strided one."""
        return (5 - self.kernel) // 2 if self.up == 2 else self.kernel // 2 + 1

    @property
    def fir_pad_back(self) -> int:
        """The padding of the transposed filter: what the filter's own lacked."""
        return 3 - self.fir_pad

    @property
    def padding(self) -> int:
        """The convolution's own padding; with a FIR all of it lies there."""
        return self.kernel // 2 if self.up == self.down == 1 else 0

    def convolve(self, x: Tensor, weight: Tensor) -> Tensor:
        """Convolve without FIR; `weight` is (O,I,k,k), for up = 2 its transpose (I,O,k,k)."""
        if self.up == 2:
            return F.conv_transpose2d(x, weight, stride=2)
        return F.conv2d(x, weight, stride=self.down, padding=self.padding)

    def convolve_backward(
        self, grad: Tensor, x: Tensor, weight: Tensor, wanted: tuple[bool, bool]
    ) -> tuple[Tensor, Tensor]:
        """Return the gradients of `convolve` to x, of which only the shape counts unless wanted[1], and to weight.

        Differentiable itself. What is not wanted is None.
        """
        stride = 2 if self.up == 2 or self.down == 2 else 1
        if not wanted[1] and self.down == 1:
            if self.up == 2:
                return F.conv2d(grad, weight, stride=2), grad.new_empty(0)
            # The same product by a shorter way than convolution_backward's.
            return F.conv_transpose2d(grad, weight, padding=self.padding), grad.new_empty(0)
        gx, gweight, _ = torch.ops.aten.convolution_backward.default(
            grad, x, weight, None, [stride] * 2, [self.padding] * 2, [1, 1], self.up == 2, [0, 0], 1, [*wanted, False]
        )
        return gx, gweight


@cache
def _usual_taps() -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor([0.125, 0.375, 0.375, 0.125], dtype=torch.float32, device="cpu")


def fir_taps(fir: Tensor | None, x: Tensor) -> Tensor:
    """Return the four taps; without any given, [1, 3, 3, 1] / 8."""
    if fir is not None:
        return fir.detach()
    if is_ordinary(x) and x.is_cpu and x.dtype != torch.float64:
        return _usual_taps()
    # Not new_tensor: tracers do not write a constant tensor down.
    pieces = (x.new_full((count,), tap, dtype=compute_dtype(x)) for count, tap in ((1, 0.125), (2, 0.375), (1, 0.125)))
    return torch.cat(list(pieces))


def resampled(x: Tensor, weight: Tensor, fir: Tensor | None, geometry: Geometry) -> Tensor:
    """Convolve with FIR in plain PyTorch: weight (O,I,k,k)."""
    pad = [geometry.fir_pad] * 4
    if geometry.down == 2:
        x = filtered(x, fir_taps(fir, x), 1, 1, pad, 1.0, False).to(x.dtype)
    y = geometry.convolve(x, weight.transpose(0, 1) if geometry.up == 2 else weight)
    return filtered(y, fir_taps(fir, y), 1, 1, pad, 4.0, False).to(y.dtype) if geometry.up == 2 else y


def resampled_backward(
    grad: Tensor, x: Tensor, weight: Tensor, fir: Tensor | None, geometry: Geometry, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor]:
    """Return the gradients of `resampled` to x and weight in plain PyTorch: differentiable itself."""
    pad, back = [geometry.fir_pad] * 4, [geometry.fir_pad_back] * 4
    if geometry.up == 2:
        grad = filtered(grad, fir_taps(fir, grad), 1, 1, back, 4.0, True).to(grad.dtype)
        gx, gweight = geometry.convolve_backward(grad, x, weight.transpose(0, 1), wanted)
        return gx, gweight.transpose(0, 1) if wanted[1] else gweight
    if geometry.down == 2:
        x = filtered(x, fir_taps(fir, x), 1, 1, pad, 1.0, False).to(x.dtype)
    gx, gweight = geometry.convolve_backward(grad, x, weight, wanted)
    if geometry.down == 2 and wanted[0]:
        gx = filtered(gx, fir_taps(fir, gx), 1, 1, back, 1.0, True).to(gx.dtype)
    return gx, gweight


@dataclass(slots=True)
class _Made:
    """What was made from one weight tensor, while that tensor lives and is not written to.

    storage: an address alone would not do. `weight.data = other` frees memory that the next tensor may get.
    tensors: by key, each with the CUDA stream that made it and the event after which it has its values.
    captured: what CUDA graphs read, by id. They know addresses only, so it lives as long as the weight, whatever is
        written.
    """

    weight: weakref.ref[Tensor]
    storage: weakref.ref[torch.UntypedStorage]
    version: int
    address: int
    tensors: dict[Any, tuple[Tensor, Any, Any]] = field(default_factory=dict)
    captured: dict[int, Tensor] = field(default_factory=dict)

    def keep(self, key: Any, tensor: Tensor) -> None:
        """Remember a tensor that the current stream makes, unless another thread was first."""
        stream = torch.cuda.current_stream(tensor.device) if tensor.is_cuda else None
        made = None if stream is None else stream.record_event()
        self.tensors.setdefault(key, (tensor, stream, made))  # at once: other threads read while events are recorded

    def take(self, key: Any) -> Tensor:
        """Return a remembered tensor, ready for the current stream and alive until that has read it."""
        tensor, maker, made = self.tensors[key]
        if tensor.is_cuda:
            stream = torch.cuda.current_stream(tensor.device)
            if stream != maker:
                stream.wait_event(made)
                tensor.record_stream(stream)
        return tensor


_made: dict[int, _Made] = {}
_making = threading.RLock()  # so that threads that meet at a weight make one of each, and a graph's is not let go


def from_weight(weight: Tensor, key: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
    """Return make(weight), remembered for a weight that nothing trains.

    A write that autograd's version counter sees, and a new storage, make it anew. Inference tensors have no counter.
    What is made while a CUDA graph is captured has no values until the graph is replayed, and is not remembered.
    """
    if weight.requires_grad or weight.is_inference():
        return make(weight.detach())
    with _making:
        return _remembered(weight, key, make)


def _remembered(weight: Tensor, key: Any, make: Callable[[Tensor], Tensor]) -> Tensor:
    identity = id(weight)
    known = _made.get(identity)
    storage, address = weight.untyped_storage(), weight.data_ptr()
    stale = known is None or known.weight() is not weight or known.version != weight._version
    if stale or known is None or known.storage() is not storage or known.address != address:
        reference = weakref.ref(weight, lambda _: _made.pop(identity, None))
        captured = {} if known is None or known.weight() is not weight else known.captured
        version = weight._version
        known = _made[identity] = _Made(reference, weakref.ref(storage), version, address, captured=captured)
    if weight.is_cuda and torch.cuda.is_current_stream_capturing():
        # Whoever captures warms up and synchronises first; an event of outside could not be waited for in here.
        if key not in known.tensors:
            return make(weight.detach())
        tensor = known.tensors[key][0]
        known.captured[id(tensor)] = tensor
        return tensor
    if key not in known.tensors:
        known.keep(key, make(weight.detach()))
    return known.take(key)


def squares(weight: Tensor) -> Tensor:
    """Return sum_k weight^2, (O,I), in the computing dtype."""
    return from_weight(weight, "squares", lambda w: w.to(compute_dtype(w)).square().sum((2, 3)))


def lengths_of(squares: Tensor) -> Tensor:
    """Return each filter's L2 norm, rounded up to a power of two, (O,): dividing by it loses no bit."""
    return squares.sum(1).clamp(min=LEAST_LENGTH**2).log2().mul(0.5).ceil().exp2()


def over_lengths(weight: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the weight (O,I,k,k), or a gradient to it, with each filter divided by its length."""
    return weight if lengths is None else weight.to(lengths.dtype) / lengths[:, None, None, None]


def ready(
    weight: Tensor, dtype: torch.dtype, fmt: torch.memory_format, transposed: bool, lengths: Tensor | None
) -> Tensor:
    """Return the weight as the convolution wants it, so that it is not cast and reordered at every call.

    lengths: what to divide the filters by, from `lengths_of`.
    """

    def make(w: Tensor) -> Tensor:
        w = over_lengths(w, lengths)
        return (w.transpose(0, 1) if transposed else w).to(dtype).contiguous(memory_format=fmt)

    return from_weight(weight, (dtype, fmt, transposed, lengths is not None), make)


def turned(weight: Tensor, dtype: torch.dtype, fmt: torch.memory_format, lengths: Tensor | None) -> Tensor:
    """Return the weight (I,O,k,k) with which a plain convolution of a gradient gives the data gradient; as `ready`."""

    def make(w: Tensor) -> Tensor:
        w = over_lengths(w, lengths)
        return w.transpose(0, 1).flip(2, 3).to(dtype).contiguous(memory_format=fmt)

    return from_weight(weight, (dtype, fmt, "turned", lengths is not None), make)


@dataclass(slots=True)
class Vectors:
    """Per sample and channel, in the computing dtype.

    z = demodulation * factor * lengths * conv(weight / lengths, style / factor * x). What is fp16's only keeps every
    value on the way within a few times that of x or z: with demodulation a filter's scale is not in z.
    """

    style: Tensor  # (N,I)
    demodulation: Tensor | None  # (N,O)
    outputs: int  # O
    factor: Tensor | None = None  # (N,1), fp16 only
    lengths: Tensor | None = None  # (O,), fp16 with demodulation only

    @property
    def inner(self) -> Tensor:
        return self.style if self.factor is None else self.style / self.factor

    @property
    def outer(self) -> Tensor | None:
        if self.factor is None:
            return self.demodulation
        if self.demodulation is None or self.lengths is None:
            return self.factor.expand(-1, self.outputs).contiguous()
        return self.demodulation * self.lengths * self.factor


def fp16_factor(style: Tensor, demodulate: bool) -> Tensor:
    """Return what to divide a sample's styles by, (N,1), so that style * x does not leave fp16's range.

    With demodulation that is the largest style: through filters of length 1 no sum then passes the layer's result.
    Without, only what styles are above 1 is taken out.
    """
    widest = style.detach().abs().amax(1, keepdim=True)
    finite = widest.isfinite()
    if demodulate:
        return torch.where(finite & (widest > 0), widest, 1.0)
    return torch.where(finite, widest.clamp(min=1.0), 1.0)


def demodulate(style: Tensor, squares: Tensor) -> Tensor:
    """Return (sum_i style^2 * squares + EPSILON)^-1/2, (N,O), of (N,I) and (O,I)."""
    return F.linear(style * style, squares).add_(EPSILON).rsqrt_()


def demodulate_backward(
    grad_style: Tensor, grad: Tensor, demodulation: Tensor, style: Tensor, squares: Tensor
) -> Tensor:
    """Return the gradient to style (N,I) with what reaches it through the demodulation; grad (N,O) is that of d."""
    return grad_style - style * ((grad * demodulation**3) @ squares)


def modulate(weight: Tensor, style: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    """Return weight (O,I,k,k), or (I,O,k,k) when transposed, times the style (1,I) of one sample."""
    return (weight * style.view(*((-1, 1) if transposed else (1, -1)), 1, 1)).to(dtype)


def vectors(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    demodulate: Callable[[Tensor, Tensor], Tensor] | None,
    demodulation: Tensor | None = None,
) -> Vectors:
    """Make the vectors from operands, with what is remembered of the weight.

    demodulate: a backend's, None for none. demodulation: as the forward pass returned it, where that has run.
    """
    s = in_format(styles, compute_dtype(x), torch.contiguous_format)
    half, d, lengths = x.dtype == torch.float16, demodulation, None
    if demodulate is not None and (half or d is None):
        sums = squares(weight)
        d = demodulate(s, sums.to(s.dtype)) if d is None else d
        lengths = from_weight(weight, "lengths", lambda _: lengths_of(sums).to(s.dtype)) if half else None
    factor = fp16_factor(s, demodulate is not None) if half else None
    return Vectors(s, d, weight.shape[0], factor, lengths)


def largest(x: Tensor) -> Tensor:
    """Return the largest magnitude of each sample, (N,1) float32; 1 where that is not finite."""
    x = x.detach()
    found = torch.maximum(x.amax((1, 2, 3)), -x.amin((1, 2, 3)))  # x.abs() would write a copy
    return found[:, None].float().nan_to_num(1.0, posinf=1.0)


def gradient_divisor(outer: Tensor, gradient: Tensor, slope: float, gain: float) -> Tensor:
    """Return what to divide a sample's gradient by, (N,1), before it becomes fp16 and goes into the convolution.

    gradient (N,1): its largest magnitude behind the activation. Times outer and the activation's slope, and divided by
    this, it is GRADIENT_LIMIT at most, so that it neither overflows nor vanishes.
    """
    steepest = abs(gain) * max(STEEPEST, abs(slope)) / GRADIENT_LIMIT
    widest = outer.detach().amax(1, keepdim=True).nan_to_num(1.0, posinf=1.0)
    return (widest * (gradient * steepest)).clamp(min=1e-25)  # the quotients must not leave float32 either


def sum_divisor(divisor: Tensor, x: Tensor) -> Tensor:
    """Return what a weight's gradient is divided by, (1,1), one for all samples, while fp16 convolutions sum it.

    divisor: of each sample's gradient, from `gradient_divisor`; its styles take on the quotient of the two.
    """
    bound = x.shape[2] * x.shape[3] * 4 * GRADIENT_LIMIT  # of a sample's sum where x is 1; 4: see GRADIENT_LIMIT
    return (divisor * largest(x).clamp(min=1e-7)).sum(0, keepdim=True) * (bound / SUM_LIMIT)


def folds_style(x: Tensor, geometry: Geometry) -> bool:
    """Return whether scaling the weight is cheaper than scaling x.

    One sample, and an image large enough that a pass over it costs more than a pass over the weight.
    """
    side = 64 if x.device.type == "cpu" and geometry.up == geometry.down == 1 else 32
    return x.shape[0] == 1 and x.shape[2] * x.shape[3] > side * side


def is_rgb(weight: Tensor, geometry: Geometry) -> bool:
    """Return whether the convolution is ToRGB's: three sums a pixel, less work than a convolution's reorders."""
    return tuple(weight.shape[::2]) == (3, 1) and weight.shape[3] == 1 and geometry.up == geometry.down == 1
