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
from kvxform.codecs.saliency import SaliencyCodec
from kvxform.codegen.eager.flush import FlushRule
from kvxform.codegen.eager.folded_body import FoldedBody, fold_body
from kvxform.codegen.eager.reads import StreamRead
from kvxform.codegen.eager.step import Step
from kvxform.ir.stream_plan import StreamPlan

FOLD_QUERIES = 8  # with more new tokens, decoding a value once is cheaper than folding scales


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
        scored = self.rule.capacity if self.rule.is_scored else 0
        self.scores = torch.zeros(num_rows, scored, num_kv_heads, device=device)
        self._kept: Tensor | None = None
        self._kept_scores: Tensor | None = None

    def append(self, x: Tensor, step: Step, attention: Tensor | None = None) -> Appended:
        """Store new tokens.

        Body and sink are written past the committed length, so a step that fails leaves no trace;
        the new recent buffer waits for `commit`.

        Args:
            x: `[B, Hk, S, D]`.
            step: The step that they belong to.
            attention: What its queries add to the scores of the tokens at hand, `[B, n, Hk]`, where
                the codec ranks tokens by them.
        """
        if self.rule.is_plain:
            return self._append_plain(x, step)
        return self._append_regions(x, step, attention)

    def stage(self, x: Tensor, step: Step) -> Tensor:
        """Return the exact tokens at hand once `x` `[B, Hk, S, D]` is there, `[B, n, Hk, D]`."""
        x, rule_step = x.transpose(1, 2), step.rule(self.rule)
        if not self.rule.capacity:
            return x
        exact = x.to(self._exact_dtype)  # what a buffer holds has been rounded
        if not rule_step.tail_before:
            return exact
        return torch.cat([self.recent[step.rows, : rule_step.tail_before], exact], 1)

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

    def _append_regions(self, x: Tensor, step: Step, attention: Tensor | None) -> Appended:
        rule_step = step.rule(self.rule)
        if rule_step.sink_writes is not None:
            entries, columns, positions = rule_step.sink_writes
            exact = x.transpose(1, 2)[entries, columns].to(self._exact_dtype)
            self.sink[step.rows[entries], positions] = exact
        stage, scores = self.stage(x, step), None
        if attention is not None:
            scores = self.scores.new_zeros(attention.shape)
            scores[:, : rule_step.tail_before] = self.scores[step.rows, : rule_step.tail_before]
            scores += attention
        if rule_step.flush is not None:
            entries, columns, slots = rule_step.flush
            own = None if scores is None else scores[entries, columns]
            self._write_body(stage[entries, columns].to(x.dtype), slots, own)
        if not self.rule.capacity:
            return Appended()
        batch = torch.arange(step.batch_size, device=x.device)[:, None]
        self._kept = stage[batch, rule_step.kept_columns]
        if scores is not None:
            self._kept_scores = scores[batch, rule_step.kept_columns]
        return Appended(stage=stage)

    def _write_body(self, tokens: Tensor, slots: Tensor, scores: Tensor | None) -> None:
        """Encode `tokens` `[N, Hk, D]`, whole groups in order, into `slots` `[N]`.

        `scores` `[N, Hk]` are given where the codec ranks tokens by them.
        """
        x = tokens.transpose(0, 1)  # [Hk, N, D]
        if scores is None:
            planes = self._codec.encode(x)
        else:
            assert isinstance(self._codec, SaliencyCodec), "no other codec takes scores"
            planes = self._codec.encode_ranked(x, scores.T)
        for spec in self._specs:
            rows = slots[:: spec.tokens_per_row] // spec.tokens_per_row
            encoded = planes[spec.name].transpose(0, 1)  # [Hk, rows, width] -> [rows, Hk, width]
            self.pools[spec.name].flatten(0, 1).index_copy_(0, rows, encoded)

    def commit(self, step: Step) -> None:
        """Let the recent buffers of a finished step take effect."""
        if self._kept is not None:
            self.recent[step.rows, : self._kept.shape[1]] = self._kept
        if self._kept_scores is not None:
            self.scores[step.rows, : self._kept_scores.shape[1]] = self._kept_scores

    def abort(self) -> None:
        """Forget the recent buffers of a step that failed."""
        self._kept = self._kept_scores = None

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

    def planes(self, step: Step, length: int) -> dict[str, Tensor]:
        """Return the planes of the row of `step`, of its first `length` tokens; copies."""
        body = self.rule.body_tokens(length)
        if not body:
            return {}
        return {name: x[0].clone() for name, x in self._gather_planes(step, body).items()}

    def clear(self, rows: Sequence[int], pages: Sequence[int]) -> None:
        """Zero what `rows` and `pages` held, so that nothing reaches their next users."""
        for pool in self.pools.values():
            pool[list(pages)] = 0
        for buffer in self._buffers:
            buffer[list(rows)] = 0

    def copy_pages(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Copy the content of pages `old` to pages `new`."""
        for pool in self.pools.values():
            pool[list(new)] = pool[list(old)]

    def read_rows(self, rows: Sequence[int]) -> list[Tensor]:
        """Return copies of the buffers of `rows`."""
        return [buffer[list(rows)] for buffer in self._buffers]

    def write_rows(self, rows: Sequence[int], copies: list[Tensor]) -> None:
        """Set the buffers of `rows` to what `read_rows` returned."""
        for buffer, own in zip(self._buffers, copies, strict=True):
            buffer[list(rows)] = own

    def copy_from(self, other: StreamStore) -> None:
        """Take over what `other` holds, a store of the same stream and of no larger sizes."""
        for name, pool in other.pools.items():
            self.pools[name][: pool.shape[0], : pool.shape[1]] = pool
        for buffer, old in zip(self._buffers, other._buffers, strict=True):
            buffer[: old.shape[0]] = old

    def page_bytes(self) -> int:
        """Return bytes of one page of the real pool tensors."""
        return sum(pool[0].nbytes for pool in self.pools.values())

    def row_bytes(self) -> int:
        """Return bytes of the real buffers of one row."""
        return sum(buffer[0].nbytes for buffer in self._buffers)

    @property
    def _buffers(self) -> tuple[Tensor, ...]:
        """What is kept for each row: sink, recent tokens and their scores."""
        return self.sink, self.recent, self.scores


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
