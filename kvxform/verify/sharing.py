"""Which pages rows must share: copy on write, counted without a page table.

A fork shares all pages. A row that writes to a shared page gets a page of its own; a page that is
full, or that waits for the next group of tokens, stays shared. So the bytes of a session follow
from the history of its rows.
"""

from __future__ import annotations

from collections.abc import Mapping

from kvxform.ir.plan import CachePlan


class PageLedger:
    """The pages of each row, as names that no other page has.

    Args:
        plan: What is cached.
        page_size: Tokens a page.
    """

    def __init__(self, plan: CachePlan, page_size: int) -> None:
        self._plan, self.page_size = plan, page_size
        self._pages: dict[int, list[object]] = {}

    def append(self, row: int, before: int, after: int) -> None:
        """Count the tokens `before` to `after` - 1 of a row."""
        pages = self._pages.setdefault(row, [])
        shared = {page for other, own in self._pages.items() if other != row for page in own}
        streams = [st for site in self._plan.owners for st in site.streams.values()]
        for index in range(len(pages)):
            written = any(
                stream.body_tokens(after) > max(stream.body_tokens(before), index * self.page_size)
                and stream.body_tokens(before) < (index + 1) * self.page_size
                for stream in streams
            )
            if written and pages[index] in shared:
                pages[index] = object()
        while len(pages) < self._plan.pages_needed(after, self.page_size):
            pages.append(object())

    def crop(self, row: int, tokens: int) -> None:
        """Keep `tokens` tokens of a row."""
        del self._pages[row][self._plan.pages_needed(tokens, self.page_size) :]

    def reorder(self, sources: Mapping[int, int]) -> None:
        """Let each row have the pages of its source; other rows have none."""
        self._pages = {row: list(self._pages[source]) for row, source in sources.items()}

    def saved(self) -> int:
        """Return how many pages more the rows would hold if they shared none."""
        pages = [page for own in self._pages.values() for page in own]
        return len(pages) - len(set(pages))
