"""Operations, ports and layers as plain data: what an `Outline` is made of.

Nodes are operations alone. Weights are operands, known by their place and their type. Sizes such as
`B` and `S` are no operands: they stand as text in the attributes, so that it does not matter which
tensor a size was taken from. The last node is `output`.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

# ("node", key), ("weight", type), ("port", index), or ("list", (operand, ...))
Operand = tuple[str, Any]
PortKind = Literal["input", "output", "cache"]
OUTPUT = "output"
ATTENTION = ("kvx.attention", "kvx.cached_attention")
_LINE = re.compile(r":\d+(?=\)?$)")  # of an origin: `linear (modeling_llama.py:243)`
_COUNT = re.compile(r"_\d+(?= |$)")  # of a name in an origin: `add_12`


@dataclass(frozen=True)
class OutlineNode:
    """One operation.

    Attributes:
        key: Its index in `Outline.nodes`; operands come before what reads them.
        op: Operation, for instance `aten.linear`.
        layer: Layer, or None outside of layers.
        module: Path of the source module; for people only.
        origin: What it was in the source, with source line.
        via: Passes that made or changed it, oldest first.
        calls: Of an ONNX operation, the operations of the dialect whose work it does.
        type: Type of its result as text, for instance `f32[B, S, 64]`.
        inputs: Operands in the order of the schema of the operation. Lists stay lists.
        attributes: Other arguments by name, as text, without those that have their default value. A
            list with operands in it has `_` in their places.
        roles: Names of the arguments that `inputs` are, for instance `("q", "k")`.
        weights: Names of the weights among `inputs`, in order; for people, and to find them.
    """

    key: int
    op: str
    layer: int | None = None
    module: str = ""
    origin: str = ""
    via: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    type: str = ""
    inputs: tuple[Operand, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()
    roles: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()

    @functools.cached_property
    def operands(self) -> tuple[Operand, ...]:
        """Operands with lists flattened."""
        return tuple(flat_operands(self.inputs))

    @functools.cached_property
    def sources(self) -> list[int]:
        """Keys of the operations it reads, one entry an operand."""
        return [value for kind, value in self.operands if kind == "node"]

    @property
    def provenance(self) -> tuple[str, str, tuple[str, ...]]:
        """Operation, origin without source line, and passes."""
        return self.op, bare_origin(self.origin), self.via


@dataclass(frozen=True)
class OutlinePort:
    """An input, an output or a plane of the cache.

    Attributes:
        kind: `input`, `output` or `cache`.
        name: Its name; of a plane `key.codes`.
        type: Its type as text.
        layer: Layer of a plane, else None.
    """

    kind: PortKind
    name: str
    type: str
    layer: int | None = None


@dataclass(frozen=True)
class LayerFields:
    """What is known of one layer besides its graph, flat: `codec.bits` and the like.

    Attributes:
        layer: Layer index.
        fields: Values by path, sorted; numbers of the layers it refers to are relative to it.
    """

    layer: int
    fields: tuple[tuple[str, Any], ...]


def flat_operands(inputs: tuple[Operand, ...]) -> Iterator[Operand]:
    """Yield operands, those of lists one by one."""
    for kind, value in inputs:
        if kind == "list":
            yield from flat_operands(value)
        else:
            yield kind, value


def bare_origin(origin: str) -> str:
    """Return an origin without its source line and without numbers that only tell names apart."""
    return _COUNT.sub("", _LINE.sub("", origin))


def group_by_layer(
    nodes: Sequence[OutlineNode], layers: Sequence[int] = ()
) -> dict[int | None, tuple[OutlineNode, ...]]:
    """Return the nodes of every layer, and as None those outside of layers.

    Args:
        nodes: Operations.
        layers: Layers that are there even without operations.
    """
    named = sorted({*layers, *(n.layer for n in nodes if n.layer is not None)})
    found: dict[int | None, list[OutlineNode]] = {None: [], **{layer: [] for layer in named}}
    for node in nodes:
        found[node.layer].append(node)
    return {layer: tuple(group) for layer, group in found.items()}


def list_users(nodes: Sequence[OutlineNode]) -> list[list[tuple[int, int]]]:
    """Return for every node who reads it: key of the reader, position among its operands."""
    found: list[list[tuple[int, int]]] = [[] for _ in nodes]
    for node in nodes:
        for position, (kind, value) in enumerate(node.operands):
            if kind == "node":
                found[value].append((node.key, position))
    return found


def renumber(operand: Operand, keys: Mapping[int, int]) -> Operand:
    """Return an operand with the keys of nodes replaced."""
    kind, value = operand
    if kind == "list":
        return kind, tuple(renumber(item, keys) for item in value)
    return (kind, keys[value]) if kind == "node" else operand


def in_order(nodes: Sequence[OutlineNode]) -> tuple[OutlineNode, ...]:
    """Return nodes in canonical order with new keys: operands first, then layer by layer.

    Whatever is outside of layers comes as early as it can. Within a layer the order stays.

    Args:
        nodes: Operations with keys 0, 1, ...

    Raises:
        ValueError: If operations read each other in a circle.
    """
    users = list_users(nodes)
    missing = [len(set(node.sources)) for node in nodes]
    ready = [_rank(node) for node in nodes if not missing[node.key]]
    heapq.heapify(ready)
    order: list[int] = []
    while ready:
        key = heapq.heappop(ready)[-1]
        order.append(key)
        for reader in dict.fromkeys(reader for reader, _ in users[key]):
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, _rank(nodes[reader]))
    if len(order) != len(nodes):
        raise ValueError("operations read each other in a circle")
    keys = {old: new for new, old in enumerate(order)}
    return tuple(
        dataclasses.replace(
            nodes[old],
            key=new,
            inputs=tuple(renumber(operand, keys) for operand in nodes[old].inputs),
        )
        for old, new in keys.items()
    )


def _rank(node: OutlineNode) -> tuple[bool, int, int]:
    layer = -1 if node.layer is None else node.layer
    return node.op == OUTPUT, layer, node.key
