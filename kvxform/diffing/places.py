"""Which layer a change is reported in.

A fault in the flow of data can change which layer an operation seems to belong to. The side whose
layers look more alike has no such fault, or a smaller one: it is asked about operations that both
sides have, and these about their neighbours that only one side has.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvxform.diffing.align import Alignment
from kvxform.diffing.outline import Outline, OutlineNode


class Places:
    """Layers of pairs, of what was added and of what was removed.

    Attributes:
        trusts_a: Whether the layers of A are believed where both sides disagree.
    """

    def __init__(self, a: Outline, b: Outline, alignment: Alignment) -> None:
        self.a, self.b = a, b
        self.trusts_a = _looks(a) <= _looks(b)
        self._partner = dict(alignment.pairs)
        self._taken = {y: x for x, y in alignment.pairs}
        forward: dict[int | None, int | None] = {None: None}
        self._forward = forward | {x: y for x, y in alignment.layers if None not in (x, y)}
        self._back = {y: x for x, y in self._forward.items()}

    def of_pair(self, x: OutlineNode, y: OutlineNode) -> int | None:
        """Return the layer of a pair, counted as in B."""
        return self._forward.get(x.layer, y.layer) if self.trusts_a else y.layer

    def of_added(self, node: OutlineNode) -> int | None:
        """Return the layer of an operation that only B has."""
        if not self.trusts_a:
            return node.layer
        return self._near(node, self.b, self._taken, self.a, self._forward)

    def of_removed(self, node: OutlineNode) -> int | None:
        """Return the layer of an operation that only A has, counted as in A."""
        if self.trusts_a:
            return node.layer
        return self._near(node, self.a, self._partner, self.b, self._back)

    @staticmethod
    def _near(
        node: OutlineNode,
        side: Outline,
        partner: Mapping[int, int],
        other: Outline,
        layers: Mapping[int | None, int | None],
    ) -> int | None:
        """Return the layer of a node, or that of a neighbour whose layer the other side denies."""
        near = {*node.sources, *(reader for reader, _ in side.users[node.key])}
        found = {}
        for key in sorted(near & partner.keys()):
            own = side.nodes[key].layer
            found[key] = layers.get(other.nodes[partner[key]].layer, own)
        denied = [layer for key, layer in found.items() if layer != side.nodes[key].layer]
        return denied[0] if denied and node.layer not in found.values() else node.layer


def _looks(side: Outline) -> int:
    """Return how many different kinds of layers there are, by their operations alone."""
    return len({tuple(sorted(n.op for n in side.by_layer[layer])) for layer in side.layers})
