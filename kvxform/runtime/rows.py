"""Rows: the sequences that a session holds, with their lengths, pages and buffers.

`RowStore` knows what is cached for which row and never runs a model. Rows can be freed, reordered,
forked and cropped. Forked rows share pages until one of them writes (copy on write). Every call
either takes full effect or raises and changes nothing.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Hashable, Sequence
from typing import Self

from kvxform.codegen.eager.flush import FlushRule
from kvxform.errors import CacheFullError, KvxformError
from kvxform.ir.execution import CacheSizes, Executable, LiveCache
from kvxform.ir.logical import unrotate_pair
from kvxform.ir.plan import CachePlan
from kvxform.runtime.inputs import refuse
from kvxform.runtime.pages import PageCopy, PagePool, PageTable
from kvxform.runtime.state import LogicalCache, SequenceState, check_sizes, enough_pages


class RowStore:
    """Lengths, pages and buffers of up to `max_batch_size` sequences.

    Args:
        executable: What makes caches and runs steps.
        plan: What is cached.
        max_batch_size: Rows.
        max_seq_len: Longest sequence.
        context_length: Longest sequence that the model knows, or None.
        num_pages: Usable pages; by default enough for every row at full length.

    Raises:
        KvxformError: KVX704 for sizes that make no sense.
    """

    def __init__(
        self,
        executable: Executable,
        plan: CachePlan,
        *,
        max_batch_size: int,
        max_seq_len: int,
        context_length: int | None,
        num_pages: int | None,
    ) -> None:
        check_sizes(max_batch_size, max_seq_len, context_length)
        self.plan, self.max_batch_size, self.max_seq_len = plan, max_batch_size, max_seq_len
        self._executable, self._context_length = executable, context_length
        self._rules = {FlushRule.of(st) for s in plan.owners for st in s.streams.values()}
        size = plan.page_size(max_seq_len)
        pages = enough_pages(max_batch_size, max_seq_len, size) if num_pages is None else num_pages
        self._pool = PagePool(pages + 1, size)
        self._cache = executable.new_cache(CacheSizes(pages + 1, size, max_batch_size, max_seq_len))
        self._rows: dict[int, SequenceState] = {}
        self._copies: list[PageCopy] = []  # made for the step that runs

    @property
    def rows(self) -> list[int]:
        """Live rows, ascending."""
        return sorted(self._rows)

    @property
    def cache(self) -> LiveCache:
        """What holds the rows; made by the lowering."""
        return self._cache

    @property
    def free_pages(self) -> int:
        """Pages that no row holds."""
        return self._pool.num_free

    @property
    def saved_pages(self) -> int:
        """Pages more that the rows would hold if they shared none."""
        return self._pool.num_saved

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` works for all rows and lengths: nothing is exact only for a while."""
        return all(rule.capacity == 0 for rule in self._rules)

    def free(self, rows: Sequence[int] | None = None) -> None:
        """Forget rows (all by default) and give their pages back."""
        targets = self.rows if rows is None else self._check_rows(rows)
        pages = [page for row in targets for page in self._pool.shrink(row, 0)]
        self._cache.clear(targets, pages)
        for row in targets:
            self._rows.pop(row, None)

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i become what row `order[i]` was, for every i; other rows are freed.

        A row that is named more than once is forked: its pages are shared until they are written.

        Raises:
            KvxformError: KVX704 if `order` names a row that is not live, or too many.
        """
        sources = list(order)
        if len(sources) > self.max_batch_size:
            refuse(f"the session has {self.max_batch_size} rows", len(sources))
        if not set(sources) <= self._rows.keys():
            refuse(f"order must name live rows, of {self.rows}", sources)
        moved = [(row, source) for row, source in enumerate(sources) if row != source]
        if moved and self.plan.has_row_buffers:
            self._cache.move_rows([row for row, _ in moved], [source for _, source in moved])
        gone = [row for row in self._rows if row >= len(sources)]
        freed = self._pool.reorder(sources)
        self._rows = {i: dataclasses.replace(self._rows[s]) for i, s in enumerate(sources)}
        self._cache.clear(gone, freed)

    def can_crop(self, length: int | Sequence[int], rows: Sequence[int] | None = None) -> bool:
        """Return whether `crop` with the same arguments would work."""
        return all(self._keeps(row, new) for row, new in self._targets(length, rows))

    def crop(self, length: int | Sequence[int], rows: Sequence[int] | None = None) -> None:
        """Drop the newest tokens of rows.

        Args:
            length: Tokens to keep, for all rows or for each; from 0 to what a row holds.
            rows: All live rows by default.

        Raises:
            KvxformError: KVX705 if tokens that must be exact again have been encoded; KVX704 for
                bad lengths or rows. Nothing has changed then.
        """
        targets = self._targets(length, rows)
        for row, new in targets:
            if not self._keeps(row, new):
                self._refuse_crop(row, new)
        freed: list[int] = []
        for row, new in targets:
            freed += self._pool.shrink(row, self._pages_needed(new))
            self._cache.crop(row, new)
            state = self._rows[row]
            state.logical_length -= state.physical_length - new
            state.physical_length = new
        self._cache.clear([], freed)

    def resize(self, *, max_batch_size: int | None = None, max_seq_len: int | None = None) -> None:
        """Make room for more rows or longer ones; what is cached stays.

        Args:
            max_batch_size: Rows, no fewer than now.
            max_seq_len: Longest sequence, no shorter than now.

        Raises:
            KvxformError: KVX704 for smaller sizes or more than the context of the model.
        """
        rows = self.max_batch_size if max_batch_size is None else max_batch_size
        longest = self.max_seq_len if max_seq_len is None else max_seq_len
        check_sizes(rows, longest, self._context_length)
        if rows < self.max_batch_size or longest < self.max_seq_len:
            refuse("a session can only become larger", [rows, longest])
        size = self.plan.page_size(longest)
        pages = max(self._pool.num_pages, enough_pages(rows, longest, size) + 1)
        self._cache = self._cache.copy(CacheSizes(pages, size, rows, longest))
        self._pool.add_pages(pages)
        self._pool.page_size = size
        self.max_batch_size, self.max_seq_len = rows, longest

    def copy(self) -> Self:
        """Return an independent session that holds the same."""
        twin = copy.copy(self)
        pool = self._pool
        sizes = CacheSizes(pool.num_pages, pool.page_size, self.max_batch_size, self.max_seq_len)
        twin._cache = self._cache.copy(sizes)
        twin._pool, twin._rows = copy.deepcopy(self._pool), copy.deepcopy(self._rows)
        return twin

    def sequence_lengths(self) -> tuple[int, ...]:
        """Return cached tokens of each live row."""
        return tuple(self._rows[row].physical_length for row in self.rows)

    def cache_bytes(self) -> int:
        """Return bytes of the tensors behind the pages and buffers in use; shared pages count once.

        Equal to `plan.bytes_at(sequence_lengths(), max_seq_len)`, less the bytes of `saved_pages`.
        """
        return self._cache.bytes_held(self._pool.num_used, len(self._rows))

    def page_table(self) -> PageTable:
        """Return the pages of live rows as FlashInfer tables, for the stream that fills most."""
        tokens = [self._body_tokens(n) for n in self.sequence_lengths()]
        return self._pool.page_table(self.rows, tokens)

    def logical_cache(self, layer: int) -> LogicalCache:
        """Return what `layer` holds for each live row; see `LogicalCache`."""
        program = self._executable.program
        pages, dtype = self._pool.pages, program.dtype
        stored = [
            self._cache.stored(layer, row, state.physical_length, pages(row), dtype)
            for row, state in sorted(self._rows.items())
        ]
        pairs = [unrotate_pair(program, layer, *pair) for pair in stored]
        return LogicalCache(tuple(k for k, _ in pairs), tuple(v for _, v in pairs))

    def _body_tokens(self, length: int) -> int:
        return max(rule.body_tokens(length) for rule in self._rules)

    def _pages_needed(self, length: int) -> int:
        return -(-self._body_tokens(length) // self._pool.page_size)

    def _written(self, before: int, after: int) -> set[int]:
        """Return the pages that tokens `before` to `after` - 1 make an append write to.

        Tokens that wait for the rest of their group write to none.
        """
        size = self._pool.page_size
        bodies = [(rule.body_tokens(before), rule.body_tokens(after)) for rule in self._rules]
        return {i for old, new in bodies for i in range(old // size, -(-new // size)) if new > old}

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

    def _targets(
        self, length: int | Sequence[int], rows: Sequence[int] | None
    ) -> list[tuple[int, int]]:
        """Return (row, new length) of a crop, checked."""
        targets = self.rows if rows is None else self._check_rows(rows)
        lengths = [length] * len(targets) if isinstance(length, int) else list(length)
        if len(lengths) != len(targets):
            refuse(f"crop needs one length for each of {len(targets)} rows", lengths)
        for row, new in zip(targets, lengths, strict=True):
            if row not in self._rows:
                refuse("crop needs rows that have been prefilled", row)
            if not 0 <= new <= self._length(row):
                refuse(f"a crop keeps 0 to {self._length(row)} tokens", new, row)
        return list(zip(targets, lengths, strict=True))

    def _keeps(self, row: int, new: int) -> bool:
        return all(rule.can_crop(self._length(row), new) for rule in self._rules)

    def _refuse_crop(self, row: int, new: int) -> None:
        length = nearest = self._length(row)
        while self._keeps(row, nearest - 1):
            nearest -= 1
        raise KvxformError(
            "KVX705",
            "a sequence can be cropped only while the tokens that become its last are still exact",
            where="session",
            got=f"{new} of {length} tokens",
            at=f"row {row}",
            hint=f"keep at least {nearest}, or use a recipe without recent tokens",
        )

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
        wanted: dict[Hashable, int] = {row: self._pages_needed(end) for row, end in ends.items()}
        written: dict[Hashable, set[int]] = {
            row: self._written(self._length(row), end) for row, end in ends.items()
        }
        self._copies = self._pool.grow(wanted, written)
        if self._copies:
            try:
                self._cache.copy_pages([c.old for c in self._copies], [c.new for c in self._copies])
            except BaseException:
                self._roll_back(rows)
                raise

    def _advance(self, rows: list[int], counts: list[int]) -> None:
        """Count the tokens of a step that went well."""
        self._copies = []
        for row, count in zip(rows, counts, strict=True):
            state = self._rows.setdefault(row, SequenceState())
            state.logical_length += count
            state.physical_length += count

    def _roll_back(self, rows: list[int]) -> None:
        """Drop the pages of a step that failed; lengths have not moved yet."""
        self._cache.abort()
        taken = self._pool.undo(self._copies)
        self._copies = []
        for row in rows:
            taken += self._pool.shrink(row, self._pages_needed(self._length(row)))
        self._cache.clear([row for row in rows if row not in self._rows], taken)
