"""Emit `kvx::cache_append` and `kvx::cached_attention` as one `com.microsoft.GroupQueryAttention`.

The operator appends to buffers that are its input and its output, encodes what it appends where the
plan says so, and reads every token back from the buffers, its own one too: the same step rule as in
every lowering. It takes queries, keys and values as rows of all heads, `[B, S, H * D]`, as linear
layers make them, so heads are not moved to and fro. Where one product makes all three, it takes
that product. Where RoPE is the last that is done to queries and keys, it does RoPE as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch
from torch import fx

from kvxform.codegen.onnx.block_formats import BlockFormat, block_format
from kvxform.codegen.onnx.emission import Emission, type_of
from kvxform.codegen.onnx.forms import MICROSOFT
from kvxform.codegen.onnx.fused_rope import FusedRope, fuse_rope
from kvxform.codegen.onnx.parts import Scoring
from kvxform.ir.linear import RESHAPES
from kvxform.ir.plan import SitePlan

aten = torch.ops.aten
INT32 = ir.DataType.INT32
BITS = {"int8": 8, "int4": 4}  # by element of a `BlockFormat`


@dataclass(frozen=True)
class GroupedTokens:
    """The graph nodes of new keys and values, which the attention of their layer appends."""

    k: fx.Node
    v: fx.Node


def append_grouped(e: Emission, node: fx.Node, layer: int) -> None:
    """Leave the keys and values of a cache_append node to the attention of their layer."""
    k, v = node.args[:2]
    assert isinstance(k, fx.Node), "keys come from the graph"
    assert isinstance(v, fx.Node), "the table of levels asks for values"
    e.caches[layer] = GroupedTokens(k, v)


def attend_grouped(
    e: Emission, node: fx.Node, site: SitePlan, new: GroupedTokens, scoring: Scoring
) -> ir.Value:
    """Emit append and attention of one layer.

    Args:
        e: The emission.
        node: The attention node.
        site: The layer.
        new: What is appended.
        scoring: Options of the attention.

    Returns:
        `[B, H, S, D]`. Where the graph goes on to put heads side by side, that is done already.
    """
    b, operands = e.builder, [_node(node.args[0]), new.k, new.v]
    rope = fuse_rope(e, *operands[:2])
    if rope is not None:
        operands[:2] = [_node(x.args[0]) for x in operands[:2]]
    formats = {name: _format_of(e, site, name) for name in site.streams}
    planes = {name: site.streams[name].planes[0].name for name in formats}
    y, *present = b.ops(
        "GroupQueryAttention",
        *(_packed_rows(e, operands) or [_rows(e, x) for x in operands]),
        *(e.ports.enter(site, name)[plane] for name, plane in planes.items()),
        *_lengths(e),
        *((None, None) if rope is None else rope.tables),
        *(None, None),  # positions follow from lengths, and nothing is added to scores
        scoring.sink_logits,
        *(_scales(e, site, name, format_) for name, format_ in formats.items()),
        dtypes=[type_of_value(e, operands[0]), *(f.dtype for f in formats.values())],
        role="group_query_attention",
        domain=MICROSOFT,
        **_attributes(site, formats, scoring, rope),
    )
    for (name, plane), value in zip(planes.items(), present, strict=True):
        e.ports.leave(site, name, plane, value)
    for merged in _merged_heads(node):
        e.ready[merged] = y
    apart = b.op("Reshape", y, b.const([0, 0, site.num_q_heads, site.value.head_dim]))
    return b.op("Transpose", apart, perm=[0, 2, 1, 3])


def lengths_after(e: Emission) -> ir.Value:
    """Return the tokens of each row after this call, less one, int32 `[B]`."""

    def make() -> ir.Value:
        b = e.builder
        counts = b.op("ReduceSum", e.inputs.attention_mask, b.const([1]), keepdims=0)
        return b.cast(b.op("Sub", counts, b.const([1])), INT32)

    return e.shared(("last slots",), make)


def _lengths(e: Emission) -> tuple[ir.Value, ir.Value]:
    """Return the last slot of each row, and the number of columns of the mask as a scalar."""

    def make() -> ir.Value:
        columns = e.dim(e.inputs.attention_mask, 1)
        return e.builder.cast(e.builder.op("Squeeze", columns), INT32)

    return lengths_after(e), e.shared(("columns",), make)


def _attributes(
    site: SitePlan,
    formats: Mapping[str, BlockFormat],
    scoring: Scoring,
    rope: FusedRope | None,
) -> dict[str, int | float | str]:
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
    for side, format_ in zip("kv", formats.values(), strict=True):
        if format_.element:
            found[f"{side}_quant_type"] = format_.granularity
            found["kv_cache_bit_width"] = BITS[format_.element]
    return found


def _format_of(e: Emission, site: SitePlan, stream: str) -> BlockFormat:
    found = block_format(site.streams[stream], e.program.dtype)
    assert found is not None, "checked by the table of levels"
    return found


def _scales(e: Emission, site: SitePlan, stream: str, format_: BlockFormat) -> ir.Value | None:
    """Return the scales of a stream, float32 `[1]` or `[1, Hk, 1, D]`; None if it has none."""
    scale = format_.scale
    if scale is None:
        return None
    scale = scale if format_.granularity == "PER_TENSOR" else scale[None]
    return e.builder.tensor(f"model.layers.{site.layer}.attn.{stream[0]}_scale", scale)


def _rows(e: Emission, node: fx.Node) -> ir.Value:
    """Return heads `[B, H, S, D]` as rows `[B, S, H * D]`."""
    b, flat = e.builder, _flat_source(node)
    if flat is not None:
        return _value(e, flat)
    tokens_first = b.op("Transpose", _value(e, node), perm=[0, 2, 1, 3])
    _, heads, _, width = type_of(node).shape
    return b.op("Reshape", tokens_first, b.const([0, 0, int(heads) * int(width)]))


def _packed_rows(e: Emission, nodes: list[fx.Node]) -> list[ir.Value | None] | None:
    """Return `[q | k | v]` as one value, where they are neighbouring slices of it."""
    slices = [_flat_source(node) for node in nodes]
    end, joint = 0, None
    for part in slices:
        if part is None or part.target is not aten.slice.Tensor or len(part.args) != 4:
            return None
        source, axis, start, stop = part.args
        if axis not in (2, -1) or start != end or joint not in (None, source):
            return None
        assert isinstance(stop, int), "slices of features have constant bounds"
        joint, end = source, stop
    if end != type_of(_node(joint)).shape[-1]:
        return None
    return [_value(e, _node(joint)), None, None]


def _flat_source(node: fx.Node) -> fx.Node | None:
    """Return the rows `[B, S, H * D]` that were split into heads `[B, H, S, D]`, if that is all."""
    if not _swaps_heads_and_tokens(node):
        return None
    split = _node(node.args[0])
    if split.target not in RESHAPES:
        return None
    source, (batch, heads, tokens, width) = _node(split.args[0]), type_of(node).shape
    is_row = type_of(source).shape == (batch, tokens, int(heads) * int(width))
    return source if is_row else None


def _merged_heads(node: fx.Node) -> list[fx.Node]:
    """Return the nodes that are heads `[B, H, S, D]` of `node` put side by side, and nothing else."""
    batch, heads, tokens, width = type_of(node).shape
    rows, found = (batch, tokens, int(heads) * int(width)), []
    for user in node.users:
        if user.target in RESHAPES and type_of(user).shape == type_of(node).shape:
            found += _merged_heads(user)
        elif _swaps_heads_and_tokens(user):
            merges = [x for x in user.users if x.target in RESHAPES]
            found += [x for x in merges if type_of(x).shape == rows]
    return found


def _swaps_heads_and_tokens(node: fx.Node) -> bool:
    if node.target is aten.permute.default:
        return list(node.args[1]) == [0, 2, 1, 3]  # type: ignore[arg-type]
    return node.target is aten.transpose.int and {a % 4 for a in node.args[1:]} == {1, 2}  # type: ignore[operator]


def _value(e: Emission, node: fx.Node) -> ir.Value:
    found = e.values[node]
    assert isinstance(found, ir.Value), f"{node.name} yields one tensor"
    return found


def type_of_value(e: Emission, node: fx.Node) -> ir.DataType:
    """Return the dtype of what a node was emitted as."""
    found = _value(e, node).dtype
    assert found is not None, "graph values have a dtype"
    return found


def _node(x: object) -> fx.Node:
    assert isinstance(x, fx.Node), "operands come from the graph"
    return x
