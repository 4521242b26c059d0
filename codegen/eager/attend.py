"""Attention over what a cache holds, in torch ops.

Two forms. When every token has one copy, this is ordinary attention. With exact regions a step of
several tokens sees some tokens in two copies, encoded and exact, and each query must use the copy
that was live at its time; K and V may differ in that.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

import kvxform.ir.ops as kvx
from kvxform.codecs.base import AffineCodes
from kvxform.codecs.folded import folded_scores, folded_values
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
    k, v = _single(key), _single(value)
    if k is not None and v is not None:
        return _attend_single(q, k, v, step, options)
    return _attend_copies(q, key, value, step, options)


def _single(read: StreamRead) -> Tensor | None:
    """Return the one tensor that holds every token, if there is one."""
    is_alone = read.sink is None and read.fresh is None
    return read.body if is_alone and isinstance(read.body, Tensor) else None


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
    grouped = q.unflatten(1, (_num_kv_heads(key), -1))  # [B, H, s, D] -> [B, Hk, G, s, D]
    groups = grouped.shape[2]
    scores = _scores(grouped.flatten(2, 3), key, queries, groups, step.total) * options.scale
    scores = scores.unflatten(2, (groups, -1))  # [B, Hk, G, s, T]
    if options.softcap is not None:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    mask = step.visible(options.window)
    if mask is not None:
        scores = scores.masked_fill(~mask[:, None, None, queries], -math.inf)
    weights = _softmax(scores, options.sink_logits)
    mixed = _mix(weights.flatten(2, 3), value, queries, groups)
    out: Tensor = mixed.unflatten(2, (groups, -1)).flatten(1, 2)
    return out


def _softmax(scores: Tensor, sink_logits: Tensor | None) -> Tensor:
    """Softmax over the last axis of `[B, Hk, G, s, T]`, with an optional column without value."""
    if sink_logits is None:
        return torch.softmax(scores, -1)
    sink = sink_logits.to(scores).view(1, scores.shape[1], scores.shape[2], 1, 1)
    column = sink.expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]


def _num_kv_heads(read: StreamRead) -> int:
    part = next(x for x in (read.sink, read.fresh, read.body) if x is not None)
    return part.codes.shape[1] if isinstance(part, AffineCodes) else part.shape[1]


def _is_exact(mask: Tensor, queries: slice, groups: int) -> Tensor:
    """Return `[B, S, T]` for rows of grouped queries, `[B, 1, G * s, T]`."""
    return mask[:, None, queries].repeat(1, 1, groups, 1)


def _scores(q: Tensor, key: StreamRead, queries: slice, groups: int, total: int) -> Tensor:
    """Return q k^T over positions, `[B, Hk, G * s, T]`, each key in the copy live at its query."""
    parts = []
    if key.sink is not None:
        parts.append(q @ key.sink.mT)
    if isinstance(key.body, AffineCodes):
        parts.append(folded_scores(q, key.body))
    elif key.body is not None:
        parts.append(q @ key.body.mT)
    if key.fresh is None:
        return _join(parts)
    fresh = q @ key.fresh.mT
    if key.is_exact is None:
        return _join([*parts, fresh])
    missing = total - sum(part.shape[-1] for part in parts)
    scores = _join([*parts, q.new_zeros(*q.shape[:-1], missing)])
    is_exact = _is_exact(key.is_exact, queries, groups)[..., key.fresh_start :]
    stored = scores[..., key.fresh_start :]
    stored.copy_(torch.where(is_exact, fresh, stored))
    return scores


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _mix(weights: Tensor, value: StreamRead, queries: slice, groups: int) -> Tensor:
    """Return weights `[B, Hk, G * s, T]` times values, each value in the copy live at its query."""
    parts = []
    stored = weights
    if value.fresh is not None:
        recent = weights
        if value.is_exact is not None:
            is_exact = _is_exact(value.is_exact, queries, groups)
            recent, stored = weights * is_exact, weights * ~is_exact
        parts.append(recent[..., value.fresh_start :] @ value.fresh)
    first = 0
    if value.sink is not None:
        first = value.sink.shape[2]
        parts.append(stored[..., :first] @ value.sink)
    if isinstance(value.body, AffineCodes):
        last = first + value.body.codes.shape[2]
        parts.append(folded_values(stored[..., first:last], value.body))
    elif value.body is not None:
        last = first + value.body.shape[2]
        parts.append(stored[..., first:last] @ value.body)
    return functools.reduce(torch.add, parts)
