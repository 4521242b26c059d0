"""What all layers of one step share: lengths, pages and masks.

A step feeds `counts[b]` new tokens to row `b`, whose cache held `starts[b]` before. Everything here
depends on lengths alone, so it is computed once and used by every layer.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.codegen.eager.flush import FlushRule, RuleStep
from kvxform.ir.rotary import KeyRead
from kvxform.ir.scoring import Span


@dataclass(frozen=True)
class QueryRun:
    """A run of new tokens whose queries are attended together.

    Attributes:
        first: Index of the first among the new tokens.
        last: Index after the last.
        first_time: Smallest position of a query of the run, over all rows.
        end: Largest position plus one.
    """

    first: int
    last: int
    first_time: int
    end: int

    @property
    def queries(self) -> slice:
        """The run as a slice of the new tokens."""
        return slice(self.first, self.last)


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
        self._starts, self._ends = starts, ends
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
        self._visible: dict[Span, Tensor | None] = {}
        self._hidden: dict[tuple[QueryRun, Span], tuple[int, Tensor] | None] = {}
        self._rules: dict[FlushRule, RuleStep] = {}
        self._tables: dict[tuple[object, ...], tuple[Tensor, Tensor]] = {}

    def rule(self, rule: FlushRule) -> RuleStep:
        """Return the shared index tensors of a flush rule."""
        if rule not in self._rules:
            self._rules[rule] = RuleStep(self, rule)
        return self._rules[rule]

    def rotary_table(self, read: KeyRead, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
        """Return cosine and sine of all positions, if keys are to be turned by them."""
        if read.inv_freq is None:
            return None
        key = (read.inv_freq.data_ptr(), read.inv_freq.dtype, read.attention_scaling, dtype)
        if key not in self._tables:
            self._tables[key] = read.table(self.total, dtype)
        return self._tables[key]

    @functools.cached_property
    def times(self) -> Tensor:
        """Position of each query, `[B, S]`; padding repeats the last real one."""
        new = torch.arange(self.num_new, device=self.device)
        return torch.minimum(self.starts[:, None] + new, self.ends[:, None] - 1)

    @functools.cached_property
    def columns(self) -> Tensor:
        """Positions 0..T-1 of the longest row."""
        return torch.arange(self.total, device=self.device)

    def is_causal_square(self, span: Span) -> bool:
        """Whether the visible part is the plain causal triangle over the new tokens."""
        return self.is_fresh and span.is_whole

    def visible(self, span: Span) -> Tensor | None:
        """Return which positions a query may see, bool `[B, S, T]`, or None for all of them."""
        if span not in self._visible:
            self._visible[span] = self._make_visible(span)
        return self._visible[span]

    def query_run(self, first: int, last: int) -> QueryRun:
        """Return what is known of the new tokens `first` to `last` - 1 of all rows."""
        times = [min(start + first, end - 1) for start, end in self._spans]
        ends = [min(start + last, end) for start, end in self._spans]
        return QueryRun(first, last, min(times), max(ends))

    @property
    def _spans(self) -> list[tuple[int, int]]:
        return list(zip(self._starts, self._ends, strict=True))

    def hidden(self, run: QueryRun, span: Span) -> tuple[int, Tensor] | None:
        """Return what a run of queries may not see among positions 0..`run.end` - 1.

        The result is a position and a mask `[B, s, run.end - position]` of all later ones, true
        where hidden; or None if everything is visible.
        """
        key = (run, span)
        if key not in self._hidden:
            start = run.first_time + 1 if span.is_whole else 0
            mask = ~span.sees(self.times[:, run.queries], self.columns[start : run.end])
            self._hidden[key] = (start, mask) if bool(mask.any()) else None
        return self._hidden[key]

    def _make_visible(self, span: Span) -> Tensor | None:
        if self.num_new == 1 and self.is_uniform and self._sees_all(span):
            return None
        return span.sees(self.times, self.columns)

    def _sees_all(self, span: Span) -> bool:
        """Whether the last of `total` tokens sees all of them."""
        return all(limit is None or limit >= self.total for limit in (span.window, span.chunk))


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
