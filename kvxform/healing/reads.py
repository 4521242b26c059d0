"""What attention reads of cached streams while a program is trained.

K and V are in full precision, with one exception: codec `truncate` leaves channels out, which is a
linear step that weights can be trained for. Tokens that the plan keeps exact keep all channels. A
token of which there are two copies stands in the sequence twice, and masks decide which copy a
query sees.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_name, make_codec
from kvxform.codecs.exact import ExactCodec
from kvxform.codecs.truncate import TruncateCodec
from kvxform.ir.plan import SitePlan
from kvxform.ir.scoring import Scoring, attend
from kvxform.ir.stream_plan import KeyView, StreamPlan

Stored = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Copy:
    """One copy of all tokens of a stream.

    Attributes:
        x: `[B, Hk, S, D]`.
        seen: Which tokens each query sees in this copy, bool `[S, S]`; None for all of them.
    """

    x: Tensor
    seen: Tensor | None = None


def attend_stored(
    q: Tensor, stored: Stored, positions: Tensor, scoring: Scoring, plan: SitePlan
) -> Tensor:
    """Attend from q `[B, H, S, D]` to the S tokens that were appended, `[B, H, S, Dv]`.

    Args:
        q: Queries of all tokens.
        stored: K and V as they were handed to the cache; no V where it is a view of K.
        positions: `[B, S]`, 0 to S - 1 in every row.
        scoring: Options of the attention.
        plan: How the tokens are stored.
    """
    k, v = stored
    keys, values = _copies(k, plan.key), None
    if v is not None:
        assert not isinstance(plan.value, KeyView), "values of their own have a stream"
        values = _copies(v, plan.value)
    mask = scoring.span.sees(positions, positions)
    bias = scoring.bias(positions, positions)
    parts_k, parts_v, masks = [], [], []
    for key, value in _pairs(keys, values):
        parts_k.append(_read_keys(key.x, scoring))
        parts_v.append(scoring.read_values(value.x))
        masks.append(_both(_both(mask, key.seen), value.seen))
    count = len(masks)
    return attend(
        q,
        torch.cat(parts_k, 2),
        torch.cat(parts_v, 2).to(q.dtype),
        torch.cat(masks, -1),
        scoring,
        bias=None if bias is None else torch.cat([bias] * count, -1),
    )


def _pairs(keys: list[Copy], values: list[Copy] | None) -> list[tuple[Copy, Copy]]:
    """Return the copies of K and V that some query sees together."""
    if values is None:
        return [(key, key) for key in keys]
    pairs = [(key, value) for key in keys for value in values]
    return [(a, b) for a, b in pairs if _meet(a.seen, b.seen)]


def _meet(a: Tensor | None, b: Tensor | None) -> bool:
    return a is None or b is None or bool((a & b).any())


def _both(mask: Tensor, seen: Tensor | None) -> Tensor:
    return mask if seen is None else mask & seen


def _copies(x: Tensor, stream: StreamPlan) -> list[Copy]:
    """Return the copies of a stream, each with the tokens that queries see in it."""
    if stream.codec["codec"] != TruncateCodec.name:
        return [Copy(x)]
    codec = make_codec(stream.codec)
    assert isinstance(codec, TruncateCodec), "codecs have their names"
    plain = dataclasses.replace(codec, inner=ExactCodec(dtype_name(x.dtype)))
    short = plain.decode(plain.encode(x), x.dtype)
    if (stream.regions.sink, *stream.keep_and_chunk) == (0, 0, 1):  # nothing is ever exact
        return [Copy(short)]
    seen = _in_body(stream, x.shape[2], x.device)
    return [Copy(short, seen), Copy(x, ~seen)]


def _in_body(stream: StreamPlan, tokens: int, device: torch.device) -> Tensor:
    """Return which tokens are encoded when each query looks, bool `[S, S]`.

    The rule is `StreamPlan.body_tokens`, for all queries at once.
    """
    sink, (keep, chunk) = stream.regions.sink, stream.keep_and_chunk
    times = torch.arange(tokens, device=device)
    free = times + 1 - sink - keep
    ends = sink + (free // chunk * chunk).clamp_min(0)
    return (times >= sink) & (times < ends[:, None])


def _read_keys(k: Tensor, scoring: Scoring) -> Tensor:
    read = scoring.key_read
    if read is None:
        return k
    table = None if read.inv_freq is None else read.table(k.shape[2], k.dtype)
    return read.apply(k, 0, table)
