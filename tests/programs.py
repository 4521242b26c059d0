"""Small programs in the dialect, written by hand, and what tests need to rewrite and run them.

`llama_program`: RMSNorm, half RoPE, grouped heads, SwiGLU, nn.Linear layout.
`gpt2_program`: LayerNorm, learned positions, one fused QKV projection, Conv1D layout.
`latent_program`: latent attention (MLA) as capture writes it, with a RoPE part that heads share.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.cache import make_handle
from kvxform.ir.program import (
    AttentionSite,
    LatentSpec,
    ModelInfo,
    Program,
    Projection,
    RopeSpec,
    default_positions,
)
from kvxform.ir.scoring import Scoring, attend
from kvxform.ir.types import SymType, TensorType
from kvxform.ir.verify import verify_program
from kvxform.pass_base import GraphPass, Match, NoMatch, Rewriter

aten = torch.ops.aten
BATCH, TOKENS = 11, 13  # sizes that nothing else has: they become the symbols B and S
SYMBOLS = {BATCH: "B", TOKENS: "S", BATCH * TOKENS: "B*S"}


class Builder:
    """Builds a graph node by node; types come from running each op on the meta device."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        self.graph = fx.Graph()
        self.weights: dict[str, Tensor] = {}
        self.values: dict[fx.Node, Any] = {}
        self.dtype = dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.module = ""

    def stamp(self, node: fx.Node, value: Any, origin: str = "") -> fx.Node:
        self.values[node] = value
        if isinstance(value, int):
            type_ = SymType(SYMBOLS[value])
        else:
            type_ = TensorType(value.dtype, tuple(SYMBOLS.get(n, n) for n in value.shape))
        node.meta = {"type": type_, "module": self.module, "origin": origin, "via": ()}
        return node

    def input(self, name: str) -> fx.Node:
        value = torch.empty(BATCH, TOKENS, dtype=torch.int64, device="meta")
        return self.stamp(self.graph.placeholder(name), value)

    def weight(self, name: str, *shape: int, mean: float = 0.0, std: float = 0.1) -> fx.Node:
        if name not in self.weights:
            noise = torch.randn(*shape, generator=self.generator, dtype=torch.float64)
            self.weights[name] = (noise * std + mean).to(self.dtype)
        return self.get(name)

    def get(self, name: str) -> fx.Node:
        node = self.graph.create_node("get_attr", name, name=name.replace(".", "_"))
        return self.stamp(node, self.weights[name].to("meta"))

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        shown = fx.node.map_arg((args, kwargs), lambda n: self.values[n])
        return self.stamp(node, target(*shown[0], **shown[1]), f"{node.name} (programs.py:1)")

    def size(self, node: fx.Node, dim: int) -> fx.Node:
        return self.call(aten.sym_size.int, node, dim)

    def heads(self, x: fx.Node, num_heads: int, head_dim: int) -> fx.Node:
        shape = [self.size(x, 0), self.size(x, 1), num_heads, head_dim]
        return self.call(aten.transpose.int, self.call(aten.view.default, x, shape), 1, 2)

    def merge_heads(self, x: fx.Node, width: int) -> fx.Node:
        x = self.call(aten.transpose.int, x, 1, 2)  # [B, H, S, D] -> [B, S, H, D]
        return self.call(aten.reshape.default, x, [self.size(x, 0), self.size(x, 1), width])

    def linear(self, x: fx.Node, name: str, out: int, bias: bool = False) -> fx.Node:
        w = self.weight(f"{name}.weight", out, self.values[x].shape[-1])
        b = [self.weight(f"{name}.bias", out)] if bias else []
        return self.call(aten.linear.default, x, w, *b)

    def conv1d(self, x: fx.Node, name: str, out: int) -> fx.Node:
        width = self.values[x].shape[-1]
        flat = self.call(aten.view.default, x, [-1, width])
        b = self.weight(f"{name}.bias", out)
        w = self.weight(f"{name}.weight", width, out)
        y = self.call(aten.addmm.default, b, flat, w)
        return self.call(aten.view.default, y, [self.size(x, 0), self.size(x, 1), out])

    def finish(self, logits: fx.Node, sites: list[AttentionSite], vocab: int) -> Program:
        self.graph.output(logits)
        info = ModelInfo("toy", "toy", vocab, str(self.dtype).removeprefix("torch."), 64)
        return Program(self.graph, self.weights, tuple(sites), info)


def llama_program(
    *,
    dtype: torch.dtype = torch.float64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    bias: bool = False,
    tied: bool = False,
    weight_offset: float = 0.0,
    attention: dict[str, Any] | None = None,
    seed: int = 0,
) -> Program:
    """Return a Llama-like program; `attention` holds extra keywords of every attention op."""
    b, width, vocab = Builder(dtype, seed), 32, 48
    ids, positions = b.input("input_ids"), b.input("position_ids")
    frequencies = 10000.0 ** (-torch.arange(0, head_dim, 2, dtype=dtype) / head_dim)
    b.weights["inv_freq"] = frequencies
    x = b.call(aten.embedding.default, b.weight("embed.weight", vocab, width, std=1.0), ids)
    sites = []

    def norm(x: fx.Node, name: str) -> fx.Node:
        gain = b.weight(f"{name}.weight", width, mean=1 - weight_offset, std=0.3)
        return b.call(kvx.RMS_NORM, x, gain, 1e-5, weight_offset=weight_offset)

    for layer in range(layers):
        b.module = f"layers.{layer}.attn"
        h = norm(x, f"layers.{layer}.norm1")
        q, k, v = (
            b.heads(b.linear(h, f"{b.module}.{n}", count * head_dim, bias), count, head_dim)
            for n, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        rope = {"rotary_dim": head_dim}
        q = b.call(kvx.ROPE, q, positions, b.get("inv_freq"), **rope)
        k = b.call(kvx.ROPE, k, positions, b.get("inv_freq"), **rope)
        scale = head_dim**-0.5
        extra = attention or {}
        for name in (n for n, value in extra.items() if isinstance(value, Tensor)):
            b.weights[name] = extra[name].to(b.dtype)
            extra = {**extra, name: b.get(name)}
        a = b.call(kvx.ATTENTION, q, k, v, positions, layer=layer, scale=scale, **extra)
        o = b.linear(b.merge_heads(a, heads * head_dim), f"{b.module}.o", width)
        x = b.call(aten.add.Tensor, x, o)
        site = _llama_site(b, layer, heads, kv_heads, head_dim, bias)
        fields = {n: n if isinstance(value, fx.Node) else value for n, value in extra.items()}
        sites.append(dataclasses.replace(site, **fields))
        b.module = f"layers.{layer}.mlp"
        h = norm(x, f"layers.{layer}.norm2")
        gate = b.call(aten.silu.default, b.linear(h, f"{b.module}.gate", 2 * width))
        up = b.call(aten.mul.Tensor, gate, b.linear(h, f"{b.module}.up", 2 * width))
        x = b.call(aten.add.Tensor, x, b.linear(up, f"{b.module}.down", width))
    b.module = "head"
    h = norm(x, "norm")
    head = b.get("embed.weight") if tied else b.weight("head.weight", vocab, width)
    return b.finish(b.call(aten.linear.default, h, head), sites, vocab)


def _llama_site(
    b: Builder, layer: int, heads: int, kv_heads: int, head_dim: int, bias: bool
) -> AttentionSite:
    def projection(name: str) -> Projection:
        has_bias = bias and name != "o"
        path = f"{b.module}.{name}"
        return Projection(
            f"{path}.weight", f"{path}.bias" if has_bias else None, head_stride=head_dim
        )

    q, k, v, o = (projection(n) for n in "qkvo")
    scale, rope = head_dim**-0.5, RopeSpec("inv_freq", head_dim)
    return AttentionSite(
        layer, b.module, heads, kv_heads, head_dim, head_dim, scale, q, k, v, o, rope
    )


def gpt2_program(
    *, dtype: torch.dtype = torch.float64, layers: int = 2, tied: bool = True, seed: int = 0
) -> Program:
    """Return a GPT-2-like program: 2 heads of 16 channels, fused QKV, biases everywhere."""
    b, heads, head_dim, vocab = Builder(dtype, seed), 2, 16, 48
    width = heads * head_dim
    ids, positions = b.input("input_ids"), b.input("position_ids")
    x = b.call(
        aten.add.Tensor,
        b.call(aten.embedding.default, b.weight("wte.weight", vocab, width, std=1.0), ids),
        b.call(aten.embedding.default, b.weight("wpe.weight", 64, width), positions),
    )
    sites = []

    def norm(x: fx.Node, name: str) -> fx.Node:
        gain = b.weight(f"{name}.weight", width, mean=1.0, std=0.3)
        bias = b.weight(f"{name}.bias", width)
        return b.call(aten.layer_norm.default, x, [width], gain, bias, 1e-5)

    for layer in range(layers):
        b.module = f"h.{layer}.attn"
        qkv = b.conv1d(norm(x, f"h.{layer}.ln_1"), f"{b.module}.c_attn", 3 * width)
        q, k, v = (
            b.heads(b.call(aten.slice.Tensor, qkv, 2, i * width, (i + 1) * width), heads, head_dim)
            for i in range(3)
        )
        a = b.call(kvx.ATTENTION, q, k, v, positions, layer=layer, scale=head_dim**-0.5)
        o = b.conv1d(b.merge_heads(a, width), f"{b.module}.c_proj", width)
        x = b.call(aten.add.Tensor, x, o)
        fused = (
            Projection(
                f"{b.module}.c_attn.weight", f"{b.module}.c_attn.bias", "in_out", start, head_dim
            )
            for start in (0, width, 2 * width)
        )
        out = Projection(
            f"{b.module}.c_proj.weight", f"{b.module}.c_proj.bias", "in_out", 0, head_dim
        )
        sites.append(
            AttentionSite(
                layer, b.module, heads, heads, head_dim, head_dim, head_dim**-0.5, *fused, out
            )
        )
        b.module = f"h.{layer}.mlp"
        h = b.conv1d(norm(x, f"h.{layer}.ln_2"), f"{b.module}.c_fc", 2 * width)
        h = b.conv1d(b.call(aten.gelu.default, h), f"{b.module}.c_proj", width)
        x = b.call(aten.add.Tensor, x, h)
    b.module = "head"
    h = norm(x, "ln_f")
    head = b.get("wte.weight") if tied else b.weight("head.weight", vocab, width)
    return b.finish(b.call(aten.linear.default, h, head), sites, vocab)


LATENT, SHARED, OWN, VALUES = 16, 8, 4, 12  # channels of `latent_program`


def latent_program(
    *,
    dtype: torch.dtype = torch.float64,
    layers: int = 2,
    heads: int = 4,
    shared_first: bool = False,
    attention: dict[str, Any] | None = None,
    seed: int = 0,
) -> Program:
    """Return latent attention: keys of 4 + 8 channels and values of 12 from a latent of 16."""
    b, width, vocab = Builder(dtype, seed), 32, 48
    ids, positions = b.input("input_ids"), b.input("position_ids")
    b.weights["inv_freq"] = 10000.0 ** (-torch.arange(0, SHARED, 2, dtype=dtype) / SHARED)
    x = b.call(aten.embedding.default, b.weight("embed.weight", vocab, width, std=1.0), ids)
    sites = []

    def part(x: fx.Node, start: int, stop: int) -> fx.Node:
        return b.call(aten.slice.Tensor, x, -1, start, stop)

    def turn(x: fx.Node) -> fx.Node:
        return b.call(kvx.ROPE, x, positions, b.get("inv_freq"), rotary_dim=SHARED)

    def join(own: fx.Node, shared: fx.Node) -> fx.Node:
        return b.call(aten.cat.default, [shared, own] if shared_first else [own, shared], -1)

    for layer in range(layers):
        b.module = f"layers.{layer}.attn"
        gain = b.weight(f"layers.{layer}.norm1.weight", width, mean=1.0, std=0.3)
        h = b.call(kvx.RMS_NORM, x, gain, 1e-5)
        q = b.heads(b.linear(h, f"{b.module}.q", heads * (OWN + SHARED)), heads, OWN + SHARED)
        q = join(part(q, 0, OWN), turn(part(q, OWN, OWN + SHARED)))
        down = b.linear(h, f"{b.module}.down", LATENT + SHARED)
        gain = b.weight(f"{b.module}.norm.weight", LATENT, mean=1.0, std=0.3)
        latent = b.call(kvx.RMS_NORM, part(down, 0, LATENT), gain, 1e-5)
        up = b.linear(latent, f"{b.module}.up", heads * (OWN + VALUES))
        up = b.heads(up, heads, OWN + VALUES)
        shared = turn(b.heads(part(down, LATENT, LATENT + SHARED), 1, SHARED))
        spread = b.call(aten.expand.default, shared, [-1, heads, -1, -1])
        k, v = join(part(up, 0, OWN), spread), part(up, OWN, OWN + VALUES)
        scale = (OWN + SHARED) ** -0.5
        options = attention or {}
        a = b.call(kvx.ATTENTION, q, k, v, positions, layer=layer, scale=scale, **options)
        o = b.linear(b.merge_heads(a, heads * VALUES), f"{b.module}.o", width)
        x = b.call(aten.add.Tensor, x, o)
        rows = [
            Projection(f"{b.module}.up.weight", None, "out_in", start, OWN + VALUES)
            for start in (0, OWN)
        ]
        site = AttentionSite(layer, b.module, heads, heads, OWN + SHARED, VALUES, scale, v=rows[1])
        latent_spec = LatentSpec(LATENT, SHARED, *rows, shared_first)
        out = Projection(f"{b.module}.o.weight", head_stride=VALUES)
        sites.append(dataclasses.replace(site, o=out, latent=latent_spec, **options))
    b.module = "head"
    head = b.weight("head.weight", vocab, width)
    return b.finish(b.call(aten.linear.default, x, head), sites, vocab)


class DenseCache:
    """The simplest cache: K and V of each layer as they come, one length for all rows.

    Without V, values are the keys, cut by whoever reads them.
    """

    def __init__(self) -> None:
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}

    def append(self, layer: int, k: Tensor, v: Tensor | None) -> None:
        v = k if v is None else v
        if layer in self.stored:
            old_k, old_v = self.stored[layer]
            k, v = torch.cat([old_k, k], 2), torch.cat([old_v, v], 2)
        self.stored[layer] = (k, v)

    def attend(self, layer: int, q: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        k, v = self.stored[layer]
        read = scoring.key_read
        if read is not None:
            table = None if read.inv_freq is None else read.table(k.shape[2], k.dtype)
            k = read.apply(k, 0, table)
        v = scoring.read_values(v)
        past = torch.arange(k.shape[2]).expand(k.shape[0], -1)
        mask = scoring.span.sees(positions, past)
        return attend(q, k, v, mask, scoring, bias=scoring.bias(positions, past))


def apply(graph_pass: GraphPass, program: Program) -> tuple[Program, list[Match | NoMatch]]:
    """Return a rewritten clone, checked by the verifier, and what `match` found."""
    found = graph_pass.match(program)
    clone = program.clone()
    rewriter = Rewriter(clone, graph_pass.pass_name(), graph_pass.numerics)
    for match in found:
        if isinstance(match, Match):
            graph_pass.rewrite(clone, match, rewriter)
    rewriter.finish()
    if rewriter.modified:
        clone.facts = clone.facts.updated(graph_pass.ensures(), graph_pass.invalidates)
    verify_program(clone)
    return clone, found


def fired(found: list[Match | NoMatch]) -> int:
    """Return the number of matches."""
    return sum(isinstance(match, Match) for match in found)


def reasons(found: list[Match | NoMatch]) -> list[str]:
    """Return the reasons of all near misses."""
    return [match.reason for match in found if isinstance(match, NoMatch)]


def token_ids(program: Program, batch: int = 2, tokens: int = 9, seed: int = 0) -> Tensor:
    """Return random token ids, int64 `[batch, tokens]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, program.info.vocab_size, (batch, tokens), generator=generator)


def run(program: Program, input_ids: Tensor, steps: list[int] | None = None) -> Tensor:
    """Return the logits of all positions; a cached program is fed in chunks of `steps` tokens."""
    module = program.to_module()
    positions = default_positions(input_ids)
    if not program.is_cached:
        return module(input_ids, positions)
    cache = DenseCache()
    handle = make_handle(cache)
    chunks = steps or [input_ids.shape[1]]
    parts = zip(input_ids.split(chunks, 1), positions.split(chunks, 1), strict=True)
    return torch.cat([module(ids, at, handle) for ids, at in parts], 1)


def to_meta(program: Program) -> Program:
    """Return a clone whose weights have shapes but no values, as dry runs see it."""
    clone = dataclasses.replace(program.clone(), calibration=None)
    clone.weights = {name: weight.to("meta") for name, weight in clone.weights.items()}
    return clone


def snapshot(program: Program) -> tuple[Any, ...]:
    """Return everything a pass could change, for comparing before and after."""
    weights = {name: (id(w), w.clone()) for name, w in program.weights.items()}
    graph = [(n.op, n.name, str(n.target), str(n.args), str(n.kwargs)) for n in program.graph.nodes]
    return graph, weights, program.sites, program.plan


def assert_untouched(program: Program, before: tuple[Any, ...]) -> None:
    """Assert that `program` is as it was when `before` was taken."""
    graph, weights, sites, plan = snapshot(program)
    assert graph == before[0]
    assert weights.keys() == before[1].keys()
    for name, (identity, value) in weights.items():
        assert identity == before[1][name][0]
        assert value.is_meta or torch.equal(value, before[1][name][1])
    assert (sites, plan) == before[2:]
