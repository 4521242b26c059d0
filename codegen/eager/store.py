"""Storage of one stream: page pools of its planes, sink buffer, recent buffer.

Pools are page-first and NHD, `[num_pages, rows_per_page, Hk, width]`, so that gathered pages are
one run of tokens and HND is a transposed view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.codecs.base import Codec, dtype_from_name, make_codec
from kvxform.codegen.eager.flush import FlushRule, RuleStep
from kvxform.codegen.eager.folded_body import FoldedBody, fold_body
from kvxform.codegen.eager.step import Step
from kvxform.ir.plan import StreamPlan
from kvxform.ir.rotary import KeyRead

FOLD_QUERIES = 8  # with more new tokens, decoding a value once is cheaper than folding scales


@dataclass(frozen=True)
class StreamRead:
    """One stream as the queries of a step see it; tokens of one row in several copies.

    Attributes:
        rule_step: Positions and masks that belong to the copies.
        sink: Exact first tokens `[B, Hk, sink, D]`, or None.
        body: Body `[B, Hk, body_len, D]`, decoded or still encoded, or None if it is empty.
        fresh: Exact copies of the positions from `rule_step.fresh_start` on, `[B, Hk, n, D]`, or
            None if the rule keeps nothing exact past the sink.
    """

    rule_step: RuleStep
    sink: Tensor | None = None
    body: Tensor | FoldedBody | None = None
    fresh: Tensor | None = None

    def as_keys(self, read: KeyRead, table: tuple[Tensor, Tensor]) -> StreamRead:
        """Return the keys of a stream that is stored before RoPE; see `KeyRead.apply`."""
        assert not isinstance(self.body, FoldedBody), "check_plan lets no such stream through"
        places = (0, self.rule_step.rule.sink, self.rule_step.fresh_start)
        parts = [
            None if part is None else read.apply(part, first, table)
            for part, first in zip((self.sink, self.body, self.fresh), places, strict=True)
        ]
        return StreamRead(self.rule_step, *parts)

    def heads(self, first: int, last: int) -> StreamRead:
        """Return heads `first` to `last` - 1 alone."""
        own = (slice(None), slice(first, last))
        return StreamRead(
            self.rule_step,
            None if self.sink is None else self.sink[own],
            None if self.body is None else self.body[own],
            None if self.fresh is None else self.fresh[own],
        )


@dataclass(frozen=True)
class Appended:
    """What an append leaves for the read of the same step.

    Attributes:
        planes: Encoded new tokens `[B, Hk, S, width]` if nothing was cached before, else None.
        stage: Exact tokens at hand `[B, tail_before + S, Hk, D]`, or None without regions.
    """

    planes: dict[str, Tensor] | None = None
    stage: Tensor | None = None


class StreamStore:
    """K or V of one owner layer, or both if they are kept alike, for all rows of a session.

    Args:
        stream: What to store and how.
        num_kv_heads: Heads, Hk.
        num_pages: Pages of the pool, the null page included.
        page_size: Tokens a page.
        num_rows: Rows of the session.
        device: Where tensors live.
    """

    def __init__(
        self,
        stream: StreamPlan,
        num_kv_heads: int,
        *,
        num_pages: int,
        page_size: int,
        num_rows: int,
        device: torch.device,
    ) -> None:
        self.rule = FlushRule.of(stream)
        self._codec: Codec = make_codec(stream.codec)
        self._specs = stream.planes
        self._folds = stream.read.form == "folded"
        self._page_size = page_size
        self._exact_dtype = dtype_from_name(stream.regions.dtype)
        self.pools = {
            p.name: torch.zeros(
                num_pages,
                page_size // p.tokens_per_row,
                p.heads(num_kv_heads),
                p.width,
                dtype=p.torch_dtype,
                device=device,
            )
            for p in stream.planes
        }

        def exact_buffer(tokens: int) -> Tensor:
            shape = (num_rows, tokens, num_kv_heads, stream.head_dim)
            return torch.zeros(shape, dtype=self._exact_dtype, device=device)

        self.sink = exact_buffer(self.rule.sink)
        self.recent = exact_buffer(self.rule.capacity)
        self._kept: Tensor | None = None

    def append(self, x: Tensor, step: Step) -> Appended:
        """Store new tokens `x` `[B, Hk, S, D]`.

        Body and sink are written past the committed length, so a step that fails leaves no trace;
        the new recent buffer waits for `commit`.
        """
        if self.rule.is_plain:
            return self._append_plain(x, step)
        return self._append_regions(x.transpose(1, 2), step)

    def _append_plain(self, x: Tensor, step: Step) -> Appended:
        flush = step.rule(self.rule).flush
        assert flush is not None, "a step has new tokens"
        entries, columns, slots = flush
        planes = self._codec.encode(x)
        for name, plane in planes.items():
            tokens = plane.transpose(1, 2)  # [B, Hk, S, width] -> [B, S, Hk, width]
            rows = tokens[entries, columns] if step.is_ragged else tokens.flatten(0, 1)
            self.pools[name].flatten(0, 1).index_copy_(0, slots, rows)
        return Appended(planes=planes if step.is_fresh else None)

    def _append_regions(self, x: Tensor, step: Step) -> Appended:
        rule_step = step.rule(self.rule)
        exact = x.to(self._exact_dtype)
        if rule_step.sink_writes is not None:
            entries, columns, positions = rule_step.sink_writes
            self.sink[step.rows[entries], positions] = exact[entries, columns]
        stage = exact if self.rule.capacity else x  # what a buffer holds has been rounded
        if rule_step.tail_before:
            stage = torch.cat([self.recent[step.rows, : rule_step.tail_before], exact], 1)
        if rule_step.flush is not None:
            entries, columns, slots = rule_step.flush
            self._write_body(stage[entries, columns].to(x.dtype), slots)
        if not self.rule.capacity:
            return Appended()
        batch = torch.arange(step.batch_size, device=x.device)[:, None]
        self._kept = stage[batch, rule_step.kept_columns]
        return Appended(stage=stage)

    def _write_body(self, tokens: Tensor, slots: Tensor) -> None:
        """Encode `tokens` `[N, Hk, D]`, whole groups in order, into `slots` `[N]`."""
        planes = self._codec.encode(tokens.transpose(0, 1))
        for spec in self._specs:
            rows = slots[:: spec.tokens_per_row] // spec.tokens_per_row
            encoded = planes[spec.name].transpose(0, 1)  # [Hk, rows, width] -> [rows, Hk, width]
            self.pools[spec.name].flatten(0, 1).index_copy_(0, rows, encoded)

    def commit(self, step: Step) -> None:
        """Let the recent buffers of a finished step take effect."""
        if self._kept is not None:
            self.recent[step.rows, : self._kept.shape[1]] = self._kept

    def abort(self) -> None:
        """Forget the recent buffers of a step that failed."""
        self._kept = None

    def read(self, step: Step, appended: Appended, dtype: torch.dtype) -> StreamRead:
        """Return the stream in `dtype` as the queries of `step` see it."""
        rule_step = step.rule(self.rule)
        if appended.planes is not None:  # what was just encoded is all there is: no gather
            return StreamRead(rule_step, body=self._codec.decode(appended.planes, dtype))
        body = self._read_body(step, rule_step.body_len, dtype)
        sink = fresh = None
        if self.rule.sink:
            sink = self.sink[step.rows, : step.total].transpose(1, 2).to(dtype)
        if appended.stage is not None:
            fresh = appended.stage
            if rule_step.fresh_columns is not None:
                batch = torch.arange(step.batch_size, device=fresh.device)[:, None]
                fresh = fresh[batch, rule_step.fresh_columns]
            fresh = fresh.transpose(1, 2).to(dtype)
        return StreamRead(rule_step, sink, body, fresh)

    def _read_body(self, step: Step, tokens: int, dtype: torch.dtype) -> Tensor | FoldedBody | None:
        if tokens == 0:
            return None
        planes = self._gather_planes(step, tokens)
        if self._folds and step.num_new <= FOLD_QUERIES:
            return fold_body(self._codec, planes, dtype)
        return self._codec.decode(planes, dtype)

    def _gather_planes(self, step: Step, tokens: int) -> dict[str, Tensor]:
        planes = {}
        for spec in self._specs:
            rows = -(-tokens // spec.tokens_per_row)
            planes[spec.name] = _gather(self.pools[spec.name], step, rows).transpose(1, 2)
        return planes  # NHD -> HND

    def stored(self, step: Step, row: int, length: int, dtype: torch.dtype) -> Tensor:
        """Return the `length` tokens of one row, decoded, `[Hk, length, D]`.

        Args:
            step: A step of that row alone, for its pages.
            row: Row of the session.
            length: Cached tokens.
            dtype: Dtype of the result.
        """
        body = self.rule.body_tokens(length)
        tail = max(0, length - self.rule.sink - body)
        parts = [self.sink[row, :length].transpose(0, 1).to(dtype)]
        if body:
            parts.append(self._codec.decode(self._gather_planes(step, body), dtype)[0])
        parts.append(self.recent[row, :tail].transpose(0, 1).to(dtype))
        return torch.cat(parts, 1)

    def clear(self, rows: Sequence[int], pages: Sequence[int]) -> None:
        """Zero what `rows` and `pages` held, so that nothing reaches their next users."""
        for pool in self.pools.values():
            pool[list(pages)] = 0
        for buffer in (self.sink, self.recent):
            buffer[list(rows)] = 0

    def copy_pages(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Copy the content of pages `old` to pages `new`."""
        for pool in self.pools.values():
            pool[list(new)] = pool[list(old)]

    def read_rows(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return copies of the sink and recent buffers of `rows`."""
        return self.sink[list(rows)], self.recent[list(rows)]

    def write_rows(self, rows: Sequence[int], buffers: tuple[Tensor, Tensor]) -> None:
        """Set the sink and recent buffers of `rows` to what `read_rows` returned."""
        self.sink[list(rows)], self.recent[list(rows)] = buffers

    def copy_from(self, other: StreamStore) -> None:
        """Take over what `other` holds, a store of the same stream and of no larger sizes."""
        for name, pool in other.pools.items():
            self.pools[name][: pool.shape[0], : pool.shape[1]] = pool
        self.sink[: other.sink.shape[0]] = other.sink
        self.recent[: other.recent.shape[0]] = other.recent

    def page_bytes(self) -> int:
        """Return bytes of one page of the real pool tensors."""
        return sum(pool[0].nbytes for pool in self.pools.values())

    def row_bytes(self) -> int:
        """Return bytes of the real sink and recent buffers of one row."""
        return self.sink[0].nbytes + self.recent[0].nbytes


def _gather(pool: Tensor, step: Step, rows: int) -> Tensor:
    """Return the first `rows` rows of each sequence, `[B, rows, Hk, width]`."""
    per_page = pool.shape[1]
    pages = -(-rows // per_page)
    if step.affine is not None:
        base, between = step.affine
        page, *rest = pool.stride()
        shape = (step.batch_size, rows, *pool.shape[2:])
        return pool.as_strided(shape, (between * page, *rest), base * page)
    used = pool[:, :rows] if pages == 1 else pool
    found = used.index_select(0, step.pages[:, :pages].flatten())
    return found.view(step.batch_size, pages * used.shape[1], *pool.shape[2:])[:, :rows]
