# SPDX-License-Identifier: Apache-2.0
"""Export an op and compare: torch.export keeps it, decomposition removes it, ONNX Runtime agrees."""

import io
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support.compare import assert_close
from torch import Tensor

from faceedit import kernels


def check_export(
    function: Callable[..., Any], op: Any, inputs: Sequence[Tensor], larger: Sequence[Tensor], *, per_sample: set[int]
) -> None:
    """Trace `function` over `inputs` with a dynamic batch, and run the result on `larger`, whose batch is another.

    Args: op, the torch.ops.faceedit.<name>.default that must be in the exported graph. per_sample: the positions of the
          inputs whose axis 0 is the batch. function returns one tensor or several.
    """

    class Layer(torch.nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            return function(*tensors)

    batch = torch.export.Dim("n", min=1, max=64)
    shapes = (tuple({0: batch} if i in per_sample else None for i in range(len(inputs))),)
    program = torch.export.export(Layer(), tuple(inputs), dynamic_shapes=shapes)
    assert any(node.target is op for node in program.graph.nodes), f"{op} is not in the exported graph"
    check_onnx(program, function, (inputs, larger))


def check_onnx(
    program: torch.export.ExportedProgram, function: Callable[..., Any], samples: Sequence[Sequence[Tensor]]
) -> None:
    """Lower an exported program to standard ONNX operators and compare both with `function` on each sample."""
    onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    lowered = program.run_decompositions(kernels.decomposition_table())
    assert all("faceedit" not in str(node.target) for node in lowered.graph.nodes)
    saved = io.BytesIO()
    torch.onnx.export(lowered, dynamo=True, opset_version=18, verbose=False).save(saved)
    model = onnx.load_from_string(saved.getvalue())
    assert {node.domain for node in model.graph.node} <= {""}, "only standard ONNX operators"
    session = onnxruntime.InferenceSession(saved.getvalue(), providers=["CPUExecutionProvider"])
    for tensors in samples:
        feed = {i.name: t.numpy() for i, t in zip(session.get_inputs(), tensors, strict=True)}
        expected = function(*tensors)
        expected = [expected] if isinstance(expected, Tensor) else list(expected)
        for index, (actual, wanted) in enumerate(zip(session.run(None, feed), expected, strict=True)):
            assert_close(f"ONNX output {index}", torch.from_numpy(actual), wanted, relative_l2=1e-5)
            assert_close(f"lowered output {index}", _nth(lowered.module()(*tensors), index), wanted, relative_l2=1e-5)


def _nth(outputs: Any, index: int) -> Tensor:
    return outputs if isinstance(outputs, Tensor) else outputs[index]
