"""What an attention does with its scores: which keys a query sees, and how scores become weights.

The same object travels from the ops of the dialect to every lowering and to the equations that
check them, so that an option cannot be lost on the way.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.ir.residual import make_heads
from kvxform.ir.rotary import KeyRead


@dataclass(frozen=True)
class Span:
    """Which keys a query may see, by positions alone.

    Attributes:
        causal: A key at position p is seen from position t only if `p <= t`.
        window: And only if `t - p < window`.
        chunk: And only if `t // chunk == p // chunk` (Llama 4).
    """

    causal: bool = True
    window: int | None = None
    chunk: int | None = None

    @property
    def is_whole(self) -> bool:
        """Whether a query sees everything up to itself."""
        return self.causal and self.window is None and self.chunk is None

    def sees(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Return which keys `[..., Sk]` each query `[..., Sq]` sees, bool `[..., Sq, Sk]`."""
        distance = q_positions[..., :, None] - k_positions[..., None, :]
        mask = distance >= 0 if self.causal else torch.ones_like(distance, dtype=torch.bool)
        if self.window is not None:
            mask = mask & (distance < self.window)
        if self.chunk is not None:
            own, other = q_positions // self.chunk, k_positions // self.chunk
            mask = mask & (own[..., :, None] == other[..., None, :])
        return mask


@dataclass(frozen=True, eq=False)
class Scoring:
    """Options of one attention; those of `kvx::cached_attention` by the same names.

    Attributes:
        scale: Factor of q k^T.
        causal: See `Span`; likewise `window` and `chunk`.
        window: Sliding window in tokens, or None.
        chunk: Length of chunks that see only themselves, or None.
        softcap: Scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv 2408.00118).
        sink_logits: `[H]`; one more softmax column per head without a value (gpt-oss).
        alibi_slopes: `[H]`; `slope * (p - t)` is added to the score of key p from query t, after
            the softcap (ALiBi, arXiv 2108.12409).
        inv_freq: Set if the cache holds keys before RoPE; see `KeyRead`, as for the rest.
        rotary_dim: Channels that turn.
        attention_scaling: Factor of cosine and sine.
        interleaved: Which channels are pairs.
        key_basis: What stored keys are multiplied by, or None.
        value_basis: The same for values.
        key_bias: `[Hk, 1, D]`, added to keys that are made when they are read; see `ir.residual`.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    chunk: int | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    alibi_slopes: Tensor | None = None
    inv_freq: Tensor | None = None
    rotary_dim: int = 0
    attention_scaling: float = 1.0
    interleaved: bool = False
    key_basis: Tensor | None = None
    value_basis: Tensor | None = None
    key_bias: Tensor | None = None

    @functools.cached_property
    def span(self) -> Span:
        """The part that decides which keys are seen."""
        return Span(self.causal, self.window, self.chunk)

    @functools.cached_property
    def key_read(self) -> KeyRead | None:
        """What turns stored keys into keys, or None if they are stored as they are used."""
        if self.inv_freq is None and self.key_basis is None:
            return None
        return KeyRead(
            self.inv_freq,
            self.rotary_dim,
            self.attention_scaling,
            self.interleaved,
            self.key_basis,
            self.key_bias,
        )

    def read_values(self, stored: Tensor) -> Tensor:
        """Return the values of what is stored of them, in their own basis."""
        return stored if self.value_basis is None else make_heads(stored, self.value_basis)

    @property
    def is_plain(self) -> bool:
        """Whether weights are the softmax of scaled and masked scores, and nothing else."""
        return self.softcap is None and self.sink_logits is None and self.alibi_slopes is None

    def cap(self, scores: Tensor) -> Tensor:
        """Return scaled scores after the softcap."""
        if self.softcap is None:
            return scores
        return self.softcap * torch.tanh(scores / self.softcap)

    def bias(self, q_positions: Tensor, k_positions: Tensor) -> Tensor | None:
        """Return what ALiBi adds to scores, `[B, H, Sq, Sk]`, or None.

        Args:
            q_positions: `[B, Sq]`.
            k_positions: `[B, Sk]`.
        """
        if self.alibi_slopes is None:
            return None
        distance = k_positions[:, None, :] - q_positions[:, :, None]
        return self.alibi_slopes[:, None, None] * distance[:, None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    *,
    bias: Tensor | None = None,
    softmax_dtype: torch.dtype | None = None,
) -> Tensor:
    """Attention with grouped heads; the arithmetic of every attention op of the dialect.

    Args:
        q: `[B, H, Sq, D]`.
        k: `[B, Hk, Sk, D]`.
        v: `[B, Hk, Sk, Dv]`; may have another dtype than q and k, which is that of the result.
        mask: bool, broadcastable to `[B, Sq, Sk]`, or None to see everything.
        scoring: Scale, softcap and sinks; what it says of positions is in `mask` and `bias`.
        bias: Added to scores, broadcastable to `[B, H, Sq, Sk]`.
        softmax_dtype: Dtype of the softmax; that of `q` if None.

    Returns:
        `[B, H, Sq, Dv]`; rows that see no key are zero.
    """
    groups = q.shape[1] // k.shape[1]
    simple = scoring.softcap is None and scoring.sink_logits is None
    simple = simple and q.dtype == v.dtype
    if simple and bias is None and softmax_dtype in (None, q.dtype):
        full = None if mask is None else mask[:, None]
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=full, scale=scoring.scale, enable_gqa=groups > 1
        )
        if mask is None:
            return out
        return out.masked_fill(~mask.any(-1)[:, None, :, None], 0.0)
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = scoring.cap(q @ k.transpose(-1, -2) * scoring.scale)
    if bias is not None:
        scores = scores + bias.to(scores)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None], -math.inf)
    columns = scores.shape[-1]
    if scoring.sink_logits is not None:
        sink = scoring.sink_logits.to(scores)[None, :, None, None]
        scores = torch.cat([scores, sink.expand(*scores.shape[:-1], 1)], -1)
    weights = torch.softmax(scores, -1, dtype=softmax_dtype or q.dtype).to(v.dtype)
    return weights[..., :columns].nan_to_num(0.0) @ v
