"""The outline of a Program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from kvxform.diffing.fields import cache_ports, plan_fields, site_fields, whole_fields
from kvxform.diffing.layering import assign_layers
from kvxform.diffing.metrics import measure
from kvxform.diffing.outline import Outline
from kvxform.diffing.outline_nodes import (
    ATTENTION,
    OUTPUT,
    Operand,
    OutlineNode,
    OutlinePort,
    in_order,
)
from kvxform.ir.program import Program
from kvxform.ir.targets import target_name
from kvxform.ir.text import format_value
from kvxform.ir.types import SymType, TensorType, ValueType

_LAYERED = (*ATTENTION, "kvx.cache_append")
_HOLE = "_"  # where an operand stands in a list
_NO_DEFAULT = object()


def outline_program(program: Program) -> Outline:
    """Return the outline of a program; values of weights are not read."""
    # Weights that stay in a file are read when they are looked up, but not in a copy.
    program = dataclasses.replace(program, weights=dict(program.weights))
    graph = _GraphReader(program)
    nodes = in_order(_in_layers(graph.nodes, program))
    ports = (*graph.ports, OutlinePort("output", "logits", nodes[-1].type))
    plan = program.plan
    return Outline(
        kind="program",
        model=program.info.name,
        nodes=nodes,
        ports=(*ports, *(cache_ports(plan) if plan else ())),
        sites=tuple(site_fields(site, program.weights) for site in program.sites),
        plan=tuple(plan_fields(site, program.weights) for site in plan.sites) if plan else (),
        whole=whole_fields(program),
        metrics=measure(nodes, program.weights, plan),
        passes=program.passes,
    )


def _in_layers(nodes: list[OutlineNode], program: Program) -> list[OutlineNode]:
    """Return nodes with their layers; attributes that name a layer only where it is another one."""
    attention = [node.key for node in nodes if node.op in ATTENTION]
    named = [site.layer for site in program.sites]
    if len(named) != len(attention):  # a graph that no verifier has passed
        named = [int(dict(nodes[key].attributes)["layer"]) for key in attention]
    if sorted(set(named)) != named:
        named = list(range(len(attention)))
    layers = assign_layers(nodes, attention, named)
    return [
        dataclasses.replace(node, layer=layer, attributes=tuple(_relative(node, layer)))
        for node, layer in zip(nodes, layers, strict=True)
    ]


def _relative(node: OutlineNode, layer: int | None) -> Iterator[tuple[str, str]]:
    for name, text in node.attributes:
        if name != "layer" or node.op not in _LAYERED:
            yield name, text
        elif text != str(layer):
            yield name, f"{int(text) - (layer or 0):+d}"


class _GraphReader:
    """Reads the operations of a graph; they have no layers yet."""

    def __init__(self, program: Program) -> None:
        self.ports: list[OutlinePort] = []
        self.nodes: list[OutlineNode] = []
        self.operands: dict[fx.Node, Operand] = {}
        self.sizes: dict[fx.Node, str] = {}
        for node in program.graph.nodes:
            self._read(node, program)

    def _read(self, node: fx.Node, program: Program) -> None:
        kind = node.meta.get("type")
        if node.op == "placeholder":
            self.operands[node] = ("port", len(self.ports))
            self.ports.append(OutlinePort("input", str(node.target), str(kind or "")))
        elif node.op == "get_attr":
            weight = program.weights[str(node.target)]
            type_ = TensorType(weight.dtype, tuple(weight.shape))
            self.operands[node] = ("weight", str(type_))
        elif isinstance(kind, SymType):
            self.sizes[node] = _size(node, kind)
        else:
            self.operands[node] = ("node", len(self.nodes))
            self.nodes.append(self._outline(node, kind))

    def _outline(self, node: fx.Node, kind: ValueType | None) -> OutlineNode:
        inputs, attributes, roles = [], [], []
        arguments = list(_arguments(node))
        for name, value, default in arguments:
            found = self._operand(value)
            if found is not None:
                inputs.append(found)
                roles.append(name)
            if self._is_attribute(value) and value != default:
                attributes.append((name, self._text(value)))
        if node.op == OUTPUT and isinstance(node.args[0], fx.Node):
            kind = node.args[0].meta.get("type")
        return OutlineNode(
            key=len(self.nodes),
            op=OUTPUT if node.op == OUTPUT else target_name(node.target) or str(node.target),
            module=node.meta.get("module") or "",
            origin=node.meta.get("origin") or "",
            via=tuple(node.meta.get("via") or ()),
            type=str(kind or ""),
            inputs=tuple(inputs),
            attributes=tuple(sorted(attributes)),
            roles=tuple(roles),
            weights=tuple(_weight_names([value for _, value, _ in arguments])),
        )

    def _operand(self, value: Any) -> Operand | None:
        if isinstance(value, fx.Node):
            return self.operands.get(value)
        if isinstance(value, list | tuple):
            found = [item for item in map(self._operand, value) if item is not None]
            return ("list", tuple(found)) if found else None
        return None

    def _is_attribute(self, value: Any) -> bool:
        """Return whether there is anything in a value besides operands."""
        if isinstance(value, list | tuple):
            return not value or any(map(self._is_attribute, value))
        if isinstance(value, fx.Node):
            return value in self.sizes
        return not isinstance(value, torch.device)

    def _text(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return self.sizes.get(value, _HOLE)
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._text, value))}]"
        return format_value(value, {})


def _weight_names(values: list[Any]) -> list[str]:
    """Return the names of the weights among arguments, as often as they are there."""
    names: list[str] = []

    def visit(operand: fx.Node) -> None:
        if operand.op == "get_attr":
            names.append(str(operand.target))

    fx.node.map_arg(values, visit)
    return names


def _arguments(node: fx.Node) -> Iterator[tuple[str, Any, Any]]:
    """Yield name, value and default of every argument in the order of the schema."""
    if not isinstance(node.target, OpOverload):
        for place, value in enumerate(node.args):
            yield str(place), value, _NO_DEFAULT
        return
    for place, (name, default) in enumerate(_schema(node.target)):
        if place < len(node.args):
            yield name, node.args[place], default
        elif name in node.kwargs:
            yield name, node.kwargs[name], default


@functools.cache
def _schema(op: OpOverload) -> tuple[tuple[str, Any], ...]:
    """Return name and default of every argument."""

    def default(argument: torch.Argument) -> Any:
        if argument.has_default_value():
            return argument.default_value
        # an operand that may be left out: None says that it is
        return None if isinstance(argument.type, torch.OptionalType) else _NO_DEFAULT

    return tuple((argument.name, default(argument)) for argument in op._schema.arguments)


def _size(node: fx.Node, kind: SymType) -> str:
    """Return the text of a size; one that is taken from a shape is read there."""
    if node.target is torch.ops.aten.sym_size.int:
        source, dim = node.args
        assert isinstance(source, fx.Node)
        assert isinstance(dim, int)
        shape = source.meta.get("type")
        if isinstance(shape, TensorType):
            return str(shape.shape[dim])
    return kind.expression
