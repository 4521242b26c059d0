"""Outlines as small plain data: layers with the same pattern are stored once.

A pattern is a list of operations. An operand is written as `3` (operation 3 of the pattern), `^1`
(slot 1: a value from elsewhere, which each layer fills in), `:0` (input 0) or `=f32[4]` (a weight).
`*` in the path of a module or weight stands for the number of the layer in such paths.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from kvxform.diffing.outline_nodes import (
    LayerFields,
    Operand,
    OutlineNode,
    OutlinePort,
    group_by_layer,
    in_order,
)
from kvxform.ir.text import format_ranges

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a part of a path that is a number
_FIELDS = ("module", "origin", "via", "attributes", "weights")


def pack_nodes(nodes: Sequence[OutlineNode]) -> dict[str, Any]:
    """Return operations as patterns and the layers that have them; see `unpack_nodes`."""
    groups = group_by_layer(nodes)
    places = {node.key: at for group in groups.values() for at, node in enumerate(group)}
    patterns: list[Any] = []
    runs: dict[str, dict[str, Any]] = {}
    layers: dict[str, list[int]] = {}
    for layer, group in groups.items():
        packed = _Packer(nodes, places, layer, group)
        pattern = packed.pattern()
        if pattern not in patterns:
            patterns.append(pattern)
        run: dict[str, Any] = {"pattern": patterns.index(pattern), "slots": packed.slot_texts()}
        if layer is not None:
            run["shift"] = packed.number - layer  # of the number in paths
        key = json.dumps([layer is None, run])
        runs[key] = run
        layers.setdefault(key, []).extend([] if layer is None else [layer])
    for key, found in layers.items():
        if found:
            runs[key]["layers"] = format_ranges(found)
    return {"patterns": patterns, "runs": list(runs.values())}


class _Packer:
    """One layer, or what is outside of layers, without what tells it from other layers."""

    def __init__(
        self,
        nodes: Sequence[OutlineNode],
        places: Mapping[int, int],
        layer: int | None,
        group: Sequence[OutlineNode],
    ) -> None:
        self.nodes, self.places, self.layer, self.group = nodes, places, layer, group
        self.slots: dict[int, int] = {}
        self.number = _number_in_paths(group, layer or 0)

    def pattern(self) -> list[dict[str, Any]]:
        return [self._row(node) for node in self.group]

    def slot_texts(self) -> list[str]:
        """Return where each slot comes from: `-1:24` is operation 24 of the layer before."""
        return [self._slot(self.nodes[key]) for key in self.slots]

    def _slot(self, source: OutlineNode) -> str:
        if source.layer is None:
            return f"outside:{self.places[source.key]}"
        # outside of layers there is no layer to count from
        return f"{source.layer - (self.layer or 0)}:{self.places[source.key]}"

    def _row(self, node: OutlineNode) -> dict[str, Any]:
        row: dict[str, Any] = {"op": node.op}
        if node.type:
            row["type"] = node.type
        if node.inputs:
            row["inputs"] = [self._operand(operand) for operand in node.inputs]
            row["roles"] = " ".join(node.roles)
        row["module"] = self._fold(node.module)
        row["origin"] = node.origin
        row["via"] = list(node.via)
        row["attributes"] = dict(node.attributes)
        row["weights"] = [self._fold(name) for name in node.weights]
        return {key: value for key, value in row.items() if value or key not in _FIELDS}

    def _operand(self, operand: Operand) -> Any:
        kind, value = operand
        if kind == "list":
            return [self._operand(item) for item in value]
        if kind == "weight":
            return f"={value}"
        if kind == "port":
            return f":{value}"
        if self.nodes[value].layer == self.layer:
            return str(self.places[value])
        return f"^{self.slots.setdefault(value, len(self.slots))}"

    def _fold(self, path: str) -> str:
        if self.layer is None:
            return path
        found = _NUMBER.search(path)
        if found is None or int(found[0]) != self.number:
            return path
        return f"{path[: found.start()]}*{path[found.end() :]}"


def _number_in_paths(group: Iterable[OutlineNode], default: int) -> int:
    """Return the number that most paths of a layer have, `3` in `layers.3.mlp`."""
    firsts = (_NUMBER.search(path) for n in group for path in (n.module, *n.weights))
    numbers = Counter(int(found[0]) for found in firsts if found)
    return min(numbers, key=lambda n: (-numbers[n], n)) if numbers else default


def unpack_nodes(data: Mapping[str, Any]) -> tuple[OutlineNode, ...]:
    """Return the operations that `pack_nodes` was given, if they were in canonical order."""
    places: list[tuple[int | None, int]] = []
    groups: list[tuple[int | None, Mapping[str, Any]]] = []
    for run in data["runs"]:
        layers = parse_ranges(run["layers"]) if "layers" in run else [None]
        groups += [(layer, run) for layer in layers]
    groups.sort(key=lambda group: -1 if group[0] is None else group[0])
    for layer, run in groups:
        places += [(layer, at) for at in range(len(data["patterns"][run["pattern"]]))]
    keys = {place: key for key, place in enumerate(places)}
    nodes: list[OutlineNode] = []
    for layer, run in groups:
        reader = _Reader(layer, run, keys)
        nodes += map(reader.read, data["patterns"][run["pattern"]], range(len(places)))
    return in_order(nodes)


class _Reader:
    """Reads the operations of one layer; the inverse of `_Packer`."""

    def __init__(
        self,
        layer: int | None,
        run: Mapping[str, Any],
        keys: Mapping[tuple[int | None, int], int],
    ) -> None:
        self.layer, self.keys = layer, keys
        self.shift = run.get("shift", 0)
        self.slots = [self._slot(text) for text in run["slots"]]

    def _slot(self, text: str) -> int:
        where, _, at = text.partition(":")
        layer = None if where == "outside" else int(where) + (self.layer or 0)
        return self.keys[layer, int(at)]

    def read(self, row: Mapping[str, Any], at: int) -> OutlineNode:
        return OutlineNode(
            key=self.keys[self.layer, at],
            op=row["op"],
            layer=self.layer,
            module=self._unfold(row.get("module", "")),
            origin=row.get("origin", ""),
            via=tuple(row.get("via", ())),
            type=row.get("type", ""),
            inputs=tuple(map(self._operand, row.get("inputs", ()))),
            attributes=tuple(row.get("attributes", {}).items()),
            roles=tuple(row.get("roles", "").split()),
            weights=tuple(map(self._unfold, row.get("weights", ()))),
        )

    def _operand(self, text: Any) -> Operand:
        if isinstance(text, list):
            return "list", tuple(map(self._operand, text))
        if text[0] == "=":
            return "weight", text[1:]
        if text[0] == ":":
            return "port", int(text[1:])
        if text[0] == "^":
            return "node", self.slots[int(text[1:])]
        return "node", self.keys[self.layer, int(text)]

    def _unfold(self, path: str) -> str:
        return path if self.layer is None else path.replace("*", str(self.layer + self.shift))


def pack_fields(entries: Sequence[LayerFields]) -> list[dict[str, Any]]:
    """Return fields of layers; equal ones once, with the layers that have them."""
    found: dict[tuple[tuple[str, Any], ...], list[int]] = {}
    for entry in entries:
        found.setdefault(entry.fields, []).append(entry.layer)
    return [{"layers": format_ranges(at), "fields": dict(fields)} for fields, at in found.items()]


def unpack_fields(data: Sequence[Mapping[str, Any]]) -> tuple[LayerFields, ...]:
    """Return what `pack_fields` was given, in the order of layers."""
    found = [
        LayerFields(layer, tuple((path, value) for path, value in row["fields"].items()))
        for row in data
        for layer in parse_ranges(row["layers"])
    ]
    return tuple(sorted(found, key=lambda entry: entry.layer))


def pack_ports(ports: Sequence[OutlinePort]) -> dict[str, Any]:
    """Return inputs and outputs, and planes of the cache, equal ones once."""
    planes: dict[int, list[list[str]]] = {}
    for port in ports:
        if port.layer is not None:
            planes.setdefault(port.layer, []).append([port.name, port.type])
    folded: dict[str, list[int]] = {}
    for layer, found in planes.items():
        folded.setdefault(json.dumps(found), []).append(layer)
    return {
        "whole": [[p.kind, p.name, p.type] for p in ports if p.layer is None],
        "layers": [
            {"layers": format_ranges(at), "planes": json.loads(text)} for text, at in folded.items()
        ],
    }


def unpack_ports(data: Mapping[str, Any]) -> tuple[OutlinePort, ...]:
    """Return what `pack_ports` was given: the whole first, then planes by layer."""
    whole = [OutlinePort(kind, name, type_) for kind, name, type_ in data["whole"]]
    planes = [
        OutlinePort("cache", name, type_, layer)
        for row in data["layers"]
        for layer in parse_ranges(row["layers"])
        for name, type_ in row["planes"]
    ]
    return (*whole, *sorted(planes, key=lambda port: port.layer or 0))


def parse_ranges(text: str) -> list[int]:
    """Return the numbers of `0-2, 5`; the inverse of `ir.text.format_ranges`."""
    found: list[int] = []
    for part in text.split(", ") if text else ():
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
