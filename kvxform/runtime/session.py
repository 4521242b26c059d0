"""Session: a cache in use. It owns pages and lengths, and runs prefill and decode over them.

A session has `max_batch_size` rows. A row is live from its first prefill until `free`. Results come
in the order of the rows asked for, by default all live rows, ascending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.codegen.eager.cache import PagedCache
from kvxform.codegen.eager.flush import FlushRule
from kvxform.codegen.eager.lowering import EagerExecutable
from kvxform.codegen.eager.step import Step
from kvxform.errors import CacheFullError, CodegenError
from kvxform.runtime.inputs import check_tokens, make_batch, refuse
from kvxform.runtime.pages import PagePool, PageTable


@dataclass
class SequenceState:
    """Lengths of one row, kept apart because a cache may drop tokens.

    Attributes:
        logical_length: Tokens seen; the position of the next one.
        physical_length: Tokens cached.
    """

    logical_length: int = 0
    physical_length: int = 0


@dataclass(frozen=True)
class LogicalCache:
    """What one layer holds, as the source model would: un-paged, decoded, un-rotated.

    Attributes:
        k: Keys of each live row, `[Hk, T, D]`.
        v: Values of each live row, `[Hk, T, Dv]`.
    """

    k: tuple[Tensor, ...]
    v: tuple[Tensor, ...]


class Session:
    """Cached execution of one program for up to `max_batch_size` sequences.

    Args:
        executable: A cached program.
        max_batch_size: Rows.
        max_seq_len: Longest sequence, prompt and generated tokens together.
        num_pages: Usable pages; by default enough for every row at full length.

    Raises:
        CodegenError: KVX401 if the program has no cache.
        KvxformError: KVX704 for sizes that make no sense.
    """

    def __init__(
        self,
        executable: EagerExecutable,
        *,
        max_batch_size: int = 1,
        max_seq_len: int = 2048,
        num_pages: int | None = None,
    ) -> None:
        plan = executable.program.plan
        if plan is None:
            raise CodegenError(
                "KVX401", "a session needs a program with a cache", hint="add insert-cache"
            )
        _check_sizes(max_batch_size, max_seq_len, executable.program.info.context_length)
        self.plan, self.max_batch_size, self.max_seq_len = plan, max_batch_size, max_seq_len
        self._executable, self._vocab_size = executable, executable.program.info.vocab_size
        self._dtype = executable.program.dtype
        size = plan.page_size(max_seq_len)
        self._rules = {FlushRule.of(st) for s in plan.owners for st in s.streams.values()}
        if num_pages is None:
            num_pages = max_batch_size * -(-max_seq_len // size)
        self._pool = PagePool(num_pages + 1, size)
        self._cache = PagedCache(
            plan,
            num_pages=num_pages + 1,
            page_size=size,
            num_rows=max_batch_size,
            device=executable.device,
        )
        self._rows: dict[int, SequenceState] = {}

    @property
    def rows(self) -> list[int]:
        """Live rows, ascending."""
        return sorted(self._rows)

    @property
    def free_pages(self) -> int:
        """Pages that no row holds."""
        return self._pool.num_free

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rows: Sequence[int] | None = None,
        chunk_size: int | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Append prompts; a row that is live already continues.

        Args:
            input_ids: Integer `[B, S]`, padded on either side.
            attention_mask: `[B, S]` of 0 and 1, one run of ones a row.
            rows: Row of each prompt; 0..B-1 by default.
            chunk_size: Tokens per forward pass; all at once by default.
            all_logits: Return logits of all positions, in the caller's columns, zero at padding.

        Returns:
            Logits of the last token of each row `[B, vocab]`, or `[B, S, vocab]`.

        Raises:
            CacheFullError: KVX702 or KVX703; nothing has changed then.
            KvxformError: KVX704 for bad input.
        """
        batch = make_batch(input_ids, attention_mask, self._vocab_size)
        targets = self._check_rows(range(len(batch.counts)) if rows is None else rows)
        if len(targets) != len(batch.counts):
            refuse(f"rows must name one row for each of {len(batch.counts)} prompts", targets)
        if chunk_size is not None and chunk_size < 1:
            refuse("chunk_size must be at least 1", chunk_size)
        self._reserve(targets, batch.counts)
        width = max(batch.counts)
        chunk = chunk_size or width
        parts = []
        final: Tensor | None = None
        for first in range(0, width, chunk):
            ids = batch.input_ids[:, first : first + chunk]
            counts = [min(max(n - first, 0), chunk) for n in batch.counts]
            logits = self._run(targets, ids, counts, all_logits)
            if all_logits:
                parts.append(logits)
                continue
            fed = torch.tensor(counts, device=logits.device) > 0
            final = logits if final is None else torch.where(fed[:, None], logits, final)
        if all_logits:
            return batch.to_caller(torch.cat(parts, 1))
        assert final is not None, "a prompt has tokens"
        return final

    def decode(self, token_ids: Tensor, *, rows: Sequence[int] | None = None) -> Tensor:
        """Append one token to each row and return the next logits.

        Args:
            token_ids: Integer `[B]`, in the order of `rows`.
            rows: All live rows by default.

        Returns:
            Logits `[B, vocab]`.

        Raises:
            CacheFullError: KVX702 or KVX703; nothing has changed then.
            KvxformError: KVX704 for bad input.
        """
        ids = check_tokens(token_ids, self._vocab_size)
        targets = self._check_rows(self.rows if rows is None else rows)
        if len(targets) != len(ids):
            refuse(f"decode needs one token for each of {len(targets)} rows", len(ids))
        dead = [row for row in targets if row not in self._rows]
        if dead:
            refuse("decode needs rows that have been prefilled", dead)
        counts = [1] * len(targets)
        self._reserve(targets, counts)
        return self._run(targets, ids[:, None], counts, all_logits=False)

    def free(self, rows: Sequence[int] | None = None) -> None:
        """Forget rows (all by default) and give their pages back."""
        targets = self.rows if rows is None else self._check_rows(rows)
        pages = [page for row in targets for page in self._pool.shrink(row, 0)]
        self._cache.clear(targets, pages)
        for row in targets:
            self._rows.pop(row, None)

    def sequence_lengths(self) -> tuple[int, ...]:
        """Return cached tokens of each live row."""
        return tuple(self._rows[row].physical_length for row in self.rows)

    def cache_bytes(self) -> int:
        """Return bytes of the tensors behind the pages and buffers in use.

        Equal to `plan.bytes_at(sequence_lengths(), max_seq_len)`.
        """
        return self._cache.bytes_held(self._pool.num_used, len(self._rows))

    def page_table(self) -> PageTable:
        """Return the pages of live rows as FlashInfer tables, for the stream that fills most."""
        tokens = [self._body_tokens(n) for n in self.sequence_lengths()]
        return self._pool.page_table(self.rows, tokens)

    def logical_cache(self, layer: int) -> LogicalCache:
        """Return what `layer` holds for each live row; see `LogicalCache`."""
        pairs = [
            self._cache.logical(
                layer, row, state.physical_length, self._pool.pages(row), self._dtype
            )
            for row, state in sorted(self._rows.items())
        ]
        return LogicalCache(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def _body_tokens(self, length: int) -> int:
        return max(rule.body_tokens(length) for rule in self._rules)

    def _pages_needed(self, length: int) -> int:
        return -(-self._body_tokens(length) // self._pool.page_size)

    def _length(self, row: int) -> int:
        return self._rows[row].physical_length if row in self._rows else 0

    def _check_rows(self, rows: Sequence[int]) -> list[int]:
        targets = list(rows)
        if len(targets) > self.max_batch_size:
            refuse(f"the session has {self.max_batch_size} rows", len(targets))
        if len(set(targets)) != len(targets) or not all(
            0 <= row < self.max_batch_size for row in targets
        ):
            refuse(f"rows must be different and in 0..{self.max_batch_size - 1}", targets)
        return targets

    def _reserve(self, rows: list[int], counts: list[int]) -> None:
        """Take the pages that the new tokens need; changes nothing if that fails."""
        ends = {row: self._length(row) + n for row, n in zip(rows, counts, strict=True)}
        longest = max(ends.values())
        if longest > self.max_seq_len:
            raise CacheFullError(
                "KVX703",
                f"a sequence must fit into the session's {self.max_seq_len} tokens",
                where="session",
                got=longest,
                hint="make a session with a larger max_seq_len, or shorten the prompt",
            )
        self._pool.grow({row: self._pages_needed(end) for row, end in ends.items()})

    def _run(self, rows: list[int], ids: Tensor, counts: list[int], all_logits: bool) -> Tensor:
        """Run one step over the rows that have tokens in it; other rows get zero logits."""
        fed = [i for i, n in enumerate(counts) if n]
        if len(fed) == len(rows):
            return self._step(rows, ids, counts, all_logits)
        part = self._step([rows[i] for i in fed], ids[fed], [counts[i] for i in fed], all_logits)
        logits = part.new_zeros(len(rows), *part.shape[1:])
        logits[fed] = part
        return logits

    def _step(self, rows: list[int], ids: Tensor, counts: list[int], all_logits: bool) -> Tensor:
        starts = [self._length(row) for row in rows]
        device = self._executable.device
        step = Step(
            rows, starts, counts, self._pool.block_table(rows), self._pool.page_size, device
        )
        first = [self._rows[r].logical_length if r in self._rows else 0 for r in rows]
        new = torch.arange(ids.shape[1], device=device)
        positions = torch.tensor(first, device=device)[:, None] + new
        last = None if all_logits else step.counts - 1
        self._cache.begin(step)
        try:
            logits = self._executable(ids.to(device), positions, self._cache, last=last)
            self._cache.commit()
        except BaseException:
            self._roll_back(rows)
            raise
        for row, count in zip(rows, counts, strict=True):
            state = self._rows.setdefault(row, SequenceState())
            state.logical_length += count
            state.physical_length += count
        return logits

    def _roll_back(self, rows: list[int]) -> None:
        """Drop the pages of a step that failed; lengths have not moved yet."""
        self._cache.abort()
        taken = [
            page
            for row in rows
            for page in self._pool.shrink(row, self._pages_needed(self._length(row)))
        ]
        self._cache.clear([row for row in rows if row not in self._rows], taken)


def _check_sizes(max_batch_size: int, max_seq_len: int, context_length: int | None) -> None:
    if max_batch_size < 1 or max_seq_len < 1:
        refuse("a session needs at least one row and one token", [max_batch_size, max_seq_len])
    if context_length is not None and max_seq_len > context_length:
        refuse(f"max_seq_len must be within the model's {context_length} tokens", max_seq_len)
