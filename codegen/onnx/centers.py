"""Means of channels outside of attention operators, which know scales and nothing else.

Codec `static-int` may take the mean c of each channel away before it encodes. The operators get
`k - c` and `v - c`, which gives the same bytes. What that does to attention:

- a constant that is taken from all keys takes `q . c` from all scores of a query, and softmax does
  not see that, unless scores are capped or share their softmax with a sink;
- probabilities sum to one, so that values come back by adding c to what attention returns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor, fx

from kvxform.codecs.base import make_codec
from kvxform.codecs.static_int import StaticIntCodec
from kvxform.codegen.onnx.center_rules import has_center
from kvxform.codegen.onnx.head_rows import flat_source, merged_heads, node_of
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import StreamPlan
from kvxform.ir.types import TensorType
from kvxform.pass_base import Rewriter

aten = torch.ops.aten
MADE_BY = "quantize-kv"  # the pass whose codec the new nodes belong to


def lift_centers(program: Program) -> Program:
    """Return `program` with the means of codecs as operations of its graph; itself if it has none.

    Args:
        program: One whose sites all have caches of their own, and `are_centers_free`.
    """
    assert program.plan is not None, "checked"
    sites = [site for site in program.plan.sites if any(map(has_center, site.streams.values()))]
    if not sites:
        return program
    rewriter = Rewriter(program.clone(), MADE_BY)
    for site in sites:
        for name, stream in site.streams.items():
            if has_center(stream):
                _lift(rewriter, site, name, stream)
    return rewriter.program


def _lift(rewriter: Rewriter, site: SitePlan, name: str, stream: StreamPlan) -> None:
    program, layer = rewriter.program, site.layer
    codec = make_codec(stream.codec)
    assert isinstance(codec, StaticIntCodec), "has_center"
    means = codec.offsets(stream.head_dim)  # [Hk, 1, D]
    append, index = program.append_node(layer), ("key", "value").index(name)
    assert append is not None, "the site has a cache of its own"
    heads = node_of(append.args[index])
    rows, label = flat_source(heads), f"model.layers.{layer}.attn.{name[0]}_mean"
    if rows is not None and len(rows.users) == 1:
        _shift(rewriter, rows, means.flatten(), label, -1)
    else:
        _shift(rewriter, heads, means, label, -1, [append])
    if name == "value":
        attention, label = program.attention_node(layer), f"model.layers.{layer}.attn.output_mean"
        of_queries = means.repeat_interleave(site.num_q_heads // site.num_kv_heads, 0)
        merged = merged_heads(attention)
        if len(merged) == len(attention.users) == 1:
            _shift(rewriter, merged[0], of_queries.flatten(), label, 1)
        else:
            _shift(rewriter, attention, of_queries, label, 1)
    plain = dataclasses.replace(codec, center=False, offset=None)
    rewriter.update_site_plan(layer, **{name: dataclasses.replace(stream, codec=plain.to_dict())})


def _shift(
    rewriter: Rewriter,
    x: fx.Node,
    means: Tensor,
    name: str,
    sign: int,
    readers: Sequence[fx.Node] | None = None,
) -> None:
    """Let readers of `x`, all of them if None, read `x + sign * means`."""
    kind, found = x.meta["type"], list(x.users) if readers is None else readers
    rewriter.set_weight(name, means.to(kind.dtype))
    target = aten.add.Tensor if sign > 0 else aten.sub.Tensor
    weight = rewriter.get_weight_node(name, x.next, TensorType(kind.dtype, tuple(means.shape)))
    moved = rewriter.call_after(weight, target, (x, weight), type_=kind, like=x)
    for reader in found:
        reader.replace_input_with(x, moved)
