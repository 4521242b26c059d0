"""What `OnnxSession` asks of the cache of a package; there is one class for each kind of cache.

| kind | module | rows |
| --- | --- | --- |
| `grow` | `onnx_growing` | planes grow by concatenation, padded on the left |
| `buffer` | `onnx_buffers` | planes of a fixed length, written in place, padded on the right |
| `paged` | `onnx_paged` | blocks of tokens and a table of them |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from kvxform.runtime.inputs import Batch


class PackageCache(Protocol):
    """The cached rows of a package, and the runs that append to them."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row; empty before the first prompt."""

    @property
    def mask(self) -> Tensor:
        """Which columns of `planes` are tokens, int64 `[B, columns]`."""

    def append(self, batch: Batch, chunk_size: int | None, *, every: bool) -> Tensor:
        """Append prompts, in pieces of `chunk_size` tokens.

        Returns:
            Logits `[B, S, vocab]` in the columns of `batch` if `every`, else those of the last
            token of each row, `[B, vocab]`. At padding stands anything. Nothing has changed if it
            raises.
        """

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token a row, int64 `[B]`; return the next logits `[B, vocab]`."""

    def reset(self) -> None:
        """Forget all rows."""

    def bytes(self) -> int:
        """Return bytes of the memory of all planes, room for further tokens included."""

    def planned_rows(self) -> tuple[int, int]:
        """Return the rows and tokens a row that this memory is for."""

    def planes(self) -> dict[str, Tensor]:
        """Return copies of the planes by input name, `[B, Hk, columns, width]`."""

    def replace(self, planes: Mapping[str, Tensor], mask: Tensor) -> None:
        """Hold `planes` instead, of the columns in `mask`."""
