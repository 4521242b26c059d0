"""Changes that many layers share, shown once: blocks of layers, and ports by kind."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

from kvxform.diffing.folding import Change, FoldedChange, fold_changes
from kvxform.diffing.records import PortChange
from kvxform.ir.folding import fold_name


@dataclass(frozen=True)
class Block(Generic[Change]):
    """Changes that the same layers have, in the order of the graph; no layers: outside of them."""

    layers: tuple[int, ...]
    changes: tuple[FoldedChange[Change], ...]


def blocks_of(changes: Iterable[Change]) -> list[Block[Change]]:
    """Return changes in blocks of layers that have the same ones; most layers first."""
    found: dict[tuple[int, ...], list[FoldedChange[Change]]] = {}
    for folded in fold_changes(changes):
        found.setdefault(folded.layers, []).append(folded)
    return [
        Block(layers, tuple(folded))
        for layers, folded in sorted(found.items(), key=lambda item: (-len(item[0]), item[0]))
    ]


def often(folded: FoldedChange[Change]) -> str:
    """Return how often a change is there: nothing for once a layer, `x2`, or `31 in all`."""
    places = max(1, len(folded.layers))
    times, rest = divmod(folded.count, places)
    if rest:
        return f"{folded.count} in all"
    return f"x{times}" if times > 1 else ""


@dataclass(frozen=True)
class PortGroup:
    """Ports with the same change whose names differ in a number only, and how many they are."""

    kind: str
    name: str
    before: str
    after: str
    count: int


def fold_ports(ports: Sequence[PortChange]) -> list[PortGroup]:
    """Group inputs, outputs and planes of many layers with the same change."""
    groups: dict[tuple[str, str, str, str], list[PortChange]] = {}
    for port in ports:
        key = (port.kind, fold_name(port.name), port.before, port.after)
        groups.setdefault(key, []).append(port)
    return [
        PortGroup(kind, group[0].name if len(group) == 1 else name, before, after, len(group))
        for (kind, name, before, after), group in groups.items()
    ]
