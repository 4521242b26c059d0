"""Rotary embedding, and what turns keys that were stored before it into keys.

Source: RoFormer, arXiv 2104.09864, section 3.2; keys cached before it: KVQuant, arXiv 2401.18079,
section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.ir.residual import make_heads


def rotary_table(
    positions: Tensor, inv_freq: Tensor, attention_scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of `positions * inv_freq`, times `attention_scaling`.

    Args:
        positions: Integer, any shape.
        inv_freq: `[rotary_dim / 2]`; its dtype is the dtype in which angles are computed.
        attention_scaling: Factor of both (YaRN, arXiv 2309.00071).
        dtype: Dtype of the result.

    Returns:
        Two tensors `[*positions.shape, rotary_dim / 2]`.
    """
    angles = positions[..., None].to(inv_freq.dtype) * inv_freq
    cos, sin = angles.cos() * attention_scaling, angles.sin() * attention_scaling
    return cos.to(dtype), sin.to(dtype)


def turn_pairs(x: Tensor, table: tuple[Tensor, Tensor], *, interleaved: bool) -> Tensor:
    """Turn pairs of the first channels of `x` `[..., S, D]`; the other channels pass through.

    Args:
        x: Values.
        table: Cosine and sine, each broadcastable to `[..., S, rotary_dim / 2]`.
        interleaved: Pairs are (2 i, 2 i + 1) instead of (i, i + rotary_dim / 2).
    """
    cos, sin = table
    rotary_dim = 2 * cos.shape[-1]
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        out = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        out = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    return torch.cat([out, rest], -1) if rest.shape[-1] else out


@dataclass(frozen=True, eq=False)
class KeyRead:
    """What is done to keys on their way from the cache to the scores.

    Attributes:
        inv_freq: See `rotary_table`; None if the cache holds keys as RoPE has left them.
        rotary_dim: Channels that turn.
        attention_scaling: See `rotary_table`.
        interleaved: See `turn_pairs`.
        basis: `[Hk / g, g D, g D]`; what is stored of every run of g heads, side by side, is
            multiplied by it first. None if it is stored as it is. Or what makes keys, as in
            `ir.residual`.
        bias: See `ir.residual`.
    """

    inv_freq: Tensor | None = None
    rotary_dim: int = 0
    attention_scaling: float = 1.0
    interleaved: bool = False
    basis: Tensor | None = None
    bias: Tensor | None = None

    def table(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rotary table of positions 0 to `tokens` - 1; only with `inv_freq`."""
        assert self.inv_freq is not None, "only where keys are stored before RoPE"
        positions = torch.arange(tokens, device=self.inv_freq.device)
        return rotary_table(positions, self.inv_freq, self.attention_scaling, dtype)

    def apply(self, stored: Tensor, first: int, table: tuple[Tensor, Tensor] | None) -> Tensor:
        """Return the keys of stored `[..., Hk, T, D]` at positions `first` to `first` + T - 1.

        Args:
            stored: What the cache holds.
            first: Position of the first token.
            table: Of at least `first` + T positions, in the dtype of `stored`; see `table`. None
                without `inv_freq`.
        """
        keys = stored if self.basis is None else make_heads(stored, self.basis, self.bias)
        if table is None:
            return keys
        own = slice(first, first + stored.shape[-2])
        cos, sin = table
        return turn_pairs(keys, (cos[own], sin[own]), interleaved=self.interleaved)
