"""Complex numbers as pairs, against torch."""

from __future__ import annotations

import onnx_ir as ir
import torch
from onnx_tools import make_emission, make_model, run_model
from torch import fx

from kvxform.codegen.onnx import capability
from kvxform.codegen.onnx.builder import onnx_dtype
from kvxform.codegen.onnx.emission import find_emitter, is_complex
from kvxform.codegen.onnx.export import emit_call
from kvxform.codegen.onnx.fallback import Fallback
from kvxform.ir.types import TensorType

aten = torch.ops.aten


def traced(function, *args):
    """Return the graph of a function with the types of a run, and its result."""
    module = fx.symbolic_trace(function)

    class Typer(fx.Interpreter):
        def run_node(self, n):
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                n.meta["type"] = TensorType(result.dtype, tuple(result.shape))
            return result

    return module.graph, Typer(module).run(*args)


def run_onnx(graph, *args):
    """Emit every call of a graph, and run it."""
    assert capability.EMITTER_MODULES, "they fill the tables"
    e, values, inputs = make_emission(), {}, []
    for node in graph.nodes:
        if node.op == "placeholder":
            type_ = node.meta["type"]
            value = ir.Value(
                name=node.name,
                type=ir.TensorType(onnx_dtype(type_.dtype)),
                shape=ir.Shape(list(type_.shape)),
            )
            values[node] = value
            inputs.append(value)
        elif node.op == "call_function":
            values[node] = emit_call(e, node, values, Fallback(23))
        else:
            output = e.builder.op("Identity", values[node.all_input_nodes[0]])
    model = make_model(e.builder, inputs, [output])
    return run_model(model, [x.numpy() for x in args])[0]


def rotate(x, length, angle):
    """Rotate pairs by angles, as models with complex rotary embeddings do."""
    turn = aten.mul.Tensor(aten.polar.default(length, angle), 1.5)
    pairs = aten.view_as_complex.default(x)
    return aten.view_as_real.default(aten.mul.Tensor(pairs, aten.unsqueeze.default(turn, 1)))


def rotate_from_the_end(x, length, angle):
    """The same with an axis counted from the end, and a product with real numbers."""
    turn = aten.unsqueeze.default(aten.polar.default(length, angle), -2)
    pairs = aten.mul.Tensor(aten.view_as_complex.default(x), turn)
    return aten.view_as_real.default(aten.mul.Tensor(pairs, aten.unsqueeze.default(angle, 1)))


def test_rotations_are_those_of_torch():
    torch.manual_seed(0)
    args = torch.randn(2, 5, 3, 2), torch.rand(2, 3), torch.randn(2, 3) * 4
    for function in (rotate, rotate_from_the_end):
        graph, expected = traced(function, *args)
        assert any(is_complex(node) for node in graph.nodes)
        found = run_onnx(graph, *args)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_what_has_no_rule_for_pairs_has_no_emitter():
    """Emitters of real numbers would take a pair for two of them."""

    def invert(x):
        return aten.view_as_real.default(aten.reciprocal.default(aten.view_as_complex.default(x)))

    graph, _ = traced(invert, torch.randn(3, 2))
    calls = [node for node in graph.nodes if node.op == "call_function"]
    assert [find_emitter(node) is None for node in calls] == [False, True, False]
