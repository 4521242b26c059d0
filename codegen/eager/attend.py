"""Attention over what a cache holds, in torch ops.

Two forms. When every token has one copy, this is ordinary attention. With exact regions a step of
several tokens sees some tokens in two copies, encoded and exact, and each query must use the copy
that was live at its time; K and V may differ in that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import kvxform.ir.ops as kvx
from kvxform.codegen.eager.step import Step
from kvxform.codegen.eager.store import StreamRead

SCORE_ELEMENTS = 1 << 24  # scores held at a time; longer prompts go through in runs of queries


@dataclass(frozen=True)
class AttendOptions:
    """The options of one cached_attention; see `kvx::cached_attention`."""

    scale: float
    window: int | None
    softcap: float | None
    sink_logits: Tensor | None


def attend_step(
    q: Tensor, key: StreamRead, value: StreamRead, step: Step, options: AttendOptions
) -> Tensor:
    """Attend from q `[B, H, S, D]` to one cached layer; returns `[B, H, S, Dv]`."""
    if key.is_single and value.is_single:
        assert key.body is not None, "a step has new tokens"
        assert value.body is not None, "a step has new tokens"
        return _attend_single(q, key.body, value.body, step, options)
    return _attend_copies(q, key, value, step, options)


def _attend_single(q: Tensor, k: Tensor, v: Tensor, step: Step, options: AttendOptions) -> Tensor:
    if options.softcap is not None or options.sink_logits is not None:
        return kvx.attend(
            q,
            k,
            v,
            step.visible(options.window),
            scale=options.scale,
            softcap=options.softcap,
            sink_logits=options.sink_logits,
        )
    if step.num_new == 1:  # the heads of a group become queries of one KV head
        grouped = q.unflatten(1, (k.shape[1], -1)).squeeze(3)  # [B, H, 1, D] -> [B, Hk, G, D]
        mask = step.visible(options.window)
        return _sdpa(grouped, k, v, mask, options.scale).flatten(1, 2).unsqueeze(2)
    if step.is_causal_square(options.window):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=options.scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    return _sdpa(q, k, v, step.visible(options.window), options.scale)


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
    q: Tensor, key: StreamRead, value: StreamRead, step: Step, options: AttendOptions
) -> Tensor:
    per_query = q.shape[0] * q.shape[1] * step.total
    run = max(1, SCORE_ELEMENTS // per_query)
    parts = []
    for first in range(0, step.num_new, run):
        queries = slice(first, min(first + run, step.num_new))
        parts.append(_attend_run(q[:, :, queries], queries, key, value, step, options))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _attend_run(
    q: Tensor,
    queries: slice,
    key: StreamRead,
    value: StreamRead,
    step: Step,
    options: AttendOptions,
) -> Tensor:
    num_kv_heads = next(x for x in (key.fresh, key.body, key.sink) if x is not None).shape[1]
    grouped = q.unflatten(1, (num_kv_heads, -1))  # [B, H, s, D] -> [B, Hk, G, s, D]
    groups = grouped.shape[2]
    scores = _scores(grouped.flatten(2, 3), key, queries, groups, step.total) * options.scale
    scores = scores.unflatten(2, (groups, -1))  # [B, Hk, G, s, T]
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    mask = step.visible(options.window)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, queries], -math.inf)
    weights = _softmax(scores, options.sink_logits)
    return (
        _mix(weights.flatten(2, 3), value, queries, groups).unflatten(2, (groups, -1)).flatten(1, 2)
    )


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax over the last axis of `[B, Hk, G, s, T]`, with an optional column without value."""
    if sink_logits is None:
        return torch.softmax(scores, -1)
    sink = sink_logits.to(scores).view(1, scores.shape[1], scores.shape[2], 1, 1)
    column = sink.expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]


def _is_exact(read: StreamRead, queries: slice, groups: int) -> Tensor:
    """Return `RuleStep.is_exact` for rows of grouped queries, `[B, 1, G * s, T]`."""
    mask = read.rule_step.is_exact[:, None, queries]
    return mask if groups == 1 else mask.repeat(1, 1, groups, 1)


def _scores(q: Tensor, key: StreamRead, queries: slice, groups: int, total: int) -> Tensor:
    """Return q k^T over positions, `[B, Hk, G * s, T]`, each key in the copy live at its query."""
    scores = q.new_zeros(*q.shape[:-1], total)
    first = 0
    for part in (key.sink, key.body):
        if part is not None:
            last = first + part.shape[2]
            torch.matmul(q, part.transpose(-1, -2), out=scores[..., first:last])
            first = last
    if key.fresh is not None:
        start = key.rule_step.fresh_start
        fresh = q @ key.fresh.transpose(-1, -2)
        is_exact = _is_exact(key, queries, groups)[..., start:]
        scores[..., start:] = torch.where(is_exact, fresh, scores[..., start:])
    return scores


def _mix(weights: Tensor, value: StreamRead, queries: slice, groups: int) -> Tensor:
    """Return weights `[B, Hk, G * s, T]` times values, each value in the copy live at its query."""
    parts = []
    stored = weights
    if value.fresh is not None:
        start = value.rule_step.fresh_start
        is_exact = _is_exact(value, queries, groups)
        parts.append((weights * is_exact)[..., start:] @ value.fresh)
        stored = weights * ~is_exact
    first = 0
    for part in (value.sink, value.body):
        if part is not None:
            last = first + part.shape[2]
            parts.append(stored[..., first:last] @ part)
            first = last
    return torch.stack(parts).sum(0) if len(parts) > 1 else parts[0]
