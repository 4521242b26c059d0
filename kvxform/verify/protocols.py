"""What verification needs from a runtime; any lowering that offers this can be checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from torch import Tensor

from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program


class LogicalCacheLike(Protocol):
    """What one layer holds for each live row, as the source would: `[Hk, T, D]` each."""

    @property
    def k(self) -> Sequence[Tensor]:
        """Keys by live row, after RoPE, un-rotated."""

    @property
    def v(self) -> Sequence[Tensor]:
        """Values by live row, un-rotated."""


class SessionLike(Protocol):
    """A cache in use; see `kvxform.runtime.session.Session`."""

    def prefill(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rows: Sequence[int] | None = None,
        chunk_size: int | None = None,
        all_logits: bool = False,
    ) -> Tensor:
        """Append prompts `[B, S]`; logits `[B, vocab]`, or `[B, S, vocab]` if `all_logits`."""

    def decode(self, token_ids: Tensor, *, rows: Sequence[int] | None = None) -> Tensor:
        """Append one token a row, `[B]`; logits `[B, vocab]`."""

    def free(self, rows: Sequence[int] | None = None) -> None:
        """Forget rows."""

    def reorder(self, order: Sequence[int]) -> None:
        """Let row i become what row `order[i]` was."""

    def crop(self, length: int | Sequence[int], rows: Sequence[int] | None = None) -> None:
        """Keep the first tokens of rows."""

    def sequence_lengths(self) -> Sequence[int]:
        """Cached tokens of each live row, rows ascending."""

    def cache_bytes(self) -> int:
        """Bytes held."""

    def logical_cache(self, layer: int) -> LogicalCacheLike:
        """What `layer` holds."""

    def stored_planes(self, layer: int) -> Sequence[Mapping[str, Mapping[str, Tensor]]]:
        """Encoded tokens of each live row, by stream and plane, `[heads, rows, width]` each."""


class ModelLike(Protocol):
    """A program that runs; see `kvxform.runtime.model.OptimizedModel`."""

    @property
    def program(self) -> Program:
        """What runs."""

    @property
    def plan(self) -> CachePlan | None:
        """The plan of the cache, if there is one."""

    def __call__(self, input_ids: Tensor) -> Tensor:
        """Return logits of all positions, `[B, S, vocab]`."""

    def new_session(self, *, max_batch_size: int, max_seq_len: int) -> SessionLike:
        """Return an empty cache in use."""
