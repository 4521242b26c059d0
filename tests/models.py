"""Small decoders that tests capture: tiny Hugging Face configurations and plain PyTorch models.

The plain models are written as people write them: their own norms and rotary embeddings, positions
counted inside, masks from SDPA or from a `tril` buffer.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

VOCAB = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 64}
_TOKENS = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


def tiny_config(family: str, **changes: Any) -> PretrainedConfig:
    """Return the configuration of a two-layer model of a Hugging Face family."""
    makers: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
        "llama": (LlamaConfig, _GROUPED),
        "gpt2": (GPT2Config, {**_GPT2, **_TOKENS}),
        "qwen2": (Qwen2Config, _GROUPED),
        "qwen3": (Qwen3Config, _GROUPED),
        "mistral": (MistralConfig, {**_GROUPED, "sliding_window": 5}),
        "gpt_neox": (GPTNeoXConfig, _SIZES),
        "phi": (PhiConfig, {**_SIZES, "num_key_value_heads": 6}),
    }
    config_class, fields = makers[family]
    return config_class(**{**fields, **changes})


def tiny_hf(
    family: str,
    *,
    attention: str = "sdpa",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    **changes: Any,
) -> nn.Module:
    """Return a randomly initialised two-layer Hugging Face model in evaluation mode."""
    torch.manual_seed(seed)
    config = tiny_config(family, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention)
    return randomise(model.to(dtype).eval(), seed)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Give every parameter values that matter, gains and biases too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
            is_gain = p.dim() == 1 and name.endswith("weight")
            p.copy_(1 + 0.2 * noise if is_gain else noise * 0.15)
    return model


class RMSNorm(nn.Module):
    """Root mean square norm with a gain."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `[B, S, H, D]` by tables `[S, D / 2]`, pairing halves."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[None, :, None], sin[None, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rotate_complex(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate `[B, S, H, D]` by complex numbers `[S, D / 2]`, pairing neighbours."""
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[None, :, None]).flatten(3).type_as(x)


class PlainAttention(nn.Module):
    """Causal self-attention with grouped heads and rotary embedding.

    Args:
        width: Channels of the residual stream.
        heads: Query heads.
        kv_heads: KV heads.
        rotary: `half`, `complex` or `none`.
        by_hand: Mask from a `tril` buffer and softmax, instead of SDPA.
        tile: Repeat KV heads in the wrong order (0 1 0 1 instead of 0 0 1 1).
        key_detune: Factor of one frequency of the keys only.
        diagonal: Diagonal of the `tril` mask; 0 is causal, 1 sees one token ahead.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        *,
        rotary: str = "half",
        by_hand: bool = False,
        tile: bool = False,
        key_detune: float = 1.0,
        diagonal: int = 0,
        limit: int = 64,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, width // heads
        self.rotary, self.by_hand, self.tile, self.diagonal = rotary, by_hand, tile, diagonal
        self.wq = nn.Linear(width, width, bias=False)
        self.wk = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(width, kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        half = self.head_dim // 2
        inv_freq = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)
        detuned = inv_freq.clone()
        detuned[1] *= key_detune
        for name, freq in (("q", inv_freq), ("k", detuned)):
            angles = torch.outer(torch.arange(limit, dtype=torch.float64), freq)
            self.register_buffer(f"cos_{name}", angles.cos().to(torch.get_default_dtype()))
            self.register_buffer(f"sin_{name}", angles.sin().to(torch.get_default_dtype()))
        if by_hand:
            ones = torch.ones(limit, limit, dtype=torch.bool)
            self.register_buffer("mask", ones.tril(diagonal)[None, None])

    def _turn(self, x: Tensor, kind: str) -> Tensor:
        cos = getattr(self, f"cos_{kind}")[: x.shape[1]]
        sin = getattr(self, f"sin_{kind}")[: x.shape[1]]
        if self.rotary == "half":
            return rotate_half(x, cos, sin)
        return x if self.rotary == "none" else rotate_complex(x, torch.complex(cos, sin))

    def _expand(self, x: Tensor) -> Tensor:
        groups = self.heads // self.kv_heads
        if self.tile:
            return x.repeat(1, groups, 1, 1)
        return x.repeat_interleave(groups, dim=1)

    def operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q, k and v, one head each for every query head, `[B, H, S, D]`."""
        batch, length, _ = x.shape
        q, k, v = (
            w(x).view(batch, length, n, self.head_dim)
            for w, n in ((self.wq, self.heads), (self.wk, self.kv_heads), (self.wv, self.kv_heads))
        )
        q, k = self._turn(q, "q").transpose(1, 2), self._turn(k, "k").transpose(1, 2)
        return q, self._expand(k), self._expand(v.transpose(1, 2))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.operands(x)
        if self.by_hand:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            scores = scores.masked_fill(~self.mask[:, :, :length, :length], float("-inf"))
            out = scores.softmax(-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


class PlainLlama(nn.Module):
    """Pre-norm decoder with RMSNorm, rotary attention and SwiGLU; counts positions itself."""

    def __init__(
        self, *, layers: int = 2, width: int = 48, heads: int = 6, kv_heads: int = 2, **options: Any
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": RMSNorm(width),
                    "attention": PlainAttention(width, heads, kv_heads, **options),
                    "norm2": RMSNorm(width),
                    "gate": nn.Linear(width, 2 * width, bias=False),
                    "up": nn.Linear(width, 2 * width, bias=False),
                    "down": nn.Linear(2 * width, width, bias=False),
                }
            )
            for _ in range(layers)
        )
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))
            h = block["norm2"](x)
            x = x + block["down"](F.silu(block["gate"](h)) * block["up"](h))
        return self.head(self.norm(x))


class PlainGPT(nn.Module):
    """GPT-like decoder: LayerNorm, learned positions, one fused nn.Linear for q, k and v.

    Args:
        layers: Number of blocks.
        width: Channels of the residual stream.
        heads: Heads.
        by_hand: Mask from a `tril` buffer and softmax, instead of SDPA.
        positions: `arange` (embedding of a range) or `slice` (first rows of a table).
        limit: Rows of the position table.
    """

    def __init__(
        self,
        *,
        layers: int = 2,
        width: int = 48,
        heads: int = 4,
        by_hand: bool = False,
        positions: str = "arange",
        limit: int = 64,
    ) -> None:
        super().__init__()
        self.heads, self.by_hand, self.positions = heads, by_hand, positions
        self.wte = nn.Embedding(VOCAB, width)
        self.wpe = nn.Embedding(limit, width)
        names = {"qkv": (width, 3 * width), "proj": (width, width)}
        names |= {"fc1": (width, 4 * width), "fc2": (4 * width, width)}
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    **{n: nn.Linear(*sizes) for n, sizes in names.items()},
                    "ln1": nn.LayerNorm(width),
                    "ln2": nn.LayerNorm(width),
                }
            )
            for _ in range(layers)
        )
        self.ln = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCAB, bias=False)
        self.register_buffer("mask", torch.ones(limit, limit).tril())

    def _attend(self, block: nn.ModuleDict, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = block["qkv"](x).split(width, dim=2)
        shape = (batch, length, self.heads, width // self.heads)
        q, k, v = (t.view(shape).transpose(1, 2) for t in (q, k, v))
        if self.by_hand:
            scores = (q @ k.transpose(-2, -1)) * shape[-1] ** -0.5
            scores = scores.masked_fill(self.mask[:length, :length] == 0, float("-inf"))
            out = F.softmax(scores, dim=-1) @ v
        else:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return block["proj"](out.transpose(1, 2).contiguous().view(batch, length, width))

    def forward(self, idx: Tensor) -> Tensor:
        length = idx.shape[1]
        if self.positions == "arange":
            where = self.wpe(torch.arange(length, device=idx.device))
        else:
            where = self.wpe.weight[:length]
        x = self.wte(idx) + where
        for block in self.blocks:
            x = x + self._attend(block, block["ln1"](x))
            x = x + block["fc2"](F.gelu(block["fc1"](block["ln2"](x))))
        return self.head(self.ln(x))


def plain(
    kind: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **options: Any
) -> nn.Module:
    """Return a plain PyTorch model, `llama` or `gpt`, with random parameters."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = PlainLlama(**options) if kind == "llama" else PlainGPT(**options)
    finally:
        torch.set_default_dtype(before)
    return randomise(model.eval(), seed)
