# SPDX-License-Identifier: Apache-2.0
"""StyleGAN2's layer: modulated convolution, resampling, demodulation, noise, bias, activation and ToRGB's sums.

z = d * conv(weight, styles * x) + noise * strength + bias, d[n,o] = (sum_ik (styles[n,i] * weight[o,i,k])^2 + eps)^-1/2
y = clamp(act(z) * gain),                                   rgb[n,k] = sum_o rgb_weight[k,o] * rgb_styles[n,o] * y[n,o]
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels import modulated_conv2d_passes
from faceedit.kernels.activations import check_activation
from faceedit.kernels.dispatch import backend, dispatcher, requested_backend
from faceedit.kernels.modulated_conv2d_parts import (
    EPSILON,
    Geometry,
    Vectors,
    compute_dtype,
    fp16_factor,
    gradient_divisor,
    is_rgb,
    largest,
    lengths_of,
    over_lengths,
    resampled,
    resampled_backward,
    sum_divisor,
)
from faceedit.kernels.modulated_conv2d_passes import output_tells_input
from faceedit.kernels.noise_bias_act import backward_reference as epilogue_backward
from faceedit.kernels.noise_bias_act import reference as epilogue
from faceedit.kernels.operator import define_op, mapped_slices, register_onnx_decomposition
from faceedit.kernels.tensors import (
    apart_from,
    as_integer,
    as_number,
    check_image,
    check_shape,
    check_tensor,
    describe,
    flat_planes,
    memory_format,
)


def modulated_conv2d(
    x: Tensor,
    weight: Tensor,
    styles: Tensor,
    *,
    noise: Tensor | None = None,
    strength: Tensor | None = None,
    bias: Tensor | None = None,
    up: int = 1,
    down: int = 1,
    fir: Tensor | None = None,
    demodulate: bool = True,
    act: str = "lrelu",
    slope: float = 0.2,
    gain: float = 2**0.5,
    clamp: float = -1.0,
    rgb_weight: Tensor | None = None,
    rgb_styles: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Run one layer of a StyleGAN2 generator, no per-sample weight and no intermediate activation kept.

    up = 2: transposed convolution of stride 2, then the FIR; down = 2: the FIR, then a convolution of stride 2. Sizes
    become 2H and H // 2. act="linear", gain=1, demodulate=False and a (3,I,1,1) weight are ToRGB.

    Args:     x (N,I,H,W) fp64|fp32|fp16|bf16, NCHW or channels_last (faster); weight (O,I,k,k), k odd, of any dtype;
              styles (N,I). noise (N|1,1,H',W') of the output's size, strength one value, bias (O). fir: four taps, as
              they are (None: [1,3,3,1] / 8). act, slope, gain, clamp as in noise_bias_act. rgb_weight (3,O) and
              rgb_styles (N,O): also return ToRGB's sums over y, to which bias and skip are to be added.
    Returns:  y (N,O,H',W') in x's dtype and memory format; with rgb_weight the pair (y, rgb), rgb (N,3,H',W') fp32,
              planar.
    Grad:     every tensor but fir (ValueError when it requires grad), to second order. Kinks as in noise_bias_act.
              The output is saved; for a smooth act or gain <= 0 the convolution's result too.
    Backends: eager (any device), cpu, cuda, triton. The convolution is PyTorch's, but in channels_last for fp32 layers
              on a CPU, half layers of few channels on a GPU, and `backend("triton")` without resampling. Against fp64,
              relative L2 of y and of gradients: fp32 (TF32 off) 1e-5, 1e-4; fp16 5e-3, 2e-2; bf16 1e-2, 5e-2. fp32 on
              a CPU: of a tile of 4x4 pixels to its largest value, which an outlier 1e4 times the rest spoils.
    Raises:   TypeError on a dtype; ValueError on shape, device, up, down or act.
    Note:     sums over a weight that does not require grad are kept between calls. They follow every write that PyTorch
              counts; after a write through `weight.data` make a new tensor.
    Source:   Karras et al. 2020 (StyleGAN2), equations 1 and 3, section 2.2; the skip generator of figure 7.
    """
    check_image("modulated_conv2d", "x", x)
    check_tensor("modulated_conv2d", "weight", weight)
    n, channels, h, w = x.shape
    if (
        weight.dim() != 4
        or weight.shape[0] < 1
        or weight.shape[1] != channels
        or weight.shape[2] != weight.shape[3]
        or weight.shape[2] % 2 == 0
    ):
        raise ValueError(
            f"modulated_conv2d: weight must be of shape (O, {channels}, k, k) with k odd, got {describe(weight)}; "
            "match it to x"
        )
    check_shape("modulated_conv2d", "weight", weight, x, tuple(weight.shape))
    check_shape("modulated_conv2d", "styles", styles, x, (n, channels))
    up = as_integer("modulated_conv2d", "up", up, "pass 1 or 2")
    down = as_integer("modulated_conv2d", "down", down, "pass 1 or 2")
    if (up, down) not in ((1, 1), (2, 1), (1, 2)):
        raise ValueError(
            f"modulated_conv2d: up and down must be 1, or one of them 2, got {up} and {down}; resample once"
        )
    if channels < 1 or h < down or w < down:
        raise ValueError(
            f"modulated_conv2d: x must have channels and {down} or more pixels a side for down={down}, "
            f"got {describe(x)}; pass a larger image"
        )
    out, (height, width) = weight.shape[0], Geometry(weight.shape[2], up, down).output_size(h, w)
    check_activation("modulated_conv2d", act, slope, gain, clamp)
    if bias is not None:
        check_shape("modulated_conv2d", "bias", bias, x, (out,))
    if noise is not None:
        check_shape("modulated_conv2d", "noise", noise, x, (n, 1, height, width), (1, 1, height, width))
    if strength is not None:
        if noise is None:
            raise ValueError("modulated_conv2d: strength must come with noise, got noise=None; pass both or neither")
        check_shape("modulated_conv2d", "strength", strength, x, (), (1,))
        strength = strength.reshape(()) if strength.dim() else strength
    if fir is not None:
        check_shape("modulated_conv2d", "fir", fir, x, (4,))
        if fir.requires_grad:
            raise ValueError("modulated_conv2d: fir must not require grad, got requires_grad=True; detach it")
    if (rgb_weight is None) != (rgb_styles is None):
        raise ValueError(
            "modulated_conv2d: rgb_weight must come with rgb_styles, got one of them; pass both or neither"
        )
    if rgb_weight is not None and rgb_styles is not None:
        check_shape("modulated_conv2d", "rgb_weight", rgb_weight, x, (3, out))
        check_shape("modulated_conv2d", "rgb_styles", rgb_styles, x, (n, out))
    y, rgb, _, _ = _op(
        x, weight, styles, noise, strength, bias, fir, rgb_weight, rgb_styles,
        up, down, demodulate, act, *map(as_number, (slope, gain, clamp)),
    )  # fmt: skip
    return y if rgb_weight is None else (y, rgb)


def _vectors(x: Tensor, weight: Tensor, styles: Tensor, demodulate: bool) -> Vectors:
    """Make the vectors in plain PyTorch, differentiable."""
    s, d, lengths, half = styles.to(compute_dtype(x)), None, None, x.dtype == torch.float16
    if demodulate:
        squares = weight.to(s.dtype).square().sum((2, 3))
        d = ((s * s) @ squares.t() + EPSILON).rsqrt()
        lengths = lengths_of(squares.detach()) if half else None
    return Vectors(s, d, weight.shape[0], fp16_factor(s, demodulate) if half else None, lengths)


def _scaled(x: Tensor, style: Tensor) -> Tensor:
    return (x.to(style.dtype) * style[:, :, None, None]).to(x.dtype)


def reference(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute modulated_conv2d in plain PyTorch: the oracle in fp64, and what ONNX export writes.

    Returns: y, rgb, the demodulation, the convolution's result; what is absent is an empty tensor.
    """
    v = _vectors(x, weight, styles, demodulate)
    w = over_lengths(weight, v.lengths).to(x.dtype)
    core = resampled(_scaled(x, v.inner), w, fir, Geometry(weight.shape[2], up, down))
    y = epilogue(core, v.outer, noise, strength, bias, act, slope, gain, clamp)
    rgb = x.new_empty(0)
    if rgb_weight is not None and rgb_styles is not None:
        dtype = compute_dtype(x)
        scaled = y.to(dtype) * rgb_styles.to(dtype)[:, :, None, None]
        rgb = torch.nn.functional.conv2d(scaled, rgb_weight.to(dtype)[:, :, None, None])
    kept = x.new_empty(0) if output_tells_input(act, slope, gain) else core
    return y, rgb, x.new_empty(0) if v.demodulation is None else v.demodulation, kept


def _eager(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    fmt = memory_format(x)
    y, rgb, demodulation, core = reference(x, *arguments)
    core = core.contiguous(memory_format=fmt) if core.dim() == 4 else core
    y = y.contiguous(memory_format=fmt)
    y = apart_from(y, core)
    return y, rgb.contiguous(), demodulation.contiguous(), core


def _native(
    x: Tensor, weight: Tensor, styles: Tensor, noise: Any, strength: Any, bias: Any, fir: Tensor | None, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from faceedit.kernels import modulated_conv2d_native, modulated_layer_native, winograd_native

    up, down = others[2:4]
    layer: modulated_conv2d_passes.Layer | None = None
    if memory_format(x) is torch.channels_last and down == 1:
        if up == 1 and modulated_layer_native.fits(x, weight):
            layer = modulated_layer_native.forward
        elif winograd_native.fits(x, weight, up):
            layer = partial(winograd_native.forward, up=up, fir=fir)
    return modulated_conv2d_passes.forward(
        modulated_conv2d_native, x, weight, styles, noise, strength, bias, fir, *others, layer=layer
    )


def _triton(x: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from faceedit.kernels import modulated_conv2d_gemm_triton, modulated_conv2d_triton

    # "auto" keeps PyTorch's convolution: on an H100 it and a pass take 0.5 to 0.8 times as long as Triton's kernel.
    weight, (up, down) = arguments[0], arguments[8:10]
    plain = up == down == 1 and not is_rgb(weight, Geometry(weight.shape[2], up, down))
    asked = requested_backend() == "triton" and plain and memory_format(x) is torch.channels_last
    asked = asked and modulated_conv2d_gemm_triton.fits(x, weight)
    layer = modulated_conv2d_gemm_triton.layer if asked else None
    # The FIR runs on what is fastest for it.
    with backend("auto"):
        return modulated_conv2d_passes.forward(modulated_conv2d_triton, x, *arguments, layer=layer)


_forward = dispatcher("modulated_conv2d", eager=_eager, cpu=_native, cuda=_native, triton=_triton)


def _fake(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, out, dtype = x.shape[0], weight.shape[0], compute_dtype(x)
    height, width = Geometry(weight.shape[2], up, down).output_size(x.shape[2], x.shape[3])
    y = torch.empty((n, out, height, width), dtype=x.dtype, device=x.device, memory_format=memory_format(x))
    rgb = x.new_empty(0) if rgb_weight is None else x.new_empty((n, 3, height, width), dtype=dtype)
    demodulation = x.new_empty((n, out), dtype=dtype) if demodulate else x.new_empty(0)
    return y, rgb, demodulation, x.new_empty(0) if output_tells_input(act, slope, gain) else torch.empty_like(y)


_op = define_op(
    "modulated_conv2d(Tensor x, Tensor weight, Tensor styles, Tensor? noise, Tensor? strength, Tensor? bias, "
    "Tensor? fir, Tensor? rgb_weight, Tensor? rgb_styles, int up, int down, bool demodulate, str act, float slope, "
    "float gain, float clamp) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _fake,
)


def backward_reference(
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
) -> tuple[Tensor, ...]:
    """Compute the gradients in plain PyTorch, from the inputs: the eager backend, and what is differentiated again.

    wanted: for x, weight, styles, noise, strength, bias, rgb_weight, rgb_styles. What is not wanted is an empty tensor.
    """
    dtype, geometry = compute_dtype(x), Geometry(weight.shape[2], up, down)
    v = _vectors(x, weight, styles, demodulate)
    w = over_lengths(weight, v.lengths).to(x.dtype)
    scaled = _scaled(x, v.inner)
    core = resampled(scaled, w, fir, geometry)
    g = torch.zeros_like(core, dtype=dtype) if grad is None else grad.to(dtype)
    grad_rgb_weight = grad_rgb_styles = None
    if grad_rgb is not None and rgb_weight is not None and rgb_styles is not None:
        y = epilogue(core, v.outer, noise, strength, bias, act, slope, gain, clamp).to(dtype)
        rows = flat_planes(grad_rgb.to(dtype))
        mixed = torch.matmul(rgb_weight.to(dtype).t(), rows).reshape(y.shape)
        g = g + mixed * rgb_styles.to(dtype)[:, :, None, None]
        sums = torch.matmul(rows, flat_planes(y).mT)
        grad_rgb_weight = (sums * rgb_styles.to(dtype)[:, None]).sum(0)
        grad_rgb_styles = (sums * rgb_weight.to(dtype)).sum(1)

    want_x, want_weight, want_styles, *want_vectors = wanted[:6]
    outer, style, divisor = v.outer, v.inner, None
    scale = outer
    if v.factor is not None and outer is not None:  # fp16: float32 until the gradient is divided
        core, scale = core.to(dtype) * outer[:, :, None, None], torch.ones_like(outer)
        divisor = gradient_divisor(outer, largest(g), slope, gain)
    core_grad, grad_scale, *gradients = epilogue_backward(
        g, core, True, scale, noise, strength, bias, act, slope, gain, clamp,
        [True, v.demodulation is not None, *want_vectors],
    )  # fmt: skip
    gx = grad_styles = grad_weight = total = None
    if want_x or want_styles or want_weight:
        if divisor is not None and outer is not None:
            core_grad = core_grad * (outer / divisor)[:, :, None, None]
            if want_weight:
                total = sum_divisor(divisor, x)
                scaled = _scaled(x, style * (divisor / total))
            style = style * divisor
        data, grad_weight = resampled_backward(
            core_grad.to(x.dtype), scaled, w, fir, geometry, (want_x or want_styles, want_weight)
        )
        if want_x or want_styles:
            gx = data.to(dtype) * style[:, :, None, None]
            grad_styles = (data.to(dtype) * x.to(dtype)).sum((2, 3))
            if divisor is not None and v.factor is not None:
                grad_styles = grad_styles * (divisor / v.factor)
        if want_weight and total is not None:
            grad_weight = over_lengths(grad_weight.to(dtype) * total, v.lengths)
        if v.demodulation is not None:
            wide = weight.to(dtype)
            # fp16: the sum of dL/dz * z, made the gradient to demodulation.
            cubic = (grad_scale if divisor is None else grad_scale / v.demodulation) * v.demodulation**3
            if want_styles and grad_styles is not None:
                grad_styles = grad_styles - v.style * (cubic @ wide.square().sum((2, 3)))
            if want_weight:
                grad_weight = grad_weight.to(dtype) - wide * (cubic.t() @ v.style.square())[:, :, None, None]
    found = (gx, grad_weight, grad_styles, *gradients, grad_rgb_weight, grad_rgb_styles)
    likes = (x, weight, styles, noise, strength, bias, rgb_weight, rgb_styles)
    return tuple(
        g.to(like.dtype) if want and g is not None and like is not None else x.new_empty(0)
        for want, g, like in zip(wanted, found, likes, strict=True)
    )


def _backward_eager(x: Tensor, grad: Tensor | None, grad_rgb: Tensor | None, *arguments: Any) -> tuple[Tensor, ...]:
    gx, gweight, *others = backward_reference(x, grad, grad_rgb, *arguments)
    formats = (memory_format(x), memory_format(arguments[0]))
    images = (g.contiguous(memory_format=f) if g.dim() == 4 else g for g, f in zip((gx, gweight), formats, strict=True))
    return *images, *(g.contiguous() for g in others)


def _backward_native(
    x: Tensor, grad: Tensor | None, grad_rgb: Tensor | None, weight: Tensor, *others: Any
) -> tuple[Tensor | None, ...]:
    from faceedit.kernels import modulated_conv2d_native, modulated_layer_native, winograd_native

    fir, (up, down), want_weight = others[7], others[10:12], others[-1][1]
    layer_backward: modulated_conv2d_passes.LayerBackward | None = None
    if memory_format(x) is torch.channels_last and down == 1:
        if up == 1 and not want_weight and modulated_layer_native.fits(x, weight):
            layer_backward = modulated_layer_native.backward
        elif winograd_native.fits(x, weight, up):
            layer_backward = partial(winograd_native.backward, up=up, fir=fir)
    return modulated_conv2d_passes.backward(
        modulated_conv2d_native, x, grad, grad_rgb, weight, *others, layer_backward=layer_backward
    )


def _backward_triton(x: Tensor, *arguments: Any) -> tuple[Tensor | None, ...]:
    from faceedit.kernels import modulated_conv2d_triton

    # The FIR runs on what is fastest for it.
    with backend("auto"):
        return modulated_conv2d_passes.backward(modulated_conv2d_triton, x, *arguments)


_backward = dispatcher(
    "modulated_conv2d_backward",
    eager=_backward_eager,
    cpu=_backward_native,
    cuda=_backward_native,
    triton=_backward_triton,
)


def _backward_fake(
    x: Tensor, grad: Any, grad_rgb: Any, weight: Tensor, styles: Tensor, d: Any, y: Any, core: Any, *others: Any
) -> tuple[Tensor, ...]:
    noise, strength, bias, _, rgb_weight, rgb_styles = others[:6]
    wanted: list[bool] = others[-2]
    operands = (x, weight, styles, noise, strength, bias, rgb_weight, rgb_styles)
    return tuple(
        x.new_empty(0)
        if not want or t is None
        else torch.empty(t.shape, dtype=t.dtype, device=t.device, memory_format=memory_format(t))
        for want, t in zip(wanted, operands, strict=True)
    )


_backward_op = define_op(
    "modulated_conv2d_backward(Tensor x, Tensor? grad, Tensor? grad_rgb, Tensor weight, Tensor styles, "
    "Tensor demodulation, Tensor y, Tensor core, Tensor? noise, Tensor? strength, Tensor? bias, Tensor? fir, "
    "Tensor? rgb_weight, Tensor? rgb_styles, int up, int down, bool demodulate, str act, float slope, float gain, "
    "float clamp, bool[] wanted, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    y, _, demodulation, core = output
    ctx.settings = inputs[9:]
    ctx.backend = requested_backend()
    ctx.set_materialize_grads(False)  # where only rgb is used, no zeros take the place of y's gradient
    ctx.save_for_backward(*inputs[:9], y, demodulation, core)


def _autograd(ctx: Any, grad: Tensor | None, grad_rgb: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    x, weight, styles, noise, strength, bias, fir, rgb_weight, rgb_styles, y, demodulation, core = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wanted = [*needs[:6], needs[7], needs[8]]
    none = (None,) * 16
    if rgb_weight is None:
        grad_rgb = None
    if grad is None and grad_rgb is None:
        return none
    wanted = [want and (i < 6 or grad_rgb is not None) for i, want in enumerate(wanted)]
    arguments = (
        x, grad, grad_rgb, weight, styles, demodulation, y, core,
        noise, strength, bias, fir, rgb_weight, rgb_styles, *ctx.settings, wanted,
    )  # fmt: skip
    # With create_graph=True the gradient is itself differentiated.
    gradients = backward_reference(*arguments) if torch.is_grad_enabled() else _backward_op(*arguments, ctx.backend)
    found = [g if want else None for g, want in zip(gradients, wanted, strict=True)]
    return *found[:6], None, *found[6:], *none[9:]


_op.register_autograd(_autograd, setup_context=_setup_context)
register_onnx_decomposition(_op, reference)


@_op.register_vmap
def _vmap(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, Any]:
    """One call a slice: what depends on the weight is made once either way."""
    return mapped_slices(_op, info, in_dims, arguments)
