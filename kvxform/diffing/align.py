"""Which operation of A is which operation of B: by structure and provenance, never by name.

Layers are aligned first. With as many layers on both sides, operations belong together that are
made from the same, all the way from the inputs, or go into the same, all the way to the output. The
rest is aligned layer by layer:

1. those with the same hash, of what they are made from or of what they go into within the layer;
2. neighbours of a pair: what it reads in the same place, and what reads it;
3. the rest by operation, origin without source line, and passes, in the order of the graph.

What is left over is paired across layers where a neighbour says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from kvxform.diffing.align_layers import LayerPairs, align_layers
from kvxform.diffing.matching import Matcher
from kvxform.diffing.outline import Outline


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
    matcher = Matcher(a, b, layers)
    if len(a.layers) == len(b.layers):
        matcher.match_whole()
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
