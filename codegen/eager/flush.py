"""When tokens become codes, and from where to where they go in one step.

A position is the index of a token in its sequence. The body index of a token is its position less
the sink. A slot is a place in the page pool.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvxform.ir.stream_plan import StreamPlan

if TYPE_CHECKING:
    from kvxform.codegen.eager.step import QueryRun, Step


@dataclass(frozen=True)
class FlushRule:
    """When tokens of a stream become codes; see `StreamPlan.keep_and_chunk`.

    Attributes:
        sink: First tokens that stay exact.
        keep: Last tokens that stay exact.
        chunk: Tokens encoded at a time.
        is_scored: Whether tokens collect scores until they are encoded.
    """

    sink: int
    keep: int
    chunk: int
    is_scored: bool = False

    @classmethod
    def of(cls, stream: StreamPlan) -> FlushRule:
        """Return the rule of `stream`."""
        keep, chunk = stream.keep_and_chunk
        return cls(stream.regions.sink, keep, chunk, stream.score_bytes > 0)

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

    def can_crop(self, length: int, new_length: int) -> bool:
        """Whether every token that is exact at `new_length` is still exact at `length`.

        Tokens leave the recent buffer for good when they are encoded, and scores keep what queries
        have added that are dropped.
        """
        body = self.body_tokens(new_length)
        if new_length == length or new_length <= self.sink + body:
            return True
        return body == self.body_tokens(length) and not self.is_scored


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
        self._exact: dict[QueryRun, Tensor] = {}
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

    @functools.cached_property
    def stage_positions(self) -> Tensor:
        """Position of each stage column, `[B, tail_before + S]`; -1 where there is no token."""
        step = self.step
        tail = torch.arange(self.tail_before, device=step.device)
        new = torch.arange(step.num_new, device=step.device)
        old = (step.starts - self._tails)[:, None] + tail
        old = old.masked_fill(tail >= self._tails[:, None], -1)
        fresh = (step.starts[:, None] + new).masked_fill(new >= step.counts[:, None], -1)
        return torch.cat([old, fresh], 1)

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

    def first_exact(self, run: QueryRun) -> int:
        """Return the first position that any query of the run reads unencoded past the sink."""
        return self.rule.sink + self.rule.body_tokens(run.first_time + 1)

    def is_exact(self, run: QueryRun) -> Tensor:
        """Return whether a query reads the unencoded copy of a position.

        Bool `[B, s, n]`, for the n positions from `first_exact` to `run.end` - 1.
        """
        if run not in self._exact:
            first = self.rule.sink + self.rule.body(self.step.times[:, run.queries] + 1)
            positions = self.step.columns[self.first_exact(run) : run.end]
            self._exact[run] = positions >= first[:, :, None]
        return self._exact[run]


def _ragged_ranges(first: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return (entry, value) of every integer in `[first[b], last[b])`, entry by entry."""
    widths = (last - first).clamp_min(0)
    entries = torch.repeat_interleave(widths)
    before = torch.cumsum(widths, 0) - widths
    inside = torch.arange(entries.numel(), device=first.device) - before[entries]
    return entries, first[entries] + inside
