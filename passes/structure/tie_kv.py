"""tie-kv: values are the keys before RoPE, so that one tensor is cached instead of two.

    out = softmax(RoPE(q) RoPE(k)^T) k        with k = W x, and W the mean of W_k and W_v

Keys are cached before RoPE and turned when they are read; what is read as a value is not turned. A
model that was trained so has W_k = W_v, and nothing changes but the bytes. Any other model is
destroyed until it has been trained: the authors' own log has a perplexity of 6430 after this
surgery where the teacher has 20.8.

Legal where both are plain linear layers whose rows nothing else reads, with nothing but RoPE
between them and the attention; a norm of the keys is in the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.linear import weight_uses
from kvxform.ir.program import AttentionSite, Program, Projection
from kvxform.pass_base import (
    Exactness,
    GraphPass,
    Match,
    NoMatch,
    Numerics,
    Rewriter,
    register_pass,
)


@register_pass
@dataclass(frozen=True)
class TieKv(GraphPass):
    """Cache one tensor for keys and values, made by the mean of both projections."""

    numerics: ClassVar[Numerics] = Numerics(Exactness.NEEDS_TRAINING, "kl")
    requires: ClassVar[tuple[Requirement, ...]] = (
        Requirement("cache.inserted", (False,), because="both would already be cached"),
        Requirement("k.basis", ("identity",), because="values cannot follow a basis of keys"),
        Requirement("v.basis", ("identity",), because="keys cannot follow a basis of values"),
    )
    source: ClassVar[str] = "Do Transformers Need Three Projections?, ICML 2026, variant Q-K=V"

    def ensures(self) -> Mapping[str, FactValue]:
        """State that keys will be stored before RoPE."""
        return {"k.rope": "pre"}

    def match(self, program: Program) -> list[Match | NoMatch]:
        """Match every site, or none if one of them cannot be tied."""
        uses = weight_uses(program)
        found = [_check(program, site, uses) for site in program.sites]
        if not any(isinstance(f, NoMatch) and not f.done for f in found):
            return found
        because = "keys of all layers are tied to values or none"
        return [NoMatch(because, f.layer, f.node) if isinstance(f, Match) else f for f in found]

    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Set the rows of K to the mean, and let every reader take values from the keys."""
        assert match.layer is not None, "every match is at a site"
        site = program.site(match.layer)
        assert site.k is not None, "match found it"
        assert site.v is not None, "match found it"
        if not match.data["equal"]:
            _average(rewriter, site, site.k, site.v)
        for reader in program.readers(site.layer):
            attention = program.attention_node(reader.layer)
            q, k, _, positions = attention.args
            rewriter.set_args(attention, (q, k, rewriter.node(match.node), positions))
            rewriter.update_site(reader.layer, v=None, payload="k")
            if not match.data["equal"]:
                own = (reader.q, reader.o)
                rewriter.mark_touched(p.weight for p in own if p is not None)


def _check(program: Program, site: AttentionSite, uses: Mapping[str, int]) -> Match | NoMatch:
    layer = site.layer
    if site.payload == "k":
        return NoMatch("values are already the keys", layer, done=True)
    if site.owner != layer:
        return NoMatch(f"keys and values are those of layer {site.owner}", layer, done=True)
    if site.payload != "kv" or site.latent is not None:
        return NoMatch("keys and values are made from a latent", layer)
    if site.head_dim != site.v_head_dim:
        return NoMatch(f"keys have {site.head_dim} channels, values {site.v_head_dim}", layer)
    if site.k is None or site.v is None:
        return NoMatch("keys or values are not made by a plain linear layer alone", layer)
    if (site.k.bias is None) != (site.v.bias is None):
        return NoMatch("one of keys and values has a bias, the other has none", layer)
    shared = [name for name in (site.k.weight, site.v.weight) if uses[name] != 1]
    if shared:
        hint = "tie layers before others read their weights"
        return NoMatch(f"weight {shared[0]} is read in {uses[shared[0]]} places", layer, hint=hint)
    return _check_way(program, site)


def _check_way(program: Program, site: AttentionSite) -> Match | NoMatch:
    """Look at what lies between the keys and the attention, and compare the weights."""
    node = program.attention_node(site.layer)
    k = node.args[1]
    assert isinstance(k, fx.Node), "operands of attention are nodes"
    if site.rope is not None:
        if k.target is not kvx.ROPE or k.args[1] is not program.placeholder("position_ids"):
            return NoMatch("keys are changed after RoPE", site.layer, k.name)
        k = k.args[0]
        assert isinstance(k, fx.Node), "RoPE turns a node"
    assert site.k is not None, "checked before"
    assert site.v is not None, "checked before"
    distance = _distance(program, site, site.k, site.v)
    data = {"equal": distance == 0}
    note = ""
    if distance is not None:
        note = "keys and values have equal weights, nothing is lost"
        if distance:
            note = f"weights of K and V differ by {distance:.2f} of their norm: train before use"
    return Match(site.layer, k.name, data, note=note)


def _rows(weights: Mapping[str, Tensor], site: AttentionSite, p: Projection) -> list[Tensor]:
    """Return the rows of a projection `[Hk * D, width]`, and its bias if there is one."""
    matrix = weights[p.weight] if p.layout == "out_in" else weights[p.weight].T
    index = p.indices(site.num_kv_heads, site.head_dim).flatten().to(matrix.device)
    return [matrix[index], *([] if p.bias is None else [weights[p.bias][index]])]


def _distance(program: Program, site: AttentionSite, k: Projection, v: Projection) -> float | None:
    """Return the norm of W_k - W_v as a share of both, or None for weights without values."""
    pairs = list(zip(_rows(program.weights, site, k), _rows(program.weights, site, v), strict=True))
    if pairs[0][0].is_meta:
        return None
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    norms = sum(float(x.double().square().sum()) for pair in pairs for x in pair)
    return float((apart / max(norms, 1e-300)) ** 0.5)


def _average(rewriter: Rewriter, site: AttentionSite, k: Projection, v: Projection) -> None:
    """Set the rows of K to the mean of those of K and V."""
    weights = rewriter.program.weights
    means = [
        ((a.double() + b.double()) / 2).to(a.dtype)
        for a, b in zip(_rows(weights, site, k), _rows(weights, site, v), strict=True)
    ]
    index = k.indices(site.num_kv_heads, site.head_dim).flatten().to(means[0].device)
    axis = 0 if k.layout == "out_in" else 1
    rows = means[0] if axis == 0 else means[0].T
    rewriter.set_weight(k.weight, weights[k.weight].index_copy(axis, index, rows))
    if k.bias is not None:
        rewriter.set_weight(k.bias, weights[k.bias].index_copy(0, index, means[1]))
