"""What a runtime needs from a lowering: something that runs steps, and caches that it makes.

Every lowering that runs in this process offers `Executable`. Sessions know nothing else of it, so
they are the same whatever runs below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvxform.ir.program import Program


@dataclass(frozen=True)
class CacheSizes:
    """How much a cache must hold.

    Attributes:
        num_pages: Pages of the pool; page 0 is the null page, never written.
        page_size: Tokens a page.
        num_rows: Sequences held at most.
        max_seq_len: Tokens of the longest sequence.
    """

    num_pages: int
    page_size: int
    num_rows: int
    max_seq_len: int


@dataclass(frozen=True, eq=False)
class StepInputs:
    """One forward pass over a batch of rows, as the host knows it.

    Attributes:
        rows: Row of the session of each batch entry.
        starts: Tokens cached before the step, per entry.
        counts: New tokens, per entry, at least 1.
        positions: Position of the first new token, per entry.
        block_table: Pages of each entry, int32 `[B, pages]` on the CPU, padded with the null page.
        check: Raises if the new tokens are none of the vocabulary. To be called before anything
            runs, and after what the host can do until the tokens have been looked at.
    """

    rows: Sequence[int]
    starts: Sequence[int]
    counts: Sequence[int]
    positions: Sequence[int]
    block_table: Tensor
    check: Callable[[], None]

    @property
    def ends(self) -> list[int]:
        """Tokens cached after the step, per entry."""
        return [a + n for a, n in zip(self.starts, self.counts, strict=True)]


class LiveCache(Protocol):
    """Storage of all layers for the rows of a session.

    The owner of a cache keeps its page table. A step that fails is followed by `abort`, after
    which the cache is as it was before the step.
    """

    def abort(self) -> None:
        """Forget a step that failed."""

    def stored(
        self, layer: int, row: int, length: int, pages: Sequence[int], dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Return K and V of one row, un-paged and decoded, each `[Hk, length, D]`.

        They are in the basis that the plan stores them in; see `ir.logical`.
        """

    def planes(
        self, layer: int, row: int, length: int, pages: Sequence[int]
    ) -> dict[str, dict[str, Tensor]]:
        """Return what is stored of the encoded tokens of one row, by stream and plane.

        Each is `[heads, rows, width]`, as the codec gave it. Empty where nothing is encoded.
        """

    def clear(self, rows: Sequence[int], pages: Sequence[int]) -> None:
        """Zero what `rows` and `pages` held."""

    def crop(self, row: int, length: int) -> None:
        """Forget all but the first `length` tokens of a row that do not live in pages."""

    def copy_pages(self, old: Sequence[int], new: Sequence[int]) -> None:
        """Copy the content of pages `old` to pages `new`."""

    def move_rows(self, rows: Sequence[int], sources: Sequence[int]) -> None:
        """Let the buffers of each of `rows` become what those of its source were before."""

    def copy(self, sizes: CacheSizes) -> LiveCache:
        """Return another cache of the same or larger sizes that holds the same."""

    def bytes_held(self, num_pages: int, num_rows: int) -> int:
        """Return bytes of real storage behind so many pages and rows."""


class Executable(Protocol):
    """A program with a cache that can run."""

    @property
    def program(self) -> Program:
        """What is run."""

    @property
    def device(self) -> torch.device:
        """Where the weights live."""

    def new_cache(self, sizes: CacheSizes) -> LiveCache:
        """Return an empty cache."""

    def step(
        self, input_ids: Tensor, inputs: StepInputs, cache: LiveCache, *, all_logits: bool = False
    ) -> Tensor:
        """Feed new tokens to a cache that `new_cache` made.

        Args:
            input_ids: int64 `[B, S]`, padded on the right, on any device.
            inputs: Lengths and pages; pages for the new tokens are in its block table.
            cache: What the rows hold; unchanged until the step ends well, given `abort`.
            all_logits: Return logits of all positions, not of the last token of each row.

        Returns:
            Logits `[B, vocab]`, or `[B, S, vocab]`.
        """
