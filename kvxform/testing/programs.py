"""Small programs of the dialect with seeded weights, to try passes and lowerings on.

- `llama_program`: RMSNorm, RoPE, grouped heads, SwiGLU, nn.Linear layout
- `gpt2_program`: LayerNorm, learned positions, one fused QKV projection, Conv1D layout
- `latent_program`: latent attention (MLA); see `kvxform.testing.latent`

They are what capture would leave, without a model, a download or a second of time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.ir.program import AttentionSite, Program, Projection, RopeSpec
from kvxform.testing.builder import CONTEXT, VOCAB, WIDTH, Builder, aten
from kvxform.testing.latent import latent_program


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
    rotary_dim: int | None = None,
    interleaved: bool = False,
    shared: bool = False,
    attention: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> Program:
    """Return a Llama-like program.

    Args:
        dtype: Of weights and of everything computed.
        layers: Layers.
        heads: Query heads.
        kv_heads: KV heads.
        head_dim: Channels of a head.
        bias: Give q, k and v a bias.
        tied: Let the head be the embedding.
        weight_offset: What norms add to their gain, as Gemma does.
        rotary_dim: Channels that RoPE turns: all by default, 0 for a model without RoPE.
        interleaved: Let RoPE pair neighbours instead of halves.
        shared: Let every layer read the keys and values of the first one.
        attention: Extra keywords of every attention op; tensors become weights.
        seed: Of weights.
    """
    turned = head_dim if rotary_dim is None else rotary_dim
    rope = RopeSpec("inv_freq", turned, interleaved=interleaved) if turned else None
    b = Builder(dtype, seed)
    llama = _Llama(b, heads, kv_heads, head_dim, bias, weight_offset, rope, shared, attention or {})
    if turned:
        b.weights["inv_freq"] = 10000.0 ** (-torch.arange(0, turned, 2, dtype=dtype) / turned)
    x = b.call(aten.embedding.default, b.weight("embed.weight", VOCAB, WIDTH, std=1.0), llama.ids)
    for layer in range(layers):
        x = llama.mlp(layer, llama.attend(layer, x))
    b.module = "head"
    h = llama.norm(x, "norm")
    head = b.get("embed.weight") if tied else b.weight("head.weight", VOCAB, WIDTH)
    return b.finish(b.call(aten.linear.default, h, head), llama.sites, VOCAB)


class _Llama:
    """Parts of `llama_program`, whose options these are."""

    def __init__(
        self,
        builder: Builder,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool,
        weight_offset: float,
        rope: RopeSpec | None,
        shared: bool,
        attention: Mapping[str, Any],
    ) -> None:
        self.b, self.bias, self.weight_offset, self.rope = builder, bias, weight_offset, rope
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.shared, self.options = shared, attention
        self.ids, self.positions = builder.input("input_ids"), builder.input("position_ids")
        self.sites: list[AttentionSite] = []
        self._kept: tuple[fx.Node, ...] = ()  # K and V of the first layer, if all read them

    def norm(self, x: fx.Node, name: str) -> fx.Node:
        gain = self.b.weight(f"{name}.weight", WIDTH, mean=1 - self.weight_offset, std=0.3)
        return self.b.call(kvx.RMS_NORM, x, gain, 1e-5, weight_offset=self.weight_offset)

    def attend(self, layer: int, x: fx.Node) -> fx.Node:
        b = self.b
        b.module = f"layers.{layer}.attn"
        h = self.norm(x, f"layers.{layer}.norm1")
        q, *kv = self._operands(h)
        extra = self._extra_options()
        scale = self.head_dim**-0.5
        operands = (q, *(kv or self._kept), self.positions)
        a = b.call(kvx.ATTENTION, *operands, layer=layer, scale=scale, **extra)
        self.sites.append(self._site(layer, extra))
        if self.shared:
            self._kept = operands[1:3]
        o = b.linear(b.merge_heads(a, self.heads * self.head_dim), f"{b.module}.o", WIDTH)
        return b.call(aten.add.Tensor, x, o)

    def mlp(self, layer: int, x: fx.Node) -> fx.Node:
        b = self.b
        b.module = f"layers.{layer}.mlp"
        h = self.norm(x, f"layers.{layer}.norm2")
        gate = b.call(aten.silu.default, b.linear(h, f"{b.module}.gate", 2 * WIDTH))
        up = b.call(aten.mul.Tensor, gate, b.linear(h, f"{b.module}.up", 2 * WIDTH))
        return b.call(aten.add.Tensor, x, b.linear(up, f"{b.module}.down", WIDTH))

    def _operands(self, h: fx.Node) -> list[fx.Node]:
        """Return q, k and v; q alone for a layer that reads those of the first one."""
        b, counts = self.b, {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        if self._kept:
            counts = {"q": self.heads}
        found = {
            n: b.heads(
                b.linear(h, f"{b.module}.{n}", count * self.head_dim, self.bias),
                count,
                self.head_dim,
            )
            for n, count in counts.items()
        }
        if self.rope is not None:
            pairs = {"interleaved": True} if self.rope.interleaved else {}
            for n in [n for n in "qk" if n in found]:
                inv_freq, turned = b.get("inv_freq"), self.rope.rotary_dim
                found[n] = b.call(
                    kvx.ROPE, found[n], self.positions, inv_freq, rotary_dim=turned, **pairs
                )
        return list(found.values())

    def _extra_options(self) -> dict[str, Any]:
        """Return the extra keywords of an attention op, tensors among them as nodes."""
        extra = dict(self.options)
        for name, value in self.options.items():
            if isinstance(value, Tensor):
                self.b.weights[name] = value.to(self.b.dtype)
                extra[name] = self.b.get(name)
        return extra

    def _site(self, layer: int, extra: Mapping[str, Any]) -> AttentionSite:
        module, head_dim = self.b.module, self.head_dim

        def projection(name: str) -> Projection:
            path = f"{module}.{name}"
            bias = f"{path}.bias" if self.bias and name != "o" else None
            return Projection(f"{path}.weight", bias, head_stride=head_dim)

        fields: dict[str, Any] = {name: projection(name) for name in "qkvo"}
        for name, value in extra.items():
            fields[name] = name if isinstance(value, fx.Node) else value
        if self._kept:
            fields |= {"k": self.sites[0].k, "v": self.sites[0].v, "shared_with": 0}
        heads = (self.heads, self.kv_heads)
        return AttentionSite(
            layer, module, *heads, head_dim, head_dim, head_dim**-0.5, rope=self.rope, **fields
        )


def gpt2_program(
    *,
    dtype: torch.dtype = torch.float64,
    layers: int = 2,
    heads: int = 2,
    head_dim: int = 16,
    tied: bool = True,
    seed: int = 0,
) -> Program:
    """Return a GPT-2-like program: fused QKV, biases everywhere; options as in `llama_program`."""
    b, width = Builder(dtype, seed), heads * head_dim
    ids, positions = b.input("input_ids"), b.input("position_ids")
    x = b.call(
        aten.add.Tensor,
        b.call(aten.embedding.default, b.weight("wte.weight", VOCAB, width, std=1.0), ids),
        b.call(aten.embedding.default, b.weight("wpe.weight", CONTEXT, width), positions),
    )
    sites: list[AttentionSite] = []

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
        scale = head_dim**-0.5
        a = b.call(kvx.ATTENTION, q, k, v, positions, layer=layer, scale=scale)
        o = b.conv1d(b.merge_heads(a, width), f"{b.module}.c_proj", width)
        x = b.call(aten.add.Tensor, x, o)
        names = (f"{b.module}.c_attn.weight", f"{b.module}.c_attn.bias")
        q_rows, k_rows, v_rows = (
            Projection(*names, "in_out", start, head_dim) for start in (0, width, 2 * width)
        )
        names = (f"{b.module}.c_proj.weight", f"{b.module}.c_proj.bias")
        out = Projection(*names, "in_out", 0, head_dim)
        sizes = (heads, heads, head_dim, head_dim)
        rows = (q_rows, k_rows, v_rows, out)
        sites.append(AttentionSite(layer, b.module, *sizes, scale, *rows))
        b.module = f"h.{layer}.mlp"
        h = b.conv1d(norm(x, f"h.{layer}.ln_2"), f"{b.module}.c_fc", 2 * width)
        h = b.conv1d(b.call(aten.gelu.default, h), f"{b.module}.c_proj", width)
        x = b.call(aten.add.Tensor, x, h)
    b.module = "head"
    h = norm(x, "ln_f")
    head = b.get("wte.weight") if tied else b.weight("head.weight", VOCAB, width)
    return b.finish(b.call(aten.linear.default, h, head), sites, VOCAB)


MAKERS: Mapping[str, Callable[..., Program]] = {
    "llama": llama_program,
    "gpt2": gpt2_program,
    "latent": latent_program,
}
"""Makers of programs by name."""
