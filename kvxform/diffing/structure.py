"""What differs between two graphs whose operations have been aligned.

Of a change and its consequences only the change is reported: an operation that reads the result of
an inserted one is not rewired, and one whose type follows from another type is not retyped.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Literal

from kvxform.diffing.align import Alignment
from kvxform.diffing.describe import node_text, short_op
from kvxform.diffing.outline import Outline, OutlineNode, OutlinePort
from kvxform.diffing.pairs import PairComparer
from kvxform.diffing.records import CountChange, NodeChange, PortChange, StructureDiff

OneSided = Literal["added", "removed"]


def compare_outlines(a: Outline, b: Outline, alignment: Alignment) -> StructureDiff:
    """Return what differs between the graphs of `a` and `b`."""
    pairs = [(a.nodes[x], b.nodes[y]) for x, y in alignment.pairs]
    return StructureDiff(
        nodes=tuple(_node_changes(a, b, alignment)),
        ports=tuple(_port_changes(a, b, alignment)),
        histogram=tuple(_count_changes(a, b)),
        renamed=sum(_is_renamed(x, y) for x, y in pairs),
        moved=sum((x.origin, x.via) != (y.origin, y.via) for x, y in pairs),
        layers_added=tuple(y for x, y in alignment.layers if x is None and y is not None),
        layers_removed=tuple(x for x, y in alignment.layers if y is None and x is not None),
    )


def _is_renamed(x: OutlineNode, y: OutlineNode) -> bool:
    is_weight = len(x.weights) == len(y.weights) and x.weights != y.weights
    return is_weight or x.module != y.module


def _node_changes(a: Outline, b: Outline, alignment: Alignment) -> list[NodeChange]:
    """Return changes in the order of B; what was removed comes where it was."""
    comparer = PairComparer(a, b, alignment)
    found: list[tuple[tuple[float, int], NodeChange]] = []
    for x, y in alignment.pairs:
        change = comparer.compare(a.nodes[x], b.nodes[y])
        if change is not None:
            found.append(((y, 0), change))
    for y in alignment.only_b:
        node = b.nodes[y]
        layer = comparer.places.of_added(node)
        found.append(((y, 0), _one_sided(node, layer, "added", after=node_text(node, b))))
    partner = dict(alignment.pairs)
    last = -1
    for node in a.nodes:
        if node.key in partner:
            last = partner[node.key]
        else:
            layer = comparer.places.of_removed(node)
            change = _one_sided(node, layer, "removed", before=node_text(node, a))
            found.append(((last + 0.5, node.key), change))
    return [change for _, change in sorted(found, key=lambda item: item[0])]


def _one_sided(
    node: OutlineNode, layer: int | None, kind: OneSided, before: str = "", after: str = ""
) -> NodeChange:
    return NodeChange(
        kind=kind,
        layer=layer,
        op=node.op,
        what=f"{short_op(node.op)} {kind}",
        before=before,
        after=after,
        module=node.module,
        origin=node.origin,
        via=node.via,
        calls=node.calls,
    )


def _port_changes(a: Outline, b: Outline, alignment: Alignment) -> Iterator[PortChange]:
    """Yield inputs, outputs and planes whose type differs; planes by aligned layers."""
    after = {(port.kind, port.layer, port.name): port for port in b.ports}
    layers = {x: y for x, y in alignment.layers if x is not None}
    for port in a.ports:
        is_gone = port.layer is not None and layers.get(port.layer) is None
        key = (port.kind, None if port.layer is None else layers.get(port.layer), port.name)
        partner = None if is_gone else after.pop(key, None)
        if partner is None or partner.type != port.type:
            yield _port_change(partner or port, port.type, partner.type if partner else "")
    for port in after.values():
        yield _port_change(port, "", port.type)


def _port_change(port: OutlinePort, before: str, after: str) -> PortChange:
    name = port.name if port.layer is None else f"layer {port.layer} {port.name}"
    return PortChange(port.kind, name, before, after)


def _count_changes(a: Outline, b: Outline) -> Iterator[CountChange]:
    """Yield operations whose number differs."""
    before, after = (Counter(node.op for node in side.nodes) for side in (a, b))
    for op in sorted(before | after):
        if before[op] != after[op]:
            yield CountChange(op, before[op], after[op])
