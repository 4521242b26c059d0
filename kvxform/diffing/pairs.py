"""What differs between an operation of A and its partner in B."""

from __future__ import annotations

import re
from collections.abc import Iterator

from kvxform.diffing.align import Alignment
from kvxform.diffing.describe import node_text, place_text
from kvxform.diffing.hashing import is_commutative
from kvxform.diffing.outline import Outline, OutlineNode
from kvxform.diffing.outline_nodes import Operand
from kvxform.diffing.places import Places
from kvxform.diffing.records import NodeChange, NodeChangeKind

_DEFAULT = "default"
_TYPE = re.compile(r"^(?P<dtype>\w+)\[(?P<shape>.*)\]$")


class PairComparer:
    """Compares operations of A with their partners in B."""

    def __init__(self, a: Outline, b: Outline, alignment: Alignment) -> None:
        self.a, self.b = a, b
        self.partner = dict(alignment.pairs)
        self.only_a, self.only_b = set(alignment.only_a), set(alignment.only_b)
        self.places = Places(a, b, alignment)
        names = {port.name: place for place, port in enumerate(b.ports) if port.kind == "input"}
        inputs = [port for port in a.ports if port.kind == "input"]
        self.ports = {place: names.get(port.name, place) for place, port in enumerate(inputs)}

    def compare(self, x: OutlineNode, y: OutlineNode) -> NodeChange | None:
        """Return what differs between `x` of A and `y` of B, or None."""
        found: list[tuple[NodeChangeKind, str]] = []
        found += (("changed", text) for text in _attributes(x, y))
        found += (("rewired", text) for text in self._rewired(x, y))
        found += (("retyped", text) for text in self._retyped(x, y, is_explained=bool(found)))
        if not found:
            return None
        return NodeChange(
            kind=found[0][0],
            layer=self.places.of_pair(x, y),
            op=y.op,
            what="; ".join(text for _, text in found),
            before=node_text(x, self.a),
            after=node_text(y, self.b),
            module=y.module,
            origin=y.origin,
            via=y.via,
            calls=y.calls,
        )

    def _rewired(self, x: OutlineNode, y: OutlineNode) -> Iterator[str]:
        """Yield arguments that come from elsewhere."""
        before, after = (dict(zip(n.roles, n.inputs, strict=True)) for n in (x, y))
        if is_commutative(x) and is_commutative(y):
            swapped = dict(zip(y.roles, reversed(y.inputs), strict=True))
            if all(self._is_same(before[role], swapped.get(role)) for role in before):
                return
        for role in dict.fromkeys((*before, *after)):
            left, right = before.get(role), after.get(role)
            if not self._is_same(left, right):
                texts = place_text(left, self.a, x.layer), place_text(right, self.b, y.layer)
                if texts[0] == texts[1]:
                    texts = (texts[0], f"another {texts[1]}")
                yield f"{role} {texts[0].removeprefix(f'{role} ')} -> {texts[1]}"

    def _is_same(self, left: Operand | None, right: Operand | None) -> bool:
        """Return whether two operands belong together, or differ by a change reported elsewhere."""
        if left is None or right is None:
            return left is right
        if left[0] == right[0] == "list":
            pairs = zip(left[1], right[1], strict=False)
            return len(left[1]) == len(right[1]) and all(self._is_same(*pair) for pair in pairs)
        if self._is_replaced(left, right):
            return True
        before = _roots(left, self.a, self.only_a)
        after = _roots(right, self.b, self.only_b)
        return any(self._is_partner(u, v) for u in before for v in after)

    def _is_replaced(self, left: Operand, right: Operand) -> bool:
        is_node = left[0] == right[0] == "node"
        return is_node and left[1] in self.only_a and right[1] in self.only_b

    def _is_partner(self, left: Operand, right: Operand) -> bool:
        if left[0] != right[0]:
            return False
        if left[0] == "weight":
            return True  # a weight is known by its place; its type is compared with the types
        if left[0] == "port":
            return bool(self.ports.get(left[1], left[1]) == right[1])
        return bool(self.partner.get(left[1]) == right[1])

    def _retyped(self, x: OutlineNode, y: OutlineNode, *, is_explained: bool) -> Iterator[str]:
        """Yield types that differ, but not those that follow from something else."""
        reasons = set()
        for left, right in zip(x.operands, y.operands, strict=False):
            if left[0] == right[0] == "weight" and left[1] != right[1]:
                is_explained = True
                yield f"weight {left[1]} -> {right[1]}"
            elif left[0] == right[0] == "node":
                types = self.a.nodes[left[1]].type, self.b.nodes[right[1]].type
                reasons |= _type_changes(*types)
        is_known = bool(x.type and y.type)  # an ONNX file need not say the types of its values
        if is_known and not is_explained and not _type_changes(x.type, y.type) <= reasons:
            yield f"{x.type} -> {y.type}"


def _attributes(x: OutlineNode, y: OutlineNode) -> Iterator[str]:
    before, after = dict(x.attributes), dict(y.attributes)
    if x.op != y.op:
        yield f"{x.op} -> {y.op}"
    for name in sorted({*before, *after}):
        left, right = before.get(name, _DEFAULT), after.get(name, _DEFAULT)
        if left != right:
            yield f"{name} {left} -> {right}"


def _roots(operand: Operand, side: Outline, only: set[int]) -> set[Operand]:
    """Return an operand, or what goes into it where the other side does not have it."""
    found: set[Operand] = set()
    seen: set[Operand] = {operand}
    todo = [operand]
    while todo:
        kind, value = todo.pop()
        if kind != "node" or value not in only:
            found.add((kind, value))
            continue
        fresh = [item for item in side.nodes[value].operands if item not in seen]
        seen.update(fresh)
        todo += fresh
    return found


def _type_changes(before: str, after: str) -> set[str]:
    """Return which of dtype and shape differ."""
    if before == after:
        return set()
    left, right = _TYPE.match(before), _TYPE.match(after)
    if left is None or right is None:
        return {"dtype", "shape"}
    return {part for part in ("dtype", "shape") if left[part] != right[part]}
