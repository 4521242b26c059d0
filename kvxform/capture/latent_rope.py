"""Rotary embedding of a site with a latent: only the shared part of keys turns, and its match in q.

Capture looks for a rotary embedding that turns the first channels of whole heads. Here it stands
before the parts of a head are joined, so it is looked for in the part that all heads share and in
the same channels of q, and written there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from kvxform.capture.emitting import HeadEmitter, insert
from kvxform.capture.heads import from_rows, num_features
from kvxform.capture.operands import Operand, rotary_difference, trace
from kvxform.capture.probing import Prober, Setting, error, is_close
from kvxform.capture.refusal import NotRaisedError
from kvxform.capture.sites import ROPE_NOTE, emit_operand, rope_spec
from kvxform.capture.structure import shape_of, tensor_type
from kvxform.ir.latent import CAT, EXPAND, SLICE, joined_part
from kvxform.ir.program import AttentionSite
from kvxform.ir.types import TensorType

_PROOF = Setting.first(9, batch=2)


@dataclass(frozen=True)
class _Parts:
    """What q and k of a site are joined from."""

    q_own: Operand
    q_turned: Operand
    shared: Operand


def raise_latent_rope(prober: Prober, site: AttentionSite, node: fx.Node) -> AttentionSite:
    """Return the site with `rope` if one could be proved; rewrites q and k of `node` then.

    Args:
        prober: Of the graph.
        site: A site with a `latent`, its keys in the form of `ir.latent`.
        node: Its attention.
    """
    if site.rope is not None:
        return site
    notes = tuple(note for note in site.notes if not note.startswith(ROPE_NOTE))
    try:
        parts = _trace_parts(prober, site, node)
        q, k = _write(prober, site, node, parts)
        _prove(prober, node, (q, k), parts)
    except NotRaisedError as refusal:
        return replace(site, notes=(*notes, f"{ROPE_NOTE}: {refusal.reason}"))
    if parts.shared.rotary is None:
        return replace(site, notes=notes)
    node.args = (q, k, *node.args[2:])
    prober.refresh()
    return replace(site, notes=notes, rope=rope_spec(parts.shared.rotary))


def _trace_parts(prober: Prober, site: AttentionSite, node: fx.Node) -> _Parts:
    spec, (q, k, *_) = site.latent, node.args
    assert spec is not None, "the caller has looked"
    assert isinstance(q, fx.Node), "operands of attention are nodes"
    own = site.head_dim - spec.rope_dim
    first, turned = (spec.rope_dim, 0) if spec.shared_first else (0, own)
    shared = trace(prober, _shared(k, spec.shared_first), may_scale=False)
    q_turned = trace(prober, _cut(node, q, turned, spec.rope_dim), may_scale=False)
    q_own = trace(prober, _cut(node, q, first, own), may_scale=False, may_turn=False)
    if shared.rotary is not None or q_turned.rotary is not None:
        reason = rotary_difference(prober, q_turned.rotary, shared.rotary)
        if reason:
            raise NotRaisedError(reason)
    elif shared.note or q_turned.note:
        raise NotRaisedError(shared.note or q_turned.note)
    return _Parts(q_own, q_turned, shared)


def _shared(k: object, shared_first: bool) -> fx.Node:
    assert isinstance(k, fx.Node), "operands of attention are nodes"
    assert isinstance(k.args[0], list | tuple), "keys are joined from two parts"
    spread = k.args[0][0 if shared_first else 1]
    assert isinstance(spread, fx.Node), "what is joined are nodes"
    assert isinstance(spread.args[0], fx.Node), "what is expanded is a node"
    return spread.args[0]


def _cut(before: fx.Node, x: fx.Node, start: int, width: int) -> fx.Node:
    part = joined_part(x, start, start + width)
    if part is not None:
        return part
    shape = (*shape_of(x)[:3], width)
    return insert(before, SLICE, (x, -1, start, start + width), shape)


def _write(
    prober: Prober, site: AttentionSite, node: fx.Node, parts: _Parts
) -> tuple[fx.Node, fx.Node]:
    """Write q and k anew before their attention."""
    spec, (_, k, *_) = site.latent, node.args
    assert spec is not None, "the caller has looked"
    assert isinstance(k, fx.Node), "operands of attention are nodes"
    emitter, dtype = HeadEmitter(prober, node), k.meta["type"].dtype
    q_own, q_turned, shared = (
        emit_operand(emitter, part, dtype) for part in (parts.q_own, parts.q_turned, parts.shared)
    )
    batch, _, tokens, width = shape_of(shared)
    wide = (batch, site.num_kv_heads, tokens, width)
    spread = insert(node, EXPAND, (shared, [-1, site.num_kv_heads, -1, -1]), wide)
    assert isinstance(k.args[0], list | tuple), "keys are joined from two parts"
    k_own = k.args[0][1 if spec.shared_first else 0]
    assert isinstance(k_own, fx.Node), "what is joined are nodes"
    q_parts, k_parts = [q_own, q_turned], [k_own, spread]
    if spec.shared_first:
        q_parts.reverse()
        k_parts.reverse()
    return join_heads(node, q_parts), join_heads(node, k_parts)


def join_heads(before: fx.Node, parts: Sequence[fx.Node]) -> fx.Node:
    """Write the channels of `parts`, each `[B, heads, S, n]`, side by side."""
    with before.graph.inserting_before(before):
        node = before.graph.call_function(CAT, (list(parts), -1))
    type_ = tensor_type(parts[0])
    assert type_ is not None, "parts of heads are tensors"
    width = sum(int(shape_of(part)[-1]) for part in parts)
    node.meta = {**before.meta, "type": TensorType(type_.dtype, (*type_.shape[:3], width))}
    return node


def _prove(prober: Prober, node: fx.Node, new: tuple[fx.Node, fx.Node], parts: _Parts) -> None:
    """Compare old and new operands on random input."""
    traced = (parts.q_own, parts.q_turned, parts.shared)
    joined = new[1].args[0]
    assert isinstance(joined, list | tuple), "keys are joined from two parts"
    bound: dict[fx.Node, torch.Tensor] = {}
    for anchor in (*joined, *(part.heads.anchor for part in traced)):
        assert isinstance(anchor, fx.Node), "what is joined are nodes"
        if anchor.target is EXPAND:
            continue  # this is what is compared
        size = (_PROOF.batch, _PROOF.length, num_features(anchor))
        rows = prober.random(*size, dtype=anchor.meta["type"].dtype)
        bound.setdefault(anchor, from_rows(anchor, rows))
    q, k = node.args[:2]
    assert isinstance(q, fx.Node), "operands of attention are nodes"
    assert isinstance(k, fx.Node), "operands of attention are nodes"
    values = prober.run([q, new[0], k, new[1]], _PROOF, bound)
    for want, got in (values[:2], values[2:]):
        if not is_close(got, want):
            raise NotRaisedError(f"kvx::rope on parts differs from it by {error(got, want):.1e}")
