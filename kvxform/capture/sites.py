"""Raise one attention: trace its operands, classify its mask, write dialect nodes, prove, swap."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.capture.arranging import like_source
from kvxform.capture.attention import Proposal, propose
from kvxform.capture.emitting import HeadEmitter, cast, insert
from kvxform.capture.heads import from_rows, num_features
from kvxform.capture.masks import MaskKind, classify
from kvxform.capture.operands import Operand, Operands, trace_operands
from kvxform.capture.probing import Prober, Setting, error, is_close
from kvxform.capture.projections import output_projection, source_projection, why_unnamed
from kvxform.capture.refusal import NotRaisedError, Trace
from kvxform.capture.rope import Rotary
from kvxform.capture.structure import shape_of, tensor_type
from kvxform.capture.weights import add_weight, position_ids, weight_node
from kvxform.ir.program import AttentionSite, Projection, RejectedSite, RopeSpec
from kvxform.ir.rounding import coarsest
from kvxform.ir.types import TensorType

_PROOF = Setting.first(9, batch=2)
ROPE_NOTE = "rotary embedding left as it is"


class SiteRaiser:
    """Raises the attentions of one graph and keeps the record of what was refused."""

    def __init__(self, prober: Prober) -> None:
        self.prober = prober
        self.sites: list[AttentionSite] = []
        self.rejected: list[RejectedSite] = []

    def raise_core(self, core: fx.Node) -> None:
        """Raise the attention around `core`, or record why it is left alone."""
        trace = Trace()
        try:
            self._raise(propose(self.prober, core), trace)
        except NotRaisedError as refusal:
            self._reject(core, refusal, trace)

    def _reject(self, core: fx.Node, refusal: NotRaisedError, trace: Trace) -> None:
        differs = "" if refusal.node is None else str(refusal.node.meta["origin"])
        self.rejected.append(
            RejectedSite(
                core.meta["module"],
                refusal.reason,
                core.meta["origin"],
                trace.steps,
                differs,
                hint=refusal.hint,
            )
        )

    def _raise(self, proposal: Proposal, trace: Trace) -> None:
        trace.note_core(proposal.scale, proposal.softcap)
        mask = self._classify(proposal)
        trace.note_mask(mask.window, mask.chunk, has_slopes=mask.slopes is not None)
        operands = trace_operands(self.prober, proposal)
        trace.note_operands(operands.q.heads.index.shape, operands.k.heads.index.shape)
        trace.note_rope(rope_spec(operands.k.rotary), operands.note)
        scoring = self._scoring(proposal, mask, operands)
        node = self._emit(proposal, scoring, operands)
        restored = like_source(proposal.out, node)
        rounding = self._prove(proposal, restored, operands)
        proposal.out.replace_all_uses_with(restored)
        self.prober.learn(restored)
        self.sites.append(self._describe(proposal, node, scoring, operands, rounding))

    def _classify(self, proposal: Proposal) -> MaskKind:
        kind: MaskKind | str = MaskKind(causal=False)
        if proposal.mask is not None:
            kind = classify(self.prober, proposal.mask, proposal.mask_sources)
        node = proposal.mask_sources[-1] if proposal.mask_sources else None
        if isinstance(kind, str):
            hint = "use a causal mask, a sliding window or chunks, the same for all heads"
            raise NotRaisedError(kind, node=node, hint=hint)
        if not (kind.causal or proposal.causal):
            raise NotRaisedError(
                "attention is bidirectional, so that its keys cannot be cached",
                node=node,
                hint="mask later tokens: is_causal=True, or a causal mask",
            )
        return replace(kind, causal=True)

    def _scoring(self, proposal: Proposal, mask: MaskKind, operands: Operands) -> dict[str, Any]:
        """Return what the op and the site say of scores; tensors are keys of the weights."""
        num_heads, slopes = operands.q.heads.index.shape[0], mask.slopes
        weights, name = self.prober.weights, None
        if slopes is not None:
            if slopes.numel() not in (1, num_heads):
                raise NotRaisedError(f"{slopes.numel()} slopes for {num_heads} query heads")
            q_dtype = operands.q.heads.anchor.meta["type"].dtype
            dtype = torch.promote_types(q_dtype, torch.float32)
            name = add_weight(
                weights, "alibi_slopes", slopes.to(dtype).repeat(num_heads)[:num_heads]
            )
        return {
            "scale": proposal.scale * operands.q.factor,
            "window": mask.window,
            "chunk": mask.chunk,
            "softcap": proposal.softcap,
            "sink_logits": proposal.sink_logits,
            "alibi_slopes": name,
        }

    def _emit(
        self,
        proposal: Proposal,
        scoring: dict[str, Any],
        operands: Operands,
    ) -> fx.Node:
        """Write the attention before the node that it is to replace."""
        emitter = HeadEmitter(self.prober, proposal.out)
        old = (proposal.q, proposal.k, proposal.v)
        q, k, v = (
            emit_operand(emitter, operand, node.meta["type"].dtype)
            for operand, node in zip(operands.all(), old, strict=True)
        )
        optional = {**scoring, "softmax_dtype": proposal.softmax_dtype}
        options: dict[str, Any] = {
            "layer": len(self.sites),
            "causal": True,
            **{name: self._argument(v) for name, v in optional.items() if v is not None},
        }
        node = insert(
            proposal.out,
            kvx.ATTENTION,
            (q, k, v, position_ids(self.prober.graph)),
            (*shape_of(q)[:3], shape_of(v)[3]),
            options,
        )
        type_ = TensorType(v.meta["type"].dtype, node.meta["type"].shape)
        node.meta |= {"origin": proposal.core.meta["origin"], "type": type_}
        return node

    def _argument(self, value: Any) -> Any:
        """Return the node of a weight for its key, and anything else as it is."""
        if not isinstance(value, str):
            return value
        return weight_node(self.prober.graph, value, self.prober.weights[value])

    def _prove(self, proposal: Proposal, new: fx.Node, operands: Operands) -> str:
        """Compare old and new on random anchors; return a note, or an empty text.

        Raises:
            NotRaisedError: If they differ by more than the rounding of the scores.
        """
        bound: dict[fx.Node, Tensor] = {}
        for anchor in (operand.heads.anchor for operand in operands.all()):
            size = (_PROOF.batch, _PROOF.length, num_features(anchor))
            rows = self.prober.random(*size, dtype=anchor.meta["type"].dtype)
            bound.setdefault(anchor, from_rows(anchor, rows))
        want, got = self.prober.run([proposal.out, new], _PROOF, bound)
        if is_close(got, want):
            return ""
        nodes = (proposal.q, proposal.core, *proposal.mask_sources)
        types = [t for t in map(tensor_type, nodes) if t is not None]
        dtype = coarsest(want.dtype, *(t.dtype for t in types if t.dtype.is_floating_point))
        if is_close(got, want, dtype):
            return f"the model rounds scores to {dtype}; results agree to that".replace(
                "torch.", ""
            )
        raise NotRaisedError(f"kvx::attention differs from it by {error(got, want):.1e}")

    def _describe(
        self,
        proposal: Proposal,
        node: fx.Node,
        scoring: dict[str, Any],
        operands: Operands,
        rounding: str,
    ) -> AttentionSite:
        q, k, v = operands.all()
        num_q_heads, head_dim = q.heads.index.shape
        num_kv_heads, v_head_dim = v.heads.index.shape
        projections = {
            name: source_projection(self.prober, operand.heads)
            for name, operand in zip("qkv", operands.all(), strict=True)
        }
        notes = (_rope_note(operands), rounding, *self._unnamed(projections, operands))
        return AttentionSite(
            layer=len(self.sites),
            module=proposal.core.meta["module"],
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            v_head_dim=v_head_dim,
            q=projections["q"],
            k=projections["k"],
            v=projections["v"],
            o=output_projection(self.prober, node, num_q_heads, v_head_dim),
            rope=rope_spec(k.rotary),
            **scoring,
            notes=tuple(note for note in notes if note),
        )

    def _unnamed(
        self, projections: Mapping[str, Projection | None], operands: Operands
    ) -> Iterator[str]:
        """Yield a note for every reason why projections have no name: `q, k: a norm lies ...`."""
        names: dict[str, list[str]] = {}
        for (name, found), operand in zip(projections.items(), operands.all(), strict=True):
            reason = "" if found is not None else why_unnamed(self.prober, operand.heads)
            names.setdefault(reason, []).append(name)
        yield from (f"{', '.join(who)}: {why}" for why, who in names.items() if why)


def emit_operand(emitter: HeadEmitter, operand: Operand, dtype: torch.dtype) -> fx.Node:
    """Write one operand; some models turn it in another dtype than they attend in."""
    node = emitter.emit(operand.heads.anchor, operand.heads.index)
    rotary, prober = operand.rotary, emitter.prober
    if rotary is not None:
        inv_freq = weight_node(prober.graph, rotary.inv_freq, prober.weights[rotary.inv_freq])
        options: dict[str, Any] = {"rotary_dim": rotary.rotary_dim}
        if rotary.scaling != 1.0:
            options["attention_scaling"] = rotary.scaling
        if rotary.interleaved:
            options["interleaved"] = True
        if rotary.compute_dtype is not None:
            node = cast(emitter.before, node, rotary.compute_dtype)
        args = (node, position_ids(prober.graph), inv_freq)
        node = insert(emitter.before, kvx.ROPE, args, shape_of(node), options)
        node.meta |= {"origin": operand.heads.region[-1].meta["origin"]}
    return cast(emitter.before, node, dtype)


def _rope_note(operands: Operands) -> str:
    left = operands.note
    return f"{ROPE_NOTE}: {left}" if left else ""


def rope_spec(rotary: Rotary | None) -> RopeSpec | None:
    """Return what a site says of its rotary embedding."""
    if rotary is None:
        return None
    return RopeSpec(rotary.inv_freq, rotary.rotary_dim, rotary.scaling, rotary.interleaved)
