"""What goes into a layer in the place of its keys and values.

K = RoPE(W_k x + b_k) and V = W_v x + b_v follow from the normed residual stream x that both
projections read. It is one vector of W channels a token, K and V are Hk (D + Dv), so caching x is
worth its products only where W is less: in models whose KV heads are as many as their query heads.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis
from kvxform.codecs.exact import ExactCodec
from kvxform.ir.linear import ADDMM, LINEAR, PRODUCTS, RESHAPES
from kvxform.ir.program import AttentionSite, Program, Projection, ResidualSpec
from kvxform.ir.stream_plan import KeyView
from kvxform.ir.types import TensorType
from kvxform.pass_base import Match, NoMatch, Rewriter

ROPE_OPTIONS = ("rotary_dim", "attention_scaling", "interleaved")
ADD = torch.ops.aten.add.Tensor
UNSQUEEZE = torch.ops.aten.unsqueeze.default


def check_site(program: Program, site: AttentionSite) -> Match | NoMatch:
    """Return whether x may be cached at one site; the match names its node."""
    layer = site.layer
    if site.payload == "residual":
        return NoMatch("what K and V are made from is already cached", layer, done=True)
    if site.owner != layer:
        return NoMatch(f"keys and values are those of layer {site.owner}", layer, done=True)
    problem = _problem(program, site)
    if problem:
        return NoMatch(problem, layer)
    append = program.append_node(layer)
    assert append is not None, "an owner appends"
    keys, values = append.args[:2]
    rope = _rope(keys)
    x = _input(keys if rope is None else rope.args[0])
    if x is None or _input(values) is not x:
        return NoMatch("keys and values are not made from the same vector", layer)
    width, heads = x.meta["type"].shape[-1], site.num_kv_heads
    whole = heads * (site.head_dim + site.v_head_dim)
    if width >= whole:
        sizes = f"{heads} heads of {site.head_dim} + {site.v_head_dim}"
        reason = f"what K and V are made from has {width} channels, they have {whole} ({sizes})"
        return NoMatch(reason, layer, hint="keep K and V there")
    return Match(layer, x.name)


def cache_input(program: Program, match: Match, rewriter: Rewriter) -> None:
    """Append x at one site, and let every reader make K and V from it."""
    assert match.layer is not None, "every match is at a site"
    site, append = program.site(match.layer), program.append_node(match.layer)
    assert append is not None, "match found it"
    x = rewriter.node(match.node)
    spec = _make_spec(rewriter, site, x.meta["type"].shape[-1])
    rope = _rope(append.args[0])
    type_ = x.meta["type"]
    one = TensorType(type_.dtype, (type_.shape[0], 1, *type_.shape[1:]))
    stored = rewriter.call_before(append, UNSQUEEZE, (x, 1), type_=one)
    rewriter.set_args(append, (stored, None, append.args[2]))
    for reader in program.readers(site.layer):
        _read(rewriter, program.attention_node(reader.layer), spec, rope)
        changes = dict.fromkeys(("k", "v"))
        rewriter.update_site(reader.layer, payload="residual", residual=spec, **changes)
        _plan(rewriter, reader, spec, is_turned=rope is not None)


def _problem(program: Program, site: AttentionSite) -> str:
    """Return why the site cannot be read so, or nothing."""
    assert program.plan is not None, "it has a cache"
    if site.payload != "kv" or site.latent is not None:
        return f"{site.payload} is what is cached"
    if site.k is None or site.v is None:
        return "keys or values are not made by a plain linear layer alone"
    if (site.k_basis, site.v_basis) != (Basis(), Basis()):
        return "keys or values are in another basis"
    if program.plan.site(site.layer).key.rope == "pre":
        return "keys are already cached before RoPE"
    has_bias = site.v.bias is not None
    if has_bias and (site.sink_logits is not None or site.num_q_heads != site.num_kv_heads):
        return "a bias of the values cannot be added behind the attention"
    return ""


def _rope(node: object) -> fx.Node | None:
    return node if isinstance(node, fx.Node) and node.target is kvx.ROPE else None


def _input(node: object) -> fx.Node | None:
    """Return what the linear layer behind heads reads, `[B, S, W]`, or None after a cast."""
    while isinstance(node, fx.Node) and node.target not in (LINEAR, ADDMM, *PRODUCTS):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or source.meta["type"].dtype != node.meta["type"].dtype:
            return None
        node = source
    if not isinstance(node, fx.Node):
        return None
    x = node.args[1 if node.target is ADDMM else 0]
    while isinstance(x, fx.Node) and x.target in RESHAPES and len(x.meta["type"].shape) != 3:
        x = x.args[0]
    is_stream = isinstance(x, fx.Node) and len(x.meta["type"].shape) == 3
    return x if is_stream and isinstance(x, fx.Node) else None


def _make_spec(rewriter: Rewriter, site: AttentionSite, width: int) -> ResidualSpec:
    names: dict[str, str | None] = {}
    weights = rewriter.program.weights
    for what, projection, size in (
        ("key", site.k, site.head_dim),
        ("value", site.v, site.v_head_dim),
    ):
        assert projection is not None, "checked before"
        made = _matrices(weights, projection, site.num_kv_heads, size)
        for part, tensor in zip((what, f"{what}_bias"), made, strict=True):
            names[part] = None if tensor is None else f"cache_residual.{part}_{site.layer}"
            if tensor is not None:
                source = projection.weight if part == what else projection.bias
                rewriter.set_weight(str(names[part]), tensor, made_from=(str(source),))
    assert names["key"] is not None, "made above"
    assert names["value"] is not None, "made above"
    return ResidualSpec(width, names["key"], names["value"], names["key_bias"], names["value_bias"])


def _matrices(
    weights: Mapping[str, Tensor], projection: Projection, heads: int, size: int
) -> tuple[Tensor, Tensor | None]:
    """Return the matrices of heads `[Hk, W, D]`, and their bias `[Hk, 1, D]` if there is one."""
    weight = weights[projection.weight]
    rows = weight if projection.layout == "out_in" else weight.T
    index = projection.indices(heads, size).to(weight.device)
    made = rows[index.flatten()].unflatten(0, (heads, size)).transpose(1, 2).contiguous()
    if projection.bias is None:
        return made, None
    return made, weights[projection.bias][index][:, None].contiguous()


def _read(rewriter: Rewriter, attention: fx.Node, spec: ResidualSpec, rope: fx.Node | None) -> None:
    """Let one attention make K and V from what it reads."""
    operands = {"key_basis": spec.key, "value_basis": spec.value, "key_bias": spec.key_bias}
    options: dict[str, Any] = {
        name: _weight(rewriter, attention, weight)
        for name, weight in operands.items()
        if weight is not None
    }
    if rope is not None:
        options |= {name: rope.kwargs[name] for name in ROPE_OPTIONS if name in rope.kwargs}
        options["inv_freq"] = rope.args[2]
    rewriter.set_args(attention, **options)
    if spec.value_bias is None:
        return
    type_ = attention.meta["type"]
    bias = _weight(rewriter, attention, spec.value_bias)
    whole = rewriter.call_after(attention, ADD, (attention, bias), type_=type_)
    attention.replace_all_uses_with(whole, delete_user_cb=lambda user: user is not whole)


def _weight(rewriter: Rewriter, before: fx.Node, name: str) -> fx.Node:
    tensor = rewriter.program.weights[name]
    return rewriter.get_weight_node(name, before, TensorType(tensor.dtype, tuple(tensor.shape)))


def _plan(rewriter: Rewriter, site: AttentionSite, spec: ResidualSpec, *, is_turned: bool) -> None:
    """Plan one stream of one vector a token."""
    plan = rewriter.program.plan
    assert plan is not None, "it has a cache"
    codec = ExactCodec(rewriter.program.info.dtype)
    key = dataclasses.replace(
        plan.site(site.layer).key,
        codec=codec.to_dict(),
        planes=codec.planes(spec.width),
        head_dim=spec.width,
        rope="pre" if is_turned else "none",
        makes_heads=True,
    )
    value = KeyView(site.v_head_dim)
    rewriter.update_site_plan(site.layer, num_kv_heads=1, key=key, value=value, payload="residual")
