"""Outlines of ONNX graphs: operands by role, constants as text, defaults left out."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from kvxform.diffing.onnx_nodes import RESULT, outline_nodes
from kvxform.diffing.outline_nodes import OUTPUT, OutlineNode
from kvxform.diffing.outline_onnx import onnx_side

FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL


def outline(nodes: list[Any], output: str = "y", **constants: Any) -> tuple[OutlineNode, ...]:
    return outline_nodes(ir.from_proto(make(nodes, output, **constants)).graph)


def make(nodes: list[Any], output: str = "y", **constants: Any) -> Any:
    graph = helper.make_graph(
        nodes,
        "g",
        [
            helper.make_tensor_value_info("x", FLOAT, ["n", 12]),
            helper.make_tensor_value_info("is_on", BOOL, []),
        ],
        [helper.make_tensor_value_info(output, FLOAT, None)],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])


def test_small_constants_are_text_by_the_name_of_their_argument():
    node, last = outline(
        [helper.make_node("Slice", ["x", "a", "b"], ["y"])],
        a=np.array([0, 1]),
        b=np.array([3, 4]),
    )
    assert (node.op, node.roles, node.inputs) == ("onnx.Slice", ("data",), (("port", 0),))
    assert node.attributes == (("ends", "i64 [3, 4]"), ("starts", "i64 [0, 1]"))
    assert (last.op, last.inputs) == (OUTPUT, (("node", 0),))


def test_large_constants_are_weights_and_names_do_not_count():
    for name in ("w", "other"):
        (node, _) = outline([helper.make_node("Mul", ["x", name], ["y"])], **{name: np.ones(12)})
        assert node.inputs == (("port", 0), ("weight", "f64[12]"))
        assert (node.roles, node.weights) == (("A", "B"), (name,))


def test_any_number_of_arguments_is_a_list_in_which_constants_keep_their_place():
    def concat(*names: str) -> OutlineNode:
        nodes = [helper.make_node("Concat", list(names), ["y"], axis=1)]
        return outline(nodes, a=np.ones((1, 2)), b=np.zeros((1, 2)))[0]

    first, second = concat("a", "x", "b"), concat("x", "a", "b")
    assert first.inputs == second.inputs == (("list", (("port", 0),)),)
    assert first.roles == ("inputs",)
    assert first.attributes == (("axis", "1"), ("inputs", "[f64 [[1, 1]], _, f64 [[0, 0]]]"))
    assert second.attributes[1] == ("inputs", "[_, f64 [[1, 1]], f64 [[0, 0]]]")
    assert concat("x", "x").attributes == (("axis", "1"),)


def test_default_values_are_left_out_in_memory_and_from_a_file():
    def attributes(**given: Any) -> tuple[tuple[str, str], ...]:
        return outline([helper.make_node("LeakyRelu", ["x"], ["y"], **given)])[0].attributes

    assert attributes() == attributes(alpha=0.01) == ()
    assert attributes(alpha=0.5) == (("alpha", "0.5"),)
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT))
    node = ir.node("LeakyRelu", [value], {"alpha": 0.01}, name="live")
    graph = ir.Graph([value], list(node.outputs), nodes=[node], opset_imports={"": 23})
    assert outline_nodes(graph)[0].attributes == ()


def test_arguments_that_are_left_out_leave_no_trace():
    node, _ = outline([helper.make_node("Clip", ["x", "", "high"], ["y"])], high=np.float32(2))
    assert (node.roles, node.attributes) == (("input",), (("max", "f32 2"),))


def test_each_of_several_results_is_an_operation():
    def split(first: str, second: str) -> tuple[OutlineNode, ...]:
        nodes = [
            helper.make_node("Split", ["x"], ["l", "r"], axis=1, num_outputs=2),
            helper.make_node("Sub", [first, second], ["y"]),
        ]
        return outline(nodes)

    nodes = split("l", "r")
    assert [node.op for node in nodes] == ["onnx.Split", RESULT, RESULT, "onnx.Sub", OUTPUT]
    assert [node.attributes for node in nodes[1:3]] == [(("index", "0"),), (("index", "1"),)]
    assert nodes[3].inputs == (("node", 1), ("node", 2))
    assert split("r", "l")[3].inputs == (("node", 2), ("node", 1))


def test_constant_nodes_are_constants():
    tensor = numpy_helper.from_array(np.ones(12, np.float32))
    small, large = (
        outline([helper.make_node("Constant", [], ["c"], **value), mul])[0]
        for value, mul in (
            ({"value_float": 2.0}, helper.make_node("Mul", ["x", "c"], ["y"])),
            ({"value": tensor}, helper.make_node("Mul", ["x", "c"], ["y"])),
        )
    )
    assert small.attributes == (("B", "f32 2"),)
    assert large.inputs[1] == ("weight", "f32[12]")


def test_graphs_inside_of_nodes_are_compared_without_names():
    def branch(name: str, op: str) -> Any:
        value = helper.make_tensor_value_info(name, FLOAT, None)
        return helper.make_graph([helper.make_node(op, ["x"], [name])], "b", [], [value])

    def choose(name: str, op: str) -> OutlineNode:
        branches = {"then_branch": branch(name, op), "else_branch": branch("e", "Neg")}
        return outline([helper.make_node("If", ["is_on"], ["y"], **branches)])[0]

    assert choose("a", "Abs") == choose("b", "Abs")
    assert choose("a", "Abs") != choose("a", "Exp")
    assert dict(choose("a", "Abs").attributes)["then_branch"] == "{onnx.Abs(outer); return %0}"


def test_operations_of_other_domains_have_numbered_arguments():
    node, _ = outline([helper.make_node("Mine", ["x"], ["y"], domain="acme", size=3)])
    assert (node.op, node.roles, node.attributes) == (
        "onnx.acme.Mine",
        ("input0",),
        (("size", "3"),),
    )


def test_layers_of_a_graph_without_provenance_follow_the_data():
    """Two residual layers, each with a softmax in the place of its attention."""
    nodes, stream = [helper.make_node("Exp", ["x"], ["e"])], "e"
    for layer in range(2):
        nodes += [
            helper.make_node("Relu", [stream], [f"n{layer}"]),
            helper.make_node("Softmax", [f"n{layer}"], [f"s{layer}"]),
            helper.make_node("Add", [stream, f"s{layer}"], [f"r{layer}"]),
        ]
        stream = f"r{layer}"
    nodes.append(helper.make_node("Tanh", [stream], ["y"]))
    side = onnx_side(ir.from_proto(make(nodes)), "toy")
    assert [(n.op, n.layer) for n in side.outline.nodes] == [
        ("onnx.Exp", None),
        ("onnx.Relu", 0),
        ("onnx.Softmax", 0),
        ("onnx.Add", 0),
        ("onnx.Relu", 1),
        ("onnx.Softmax", 1),
        ("onnx.Add", 1),
        ("onnx.Tanh", None),
        (OUTPUT, None),
    ]
