"""The kvx dialect: every op with schema, fake and reference implementation.

Importing this module registers the ops with torch, so that a graph at any stage runs, prints and
exports. The reference implementations define what the ops mean; they favour clarity over speed.

Shapes: `B` batch, `H` query heads, `Hk` KV heads, `S` new tokens, `D` head_dim. Attention operands
are HND, `[B, H, S, D]`; `positions` is int64 `[B, S]`. Query head h reads KV head `h // (H / Hk)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from kvxform.codecs.hadamard import block_hadamard
from kvxform.ir.cache import resolve_handle

_LIBRARY = torch.library.Library("kvx", "DEF")
_SCHEMAS = (
    # statistics in compute_dtype, gain (weight + weight_offset) in the dtype of x
    "rms_norm(Tensor x, Tensor? weight, float eps, *, float weight_offset=0.0, "
    "ScalarType? compute_dtype=None) -> Tensor",
    # rotary embedding; angles in the dtype of inv_freq, [rotary_dim / 2]
    "rope(Tensor x, Tensor positions, Tensor inv_freq, *, int rotary_dim, "
    "float attention_scaling=1.0, bool interleaved=False) -> Tensor",
    # softmax(scale * q k^T + bias, masked by positions) v
    "attention(Tensor q, Tensor k, Tensor v, Tensor positions, *, int layer, float scale, "
    "bool causal=True, int? window=None, float? softcap=None, Tensor? sink_logits=None, "
    "Tensor? bias=None, ScalarType? softmax_dtype=None) -> Tensor",
    "hadamard(Tensor x, *, int block, Tensor? signs=None) -> Tensor",
    # store new tokens of a layer in the cache behind the handle; returns the handle
    "cache_append(Tensor k, Tensor v, Tensor cache, *, int layer) -> Tensor",
    "cached_attention(Tensor q, Tensor cache, Tensor positions, *, int layer, float scale, "
    "int v_head_dim, bool causal=True, int? window=None, float? softcap=None, "
    "Tensor? sink_logits=None) -> Tensor",
)


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    weight_offset: float = 0.0,
    compute_dtype: torch.dtype | None = None,
) -> Tensor:
    """Divide by the root mean square of the last axis, then multiply by the gain.

    Source: arXiv 1910.07467. The gain is applied in the dtype of `x`, after the statistics.
    """
    wide = x.to(compute_dtype or x.dtype)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    y = normed.to(x.dtype)
    if weight is None:
        return y
    return y * (weight + weight_offset if weight_offset else weight)


def rope(
    x: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    *,
    rotary_dim: int,
    attention_scaling: float = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """Rotate pairs of the first `rotary_dim` channels by `position * inv_freq`.

    Source: RoFormer, arXiv 2104.09864, section 3.2. Pairs are (i, i + rotary_dim / 2), or
    (2 i, 2 i + 1) when `interleaved`. Cosine and sine are multiplied by `attention_scaling`.

    Args:
        x: `[B, H, S, D]`.
        positions: `[B, S]`, integer.
        inv_freq: `[rotary_dim / 2]`; its dtype is the dtype in which angles are computed.
        rotary_dim: Channels that rotate; the rest pass through.
        attention_scaling: Factor of cosine and sine (YaRN, arXiv 2309.00071).
        interleaved: Pair neighbouring channels instead of halves.
    """
    angles = positions[:, None, :, None].to(inv_freq.dtype) * inv_freq  # [B, 1, S, rotary_dim / 2]
    cos = (angles.cos() * attention_scaling).to(x.dtype)
    sin = (angles.sin() * attention_scaling).to(x.dtype)
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([out, rest], -1) if rest.shape[-1] else out


def visible(q_positions: Tensor, k_positions: Tensor, causal: bool, window: int | None) -> Tensor:
    """Return which keys a query may see, bool `[B, Sq, Sk]`.

    A key at position p is seen from position t if `p <= t` (causal) and `t - p < window`.
    """
    distance = q_positions[:, :, None] - k_positions[:, None, :]
    mask = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return mask if window is None else mask & (distance < window)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    softmax_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention with grouped heads; the arithmetic of every attention op of the dialect.

    Args:
        q: `[B, H, Sq, D]`.
        k: `[B, Hk, Sk, D]`.
        v: `[B, Hk, Sk, Dv]`.
        mask: bool, broadcastable to `[B, Sq, Sk]`, or None to see everything.
        scale: Factor of the scores.
        softcap: Scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv 2408.00118).
        sink_logits: `[H]`; one more softmax column per head without a value (gpt-oss).
        bias: Added to scores, broadcastable to `[B, H, Sq, Sk]`.
        softmax_dtype: Dtype of the softmax; that of `q` if None.

    Returns:
        `[B, H, Sq, Dv]`; rows that see no key are zero.
    """
    groups = q.shape[1] // k.shape[1]
    simple = softcap is None and sink_logits is None and softmax_dtype in (None, q.dtype)
    if simple and bias is None:
        full = None if mask is None else mask[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=full, scale=scale, enable_gqa=groups > 1
        )
        if mask is None:
            return out
        return out.masked_fill(~mask.any(-1)[:, None, :, None], 0.0)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = q @ k.transpose(-1, -2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -math.inf)
    columns = scores.shape[-1]
    if sink_logits is not None:
        sink = sink_logits.to(scores)[None, :, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sink], -1)
    weights = torch.softmax(scores, -1, dtype=softmax_dtype or q.dtype).to(q.dtype)
    return weights[..., :columns].nan_to_num(0.0) @ v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    layer: int,
    scale: float,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
    bias: Tensor | None = None,
    softmax_dtype: torch.dtype | None = None,
) -> Tensor:
    """Stateless attention over the new tokens alone; see `attend` and `visible`."""
    mask = visible(positions, positions, causal, window)
    return attend(
        q,
        k,
        v,
        mask,
        scale=scale,
        softcap=softcap,
        sink_logits=sink_logits,
        bias=bias,
        softmax_dtype=softmax_dtype,
    )


def hadamard(x: Tensor, *, block: int, signs: Tensor | None = None) -> Tensor:
    """Rotate the last axis by a block Hadamard matrix; see `codecs.hadamard`."""
    return block_hadamard(x, block, signs)


def cache_append(k: Tensor, v: Tensor, cache: Tensor, *, layer: int) -> Tensor:
    """Store new keys and values of `layer`; returns the handle, so that readers come after."""
    resolve_handle(cache).append(layer, k, v)
    return cache.clone()


def cached_attention(
    q: Tensor,
    cache: Tensor,
    positions: Tensor,
    *,
    layer: int,
    scale: float,
    v_head_dim: int,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend to everything the cache holds for `layer`, the new tokens included."""
    return resolve_handle(cache).attend(
        layer,
        q,
        positions,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        sink_logits=sink_logits,
    )


def _fake_like_x(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])


def _fake_append(k: Tensor, v: Tensor, cache: Tensor, *, layer: int) -> Tensor:
    return torch.empty_like(cache)


def _fake_cached(q: Tensor, *_: object, v_head_dim: int, **__: object) -> Tensor:
    return q.new_empty(*q.shape[:-1], v_head_dim)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "rms_norm": (rms_norm, _fake_like_x),
    "rope": (rope, _fake_like_x),
    "attention": (attention, _fake_attention),
    "hadamard": (hadamard, _fake_like_x),
    "cache_append": (cache_append, _fake_append),
    "cached_attention": (cached_attention, _fake_cached),
}

for _schema in _SCHEMAS:
    _LIBRARY.define(_schema)
for _name, (_reference, _fake) in _IMPLEMENTATIONS.items():
    _LIBRARY.impl(_name, _reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"kvx::{_name}", _fake, lib=_LIBRARY)

RMS_NORM = torch.ops.kvx.rms_norm.default
ROPE = torch.ops.kvx.rope.default
ATTENTION = torch.ops.kvx.attention.default
HADAMARD = torch.ops.kvx.hadamard.default
CACHE_APPEND = torch.ops.kvx.cache_append.default
CACHED_ATTENTION = torch.ops.kvx.cached_attention.default
ATTENTION_OPS = (ATTENTION, CACHED_ATTENTION)
DIALECT = (RMS_NORM, ROPE, ATTENTION, HADAMARD, CACHE_APPEND, CACHED_ATTENTION)
