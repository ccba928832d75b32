# SPDX-License-Identifier: Apache-2.0
"""Define an op once: its schema is written down here and nowhere else.

`torch.library.custom_op` registers the same parts, with two wrappers around each call that cost more than a small
layer does: it looks for aliases among the results, and its gradient fills in default arguments from the schema. opcheck
looks for aliases in the tests, and no schema here has a default.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from faceedit.kernels.direct import has_tangent, way
from faceedit.kernels.dispatch import Dispatcher, without_autocast

_decompositions: dict[Any, Callable[..., Any]] = {}
_operators: list["Operator"] = []  # an op's registrations go with its Operator

# What `torch.library.register_autograd` itself is made of. Where a PyTorch lacks it, that function serves.
_below_autograd: Any = getattr(torch._C, "_AutoDispatchBelowAutograd", None)
_after_autograd: Any = getattr(torch._C, "_after_autograd_keyset", None)
# torch.compiler.disable without importing the compiler before something compiles.
_opaque: Any = getattr(torch, "_disable_dynamo", lambda body: body)


class Operator:
    """One op of the namespace `faceedit`, called like a function."""

    def __init__(
        self, schema: str, body: Callable[..., Any], fake: Callable[..., Any], composed: Callable[..., Any]
    ) -> None:
        self.name = schema.partition("(")[0]
        self._library = torch.library.Library("faceedit", "FRAGMENT")
        self._library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        # Dynamo does not look into the body, also where a frame that it gave up on calls the op.
        self._library.impl(self.name, _opaque(_filled(body)), "CompositeExplicitAutograd")
        torch.library.register_fake(f"faceedit::{self.name}", fake, lib=self._library)
        self.overload = getattr(torch.ops.faceedit, self.name).default
        self.fake = fake
        self._body, self._composed = body, composed
        self._recorded = self._recorded_body()
        _operators.append(self)
        # PyTorch's function knows how to spread a list of tensors out.
        has_parts = _below_autograd is not None and _after_autograd is not None
        self._own_autograd = has_parts and "Tensor[]" not in schema
        self._backward: Callable[..., Any] | None = None
        self._setup_context: Callable[..., Any] | None = None
        if self._own_autograd:
            self._library.impl(self.name, self._autograd_kernel(), "Autograd", with_keyset=True)

    def __call__(self, *arguments: Any) -> Any:
        """Run the op: through PyTorch's dispatcher where anything but autograd watches, else without that detour."""
        taken = way(arguments)
        if taken == "plain":
            return self._body(*arguments)
        if taken == "composed":
            return self._composed(*arguments)
        return self._recorded(*arguments) if taken == "recorded" else self.overload(*arguments)

    def register_autograd(
        self, backward: Callable[..., Any], *, setup_context: Callable[..., Any] | None = None
    ) -> None:
        """Give the op a gradient: `backward(ctx, *grads)` returns one for each argument, None where there is none.

        ctx is that of torch.autograd.Function; `setup_context(ctx, inputs, output)` fills it. needs_input_grad may have
        one more entry than the op has arguments. Like the op, it runs without autocast: with `create_graph=True` it is
        made of PyTorch's operators.
        """

        def in_own_dtypes(ctx: Any, *grads: Any) -> Any:
            for grad in grads:
                if isinstance(grad, Tensor):
                    if torch.is_autocast_enabled(grad.device.type):
                        with without_autocast(grad):
                            return backward(ctx, *grads)
                    break
            return backward(ctx, *grads)

        self._backward, self._setup_context = in_own_dtypes, setup_context
        if not self._own_autograd:
            torch.library.register_autograd(
                f"faceedit::{self.name}", in_own_dtypes, setup_context=setup_context, lib=self._library
            )

    def register_vmap(self, rule: Callable[..., Any]) -> Callable[..., Any]:
        """Register the rule of torch.vmap, `rule(info, in_dims, *arguments) -> (output, out_dims)`; a decorator."""
        torch.library.register_vmap(f"faceedit::{self.name}", rule, lib=self._library)
        return rule

    def _gradients(self, ctx: Any, grads: tuple[Any, ...]) -> tuple[Any, ...]:
        if self._backward is None:
            raise RuntimeError(f"faceedit::{self.name} has no gradient; detach its inputs")
        return tuple(self._backward(ctx, *grads))

    def _function(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        function: Any = type(f"{self.name}_function", (torch.autograd.Function,), methods)
        return function.apply

    def _recorded_body(self) -> Callable[..., Any]:
        """Return the body, remembered for its gradient."""

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = self._body(*arguments)
            if self._setup_context is not None:
                self._setup_context(ctx, arguments, output)
            return output

        return self._function(forward, lambda ctx, *grads: self._gradients(ctx, grads))

    def _autograd_kernel(self) -> Callable[..., Any]:
        """Return what runs for tensors that autograd may be watching: the op, remembered where a gradient is wanted."""
        redispatch, below, after = self.overload.redispatch, _below_autograd, _after_autograd

        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keys = arguments
            with below():
                output = redispatch(keys & after, *inputs)
            if self._setup_context is not None:
                self._setup_context(ctx, inputs, output)
            return output

        def backward(ctx: Any, *grads: Any) -> Any:
            if torch.is_grad_enabled():  # create_graph=True: the gradient is itself differentiated
                found = self._gradients(ctx, grads)
            else:
                with below():  # nothing below asks for a gradient
                    found = self._gradients(ctx, grads)
            return *found, None

        apply = self._function(forward, backward)

        def kernel(keys: Any, *arguments: Any) -> Any:
            if has_tangent(arguments):
                raise NotImplementedError(
                    f"torch.ops.faceedit.{self.name} has no forward-mode derivative; call faceedit.kernels' function"
                )
            if torch.is_grad_enabled():
                for argument in arguments:
                    if isinstance(argument, Tensor) and argument.requires_grad:
                        return apply(*arguments, keys)
            with below():
                return redispatch(keys & after, *arguments)

        return kernel


def _filled(body: Callable[..., Any]) -> Callable[..., Any]:
    """Return a body for PyTorch, whose schemas know no absent results: empty tensors of the first argument's kind.

    Our own gradients call `body`, which need not make tensors that nobody reads.
    """

    def filled(*arguments: Any) -> Any:
        found = body(*arguments)
        if type(found) is not tuple or all(result is not None for result in found):
            return found
        return tuple(arguments[0].new_empty(0) if result is None else result for result in found)

    return filled


def define_op(schema: str, implementations: Dispatcher, fake: Callable[..., Any]) -> Operator:
    """Register `faceedit::<name>` with PyTorch.

    Args: schema as `name(Tensor x, float slope) -> Tensor`, without defaults. implementations takes the schema's
          arguments by position, but for a last `str backend`: a backward op is told there which backend its forward
          pass ran under, since it may run on another thread. They may return None in place of an empty tensor, as
          gradients that are not wanted are. fake returns empty tensors of the right shapes, dtypes and strides.
    """

    def told_body(*arguments: Any) -> Any:
        return implementations(*arguments[:-1], asked=arguments[-1])

    def composed(*arguments: Any) -> Any:
        return implementations(*arguments, asked="eager")

    return Operator(schema, told_body if "str backend)" in schema else implementations, fake, composed)


def define_in_place_op(schema: str, implementations: Dispatcher, mutates: Iterable[str]) -> Any:
    """Register an op that writes to the arguments named in `mutates` and returns nothing; return it.

    As PyTorch's own kind of op: it counts the writes.
    """
    name, _, rest = schema.partition("(")
    op = torch.library.custom_op(f"faceedit::{name}", implementations, mutates_args=mutates, schema=f"({rest}")
    op.register_fake(lambda *arguments: None)
    return op


def register_onnx_decomposition(op: Operator, reference: Callable[..., Any]) -> None:
    """Let torch.onnx.export write `op` as the standard operators of its eager reference.

    Compiled graphs and exported programs keep the op. A PyTorch that has moved the table still exports what
    `decomposition_table` lowers.
    """
    _decompositions[op.overload] = reference
    register = getattr(getattr(torch, "_decomp", None), "register_decomposition", None)
    if register is not None:
        register([op.overload])(reference)
        # Where sizes are symbols, PyTorch asks that table for shapes and strides before it asks the op's fake
        # implementation, and the reference's strides are not the kernels'. It asks this one first.
        register([op.overload], type="meta")(op.fake)


def decomposition_table() -> dict[Any, Callable[..., Any]]:
    """Return what `ExportedProgram.run_decompositions` needs to write every op here as standard operators."""
    return {**torch.export.default_decompositions(), **_decompositions}


def mapped_first(tensor: Tensor | None, dim: int | None, size: int) -> Tensor | None:
    """Return a vmapped operand with the mapped axis in front, repeated `size` times where it is not mapped."""
    if tensor is None:
        return None
    return tensor.unsqueeze(0).expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


def mapped_slices(op: Callable[..., Any], info: Any, in_dims: tuple[Any, ...], arguments: tuple[Any, ...]) -> Any:
    """Run `op` once a slice of the mapped axis and stack: the vmap rule of last resort, any op, any operand.

    Returns: (output or outputs, out_dims) as register_vmap wants them.
    """
    size = info.batch_size

    def slice_of(value: Any, dim: Any, index: int) -> Any:
        if isinstance(value, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [slice_of(v, d, index) for v, d in zip(value, dim, strict=True)]
        return value.select(dim, index) if isinstance(value, Tensor) and dim is not None else value

    rows = [op(*(slice_of(value, dim, i) for value, dim in zip(arguments, in_dims, strict=True))) for i in range(size)]
    if isinstance(rows[0], Tensor):
        return torch.stack(rows), 0
    return tuple(torch.stack(column) for column in zip(*rows, strict=True)), tuple(0 for _ in rows[0])
