# SPDX-License-Identifier: Apache-2.0
"""modulated_conv2d forward and backward: a backend's passes around PyTorch's convolution, or a layer of its own.

Forward:  style -> x or weight; convolution; [FIR]; one epilogue: demodulation, noise, bias, activation, ToRGB's sums.
Backward: one pass from the output (its activation inverted) to the gradient of the convolution and every sum over
          pixels; [FIR]; one data-gradient convolution with the plain weight; one pass that multiplies by the style and
          sums its gradient. Styles never enter a weight gradient, and a trained weight gets one for the batch.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from faceedit.kernels import modulated_conv2d_phases
from faceedit.kernels.fir_epilogue import fir_epilogue_op
from faceedit.kernels.modulated_conv2d_parts import (
    Geometry,
    Vectors,
    fir_taps,
    folds_style,
    from_weight,
    gradient_divisor,
    is_rgb,
    largest,
    over_lengths,
    ready,
    squares,
    sum_divisor,
    vectors,
)
from faceedit.kernels.noise_bias_act import PIECEWISE_LINEAR, noise_bias_act_backward_op
from faceedit.kernels.tensors import as_float, in_dtype, in_format, memory_format
from faceedit.kernels.upfirdn2d import upfirdn2d_op

Optional4 = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]  # scale, noise, strength, bias
Settings = tuple[str, float, float, float]  # act, slope, gain, clamp

# Style, convolution, epilogue and ToRGB in one call: (x, weight, v, operands, factors, settings) -> y, rgb. None: the
# values ask for PyTorch's convolution after all.
Layer = Callable[[Tensor, Tensor, Vectors, Optional4, Tensor | None, Settings], tuple[Tensor, Tensor | None] | None]

# Its convolution's data gradient, times the style, and the style's gradient: (grad, weight, v, x, style, wanted).
LayerBackward = Callable[[Tensor, Tensor, Vectors, Tensor, Tensor, bool], tuple[Tensor, Tensor | None] | None]


class Passes(Protocol):
    """What a backend brings: modulated_conv2d_native and modulated_conv2d_triton are such modules."""

    def scale(self, x: Tensor, style: Tensor) -> Tensor: ...

    def epilogue(
        self, core: Tensor, y: Tensor, vectors: Optional4, factors: Tensor | None, settings: Settings
    ) -> Tensor | None: ...

    def dots(self, x: Tensor, factors: Tensor) -> Tensor: ...

    def epilogue_backward(
        self,
        grad: Tensor | None,
        saved: Tensor,
        vectors: Optional4,
        factors: Tensor | None,
        grad_rgb: Tensor | None,
        settings: Settings,
        wanted: tuple[bool, bool, bool, bool, bool],
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]: ...

    def style_backward(self, x: Tensor, grad: Tensor, style: Tensor, wanted: bool) -> Tensor | None: ...

    def demodulate(self, style: Tensor, squares: Tensor) -> Tensor: ...

    def demodulate_backward(
        self, grad_style: Tensor, grad: Tensor, demodulation: Tensor, style: Tensor, squares: Tensor
    ) -> Tensor: ...

    def modulate(self, weight: Tensor, style: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor: ...


def output_tells_input(act: str, slope: float, gain: float) -> bool:
    """Return whether the output gives the activation's input back wherever the gradient is not zero."""
    return act in PIECEWISE_LINEAR and gain > 0 and (act != "lrelu" or slope > 0)


def rgb_factors(rgb_weight: Tensor | None, rgb_styles: Tensor | None) -> Tensor | None:
    """Return ToRGB's weight of each sample, (N,3,O)."""
    if rgb_weight is None or rgb_styles is None:
        return None
    return (in_dtype(rgb_weight, torch.float32) * in_dtype(rgb_styles, torch.float32).unsqueeze(1)).contiguous()


def _rgb_factors_of(weight: Tensor, v: Vectors) -> Tensor:
    return (over_lengths(weight.detach(), v.lengths)[:, :, 0, 0].float() * v.inner[:, None]).contiguous()


def forward(
    passes: Passes,
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    fir: Tensor | None,
    rgb_weight: Tensor | None,
    rgb_styles: Tensor | None,
    up: int,
    down: int,
    demodulate: bool,
    act: str,
    slope: float,
    gain: float,
    clamp: float,
    *,
    layer: Layer | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return y, ToRGB's sums, the demodulation and the epilogue's input; the last three empty where there are none.

    layer: what runs a layer that it fits in place of PyTorch's convolution and the passes.
    """
    geometry, settings = Geometry(weight.shape[2], up, down), (act, slope, gain, clamp)
    fmt = memory_format(x)
    x = x.contiguous(memory_format=fmt)
    v = vectors(x, weight, styles, passes.demodulate if demodulate else None)
    factors = rgb_factors(rgb_weight, rgb_styles)
    noise, strength, bias = map(as_float, (noise, strength, bias))
    operands = (v.outer, noise, strength, bias)
    keeps_core = not output_tells_input(act, slope, gain)
    done = layer(x, weight, v, operands, factors, settings) if layer is not None and not keeps_core else None
    if done is not None:
        y, rgb = done
        found = [x.new_empty(0) if t is None else t for t in (rgb, v.demodulation, None)]
        return y, found[0], found[1], found[2]
    if is_rgb(weight, geometry):
        core = passes.dots(x, _rgb_factors_of(weight, v))
    else:
        core = _convolve(passes, x, weight, v, fir, geometry, fmt)
    if up == 2 and not keeps_core:
        pad = [geometry.fir_pad] * 4
        y = fir_epilogue_op(core, fir_taps(fir, x), 1, 1, pad, 4.0, False, *operands, None, *settings)
        rgb = None if factors is None else passes.dots(y, factors)
    else:
        if up == 2:
            core = _filter(core, fir, geometry.fir_pad, 4.0)
        y = torch.empty_like(core) if keeps_core else core
        rgb = passes.epilogue(core, y, operands, factors, settings)
    y = in_format(y, x.dtype, fmt)
    kept = in_format(core, x.dtype, fmt) if keeps_core else None
    rest = [x.new_empty(0) if t is None else t for t in (rgb, v.demodulation, kept)]
    return y, rest[0], rest[1], rest[2]


def _filter(x: Tensor, fir: Tensor | None, pad: int, gain: float, flip: bool = False) -> Tensor:
    return upfirdn2d_op(x, fir_taps(fir, x), 1, 1, [pad] * 4, gain, flip)


def _convolve(
    passes: Passes,
    x: Tensor,
    weight: Tensor,
    v: Vectors,
    fir: Tensor | None,
    geometry: Geometry,
    fmt: torch.memory_format,
) -> Tensor:
    """Return the convolution's result, for up = 2 without the FIR."""
    style = v.inner
    if modulated_conv2d_phases.pays(x, weight, geometry, fmt):
        return _convolve_phases(passes, x, weight, style, geometry)
    if folds_style(x, geometry):
        transposed = geometry.up == 2
        w = passes.modulate(ready(weight, style.dtype, fmt, transposed, v.lengths), style, x.dtype, transposed)
    else:
        w = ready(weight, x.dtype, fmt, geometry.up == 2, v.lengths)
        x = passes.scale(x, style)
    if geometry.down == 2:
        x = _filter(x, fir, geometry.fir_pad, 1.0)
    return geometry.convolve(x, w).contiguous(memory_format=fmt)


def _convolve_phases(passes: Passes, x: Tensor, weight: Tensor, style: Tensor, geometry: Geometry) -> Tensor:
    """Return an upsampling convolution's result of its phases."""
    folds = folds_style(x, geometry)
    source, dtype = (x, style.dtype) if folds else (passes.scale(x, style), x.dtype)

    def convolve(row: int, column: int) -> Tensor:
        def cut(w: Tensor) -> Tensor:
            return modulated_conv2d_phases.part(w, row, column).to(dtype).contiguous(memory_format=torch.channels_last)

        w = from_weight(weight, ("phase", row, column, dtype), cut)
        w = passes.modulate(w, style, x.dtype, False) if folds else w
        return F.conv2d(source, w, padding=modulated_conv2d_phases.padding(row, column))

    return modulated_conv2d_phases.upsample(x, weight.shape[0], convolve)


def backward(
    passes: Passes,
    x: Tensor,
    grad: Tensor | None,
    grad_rgb: Tensor | None,
    weight: Tensor,
    styles: Tensor,
    demodulation: Tensor,
    y: Tensor,
    core: Tensor,
    noise: Tensor | None,
    strength: Tensor | None,
    bias: Tensor | None,
    fir: Tensor | None,
    rgb_weight: Tensor | None,
    rgb_styles: Tensor | None,
    up: int,
    down: int,
    demodulate: bool,
    act: str,
    slope: float,
    gain: float,
    clamp: float,
    wanted: list[bool],
    *,
    layer_backward: LayerBackward | None = None,
) -> tuple[Tensor | None, ...]:
    """Return the gradients to x, weight, styles, noise, strength, bias, rgb_weight and rgb_styles; None: not wanted.

    layer_backward: what runs the convolution's part of a layer that it fits, but for the weight's gradient.
    """
    geometry, settings = Geometry(weight.shape[2], up, down), (act, slope, gain, clamp)
    fmt = memory_format(x)
    x = x.contiguous(memory_format=fmt)
    want_x, want_weight, want_styles, want_noise, want_strength, want_bias, want_rgb_weight, want_rgb_styles = wanted
    v = vectors(x, weight, styles, passes.demodulate if demodulate else None, demodulation if demodulate else None)
    plain_rgb = is_rgb(weight, geometry)
    factors = rgb_factors(rgb_weight, rgb_styles)
    scale, later, divisor = v.outer, None, None
    want_scale = demodulate and (want_weight or want_styles)
    wants = (want_scale, want_noise, want_strength, want_bias, want_rgb_weight or want_rgb_styles)
    if plain_rgb:
        # Three planes: float32 and planar, whatever x is. The limit it was clamped to was rounded with the output.
        settings = (act, slope, gain, float(torch.tensor(clamp, dtype=y.dtype)))
        y, core = y.float().contiguous(), core.float().contiguous()
        grad = None if grad is None else grad.float().contiguous()
    elif v.factor is not None and scale is not None:
        divisor = gradient_divisor(scale, _largest_gradient(grad, grad_rgb, factors), slope, gain)
        if core.dim() == 4:  # what is computed from its input stays float32 until it is divided
            y, core = y.float(), core.float() * scale[:, :, None, None]
            scale, later = torch.ones_like(scale), scale / divisor
        else:
            scale = scale / divisor
    operands = (scale, as_float(noise), as_float(strength), as_float(bias))
    core_grad, found = _epilogue_backward(passes, grad, y, core, operands, factors, grad_rgb, settings, wants)
    grad_scale, grad_noise, grad_strength, grad_bias, grad_factors = found
    if later is not None:
        core_grad = (core_grad * later[:, :, None, None]).to(x.dtype)
    if grad_scale is not None and v.factor is not None and scale is not None and v.demodulation is not None:
        grad_scale = grad_scale * (scale / v.demodulation)  # the sum of dL/dz * z, over demodulation itself

    gx = grad_styles = grad_weight = None
    if plain_rgb and (want_x or want_styles or want_weight):
        # x takes the place of an output whose ToRGB sums were asked for.
        gx, sums = passes.epilogue_backward(
            None, x, (None,) * 4, _rgb_factors_of(weight, v), core_grad,
            ("linear", 1.0, 1.0, -1.0), (False, False, False, False, want_styles or want_weight),
        )  # fmt: skip
        if sums[4] is not None:
            w = over_lengths(weight.detach(), v.lengths)
            grad_styles = (sums[4] * w[:, :, 0, 0].float()).sum(1)
            grad_styles = grad_styles if v.factor is None else grad_styles / v.factor
            grad_weight = over_lengths((sums[4] * v.inner[:, None]).sum(0)[:, :, None, None], v.lengths)
    elif want_x or want_styles or want_weight:
        gx, grad_styles, grad_weight = _convolve_backward(
            passes, core_grad, x, weight, v, divisor, fir, geometry, fmt, (want_x, want_styles, want_weight),
            layer_backward,
        )  # fmt: skip
    if grad_scale is not None and v.demodulation is not None:
        # d = (sum_i s^2 W2 + eps)^-1/2, so dd/ds = -d^3 s W2 and dd/dw = -d^3 s^2 w.
        if want_styles and grad_styles is not None:
            of_weight = squares(weight).to(grad_scale.dtype)
            grad_styles = passes.demodulate_backward(grad_styles, grad_scale, v.demodulation, v.style, of_weight)
        if want_weight and grad_weight is not None:
            cubic = grad_scale * v.demodulation**3
            grad_weight = grad_weight - weight.detach() * (cubic.t() @ (v.style * v.style))[:, :, None, None]

    grad_rgb_weight = grad_rgb_styles = None
    if grad_factors is not None and rgb_weight is not None and rgb_styles is not None:
        if want_rgb_weight:
            grad_rgb_weight = (grad_factors * rgb_styles[:, None].float()).sum(0)
        if want_rgb_styles:
            grad_rgb_styles = (grad_factors * rgb_weight.float()).sum(1)
    if grad_noise is not None and noise is not None and noise.shape[0] != x.shape[0]:
        grad_noise = grad_noise.sum(0, keepdim=True)
    if grad_weight is not None:
        grad_weight = grad_weight.contiguous(memory_format=memory_format(weight))
    gradients = (gx, grad_weight, grad_styles, grad_noise, grad_strength, grad_bias, grad_rgb_weight, grad_rgb_styles)
    likes = (x, weight, styles, noise, strength, bias, rgb_weight, rgb_styles)
    return tuple(
        in_dtype(g, like.dtype) if want and g is not None and like is not None else None
        for want, g, like in zip(wanted, gradients, likes, strict=True)
    )


def _largest_gradient(grad: Tensor | None, grad_rgb: Tensor | None, factors: Tensor | None) -> Tensor:
    """Return a bound on each sample's gradient to y, ToRGB's part included, (N,1)."""
    parts = [] if grad is None else [largest(grad)]
    if grad_rgb is not None and factors is not None:
        parts.append((largest(grad_rgb) * factors.abs().amax(2)).sum(1, keepdim=True))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def _epilogue_backward(
    passes: Passes,
    grad: Tensor | None,
    y: Tensor,
    core: Tensor,
    operands: Optional4,
    factors: Tensor | None,
    grad_rgb: Tensor | None,
    settings: Settings,
    wanted: tuple[bool, bool, bool, bool, bool],
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    fmt = memory_format(y)
    y = y.contiguous(memory_format=fmt)
    grad = None if grad is None else in_format(grad, y.dtype, fmt)
    grad_rgb = None if grad_rgb is None else in_format(grad_rgb, torch.float32, torch.contiguous_format)
    if output_tells_input(*settings[:3]):
        return passes.epilogue_backward(grad, y, operands, factors, grad_rgb, settings, wanted)
    # The output hides the activation's input, which was kept: ToRGB's part first, then the epilogue from its input.
    found: tuple[Tensor | None, ...] = (None,) * 5
    if grad_rgb is not None or grad is None:
        grad, found = passes.epilogue_backward(
            grad, y, (None,) * 4, factors, grad_rgb, ("linear", 1.0, 1.0, -1.0), (*(False,) * 4, wanted[4])
        )
    grad = in_dtype(grad, core.dtype)
    gradients = noise_bias_act_backward_op(grad, core, True, *operands, *settings, [True, *wanted[:4]], "auto")
    sums = tuple(g if want else None for g, want in zip(gradients[1:], wanted[:4], strict=True))
    return in_dtype(gradients[0], y.dtype), (*sums, found[4])


def _convolve_backward(
    passes: Passes,
    core_grad: Tensor,
    x: Tensor,
    weight: Tensor,
    v: Vectors,
    divisor: Tensor | None,
    fir: Tensor | None,
    geometry: Geometry,
    fmt: torch.memory_format,
    wanted: tuple[bool, bool, bool],
    layer_backward: LayerBackward | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients to x, styles and weight without what passes through the demodulation.

    divisor: what core_grad was divided by, (N,1). layer_backward: only where it fits the layer.
    """
    want_x, want_styles, want_weight = wanted
    style = v.inner
    own, total = style, None  # of the weight's gradient
    if want_weight and divisor is not None:
        total = sum_divisor(divisor, x)
        own = style * (divisor / total)
    back = style if divisor is None else style * divisor
    gx: Tensor | None = None
    grad_styles: Tensor | None = None
    want_data = want_x or want_styles
    if layer_backward is not None and want_data:
        core_grad = in_format(core_grad, x.dtype, fmt)  # hooks may have given the output back in another format
        done = layer_backward(core_grad, weight, v, x, back, want_styles)
        if done is not None:
            gx, grad_styles = done
            want_data = False
            if not want_weight:
                return gx, _undivided(grad_styles, divisor, v), None
    transposed = geometry.up == 2
    if transposed:
        core_grad = _filter(core_grad, fir, geometry.fir_pad_back, 4.0, flip=True)
    folds = divisor is None and not want_styles and not want_weight and folds_style(x, geometry)
    if folds:  # no sum over the data's gradient is wanted, and so no pass over it
        w = passes.modulate(ready(weight, style.dtype, fmt, transposed, v.lengths), style, x.dtype, transposed)
    else:
        w = ready(weight, x.dtype, fmt, transposed, v.lengths)
    # Of the convolution's input only the shape counts, unless the weight's gradient is wanted.
    source = passes.scale(x, own) if want_weight else x
    if geometry.down == 2 and want_weight:
        source = _filter(source, fir, geometry.fir_pad, 1.0)
    elif geometry.down == 2:
        n, c, rows, columns = x.shape
        source = x.new_empty(1).expand(n, c, *(side + 2 * geometry.fir_pad - 3 for side in (rows, columns)))
    data, grad_weight = geometry.convolve_backward(core_grad, source, w, (want_data, want_weight))
    if want_data:
        if geometry.down == 2:
            data = _filter(data.contiguous(memory_format=fmt), fir, geometry.fir_pad_back, 1.0, flip=True)
        gx = data.contiguous(memory_format=fmt)
        if not folds:
            grad_styles = passes.style_backward(x, gx, back, want_styles)
    grad_styles = _undivided(grad_styles, divisor, v)
    if not want_weight:
        return gx, grad_styles, None
    grad_weight = (grad_weight.transpose(0, 1) if geometry.up == 2 else grad_weight).to(style.dtype)
    return gx, grad_styles, grad_weight if total is None else over_lengths(grad_weight * total, v.lengths)


def _undivided(grad_styles: Tensor | None, divisor: Tensor | None, v: Vectors) -> Tensor | None:
    """Return the styles' gradient times what the activations and their gradient were divided by."""
    if grad_styles is None or divisor is None or v.factor is None:
        return grad_styles
    return grad_styles * (divisor / v.factor)
