"""Latent attention: find the narrow vector that K and V of all heads are made from, and prove it.

A raised attention is a candidate if its values come from a linear layer, and if its keys, too, are
computed from the input of that layer and from one other node. Which channels of the keys that other
node makes is measured, and so is which rows of which weight make the rest. Then keys are written in
the form that `ir.latent` describes, and compared on random input with the old ones and with what
the rows of the weights say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.capture.emitting import HeadEmitter, insert
from kvxform.capture.heads import Axes, find_stride, from_rows, num_features, read_index
from kvxform.capture.latent_rope import join_heads, raise_latent_rope
from kvxform.capture.probing import Prober, Setting, error, is_close
from kvxform.capture.projections import LinearNode, read_linear
from kvxform.capture.refusal import NotRaisedError
from kvxform.capture.structure import (
    ancestors,
    chain_back,
    content_inputs,
    is_transparent,
    shape_of,
    tensor_type,
)
from kvxform.ir.latent import EXPAND
from kvxform.ir.program import AttentionSite, LatentSpec, Projection

_SETTING = Setting.first(5, batch=2)


@dataclass(frozen=True)
class Latent:
    """A candidate, not proved yet.

    Attributes:
        node: The raised attention.
        spec: What it is believed to be.
        latent: Node of the latent, `[B, S, rank]` or `[B, 1, S, rank]`.
        up_k: Linear layer that makes the keys' own channels.
        index: Output of `up_k` that channel d of head h is, `[Hk, head_dim - rope_dim]`.
        shared: Node that the shared part is picked from, before a raised RoPE.
        shared_index: Its features, `[rope_dim]`.
    """

    node: fx.Node
    spec: LatentSpec
    latent: fx.Node
    up_k: fx.Node
    index: Tensor
    shared: fx.Node
    shared_index: Tensor


def raise_latents(prober: Prober, sites: Sequence[AttentionSite]) -> list[AttentionSite]:
    """Return `sites` with `latent` filled in where it was proved; rewrites keys there."""
    nodes = {node.kwargs["layer"]: node for node in _attentions(prober.graph)}
    return [_raise(prober, site, nodes[site.layer]) for site in sites]


def _attentions(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target is kvx.ATTENTION]


def _raise(prober: Prober, site: AttentionSite, node: fx.Node) -> AttentionSite:
    try:
        found = propose_latent(prober, site, node)
        if found is None:
            return site
        new = write_keys(prober, found)
        prove_latent(prober, found, new, site)
    except NotRaisedError as refusal:
        note = f"keys and values of each head are cached, not their latent: {refusal.reason}"
        return replace(site, notes=(*site.notes, note))
    q, _, *rest = node.args
    node.args = (q, new, *rest)
    prober.refresh()
    return raise_latent_rope(prober, replace(site, latent=found.spec), node)


def propose_latent(prober: Prober, site: AttentionSite, node: fx.Node) -> Latent | None:
    """Return the latent that the keys and values of a site seem to be made from, or None.

    Raises:
        NotRaisedError: If there is a latent, but the rest is not as it has to be.
    """
    k, v = node.args[1:3]
    assert isinstance(k, fx.Node), "operands of attention are nodes"
    assert isinstance(v, fx.Node), "operands of attention are nodes"
    values = read_linear(prober, chain_back(v, prober.content, is_transparent)[-1].node)
    if site.v is None or values is None or not _is_narrow(site, values.x):
        return None
    inner = k.args[0] if k.target is kvx.ROPE else k
    assert isinstance(inner, fx.Node), "a rotary embedding has an operand"
    made = _made_from(prober, inner, values.x)
    others = {n for node in made for n in content_inputs(node, prober.content)}
    others -= {values.x, *made}
    if inner not in made or len(others) != 1:
        return None
    (other,) = others
    if values.bias is not None:
        raise NotRaisedError("values are made with a bias", node=values.node)
    shared_first, rope_dim = _shared_channels(prober, inner, values.x, other)
    own = slice(rope_dim, None) if shared_first else slice(0, -rope_dim)
    part = slice(0, rope_dim) if shared_first else slice(-rope_dim, None)
    if k.target is kvx.ROPE and (not shared_first or k.kwargs["rotary_dim"] != rope_dim):
        raise NotRaisedError("RoPE turns channels that are made from the latent", node=k)
    up_k, index = _find_up_projection(prober, made, inner, own, values.x, other)
    shared, shared_index = _find_shared(prober, inner, part, values.x, other)
    stride = find_stride(index)
    if stride is None:
        raise NotRaisedError("rows of the keys are not evenly spaced", node=up_k.node)
    rows = Projection(up_k.weight, None, up_k.layout, stride.start, stride.step)
    rank = int(shape_of(values.x)[-1])
    spec = LatentSpec(rank, rope_dim, rows, site.v, shared_first)
    return Latent(node, spec, values.x, up_k.node, index, shared, shared_index)


def _is_narrow(site: AttentionSite, x: fx.Node) -> bool:
    """Return whether caching `x` instead of keys would save anything."""
    shape = shape_of(x)
    is_plain = shape[:2] == ("B", "S") or shape[:3] == ("B", 1, "S")
    rank = shape[-1]
    has_rank = is_plain and len(shape) == shape.index("S") + 2 and isinstance(rank, int)
    return has_rank and int(rank) < site.num_kv_heads * site.head_dim


def _made_from(prober: Prober, outcome: fx.Node, x: fx.Node) -> list[fx.Node]:
    """Return the nodes between `x` (excluded) and `outcome` that depend on `x`, in order."""
    made: dict[fx.Node, None] = {}
    for node in ancestors([outcome], {x}):
        inputs = content_inputs(node, prober.content) if node is not x else []
        if any(n is x or n in made for n in inputs):
            made[node] = None
    return list(made)


def _shared_channels(
    prober: Prober, k: fx.Node, latent: fx.Node, other: fx.Node
) -> tuple[bool, int]:
    """Return whether the channels of `k` that `other` makes come first, and how many they are."""
    if Axes.of(other) is None:
        raise NotRaisedError("the keys' other part has no axes of batch and tokens", node=other)
    fixed = _random(prober, latent)
    first, second = (
        prober.run([k], _SETTING, {latent: fixed, other: _random(prober, other)})[0]
        for _ in range(2)
    )
    changed = (first != second).amax((0, 1, 2))  # [D]
    count = int(changed.sum())
    is_first, is_last = bool(changed[:count].all()), bool(changed[len(changed) - count :].all())
    if not 0 < count < len(changed) or is_first == is_last:
        raise NotRaisedError("the keys' other part is not at one end of them", node=other)
    return is_first, count


def _find_up_projection(
    prober: Prober,
    made: Sequence[fx.Node],
    k: fx.Node,
    own: slice,
    latent: fx.Node,
    other: fx.Node,
) -> tuple[LinearNode, Tensor]:
    """Return the linear layer whose outputs the keys' own channels are, and which of them."""
    for node in made:
        linear = read_linear(prober, node)
        if linear is None or linear.x is not latent:
            continue
        index = _picks(prober, k, own, node, fixed=other)
        if index is None:
            continue
        if linear.bias is not None:
            raise NotRaisedError("keys are made with a bias", node=node)
        return linear, index
    raise NotRaisedError("no linear layer makes the keys from the latent", node=k)


def _find_shared(
    prober: Prober, k: fx.Node, part: slice, latent: fx.Node, other: fx.Node
) -> tuple[fx.Node, Tensor]:
    """Return the farthest node that the shared channels are picked from, and its features."""
    for stop in reversed(chain_back(other, prober.content, is_transparent)):
        if Axes.of(stop.node) is None:
            continue
        index = _picks(prober, k, part, stop.node, fixed=latent)
        if index is None:
            continue
        if not torch.equal(index, index[:1].expand_as(index)):
            raise NotRaisedError("a part of the keys is not the same for all heads", node=stop.node)
        return stop.node, index[0]
    raise NotRaisedError("a part of the keys is computed head by head", node=other)


def _picks(
    prober: Prober, k: fx.Node, channels: slice, anchor: fx.Node, *, fixed: fx.Node
) -> Tensor | None:
    """Return which feature of `anchor` each of `channels` of `k` is, `[Hk, n]`; None if it is none.

    The node `fixed`, which the other channels are made from, keeps one value.
    """
    type_ = tensor_type(anchor)
    if type_ is None or type_.dtype != k.meta["type"].dtype:
        return None
    count, dtype, held = num_features(anchor), type_.dtype, {fixed: _random(prober, fixed)}

    def picked(rows: Tensor) -> Tensor:
        bound = {**held, anchor: from_rows(anchor, rows)}
        value: Tensor = prober.run([k], _SETTING, bound)[0][..., channels]
        return value.transpose(1, 2)  # [B, S, Hk, n]

    shape = (_SETTING.batch, _SETTING.length, count)
    index = read_index(lambda x: picked(x.to(prober.device, dtype).expand(shape))[0, 0], count)
    if index is None:
        return None
    noise = prober.random(*shape, dtype=dtype)
    return index if is_close(picked(noise), noise[..., index.to(noise.device)]) else None


def _random(prober: Prober, node: fx.Node) -> Tensor:
    type_ = tensor_type(node)
    assert type_ is not None, "the caller has looked"
    shape = (_SETTING.batch, _SETTING.length, num_features(node))
    return from_rows(node, prober.random(*shape, dtype=type_.dtype))


def write_keys(prober: Prober, found: Latent) -> fx.Node:
    """Write the keys of a candidate before its attention, in the form of `ir.latent`."""
    node, spec = found.node, found.spec
    emitter = HeadEmitter(prober, node)
    own = emitter.emit(found.up_k, found.index)
    shared = emitter.emit(found.shared, found.shared_index[None])
    k = node.args[1]
    assert isinstance(k, fx.Node), "operands of attention are nodes"
    if k.target is kvx.ROPE:
        shared = insert(node, kvx.ROPE, (shared, *k.args[1:]), shape_of(shared), dict(k.kwargs))
    heads, shape = found.index.shape[0], shape_of(shared)
    wide = (shape[0], heads, *shape[2:])
    spread = insert(node, EXPAND, (shared, [-1, heads, -1, -1]), wide)
    return join_heads(node, [spread, own] if spec.shared_first else [own, spread])


def prove_latent(prober: Prober, found: Latent, new: fx.Node, site: AttentionSite) -> None:
    """Compare old and new keys, and keys and values with the weights, on random input.

    Raises:
        NotRaisedError: If anything differs.
    """
    spec, (_, k, v, *_) = found.spec, found.node.args
    assert isinstance(k, fx.Node), "operands of attention are nodes"
    assert isinstance(v, fx.Node), "operands of attention are nodes"
    latent = _random(prober, found.latent)
    bound = {found.latent: latent, found.shared: _random(prober, found.shared)}
    old, got, values = prober.run([k, new, v], _SETTING, bound)
    own = got[..., spec.rope_dim :] if spec.shared_first else got[..., : -spec.rope_dim]
    rows = latent.reshape(_SETTING.batch, 1, _SETTING.length, spec.rank)
    wanted: list[tuple[str, Tensor, Tensor]] = [
        ("keys", got, old),
        ("keys", own, _expand(prober, rows, spec.up_k, site.num_kv_heads, own.shape[-1])),
        ("values", values, _expand(prober, rows, spec.up_v, site.num_kv_heads, site.v_head_dim)),
    ]
    for what, value, want in wanted:
        if not is_close(value, want):
            reason = f"{what} made from the latent differ by {error(value, want):.1e}"
            raise NotRaisedError(reason, node=found.node)


def _expand(prober: Prober, rows: Tensor, up: Projection, heads: int, width: int) -> Tensor:
    """Return what rows of a weight make of latents `[B, 1, S, rank]`: `[B, Hk, S, width]`."""
    weight = prober.weights[up.weight]
    matrix = weight if up.layout == "out_in" else weight.T
    return rows @ matrix[up.indices(heads, width)].mT
