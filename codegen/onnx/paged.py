"""Emit `kvx::cache_append` and `kvx::cached_attention` as one `com.microsoft.PagedAttention`.

The operator writes new keys and values into blocks, encoded where the plan says so, and attends
over what it has written: a query reads its own token back from its code, as every lowering has it.
Where queries and keys come straight from one `kvx::rope`, the operator turns them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codegen.onnx.block_formats import BlockFormat, block_format
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.paged_ports import enter_blocks, leave_blocks
from kvxform.codegen.onnx.parts import Scoring
from kvxform.ir.plan import SitePlan
from kvxform.ir.stream_plan import StreamPlan

TABLE_BYTES = 1 << 28  # larger tables of cosines are not stored: positions are turned in the graph


@dataclass(frozen=True)
class PagedTokens:
    """New keys and values, which the attention of their layer appends.

    Attributes:
        k_node: The graph node of the keys.
        k: Keys `[1, Hk, num_tokens, D]`.
        v: Values, likewise.
    """

    k_node: fx.Node
    k: ir.Value
    v: ir.Value


def append_paged(e: Emission, node: fx.Node, layer: int, k: ir.Value, v: ir.Value) -> None:
    """Leave new keys and values to the attention of their layer."""
    k_node = node.args[0]
    assert isinstance(k_node, fx.Node), "keys come from the graph"
    e.caches[layer] = PagedTokens(k_node, k, v)


def attend_paged(
    e: Emission,
    node: fx.Node,
    site: SitePlan,
    q: ir.Value,
    new: PagedTokens,
    scoring: Scoring,
) -> ir.Value:
    """Emit append and attention of one layer.

    Args:
        e: The emission.
        node: The attention node.
        site: The layer.
        q: Queries `[1, H, num_tokens, D]`.
        new: What is appended.
        scoring: Options of the attention.

    Returns:
        `[1, H, num_tokens, D]`.
    """
    assert e.paged is not None, "the inputs are those of a paged cache"
    b, width = e.builder, site.key.head_dim
    tables: tuple[ir.Value | None, ir.Value | None] = (None, None)
    rope = _common_rope(e, node.args[0], new.k_node)
    k = new.k
    if rope is not None:
        q, k = (_before_rope(x) for x in (q, k))
        tables = _rotary_tables(e, rope)
    formats = {name: _format_of(e, plan) for name, plan in site.streams.items()}
    past = {n: enter_blocks(e.ports, site, n, f.dtype, f.width) for n, f in formats.items()}
    queries = _rows_of_heads(e, q, site.num_q_heads * width)
    keys, values = (_rows_of_heads(e, x, site.num_kv_heads * width) for x in (k, new.v))
    sinks, scales = scoring.sink_logits, [f.scale for f in formats.values()]
    y, *present = b.ops(
        "PagedAttention",
        *(queries, keys, values),
        *(past["key"], past["value"]),
        *(e.paged.bounds, e.paged.past, e.paged.table),
        *tables,
        None,  # where tokens are written follows from the table
        None if sinks is None else b.cast(sinks, _dtype(queries)),
        *(None, None),  # norms of queries and keys are nodes of their own
        *(None if scale is None else b.table(scale) for scale in scales),
        e.paged.metadata,
        dtypes=[q.dtype, *(f.dtype for f in formats.values())],
        role="paged_attention",
        domain="com.microsoft",
        **_attributes(site, formats, scoring, rope),
    )
    for name, value in zip(formats, present, strict=True):
        leave_blocks(e.ports, site, name, value)
    apart = b.op("Reshape", y, b.const([1, -1, site.num_q_heads, width]))
    return b.op("Transpose", apart, perm=[0, 2, 1, 3])


def _attributes(
    site: SitePlan,
    formats: Mapping[str, BlockFormat],
    scoring: Scoring,
    rope: fx.Node | None,
) -> dict[str, int | float | str]:
    key, value = formats["key"], formats["value"]
    found: dict[str, int | float | str] = {
        "num_heads": site.num_q_heads,
        "kv_num_heads": site.num_kv_heads,
        "scale": scoring.scale,
    }
    if scoring.span.window is not None:
        found["local_window_size"] = scoring.span.window
    if scoring.softcap is not None:
        found["softcap"] = scoring.softcap
    if rope is not None:
        interleaved = bool(rope.kwargs.get("interleaved", False))
        found |= {"do_rotary": 1, "rotary_interleaved": int(interleaved)}
    for side, format_ in (("k", key), ("v", value)):
        if format_.element:
            found[f"{side}_quant_type"] = format_.granularity
            found[f"{side}_cache_dtype"] = format_.element
    return found


def _format_of(e: Emission, plan: StreamPlan) -> BlockFormat:
    found = block_format(plan, e.program.dtype)
    assert found is not None, "checked by the table of levels"
    return found


def _common_rope(e: Emission, q: Any, k: fx.Node) -> fx.Node | None:
    """Return the `kvx::rope` of the keys, if that of the queries is alike and a table can be made.

    The table has a row for each position of the context.
    """
    if q.target is not kvx.ROPE or k.target is not kvx.ROPE or q.kwargs != k.kwargs:
        return None
    inv_freq, context = k.args[2], e.program.info.context_length
    assert isinstance(inv_freq, fx.Node), "frequencies come from the graph"
    is_weight = inv_freq.op == "get_attr" and q.args[2].target == inv_freq.target
    at = e.program.placeholder("position_ids")
    if not is_weight or q.args[1] is not at or k.args[1] is not at or context is None:
        return None
    turned = int(k.kwargs["rotary_dim"])  # type: ignore[arg-type]
    fits = turned % 16 == 0 and context * turned * e.program.dtype.itemsize <= TABLE_BYTES
    return k if fits else None


def _before_rope(x: ir.Value) -> ir.Value:
    node = x.producer()
    assert node is not None, "made by kvx::rope"
    assert node.op_type == "RotaryEmbedding", node.op_type
    return _source(node)


def _rotary_tables(e: Emission, rope: fx.Node) -> tuple[ir.Value, ir.Value]:
    """Return cosines and sines of all positions, each `[context, rotary_dim / 2]`."""
    source, context = rope.args[2], e.program.info.context_length
    assert isinstance(source, fx.Node), "checked"
    assert context is not None, "checked"
    name = e.weights.name(str(source.target))
    inv_freq = e.program.weights[name]
    scaling = float(rope.kwargs.get("attention_scaling", 1.0))  # type: ignore[arg-type]
    found = []
    for kind, function in (("cos", torch.cos), ("sin", torch.sin)):
        at = torch.arange(context).to(inv_freq.dtype)
        table = function(at[:, None] * inv_freq) * scaling
        full = f"{name}/{kind}/scaling={scaling}/positions={context}"
        found.append(e.builder.tensor(full, table.to(e.program.dtype)))
    return found[0], found[1]


def _rows_of_heads(e: Emission, x: ir.Value, width: int) -> ir.Value:
    """Return `[1, heads, num_tokens, D]` as `[num_tokens, heads * D]`.

    Heads that have just been split from such rows are not moved to and fro.
    """
    node, sizes = x.producer(), e.builder.const([-1, width])
    if node is not None and node.op_type == "Transpose" and _is_turn(node):
        x = _source(node)
        node = x.producer()
        if node is not None and node.op_type == "Reshape":
            x = _source(node)
        return e.builder.op("Reshape", x, sizes)
    tokens_first = e.builder.op("Transpose", x, perm=[0, 2, 1, 3])
    return e.builder.op("Reshape", tokens_first, sizes)


def _is_turn(node: ir.Node) -> bool:
    return list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


def _source(node: ir.Node) -> ir.Value:
    found = node.inputs[0]
    assert found is not None, "the first input is there"
    return found


def _dtype(x: ir.Value) -> ir.DataType:
    assert x.dtype is not None, "values have a dtype"
    return x.dtype
