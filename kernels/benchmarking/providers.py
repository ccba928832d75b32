# SPDX-License-Identifier: Apache-2.0
"""The ways to run a case, each compared with the case's baseline before anything is timed."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from faceedit.kernels.benchmarking.case import Case, Function, frozen
from faceedit.kernels.dispatch import backend, machine_reason

BACKEND = {"cpp": "cpu", "cuda": "cuda", "triton": "triton"}
PROVIDERS = ("eager", "compile", *BACKEND)

# Relative L2 against the baseline in the same dtype: outputs, gradients. Both sides round, each in its own order.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float16: (3e-3, 6e-3), torch.bfloat16: (2e-2, 4e-2)}


class WrongResultError(Exception):
    """A provider's answer is not the baseline's: a failure, never a row of a table."""


@contextlib.contextmanager
def without_tf32() -> Iterator[None]:
    """Multiply fp32 as fp32, which the tolerances stand for: PyTorch lets convolutions on a GPU use TF32.

    For comparing results. Times are taken with the settings that the process has.
    """
    matmul, convolution = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    matmul.allow_tf32 = convolution.allow_tf32 = False
    try:
        yield
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def missing(provider: str, device: str) -> str:
    """Return why `provider` cannot run tensors of `device` on this machine; empty when it can."""
    return machine_reason(BACKEND[provider], device) if provider in BACKEND else ""


def _under(name: str, function: Function) -> Function:
    def run(*tensors: Tensor) -> object:
        with backend(name):
            return function(*tensors)

    return run  # type: ignore[return-value]


def function_of(case: Case, provider: str) -> Function:
    """Return the case's function as `provider` runs it. Compiling happens in its first calls."""
    if provider in case.others:
        return case.others[provider]
    if provider in BACKEND:
        return _under(BACKEND[provider], case.ours)
    if provider == "compile":
        torch.compiler.reset()  # past the recompile limit later cases would silently time eager code
        return torch.compile(case.others.get(case.baseline, case.eager))
    return _under("eager", case.eager)


@dataclass(slots=True)
class Step:
    """One call of a provider: forward, or forward and the gradients of every wanted input."""

    function: Function
    inputs: Sequence[Tensor]
    wanted: Sequence[Tensor]
    weights: Sequence[Tensor] = ()

    def __call__(self) -> tuple[Tensor, ...]:
        with contextlib.nullcontext() if self.wanted else torch.no_grad():
            answer = self.function(*self.inputs)
        outputs = (answer,) if isinstance(answer, Tensor) else tuple(answer)
        if not self.wanted:
            return outputs
        sources = [y for y in outputs if y.requires_grad]
        if len(self.weights) != len(sources):
            # Positive: sums of gradients then do not cancel to rounding errors.
            self.weights = [_weights(y) for y in sources]
        return *outputs, *torch.autograd.grad(sources, self.wanted, self.weights)


def _weights(y: Tensor) -> Tensor:
    values = torch.rand(y.shape, generator=torch.Generator().manual_seed(7)) + 0.5
    like = torch.empty_like(y)  # y's dtype, device and strides
    return like.copy_(values)


def step(case: Case, provider: str, device: str, backward: bool) -> Step:
    """Return a provider's call on its own copies of the inputs."""
    inputs = [t.to(device, copy=True, memory_format=torch.preserve_format) for t in case.inputs]
    for i in case.frozen:
        inputs[i] = frozen(inputs[i])
    wanted = [inputs[i].requires_grad_() for i in case.differentiable()] if backward else []
    return Step(function_of(case, provider), inputs, wanted)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return |a - e| / |e| in float64, infinite where shape, NaN or an infinity differ."""
    if actual.shape != expected.shape:
        return float("inf")
    a, e = actual.detach().double(), expected.detach().double()
    both = a.isfinite() & e.isfinite()
    if not bool((both | (a == e) | (a.isnan() & e.isnan())).all()):
        return float("inf")
    error, scale = float((a - e)[both].norm()), float(e[both].norm())
    return error / scale if scale else (0.0 if error == 0 else float("inf"))


def check(case: Case, name: str, actual: Callable[[], tuple[Tensor, ...]], expected: Sequence[Tensor]) -> float:
    """Run `actual` once and return its largest relative error.

    Raises: WrongResultError where an output or gradient is out of tolerance.
    """
    dtype = case.inputs[0].dtype
    forward, gradient = case.tolerance or TOLERANCE[dtype]
    results = actual()
    if len(results) != len(expected):
        raise WrongResultError(f"{name} gives {len(results)} tensors, {case.baseline} {len(expected)}")
    outputs = sum(1 for y in results if y.grad_fn is not None) or len(results)
    worst = 0.0
    for index, (result, wanted) in enumerate(zip(results, expected, strict=True)):
        error, bound = relative_error(result, wanted), forward if index < outputs else gradient
        if not error <= bound:
            what = f"output {index}" if index < outputs else f"gradient {index - outputs}"
            raise WrongResultError(f"{what} of {name} is {error:.3g} from {case.baseline}'s, more than {bound:.3g}")
        worst = max(worst, error)
    return worst
