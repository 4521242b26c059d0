"""A graph reduced to plain data that can be compared, whatever it came from."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvxform.diffing.hashing import layer_hashes
from kvxform.diffing.outline_data import (
    pack_fields,
    pack_nodes,
    pack_ports,
    unpack_fields,
    unpack_nodes,
    unpack_ports,
)
from kvxform.diffing.outline_nodes import (
    OUTPUT,
    LayerFields,
    Operand,
    OutlineNode,
    OutlinePort,
    group_by_layer,
    list_users,
)
from kvxform.diffing.records import SideKind

__all__ = ["LayerFields", "Operand", "Outline", "OutlineNode", "OutlinePort"]


@dataclass(frozen=True)
class Outline:
    """A graph with its sites, plan and figures.

    Attributes:
        kind: What it came from.
        model: Name of the model.
        nodes: Operations, operands first; the last one is `output`.
        ports: Inputs, in the order that operands count them, then outputs and cache planes.
        sites: Geometry of each attention, one entry a layer.
        plan: What each layer stores, with `key.` or `value.` before fields of a stream; empty
            without a cache.
        whole: Fields of the model and of the whole plan, by path.
        metrics: Figures of the whole model by name; see `records.MetricChange`.
        passes: Passes that changed the program, in order.
    """

    kind: SideKind
    model: str
    nodes: tuple[OutlineNode, ...]
    ports: tuple[OutlinePort, ...] = ()
    sites: tuple[LayerFields, ...] = ()
    plan: tuple[LayerFields, ...] = ()
    whole: tuple[tuple[str, Any], ...] = ()
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    passes: tuple[str, ...] = ()

    @functools.cached_property
    def layers(self) -> tuple[int, ...]:
        """Layers with attention, in order."""
        named = {site.layer for site in self.sites}
        return tuple(sorted(named | {n.layer for n in self.nodes if n.layer is not None}))

    @property
    def operations(self) -> int:
        """Number of operations."""
        return sum(node.op != OUTPUT for node in self.nodes)

    @functools.cached_property
    def by_layer(self) -> dict[int | None, tuple[OutlineNode, ...]]:
        """Nodes of every layer; None has those outside of layers."""
        return group_by_layer(self.nodes, self.layers)

    @functools.cached_property
    def users(self) -> list[list[tuple[int, int]]]:
        """For every node, who reads it: (key of the reader, position among its operands)."""
        return list_users(self.nodes)

    def layer_hashes(self) -> dict[int | None, str]:
        """Return a hash of the operations of each layer, and of what is outside of layers as None.

        Names, modules and where a node came from do not count, nor does the order of independent
        operations.
        """
        return layer_hashes(self.nodes, self.layers)

    def without_digests(self) -> Outline:
        """Return this outline without digests of fitted constants, which may differ by rounding."""

        def keep(entry: LayerFields) -> LayerFields:
            fields = tuple(f for f in entry.fields if not f[0].endswith(".digest"))
            return dataclasses.replace(entry, fields=fields)

        return dataclasses.replace(self, plan=tuple(map(keep, self.plan)))

    def to_data(self) -> dict[str, Any]:
        """Return plain data in which equal layers are stored once; `from_data` is the inverse."""
        return {
            "kind": self.kind,
            "model": self.model,
            "whole": dict(self.whole),
            "passes": list(self.passes),
            "metrics": dict(self.metrics),
            "ports": pack_ports(self.ports),
            "sites": pack_fields(self.sites),
            "plan": pack_fields(self.plan),
            "graph": pack_nodes(self.nodes),
        }

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Outline:
        """Build an outline from what `to_data` returned; KeyError, TypeError or ValueError if not.

        Its `kind` is the one that was stored.
        """
        return cls(
            kind=data["kind"],
            model=data["model"],
            nodes=unpack_nodes(data["graph"]),
            ports=unpack_ports(data["ports"]),
            sites=unpack_fields(data["sites"]),
            plan=unpack_fields(data["plan"]),
            whole=tuple(data["whole"].items()),
            metrics=dict(data["metrics"]),
            passes=tuple(data["passes"]),
        )
