"""Which ONNX nodes do the work of which node of the graph, whole: every call has at least one.

Most calls have ONNX nodes of their own, and `kvxform.node` on each of these says so. Others have
none: an Attention that appends does the work of `kvx.cache_append`, a packed product that of three
linears, and a view that changes nothing is the value that it views. Such a call is an entry
`kvxform.also` of the nodes that do its work.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import onnx_ir as ir
from torch import fx

from kvxform.codegen.onnx.provenance import NODE

ALSO = "kvxform.also"
_SEPARATOR = ", "
Owners = dict[fx.Node, tuple[ir.Node, ...]]


def note_absorbed(
    calls: Mapping[fx.Node, Mapping[str, str]],
    values: Mapping[fx.Node, Any],
    nodes: Sequence[ir.Node],
) -> None:
    """Add `ALSO` to the nodes that do the work of calls without nodes of their own.

    Args:
        calls: Metadata of every call, in the order of the graph.
        values: What each call was emitted as.
        nodes: What is left of the ONNX graph; changed in place.
    """
    found = _owners(calls, values, nodes)
    added: dict[ir.Node, list[str]] = {}
    for call, notes in calls.items():
        key = notes[NODE]
        for node in found[call]:
            if node.metadata_props.get(NODE) != key:
                added.setdefault(node, []).append(key)
    for node, keys in added.items():
        node.metadata_props[ALSO] = _SEPARATOR.join(keys)


def _owners(
    calls: Mapping[fx.Node, Mapping[str, str]],
    values: Mapping[fx.Node, Any],
    nodes: Sequence[ir.Node],
) -> Owners:
    """Return the ONNX nodes of every call."""
    own: dict[str, list[ir.Node]] = {}
    for node in nodes:
        own.setdefault(node.metadata_props.get(NODE, ""), []).append(node)
    found = {call: tuple(own.get(notes[NODE], ())) for call, notes in calls.items()}
    alive = {node for key, group in own.items() if key for node in group}
    for call in reversed(list(calls)):  # readers first
        if not found[call]:
            found[call] = _producers(values.get(call), alive) or _of_readers(call, found)
    for call in calls:  # what nothing reads in the end goes with its operands
        if not found[call]:
            found[call] = _unique(node for x in call.all_input_nodes for node in found.get(x, ()))
    return found


def _producers(emitted: Any, alive: set[ir.Node]) -> tuple[ir.Node, ...]:
    """Return the nodes that yield what a call was emitted as, as far as they belong to a call."""
    items = emitted if isinstance(emitted, tuple) else (emitted,)
    nodes = [x.producer() for x in items if isinstance(x, ir.Value)]
    return _unique(node for node in nodes if node is not None and node in alive)


def _of_readers(call: fx.Node, found: Owners) -> tuple[ir.Node, ...]:
    return _unique(node for user in call.users for node in found.get(user, ()))


def _unique(nodes: Iterable[ir.Node]) -> tuple[ir.Node, ...]:
    return tuple(dict.fromkeys(nodes))


def node_map(graph: ir.Graph) -> dict[str, tuple[str, ...]]:
    """Return the names of the ONNX nodes of every call of an exported graph, by `kvxform.node`."""
    found: dict[str, list[str]] = {}
    for node in graph:
        for key in calls_of(node):
            found.setdefault(key, []).append(node.name or "")
    return {key: tuple(names) for key, names in found.items()}


def note_calls(node: ir.Node, parts: Sequence[ir.Node]) -> None:
    """Give a node the metadata of the last of `parts`, all of whose calls it does the work of."""
    node.metadata_props.update(parts[-1].metadata_props)
    also = dict.fromkeys(key for part in parts for key in calls_of(part))
    also.pop(node.metadata_props.get(NODE, ""), None)
    if also:
        node.metadata_props[ALSO] = _SEPARATOR.join(also)


def operation_of(key: str) -> str:
    """Return the operation of a call from its `kvxform.node`: `kvx.rope` of `3/kvx.rope/1`."""
    return key.split("/")[1] if key.count("/") == 2 else key


def calls_of(node: ir.Node) -> tuple[str, ...]:
    """Return the calls that an ONNX node does the work of; none for what layers share."""
    notes = node.metadata_props
    also = notes.get(ALSO, "")
    own = [notes[NODE]] if NODE in notes else []
    return (*own, *(also.split(_SEPARATOR) if also else ()))
