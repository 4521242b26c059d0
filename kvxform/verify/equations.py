"""What a cache must hold and what a query must see, written as equations over whole sequences.

Nothing here knows pages, buffers or steps. Stored keys are K R (R is the basis). With s the sink,
b(n) = `body_tokens(n)` and E, D the encoder and decoder of the codec, token j of a sequence is
seen from position t

- as D(E(K R))[j]  if s <= j < s + b(t + 1): it has been encoded by then;
- as K R [j], rounded to the dtype of the exact regions, otherwise.

What the attention undoes when it reads comes after that: bases of K and V, and RoPE by position
where K is what goes into RoPE.

Groups start at the end of the sink, so E may be applied to all tokens at once: the codes of a group
do not depend on later tokens. A codec that ranks tokens by attention also takes what the queries of
a chunk pay to its keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name, make_codec
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.ir.scoring import Scoring
from kvxform.ir.stream_plan import StreamPlan


@dataclass(frozen=True)
class TwoCopies:
    """Every token of one stream of one sequence, in both forms that a query may see.

    Attributes:
        exact: Rounded to the dtype of the exact regions, `[Hk, T, D]`, in the stored basis.
        encoded: Decoded from codes, `[Hk, T, D]`; tokens of an open group are as in `exact`.
        is_encoded: Whether token j is seen encoded from position t, bool `[T, T]` (t, j).
    """

    exact: Tensor
    encoded: Tensor
    is_encoded: Tensor

    def held(self) -> Tensor:
        """Return what the cache holds after the last token, `[Hk, T, D]`."""
        return torch.where(self.is_encoded[-1, :, None], self.encoded, self.exact)

    def channels(self, part: slice) -> TwoCopies:
        """Return some channels alone."""
        return TwoCopies(self.exact[..., part], self.encoded[..., part], self.is_encoded)


def two_copies(stream: StreamPlan, stored: Tensor, attention: Tensor | None = None) -> TwoCopies:
    """Apply the equations to K R or V R of one sequence.

    Args:
        stream: The plan.
        stored: `[Hk, T, D]`, T at least 1, in the stored basis.
        attention: What `attention_in_chunks` returns for all whole chunks after the sink, for
            codecs that rank tokens by it.
    """
    tokens, sink = stored.shape[1], stream.regions.sink
    exact = stored
    if sink or stream.recent_capacity:
        exact = stored.to(dtype_from_name(stream.regions.dtype)).to(stored.dtype)
    # Tokens that wait in a buffer are encoded from there, so their rounding comes first.
    source = exact if stream.recent_capacity else stored
    encoded = exact.clone()
    groups = max(0, tokens - sink) // stream.tokens_per_group
    if groups:
        body = slice(sink, sink + groups * stream.tokens_per_group)
        codec = make_codec(stream.codec)
        if attention is None:
            planes = codec.encode(source[:, body])
        else:
            assert isinstance(codec, SaliencyCodec), "no other codec ranks tokens"
            planes = codec.encode_ranked(source[:, body], attention)
        encoded[:, body] = codec.decode(planes, stored.dtype)
    bodies = torch.tensor([stream.body_tokens(t + 1) for t in range(tokens)])
    index = torch.arange(tokens)
    is_encoded = (index >= sink) & (index < sink + bodies[:, None])
    return TwoCopies(exact, encoded, is_encoded.to(stored.device))


def attention_in_chunks(codec: SaliencyCodec, q: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Return the attention that each token gets from the probes of its chunk, `[Hk, n]`, float64.

    Args:
        codec: Says which queries are probes.
        q: Queries of whole chunks, `[H, n, D]`, in the basis of the keys.
        keys: Exact keys of the same tokens, `[Hk, n, D]`.
        scale: Factor of the scores.
    """
    size, groups = codec.chunk, q.shape[0] // keys.shape[0]
    rows = q.double().unflatten(1, (-1, size))  # [H, C, chunk, D]
    columns = keys.double().unflatten(1, (-1, size)).repeat_interleave(groups, 0)
    later = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    scores = (scale * rows @ columns.mT).masked_fill(later, -math.inf)
    received = torch.softmax(scores, -1)[:, :, list(codec.probes)].sum(2)  # [H, C, chunk]
    by_head: Tensor = received.unflatten(0, (-1, groups)).sum(1)
    return by_head.flatten(1)


def attend(
    q: Tensor, positions: Tensor, key: TwoCopies, value: TwoCopies, scoring: Scoring
) -> Tensor:
    """Attend from some positions of one sequence to all its tokens; computed in float64.

    Args:
        q: Queries in the basis of the keys, `[H, S, D]`.
        positions: Positions of the queries, int64 `[S]`.
        key: K of the sequence.
        value: V of the sequence.
        scoring: The options of the attention.

    Returns:
        `[H, S, Dv]`, in the basis of the values, float64.
    """
    keys, values = ((s.exact.double(), s.encoded.double()) for s in (key, value))
    read = scoring.key_read
    if read is not None:
        length = key.exact.shape[1]
        table = None if read.inv_freq is None else read.table(length, torch.float64)
        keys = (read.apply(keys[0], 0, table), read.apply(keys[1], 0, table))
    values = (scoring.read_values(values[0]), scoring.read_values(values[1]))
    groups = q.shape[0] // keys[0].shape[0]
    k_exact, k_encoded, v_exact, v_encoded = (
        x.repeat_interleave(groups, 0)
        for x in (*keys, *values)  # [Hk, T, D] -> [H, T, D]
    )
    wide, use_codes = q.double(), key.is_encoded[positions]  # [S, T]
    scores = scoring.scale * torch.where(
        use_codes, wide @ k_encoded.transpose(-1, -2), wide @ k_exact.transpose(-1, -2)
    )
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    tokens = torch.arange(scores.shape[-1], device=q.device)
    distance = positions[:, None] - tokens  # [S, T]
    if scoring.alibi_slopes is not None:
        scores = scores - scoring.alibi_slopes.double()[:, None, None] * distance
    mask = distance >= 0
    if scoring.window is not None:
        mask &= distance < scoring.window
    if scoring.chunk is not None:
        mask &= distance <= positions[:, None] % scoring.chunk  # back to the start of its chunk
    scores = scores.masked_fill(~mask, -math.inf)
    if scoring.sink_logits is not None:
        column = scoring.sink_logits.double()[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    weights = torch.softmax(scores, -1)[..., : mask.shape[-1]]
    use_codes = value.is_encoded[positions]
    return (weights * use_codes) @ v_encoded + (weights * ~use_codes) @ v_exact
