"""Emit `kvx::cache_append` and `kvx::cached_attention` as one `com.microsoft.PagedAttention`.

The operator writes new keys and values into blocks, encoded where the plan says so, and attends
over what it has written: a query reads its own token back from its code, as every lowering has it.
Where queries and keys come straight from one `kvx::rope`, the operator turns them too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
from torch import fx

from kvxform.codegen.onnx.block_formats import BlockFormat, block_format
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.fused_rope import FusedRope, before_rope, fuse_rope
from kvxform.codegen.onnx.paged_ports import enter_blocks, leave_blocks
from kvxform.codegen.onnx.parts import Scoring
from kvxform.ir.plan import SitePlan
from kvxform.ir.stream_plan import StreamPlan


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
    k, rope = new.k, fuse_rope(e, node.args[0], new.k_node)
    if rope is not None:
        q, k = before_rope(q), before_rope(k)
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
        *((None, None) if rope is None else rope.tables),
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
    rope: FusedRope | None,
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
        found |= rope.attributes
    for side, format_ in (("k", key), ("v", value)):
        if format_.element:
            found[f"{side}_quant_type"] = format_.granularity
            found[f"{side}_cache_dtype"] = format_.element
    return found


def _format_of(e: Emission, plan: StreamPlan) -> BlockFormat:
    found = block_format(plan, e.program.dtype)
    assert found is not None, "checked by the table of levels"
    return found


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
