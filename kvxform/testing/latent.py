"""A small program with latent attention (MLA) as capture writes it; see `programs`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

import kvxform.ir.ops as kvx
from kvxform.ir.program import AttentionSite, LatentSpec, Program, Projection
from kvxform.testing.builder import VOCAB, WIDTH, Builder, aten

LATENT, SHARED, OWN, VALUES = 16, 8, 4, 12  # channels: latent, shared and own part of a key, value


def latent_program(
    *,
    dtype: torch.dtype = torch.float64,
    layers: int = 2,
    heads: int = 4,
    shared_first: bool = False,
    attention: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Program:
    """Return latent attention: keys of 4 + 8 channels and values of 12 from a latent of 16.

    Args:
        dtype: As in `llama_program`, and what is not named here.
        layers: Layers.
        heads: Query heads; as many KV heads.
        shared_first: Let the part that heads share come first in a key.
        attention: Extra keywords of every attention op.
        seed: Of weights.
    """
    b = Builder(dtype, seed)
    ids, positions = b.input("input_ids"), b.input("position_ids")
    b.weights["inv_freq"] = 10000.0 ** (-torch.arange(0, SHARED, 2, dtype=dtype) / SHARED)
    x = b.call(aten.embedding.default, b.weight("embed.weight", VOCAB, WIDTH, std=1.0), ids)
    sites: list[AttentionSite] = []
    scale, options = (OWN + SHARED) ** -0.5, dict(attention or {})
    for layer in range(layers):
        b.module = f"layers.{layer}.attn"
        gain = b.weight(f"layers.{layer}.norm1.weight", WIDTH, mean=1.0, std=0.3)
        h = b.call(kvx.RMS_NORM, x, gain, 1e-5)
        q, k, v = _latent_operands(b, h, positions, heads, shared_first)
        a = b.call(kvx.ATTENTION, q, k, v, positions, layer=layer, scale=scale, **options)
        o = b.linear(b.merge_heads(a, heads * VALUES), f"{b.module}.o", WIDTH)
        x = b.call(aten.add.Tensor, x, o)
        up_k, up_v = (
            Projection(f"{b.module}.up.weight", None, "out_in", start, OWN + VALUES)
            for start in (0, OWN)
        )
        latent = LatentSpec(LATENT, SHARED, up_k, up_v, shared_first)
        out = Projection(f"{b.module}.o.weight", head_stride=VALUES)
        sizes = (heads, heads, OWN + SHARED, VALUES)
        site = AttentionSite(layer, b.module, *sizes, scale, v=up_v, o=out, latent=latent)
        sites.append(dataclasses.replace(site, **options))
    b.module = "head"
    head = b.weight("head.weight", VOCAB, WIDTH)
    return b.finish(b.call(aten.linear.default, x, head), sites, VOCAB)


def _latent_operands(
    b: Builder, h: fx.Node, positions: fx.Node, heads: int, shared_first: bool
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Return q, k and v of latent attention, `[B, H, S, channels]` each."""

    def part(x: fx.Node, start: int, stop: int) -> fx.Node:
        return b.call(aten.slice.Tensor, x, -1, start, stop)

    def turn(x: fx.Node) -> fx.Node:
        return b.call(kvx.ROPE, x, positions, b.get("inv_freq"), rotary_dim=SHARED)

    def join(own: fx.Node, shared: fx.Node) -> fx.Node:
        return b.call(aten.cat.default, [shared, own] if shared_first else [own, shared], -1)

    q = b.heads(b.linear(h, f"{b.module}.q", heads * (OWN + SHARED)), heads, OWN + SHARED)
    q = join(part(q, 0, OWN), turn(part(q, OWN, OWN + SHARED)))
    down = b.linear(h, f"{b.module}.down", LATENT + SHARED)
    gain = b.weight(f"{b.module}.norm.weight", LATENT, mean=1.0, std=0.3)
    latent = b.call(kvx.RMS_NORM, part(down, 0, LATENT), gain, 1e-5)
    up = b.linear(latent, f"{b.module}.up", heads * (OWN + VALUES))
    up = b.heads(up, heads, OWN + VALUES)
    shared = turn(b.heads(part(down, LATENT, LATENT + SHARED), 1, SHARED))
    spread = b.call(aten.expand.default, shared, [-1, heads, -1, -1])
    return q, join(part(up, 0, OWN), spread), part(up, OWN, OWN + VALUES)
