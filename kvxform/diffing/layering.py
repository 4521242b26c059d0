"""Which layer an operation belongs to, told from the flow of data alone.

Attention k is the centre of layer k. The layer ends at a value that everything attention k
contributes to the output passes through: the last such value that does not depend on attention k+1.
In a residual network this is the residual stream after the layer. Keys and values that one layer
hands to another bypass that value, so edges into an attention count by its queries alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kvxform.diffing.outline_nodes import ATTENTION, OutlineNode

_ADD = ("aten.add", "aten.add.Tensor", "onnx.Add")


def assign_layers(
    nodes: Sequence[OutlineNode], attention: Sequence[int], layers: Sequence[int]
) -> list[int | None]:
    """Return the layer of every node, or None for what is outside of layers.

    Args:
        nodes: Operations, operands first, with keys 0, 1, ...; the last one is the output.
        attention: Keys of the attentions, ascending.
        layers: Their layers.
    """
    flow = _Flow(nodes, attention)
    ends = flow.ends()
    labels: list[int | None] = [None] * len(nodes)
    opened = {end: k + 1 for k, end in enumerate(ends, -1) if end is not None}
    centre = {key: k for k, key in enumerate(attention)}
    carries: list[int | None] = []  # what a reader of a node belongs to
    for node in nodes:
        found = [carries[key] for key in node.sources]
        own = max((k for k in found if k is not None), default=None)
        own = centre.get(node.key, own)
        labels[node.key] = own
        carries.append(opened.get(node.key, own))
    before = flow.ancestors(ends[0]) if ends[0] is not None else set()
    _adopt(nodes, labels, {*before, *opened, *attention})
    count = len(attention)
    return [None if k is None or k >= count else layers[k] for k in labels]


def _adopt(nodes: Sequence[OutlineNode], labels: list[int | None], fixed: set[int]) -> None:
    """Give what only later layers read to the first of them.

    Constants of one layer depend on no layer, and a norm that was made to read an earlier layer
    still belongs to the layer that it works for. What several layers read stays outside of layers.

    Args:
        nodes: Operations, operands first.
        labels: Number of the layer of each, changed in place.
        fixed: Keys of operations that stay where they are.
    """
    readers: list[set[int | None]] = [set() for _ in nodes]
    for node in reversed(nodes):
        own, found = labels[node.key], readers[node.key]
        first = min((k for k in found if k is not None), default=None)
        is_shared = None in found or (own is None and len(found) > 1)
        if node.key not in fixed and first is not None and not is_shared:
            labels[node.key] = first if own is None else max(own, first)
        for key in node.sources:
            readers[key].add(labels[node.key])


class _Flow:
    """The graph as far as it leads from attention to attention and to the output."""

    def __init__(self, nodes: Sequence[OutlineNode], attention: Sequence[int]) -> None:
        self.nodes, self.attention = nodes, attention
        self.exit = len(nodes) - 1
        self.depth = self._depth()
        self.next = self._post_dominators()

    def _depth(self) -> list[int]:
        """Return the last attention that each node depends on, itself not counted; -1 is none."""
        centre = {key: k for k, key in enumerate(self.attention)}
        depth: list[int] = []
        for node in self.nodes:
            found = (max(depth[key], centre.get(key, -1)) for key in node.sources)
            depth.append(max(found, default=-1))
        return depth

    def _post_dominators(self) -> list[int | None]:
        """Return for each node the first one that all its ways to the output share."""
        found: list[int | None] = [None] * len(self.nodes)
        found[self.exit] = self.exit
        for node in reversed(self.nodes):
            if found[node.key] is None:
                continue  # it does not lead to the output
            for key in self._stream_sources(node):
                now = found[key]
                found[key] = node.key if now is None else self._meet(found, now, node.key)
        return found

    def _stream_sources(self, node: OutlineNode) -> list[int]:
        return node.sources[:1] if node.op in ATTENTION else node.sources

    @staticmethod
    def _meet(found: list[int | None], a: int, b: int) -> int:
        while a != b:
            low = found[min(a, b)]
            assert low is not None, "a node on a way to the output"
            a, b = low, max(a, b)
        return a

    def chain(self, key: int, depth: int) -> list[int]:
        """Return what all ways from `key` pass through before another attention, in order."""
        found = []
        following = self.next[key]
        while following is not None and following != self.exit:
            if self.depth[following] != depth or following in self.attention:
                break
            found.append(following)
            following = self.next[following]
        return found

    def ends(self) -> list[int | None]:
        """Return where layer 0 begins, and then the last value of each layer."""
        chains = [self.chain(key, k) for k, key in enumerate(self.attention)]
        found: list[int | None] = [chain[-1] if chain else None for chain in chains[:-1]]
        if chains:
            found.append(self._last(chains))
        return [self._start(), *found]

    def _start(self) -> int | None:
        """Return the last value before layer 0 that the tokens pass through."""
        first = [n.key for n in self.nodes if ("port", 0) in n.operands and self.next[n.key]]
        if not first or not self.attention:
            return None
        before = self.ancestors(self.attention[0])
        first = [key for key in first if key in before]
        shared = [[key, *self.chain(key, -1)] for key in first if self.depth[key] == -1]
        both = set(shared[0]).intersection(*shared[1:]) if shared else set()
        ends = sorted(both & before)
        return ends[-1] if ends else None

    def _last(self, chains: list[list[int]]) -> int | None:
        """Return where the last layer ends and the head begins: as the layers before it end."""
        *others, last = chains
        ops = tuple(self.nodes[key].op for key in last)
        found = (tuple(self.nodes[key].op for key in chain) for chain in others)
        alike = Counter(part for part in found if part and part == ops[: len(part)])
        if alike:
            part = max(alike, key=lambda part: (alike[part], len(part)))
            return last[len(part) - 1]
        ends = Counter(self.nodes[chain[-1]].op for chain in others if chain)
        op = max(sorted(ends), key=ends.__getitem__, default="")
        fitting = [key for key in last if self.nodes[key].op in ((op,) if op else _ADD)]
        return fitting[-1] if fitting else None

    def ancestors(self, key: int) -> set[int]:
        """Return `key` and everything it depends on."""
        found, todo = {key}, [key]
        while todo:
            fresh = [k for k in self.nodes[todo.pop()].sources if k not in found]
            found.update(fresh)
            todo.extend(fresh)
        return found
