"""Which layer of A is which layer of B, told from what the layers are made of.

With as many layers on both sides, layer k is layer k unless shifting them all fits far better.
Paths of modules decide only between equally good answers: among equal layers, which one is missing.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from kvxform.diffing.outline import Outline, OutlineNode

_GAP = -0.5  # a layer without partner; so a shift must gain more than one whole layer
_NAMED = 1e-3  # gain where most modules have the same path
_NUMBERED = re.compile(r"(?<![^.])\d+(?![^.])")
LayerPairs = tuple[tuple[int | None, int | None], ...]


def align_layers(a: Outline, b: Outline) -> LayerPairs:
    """Return pairs of layers in order; None where a layer has no partner."""
    likeness = _Likeness(a, b)
    rows, columns = len(a.layers), len(b.layers)
    best = [[_GAP * (i + j) for j in range(columns + 1)] for i in range(rows + 1)]
    for i in range(1, rows + 1):
        for j in range(1, columns + 1):
            best[i][j] = max(
                best[i - 1][j - 1] + likeness.of(i - 1, j - 1),
                best[i - 1][j] + _GAP,
                best[i][j - 1] + _GAP,
            )
    pairs: list[tuple[int | None, int | None]] = []
    i, j = rows, columns
    while i or j:  # of equally good answers, the one whose last layers have no partner
        if i and best[i][j] == best[i - 1][j] + _GAP:
            i -= 1
            pairs.append((a.layers[i], None))
        elif j and best[i][j] == best[i][j - 1] + _GAP:
            j -= 1
            pairs.append((None, b.layers[j]))
        else:
            i, j = i - 1, j - 1
            pairs.append((a.layers[i], b.layers[j]))
    return tuple(reversed(pairs))


class _Likeness:
    """How much alike two layers are, from 0 to 1; layers that look the same are compared once."""

    def __init__(self, a: Outline, b: Outline) -> None:
        self.looks = [self._looks(side) for side in (a, b)]
        self.paths = [self._paths(side) for side in (a, b)]
        self.known: dict[tuple[int, int], float] = {}
        self.numbers: list[list[int]] = []
        shapes: dict[frozenset[tuple[str, int]], int] = {}
        for looks in self.looks:
            keys = (frozenset(look.items()) for look in looks)
            self.numbers.append([shapes.setdefault(key, len(shapes)) for key in keys])

    def of(self, i: int, j: int) -> float:
        """Return the likeness of layer number i of A and number j of B."""
        key = (self.numbers[0][i], self.numbers[1][j])
        if key not in self.known:
            left, right = self.looks[0][i], self.looks[1][j]
            union = (left | right).total()
            self.known[key] = (left & right).total() / union if union else 1.0
        return self.known[key] + _NAMED * (self.paths[0][i] == self.paths[1][j])

    @staticmethod
    def _looks(side: Outline) -> list[Counter[str]]:
        fields = {site.layer: str(site.fields) for site in side.sites}
        return [
            Counter(f"{n.op} {n.attributes} {n.type}" for n in side.by_layer[layer])
            + Counter([fields.get(layer, "")])
            for layer in side.layers
        ]

    @staticmethod
    def _paths(side: Outline) -> list[str]:
        return [_common_path(side.by_layer[layer]) for layer in side.layers]


def _common_path(nodes: Sequence[OutlineNode]) -> str:
    """Return the path of modules up to its first number that most nodes have."""
    found = ((_NUMBERED.search(node.module), node.module) for node in nodes)
    starts = Counter(module[: at.end()] for at, module in found if at)
    return min(starts, key=lambda path: (-starts[path], path)) if starts else ""
