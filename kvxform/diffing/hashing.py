"""Hashes of what an operation is made from and what it is used for, within its layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from kvxform.diffing.outline_nodes import Operand, OutlineNode, group_by_layer, list_users

_COMMUTATIVE = frozenset({"aten.add.Tensor", "aten.mul.Tensor"})
_SIZE = 12  # bytes of a digest
Label = Callable[[OutlineNode, int], Hashable]
Namer = Callable[[Hashable], Hashable]


def digest(value: Any) -> str:
    """Return a short hash of plain data; equal on every machine."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_SIZE).hexdigest()


class Numbering:
    """Gives equal values the same number, new ones the next: a hash that never collides."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def __call__(self, value: Hashable) -> int:
        """Return the number of `value`."""
        return self._numbers.setdefault(value, len(self._numbers))


def is_commutative(node: OutlineNode) -> bool:
    """Return whether the order of the operands does not matter."""
    return node.op in _COMMUTATIVE and not node.attributes and len(node.inputs) == 2


def hashes_from_inputs(
    nodes: Sequence[OutlineNode], label: Label, name: Namer, *, typed: bool = False
) -> dict[int, Hashable]:
    """Return for each key a hash of the operation and all it is made from within `nodes`.

    Args:
        nodes: One layer, operands first.
        label: What stands for an operand that is not in `nodes`, given its reader and its key.
        name: Makes a hash of a value.
        typed: Whether types count.
    """
    found: dict[int, Hashable] = {}
    for node in nodes:

        def operand(item: Operand, node: OutlineNode = node) -> Hashable:
            kind, value = item
            if kind == "list":
                return tuple(map(operand, value))
            if kind == "node":
                return found[value] if value in found else label(node, value)
            return kind, value if typed or kind == "port" else ""

        inputs = [operand(item) for item in node.inputs]
        if is_commutative(node):
            inputs.sort(key=repr)
        found[node.key] = name((*_local(node), node.type if typed else "", tuple(inputs)))
    return found


def hashes_from_users(
    nodes: Sequence[OutlineNode], users: Sequence[Sequence[tuple[int, int]]], name: Namer
) -> dict[int, Hashable]:
    """Return for each key a hash of the operation and of all that it goes into within `nodes`.

    Args:
        nodes: One layer, operands first.
        users: Who reads each node of the whole graph, and where; see `list_users`.
        name: Makes a hash of a value.
    """
    by_key = {node.key: node for node in nodes}
    found: dict[int, Hashable] = {}
    for node in reversed(nodes):
        uses: list[Hashable] = []
        for reader, position in users[node.key]:
            if reader in found:
                place = 0 if is_commutative(by_key[reader]) else position
                uses.append((place, found[reader]))
            else:
                uses.append("elsewhere")
        found[node.key] = name((*_local(node), tuple(sorted(uses, key=repr))))
    return found


def _local(node: OutlineNode) -> tuple[Hashable, ...]:
    return node.op, node.attributes, node.roles


def layer_hashes(nodes: Sequence[OutlineNode], layers: Sequence[int]) -> dict[int | None, str]:
    """Return a hash of the operations of each layer, and as None of those outside of layers.

    Args:
        nodes: The whole graph, operands first.
        layers: All layers.
    """
    groups = group_by_layer(nodes, layers)
    place = {layer: number for number, layer in enumerate(layers)}
    rank = _export_ranks(nodes)

    def label(reader: OutlineNode, key: int) -> Hashable:
        source = nodes[key]
        if source.layer is None or reader.layer is None:
            where: Any = "outside" if source.layer is None else place[source.layer] - len(layers)
        else:
            where = place[source.layer] - place[reader.layer]
        return where, rank[key], source.type

    found: dict[int | None, str] = {}
    for layer, group in groups.items():
        hashes = hashes_from_inputs(group, label, digest, typed=True)
        found[layer] = digest(sorted(map(str, hashes.values())))
    return found


def _export_ranks(nodes: Sequence[OutlineNode]) -> dict[int, int]:
    """Number what is read outside of its layer, in the order of the graph."""
    count: dict[int | None, int] = {}
    ranks = {}
    for node, users in zip(nodes, list_users(nodes), strict=True):
        if any(nodes[reader].layer != node.layer for reader, _ in users):
            ranks[node.key] = count.get(node.layer, 0)
            count[node.layer] = ranks[node.key] + 1
    return ranks
