"""Checks of token ids and masks, and the way between the caller's layout and right-padded rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from kvxform.errors import KvxformError

_INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True)
class Batch:
    """Right-padded rows made from the caller's input.

    Attributes:
        input_ids: int64 `[B, S]`; real tokens first, zeros after.
        counts: Real tokens of each row, at least 1.
        first: Column of the first real token in the caller's layout, `[B]`.
        width: Columns of the caller's layout.
    """

    input_ids: Tensor
    counts: list[int]
    first: Tensor
    width: int

    def to_caller(self, values: Tensor) -> Tensor:
        """Move `[B, S, n]` back to the caller's columns; padding becomes zero."""
        if min(self.counts) == self.width:
            return values
        out = values.new_zeros(values.shape[0], self.width, values.shape[2])
        for row, (first, count) in enumerate(zip(self.first.tolist(), self.counts, strict=True)):
            out[row, first : first + count] = values[row, :count]
        return out


def make_batch(input_ids: Tensor, attention_mask: Tensor | None, vocab_size: int) -> Batch:
    """Check the caller's input and move its real tokens to the left.

    Args:
        input_ids: Integer `[B, S]`, padded on either side.
        attention_mask: `[B, S]` of 0 and 1, one run of ones a row; None if nothing is padding.
        vocab_size: Ids must be below it.

    Raises:
        KvxformError: KVX704 for anything else.
    """
    check_ids(input_ids, 2, vocab_size)
    ids = input_ids.to(torch.int64)
    batch_size, width = ids.shape
    mask = None if attention_mask is None else _check_mask(attention_mask, ids)
    if mask is None or bool(mask.all()):
        return Batch(ids, [width] * batch_size, torch.zeros(batch_size, dtype=torch.int64), width)
    counts, first = mask.sum(1), mask.to(torch.int8).argmax(1)
    columns = torch.arange(int(counts.max()), device=ids.device)
    source = (first[:, None] + columns).clamp_max(width - 1)
    moved = ids.gather(1, source).masked_fill(columns >= counts[:, None], 0)
    return Batch(moved, counts.tolist(), first.cpu(), width)


def check_tokens(token_ids: Tensor, vocab_size: int) -> Tensor:
    """Return `token_ids` `[B]` as int64.

    Raises:
        KvxformError: KVX704 for a wrong shape, dtype or id.
    """
    check_ids(token_ids, 1, vocab_size)
    return token_ids.to(torch.int64)


class RangeCheck:
    """Whether ids lie in the vocabulary. On a device the answer is on its way until `finish`.

    Args:
        ids: Integer ids of any shape, not empty.
        vocab_size: Ids must be below it.
    """

    def __init__(self, ids: Tensor, vocab_size: int) -> None:
        self._vocab_size, self._arrived = vocab_size, None
        self._bounds = torch.stack(torch.aminmax(ids))
        if ids.is_cuda:
            on_host = torch.empty(2, dtype=ids.dtype, pin_memory=True)
            self._bounds = on_host.copy_(self._bounds, non_blocking=True)
            self._arrived = torch.cuda.current_stream(ids.device).record_event()

    def finish(self) -> None:
        """Wait for the answer; raise KVX704 if an id is out of range."""
        if self._arrived is not None:
            self._arrived.synchronize()
        low, high = self._bounds.tolist()
        if low < 0 or high >= self._vocab_size:
            rule = f"token ids must lie in 0..{self._vocab_size - 1}"
            refuse(rule, low if low < 0 else high)


def check_ids(ids: Tensor, dims: int, vocab_size: int) -> None:
    """Raise KVX704 unless `ids` is an integer tensor of `dims` axes with ids in the vocabulary."""
    check_form(ids, dims)
    RangeCheck(ids, vocab_size).finish()


def check_form(ids: Tensor, dims: int) -> None:
    """Raise KVX704 unless `ids` is an integer tensor of `dims` axes that is not empty."""
    shape = "[batch, tokens]" if dims == 2 else "[batch]"
    if not isinstance(ids, Tensor):
        refuse("token ids must be a tensor", type(ids).__name__)
    if ids.dim() != dims or ids.numel() == 0:
        refuse(f"token ids must have shape {shape} and not be empty", list(ids.shape))
    if ids.dtype not in _INTEGERS:
        refuse("token ids must be int64 or int32", str(ids.dtype).removeprefix("torch."))


def _check_mask(mask: Tensor, ids: Tensor) -> Tensor:
    if not isinstance(mask, Tensor) or mask.shape != ids.shape:
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        refuse(f"attention_mask must be a tensor of shape {list(ids.shape)}, as input_ids", got)
    ones = mask == 1
    if not bool((ones | (mask == 0)).all()):
        refuse("attention_mask must hold only 0 and 1", None)
    edges = ones[:, 0].long() + (ones[:, 1:] & ~ones[:, :-1]).sum(1)
    bad = (edges != 1).nonzero()
    if bad.numel():
        row = int(bad[0])
        refuse("each row of attention_mask must be one run of ones", ones[row].int().tolist(), row)
    return ones


def refuse(rule: str, got: object, row: int | None = None) -> NoReturn:
    """Raise KVX704."""
    at = "" if row is None else f"row {row}"
    raise KvxformError("KVX704", rule, where="session", got=got, at=at)
