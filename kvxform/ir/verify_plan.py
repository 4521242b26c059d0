"""Rules of the verifier for the CachePlan and for facts."""

from __future__ import annotations

from kvxform.codecs.base import Codec, dtype_from_name, make_codec
from kvxform.codecs.basis import Basis
from kvxform.codecs.hadamard import check_block
from kvxform.errors import KvxformError, PassError
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.program import AttentionSite, Program
from kvxform.ir.stream_plan import KeyView, StreamPlan
from kvxform.ir.verify_graph import invalid


def verify_plan(program: Program) -> None:
    """Check that a cached program has a plan for each site, and that it can be carried out.

    Raises:
        PassError: KVX215.
    """
    plan = program.plan
    if (plan is not None) != program.is_cached:
        raise invalid("a program must have a plan if and only if it is cached", f"{plan is None=}")
    if plan is None:
        return
    planned = [site.layer for site in plan.sites]
    layers = [site.layer for site in program.sites]
    if sorted(planned) != sorted(layers):
        raise invalid("the plan must have the sites of the program", f"{planned}, not {layers}")
    for site_plan in plan.sites:
        site = program.site(site_plan.layer)
        _check_owner(plan, site_plan)
        _check_site_plan(site, site_plan)
        for name, stream in site_plan.streams.items():
            _check_stream(f"{name} of layer {site.layer}", stream, plan)


def verify_facts(program: Program) -> None:
    """Check that facts say what graph, sites and plan say.

    Raises:
        PassError: KVX215.
    """
    facts, plan = program.facts, program.plan
    _check_fact(program, "cache.inserted", program.is_cached)
    _check_fact(program, "cache.layout", "none" if plan is None else str(plan.layout))
    _check_basis_fact(program, "k.basis", [site.k_basis for site in program.sites])
    _check_basis_fact(program, "v.basis", [site.v_basis for site in program.sites])
    if plan is None:
        return
    for fact, name in (("k.codec", "key"), ("v.codec", "value")):
        streams = [site.streams[name] for site in plan.sites if name in site.streams]
        is_encoded = any(stream.codec["codec"] != "none" for stream in streams)
        if streams and is_encoded != (facts[fact] != "none"):
            raise invalid(f"the fact {fact} must agree with the plan", facts[fact])
    for site in plan.sites:
        if not site.key.makes_heads and site.key.rope not in ("none", facts["k.rope"]):
            raise invalid("the fact k.rope must agree with the plan", facts["k.rope"])


def _check_fact(program: Program, name: str, wanted: bool | str) -> None:
    if program.facts[name] != wanted:
        raise invalid(f"the fact {name} must be {wanted}", program.facts[name])


def _check_basis_fact(program: Program, name: str, bases: list[Basis]) -> None:
    """A fact may name only the kind, and sites that a pass left out stay in the identity basis."""
    fact = program.facts[name]
    agree = [fact in (basis.kind, str(basis)) for basis in bases]
    others = {str(basis) for basis, does in zip(bases, agree, strict=True) if not does}
    if not others <= {"identity"} or (bases and not any(agree)):
        found = ", ".join(sorted({str(basis) for basis in bases}))
        raise invalid(f"the fact {name} must be the basis of the sites, {found}", fact)


def _check_owner(plan: CachePlan, site: SitePlan) -> None:
    owners = {owner.layer: owner for owner in plan.owners}
    owner = owners.get(site.owner)
    if owner is None or owner.layer > site.layer:
        raise invalid(
            "the owner of a cache must be this layer or an earlier one that owns its cache",
            f"owner {site.owner}",
            layer=site.layer,
        )
    if (owner.num_kv_heads, owner.key, owner.value) != (site.num_kv_heads, site.key, site.value):
        raise invalid(
            "a site must read streams as their owner stores them",
            f"owner {site.owner}",
            layer=site.layer,
        )


def _check_pair(site: AttentionSite, plan: SitePlan) -> None:
    """Vectors of a pair hold the keys and values of both layers, the lower one first."""
    wanted = (site.num_q_heads, site.num_kv_heads, 2 * (site.head_dim + site.v_head_dim))
    found = (plan.num_q_heads, plan.num_kv_heads, plan.key.head_dim)
    if wanted != found or plan.value != KeyView(site.v_head_dim):
        rule = f"a pair must have the heads of its site and both layers in a vector, {wanted}"
        raise invalid(rule, found, layer=site.layer)
    if plan.key.regions.flush != "sliding" or plan.key.regions.recent < 1:
        raise invalid("a pair must keep recent tokens", plan.key.regions, layer=site.layer)


def _check_site_plan(site: AttentionSite, plan: SitePlan) -> None:
    if plan.payload == "pair":
        _check_pair(site, plan)
        return
    value = plan.value
    if isinstance(value, KeyView) != (plan.payload != "kv"):
        raise invalid(
            "values must be a view of the keys if and only if they are not cached themselves",
            plan.payload,
            layer=site.layer,
        )
    heads, width = site.num_kv_heads, site.head_dim
    if site.residual is not None:
        heads, width = 1, site.residual.width
    if plan.key.makes_heads != (plan.payload == "residual"):
        raise invalid(
            "heads are made from a residual payload alone", plan.payload, layer=site.layer
        )
    pairs = {
        "payload": (site.payload, plan.payload),
        "num_q_heads": (site.num_q_heads, plan.num_q_heads),
        "num_kv_heads": (heads, plan.num_kv_heads),
        "head_dim of k": (width, plan.key.head_dim),
        "head_dim of v": (site.v_head_dim, plan.value.head_dim),
        "basis of k": (site.k_basis, plan.key.basis),
        "basis of v": (site.v_basis, site.v_basis if isinstance(value, KeyView) else value.basis),
    }
    for what, (wanted, found) in pairs.items():
        if wanted != found:
            raise invalid(
                f"{what} must be the same in site and plan: {wanted}", found, layer=site.layer
            )
    joined = {plane.joined for stream in plan.streams.values() for plane in stream.planes}
    if any(plan.num_kv_heads % heads for heads in joined):
        rule = f"heads that share a row of a plane must divide {plan.num_kv_heads} KV heads"
        raise invalid(rule, sorted(joined), layer=site.layer)


def _check_stream(name: str, stream: StreamPlan, plan: CachePlan) -> None:
    try:
        codec = make_codec(stream.codec)
        codec.check(stream.head_dim)
        dtype_from_name(stream.regions.dtype)
        _check_basis(stream.basis, stream.head_dim)
    except (KvxformError, TypeError, ValueError) as error:
        raise invalid(f"the codec of the {name} must fit its stream", error) from error
    _check_planes(name, stream, codec)
    _check_tokens(name, stream, plan)


def _check_basis(basis: Basis, head_dim: int) -> None:
    if basis.kind == "hadamard":
        check_block(basis.block, head_dim, "verifier")
    elif basis.kind not in ("matrix", "scale") and basis != Basis():
        rule = "a basis must be identity, hadamard, matrix or scale"
        raise PassError("KVX215", rule, got=basis)


def _check_planes(name: str, stream: StreamPlan, codec: Codec) -> None:
    wanted = codec.planes(stream.head_dim), codec.tokens_per_group
    if (stream.planes, stream.tokens_per_group) != wanted:
        raise invalid(
            f"the planes of the {name} must be those of its codec, {wanted[0]}",
            f"{stream.planes} with {stream.tokens_per_group} tokens a group",
        )


def _check_tokens(name: str, stream: StreamPlan, plan: CachePlan) -> None:
    group, regions = stream.tokens_per_group, stream.regions
    if min(regions.sink, regions.recent) < 0:
        raise invalid(f"regions of the {name} must not be negative", regions)
    if regions.flush == "block" and regions.recent % group:
        raise invalid(
            f"the {name} must flush whole groups of {group} tokens", f"recent {regions.recent}"
        )
    if plan.layout.kind == "checkpoint" and (stream.codec["codec"] != "none" or regions.sink):
        rule = f"the {name} must be kept as it is where tokens are computed anew"
        raise invalid(rule, stream.codec["codec"])
    if plan.layout.kind == "paged":
        size = plan.layout.page_size
        if size < 1 or size % group:
            raise invalid(
                f"a page must hold whole groups of {group} tokens of the {name}", f"{size} tokens"
            )
