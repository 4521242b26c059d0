"""Groups of nodes as bodies of ONNX functions; groups that are alike share one body.

Integer constants of the builder, such as axes and shapes, are part of what a group is. Any other
constant is an operand, which a body has inside if it is small and the same in all groups.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

INSIDE_BYTES = 1024  # larger constants stay initialisers of the graph
Readers = Mapping[ir.Value, Sequence[ir.Node]]


@dataclass(frozen=True, eq=False)
class Group:
    """Nodes that become one call.

    Attributes:
        scope: What their names begin with; a body has the rest.
        nodes: In order.
        inputs: Values from elsewhere in the graph, in the order in which they are first read.
        constants: Initialisers that are operands, likewise.
        outputs: What is read elsewhere.
        text: Equal for groups that differ only in names and operands.
    """

    scope: str
    nodes: tuple[ir.Node, ...]
    inputs: tuple[ir.Value, ...]
    constants: tuple[ir.Value, ...]
    outputs: tuple[ir.Value, ...]
    text: str


def find_group(
    scope: str, nodes: Sequence[ir.Node], readers: Readers, graph_outputs: Collection[ir.Value]
) -> Group:
    """Return a group of nodes.

    Args:
        scope: What their names begin with.
        nodes: Some nodes of a graph, in order.
        readers: Nodes that read each value of the graph.
        graph_outputs: Outputs of the graph.
    """
    own = set(nodes)
    names: dict[ir.Value | None, str] = {None: "-"}
    inputs: list[ir.Value] = []
    constants: list[ir.Value] = []
    lines = []
    for node in nodes:
        for value in node.inputs:
            if value is None or value in names:
                continue
            if _is_structure(value):
                names[value] = str(value.name)
            elif value.const_value is not None:
                names[value] = f"c{len(constants)}"
                constants.append(value)
            else:
                names[value] = f"i{len(inputs)}"
                inputs.append(value)
        for value in node.outputs:
            names[value] = f"v{len(names)}"
        lines.append(_text(node, names))
    made = [value for node in nodes for value in node.outputs]
    leaving = [x for x in made if x in graph_outputs or set(readers.get(x, ())) - own]
    outputs = sorted(leaving, key=lambda x: x in graph_outputs)  # what the graph goes on with first
    text = "\n".join([*lines, " ".join(names[x] for x in outputs)])
    return Group(scope, tuple(nodes), tuple(inputs), tuple(constants), tuple(outputs), text)


def shared_constants(groups: Sequence[Group]) -> frozenset[int]:
    """Return which operands of groups that are alike are one small constant in all of them."""
    columns = enumerate(zip(*(group.constants for group in groups), strict=True))
    return frozenset(i for i, values in columns if len(set(values)) == 1 and _is_small(values[0]))


def make_body(
    group: Group,
    order: Sequence[int],
    names: Mapping[ir.Value, str],
    opsets: Mapping[str, int],
) -> ir.Graph:
    """Return the body of a function.

    Args:
        group: What it does.
        order: The operands, by their places among inputs and constants; constants that are not
            among them are in the body.
        names: Names of operands and outputs; where there is none, that of the node.
        opsets: Versions of domains.
    """
    given, every = Namer(), (*group.inputs, *group.constants)
    formal = [every[i] for i in order]
    values = {x: ir.Value(name=given(names.get(x) or _plain_name(x))) for x in formal}
    parameters = list(values.values())
    final = {x: given(names.get(x) or _plain_name(x)) for x in group.outputs}
    kept = [x for x in group.constants if x not in values]
    nodes = [_constant(x, values, given) for x in (*_structure_of(group), *kept)]
    nodes += [_copy(node, group.scope, values, final, given) for node in group.nodes]
    used = {node.domain for node in nodes}
    imports = {domain: version for domain, version in opsets.items() if domain in used}
    return ir.Graph(
        parameters, [values[x] for x in group.outputs], nodes=nodes, opset_imports=imports
    )


class Namer:
    """Gives out names, each once."""

    def __init__(self) -> None:
        self._given: set[str] = set()

    def __call__(self, name: str) -> str:
        """Return `name`, or with the least number at its end that makes it new."""
        numbers = itertools.count(2)
        found = name
        while found in self._given:
            found = f"{name}_{next(numbers)}"
        self._given.add(found)
        return found


def _is_structure(value: ir.Value) -> bool:
    """Whether a constant says how nodes work: axes, shapes, bounds."""
    is_whole = value.const_value is not None and value.dtype == ir.DataType.INT64
    return is_whole and str(value.name).startswith("const/") and _is_small(value)


def _is_small(value: ir.Value) -> bool:
    return value.const_value is not None and value.const_value.nbytes <= INSIDE_BYTES


def _structure_of(group: Group) -> Iterable[ir.Value]:
    """Return the constants that are part of what a group is, each once."""
    read = (x for node in group.nodes for x in node.inputs if x is not None and _is_structure(x))
    return dict.fromkeys(read)


def _text(node: ir.Node, names: Mapping[ir.Value | None, str]) -> str:
    """Return a node as text, without its own name."""
    attributes = sorted(
        ir.serde.serialize_attribute(x).SerializeToString().hex() for x in node.attributes.values()
    )
    operands = " ".join(names[x] for x in node.inputs)
    results = " ".join(names[x] if x.name else "-" for x in node.outputs)
    return f"{results} = {node.domain}.{node.op_type} {operands} {' '.join(attributes)}"


def _copy(
    node: ir.Node,
    scope: str,
    values: dict[ir.Value, ir.Value],
    final: Mapping[ir.Value, str],
    given: Namer,
) -> ir.Node:
    """Return a node of the body, and enter its outputs; `final` has the names of some of them."""
    label = given(_numberless(str(node.name).removeprefix(f"{scope}/")))
    operands = [None if x is None else values[x] for x in node.inputs]
    for index, value in enumerate(node.outputs):
        inner = f"{label}_output_{index}" if value.name else ""
        values[value] = ir.Value(name=final.get(value, inner))
    return ir.Node(
        node.domain,
        node.op_type,
        operands,
        list(node.attributes.values()),
        outputs=[values[x] for x in node.outputs],
        name=label,
    )


def _constant(value: ir.Value, values: dict[ir.Value, ir.Value], given: Namer) -> ir.Node:
    """Return a node that yields a constant, and enter its value."""
    tensor = value.const_value
    assert tensor is not None, "an initialiser"
    label = given(_word(str(value.name)))
    values[value] = ir.Value(name=label)
    attribute = ir.AttrTensor("value", ir.tensor(tensor.numpy(), dtype=tensor.dtype))
    return ir.Node("", "Constant", [], [attribute], outputs=[values[value]], name=label)


def _numberless(name: str) -> str:
    """Return the name of a node without the number that made it new."""
    return re.sub(r"_\d+$", "", name)


def _plain_name(value: ir.Value) -> str:
    """Return the word of a value: its key if layers share it, else the role of its node."""
    name, node = str(value.name), value.producer()
    shared = re.match(r"/shared/([^/]+)/", name)
    if shared:
        return _word(shared[1])
    last = name if node is None else _numberless(str(node.name))
    return _word(last.rpartition("/")[2])


def _word(name: str) -> str:
    return re.sub(r"[\W_]+", "_", name.replace("-", "_minus_")).strip("_")
