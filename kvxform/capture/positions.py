"""Make everything that depends on a position read `position_ids`.

A model that counts positions itself builds tables of S rows: learned positions, cosines. Each such
table is replaced by a lookup of the same rows at `position_ids`. Afterwards a run on a part of the
tokens must give that part of a run on all of them; a cache relies on it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.capture.probing import Prober, Setting, is_close
from kvxform.capture.structure import ancestors, tensor_type
from kvxform.capture.weights import add_weight, position_ids, size_node, weight_node
from kvxform.errors import CaptureError
from kvxform.ir.program import Program
from kvxform.ir.types import TensorType

aten = torch.ops.aten
_PROBE = Setting.first(5)
_SHORTEST_TABLE = 9
_LONGEST_TABLE = 1 << 17
_UNLIMITED = 4096  # rows of a table that the model computes, where nothing limits its length
_PART = slice(2, 5)  # of six tokens


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
    table = weight_node(graph, name, prober.weights[name])
    sizes: list[Any] = [
        {"S": size_node(graph, 1), "B": size_node(graph, 0)}.get(n, n) for n in shape
    ]
    meta = {**leaf.meta, "type": TensorType(type_.dtype, ("B", "S", table.meta["type"].shape[1]))}
    with graph.inserting_before(leaf):
        where = position_ids(graph)
        if offset:
            where = graph.call_function(aten.add.Tensor, (where, offset))
            where.meta = {**leaf.meta, "type": TensorType(torch.int64, ("B", "S"))}
        node = graph.call_function(aten.embedding.default, (table, where))
        node.meta = meta
        if tuple(shape) != meta["type"].shape:
            node = graph.call_function(aten.reshape.default, (node, sizes))
            node.meta = {**leaf.meta, "type": TensorType(type_.dtype, tuple(shape))}
    leaf.replace_all_uses_with(node)


def prove_local(program: Program) -> None:
    """Check that nothing but attention looks at other tokens or at the length.

    Attention is replaced by the value of the token itself. Then logits of some tokens must be the
    same whether the others are there or not.

    Raises:
        CaptureError: KVX304 with the first node that differs.
    """
    rows = int(program.info.vocab_size)
    ids = (torch.arange(6) * 7 + 1)[None] % min(rows, 50)
    ids = ids.to(next(iter(program.weights.values())).device)
    positions = torch.arange(6, device=ids.device)[None]
    whole, part = _Alone(program), _Alone(program)
    whole.run(ids, positions)
    part.run(ids[:, _PART], positions[:, _PART])
    output = whole.values["output"][..., _PART, :]
    if is_close(part.values["output"], output):
        return
    for node in program.graph.nodes:
        if _differs(node, whole.values, part.values):
            reasons = "; ".join(r.reason for r in program.rejected)
            raise CaptureError(
                "KVX304",
                "outside attention, a token may not depend on other tokens or on the length",
                where="capture",
                got=node.meta["origin"] + (f" ({reasons})" if reasons else ""),
                at=node.meta["module"],
            )
    raise AssertionError("equal nodes give equal logits")


class _Alone(fx.Interpreter):
    """Runs a program in which every token attends only to itself, and keeps all values."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.to_module(), garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """Run one node and keep its value under its name."""
        with torch.no_grad():
            result = super().run_node(n)
        self.values[n.name] = result
        return result

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the value of the token itself for attention."""
        if target is not kvx.ATTENTION:
            return super().call_function(target, args, kwargs)
        q, _, v = args[:3]
        return v.repeat_interleave(q.shape[1] // v.shape[1], 1)


def _differs(node: fx.Node, whole: dict[str, Any], part: dict[str, Any]) -> bool:
    """Return whether the part of a value differs from the value of the part."""
    type_ = tensor_type(node)
    axes = [] if type_ is None else [i for i, n in enumerate(type_.shape) if n in ("S", "B*S")]
    if node.op == "get_attr" or len(axes) != 1:
        return False
    full = whole[node.name].movedim(axes[0], 0)[_PART].movedim(0, axes[0])
    return not is_close(part[node.name], full)
