"""Cached programs for runtime tests, and the cache by its definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from programs import apply, llama_program
from torch import Tensor

from kvxform.codecs.base import dtype_from_name, make_codec
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.ir.cache import make_handle
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program, default_positions
from kvxform.ir.scoring import Scoring
from kvxform.ir.stream_plan import ReadForm, StreamPlan
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.memory.page_cache import PageCache
from kvxform.passes.quantize.quantize_kv import QuantizeKv

FOLDED = ReadForm("folded")


def cached_program(
    quantize: dict[str, Any] | None = None,
    page_size: int | None = 16,
    *,
    folded: bool = False,
    **model: Any,
) -> Program:
    """Return a toy model with a cache, without a limit of its context."""
    program = llama_program(**model)
    program.info = dataclasses.replace(program.info, context_length=None)
    program, _ = apply(InsertCache(), program)
    if quantize:
        options = {"key": None, "value": None, **quantize}
        program, _ = apply(QuantizeKv(**options), program)
    if page_size:
        program, _ = apply(PageCache(page_size), program)
    if folded:
        assert program.plan is not None
        for site in program.plan.sites:
            streams = {k: dataclasses.replace(s, read=FOLDED) for k, s in site.streams.items()}
            program.plan = program.plan.replace_site(site.layer, **streams)
    return program


class DefinedCache:
    """One sequence, by definition: for each query the cache is built anew as it stands then."""

    def __init__(self, plan: CachePlan) -> None:
        self.plan = plan
        self.stored: dict[int, tuple[Tensor, Tensor]] = {}
        self.received: dict[int, Tensor | None] = {}

    def append(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.stored[layer] = (k[0], v[0])

    def attend(self, layer: int, q: Tensor, positions: Tensor, scoring: Scoring) -> Tensor:
        site = self.plan.site(layer)
        keys, values = self.stored[site.owner]
        if site.owner == layer:
            self.received[layer] = received_attention(site.key, keys, q[0], scoring.scale)
        received = self.received[site.owner]
        groups = q.shape[1] // keys.shape[0]
        out = torch.empty(q.shape[1], q.shape[2], values.shape[-1], dtype=q.dtype)
        for t in range(q.shape[2]):
            k = live(site.key, keys[:, : t + 1], received)
            v = live(site.value, values[:, : t + 1], received)
            first = 0 if scoring.window is None else max(0, t + 1 - scoring.window)
            if scoring.chunk is not None:
                first = max(first, t // scoring.chunk * scoring.chunk)
            for head in range(q.shape[1]):
                scores = scoring.scale * (k[head // groups, first:] @ q[0, head, t])
                if scoring.softcap is not None:
                    scores = scoring.softcap * (scores / scoring.softcap).tanh()
                if scoring.alibi_slopes is not None:
                    back = torch.arange(t - first, -1, -1)
                    scores = scores - scoring.alibi_slopes[head].to(scores) * back
                weights = scores.exp()
                total = weights.sum()
                if scoring.sink_logits is not None:
                    total = total + scoring.sink_logits[head].exp()
                out[head, t] = weights @ v[head // groups, first:] / total
        return out[None]


def received_attention(stream: StreamPlan, keys: Tensor, q: Tensor, scale: float) -> Tensor | None:
    """Return what each key `[Hk, n, D]` gets from probes `[H, n, D]` of its chunk, `[Hk, n]`."""
    codec = make_codec(stream.codec)
    if not isinstance(codec, SaliencyCodec) or not codec.needs_queries:
        return None
    exact = keys.to(dtype_from_name(stream.regions.dtype)).to(keys.dtype)
    groups, sink = q.shape[0] // keys.shape[0], stream.regions.sink
    found = torch.zeros(keys.shape[:2], dtype=keys.dtype)
    for t in range(sink, keys.shape[1]):
        place = (t - sink) % codec.chunk
        if place in codec.probes:
            for head in range(q.shape[0]):
                run = slice(t - place, t + 1)
                scores = scale * (exact[head // groups, run] @ q[head, t])
                found[head // groups, run] += scores.exp() / scores.exp().sum()
    return found


def live(stream: StreamPlan, x: Tensor, received: Tensor | None = None) -> Tensor:
    """Return what is read of `x` `[Hk, n, D]` when the cache holds these n tokens."""
    codec = make_codec(stream.codec)
    sink, body = stream.regions.sink, stream.body_tokens(x.shape[1])
    exact = x.to(dtype_from_name(stream.regions.dtype)).to(x.dtype)
    source = exact if stream.recent_capacity else x
    middle = source[:, sink : sink + body]
    if body and received is not None:
        planes = codec.encode_ranked(middle, received[:, sink : sink + body])
        middle = codec.decode(planes, x.dtype)
    elif body:
        middle = codec.decode(codec.encode(middle), x.dtype)
    return torch.cat([exact[:, :sink], middle, exact[:, sink + body :]], 1)


def defined_logits(program: Program, tokens: Tensor) -> Tensor:
    """Return logits `[n, vocab]` of one sequence `[n]` by definition."""
    assert program.plan is not None
    cache = DefinedCache(program.plan)
    ids = tokens[None]
    logits: Tensor = program.to_module()(ids, default_positions(ids), make_handle(cache))[0]
    return logits


def defined_cache(program: Program, tokens: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Return K and V of `layer` `[Hk, n, D]` after one sequence, by definition."""
    assert program.plan is not None
    cache = DefinedCache(program.plan)
    ids = tokens[None]
    program.to_module()(ids, default_positions(ids), make_handle(cache))
    site = program.plan.site(layer)
    k, v = cache.stored[site.owner]
    received = cache.received[site.owner]
    return live(site.key, k, received), live(site.value, v, received)
