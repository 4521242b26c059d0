"""Finds operations that belong together; see `align`, which says in what order."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from difflib import SequenceMatcher

from kvxform.diffing.align_layers import LayerPairs
from kvxform.diffing.hashing import Namer, Numbering, hashes_from_inputs, hashes_from_users
from kvxform.diffing.outline import Outline, OutlineNode
from kvxform.diffing.outline_nodes import bare_origin

Key = Callable[[OutlineNode], Hashable]
Hashes = Sequence[tuple[Hashable, ...]]  # (of what it is made from, of what it goes into)
Fits = Callable[[OutlineNode, OutlineNode], bool]


class Matcher:
    """Pairs that have been found so far, and how to find more.

    Attributes:
        partner: Key in B of each operation of A that has a partner.
        taken: The inverse.
    """

    def __init__(self, a: Outline, b: Outline, layers: LayerPairs) -> None:
        self.a, self.b = a, b
        self.partner: dict[int, int] = {}
        self.taken: dict[int, int] = {}
        self.layer_of: dict[int | None, int | None] = {None: None}
        self.layer_of |= {x: y for x, y in layers if x is not None}
        self.fresh: deque[tuple[int, int]] = deque()
        self.number = Numbering()
        self.near_a, self.near_b = (
            _hashes(side, side.by_layer.values(), self.number) for side in (a, b)
        )

    def match_layer(self, left: Sequence[OutlineNode], right: Sequence[OutlineNode]) -> None:
        """Pair the operations of one layer."""
        if not self._can_pair(left, right):
            return
        is_new = not any(n.key in self.partner for n in left)
        if is_new and [self.near_a[n.key] for n in left] == [self.near_b[n.key] for n in right]:
            for x, y in zip(left, right, strict=True):
                self._pair(x.key, y.key)
            self.fresh.clear()  # their neighbours are paired too
            return
        self._respread(left, _equal_call)
        self._match_unique(left, right, (self.near_a, self.near_b), _equal_call)
        self._match_ties(left, right)
        self._respread(left, _same_op)
        for key in (_provenance, _source):
            self._match_sequence(left, right, key)
            self._spread(_same_op)

    def match_whole(self) -> None:
        """Pair what is made from the same inputs, or goes into the same outputs."""
        hashes = (
            _hashes(self.a, [self.a.nodes], self.number),
            _hashes(self.b, [self.b.nodes], self.number),
        )
        self._match_unique(self.a.nodes, self.b.nodes, hashes, _nothing)

    def match_rest(self) -> None:
        """Pair what is left over in whatever layers, next to what is paired."""
        if not self._can_pair(self.a.nodes, self.b.nodes):
            return
        self.layer_of = {}
        self._respread(self.a.nodes, _same_op)
        self._respread(self.a.nodes, _same_place)

    def _can_pair(self, left: Sequence[OutlineNode], right: Sequence[OutlineNode]) -> bool:
        """Return whether both sides have an operation without partner."""
        is_left = any(node.key not in self.partner for node in left)
        return is_left and any(node.key not in self.taken for node in right)

    def _pair(self, x: int, y: int) -> None:
        self.partner[x], self.taken[y] = y, x
        self.fresh.append((x, y))

    def _is_open(self, x: int, y: int) -> bool:
        if x in self.partner or y in self.taken:
            return False
        left, right = self.a.nodes[x].layer, self.b.nodes[y].layer
        return not self.layer_of or self.layer_of.get(left) == right

    def _match_unique(
        self,
        left: Sequence[OutlineNode],
        right: Sequence[OutlineNode],
        hashes: tuple[Hashes, Hashes],
        fits: Fits,
    ) -> None:
        """Pair those whose hashes nobody else has: first both hashes, then one of them.

        Where what it is made from says one thing and what it goes into another, the one with more
        neighbours in pairs is right.
        """
        self._pair_all(self._unique(left, right, hashes, slice(0, 2)), fits)
        made = self._unique(left, right, hashes, slice(0, 1))
        used = self._unique(left, right, hashes, slice(1, 2))
        clear: list[tuple[int, int]] = []
        doubtful: list[tuple[int, int]] = []
        reverse = {y: x for x, y in used.items()}
        for x, y in made.items():
            is_clear = used.get(x, y) == y and reverse.get(y, x) == x
            (clear if is_clear else doubtful).append((x, y))
        taken = set(made.values())
        for x, y in used.items():
            is_clear = x not in made and y not in taken
            (clear if is_clear else doubtful).append((x, y))
        self._pair_all(dict(clear), fits)
        doubtful.sort(key=lambda pair: -self._support(*pair))  # stable: what it is made from first
        for pair in doubtful:
            self._pair_all(dict([pair]), fits)

    def _unique(
        self,
        left: Sequence[OutlineNode],
        right: Sequence[OutlineNode],
        hashes: tuple[Hashes, Hashes],
        place: slice,
    ) -> dict[int, int]:
        found_a = _by_key((n for n in left if n.key not in self.partner), hashes[0], place)
        found_b = _by_key((n for n in right if n.key not in self.taken), hashes[1], place)
        return {
            keys[0]: found_b[key][0]
            for key, keys in found_a.items()
            if len(keys) == 1 and len(found_b.get(key, ())) == 1
        }

    def _pair_all(self, pairs: Mapping[int, int], fits: Fits) -> None:
        """Pair what is still open, and then what is next to it."""
        for x, y in pairs.items():
            if x not in self.partner and y not in self.taken:
                self._pair(x, y)
        self._spread(fits)

    def _support(self, x: int, y: int) -> int:
        """Return how many neighbours of two operations are pairs already."""
        near = list(self._operands(x, y))
        near += [(u, v) for u, _ in self.a.users[x] for v, _ in self.b.users[y]]
        return sum(self.partner.get(u) == v for u, v in near)

    def _match_ties(self, left: Sequence[OutlineNode], right: Sequence[OutlineNode]) -> None:
        """Pair equal operations that have equals, one at a time, each with its surroundings."""
        rest = (node for node in right if node.key not in self.taken)
        found = _by_key(rest, self.near_b, slice(0, 2))
        for node in left:
            open_ = [y for y in found.get(self.near_a[node.key], ()) if y not in self.taken]
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


def _hashes(side: Outline, groups: Iterable[Sequence[OutlineNode]], name: Namer) -> Hashes:
    """Return for each node what it is made from and what it goes into, within its group."""
    found: list[tuple[Hashable, ...]] = [()] * len(side.nodes)
    for nodes in groups:
        made = hashes_from_inputs(nodes, lambda reader, key: "elsewhere", name)
        used = hashes_from_users(nodes, side.users, name)
        for node in nodes:
            found[node.key] = (made[node.key], used[node.key])
    return found


def _by_key(
    nodes: Iterable[OutlineNode], hashes: Hashes, place: slice
) -> dict[Hashable, list[int]]:
    found: dict[Hashable, list[int]] = defaultdict(list)
    for node in nodes:
        found[hashes[node.key][place]].append(node.key)
    return found


def _nothing(a: OutlineNode, b: OutlineNode) -> bool:
    return False


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
