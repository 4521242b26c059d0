"""Rewrites one attention and all that read its cache, so that fewer KV heads are kept.

`fold`: the mix of keys moves into W_k and W_q. `project`: keys are mixed where attention reads
them, after a norm or RoPE that a mix cannot pass. Values always move into W_v and W_o.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.program import AttentionSite, Projection, projection_weights
from kvxform.ir.types import TensorType
from kvxform.pass_base import Rewriter
from kvxform.structure.head_mixes import Mix, in_order, mixed_rows, reading_rows
from kvxform.structure.head_paths import (
    HeadPath,
    HeadWeights,
    linear_rows,
    norm_weights,
    output_rows,
    own_names,
    projection_of,
    read_path,
    size_nodes,
    write_path,
)

aten = torch.ops.aten
PER_HEAD = ("sink_logits", "alibi_slopes")  # of an attention, one for each query head


@dataclass(frozen=True, eq=False)
class Merge:
    """How the KV heads of one layer become fewer.

    Attributes:
        way: Where the mix of keys goes, see the module.
        order: Old heads, group by group.
        key: Mix of keys, for heads in that order.
        value: Mix of values, likewise.
    """

    way: Literal["fold", "project"]
    order: tuple[int, ...]
    key: Mix
    value: Mix

    @property
    def heads(self) -> int:
        """KV heads that are left."""
        return len(self.key.down)

    @property
    def is_sorted(self) -> bool:
        """Whether heads stay in their order."""
        return self.order == tuple(sorted(self.order))


def merge_heads(rewriter: Rewriter, layer: int, merge: Merge) -> None:
    """Rewrite the attention of an owner and of every layer that reads its cache."""
    program = rewriter.program
    site = program.site(layer)
    node = program.attention_node(layer)
    if merge.way == "fold":
        keys, made_k = _fewer_heads(rewriter, node, site, 1, merge)
    else:
        keys, made_k = _mixed_keys(rewriter, node, merge), None
    values, made_v = _fewer_heads(rewriter, node, site, 2, merge)
    for reader in program.readers(layer):
        attention = program.attention_node(reader.layer)
        if merge.way == "fold":
            queries, made_q = _turned_queries(rewriter, attention, reader, merge)
        else:
            queries, made_q = _met_queries(rewriter, attention, merge), None
        rewriter.set_args(attention, (queries, keys, values, *attention.args[3:]))
        _fold_output(rewriter, reader, merge)
        _order_options(rewriter, attention, reader, merge)
        changes: dict[str, Any] = {"q": made_q, "k": made_k, "v": made_v}
        if merge.way == "project":
            changes |= {"rope": None, "notes": (*reader.notes, "keys are mixed after RoPE")}
        rewriter.update_site(reader.layer, num_kv_heads=merge.heads, **changes)


def _fewer_heads(
    rewriter: Rewriter, node: fx.Node, site: AttentionSite, index: int, merge: Merge
) -> tuple[fx.Node, Projection | None]:
    """Return the fewer keys (`index` 1) or values (2) of an attention, and their projection."""
    path = _path(rewriter, node, index, site.num_kv_heads)
    mix = merge.key if index == 1 else merge.value
    rows, bias = linear_rows(rewriter.program, path)
    parts = [mixed_rows(in_order(x, merge.order), mix) for x in (rows, bias) if x is not None]
    norm = []
    for name in norm_weights(rewriter.program, path) if path.is_wide else ():
        gains = rewriter.program.weights[name].view(site.num_kv_heads, -1, 1)
        norm.append((name, mixed_rows(in_order(gains, merge.order), mix)))
    return _write(rewriter, node, path, "kv"[index - 1], parts, norm, merge.heads)


def _turned_queries(
    rewriter: Rewriter, node: fx.Node, site: AttentionSite, merge: Merge
) -> tuple[fx.Node, Projection | None]:
    """Return the queries that meet mixed keys, and their projection."""
    path = _path(rewriter, node, 0, site.num_q_heads)
    operand = node.args[0]
    assert isinstance(operand, fx.Node), "operands of attention are nodes"
    eye = torch.eye(site.head_dim, dtype=torch.float64)
    if merge.is_sorted and path.is_alone and torch.equal(merge.key.up, eye.expand_as(merge.key.up)):
        rewriter.mark_touched(projection_weights(site.q))  # they meet other keys now
        return operand, site.q
    rows, bias = linear_rows(rewriter.program, path)
    parts = [
        reading_rows(in_order(x, merge.order), merge.key) for x in (rows, bias) if x is not None
    ]
    norm = []
    for name in norm_weights(rewriter.program, path) if path.is_wide else ():
        gains = rewriter.program.weights[name].view(site.num_q_heads, -1, 1)
        norm.append((name, in_order(gains, merge.order)))
    return _write(rewriter, node, path, "q", parts, norm, site.num_q_heads)


def _write(
    rewriter: Rewriter,
    node: fx.Node,
    path: HeadPath,
    stream: str,
    parts: list[Tensor],
    norm: list[tuple[str, Tensor]],
    heads: int,
) -> tuple[fx.Node, Projection | None]:
    """Set weights `[heads, D, n]` and write the path to the heads they make."""
    weights = rewriter.program.weights
    names = own_names(path, stream)[: len(parts)]
    for name, part in zip(names, parts, strict=True):
        values = part.flatten(0, 1).to(weights[path.linear.weight])
        rewriter.set_weight(name, values[:, 0] if name is not names[0] else values)
    for name, part in norm:
        rewriter.set_weight(name, part.flatten().to(weights[name]))
    bias = names[1] if len(names) > 1 else None
    made = HeadWeights(names[0], bias, tuple(name for name, _ in norm))
    return write_path(rewriter, node, path, made, heads), projection_of(path, made)


def _mixed_keys(rewriter: Rewriter, node: fx.Node, merge: Merge) -> fx.Node:
    """Return keys of t heads side by side times their mix, `[B, groups, S, D]`."""
    _mark_source(rewriter, node, 1)
    keys = _ordered(rewriter, node, node.args[1], merge.order)
    kind = keys.meta["type"]
    groups, joined, dim = merge.key.down.shape
    name = f"{rewriter.pass_name.replace('-', '_')}.key_{node.kwargs['layer']}"
    rewriter.set_weight(name, merge.key.down.to(_device(rewriter), kind.dtype))

    def call(target: Any, args: tuple[Any, ...], shape: tuple[int | str, ...]) -> fx.Node:
        type_ = TensorType(kind.dtype, shape)
        return rewriter.call_before(node, target, args, type_=type_, like=keys)

    batch, heads, tokens, _ = kind.shape
    apart = call(aten.transpose.int, (keys, 1, 2), (batch, tokens, heads, dim))
    split = [*size_nodes(rewriter, node), groups, joined]
    together = call(aten.reshape.default, (apart, split), (batch, tokens, groups, joined))
    moved = call(aten.transpose.int, (together, 1, 2), (batch, groups, tokens, joined))
    weight = rewriter.get_weight_node(name, node, TensorType(kind.dtype, (groups, joined, dim)))
    return call(aten.matmul.default, (moved, weight), (batch, groups, tokens, dim))


def _met_queries(rewriter: Rewriter, node: fx.Node, merge: Merge) -> fx.Node:
    """Return queries times what is read of the head that they read, `[B, H, S, D]`."""
    _mark_source(rewriter, node, 0)
    queries = _ordered(rewriter, node, node.args[0], merge.order)
    kind = queries.meta["type"]
    name = f"{rewriter.pass_name.replace('-', '_')}.query_{node.kwargs['layer']}"
    rewriter.set_weight(name, merge.key.up.to(_device(rewriter), kind.dtype).contiguous())
    type_ = TensorType(kind.dtype, tuple(merge.key.up.shape))
    weight = rewriter.get_weight_node(name, node, type_)
    return rewriter.call_before(node, kvx.ROTATE, (queries, weight), type_=kind, like=queries)


def _mark_source(rewriter: Rewriter, node: fx.Node, index: int) -> None:
    """Let healing train what makes an operand, where that is known: it now makes a mix."""
    operand = node.args[index]
    assert isinstance(operand, fx.Node), "operands of attention are nodes"
    path = read_path(rewriter.program, operand, operand.meta["type"].shape[1])
    if isinstance(path, HeadPath):
        rewriter.mark_touched(filter(None, (path.linear.weight, path.linear.bias)))


def _ordered(rewriter: Rewriter, node: fx.Node, x: Any, order: tuple[int, ...]) -> fx.Node:
    """Return heads `[B, n, S, D]` in the order of KV heads."""
    assert isinstance(x, fx.Node), "operands of attention are nodes"
    if order == tuple(sorted(order)):
        return x
    heads = x.meta["type"].shape[1]
    index = in_order(torch.arange(heads), order).to(_device(rewriter))
    name = f"{rewriter.pass_name.replace('-', '_')}.order_{heads}_{node.kwargs['layer']}"
    rewriter.set_weight(name, index)
    weight = rewriter.get_weight_node(name, node, TensorType(index.dtype, (heads,)))
    type_ = x.meta["type"]
    args = (x, 1, weight)
    return rewriter.call_before(node, aten.index_select.default, args, type_=type_, like=x)


def _fold_output(rewriter: Rewriter, site: AttentionSite, merge: Merge) -> None:
    """Let W_o read what is stored of values instead of values."""
    assert site.o is not None, "match has looked"
    weight = rewriter.program.weights[site.o.weight]
    axis = 1 if site.o.layout == "out_in" else 0
    rows = in_order(output_rows(rewriter.program, site), merge.order)
    changed = reading_rows(rows, merge.value).flatten(0, 1).to(weight)
    index = site.o.indices(site.num_q_heads, site.v_head_dim).flatten().to(weight.device)
    rewriter.set_weight(site.o.weight, weight.index_copy(axis, index, changed.movedim(0, axis)))


def _order_options(rewriter: Rewriter, node: fx.Node, site: AttentionSite, merge: Merge) -> None:
    """Put what an attention has for each query head in the new order."""
    for option in PER_HEAD:
        old = getattr(site, option)
        if old is None or merge.is_sorted:
            continue
        name = f"{rewriter.pass_name.replace('-', '_')}.{option}_{site.layer}"
        rewriter.set_weight(name, in_order(rewriter.program.weights[old], merge.order))
        values = rewriter.program.weights[name]
        type_ = TensorType(values.dtype, tuple(values.shape))
        moved: dict[str, Any] = {option: rewriter.get_weight_node(name, node, type_)}
        rewriter.set_args(node, **moved)
        rewriter.update_site(site.layer, **{option: name})


def _path(rewriter: Rewriter, node: fx.Node, index: int, heads: int) -> HeadPath:
    operand = node.args[index]
    assert isinstance(operand, fx.Node), "operands of attention are nodes"
    path = read_path(rewriter.program, operand, heads)
    assert isinstance(path, HeadPath), "match has looked"
    return path


def _device(rewriter: Rewriter) -> torch.device:
    return next(iter(rewriter.program.weights.values())).device
