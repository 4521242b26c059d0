"""Streams whose basis is undone when they are read.

New vectors pass through one product right before they are appended, and what attention reads passes
through its inverse. So a basis may run over several KV heads, it need not be orthogonal, and keys
may be cached before RoPE. The price is one product for every cached vector in every step.
"""

from __future__ import annotations

from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis
from kvxform.ir.facts import Requirement
from kvxform.ir.types import TensorType
from kvxform.pass_base import Rewriter
from kvxform.rotations.keys import set_matrices

STREAMS = ("key", "value")  # the order of operands of an append
AS_IN_THE_SOURCE = (  # of passes that choose a basis and a codec from statistics
    Requirement("cache.inserted", (True,), because="there would be no cache to encode yet"),
    Requirement("k.codec", ("none",), because="codes cannot change their basis"),
    Requirement("v.codec", ("none",), because="codes cannot change their basis"),
    Requirement("k.basis", ("identity",), because="the statistics are those of the source"),
    Requirement("v.basis", ("identity",), because="the statistics are those of the source"),
)


def turn_at_read(
    rewriter: Rewriter, layer: int, stream: str, forward: Tensor, inverse: Tensor
) -> None:
    """Store one stream of an owner in a basis that its readers undo, and record the basis.

    Args:
        rewriter: Changes the program, which has a cache.
        layer: Layer that owns the stream.
        stream: `key` or `value`.
        forward: Stored = x @ forward, over runs of g heads, `[Hk / g, g D, g D]`.
        inverse: Inverses of `forward`.
    """
    program, index = rewriter.program, STREAMS.index(stream)
    prefix = f"{rewriter.pass_name.replace('-', '_')}.{stream}_{layer}"
    weight, back = f"{prefix}_in", f"{prefix}_out"
    set_matrices(rewriter, weight, forward)
    set_matrices(rewriter, back, inverse)
    heads = program.site(layer).num_kv_heads // len(forward)
    basis = Basis("matrix", weight=weight, heads=heads, inverse=back)
    append = program.append_node(layer)
    assert append is not None, "an owner appends"
    new = append.args[index]
    assert isinstance(new, fx.Node), "operands of an append are nodes"
    operands = (new, _weight(rewriter, append, weight))
    type_ = new.meta["type"]
    turned = rewriter.call_before(append, kvx.ROTATE, operands, type_=type_, like=new)
    rewriter.set_args(append, (*append.args[:index], turned, *append.args[index + 1 :]))
    for reader in program.readers(layer):
        attention = program.attention_node(reader.layer)
        undo = _weight(rewriter, attention, back)
        if stream == "key":
            rewriter.set_args(attention, key_basis=undo)
            rewriter.set_basis(reader.layer, key=basis)
        else:
            rewriter.set_args(attention, value_basis=undo)
            rewriter.set_basis(reader.layer, value=basis)


def heads_together(num_heads: int, most: float) -> int:
    """Return the largest number of heads, at most `most` or one, that divides `num_heads`."""
    return max(n for n in range(1, num_heads + 1) if num_heads % n == 0 and n <= max(1, most))


def _weight(rewriter: Rewriter, anchor: fx.Node, name: str) -> fx.Node:
    matrices = rewriter.program.weights[name]
    type_ = TensorType(matrices.dtype, tuple(matrices.shape))
    return rewriter.get_weight_node(name, anchor, type_)
