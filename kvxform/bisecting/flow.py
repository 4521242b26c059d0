"""Which values every path through a graph runs through: where a part of it can be cut out.

Only floating point values that depend on the tokens count. Sizes, positions and what is made from
them can be had anywhere.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from kvxform.ir.program import Program
from kvxform.ir.types import TensorType, TupleType, ValueType


class Flow:
    """The values of a program without a cache that depend on the tokens.

    Args:
        program: The program; what this holds is of its graph as it is now.
    """

    def __init__(self, program: Program) -> None:
        ids = program.placeholder("input_ids")
        self.nodes: list[fx.Node] = []
        self._index: dict[fx.Node, int] = {}
        for node in program.graph.nodes:
            operands = node.all_input_nodes
            depends = ids in operands or any(n in self._index for n in operands)
            if node.op == "call_function" and depends and _is_floating(node.meta["type"]):
                self._index[node] = len(self.nodes)
                self.nodes.append(node)
        self._before = self._dominators()
        self._after = self._post_dominators()

    def operands(self, node: fx.Node) -> list[fx.Node]:
        """Return the operands of `node` that depend on the tokens."""
        return [n for n in node.all_input_nodes if n in self._index]

    def entries(self, anchors: Iterable[fx.Node], end: fx.Node) -> list[fx.Node]:
        """Return the values through which the tokens reach all `anchors` and `end`, nearest first.

        Anchors themselves are none.
        """
        anchors = list(anchors)
        common = self._common(self._before, [*anchors, end])
        return [node for node in reversed(common) if node not in anchors and node is not end]

    def ends(self, anchors: Iterable[fx.Node]) -> list[fx.Node]:
        """Return the values through which all `anchors` reach the logits, nearest first.

        An anchor is one if all others reach the logits through it.
        """
        return self._common(self._after, anchors)

    def known(self, nodes: Iterable[fx.Node]) -> list[fx.Node]:
        """Return those of `nodes` that depend on the tokens."""
        return [node for node in nodes if node in self._index]

    def _common(self, sets: list[int], nodes: Iterable[fx.Node]) -> list[fx.Node]:
        found = -1
        for node in nodes:
            found &= sets[self._index[node]]
        return [node for i, node in enumerate(self.nodes) if found >> i & 1]

    def _dominators(self) -> list[int]:
        """Return for each node, as bits, the nodes on every path from the tokens to it."""
        found: list[int] = []
        for i, node in enumerate(self.nodes):
            before = [self._index[n] for n in self.operands(node)]
            found.append(_meet(found[b] for b in before) | 1 << i)
        return found

    def _post_dominators(self) -> list[int]:
        found = [0] * len(self.nodes)
        for i in reversed(range(len(self.nodes))):
            after = [self._index[n] for n in self.nodes[i].users if n in self._index]
            found[i] = _meet(found[a] for a in after) | 1 << i
        return found


def _meet(sets: Iterable[int]) -> int:
    found = None
    for one in sets:
        found = one if found is None else found & one
    return found or 0


def _is_floating(type_: ValueType) -> bool:
    if isinstance(type_, TupleType):
        return any(_is_floating(item) for item in type_.items)
    return isinstance(type_, TensorType) and type_.dtype.is_floating_point
