"""Session: a cache in use; it runs prefill and decode over the rows of a `RowStore`.

A session has `max_batch_size` rows. A row is live from its first prefill until `free`. Results come
in the order of the rows asked for, by default all live rows, ascending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvxform.errors import CodegenError
from kvxform.ir.execution import Executable, StepInputs
from kvxform.runtime.inputs import RangeCheck, check_form, make_batch, refuse
from kvxform.runtime.rows import RowStore


def _checked_before() -> None:
    """Do nothing: `make_batch` has looked at the tokens of a prompt."""


class Session(RowStore):
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
        executable: Executable,
        *,
        max_batch_size: int = 1,
        max_seq_len: int = 2048,
        num_pages: int | None = None,
    ) -> None:
        program = executable.program
        if program.plan is None:
            raise CodegenError(
                "KVX401", "a session needs a program with a cache", hint="add insert-cache"
            )
        super().__init__(
            executable,
            program.plan,
            max_batch_size=max_batch_size,
            max_seq_len=max_seq_len,
            context_length=program.info.context_length,
            num_pages=num_pages,
        )
        self._vocab_size = program.info.vocab_size

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
            chunk_size: Tokens per forward pass; by default as many as the plan allows.
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
        chunk = min(chunk_size or width, self.plan.max_step_tokens or width)
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
        check_form(token_ids, 1)
        check = RangeCheck(token_ids, self._vocab_size)
        targets = self._check_rows(self.rows if rows is None else rows)
        if len(targets) != len(token_ids):
            refuse(f"decode needs one token for each of {len(targets)} rows", len(token_ids))
        dead = [row for row in targets if row not in self._rows]
        if dead:
            refuse("decode needs rows that have been prefilled", dead)
        counts = [1] * len(targets)
        self._reserve(targets, counts)
        return self._step(targets, token_ids.long()[:, None], counts, False, check.finish)

    def stored_planes(self, layer: int) -> tuple[dict[str, dict[str, Tensor]], ...]:
        """Return what `layer` has stored of each live row, by stream and plane; codes as they are.

        Each plane is `[heads, rows, width]`; recent and sink tokens are not among them.
        """
        return tuple(
            self._cache.planes(layer, row, state.physical_length, self._pool.pages(row))
            for row, state in sorted(self._rows.items())
        )

    def _run(self, rows: list[int], ids: Tensor, counts: list[int], all_logits: bool) -> Tensor:
        """Run one step over the rows that have tokens in it; other rows get zero logits."""
        fed = [i for i, n in enumerate(counts) if n]
        if len(fed) == len(rows):
            return self._step(rows, ids, counts, all_logits)
        part = self._step([rows[i] for i in fed], ids[fed], [counts[i] for i in fed], all_logits)
        logits = part.new_zeros(len(rows), *part.shape[1:])
        logits[fed] = part
        return logits

    def _step(
        self,
        rows: list[int],
        ids: Tensor,
        counts: list[int],
        all_logits: bool,
        check: Callable[[], None] = _checked_before,
    ) -> Tensor:
        starts = [self._length(row) for row in rows]
        first = [self._rows[r].logical_length if r in self._rows else 0 for r in rows]
        inputs = StepInputs(rows, starts, counts, first, self._pool.block_table(rows), check)
        try:
            logits = self._executable.step(ids, inputs, self._cache, all_logits=all_logits)
        except BaseException:
            self._roll_back(rows)
            raise
        self._advance(rows, counts)
        return logits
