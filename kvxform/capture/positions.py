"""Make everything that depends on a position read `position_ids`.

A model that counts positions itself builds tables of S rows: learned positions, cosines. Each such
table is replaced by a lookup of the same rows at `position_ids`. What still counts by itself is
found by `mixers`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.structure import ancestors, tensor_type
from kvxform.capture.weights import add_weight, position_ids, size_node, weight_node
from kvxform.ir.types import TensorType

aten = torch.ops.aten
_PROBE = Setting.first(5)
_SHORTEST_TABLE = 9
_LONGEST_TABLE = 1 << 17
_UNLIMITED = 4096  # rows of a table that the model computes, where nothing limits its length


def read_positions(prober: Prober, context_length: int | None) -> int | None:
    """Replace tables of S rows by lookups at `position_ids`.

    Args:
        prober: Of the graph.
        context_length: Longest sequence that the model says it supports, or None.

    Returns:
        The longest sequence that the tables allow, `context_length` if there is none.
    """
    limit = context_length or _mask_length(prober)
    for leaf in _tables(prober):
        rows = _rows(prober, leaf, _PROBE)
        if rows is None or torch.equal(rows, rows[:1].expand_as(rows)):
            continue
        found = _find_rows(prober, leaf, rows) or _make_rows(prober, leaf, rows, limit)
        if found is not None:
            name, offset = found
            _replace(prober, leaf, name, offset)
            length = prober.weights[name].shape[0] - offset
            limit = length if limit is None else min(limit, length)
    return limit


def _mask_length(prober: Prober) -> int | None:
    """Return the size of the smallest square constant that raising has removed: a mask table."""
    used = {n.target for n in prober.graph.nodes if n.op == "get_attr"}
    shapes = [w.shape for name, w in prober.weights.items() if name not in used]
    sizes = [s[-1] for s in shapes if len(s) >= 2 and s[-1] == s[-2]]
    return min(sizes, default=None)


def _tables(prober: Prober) -> list[fx.Node]:
    """Return non-content inputs of content with an S axis that do not read `position_ids`."""
    source = position_ids(prober.graph)
    leaves = prober.leaves(sorted(prober.content))
    tables = []
    for leaf in leaves:
        type_ = tensor_type(leaf)
        is_table = type_ is not None and type_.shape.count("S") == 1 and type_.dtype != torch.int64
        if is_table and source not in ancestors([leaf]):
            tables.append(leaf)
    return tables


def _rows(prober: Prober, leaf: fx.Node, setting: Setting) -> Tensor | None:
    """Return the value of a table as `[S, features]`, or None if it cannot be that long."""
    axis = leaf.meta["type"].shape.index("S")
    try:
        value: Tensor = prober.run([leaf], setting)[0]
    except (RuntimeError, IndexError):
        return None
    if value.shape[axis] != setting.length:
        return None
    return value.movedim(axis, 0).flatten(1)  # batch is 1, so a B axis adds no features


def _find_rows(prober: Prober, leaf: fx.Node, rows: Tensor) -> tuple[str, int] | None:
    """Return a weight that holds the rows, and at which offset they start."""
    for node in ancestors([leaf]):
        value = prober.weights.get(str(node.target)) if node.op == "get_attr" else None
        if value is None or value.dim() < 2 or value.shape[-1] != rows.shape[1]:
            continue
        table = value.flatten(0, -2)
        for offset in (table == rows[0]).all(1).nonzero().flatten().tolist():
            longest = _rows(prober, leaf, Setting.first(table.shape[0] - offset))
            if longest is not None and torch.equal(longest, table[offset:]):
                name = str(node.target)
                if value.dim() > 2:
                    name = add_weight(prober.weights, f"{name}_rows", table)
                return name, offset
    return None


def _make_rows(
    prober: Prober, leaf: fx.Node, rows: Tensor, limit: int | None
) -> tuple[str, int] | None:
    """Compute the rows once, as many as the model can have positions, and keep them as a weight."""
    sizes = [
        size
        for node in ancestors([leaf])
        if node.op == "get_attr"
        for size in prober.weights[str(node.target)].shape
        if size >= _SHORTEST_TABLE
    ]
    for length in sorted({limit or _UNLIMITED, *sizes}, reverse=True):
        longest = _rows(prober, leaf, Setting.first(min(length, _LONGEST_TABLE)))
        if longest is not None and is_close(longest[: rows.shape[0]], rows):
            return add_weight(prober.weights, "position_rows", longest), 0
    return None


def _replace(prober: Prober, leaf: fx.Node, name: str, offset: int) -> None:
    """Put `embedding(table, position_ids + offset)` in the place of the table."""
    graph, type_ = prober.graph, leaf.meta["type"]
    shape = list(type_.shape)
    axis = shape.index("S")
    if axis == 0 or shape[0] not in (1, "B"):
        shape.insert(0, "B")
    shape[0] = "B"
    axis = shape.index("S")
    rows = ["B", "S", *shape[1:axis], *shape[axis + 1 :]]
    table = weight_node(graph, name, prober.weights[name])
    sizes: list[Any] = [
        {"S": size_node(graph, 1), "B": size_node(graph, 0)}.get(n, n) for n in rows
    ]
    meta = {**leaf.meta, "type": TensorType(type_.dtype, ("B", "S", table.meta["type"].shape[1]))}
    with graph.inserting_before(leaf):
        where = position_ids(graph)
        if offset:
            where = graph.call_function(aten.add.Tensor, (where, offset))
            where.meta = {**leaf.meta, "type": TensorType(torch.int64, ("B", "S"))}
        node = graph.call_function(aten.embedding.default, (table, where))
        node.meta = meta
        if tuple(rows) != meta["type"].shape:
            node = graph.call_function(aten.reshape.default, (node, sizes))
            node.meta = {**leaf.meta, "type": TensorType(type_.dtype, tuple(rows))}
        if axis != 1:
            order = [0, *range(2, axis + 1), 1, *range(axis + 1, len(shape))]
            node = graph.call_function(aten.permute.default, (node, order))
            node.meta = {**leaf.meta, "type": TensorType(type_.dtype, tuple(shape))}
    leaf.replace_all_uses_with(node)
