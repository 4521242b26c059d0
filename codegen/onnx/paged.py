"""Emit `kvx::cache_append` and `kvx::cached_attention` as one `com.microsoft.PagedAttention`.

The operator writes new keys and values into blocks, which are its input and its output. It takes
the tokens of all sequences one after the other, `[num_tokens, H * D]`.
"""

from __future__ import annotations

import onnx_ir as ir
from torch import fx

from kvxform.codegen.onnx.contrib import Attributes, ContribAttention, NewNodes
from kvxform.codegen.onnx.emission import Emission
from kvxform.codegen.onnx.forms import MICROSOFT
from kvxform.codegen.onnx.head_rows import dtype_of_value, heads_of, operand_rows
from kvxform.codegen.onnx.paged_ports import enter_blocks, leave_blocks
from kvxform.codegen.onnx.parts import Scoring
from kvxform.ir.plan import SitePlan


def attend_paged(
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
        `[1, H, num_tokens, D]`.
    """
    assert e.paged is not None, "the inputs are those of a paged cache"
    b, paged, first = e.builder, e.paged, e.builder.const([0])
    found = ContribAttention.of(e, node, site, new, scoring)
    formats = found.formats
    rows = operand_rows(e, found.operands)  # [1, num_tokens, H * D] each
    dtype = dtype_of_value(e, found.operands[0])
    y, *present = b.ops(
        "PagedAttention",
        *(None if x is None else b.op("Squeeze", x, first) for x in rows),
        *(enter_blocks(e.ports, site, n, f.dtype, f.width) for n, f in formats.items()),
        *(paged.bounds, paged.past, paged.table),
        *found.tables,
        None,  # where tokens are written follows from the table
        scoring.sink_logits,
        *(None, None),  # norms of queries and keys are nodes of their own
        *found.scales(e, axes=3),
        paged.metadata,
        dtypes=[dtype, *(f.dtype for f in formats.values())],
        role="paged_attention",
        domain=MICROSOFT,
        **_attributes(found),
    )
    for name, value in zip(formats, present, strict=True):
        leave_blocks(e.ports, site, name, value)
    return heads_of(e, node, b.op("Unsqueeze", y, first))


def _attributes(attention: ContribAttention) -> Attributes:
    elements: Attributes = {
        f"{side}_cache_dtype": f.element for side, f in attention.sides if f.element
    }
    return attention.attributes | elements
