"""Which operation of A is which operation of B: by structure and provenance, never by name.

Layers are aligned first, then the operations of each pair of layers:

1. those with the same hash, of what they are made from or of what they go into;
2. neighbours of a pair: what it reads in the same place, and what reads it;
3. the rest by operation, origin without source line, and passes, in the order of the graph.

What is left over is paired across layers where a neighbour says so.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from kvxform.diffing.align_layers import LayerPairs, align_layers
from kvxform.diffing.hashing import hashes_from_inputs, hashes_from_users
from kvxform.diffing.outline import Outline, OutlineNode
from kvxform.diffing.outline_nodes import bare_origin

Key = Callable[[OutlineNode], Hashable]
Fits = Callable[[OutlineNode, OutlineNode], bool]


@dataclass(frozen=True)
class Alignment:
    """What belongs together.

    Attributes:
        pairs: Keys of operations in A and B, in the order of B.
        only_a: Keys of operations that B has not.
        only_b: Keys of operations that A has not.
        layers: Layers of A and B in order; None where a layer has no partner.
    """

    pairs: tuple[tuple[int, int], ...]
    only_a: tuple[int, ...]
    only_b: tuple[int, ...]
    layers: LayerPairs = ()


def align(a: Outline, b: Outline) -> Alignment:
    """Return which operations of two outlines belong together."""
    layers = align_layers(a, b)
    matcher = _Matcher(a, b, layers)
    matcher.match_layer(a.by_layer[None], b.by_layer[None])
    for left, right in layers:
        if left is not None and right is not None:
            matcher.match_layer(a.by_layer[left], b.by_layer[right])
    matcher.match_rest()
    partner = matcher.partner
    return Alignment(
        pairs=tuple(sorted(partner.items(), key=lambda pair: pair[1])),
        only_a=tuple(node.key for node in a.nodes if node.key not in partner),
        only_b=tuple(node.key for node in b.nodes if node.key not in matcher.taken),
        layers=layers,
    )


class _Matcher:
    """Pairs that have been found so far, and how to find more."""

    def __init__(self, a: Outline, b: Outline, layers: LayerPairs) -> None:
        self.a, self.b = a, b
        self.partner: dict[int, int] = {}
        self.taken: dict[int, int] = {}
        self.layer_of: dict[int | None, int | None] = {None: None}
        self.layer_of |= {x: y for x, y in layers if x is not None}
        self.fresh: deque[tuple[int, int]] = deque()
        self.hashes_a, self.hashes_b = _hashes(a), _hashes(b)

    def match_layer(self, left: Sequence[OutlineNode], right: Sequence[OutlineNode]) -> None:
        """Pair the operations of one layer."""
        if [self.hashes_a[n.key] for n in left] == [self.hashes_b[n.key] for n in right]:
            for x, y in zip(left, right, strict=True):
                self._pair(x.key, y.key)
            self.fresh.clear()  # their neighbours are paired too
            return
        for place in (slice(0, 2), slice(0, 1), slice(1, 2)):  # both hashes, then one of them
            self._match_unique(left, right, place)
            self._spread(_equal_call)
        self._match_ties(left, right)
        self._respread(left, _same_op)
        for key in (_provenance, _source):
            self._match_sequence(left, right, key)
            self._spread(_same_op)
        self._respread(left, _same_place)

    def match_rest(self) -> None:
        """Pair what is left over in whatever layers, next to what is paired."""
        self.layer_of = {}
        self._respread(self.a.nodes, _same_op)

    def _pair(self, x: int, y: int) -> None:
        self.partner[x], self.taken[y] = y, x
        self.fresh.append((x, y))

    def _is_open(self, x: int, y: int) -> bool:
        if x in self.partner or y in self.taken:
            return False
        left, right = self.a.nodes[x].layer, self.b.nodes[y].layer
        return not self.layer_of or self.layer_of.get(left) == right

    def _match_unique(
        self, left: Sequence[OutlineNode], right: Sequence[OutlineNode], place: slice
    ) -> None:
        """Pair those whose hashes at `place` nobody else has."""
        found_a = _by_key((n for n in left if n.key not in self.partner), self.hashes_a, place)
        found_b = _by_key((n for n in right if n.key not in self.taken), self.hashes_b, place)
        for key, keys in found_a.items():
            if len(keys) == 1 and len(found_b.get(key, ())) == 1:
                self._pair(keys[0], found_b[key][0])

    def _match_ties(self, left: Sequence[OutlineNode], right: Sequence[OutlineNode]) -> None:
        """Pair equal operations that have equals, one at a time, each with its surroundings."""
        found = _by_key((n for n in right if n.key not in self.taken), self.hashes_b, slice(0, 2))
        for node in left:
            open_ = [y for y in found.get(self.hashes_a[node.key], ()) if y not in self.taken]
            if open_ and node.key not in self.partner:
                self._pair(node.key, open_[0])
                self._spread(_equal_call)

    def _match_sequence(
        self, left: Sequence[OutlineNode], right: Sequence[OutlineNode], key: Key
    ) -> None:
        """Pair the longest common run of what is left, in the order of the graph."""
        rest_a = [n for n in left if n.key not in self.partner]
        rest_b = [n for n in right if n.key not in self.taken]
        keys_a, keys_b = list(map(key, rest_a)), list(map(key, rest_b))
        for block in SequenceMatcher(None, keys_a, keys_b, autojunk=False).get_matching_blocks():
            for step in range(block.size):
                self._pair(rest_a[block.a + step].key, rest_b[block.b + step].key)

    def _respread(self, left: Iterable[OutlineNode], fits: Fits) -> None:
        self.fresh.extend((n.key, self.partner[n.key]) for n in left if n.key in self.partner)
        self._spread(fits)

    def _spread(self, fits: Fits) -> None:
        """Pair neighbours of pairs until none is left that fits."""
        while self.fresh:
            x, y = self.fresh.popleft()
            for u, v in (*self._operands(x, y), *self._readers(x, y)):
                if self._is_open(u, v) and fits(self.a.nodes[u], self.b.nodes[v]):
                    self._pair(u, v)

    def _operands(self, x: int, y: int) -> Iterator[tuple[int, int]]:
        """Yield what a pair reads in the same places."""
        operands = self.a.nodes[x].operands, self.b.nodes[y].operands
        for left, right in zip(*operands, strict=False):
            if left[0] == right[0] == "node":
                yield left[1], right[1]

    def _readers(self, x: int, y: int) -> Iterator[tuple[int, int]]:
        """Yield who reads a pair in the same way, where there is no doubt."""
        left = self._open_readers(self.a, x, self.partner)
        right = self._open_readers(self.b, y, self.taken)
        for use, readers in left.items():
            if len(readers) == 1 and len(right.get(use, ())) == 1:
                yield readers[0], right[use][0]

    @staticmethod
    def _open_readers(
        side: Outline, key: int, paired: dict[int, int]
    ) -> dict[tuple[str, int], list[int]]:
        found: dict[tuple[str, int], list[int]] = defaultdict(list)
        for reader, position in side.users[key]:
            if reader not in paired:
                found[side.nodes[reader].op, position].append(reader)
        return found


def _hashes(side: Outline) -> list[tuple[str, ...]]:
    """Return for each node what it is made from and what it goes into, within its layer."""
    found: list[tuple[str, ...]] = [()] * len(side.nodes)
    for nodes in side.by_layer.values():
        made = hashes_from_inputs(nodes, lambda reader, key: "elsewhere")
        used = hashes_from_users(nodes, side.users)
        for node in nodes:
            found[node.key] = (made[node.key], used[node.key])
    return found


def _by_key(
    nodes: Iterable[OutlineNode], hashes: Sequence[tuple[str, ...]], place: slice
) -> dict[tuple[str, ...], list[int]]:
    found: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for node in nodes:
        found[hashes[node.key][place]].append(node.key)
    return found


def _equal_call(a: OutlineNode, b: OutlineNode) -> bool:
    return (a.op, a.attributes, a.roles) == (b.op, b.attributes, b.roles)


def _same_op(a: OutlineNode, b: OutlineNode) -> bool:
    return a.op == b.op


def _same_place(a: OutlineNode, b: OutlineNode) -> bool:
    """Return whether one operation can stand where the other one stood, as gelu for silu."""
    kinds = [[kind for kind, _ in node.inputs] for node in (a, b)]
    return (a.roles, a.type, kinds[0]) == (b.roles, b.type, kinds[1])


def _provenance(node: OutlineNode) -> Hashable:
    return node.provenance


def _source(node: OutlineNode) -> Hashable:
    return node.op, bare_origin(node.origin)
