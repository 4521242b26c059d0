"""PagePool: which page belongs to which sequence, on the host.

Conventions are those of FlashInfer and vLLM: tables are int32, page 0 is the null page that pads
block tables and is never owned. The free list gives the lowest page first, so equal calls give
equal tables.
"""

from __future__ import annotations

import heapq
from collections.abc import Hashable, Mapping, Sequence
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

    @property
    def num_free(self) -> int:
        """Pages that nobody owns."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Pages that sequences own."""
        return self.num_pages - 1 - len(self._free)

    def pages(self, sequence: Hashable) -> tuple[int, ...]:
        """Return the pages of a sequence in order of its tokens."""
        return tuple(self._owned.get(sequence, ()))

    def grow(self, wanted: Mapping[Hashable, int]) -> None:
        """Give each sequence so many pages in all; all of them, or none and an error.

        Raises:
            CacheFullError: KVX702 if there are not enough free pages; nothing has changed then.
        """
        missing = {s: max(0, n - len(self._owned.get(s, ()))) for s, n in wanted.items()}
        needed = sum(missing.values())
        if needed > self.num_free:
            raise CacheFullError(
                "KVX702",
                f"the step needs {needed} free pages of {self.page_size} tokens",
                where="session",
                got=self.num_free,
                hint="free rows, or make a session with more num_pages",
            )
        for sequence, count in missing.items():
            new = [heapq.heappop(self._free) for _ in range(count)]
            self._owned.setdefault(sequence, []).extend(new)

    def shrink(self, sequence: Hashable, keep: int) -> list[int]:
        """Take all but the first `keep` pages from a sequence; returns the pages taken."""
        pages = self._owned.get(sequence, [])
        taken = pages[keep:]
        if keep:
            del pages[keep:]
        else:
            self._owned.pop(sequence, None)
        for page in taken:
            heapq.heappush(self._free, page)
        return taken

    def block_table(self, sequences: Sequence[Hashable]) -> Tensor:
        """Return pages by row, int32 `[R, most pages]`, padded with the null page."""
        rows = [self._owned.get(s, []) for s in sequences]
        width = max((len(row) for row in rows), default=0)
        padded = [row + [NULL_PAGE] * (width - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.int32).reshape(len(rows), width)

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
