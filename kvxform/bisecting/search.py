"""Which of many items are at fault, found with few trials.

A trial says of a set of items whether it fails, passes, or cannot be tried. Faults of compilers are
mostly one item each, so sets are halved and every half that fails is halved again: k faults among n
items take about 2 k log2(n) trials. Where neither half fails, items are at fault together, and the
set is made smaller by leaving out parts of it (delta debugging, Zeller and Hildebrandt, 2002).
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence


class Verdict(enum.Enum):
    """Outcome of a trial."""

    FAILS = "fails"
    PASSES = "passes"
    UNKNOWN = "unknown"


Judge = Callable[[frozenset[int]], Verdict]


def isolate(items: Sequence[int], judge: Judge) -> list[tuple[int, ...]]:
    """Return small sets of `items` that fail on their own, disjoint and in order.

    Args:
        items: A set that fails as a whole.
        judge: The trial.
    """
    if len(items) == 1:
        return [tuple(items)]
    middle = len(items) // 2
    halves = (items[:middle], items[middle:])
    failing = [half for half in halves if judge(frozenset(half)) is Verdict.FAILS]
    if not failing:
        return [minimise(items, judge)]
    return [found for half in failing for found in isolate(half, judge)]


def minimise(items: Sequence[int], judge: Judge) -> tuple[int, ...]:
    """Return a part of a failing set that fails, from which no single item can be left out."""
    kept, parts = list(items), 2
    while len(kept) > 1:
        size = -(-len(kept) // parts)
        for start in range(0, len(kept), size):
            rest = kept[:start] + kept[start + size :]
            if rest and judge(frozenset(rest)) is Verdict.FAILS:
                kept, parts = rest, max(2, parts - 1)
                break
        else:
            if parts >= len(kept):
                break
            parts = min(len(kept), 2 * parts)
    return tuple(kept)


def fewest_to_leave_out(order: Sequence[int], judge: Judge) -> int:
    """Return how many of the first items must be left out so that the rest passes.

    Args:
        order: A failing set, the item most at fault first; leaving out more never makes it worse.
        judge: The trial.
    """
    low, high = 1, len(order)
    while low < high:
        middle = (low + high) // 2
        if judge(frozenset(order[middle:])) is Verdict.PASSES:
            high = middle
        else:
            low = middle + 1
    return low
