"""Inputs of the dense kernels, and attention over them in float64.

Every token has two copies of unequal content, one encoded and one exact, so that a query that
reads the wrong one is wrong by far. Everything that no kernel may read is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kvxform.codecs.base import dtype_from_name
from kvxform.codegen.triton.spec import PrefillSpec


class DenseCase(NamedTuple):
    """New queries and the tokens they attend to.

    Attributes:
        spec: The kernel.
        starts: Tokens cached before, of each row.
        counts: New tokens of each row.
        q: `[B, H, S, D]`.
        stored: K and V as a query reads them once they are encoded, `[B, Hk, T, D]`.
        exact: K and V as a query reads them before.
        options: Sink logits and ALiBi slopes, where the spec has them.
    """

    spec: PrefillSpec
    starts: Sequence[int]
    counts: Sequence[int]
    q: Tensor
    stored: tuple[Tensor, Tensor]
    exact: tuple[Tensor, Tensor]
    options: dict[str, Tensor]

    @property
    def scale(self) -> float:
        """Factor of scores."""
        return self.spec.key_dim**-0.5

    @property
    def rules(self) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
        """Sink, keep and chunk of K and of V."""
        s = self.spec
        return (
            (s.key_sink, s.key_keep, s.key_chunk),
            (s.value_sink, s.value_keep, s.value_chunk),
        )

    def int32(self, values: Sequence[int]) -> Tensor:
        """Return `values` as a tensor beside q."""
        return torch.tensor(values, dtype=torch.int32, device=self.q.device)


def make_case(
    spec: PrefillSpec, starts: Sequence[int], counts: Sequence[int], device: str = "cpu"
) -> DenseCase:
    """Return random inputs for rows of `starts` cached and `counts` new tokens."""
    dtype, batch = dtype_from_name(spec.dtype), len(starts)
    total = max([1, *(a + n for a, n in zip(starts, counts, strict=True))]) + 3

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype)

    q = draw(batch, spec.num_q_heads, max([1, *counts]), spec.key_dim)
    pairs = [
        tuple(draw(batch, spec.num_kv_heads, total, d) for d in (spec.key_dim, spec.value_dim))
        for _ in range(2)
    ]
    wanted = {"sink_logits": spec.has_sink_logits, "alibi_slopes": spec.has_alibi}
    options = {name: torch.rand(spec.num_q_heads).to(device) for name in wanted if wanted[name]}
    return DenseCase(spec, starts, counts, q, pairs[0], pairs[1], options)


def first_exact(position: int, rule: tuple[int, int, int]) -> int:
    """Return the first token after the sink that a query at `position` reads exact."""
    sink, keep, chunk = rule
    return sink + max(0, (position + 1 - sink - keep) // chunk * chunk)


def reference(case: DenseCase) -> tuple[Tensor, Tensor, Tensor]:
    """Return output, log-sum-exp and column scores in float64.

    Every query is computed alone, from the tokens it sees in the copies that were live at its time.
    Padding is zero in the output and -inf in the log-sum-exp.
    """
    spec, (batch, heads, width, _) = case.spec, case.q.shape
    groups = heads // spec.num_kv_heads
    out = case.q.new_zeros(batch, heads, width, spec.value_dim, dtype=torch.float64)
    lse = case.q.new_full((batch, heads, width), -math.inf, dtype=torch.float64)
    columns = case.q.new_zeros(
        batch, spec.num_kv_heads, case.stored[0].shape[2], dtype=torch.float64
    )
    for b, (start, count) in enumerate(zip(case.starts, case.counts, strict=True)):
        for i in range(count):
            position = start + i
            seen = _first_seen(spec, position)
            k, v = (
                _live(pair, b, seen, position, rule).repeat_interleave(groups, 0)
                for pair, rule in zip(
                    zip(case.stored, case.exact, strict=True), case.rules, strict=True
                )
            )
            scores = _scores(case, case.q[b, :, i].double(), k, seen - position)
            lse[b, :, i] = scores.logsumexp(-1)
            weights = (scores - lse[b, :, i, None]).exp()[:, : position + 1 - seen]
            out[b, :, i] = torch.einsum("hn,hnd->hd", weights, v)
            columns[b, :, seen : position + 1] += weights.unflatten(0, (-1, groups)).sum(1)
    return out, lse, columns


def _first_seen(spec: PrefillSpec, position: int) -> int:
    seen = 0 if spec.window is None else max(0, position + 1 - spec.window)
    return seen if spec.chunk is None else max(seen, position // spec.chunk * spec.chunk)


def _live(
    pair: tuple[Tensor, Tensor], b: int, seen: int, position: int, rule: tuple[int, int, int]
) -> Tensor:
    """Return tokens `seen` to `position` of row b, `[Hk, n, D]`, in the copies live then."""
    stored, exact = (x[b, :, seen : position + 1].double() for x in pair)
    turn = max(0, first_exact(position, rule) - seen)
    return torch.cat([stored[:, :turn], exact[:, turn:]], 1)


def _scores(case: DenseCase, q: Tensor, k: Tensor, first_distance: int) -> Tensor:
    """Return scores of one query `[H, D]` and `[H, n, D]` keys, with the sink logit after them."""
    scores = torch.einsum("hd,hnd->hn", q, k) * case.scale
    if case.spec.softcap is not None:
        scores = case.spec.softcap * torch.tanh(scores / case.spec.softcap)
    if case.spec.has_alibi:
        distance = torch.arange(first_distance, 1, device=q.device)
        scores = scores + case.options["alibi_slopes"].double()[:, None] * distance
    if case.spec.has_sink_logits:
        scores = torch.cat([scores, case.options["sink_logits"].double()[:, None]], 1)
    return scores


def run_prefill(module: ModuleType, case: DenseCase, **options: Any) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of the kernel; NaN-poisoned before, and beyond all rows.

    The log-sum-exp is empty if the spec has none. `options` go to the launcher.
    """
    spec, q = case.spec, case.q.clone()
    keys, values = (x.clone() for x in case.stored)
    for b, (start, count) in enumerate(zip(case.starts, case.counts, strict=True)):
        q[b, :, count:] = math.nan
        for x in (keys, values):
            x[b, :, start + count :] = math.nan
    lse = q.new_full(q.shape[:3] if spec.has_lse else (0,), math.nan, dtype=torch.float32)
    if spec.has_lse:
        options["lse"] = lse
    out = q.new_full((*q.shape[:3], spec.value_dim), math.nan)
    starts, counts = case.int32(case.starts), case.int32(case.counts)
    options |= {**case.options, **exact_options(case)}
    module.prefill(q, keys, values, starts, counts, out, scale=case.scale, **options)
    return out, lse


def exact_options(case: DenseCase) -> dict[str, Tensor]:
    """Return the exact copies from the first position on that any query reads exact."""
    names = ("exact_keys", "exact_values")
    copied = [i for i, rule in enumerate(case.rules) if rule[1:] != (0, 1)]
    if not copied:
        return {}
    begins = [
        min(first_exact(start, case.rules[i]) for i in copied) - 2  # garbage before is not read
        for start in case.starts
    ]
    ends = [a + n for a, n in zip(case.starts, case.counts, strict=True)]
    width = max([1, *(end - first for first, end in zip(begins, ends, strict=True))]) + 1
    result = {"exact_start": case.int32(begins)}
    for i in copied:
        exact = case.exact[i]
        copy = exact.new_full((*exact.shape[:2], width, exact.shape[3]), math.nan)
        for b, (begin, end) in enumerate(zip(begins, ends, strict=True)):
            first = first_exact(case.starts[b], case.rules[i])
            if first < end:
                copy[b, :, first - begin : end - begin] = exact[b, :, first:end]
        result[names[i]] = copy
    return result
