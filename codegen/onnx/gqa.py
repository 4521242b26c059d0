"""Emit `kvx::cache_append` and `kvx::cached_attention` as one `com.microsoft.GroupQueryAttention`.

The operator appends to buffers that are its input and its output. It takes queries, keys and
values as rows of all heads, `[B, S, H * D]`, as linear layers make them. Where one product makes
all three, it takes that product.
"""

from __future__ import annotations

import onnx_ir as ir
from torch import fx

from kvxform.codegen.onnx.contrib import Attributes, ContribAttention, NewNodes
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.gqa_prompts import (
    GroupedCall,
    attend_by_length,
    has_prompt_branch,
)
from kvxform.codegen.onnx.head_rows import dtype_of_value, heads_of, operand_rows
from kvxform.codegen.onnx.parts import Scoring
from kvxform.ir.plan import SitePlan

INT32 = ir.DataType.INT32
ROLE = "group_query_attention"
BITS = {"int8": 8, "int4": 4}  # by element of a `BlockFormat`


def attend_grouped(
    e: Emission, node: fx.Node, site: SitePlan, new: NewNodes, scoring: Scoring
) -> ir.Value:
    """Emit append and attention of one layer.

    Args:
        e: The emission.
        node: The attention node.
        site: The layer.
        new: What is appended.
        scoring: Options of the attention.

    Returns:
        `[B, H, S, D]`.
    """
    found = ContribAttention.of(e, node, site, new, scoring)
    planes = {name: site.streams[name].planes[0].name for name in found.formats}
    call = GroupedCall(
        (
            *operand_rows(e, found.operands),
            *(e.ports.enter(site, name)[plane] for name, plane in planes.items()),
            *_lengths(e),
            *found.tables,
            *(None, None),  # positions follow from lengths, and nothing is added to scores
            scoring.sink_logits,
            *found.scales(e, axes=4),
        ),
        (dtype_of_value(e, found.operands[0]), *(f.dtype for f in found.formats.values())),
        _attributes(found),
    )
    if has_prompt_branch(e, found):
        y, *present = attend_by_length(e, found, call)
    else:
        y, *present = call.emit(e.builder, ROLE)
    for (name, plane), value in zip(planes.items(), present, strict=True):
        e.ports.leave(site, name, plane, value)
    return heads_of(e, node, y)


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


def _attributes(attention: ContribAttention) -> Attributes:
    elements = [f.element for f in attention.formats.values() if f.element]
    bits: Attributes = {"kv_cache_bit_width": BITS[elements[0]]} if elements else {}
    return attention.attributes | bits
