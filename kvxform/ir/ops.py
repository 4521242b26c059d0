"""The kvx dialect: every op with schema, fake and reference implementation.

Importing this module registers the ops with torch, so that a graph at any stage runs, prints and
exports. The reference implementations define what the ops mean; they favour clarity over speed.

Shapes: `B` batch, `H` query heads, `Hk` KV heads, `S` new tokens, `D` head_dim. Attention operands
are HND, `[B, H, S, D]`; `positions` is int64 `[B, S]`. Query head h reads KV head `h // (H / Hk)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from kvxform.codecs.basis import rotate_heads
from kvxform.codecs.hadamard import block_hadamard
from kvxform.ir.cache import resolve_handle
from kvxform.ir.rotary import rotary_table, turn_pairs
from kvxform.ir.scoring import Scoring, attend

_LIBRARY = torch.library.Library("kvx", "DEF")
_SCHEMAS = (
    # statistics in compute_dtype, gain (weight + weight_offset) in the dtype of x
    "rms_norm(Tensor x, Tensor? weight, float eps, *, float weight_offset=0.0, "
    "ScalarType? compute_dtype=None) -> Tensor",
    # rotary embedding; angles in the dtype of inv_freq, [rotary_dim / 2]
    "rope(Tensor x, Tensor positions, Tensor inv_freq, *, int rotary_dim, "
    "float attention_scaling=1.0, bool interleaved=False) -> Tensor",
    # softmax(cap(scale * q k^T) + bias, masked by positions) v; see `ir.scoring`
    "attention(Tensor q, Tensor k, Tensor v, Tensor positions, *, int layer, float scale, "
    "bool causal=True, int? window=None, int? chunk=None, float? softcap=None, "
    "Tensor? sink_logits=None, Tensor? alibi_slopes=None, "
    "Tensor? bias=None, ScalarType? softmax_dtype=None) -> Tensor",
    "hadamard(Tensor x, *, int block, Tensor? signs=None) -> Tensor",
    # x @ matrix, one matrix a KV head [Hk, D, D], or one for each g heads [Hk / g, g D, g D]
    "rotate(Tensor x, Tensor matrix) -> Tensor",
    # store new tokens of a layer in the cache behind the handle; returns the handle; no v if
    # values are a view of the keys
    "cache_append(Tensor k, Tensor? v, Tensor cache, *, int layer) -> Tensor",
    # what is read from the cache is multiplied by key_basis and value_basis, as in rotate or as
    # in `ir.residual`, which adds key_bias; with inv_freq, keys then take RoPE with its
    # attributes; see `ir.rotary.KeyRead`
    "cached_attention(Tensor q, Tensor cache, Tensor positions, *, int layer, float scale, "
    "int v_head_dim, bool causal=True, int? window=None, int? chunk=None, float? softcap=None, "
    "Tensor? sink_logits=None, Tensor? alibi_slopes=None, Tensor? inv_freq=None, "
    "int rotary_dim=0, float attention_scaling=1.0, bool interleaved=False, "
    "Tensor? key_basis=None, Tensor? value_basis=None, Tensor? key_bias=None) -> Tensor",
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
    table = rotary_table(positions[:, None], inv_freq, attention_scaling, x.dtype)
    assert 2 * table[0].shape[-1] == rotary_dim, "one frequency a pair"
    return turn_pairs(x, table, interleaved=interleaved)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    *,
    layer: int,
    bias: Tensor | None = None,
    softmax_dtype: torch.dtype | None = None,
    **options: Any,
) -> Tensor:
    """Stateless attention over the new tokens alone; `options` are those of `Scoring`."""
    scoring = Scoring(**options)
    mask = scoring.span.sees(positions, positions)
    by_distance = scoring.bias(positions, positions)
    if by_distance is not None:
        bias = by_distance if bias is None else bias + by_distance
    return attend(q, k, v, mask, scoring, bias=bias, softmax_dtype=softmax_dtype)


def hadamard(x: Tensor, *, block: int, signs: Tensor | None = None) -> Tensor:
    """Rotate the last axis by a block Hadamard matrix; see `codecs.hadamard`."""
    return block_hadamard(x, block, signs)


def rotate(x: Tensor, matrix: Tensor) -> Tensor:
    """Rotate the heads of x `[B, H, S, D]`; see `codecs.basis.rotate_heads`."""
    return rotate_heads(x, matrix)


def cache_append(k: Tensor, v: Tensor | None, cache: Tensor, *, layer: int) -> Tensor:
    """Store new keys and values of `layer`; returns the handle, so that readers come after.

    `v` is None where values are a view of the keys (payload `latent`).
    """
    resolve_handle(cache).append(layer, k, v)
    return cache.clone()


def cached_attention(
    q: Tensor,
    cache: Tensor,
    positions: Tensor,
    *,
    layer: int,
    v_head_dim: int,
    **options: Any,
) -> Tensor:
    """Attend to everything the cache holds for `layer`, the new tokens included.

    `options` are those of `Scoring`. Where values are a view of the keys, they are the first
    `v_head_dim` channels.
    """
    out = resolve_handle(cache).attend(layer, q, positions, Scoring(**options))
    return out[..., :v_head_dim]


def _fake_like_x(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x)


def _fake_attention(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    return v.new_empty(*q.shape[:-1], v.shape[-1])


def _fake_append(k: Tensor, v: Tensor | None, cache: Tensor, *, layer: int) -> Tensor:
    return torch.empty_like(cache)


def _fake_cached(q: Tensor, *_: object, v_head_dim: int, **__: object) -> Tensor:
    return q.new_empty(*q.shape[:-1], v_head_dim)


_IMPLEMENTATIONS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "rms_norm": (rms_norm, _fake_like_x),
    "rope": (rope, _fake_like_x),
    "attention": (attention, _fake_attention),
    "hadamard": (hadamard, _fake_like_x),
    "rotate": (rotate, _fake_like_x),
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
ROTATE = torch.ops.kvx.rotate.default
CACHE_APPEND = torch.ops.kvx.cache_append.default
CACHED_ATTENTION = torch.ops.kvx.cached_attention.default
ATTENTION_OPS = (ATTENTION, CACHED_ATTENTION)
DIALECT = (RMS_NORM, ROPE, ATTENTION, HADAMARD, ROTATE, CACHE_APPEND, CACHED_ATTENTION)
# Ops without a cache as torch differentiates them: dispatched ops have no formula.
DIFFERENTIABLE: Mapping[Any, Callable[..., Tensor]] = {
    RMS_NORM: rms_norm,
    ROPE: rope,
    ATTENTION: attention,
    HADAMARD: hadamard,
    ROTATE: rotate,
}
