"""PagePool: which page belongs to which sequences, on the host.

Conventions are those of FlashInfer and vLLM: tables are int32, page 0 is the null page that pads
block tables and is never owned. The free list gives the lowest page first, so equal calls give
equal tables. Sequences that were forked share pages; each page has a count of its owners, and a
page that is about to be written gets one owner first (copy on write).
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.errors import CacheFullError

NULL_PAGE = 0


@dataclass(frozen=True)
class PageTable:
    """The page table of a batch in FlashInfer's compressed form, all int32.

    Attributes:
        indptr: First entry of each sequence in `indices`, `[R + 1]`.
        indices: Page ids, sequence after sequence.
        last_page_len: Tokens in the last page, 1 to page_size, `[R]`.
    """

    indptr: Tensor
    indices: Tensor
    last_page_len: Tensor


@dataclass(frozen=True)
class PageCopy:
    """A shared page that was replaced by a page of its own, whose content the caller copies.

    Attributes:
        sequence: Whose page.
        index: Place among the pages of the sequence.
        old: The shared page.
        new: The page that takes its place.
    """

    sequence: Hashable
    index: int
    old: int
    new: int


class PagePool:
    """Hands out pages to sequences; knows nothing of tensors.

    Args:
        num_pages: Pages in all, the null page included.
        page_size: Tokens a page.
    """

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.num_pages, self.page_size = num_pages, page_size
        self._free = list(range(1, num_pages))  # ascending, hence a heap
        self._owned: dict[Hashable, list[int]] = {}
        self._owners: Counter[int] = Counter()
        self._table: tuple[tuple[Hashable, ...], Tensor] | None = None  # the last one made

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that sequences own, each counted once."""
        return self.num_pages - 1 - len(self._free)

    @property
    def num_saved(self) -> int:
        """Pages that sharing saves: owners beyond the first, over all pages."""
        return sum(self._owners.values()) - len(self._owners)

    def pages(self, sequence: Hashable) -> tuple[int, ...]:
        """Return the pages of a sequence in order of its tokens."""
        return tuple(self._owned.get(sequence, ()))

    def grow(
        self,
        wanted: Mapping[Hashable, int],
        written: Mapping[Hashable, Collection[int]] | None = None,
    ) -> list[PageCopy]:
        """Give each sequence so many pages in all; all of them, or none and an error.

        Args:
            wanted: Pages of each sequence.
            written: Indices of the pages that a sequence will write to; such pages get one
                owner. Sequences not named write only to new pages.

        Returns:
            Shared pages that were replaced: the caller copies their content.

        Raises:
            CacheFullError: KVX702 if there are not enough free pages; nothing has changed then.
        """
        missing = {s: max(0, n - len(self._owned.get(s, ()))) for s, n in wanted.items()}
        shared = [(s, i) for s, pages in (written or {}).items() for i in self._shared(s, pages)]
        writers = Counter(self._owned[s][i] for s, i in shared)
        copies = sum(min(n, self._owners[page] - 1) for page, n in writers.items())
        needed = sum(missing.values()) + copies
        if needed:
            self._table = None
        if needed > self.num_free:
            raise CacheFullError(
                "KVX702",
                f"the step needs {needed} free pages of {self.page_size} tokens",
                where="session",
                got=self.num_free,
                hint="free rows, or make a session with more num_pages",
            )
        for sequence, count in missing.items():
            new = [self._take() for _ in range(count)]
            self._owned.setdefault(sequence, []).extend(new)
        return [copy for s, i in shared if (copy := self._unshare(s, i)) is not None]

    def undo(self, copies: Sequence[PageCopy]) -> list[int]:
        """Put shared pages back where `grow` replaced them; returns pages that became free."""
        self._table = None
        for copy in copies:
            self._owned[copy.sequence][copy.index] = copy.old
            self._owners[copy.old] += 1
        return [copy.new for copy in copies if self._release(copy.new)]

    def shrink(self, sequence: Hashable, keep: int) -> list[int]:
        """Take all but the first `keep` pages from a sequence; returns pages that became free."""
        self._table = None
        pages = self._owned.get(sequence, [])
        taken = pages[keep:]
        if keep:
            del pages[keep:]
        else:
            self._owned.pop(sequence, None)
        return [page for page in taken if self._release(page)]

    def reorder(self, order: Sequence[Hashable]) -> list[int]:
        """Give sequence i the pages of sequence `order[i]`, shared if that is named twice.

        All other sequences lose theirs. Returns pages that became free.
        """
        self._table = None
        pages = {i: list(self._owned.get(source, ())) for i, source in enumerate(order)}
        before = set(self._owners)
        self._owned = {i: own for i, own in pages.items() if own}
        self._owners = Counter(page for own in pages.values() for page in own)
        freed = sorted(before - set(self._owners))
        for page in freed:
            heapq.heappush(self._free, page)
        return freed

    def add_pages(self, num_pages: int) -> None:
        """Raise the number of pages, the null page included, to `num_pages`."""
        for page in range(self.num_pages, num_pages):
            heapq.heappush(self._free, page)
        self.num_pages = num_pages

    def _take(self) -> int:
        page = heapq.heappop(self._free)
        self._owners[page] = 1
        return page

    def _release(self, page: int) -> bool:
        """Take one owner from a page; return whether it became free."""
        self._owners[page] -= 1
        if self._owners[page]:
            return False
        del self._owners[page]
        heapq.heappush(self._free, page)
        return True

    def _shared(self, sequence: Hashable, pages: Collection[int]) -> list[int]:
        """Return which of the pages of a sequence other sequences own too, in order."""
        own = self._owned.get(sequence, [])
        return [i for i in sorted(pages) if i < len(own) and self._owners[own[i]] > 1]

    def _unshare(self, sequence: Hashable, index: int) -> PageCopy | None:
        old = self._owned[sequence][index]
        if self._owners[old] == 1:  # every other owner has got its own copy by now
            return None
        self._owners[old] -= 1
        new = self._owned[sequence][index] = self._take()
        return PageCopy(sequence, index, old, new)

    def block_table(self, sequences: Sequence[Hashable]) -> Tensor:
        """Return pages by row, int32 `[R, most pages]`, padded with the null page.

        While no page changes hands, equal calls return the same tensor; it must not be written.
        """
        key = tuple(sequences)
        if self._table is not None and self._table[0] == key:
            return self._table[1]
        rows = [self._owned.get(s, []) for s in sequences]
        width = max((len(row) for row in rows), default=0)
        padded = [row + [NULL_PAGE] * (width - len(row)) for row in rows]
        table = torch.tensor(padded, dtype=torch.int32).reshape(len(rows), width)
        self._table = key, table
        return table

    def page_table(self, sequences: Sequence[Hashable], tokens: Sequence[int]) -> PageTable:
        """Return the same as FlashInfer tables, for sequences that hold `tokens` in pages.

        A sequence without tokens has no page and `last_page_len` = page_size, for which
        `page_size * (pages - 1) + last_page_len` is still its length.
        """
        rows = [
            self._owned.get(s, [])[: -(-n // self.page_size)]
            for s, n in zip(sequences, tokens, strict=True)
        ]
        counts = torch.tensor([0, *(len(row) for row in rows)])
        last = [(n - 1) % self.page_size + 1 for n in tokens]
        return PageTable(
            indptr=counts.cumsum(0).to(torch.int32),
            indices=torch.tensor([page for row in rows for page in row], dtype=torch.int32),
            last_page_len=torch.tensor(last, dtype=torch.int32),
        )
