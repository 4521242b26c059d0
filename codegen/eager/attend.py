"""Attention over what a cache holds, in torch ops.

Two forms. When every token has one copy, this is ordinary attention. With exact regions a step of
several tokens sees some tokens in two copies, encoded and exact, and each query must use the copy
that was live at its time; K and V may differ in that.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from kvxform.codegen.eager.folded_body import FoldedBody
from kvxform.codegen.eager.reads import StreamRead
from kvxform.codegen.eager.step import QueryRun, Step
from kvxform.ir.scoring import Scoring, attend

RUN_QUERIES = 128  # queries attended together: few enough that most positions need no mask
SCORE_ELEMENTS = 1 << 24  # scores held at a time; runs get shorter in very long prompts


def attend_step(
    q: Tensor, key: StreamRead, value: StreamRead, step: Step, scoring: Scoring
) -> Tensor:
    """Attend from q `[B, H, S, D]` to one cached layer; returns `[B, H, S, Dv]`."""
    k, v = _single(key), _single(value)
    if k is not None and v is not None:
        return _attend_single(q, k, v, step, scoring)
    return _attend_copies(q, key, value, step, scoring)


def _single(read: StreamRead) -> Tensor | None:
    """Return the one tensor that holds every token, if there is one."""
    is_alone = read.sink is None and read.fresh is None
    return read.body if is_alone and isinstance(read.body, Tensor) else None


def _attend_single(q: Tensor, k: Tensor, v: Tensor, step: Step, scoring: Scoring) -> Tensor:
    span = scoring.span
    if not scoring.is_plain:
        bias = scoring.bias(step.times, step.columns[None])
        return attend(q, k, v, step.visible(span), scoring, bias=bias)
    if step.num_new == 1:  # the heads of a group become queries of one KV head
        grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, H, 1, D] -> [B, Hk, G, D]
        mask = step.visible(span)
        return _sdpa(grouped, k, v, mask, scoring.scale).flatten(1, 2).unsqueeze(2)
    if step.is_causal_square(span):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scoring.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _sdpa(q, k, v, step.visible(span), scoring.scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else mask[:, None],
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _attend_copies(
    q: Tensor, key: StreamRead, value: StreamRead, step: Step, scoring: Scoring
) -> Tensor:
    grouped = q.unflatten(1, (_num_kv_heads(key), -1))  # [B, H, S, D] -> [B, Hk, G, S, D]
    fitting = SCORE_ELEMENTS // (q.shape[0] * q.shape[1] * step.total)
    width = max(1, min(RUN_QUERIES, fitting))
    parts = []
    for first in range(0, step.num_new, width):
        run = step.query_run(first, min(first + width, step.num_new))
        parts.append(_attend_run(grouped[:, :, :, run.queries], run, key, value, step, scoring))
    out = parts[0] if len(parts) == 1 else torch.cat(parts, 3)
    return out.flatten(1, 2)


def _attend_run(
    q: Tensor,
    run: QueryRun,
    key: StreamRead,
    value: StreamRead,
    step: Step,
    scoring: Scoring,
) -> Tensor:
    """Attend from q `[B, Hk, G, s, D]`, the queries of one run; `[B, Hk, G, s, Dv]`."""
    scores = _scores(q, run, key) * scoring.scale  # [B, Hk, G, s, run.end]
    scores = scoring.cap(scores)
    bias = scoring.bias(step.times[:, run.queries], step.columns[None, : run.end])
    if bias is not None:
        scores = scores + bias.to(scores).unflatten(1, scores.shape[1:3])
    hidden = step.hidden(run, scoring.span)
    if hidden is not None:
        start, mask = hidden
        scores[..., start:].masked_fill_(mask[:, None, None], -math.inf)
    return _mix(_softmax(scores, scoring.sink_logits), run, value)


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax over the last axis of `[B, Hk, G, s, T]`, with an optional column without value."""
    if sink_logits is None:
        return torch.softmax(scores, -1)
    sink = sink_logits.to(scores).view(1, scores.shape[1], scores.shape[2], 1, 1)
    column = sink.expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]


def _num_kv_heads(read: StreamRead) -> int:
    part = next(x for x in (read.sink, read.fresh, read.body) if x is not None)
    return part.num_kv_heads if isinstance(part, FoldedBody) else part.shape[1]


def _scores(q: Tensor, run: QueryRun, key: StreamRead) -> Tensor:
    """Return q k^T over positions 0..`run.end` - 1, each key in the copy live at its query."""
    rows = q.flatten(2, 3)  # [B, Hk, G, s, D] -> [B, Hk, G * s, D]
    parts = []
    if key.sink is not None:
        parts.append(rows @ key.sink[:, :, : run.end].mT)
    stored_end = key.rule_step.rule.sink
    if isinstance(key.body, FoldedBody):
        parts.append(key.body.scores(rows)[..., : run.end - stored_end])
    elif key.body is not None:
        parts.append(rows @ key.body[:, :, : run.end - stored_end].mT)
    if key.fresh is not None:
        first, start = key.rule_step.first_exact(run), key.rule_step.fresh_start
        fresh = rows @ key.fresh[:, :, first - start : run.end - start].mT
        parts = _choose(parts, fresh, first, run, key, q.shape[2:4])
    joined = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    scores: Tensor = joined.unflatten(2, q.shape[2:4])
    return scores


def _choose(
    parts: list[Tensor],
    fresh: Tensor,
    first: int,
    run: QueryRun,
    key: StreamRead,
    rows: tuple[int, ...],
) -> list[Tensor]:
    """Let scores of fresh copies, from position `first` on, take the place of stored ones."""
    beyond = sum(part.shape[-1] for part in parts) - first
    if beyond <= 0:
        return [*parts, fresh]
    last = parts.pop()  # only the body can reach past `first`
    overlap = last[..., last.shape[-1] - beyond :]
    is_exact = key.rule_step.is_exact(run)[:, None, None, :, :beyond]
    live = torch.where(is_exact, fresh[..., :beyond].unflatten(2, rows), overlap.unflatten(2, rows))
    stored = last[..., : last.shape[-1] - beyond]
    return [*parts, stored, live.flatten(2, 3), fresh[..., beyond:]]


def _mix(weights: Tensor, run: QueryRun, value: StreamRead) -> Tensor:
    """Return weights `[B, Hk, G, s, run.end]`, which are overwritten, times the live values."""
    groups = weights.shape[2:4]
    parts = []
    if value.fresh is not None:
        first, start = value.rule_step.first_exact(run), value.rule_step.fresh_start
        is_exact = value.rule_step.is_exact(run)[:, None, None]
        recent = weights[..., first:]
        exact = (recent * is_exact).flatten(2, 3)
        parts.append(exact @ value.fresh[:, :, first - start : run.end - start])
        recent.masked_fill_(is_exact, 0.0)
    stored = weights.flatten(2, 3)
    sink = value.rule_step.rule.sink
    if value.sink is not None:
        parts.append(stored[..., :sink] @ value.sink[:, :, : run.end])
    if isinstance(value.body, FoldedBody):
        tokens = value.body.num_tokens
        missing = max(0, tokens - (run.end - sink))
        padded = torch.nn.functional.pad(stored[..., sink : sink + tokens], (0, missing))
        parts.append(value.body.mix(padded))
    elif value.body is not None:
        body = value.body[:, :, : run.end - sink]
        parts.append(stored[..., sink : sink + body.shape[2]] @ body)
    mixed: Tensor = functools.reduce(torch.add, parts).unflatten(2, groups)
    return mixed
