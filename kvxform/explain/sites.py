"""From a captured Program to site records: what the graph says beyond the fields of a site."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.capture.structure import find_content
from kvxform.explain.norms import Lane, find_lanes, find_norms, linear_input
from kvxform.explain.records import LatentRecord, RopeRecord, SiteRecord, WeightRecord
from kvxform.ir.linear import as_linear
from kvxform.ir.program import AttentionSite, LatentSpec, Program, Projection, RopeSpec

_SERIES_TOLERANCE = 1e-5  # of the logarithm of a frequency, for float32 frequencies


def describe_sites(program: Program) -> tuple[SiteRecord, ...]:
    """Return one record a raised site of a captured program, in the order of layers."""
    nodes = {node.kwargs["layer"]: node for node in program.calls(kvx.ATTENTION)}
    positions = _position_values(program)
    return tuple(_describe(program, s, nodes[s.layer], positions) for s in program.sites)


def _position_values(program: Program) -> set[fx.Node]:
    """Return the nodes that are computed from positions and not from tokens."""
    from_positions = find_content(program.graph, [program.placeholder("position_ids")])
    return from_positions - find_content(program.graph)


def _describe(
    program: Program, site: AttentionSite, node: fx.Node, positions: set[fx.Node]
) -> SiteRecord:
    lanes = find_lanes(node, site.head_dim)
    return SiteRecord(
        layer=site.layer,
        module=site.module,
        origin=node.meta["origin"],
        num_q_heads=site.num_q_heads,
        num_kv_heads=site.num_kv_heads,
        group=site.num_q_heads // site.num_kv_heads,
        head_dim=site.head_dim,
        v_head_dim=site.v_head_dim,
        scale=site.scale,
        is_default_scale=math.isclose(site.scale**2 * site.head_dim, 1.0, rel_tol=1e-6),
        causal=bool(node.kwargs.get("causal", True)),
        window=site.window,
        chunk=site.chunk,
        softcap=site.softcap,
        sink_logits=site.sink_logits,
        alibi_slopes=site.alibi_slopes,
        rope=None if site.rope is None else _describe_rope(program, site.rope),
        keeps_positions=any(_reads(lane, positions) for lane in (lanes["q"], lanes["k"])),
        norms=find_norms(node, lanes),
        q=_source(program, site.q, lanes["q"], site.num_q_heads, site.head_dim),
        k=_source(program, site.k, lanes["k"], site.num_kv_heads, site.head_dim),
        v=_source(program, site.v, lanes["v"], site.num_kv_heads, site.v_head_dim),
        o=None if site.o is None else _reader(program, site.o, site.num_q_heads, site.v_head_dim),
        latent=None if site.latent is None else _latent(program, site, site.latent),
        owner=site.owner,
        notes=site.notes,
    )


def _reads(lane: Lane, positions: set[fx.Node]) -> bool:
    """Return whether anything but `kvx.rope` on a lane reads one of `positions`."""
    others = (node for node in lane.nodes if node.target is not kvx.ROPE)
    return any(not positions.isdisjoint(node.all_input_nodes) for node in others)


def _source(
    program: Program, found: Projection | None, lane: Lane, heads: int, head_dim: int
) -> WeightRecord | None:
    """Return where heads come from: a projection, or the linear layer at the end of a lane."""
    if found is not None:
        return _maker(program, found, heads, head_dim)
    call = None if lane.linear is None else as_linear(lane.linear, linear_input(lane.linear))
    if call is None:
        return None
    whole = Projection(call.weight, call.bias, call.layout)
    return replace(_maker(program, whole, heads, head_dim), start=None, head_stride=None)


def _latent(program: Program, site: AttentionSite, spec: LatentSpec) -> LatentRecord:
    own = site.head_dim - spec.rope_dim
    up_k = _maker(program, spec.up_k, site.num_kv_heads, own)
    up_v = _maker(program, spec.up_v, site.num_kv_heads, site.v_head_dim)
    return LatentRecord(spec.rank, spec.rope_dim, up_k, up_v)


def _maker(program: Program, found: Projection, heads: int, head_dim: int) -> WeightRecord:
    """Return which entries of a weight make heads."""
    return _weight(program, found, heads, head_dim, is_row=found.layout == "out_in")


def _reader(program: Program, found: Projection, heads: int, head_dim: int) -> WeightRecord:
    """Return which entries of a weight read heads."""
    return _weight(program, found, heads, head_dim, is_row=found.layout == "in_out")


def _weight(
    program: Program, found: Projection, heads: int, head_dim: int, *, is_row: bool
) -> WeightRecord:
    return WeightRecord(
        weight=found.weight,
        shape=tuple(program.weights[found.weight].shape),
        bias=found.bias,
        layout=found.layout,
        axis="rows" if is_row else "columns",
        heads=heads,
        head_dim=head_dim,
        start=found.start,
        head_stride=found.head_stride,
    )


def _describe_rope(program: Program, rope: RopeSpec) -> RopeRecord:
    frequencies = program.weights[rope.inv_freq]
    kind, theta, factor = _series(frequencies, rope.rotary_dim)
    return RopeRecord(
        rotary_dim=rope.rotary_dim,
        pairs="interleaved" if rope.interleaved else "half",
        inv_freq=rope.inv_freq,
        frequencies=kind,
        theta=theta,
        linear_factor=factor,
        attention_scaling=rope.attention_scaling,
    )


def _series(frequencies: Tensor, rotary_dim: int) -> tuple[str, float | None, float]:
    """Return kind, theta and linear factor of `[pairs]`: f_i = theta^(-2i / rotary_dim) / factor.

    Source: RoFormer, arXiv 2104.09864, section 3.3; linear scaling: arXiv 2306.15595.
    """
    if frequencies.is_meta:
        return "unknown", None, 1.0
    if frequencies.numel() < 2 or bool((frequencies <= 0).any()):
        return "table", None, 1.0
    logs = frequencies.double().log()
    steps = logs.diff()
    tolerance = max(_SERIES_TOLERANCE, 4 * torch.finfo(frequencies.dtype).eps)
    if float((steps - steps.mean()).abs().max()) > tolerance:
        return "table", None, 1.0
    theta = math.exp(-float(steps.mean()) * rotary_dim / 2)
    return "geometric", _round(theta), _round(math.exp(-float(logs[0])))


def _round(value: float) -> float:
    """Drop the digits that float32 frequencies do not have."""
    return float(f"{value:.5g}")
