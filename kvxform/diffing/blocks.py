"""Changes that many layers share, shown once: blocks of layers, weights by cause, ports by kind."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from kvxform.diffing.records import NodeChange, PlanChange, PortChange, WeightChange

_INDEX = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a path that is a number


@dataclass(frozen=True)
class Block:
    """Changes that the same layers have.

    Attributes:
        layers: The layers; empty for what is outside of layers.
        lines: Each change once, in the order of the graph, and how often each layer has it.
    """

    layers: tuple[int, ...]
    lines: tuple[tuple[NodeChange | PlanChange, int], ...]


def blocks_of(changes: Sequence[NodeChange | PlanChange]) -> list[Block]:
    """Return changes in blocks of layers that have the same ones; most layers first."""
    found: dict[tuple[int, ...], list[tuple[NodeChange | PlanChange, int]]] = {}
    for layers, change, count in _fold(changes):
        found.setdefault(layers, []).append((change, count))
    return [
        Block(layers, tuple(lines))
        for layers, lines in sorted(found.items(), key=lambda item: (-len(item[0]), item[0]))
    ]


def _fold(
    changes: Sequence[NodeChange | PlanChange],
) -> list[tuple[tuple[int, ...], NodeChange | PlanChange, int]]:
    """Return every kind of change with its layers and the number of times each layer has it."""
    counts: dict[NodeChange | PlanChange, Counter[int | None]] = {}
    for change in changes:
        bare = dataclasses.replace(change, layer=None)
        if isinstance(bare, NodeChange):
            bare = dataclasses.replace(bare, module=_INDEX.sub("*", bare.module))
        counts.setdefault(bare, Counter())[change.layer] += 1
    folded: list[tuple[tuple[int, ...], NodeChange | PlanChange, int]] = []
    for change, by_layer in counts.items():
        for count in sorted(set(by_layer.values())):
            at = [layer for layer, times in by_layer.items() if times == count]
            inside = tuple(sorted(layer for layer in at if layer is not None))
            if None in at:
                folded.append(((), change, count))
            if inside:
                folded.append((inside, change, count))
    return folded


@dataclass(frozen=True)
class WeightGroup:
    """Weights with the same role in several layers that differ for the same reason.

    Attributes:
        layers: The layers; empty for weights outside of layers.
        change: The first of them.
        largest: Largest relative difference among them.
    """

    layers: tuple[int, ...]
    change: WeightChange
    smallest: float
    largest: float


def fold_weights(changes: Sequence[WeightChange]) -> list[WeightGroup]:
    """Group weights that differ for the same reason in several layers."""
    groups: dict[tuple[str, str, str, bool], list[WeightChange]] = {}
    for c in changes:
        groups.setdefault((c.role, c.cause, c.detail, c.layer is None), []).append(c)
    return [
        WeightGroup(
            layers=tuple(sorted({c.layer for c in group if c.layer is not None})),
            change=group[0],
            smallest=min(c.relative for c in group),
            largest=max(c.relative for c in group),
        )
        for group in groups.values()
    ]


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
        key = (port.kind, _INDEX.sub("*", port.name), port.before, port.after)
        groups.setdefault(key, []).append(port)
    return [
        PortGroup(kind, group[0].name if len(group) == 1 else name, before, after, len(group))
        for (kind, name, before, after), group in groups.items()
    ]
