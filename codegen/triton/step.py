"""What all layers of one step share: lengths and pages, as tensors that kernels read."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.ir.execution import StepInputs

FIELDS = ("starts", "counts", "lengths", "rows", "first")  # of a packed step, B numbers each


@dataclass(frozen=True, eq=False)
class KernelStep:
    """One forward pass over a batch of rows.

    Attributes:
        starts: Tokens cached before the step, int32 `[B]`.
        counts: New tokens, int32 `[B]`.
        lengths: Tokens cached after the step, int32 `[B]`.
        rows: Row of the session of each batch entry, int32 `[B]`.
        first: Position of the first new token, int32 `[B]`.
        block_table: Pages of each entry, int32 `[B, max_pages]`, padded with the null page.
        num_new: Columns of the batch: most new tokens of an entry.
        total: Tokens of the longest entry after the step, or about so many if `host` is None.
        is_folded: Kernels rotate K and q; else the graph has done that.
        host: What the tensors were made from; None while launches are recorded for other steps.
    """

    starts: Tensor
    counts: Tensor
    lengths: Tensor
    rows: Tensor
    first: Tensor
    block_table: Tensor
    num_new: int
    total: int
    is_folded: bool = True
    host: StepInputs | None = None

    @classmethod
    def unpack(
        cls, numbers: Tensor, block_table: Tensor, *, num_new: int, total: int
    ) -> KernelStep:
        """Return a step of numbers `[5, B]` as `pack_numbers` arranges them."""
        starts, counts, lengths, rows, first = numbers.unbind(0)
        return cls(starts, counts, lengths, rows, first, block_table, num_new, total)

    @property
    def batch_size(self) -> int:
        """Entries, B."""
        return self.starts.shape[0]

    def entries(self, first: int, last: int) -> KernelStep:
        """Return a step of batch entries `first` to `last` - 1 alone, as long as the whole."""
        own = slice(first, last)
        parts = {name: getattr(self, name)[own] for name in (*FIELDS, "block_table")}
        return dataclasses.replace(self, **parts)

    def positions(self) -> Tensor:
        """Return positions of new tokens, int64 `[B, num_new]`."""
        new = torch.arange(self.num_new, device=self.first.device)
        return self.first.to(torch.int64)[:, None] + new


def pack_numbers(inputs: StepInputs) -> Tensor:
    """Return what a step says of its entries, int32 `[5, B]` on the CPU, in the order of FIELDS."""
    columns: tuple[Sequence[int], ...] = (
        inputs.starts,
        inputs.counts,
        inputs.ends,
        inputs.rows,
        inputs.positions,
    )
    return torch.tensor(columns, dtype=torch.int32)


def make_step(
    inputs: StepInputs, block_table: Tensor, device: torch.device, *, is_folded: bool
) -> KernelStep:
    """Return a step with tensors of its own.

    Args:
        inputs: What the host knows.
        block_table: Pages as kernels count them, int32 `[B, n]` on the CPU.
        device: Where the cache lives.
        is_folded: See `KernelStep`.
    """
    step = KernelStep.unpack(
        pack_numbers(inputs).to(device),
        block_table.to(device),
        num_new=max(inputs.counts),
        total=max(inputs.ends),
    )
    return dataclasses.replace(step, is_folded=is_folded, host=inputs)
