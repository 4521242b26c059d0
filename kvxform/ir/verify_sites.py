"""Rules of the verifier for attention: sites, their nodes, and the chain of cache handles."""

from __future__ import annotations

from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis
from kvxform.ir.latent import SLICE
from kvxform.ir.program import AttentionSite, LatentSpec, Program, Projection
from kvxform.ir.types import TensorType
from kvxform.ir.verify_graph import invalid


def verify_sites(program: Program) -> None:
    """Check that sites and attention nodes describe the same thing.

    Raises:
        PassError: KVX215.
    """
    nodes = _attention_nodes(program)
    for site in program.sites:
        _check_geometry(site)
        if site.layer not in nodes:
            raise invalid("a site must have an attention node", "none", layer=site.layer)
        node = nodes.pop(site.layer)
        _check_attention(site, node)
        if node.target is kvx.CACHED_ATTENTION:
            _check_cache_chain(program, site, node)
        _check_projections(program, site)
        _check_basis(program, site, "k", site.k_basis, site.head_dim)
        _check_basis(program, site, "v", site.v_basis, site.v_head_dim)
    if nodes:
        layer, node = nodes.popitem()
        raise invalid("an attention node must belong to a site", f"layer {layer}", node)


def _attention_nodes(program: Program) -> dict[int, fx.Node]:
    nodes: dict[int, fx.Node] = {}
    expected = kvx.CACHED_ATTENTION if program.is_cached else kvx.ATTENTION
    for node in program.calls(*kvx.ATTENTION_OPS):
        if node.target is not expected:
            raise invalid(
                "attention must be cached if and only if the program has a cache", node.target, node
            )
        layer = node.kwargs["layer"]
        assert isinstance(layer, int), "verify_graph has checked the schema"
        if layer in nodes:
            raise invalid("a layer must have one attention node", f"layer {layer} twice", node)
        nodes[layer] = node
    if len({site.layer for site in program.sites}) != len(program.sites):
        raise invalid("a layer must have one site", [site.layer for site in program.sites])
    return nodes


def _check_geometry(site: AttentionSite) -> None:
    sizes = (site.num_q_heads, site.num_kv_heads, site.head_dim, site.v_head_dim)
    if site.payload == "latent" and (site.num_kv_heads > 1 or site.v_head_dim > site.head_dim):
        raise invalid("a latent must be one key whose part is the value", sizes, layer=site.layer)
    if site.payload == "k" and (site.head_dim != site.v_head_dim or site.k_basis != Basis()):
        rule = "keys that are values too must be as wide, and stay in the basis of the model"
        raise invalid(rule, str(site.k_basis), layer=site.layer)
    if (site.payload == "residual") != (site.residual is not None):
        raise invalid(
            "a residual payload must say what makes heads", site.payload, layer=site.layer
        )
    if site.residual is not None and (site.k_basis, site.v_basis) != (Basis(), Basis()):
        rule = "keys that are made when they are read must stay in the basis of the model"
        raise invalid(rule, f"{site.k_basis}, {site.v_basis}", layer=site.layer)
    if min(sizes) < 1 or site.num_q_heads % site.num_kv_heads:
        raise invalid(
            "query heads must be a multiple of KV heads, and all sizes positive",
            sizes,
            layer=site.layer,
        )


def _check_attention(site: AttentionSite, node: fx.Node) -> None:
    _check_heads(node.args[0], node, "q", site.num_q_heads, site.head_dim)
    if node.target is kvx.ATTENTION:
        _check_heads(node.args[1], node, "k", site.num_kv_heads, site.head_dim)
        _check_values(site, node, node.args[1], node.args[2])
    elif node.kwargs["v_head_dim"] != site.v_head_dim:
        raise invalid(f"v_head_dim must be {site.v_head_dim}", node.kwargs["v_head_dim"], node)
    _check_heads(node, node, "the result", site.num_q_heads, site.v_head_dim)
    for name in ("scale", "window", "chunk", "softcap", "sink_logits", "alibi_slopes"):
        option = node.kwargs.get(name)
        wanted, found = (
            getattr(site, name),
            option.target if isinstance(option, fx.Node) else option,
        )
        if wanted != found:
            raise invalid(f"{name} must be that of the site, {wanted}", found, node)


def _check_heads(value: object, node: fx.Node, what: str, heads: int, head_dim: int) -> None:
    found = value.meta["type"] if isinstance(value, fx.Node) else None
    shape = found.shape if isinstance(found, TensorType) else ()
    if len(shape) != 4 or (shape[1], shape[3]) != (heads, head_dim):
        raise invalid(f"{what} must be [B, {heads}, S, {head_dim}] as its site says", found, node)


def _check_values(site: AttentionSite, node: fx.Node, k: object, v: object) -> None:
    """Values that are a view of the keys are not appended; see `AttentionSite.payload`."""
    if site.payload != "kv" and node.target is kvx.CACHE_APPEND:
        if v is not None:
            raise invalid("what is key and value must be appended once, as a key", v, node)
        return
    _check_heads(v, node, "v", site.num_kv_heads, site.v_head_dim)
    assert isinstance(v, fx.Node), "it has heads"
    first = (k, -1, 0, site.v_head_dim)
    before = k.args[0] if isinstance(k, fx.Node) and k.target is kvx.ROPE else k
    if site.payload == "k" and v is not before:
        raise invalid("values must be the keys before RoPE", v, node)
    if site.payload == "latent" and not (v.target is SLICE and v.args == first):
        raise invalid("values of a latent must be the first channels of its keys", v, node)


def _check_cache_chain(program: Program, site: AttentionSite, node: fx.Node) -> None:
    """The handle that is read must come from the input through the append of the owner."""
    owner = site.layer
    if program.plan is not None and any(s.layer == site.layer for s in program.plan.sites):
        owner = program.plan.site(site.layer).owner
    appended = []
    handle = node.args[1]
    while isinstance(handle, fx.Node) and handle.target is kvx.CACHE_APPEND:
        layer = handle.kwargs["layer"]
        appended.append(layer)
        if layer == site.layer:
            heads, width = site.num_kv_heads, site.head_dim
            if site.residual is not None:
                heads, width = 1, site.residual.width
            _check_heads(handle.args[0], handle, "k", heads, width)
            _check_values(site, handle, handle.args[0], handle.args[1])
        handle = handle.args[2]
    if handle is not program.placeholder("cache"):
        raise invalid("a cache handle must come from the input cache", handle, node)
    if owner not in appended or len(set(appended)) != len(appended):
        raise invalid(
            f"the keys of layer {owner} must be appended once before they are read", appended, node
        )


def _check_basis(
    program: Program, site: AttentionSite, name: str, basis: Basis, head_dim: int
) -> None:
    if basis.kind not in ("matrix", "scale"):
        return
    matrices = program.weights.get(basis.weight or "")
    if matrices is None:
        rule = f"the basis of {name} must be a weight"
        raise invalid(rule, basis.weight, layer=site.layer)
    size = basis.heads * head_dim
    wanted = (site.num_kv_heads // max(1, basis.heads), size, size)
    if basis.kind == "scale":
        wanted = (site.num_kv_heads, 1, head_dim)
    inverses = program.weights.get(basis.inverse) if basis.inverse else matrices
    if inverses is None or inverses.shape != matrices.shape:
        rule = f"the inverse of the basis of {name} must be a weight of the same shape"
        raise invalid(rule, basis.inverse, layer=site.layer)
    if tuple(matrices.shape) != wanted or site.num_kv_heads % basis.heads:
        rule = f"the basis of {name}, {basis.weight}, must be {list(wanted)}"
        raise invalid(rule, list(matrices.shape), layer=site.layer)


def _check_projections(program: Program, site: AttentionSite) -> None:
    q_heads, kv_heads = site.num_q_heads, site.num_kv_heads
    _check_projection(program, site, "q", q_heads, site.head_dim, site.q)
    _check_projection(program, site, "k", kv_heads, site.head_dim, site.k)
    _check_projection(program, site, "v", kv_heads, site.v_head_dim, site.v)
    _check_projection(program, site, "o", q_heads, site.v_head_dim, site.o)
    if site.latent is not None:
        _check_latent(program, site, site.latent)
    if site.rope is not None and site.rope.inv_freq not in program.weights:
        raise invalid("inv_freq of a site must be a weight", site.rope.inv_freq, layer=site.layer)


def _check_latent(program: Program, site: AttentionSite, latent: LatentSpec) -> None:
    own = site.head_dim - latent.rope_dim
    if min(latent.rank, latent.rope_dim, own) < 1:
        raise invalid("a latent and the parts of its keys must have channels", latent)
    heads = site.num_kv_heads
    _check_projection(program, site, "k from the latent", heads, own, latent.up_k)
    _check_projection(program, site, "v from the latent", heads, site.v_head_dim, latent.up_v)


def _check_projection(
    program: Program,
    site: AttentionSite,
    name: str,
    num_heads: int,
    head_dim: int,
    projection: Projection | None,
) -> None:
    if projection is None:
        return
    weight = program.weights.get(projection.weight)
    if weight is None or weight.ndim != 2:
        raise invalid(
            f"the projection of {name} must be a matrix among the weights",
            projection.weight,
            layer=site.layer,
        )
    if projection.bias is not None and projection.bias not in program.weights:
        raise invalid(f"the bias of {name} must be a weight", projection.bias, layer=site.layer)
    heads_come_first = (projection.layout == "out_in") != (name == "o")
    size = weight.shape[0 if heads_come_first else 1]
    first, last = projection.start, projection.start + (num_heads - 1) * projection.head_stride
    if min(first, last) < 0 or max(first, last) + head_dim > size:
        raise invalid(
            f"all heads of {name} must lie inside {projection.weight}",
            f"{max(first, last) + head_dim} of {size}",
            layer=site.layer,
        )
