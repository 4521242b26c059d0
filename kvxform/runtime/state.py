"""What a session says of its rows, and sizes that it can have."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kvxform.runtime.inputs import refuse


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


def enough_pages(max_batch_size: int, max_seq_len: int, page_size: int) -> int:
    """Return pages for so many rows at full length."""
    return max_batch_size * -(-max_seq_len // page_size)


def check_sizes(max_batch_size: int, max_seq_len: int, context_length: int | None) -> None:
    """Raise KVX704 for sizes of a session that make no sense."""
    if max_batch_size < 1 or max_seq_len < 1:
        refuse("a session needs at least one row and one token", [max_batch_size, max_seq_len])
    if context_length is not None and max_seq_len > context_length:
        refuse(f"max_seq_len must be within the model's {context_length} tokens", max_seq_len)
