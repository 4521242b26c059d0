"""Equal changes of many layers as one; what only some layers have stands apart."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from kvxform.diffing.outline_nodes import bare_origin
from kvxform.diffing.records import NodeChange, PlanChange, WeightChange
from kvxform.ir.folding import fold_name, fold_sentence

Change = TypeVar("Change", NodeChange, PlanChange, WeightChange)
_ATTRIBUTE = re.compile(r"\w+=(?:\[[^\]]*\]|[^,)]*)")
_LAYER = re.compile(r"\blayer (\d+)")


@dataclass(frozen=True)
class FoldedChange(Generic[Change]):
    """One change that some layers have in common.

    Attributes:
        layers: The layers, ascending; empty outside of layers.
        change: The change in the first of them; of weights, where it is largest.
        count: How often it is there, more than once a layer or outside of layers too.
    """

    layers: tuple[int, ...]
    change: Change
    count: int = 1


def fold_changes(changes: Iterable[Change]) -> list[FoldedChange[Change]]:
    """Return changes with those that are equal but for their layer folded, in order."""
    groups: dict[Hashable, list[Change]] = {}
    for change in changes:
        groups.setdefault((change.layer is None, _key(change)), []).append(change)
    return [_fold(group) for group in groups.values()]


def _fold(group: list[Change]) -> FoldedChange[Change]:
    shown = group[0]
    if isinstance(shown, WeightChange):
        shown = max(group, key=lambda change: getattr(change, "relative", 0.0))
    layers = {change.layer for change in group if change.layer is not None}
    return FoldedChange(tuple(sorted(layers)), shown, len(group))


def _key(change: NodeChange | PlanChange | WeightChange) -> Hashable:
    data = dataclasses.asdict(change)
    for name in ("layer", "relative"):
        data.pop(name, None)
    if isinstance(change, NodeChange):  # what makes the operands of layer 0 is another operation
        data |= {name: _without_operands(data[name]) for name in ("before", "after")}
    return tuple((name, _folded(name, value, change.layer)) for name, value in data.items())


def _without_operands(line: str) -> tuple[str, ...]:
    """Return the type and the attributes of a line of a graph."""
    type_, _, call = line.partition(" = ")
    return type_, *_ATTRIBUTE.findall(call)


def _folded(name: str, value: Any, layer: int | None) -> Any:
    """Return a field without what tells its layer from others."""
    if name in ("module", "role"):
        return fold_name(value)
    if name == "origin":
        return bare_origin(value)
    if not isinstance(value, str) or layer is None:
        return value
    relative = _LAYER.sub(lambda found: f"layer {int(found[1]) - layer:+d}", value)
    return fold_sentence(relative) if name == "what" else relative
