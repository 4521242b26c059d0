"""Hashes of what an operation is made from and what it is used for, within its layer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from typing import Any

from kvxform.diffing.outline_nodes import OutlineNode, group_by_layer, list_users

_COMMUTATIVE = frozenset({"aten.add.Tensor", "aten.mul.Tensor"})
_SIZE = 12  # bytes of a hash
Label = Callable[[OutlineNode, int], Any]


def digest(value: Any) -> str:
    """Return a short hash of plain data; equal on every machine."""
    text = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=_SIZE).hexdigest()


def is_commutative(node: OutlineNode) -> bool:
    """Return whether the order of the operands does not matter."""
    return node.op in _COMMUTATIVE and not node.attributes and len(node.inputs) == 2


def hashes_from_inputs(
    nodes: Sequence[OutlineNode], label: Label, *, typed: bool = False
) -> dict[int, str]:
    """Return for each key a hash of the operation and all it is made from within `nodes`.

    Args:
        nodes: One layer, operands first.
        label: Plain data for an operand that is not in `nodes`, given its reader and its key.
        typed: Whether types count.
    """
    found: dict[int, str] = {}
    for node in nodes:

        def operand(item: tuple[str, Any], node: OutlineNode = node) -> Any:
            kind, value = item
            if kind == "list":
                return [operand(inner) for inner in value]
            if kind == "node":
                return found[value] if value in found else label(node, value)
            return [kind, value if typed or kind == "port" else ""]

        inputs = [operand(item) for item in node.inputs]
        if is_commutative(node):
            inputs.sort(key=json.dumps)
        found[node.key] = digest([_local(node), node.type if typed else "", inputs])
    return found


def hashes_from_users(
    nodes: Sequence[OutlineNode], users: Sequence[Sequence[tuple[int, int]]]
) -> dict[int, str]:
    """Return for each key a hash of the operation and of all that it goes into within `nodes`.

    Args:
        nodes: One layer, operands first.
        users: Who reads each node of the whole graph, and where; see `list_users`.
    """
    by_key = {node.key: node for node in nodes}
    found: dict[int, str] = {}
    for node in reversed(nodes):
        uses = []
        for reader, position in users[node.key]:
            if reader not in found:
                uses.append("outside")
                continue
            place = "" if is_commutative(by_key[reader]) else position
            uses.append(f"{place}:{found[reader]}")
        found[node.key] = digest([_local(node), sorted(uses)])
    return found


def _local(node: OutlineNode) -> list[Any]:
    return [node.op, node.attributes, node.roles]


def layer_hashes(nodes: Sequence[OutlineNode], layers: Sequence[int]) -> dict[int | None, str]:
    """Return a hash of the operations of each layer, and as None of those outside of layers.

    Args:
        nodes: The whole graph, operands first.
        layers: All layers.
    """
    groups = group_by_layer(nodes, layers)
    place = {layer: number for number, layer in enumerate(layers)}
    rank = _export_ranks(nodes)

    def label(reader: OutlineNode, key: int) -> list[Any]:
        source = nodes[key]
        if source.layer is None or reader.layer is None:
            where: Any = "outside" if source.layer is None else place[source.layer] - len(layers)
        else:
            where = place[source.layer] - place[reader.layer]
        return [where, rank[key], source.type]

    found = {}
    for layer, group in groups.items():
        hashes = hashes_from_inputs(group, label, typed=True)
        found[layer] = digest(sorted(hashes.values()))
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
