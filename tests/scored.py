"""Plain decoders whose attention does more with its scores than to scale and mask them.

Each way is a function of the raw scores `q k^T` `[B, H, S, S]` that returns attention weights of
the same shape, written by the equations of its paper and not with code of kvxform.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from models import PlainAttention, plain
from torch import Tensor, nn

HEADS, HEAD_DIM = 6, 8
SCALE = HEAD_DIM**-0.5
SLOPES = torch.tensor([0.5, 0.3, 0.25, 0.1, 0.07, 0.01], dtype=torch.float64)
SINKS = torch.tensor([0.7, -1.0, 2.0, 0.1, -0.3, 1.5], dtype=torch.float64)
Weigh = Callable[["ScoredAttention", Tensor], Tensor]


class ScoredAttention(PlainAttention):
    """Grouped attention with rotary embedding; `weigh` makes weights of scores."""

    def __init__(self, weigh: Weigh) -> None:
        super().__init__(HEADS * HEAD_DIM, HEADS, 2, limit=64)
        self.weigh = weigh
        self.sinks = nn.Parameter(SINKS.clone())
        self.register_buffer("slopes", SLOPES[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = self.operands(x)
        out = self.weigh(self, q @ k.transpose(-2, -1)) @ v
        return self.wo(out.transpose(1, 2).reshape(batch, length, -1))


def where(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return positions of queries `[S, 1]` and keys `[S]`."""
    keys = torch.arange(scores.shape[-1])
    return keys[:, None], keys


def hide(scores: Tensor, *, window: int | None = None, chunk: int | None = None) -> Tensor:
    """Mask later tokens, and those outside a window or chunk."""
    t, p = where(scores)
    seen = t >= p
    if window is not None:
        seen = seen & (t - p < window)
    if chunk is not None:
        seen = seen & (t // chunk == p // chunk)
    return scores.masked_fill(~seen, float("-inf"))


def capped(scores: Tensor, cap: float = 2.0) -> Tensor:
    """Softcap of scaled scores."""
    return torch.tanh(scores * SCALE / cap) * cap


def with_sinks(attention: ScoredAttention, masked: Tensor, *, shift: bool = False) -> Tensor:
    """Softmax with one more column per head that has no value."""
    sinks = attention.sinks[None, :, None, None].expand(*masked.shape[:3], 1)
    joined = torch.cat([masked, sinks], -1)
    if shift:  # as gpt-oss does against overflow
        joined = joined - joined.max(-1, keepdim=True).values
    return joined.softmax(-1)[..., :-1]


def alibi(attention: ScoredAttention, scores: Tensor) -> Tensor:
    """Return ALiBi, up to a constant of each row, as most models compute it."""
    return attention.slopes * where(scores)[1]


def everything(attention: ScoredAttention, scores: Tensor) -> Tensor:
    """Softcap, ALiBi by distance, a window and sinks."""
    t, p = where(scores)
    return with_sinks(attention, hide(capped(scores) + attention.slopes * (p - t), window=3))


WAYS: Mapping[str, Weigh] = {
    "plain": lambda a, s: hide(s * SCALE).softmax(-1),
    "softcap": lambda a, s: hide(capped(s)).softmax(-1),
    "window": lambda a, s: hide(s * SCALE, window=3).softmax(-1),
    "chunk": lambda a, s: hide(s * SCALE, chunk=4).softmax(-1),
    "long chunk": lambda a, s: hide(s * SCALE, chunk=40).softmax(-1),
    "alibi": lambda a, s: hide(s * SCALE + alibi(a, s)).softmax(-1),
    "alibi inside the scale": lambda a, s: hide((s + alibi(a, s)) * SCALE).softmax(-1),
    "sinks": lambda a, s: with_sinks(a, hide(s * SCALE)),
    "shifted sinks": lambda a, s: with_sinks(a, hide(s * SCALE), shift=True),
    "everything": everything,
}


def scored(*ways: Weigh) -> nn.Module:
    """Return a float64 decoder with one layer for each way to weigh scores."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        model = plain("llama", layers=len(ways), dtype=torch.float64)
        for block, weigh in zip(model.blocks, ways, strict=True):
            attention = ScoredAttention(weigh)
            attention.load_state_dict(block["attention"].state_dict(), strict=False)
            block["attention"] = attention
    finally:
        torch.set_default_dtype(before)
    return model.eval()
