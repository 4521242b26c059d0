"""Operations of an ONNX graph as plain data, with the provenance that the exporter left on them.

Small constants are attributes, by the name of the argument; all other initialisers are weights. A
result that is one of several is an operation of its own, as `py.getitem` is in a program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from kvxform.codegen.onnx.node_map import calls_of, operation_of
from kvxform.codegen.onnx.provenance import LAYER, MODULE, ORIGIN, VIA
from kvxform.diffing.outline_nodes import OUTPUT, Operand, OutlineNode

LARGEST_ATTRIBUTE = 8  # numbers of a constant that is compared as text
RESULT = "onnx.result"
_SHORT = {
    "FLOAT": "f32",
    "FLOAT16": "f16",
    "DOUBLE": "f64",
    "BFLOAT16": "bf16",
    "BOOL": "b8",
    "INT8": "i8",
    "INT16": "i16",
    "INT32": "i32",
    "INT64": "i64",
    "UINT8": "u8",
}


@dataclasses.dataclass(frozen=True)
class _Arguments:
    """What a node is called with, split into operands and text."""

    inputs: tuple[Operand, ...]
    roles: tuple[str, ...]
    attributes: tuple[tuple[str, str], ...]
    weights: tuple[str, ...]


def outline_nodes(graph: ir.Graph, weights: Collection[str] = ()) -> tuple[OutlineNode, ...]:
    """Return the operations of a graph, operands first, and its output as the last one.

    Args:
        graph: The graph.
        weights: Names of initialisers that are weights, however small.
    """
    return _Reader(graph, weights).read()


def type_text(value: ir.Value | ir.TensorProtocol) -> str:
    """Return dtype and shape as text, `f32[batch_size, 4]`; a shape that is not known is left out.

    Symbols stay as the file has them.
    """
    if value.dtype is None:
        return ""
    name = _SHORT.get(value.dtype.name, value.dtype.name.lower())
    if value.shape is None:
        return name
    sizes = (str(getattr(size, "value", size)) for size in value.shape)
    return f"{name}[{', '.join(sizes)}]"


class _Reader:
    """Reads one graph."""

    def __init__(self, graph: ir.Graph, weights: Collection[str]) -> None:
        self.graph, self.weights = graph, weights
        self.opsets = dict(graph.opset_imports)
        self.ports = {value: index for index, value in enumerate(graph.inputs)}
        self.constants = constants_of(graph)
        self.keys: dict[ir.Value, int] = {}
        self.nodes: list[OutlineNode] = []

    def read(self) -> tuple[OutlineNode, ...]:
        for node in self.graph:
            if node.op_type != "Constant":
                self._enter(node)
        named = [(str(index), value) for index, value in enumerate(self.graph.outputs)]
        found = _Arguments(*self._operands(named))
        last = OutlineNode(
            len(self.nodes),
            OUTPUT,
            inputs=found.inputs,
            attributes=found.attributes,
            roles=found.roles,
            weights=found.weights,
        )
        return (*self._with_layers(), last)

    def _enter(self, node: ir.Node) -> None:
        """Add a node, and its results where there are several."""
        arguments = _Arguments(*self._operands(_named_inputs(node, self.opsets)))
        attributes = sorted((*arguments.attributes, *_attributes(node, self.opsets)))
        notes = node.metadata_props
        via = notes.get(VIA, "")
        outline = OutlineNode(
            key=len(self.nodes),
            op=_op_name(node),
            layer=int(notes[LAYER]) if notes.get(LAYER, "").isdecimal() else None,
            module=notes.get(MODULE, ""),
            origin=notes.get(ORIGIN, ""),
            via=tuple(via.split(", ")) if via else (),
            calls=tuple(dict.fromkeys(operation_of(key) for key in calls_of(node))),
            type=type_text(node.outputs[0]) if len(node.outputs) == 1 else "",
            inputs=arguments.inputs,
            attributes=tuple(attributes),
            roles=arguments.roles,
            weights=arguments.weights,
        )
        self.nodes.append(outline)
        if len(node.outputs) == 1:
            self.keys[node.outputs[0]] = outline.key
            return
        for index, value in enumerate(node.outputs):
            if value.name:
                self.keys[value] = len(self.nodes)
                self.nodes.append(
                    dataclasses.replace(
                        outline,
                        key=len(self.nodes),
                        op=RESULT,
                        type=type_text(value),
                        inputs=(("node", outline.key),),
                        attributes=(("index", str(index)),),
                        roles=("of",),
                        weights=(),
                    )
                )

    def _operands(self, named: Sequence[tuple[str, ir.Value | Sequence[ir.Value]]]) -> Any:
        """Return the fields of `_Arguments`; arguments that are left out are in none of them."""
        inputs: list[Operand] = []
        roles, attributes, weights = [], [], []
        for role, value in named:
            if isinstance(value, Sequence):
                found = [_Arguments(*self._operands([("", item)])) for item in value]
                words = [a.attributes[0][1] if a.attributes else "_" for a in found]
                inputs.append(("list", tuple(operand for a in found for operand in a.inputs)))
                attributes += [(role, f"[{', '.join(words)}]")] if set(words) - {"_"} else []
                weights += [name for a in found for name in a.weights]
            elif value in self.constants:
                tensor = self.constants[value]
                if tensor.size <= LARGEST_ATTRIBUTE and value.name not in self.weights:
                    attributes.append((role, _numbers(tensor)))
                    continue
                inputs.append(("weight", type_text(tensor)))
                weights.append(value.name or "")
            elif value in self.ports:
                inputs.append(("port", self.ports[value]))
            else:
                inputs.append(("node", self.keys[value]))
            roles.append(role)
        return tuple(inputs), tuple(roles), tuple(attributes), tuple(weights)

    def _with_layers(self) -> list[OutlineNode]:
        """Give nodes without provenance the layer of those around them."""
        readers: list[set[int | None]] = [set() for _ in self.nodes]
        layers = [node.layer for node in self.nodes]
        for node in reversed(self.nodes):
            found = readers[node.key]
            if layers[node.key] is None and not node.origin and len(found) == 1:
                layers[node.key] = next(iter(found))
            for key in node.sources:
                readers[key].add(layers[node.key])
        return [
            dataclasses.replace(node, layer=layer)
            for node, layer in zip(self.nodes, layers, strict=True)
        ]


def constants_of(graph: ir.Graph) -> dict[ir.Value, ir.TensorProtocol]:
    """Return initialisers, and results of constant nodes, by value."""
    found = {
        value: value.const_value
        for value in graph.initializers.values()
        if value.const_value is not None
    }
    for node in graph:
        if node.op_type == "Constant":
            value = node.attributes.get("value")
            tensor = value.as_tensor() if value is not None else _plain_constant(node)
            found[node.outputs[0]] = tensor
    return found


def _plain_constant(node: ir.Node) -> ir.TensorProtocol:
    """Return a constant that is written as numbers rather than as a tensor."""
    (attribute,) = node.attributes.values()
    dtype = ir.DataType.FLOAT if attribute.name.startswith("value_float") else ir.DataType.INT64
    return ir.tensor(attribute.value, dtype=dtype)


def _op_name(node: ir.Node) -> str:
    return f"onnx.{node.domain}.{node.op_type}" if node.domain else f"onnx.{node.op_type}"


def _schema(node: ir.Node, opsets: Mapping[str, int]) -> onnx.defs.OpSchema | None:
    """Return the schema of an operation, or None for one that onnx does not know."""
    version = opsets.get(node.domain)
    if version is None or not onnx.defs.has(node.op_type, node.domain):
        return None
    return onnx.defs.get_schema(node.op_type, version, node.domain)


def _named_inputs(
    node: ir.Node, opsets: Mapping[str, int]
) -> list[tuple[str, ir.Value | Sequence[ir.Value]]]:
    """Return the arguments of a node with their names; any number of the same kind is a list."""
    schema = _schema(node, opsets)
    formal = [] if schema is None else list(schema.inputs)
    is_variadic = formal and formal[-1].option == onnx.defs.OpSchema.FormalParameterOption.Variadic
    plain = len(formal) - 1 if is_variadic else len(node.inputs)
    names = [parameter.name for parameter in formal[:plain]]
    names += [f"input{index}" for index in range(len(names), plain)]
    named: list[tuple[str, ir.Value | Sequence[ir.Value]]] = [
        (name, value)
        for name, value in zip(names, node.inputs, strict=False)
        if value is not None and value.name
    ]
    if is_variadic:
        named.append((formal[-1].name, [v for v in node.inputs[plain:] if v is not None]))
    return named


def _attributes(node: ir.Node, opsets: Mapping[str, int]) -> Iterator[tuple[str, str]]:
    """Yield attributes as text, without those that have their default value."""
    schema = _schema(node, opsets)
    for name, attribute in sorted(node.attributes.items()):
        text = _attribute_text(attribute)
        known = None if schema is None else schema.attributes.get(name)
        default = None if known is None else known.default_value
        if default is not None and default.type and _default_text(default) == text:
            continue
        yield name, text


def _attribute_text(attribute: ir.Attr) -> str:
    if attribute.type == ir.AttributeType.GRAPH:
        return _graph_text(attribute.as_graph())
    if attribute.type == ir.AttributeType.TENSOR:
        return _numbers(attribute.as_tensor())
    return _plain_text(attribute.value)


def _default_text(attribute: onnx.AttributeProto) -> str:
    return _plain_text(onnx.helper.get_attribute_value(attribute))


def _plain_text(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float):
        return f"{float(np.float32(value)):.9g}"  # the file holds float32
    if isinstance(value, Sequence) and not isinstance(value, str):
        return f"[{', '.join(_plain_text(item) for item in value)}]"
    return str(value)


def _numbers(tensor: ir.TensorProtocol) -> str:
    if tensor.size > LARGEST_ATTRIBUTE:
        return f"<{type_text(tensor)}>"
    text = _plain_text(tensor.numpy().tolist())
    return f"{_SHORT.get(tensor.dtype.name, tensor.dtype.name.lower())} {text}"


def _graph_text(graph: ir.Graph) -> str:
    """Return a graph within a node as one line; names do not count."""
    names: dict[ir.Value | None, str] = {}
    for value in graph.inputs:
        names[value] = f"%{len(names)}"
    for value, tensor in constants_of(graph).items():
        names[value] = _numbers(tensor)
    lines = []
    for node in graph:
        if node.op_type == "Constant":
            continue
        inputs = ", ".join(names.get(value, "outer") for value in node.inputs)
        options = "".join(f", {key}={text}" for key, text in _attributes(node, graph.opset_imports))
        for value in node.outputs:
            names[value] = f"%{len(names)}"
        lines.append(f"{_op_name(node)}({inputs}{options})")
    outputs = ", ".join(names.get(value, "outer") for value in graph.outputs)
    return "{" + "; ".join([*lines, f"return {outputs}"]) + "}"
