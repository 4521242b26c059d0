"""Trace q, k and v of a proposed attention back to where their heads are made."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import fx

from kvxform.capture.attention import Proposal
from kvxform.capture.heads import HeadMap, group_size, is_static, measure_heads
from kvxform.capture.probing import Prober
from kvxform.capture.refusal import NotRaisedError
from kvxform.capture.rope import RopeProbe, Rotary, find_rope
from kvxform.capture.structure import chain_back, is_transparent, op_name

_REPEATERS = frozenset({"repeat", "expand", "repeat_interleave", "index_select", "index", "cat"})


@dataclass(frozen=True)
class Operand:
    """Where q, k or v comes from.

    Attributes:
        heads: The features that its heads are; KV heads once each.
        rotary: Rotary embedding between anchor and operand, or None.
        factor: Factor that is left to the scale of the scores.
        note: Why something between anchor and a farther node could not be raised, or empty.
    """

    heads: HeadMap
    rotary: Rotary | None
    factor: float
    note: str = ""


@dataclass(frozen=True)
class Operands:
    """q, k and v of one attention; `note` says what was left in the graph as it is."""

    q: Operand
    k: Operand
    v: Operand
    note: str = ""

    def all(self) -> tuple[Operand, Operand, Operand]:
        """Return q, k and v."""
        return self.q, self.k, self.v


def trace_operands(prober: Prober, proposal: Proposal) -> Operands:
    """Return q, k and v with one rotary embedding for q and k, or with none.

    Raises:
        NotRaisedError: If KV heads are repeated in another order than `kvx::attention` reads them.
    """
    every_v = trace(prober, proposal.v, may_scale=False, may_turn=False)
    q = trace(prober, proposal.q, may_scale=True)
    k, v = _share(trace(prober, proposal.k, may_scale=True), every_v)
    _check_groups(q, k, v)
    note = q.note or k.note
    if q.rotary is None and k.rotary is None:
        return Operands(_scaled(q, k.factor), k, v, note)
    reason = note or rotary_difference(prober, q.rotary, k.rotary)
    if reason:
        q = trace(prober, proposal.q, may_scale=True, may_turn=False)
        k, v = _share(trace(prober, proposal.k, may_scale=True, may_turn=False), every_v)
        return Operands(_scaled(q, k.factor), k, v, reason)
    assert q.rotary is not None
    assert k.rotary is not None
    factor = q.factor * k.factor * q.rotary.scaling / k.rotary.scaling
    return Operands(replace(q, rotary=k.rotary, factor=factor), k, v)


def _scaled(operand: Operand, factor: float) -> Operand:
    return replace(operand, factor=operand.factor * factor)


def trace(prober: Prober, node: fx.Node, *, may_scale: bool, may_turn: bool = True) -> Operand:
    """Return where the operand `node` comes from, as far back as can be proved.

    Args:
        prober: Of the graph.
        node: Operand `[B, heads, S, channels]`.
        may_scale: Whether a constant factor may be left out (it goes to the scores).
        may_turn: Whether to look for a rotary embedding.
    """
    note = ""
    for stop in reversed(chain_back(node, prober.content, is_transparent)):
        heads = measure_heads(prober, node, stop)
        if heads is None:
            continue
        found = _explain(prober, node, heads, may_turn)
        if isinstance(found, str):
            note = note or found
        elif may_scale or found.factor == 1.0:
            return found if found.rotary is not None else replace(found, note=note)
    raise AssertionError("a node picks all features of itself")


def _explain(prober: Prober, node: fx.Node, heads: HeadMap, may_turn: bool) -> Operand | str:
    """Return what happens between the anchor and `node`, or why that is unknown."""
    if is_static(prober, node, heads):
        factor = heads.uniform_factor()
        return "channels are scaled" if factor is None else Operand(heads, None, factor)
    if not may_turn:
        return ""
    rotary = find_rope(RopeProbe(prober, node, heads))
    return rotary if isinstance(rotary, str) else Operand(heads, rotary, rotary.factor)


def _share(k: Operand, v: Operand) -> tuple[Operand, Operand]:
    """Return k and v with every KV head once; if one has fewer, it repeats those."""
    step = math.gcd(_group_size(k), _group_size(v))
    k, v = (replace(o, heads=replace(o.heads, index=o.heads.index[::step])) for o in (k, v))
    return k, v


def _group_size(operand: Operand) -> int:
    """Return how many query heads share each head of k or v."""
    group = group_size(operand.heads.index)
    if group is None:
        raise NotRaisedError(
            "KV heads are not repeated in groups of neighbours",
            node=_repeats(operand),
            hint="repeat them as 0 0 1 1 (repeat_interleave), not as 0 1 0 1 (repeat, tile)",
        )
    return group


def _repeats(operand: Operand) -> fx.Node | None:
    """Return the last node that repeats or picks heads between anchor and operand."""
    found = [n for n in operand.heads.region if op_name(n) in _REPEATERS]
    return found[-1] if found else None


def _check_groups(q: Operand, k: Operand, v: Operand) -> None:
    heads, k_heads, v_heads = (o.heads.index.shape[0] for o in (q, k, v))
    if k_heads != v_heads or heads % k_heads:
        raise NotRaisedError(
            f"{heads} query heads cannot share {k_heads} K and {v_heads} V heads",
            node=k.heads.anchor,
            hint="use as many K as V heads, and a multiple of them as query heads",
        )


def rotary_difference(prober: Prober, q: Rotary | None, k: Rotary | None) -> str:
    """Return how the rotary embeddings of q and k differ, or an empty text."""
    if q is None or k is None:
        return f"only {'k' if q is None else 'q'} turns with the position"
    if (q.rotary_dim, q.interleaved) != (k.rotary_dim, k.interleaved):
        return "q and k turn different channels"
    a, b = prober.weights[q.inv_freq], prober.weights[k.inv_freq]
    return "" if torch.equal(a, b) else "q and k turn with different frequencies"
