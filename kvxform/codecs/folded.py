"""Attention over affine codes without decoding them: scales and offsets move off the elements.

With x = s c + o per group, every scale and offset of a cached stream can be applied to something
smaller than the cache:

- keys, token axis:     score[t] = sum_j s[t,j] (q_j . c[t,j]) + sum_j o[t,j] (sum of q_j)
- keys, channel axis:   score[t] = (q * s[g]) . c[t] + q . o[g]                  for t in run g
- values, token axis:   out_j = sum_t (p[t] s[t,j]) c[t,j] + sum_t p[t] o[t,j]
- values, channel axis: out = sum_g s[g] * (sum of p[t] c[t], t in g) + sum_g o[g] (sum of p[t])

Here j counts groups of channels and g runs of tokens. In each line the first term works on bare
codes, and the second is a correction of rank one per group. These are identities: only rounding
differs from decoding first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvxform.codecs.base import AffineCodes


def folded_scores(q: Tensor, keys: AffineCodes) -> Tensor:
    """Return `q @ k.T` for encoded keys; neither scaled by the softmax scale nor masked.

    Args:
        q: `[B, H, Sq, D]`.
        keys: Codes `[B, Hk, T, D]` in the dtype of `q`; query head h reads KV head
            `h // (H / Hk)`.

    Returns:
        `[B, H, Sq, T]`.
    """
    grouped = _by_kv_head(q, keys)  # [B, Hk, R, D] with R = H / Hk * Sq
    fold = _token_scores if keys.axis == "token" else _channel_scores
    return _by_q_head(fold(grouped, keys), q)


def folded_values(p: Tensor, values: AffineCodes) -> Tensor:
    """Return `p @ v` for encoded values.

    Args:
        p: Probabilities, `[B, H, Sq, T]`.
        values: Codes `[B, Hk, T, Dv]` in the dtype of `p`; heads as in `folded_scores`.

    Returns:
        `[B, H, Sq, Dv]`.
    """
    grouped = _by_kv_head(p, values)  # [B, Hk, R, T]
    fold = _token_values if values.axis == "token" else _channel_values
    return _by_q_head(fold(grouped, values), p)


def _token_scores(q: Tensor, keys: AffineCodes) -> Tensor:
    q = q.unflatten(-1, (-1, keys.group))  # [B, Hk, R, J, g]
    codes = keys.codes.unflatten(-1, (-1, keys.group))  # [B, Hk, T, J, g]
    bare = torch.einsum("bhrjg,bhtjg->bhjrt", q, codes)
    columns = keys.scale.movedim(-1, 2).unsqueeze(-2)  # [B, Hk, T, J] -> [B, Hk, J, 1, T]
    return (bare * columns).sum(2) + q.sum(-1) @ keys.offset.mT


def _channel_scores(q: Tensor, keys: AffineCodes) -> Tensor:
    scaled = q.unsqueeze(2) * keys.scale.unsqueeze(-2)  # [B, Hk, N, R, D], one query a run
    bare = scaled @ _runs(keys).mT  # [B, Hk, N, R, g]
    correction = (q @ keys.offset.mT).mT.unsqueeze(-1)  # [B, Hk, N, R, 1]
    return (bare + correction).transpose(2, 3).flatten(-2)  # [B, Hk, R, T]


def _token_values(p: Tensor, values: AffineCodes) -> Tensor:
    codes = values.codes.unflatten(-1, (-1, values.group))  # [B, Hk, T, J, g]
    scaled = p.unsqueeze(2) * values.scale.movedim(-1, 2).unsqueeze(-2)  # [B, Hk, J, R, T]
    bare = torch.einsum("bhjrt,bhtjg->bhrjg", scaled, codes)
    return (bare + (p @ values.offset).unsqueeze(-1)).flatten(-2)


def _channel_values(p: Tensor, values: AffineCodes) -> Tensor:
    p = p.unflatten(-1, (values.scale.shape[-2], values.group)).transpose(2, 3)  # [B, Hk, N, R, g]
    bare = p @ _runs(values)  # [B, Hk, N, R, Dv]
    return (bare * values.scale.unsqueeze(-2)).sum(2) + p.sum(-1).mT @ values.offset


def _runs(stream: AffineCodes) -> Tensor:
    """Return codes in runs of tokens, `[B, Hk, T, D]` -> `[B, Hk, N, g, D]`."""
    runs: Tensor = stream.codes.unflatten(-2, (stream.scale.shape[-2], stream.group))
    return runs


def _by_kv_head(x: Tensor, stream: AffineCodes) -> Tensor:
    """Let the query heads of a KV head become rows, `[B, H, S, X]` -> `[B, Hk, R, X]`."""
    num_kv_heads = stream.codes.shape[1]
    rows = x.shape[1] // num_kv_heads * x.shape[2]  # explicit: T may be 0
    return x.reshape(x.shape[0], num_kv_heads, rows, x.shape[-1])


def _by_q_head(x: Tensor, like: Tensor) -> Tensor:
    return x.reshape(*like.shape[:3], x.shape[-1])
