"""A model with few channels that wait and large weights, to see what stays in memory."""

from __future__ import annotations

import torch
from programs import Builder, apply, aten

import kvxform.ir.ops as kvx
from kvxform.ir.program import AttentionSite, Program, Projection, RopeSpec
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv

WIDTH, HIDDEN, HEADS, HEAD_DIM, VOCAB = 512, 4096, 4, 32, 48
INT4 = {"codec": "int", "bits": 4}


def deep_program(layers: int) -> Program:
    """Return a model with few channels that wait and large weights, 25 MiB a layer."""
    b = Builder(torch.float32, 0)
    ids, positions = b.input("input_ids"), b.input("position_ids")
    b.weights["inv_freq"] = 10000.0 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    x = b.call(aten.embedding.default, b.weight("embed.weight", VOCAB, WIDTH), ids)
    sites = []
    for layer in range(layers):
        b.module = f"layers.{layer}"
        q, k, v = (
            b.heads(b.linear(x, f"{b.module}.{n}", HEADS * HEAD_DIM), HEADS, HEAD_DIM)
            for n in "qkv"
        )
        q, k = (
            b.call(kvx.ROPE, y, positions, b.get("inv_freq"), rotary_dim=HEAD_DIM) for y in (q, k)
        )
        scale = HEAD_DIM**-0.5
        a = b.call(kvx.ATTENTION, q, k, v, positions, layer=layer, scale=scale)
        out = b.linear(b.merge_heads(a, HEADS * HEAD_DIM), f"{b.module}.o", WIDTH)
        x = b.call(aten.add.Tensor, x, out)
        h = x
        for name, width in (("up", HIDDEN), ("gate", WIDTH), ("mix", HIDDEN), ("down", WIDTH)):
            h = b.call(aten.tanh.default, b.linear(h, f"{b.module}.{name}", width))
        x = b.call(aten.add.Tensor, x, h)
        ways = [Projection(f"{b.module}.{n}.weight", head_stride=HEAD_DIM) for n in "qkvo"]
        sizes = (HEADS, HEADS, HEAD_DIM, HEAD_DIM, scale)
        rope = RopeSpec("inv_freq", HEAD_DIM)
        sites.append(AttentionSite(layer, b.module, *sizes, *ways, rope))
    b.module = "head"
    head = b.weight("head.weight", VOCAB, WIDTH)
    program = b.finish(b.call(aten.linear.default, x, head), sites, VOCAB)
    program, _ = apply(InsertCache(), program)
    program, _ = apply(QuantizeKv(key=INT4, value=INT4), program)
    return program


def layer_bytes(program: Program) -> int:
    return sum(w.nbytes for name, w in program.weights.items() if name.startswith("layers.0."))
