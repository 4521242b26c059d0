"""Raise one attention: trace its operands, classify its mask, write dialect nodes, prove, swap."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.capture.attention import NotRaisedError, Proposal, insert, propose
from kvxform.capture.heads import (
    HeadEmitter,
    HeadMap,
    from_rows,
    group_size,
    is_static,
    measure_heads,
    num_features,
)
from kvxform.capture.masks import MaskKind, classify
from kvxform.capture.probing import Prober, Setting, error, is_close
from kvxform.capture.projections import output_projection, source_projection
from kvxform.capture.rope import RopeProbe, Rotary, find_rope
from kvxform.capture.structure import chain_back, is_transparent, tensor_type
from kvxform.capture.weights import position_ids, size_node, weight_node
from kvxform.ir.program import AttentionSite, RejectedSite, RopeSpec
from kvxform.ir.types import TensorType


@dataclass(frozen=True)
class Operand:
    """Where q, k or v comes from; `rotary` is None if nothing turns between anchor and operand."""

    heads: HeadMap
    rotary: Rotary | None
    factor: float


class SiteRaiser:
    """Raises the attentions of one graph and keeps the record of what was refused."""

    def __init__(self, prober: Prober) -> None:
        self.prober = prober
        self.sites: list[AttentionSite] = []
        self.rejected: list[RejectedSite] = []

    def raise_core(self, core: fx.Node) -> None:
        """Raise the attention around `core`, or record why it is left alone."""
        try:
            proposal = propose(self.prober, core)
            self.sites.append(self._raise(proposal))
        except NotRaisedError as refusal:
            self.reject(core, str(refusal))

    def reject(self, node: fx.Node, reason: str) -> None:
        """Record that the candidate at `node` is left alone."""
        self.rejected.append(RejectedSite(node.meta["module"], reason, node.meta["origin"]))

    def _raise(self, proposal: Proposal) -> AttentionSite:
        mask = self._classify(proposal)
        q, k, v = self._trace_all(proposal)
        shared = self._shared_heads(q, k, v)
        node, restored = self._emit(proposal, mask, (q, *shared))
        self._prove(proposal, restored, (q, *shared))
        proposal.out.replace_all_uses_with(restored)
        self.prober.refresh()
        return self._describe(proposal, node, mask, (q, *shared))

    def _classify(self, proposal: Proposal) -> MaskKind:
        kind: MaskKind | str = MaskKind(causal=False)
        if proposal.mask is not None:
            kind = classify(self.prober, proposal.mask, proposal.mask_sources)
        if isinstance(kind, str):
            raise NotRaisedError(kind)
        if proposal.causal and kind.window is None:
            kind = MaskKind(causal=True)
        if not kind.causal:
            raise NotRaisedError("attention is bidirectional, so that its keys cannot be cached")
        return kind

    def _trace_all(self, proposal: Proposal) -> tuple[Operand, Operand, Operand]:
        """Return q, k and v; with one rotary embedding for q and k, or with none."""
        v = self.trace(proposal.v, may_scale=False, may_turn=False)
        q = self.trace(proposal.q, may_scale=True)
        k = self.trace(proposal.k, may_scale=False)
        if q.rotary is None and k.rotary is None:
            return q, k, v
        reason = _difference(self.prober, q.rotary, k.rotary)
        if reason:
            self.reject(proposal.core, f"rotary embedding left as it is: {reason}")
            q = self.trace(proposal.q, may_scale=True, may_turn=False)
            k = self.trace(proposal.k, may_scale=False, may_turn=False)
            return q, k, v
        assert q.rotary is not None and k.rotary is not None
        factor = q.factor * q.rotary.scaling / k.rotary.scaling
        return replace(q, rotary=k.rotary, factor=factor), k, v

    def trace(self, node: fx.Node, *, may_scale: bool, may_turn: bool = True) -> Operand:
        """Return where the operand `node` comes from, as far back as can be proved.

        Args:
            node: Operand `[B, heads, S, channels]`.
            may_scale: Whether a constant factor may be left out (it goes to the scores).
            may_turn: Whether to look for a rotary embedding.
        """
        reason = ""
        for stop in reversed(chain_back(node, self.prober.content, is_transparent)):
            heads = measure_heads(self.prober, node, stop)
            if heads is None:
                continue
            found = self._explain(node, heads, may_turn)
            if isinstance(found, str):
                reason = reason or found
            elif may_scale or found.factor == 1.0:
                if reason:
                    self.reject(node, f"rotary embedding left as it is: {reason}")
                return found
        raise AssertionError("a node picks all features of itself")

    def _explain(self, node: fx.Node, heads: HeadMap, may_turn: bool) -> Operand | str:
        factor = heads.uniform_factor()
        if is_static(self.prober, node, heads):
            return "channels are scaled" if factor is None else Operand(heads, None, factor)
        if not may_turn:
            return ""
        rotary = find_rope(RopeProbe(self.prober, node, heads))
        return rotary if isinstance(rotary, str) else Operand(heads, rotary, rotary.factor)

    def _shared_heads(self, q: Operand, k: Operand, v: Operand) -> tuple[Operand, Operand]:
        """Return k and v with every KV head once."""
        num_q_heads, out = q.heads.index.shape[0], []
        for operand in (k, v):
            index = operand.heads.index
            group = group_size(index)
            if group is None:
                raise NotRaisedError("KV heads are not repeated in groups of neighbours")
            heads = replace(operand.heads, index=index[::group])
            out.append(replace(operand, heads=heads))
        num_kv_heads = {o.heads.index.shape[0] for o in out}
        if len(num_kv_heads) != 1 or num_q_heads % min(num_kv_heads):
            raise NotRaisedError(
                f"{num_q_heads} query heads cannot share {sorted(num_kv_heads)} KV heads"
            )
        return out[0], out[1]

    def _emit(
        self, proposal: Proposal, mask: MaskKind, operands: tuple[Operand, Operand, Operand]
    ) -> tuple[fx.Node, fx.Node]:
        """Write the attention before the node it replaces; return it, and it in the old shape."""
        emitter = HeadEmitter(self.prober, proposal.out)
        q, k, v = (self._emit_operand(emitter, operand) for operand in operands)
        options: dict[str, Any] = {"layer": len(self.sites), "scale": _scale(proposal, operands)}
        options |= {"causal": mask.causal}
        optional = {
            "window": mask.window,
            "softcap": proposal.softcap,
            "softmax_dtype": proposal.softmax_dtype,
        }
        options |= {name: value for name, value in optional.items() if value is not None}
        with self.prober.graph.inserting_before(proposal.out):
            node = self.prober.graph.call_function(
                kvx.ATTENTION, (q, k, v, position_ids(self.prober.graph)), options
            )
        type_ = TensorType(
            q.meta["type"].dtype, (*q.meta["type"].shape[:3], v.meta["type"].shape[3])
        )
        node.meta = {**proposal.core.meta, "type": type_}
        return node, _restore(proposal.out, node)

    def _emit_operand(self, emitter: HeadEmitter, operand: Operand) -> fx.Node:
        node = emitter.emit(operand.heads.anchor, operand.heads.index)
        rotary, graph = operand.rotary, self.prober.graph
        if rotary is None:
            return node
        inv_freq = weight_node(graph, rotary.inv_freq, self.prober.weights[rotary.inv_freq])
        options: dict[str, Any] = {"rotary_dim": rotary.rotary_dim}
        if rotary.scaling != 1.0:
            options["attention_scaling"] = rotary.scaling
        if rotary.interleaved:
            options["interleaved"] = True
        with graph.inserting_before(emitter.before):
            new = graph.call_function(kvx.ROPE, (node, position_ids(graph), inv_freq), options)
        new.meta = {**operand.heads.region[-1].meta, "type": node.meta["type"]}
        return new

    def _prove(
        self, proposal: Proposal, new: fx.Node, operands: tuple[Operand, Operand, Operand]
    ) -> None:
        """Compare old and new on random anchors."""
        setting = Setting.first(9, batch=2)
        bound: dict[fx.Node, Tensor] = {}
        for operand in operands:
            anchor = operand.heads.anchor
            rows = self.prober.random(2, 9, num_features(anchor), dtype=anchor.meta["type"].dtype)
            bound.setdefault(anchor, from_rows(anchor, rows))
        want, got = self.prober.run([proposal.out, new], setting, bound)
        if not is_close(got, want):
            raise NotRaisedError(
                f"kvx::attention differs from the source by {error(got, want):.1e}"
            )

    def _describe(
        self,
        proposal: Proposal,
        node: fx.Node,
        mask: MaskKind,
        operands: tuple[Operand, Operand, Operand],
    ) -> AttentionSite:
        q, k, v = operands
        (num_q_heads, head_dim), (num_kv_heads, v_head_dim) = (
            q.heads.index.shape,
            v.heads.index.shape,
        )
        projections = [source_projection(self.prober, o.heads) for o in operands]
        rotary = k.rotary
        return AttentionSite(
            layer=len(self.sites),
            module=proposal.core.meta["module"],
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            scale=_scale(proposal, operands),
            q=projections[0],
            k=projections[1],
            v=projections[2],
            o=output_projection(self.prober, node, num_q_heads, v_head_dim),
            rope=None
            if rotary is None
            else RopeSpec(rotary.inv_freq, rotary.rotary_dim, rotary.scaling, rotary.interleaved),
            window=mask.window,
            softcap=proposal.softcap,
        )


def _scale(proposal: Proposal, operands: tuple[Operand, Operand, Operand]) -> float:
    return proposal.scale * operands[0].factor


def _difference(prober: Prober, q: Rotary | None, k: Rotary | None) -> str:
    """Return how the rotary embeddings of q and k differ, or an empty text."""
    if q is None or k is None:
        return f"only {'k' if q is None else 'q'} has one"
    if (q.rotary_dim, q.interleaved) != (k.rotary_dim, k.interleaved):
        return "q and k turn different channels"
    a, b = prober.weights[q.inv_freq], prober.weights[k.inv_freq]
    return "" if q.inv_freq == k.inv_freq or torch.equal(a, b) else "q and k differ in frequency"


def _restore(old: fx.Node, new: fx.Node) -> fx.Node:
    """Return `new` `[B, H, S, Dv]` in the shape of `old`."""
    old_type, new_type = tensor_type(old), tensor_type(new)
    assert old_type is not None and new_type is not None
    if old_type.shape == new_type.shape:
        return new
    symbols = {"B": size_node(old.graph, 0), "S": size_node(old.graph, 1)}
    sizes = [symbols.get(str(n), n if isinstance(n, int) else -1) for n in old_type.shape]
    return insert(old, torch.ops.aten.reshape.default, (new, sizes), old_type.shape)
