"""Means of channels outside of attention operators, which know scales and nothing else.

Codec `static-int` may take the mean c of each channel away before it encodes. The operators get
`k - c` and `v - c`, which gives the same bytes. What that does to attention:

- a constant that is taken from all keys takes `q . c` from all scores of a query, and softmax does
  not see that, unless scores are capped or share their softmax with a sink;
- probabilities sum to one, so that values come back by adding c to what attention returns.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, fx

from kvxform.codecs.base import make_codec
from kvxform.codecs.static_int import StaticIntCodec
from kvxform.ir.plan import SitePlan
from kvxform.ir.program import Program
from kvxform.ir.stream_plan import StreamPlan
from kvxform.ir.types import TensorType
from kvxform.pass_base import Rewriter

aten = torch.ops.aten
MADE_BY = "quantize-kv"  # the pass whose codec the new nodes belong to


def has_center(stream: StreamPlan) -> bool:
    """Whether the codec of a stream takes means away."""
    codec = make_codec(stream.codec)
    return isinstance(codec, StaticIntCodec) and codec.center


def are_centers_free(program: Program, site: SitePlan) -> bool:
    """Whether means can be left to the graph around the attention of a site."""
    options = program.attention_node(site.layer).kwargs
    is_plain = not options.get("softcap") and program.site(site.layer).sink_logits is None
    return is_plain or not any(map(has_center, site.streams.values()))


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
    append, index = program.append_node(layer), ("key", "value").index(name)
    assert append is not None, "the site has a cache of its own"
    source = append.args[index]
    assert isinstance(source, fx.Node), "keys and values come from the graph"
    means = codec.offsets(stream.head_dim)  # [Hk, 1, D]
    moved = _shift(rewriter, append, source, means, f"layers.{layer}.attn.{name}_mean", -1)
    rewriter.set_args(append, (*append.args[:index], moved, *append.args[index + 1 :]))
    if name == "value":
        attention = program.attention_node(layer)
        of_queries = means.repeat_interleave(site.num_q_heads // site.num_kv_heads, 0)
        users, label = list(attention.users), f"layers.{layer}.attn.output_mean"
        whole = _shift(rewriter, attention.next, attention, of_queries, label, 1)
        for user in users:
            user.replace_input_with(attention, whole)
    plain = dataclasses.replace(codec, center=False, offset=None)
    rewriter.update_site_plan(layer, **{name: dataclasses.replace(stream, codec=plain.to_dict())})


def _shift(
    rewriter: Rewriter, anchor: fx.Node, x: fx.Node, means: Tensor, name: str, sign: int
) -> fx.Node:
    """Return `x + sign * means`, right before `anchor`."""
    kind = x.meta["type"]
    rewriter.set_weight(name, means.to(kind.dtype))
    weight = rewriter.get_weight_node(name, anchor, TensorType(kind.dtype, tuple(means.shape)))
    target = aten.add.Tensor if sign > 0 else aten.sub.Tensor
    return rewriter.call_before(anchor, target, (x, weight), type_=kind, like=x)
