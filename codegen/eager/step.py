"""What all layers of one step share: lengths, slots, masks and the flush arithmetic.

A step feeds `counts[b]` new tokens to row `b`, whose cache held `starts[b]` before. Everything here
depends on lengths alone, so it is computed once and used by every layer.

A position is the index of a token in its sequence. A slot is a place in the page pool. The body
index of a token is its position less the sink.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.ir.plan import StreamPlan


@dataclass(frozen=True)
class FlushRule:
    """When tokens of a stream become codes; see `StreamPlan.keep_and_chunk`."""

    sink: int
    keep: int
    chunk: int

    @classmethod
    def of(cls, stream: StreamPlan) -> FlushRule:
        """Return the rule of `stream`."""
        keep, chunk = stream.keep_and_chunk
        return cls(stream.regions.sink, keep, chunk)

    @property
    def is_plain(self) -> bool:
        """Whether every token is encoded at once."""
        return self == FlushRule(0, 0, 1)

    @property
    def capacity(self) -> int:
        """Exact tokens after the sink that may remain once a step has ended."""
        return self.keep + self.chunk - 1

    def body(self, lengths: Tensor) -> Tensor:
        """Return encoded tokens at each cached length; `StreamPlan.body_tokens` on a tensor."""
        free = lengths - self.sink - self.keep
        return (free // self.chunk * self.chunk).clamp_min(0)

    def body_tokens(self, length: int) -> int:
        """Return encoded tokens at one cached length."""
        return max(0, (length - self.sink - self.keep) // self.chunk * self.chunk)


class Step:
    """One forward pass over a batch of rows.

    Args:
        rows: Row of the session of each batch entry.
        starts: Tokens cached before the step, per entry.
        counts: New tokens, per entry, at least 1.
        block_table: Pages of each entry, int32 `[B, pages]`, padded with the null page 0.
        page_size: Tokens a page.
        device: Where the cache lives.
    """

    def __init__(
        self,
        rows: list[int],
        starts: list[int],
        counts: list[int],
        block_table: Tensor,
        page_size: int,
        device: torch.device,
    ) -> None:
        ends = [a + n for a, n in zip(starts, counts, strict=True)]
        self.batch_size, self.num_new, self.total = len(rows), max(counts), max(ends)
        self.is_fresh = not any(starts)
        self.is_ragged = min(counts) != self.num_new
        self.is_uniform = not self.is_ragged and min(starts) == max(starts)
        self.page_size, self.device = page_size, device
        self.rows = torch.tensor(rows, device=device)
        self.starts = torch.tensor(starts, device=device)
        self.counts = torch.tensor(counts, device=device)
        self.ends = torch.tensor(ends, device=device)
        self.pages = block_table.to(device, torch.int64)
        self.affine = _affine(block_table)
        self._visible: dict[int | None, Tensor | None] = {}
        self._rules: dict[FlushRule, RuleStep] = {}

    def rule(self, rule: FlushRule) -> RuleStep:
        """Return the shared index tensors of a flush rule."""
        if rule not in self._rules:
            self._rules[rule] = RuleStep(self, rule)
        return self._rules[rule]

    @functools.cached_property
    def times(self) -> Tensor:
        """Position of each query, `[B, S]`; padding repeats the last real one."""
        new = torch.arange(self.num_new, device=self.device)
        return torch.minimum(self.starts[:, None] + new, self.ends[:, None] - 1)

    @functools.cached_property
    def columns(self) -> Tensor:
        """Positions 0..T-1 of the longest row."""
        return torch.arange(self.total, device=self.device)

    def is_causal_square(self, window: int | None) -> bool:
        """Whether the visible part is the plain causal triangle over the new tokens."""
        return self.is_fresh and window is None

    def visible(self, window: int | None) -> Tensor | None:
        """Return which positions a query may see, bool `[B, S, T]`, or None for all of them."""
        if window not in self._visible:
            self._visible[window] = self._make_visible(window)
        return self._visible[window]

    def _make_visible(self, window: int | None) -> Tensor | None:
        if self.num_new == 1 and self.is_uniform and (window is None or window >= self.total):
            return None
        distance = self.times[:, :, None] - self.columns
        mask = distance >= 0
        return mask if window is None else mask & (distance < window)


class RuleStep:
    """Index tensors of one step for the streams that follow one flush rule.

    `stage` below means the exact tokens at hand: the rows' recent buffers, cut to `tail_before`
    columns, followed by the new tokens.

    Attributes:
        body_before: Encoded tokens before the step, `[B]`.
        body_after: Encoded tokens after the step, `[B]`.
        body_len: Largest `body_after`.
        tail_before: Columns of the recent buffer in use before the step.
        tail_after: The same after the step.
    """

    def __init__(self, step: Step, rule: FlushRule) -> None:
        self.step, self.rule = step, rule
        self.body_before, self.body_after = rule.body(step.starts), rule.body(step.ends)
        self.body_len = int(self.body_after.max())
        self._tails = (step.starts - rule.sink - self.body_before).clamp_min(0)
        tails_after = (step.ends - rule.sink - self.body_after).clamp_min(0)
        self.tail_before, self.tail_after = int(self._tails.max()), int(tails_after.max())

    @functools.cached_property
    def fresh_start(self) -> int:
        """Smallest position that any row has in its stage."""
        return int((self.step.starts - self._tails).min())

    def stage_columns(self, positions: Tensor) -> Tensor:
        """Return the stage column of positions `[B, n]`; positions not staged are clamped."""
        starts = self.step.starts[:, None]
        tail = positions - starts + self._tails[:, None]
        new = self.tail_before + positions - starts
        last = self.tail_before + self.step.num_new - 1
        return torch.where(positions < starts, tail, new).clamp(0, last)

    @functools.cached_property
    def flush(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Tokens to encode: (batch entry, stage column, slot), each `[N]`; None if there are none.

        Groups stay whole and in order, for each row flushes a multiple of the chunk.
        """
        entries, body = _ragged_ranges(self.body_before, self.body_after)
        if entries.numel() == 0:
            return None
        columns = self.stage_columns_flat(entries, body + self.rule.sink)
        return entries, columns, self.slots(entries, body)

    def stage_columns_flat(self, entries: Tensor, positions: Tensor) -> Tensor:
        """Return the stage columns of `positions` `[N]` of batch `entries` `[N]`."""
        starts = self.step.starts[entries]
        tail = positions - starts + self._tails[entries]
        return torch.where(positions < starts, tail, self.tail_before + positions - starts)

    def slots(self, entries: Tensor, body: Tensor) -> Tensor:
        """Return page slots of body indices `[N]` of batch `entries` `[N]`."""
        size = self.step.page_size
        return self.step.pages[entries, body // size] * size + body % size

    @functools.cached_property
    def sink_writes(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """New sink tokens: (batch entry, new token, position), each `[N]`, or None."""
        ends = self.step.ends.clamp_max(self.rule.sink)
        entries, positions = _ragged_ranges(self.step.starts, ends)
        if entries.numel() == 0:
            return None
        return entries, positions - self.step.starts[entries], positions

    @functools.cached_property
    def kept_columns(self) -> Tensor:
        """Stage columns that form the new recent buffer, `[B, tail_after]`."""
        first = self.rule.sink + self.body_after
        return self.stage_columns(first[:, None] + self.step.columns[: self.tail_after])

    @functools.cached_property
    def fresh_columns(self) -> Tensor | None:
        """Stage columns of positions `fresh_start`..T-1, `[B, T - fresh_start]`.

        None if the stage is in that order already.
        """
        if self.step.is_uniform:
            return None
        positions = self.step.columns[self.fresh_start :]
        return self.stage_columns(positions.expand(self.step.batch_size, -1))

    @property
    def is_split(self) -> bool:
        """Whether all queries agree on where the body ends, so that no token has two copies."""
        return self.step.num_new == 1 and self.step.is_uniform

    @functools.cached_property
    def is_exact(self) -> Tensor:
        """Whether a query reads the unencoded copy past the sink, bool `[B, S, T]`."""
        first = self.rule.sink + self.rule.body(self.step.times + 1)
        return self.step.columns >= first[:, :, None]


def _ragged_ranges(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return (entry, value) of every integer in `[first[b], last[b])`, entry by entry."""
    widths = (last - first).clamp_min(0)
    entries = torch.repeat_interleave(widths)
    before = torch.cumsum(widths, 0) - widths
    inside = torch.arange(entries.numel(), device=first.device) - before[entries]
    return entries, first[entries] + inside


def _affine(block_table: Tensor) -> tuple[int, int] | None:
    """Return (first page, pages between rows) if the table is evenly spaced, else None.

    Such a table can be read through strides, without a copy.
    """
    rows, pages = block_table.shape
    if pages == 0:
        return None
    table = block_table.tolist()
    base = table[0][0]
    stride = table[1][0] - base if rows > 1 else pages
    if stride <= 0 or base == 0:
        return None
    even = all(
        page == base + b * stride + j for b, row in enumerate(table) for j, page in enumerate(row)
    )
    return (base, stride) if even else None
