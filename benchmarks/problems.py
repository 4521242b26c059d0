"""Problems of decode attention: shapes, contents, pages in random order, and exact answers."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
GROUPS = NUM_Q_HEADS // NUM_KV_HEADS
SCALE = HEAD_DIM**-0.5
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU serves tests alone
CHECKED_HEADS = (0, 5)  # KV heads whose output is compared with an exact answer

SHAPES: dict[str, tuple[int, ...]] = {
    "1x32k": (32768,),
    "8x8k": (8192,) * 8,
    "8x32k": (32768,) * 8,
    "32x8k": (8192,) * 32,
    "ragged": (32768, 1000, 30000, 20000, 5, 16384, 32768, 12345),
    "test": (20, 3),
}
MEASURED = tuple(name for name in SHAPES if name != "test")


@dataclass(frozen=True, eq=False)
class Problem:
    """One new query a sequence over cached K and V, all normally distributed.

    Attributes:
        name: Name of the shape.
        lengths: Cached tokens of each sequence.
        q: `[B, H, D]`.
        k: `[B, Hk, T, D]`, T the longest length; likewise `v`.
    """

    name: str
    lengths: tuple[int, ...]
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def is_ragged(self) -> bool:
        """Whether lengths differ."""
        return len(set(self.lengths)) > 1

    @property
    def max_length(self) -> int:
        """The longest length, T."""
        return max(self.lengths)

    @property
    def checked_rows(self) -> tuple[int, ...]:
        """Sequences whose output is compared: first, shortest and last."""
        shortest = min(range(len(self.lengths)), key=self.lengths.__getitem__)
        return tuple(sorted({0, shortest, len(self.lengths) - 1}))

    @functools.cached_property
    def exact(self) -> Tensor:
        """Attention over K and V as they are; see `attend_exactly`."""
        return attend_exactly(self.q, self.k, self.v, self.lengths, self.checked_rows)


def make_problem(name: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Problem:
    """Return the problem of a shape."""
    lengths = SHAPES[name]
    generator = torch.Generator(DEVICE).manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=DEVICE, dtype=dtype)

    batch_size, longest = len(lengths), max(lengths)
    q = normal(batch_size, NUM_Q_HEADS, HEAD_DIM)
    k, v = (normal(batch_size, NUM_KV_HEADS, longest, HEAD_DIM) for _ in range(2))
    return Problem(name, lengths, q, k, v)


def attend_exactly(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], rows: tuple[int, ...]
) -> Tensor:
    """Return attention in float64 of some sequences and the checked heads, `[rows, heads, G, D]`.

    Args:
        q: `[B, H, D]`.
        k: `[B, Hk, T, D]`.
        v: `[B, Hk, T, D]`.
        lengths: Cached tokens of each of the B sequences.
        rows: Sequences to compute.
    """
    outputs = []
    for row in rows:
        queries = q[row].double().unflatten(0, (k.shape[1], -1))  # [H, D] -> [Hk, G, D]
        for head in CHECKED_HEADS:
            keys, values = (x[row, head, : lengths[row]].double() for x in (k, v))
            weights = torch.softmax(queries[head] @ keys.T * SCALE, -1)  # [G, T]
            outputs.append(weights @ values)
    return torch.stack(outputs).unflatten(0, (len(rows), -1))


def checked_part(out: Tensor, rows: tuple[int, ...]) -> Tensor:
    """Return what of an output `[B, H, D]` is compared, `[rows, heads, G, D]` float64."""
    heads = out.double().unflatten(1, (NUM_KV_HEADS, -1))
    return heads[list(rows)][:, list(CHECKED_HEADS)]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """Return |found - wanted| / |wanted|, 2-norms over everything."""
    return float((found.double() - wanted).norm() / wanted.norm())


def make_block_table(lengths: tuple[int, ...], page_size: int, *, first_page: int = 0) -> Tensor:
    """Return pages in random order, int32 `[B, max_pages]` on the CPU, 0 where there is none."""
    counts = [-(-length // page_size) for length in lengths]
    order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(0)) + first_page
    table = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
    for row, pages in enumerate(order.split(counts)):
        table[row, : len(pages)] = pages
    return table


def to_pages(x: Tensor, table: Tensor, lengths: tuple[int, ...], page_size: int) -> Tensor:
    """Return dense `[B, Hk, T, D]` in pages, `[num_pages, page_size, Hk, D]`."""
    num_pages = int(table.max()) + 1
    heads, dim = x.shape[1], x.shape[3]
    pages = torch.zeros(num_pages, page_size, heads, dim, dtype=x.dtype, device=x.device)
    for row, length in enumerate(lengths):
        count = -(-length // page_size)
        tokens = x[row].transpose(0, 1)[:length]  # [length, Hk, D]
        padded = torch.zeros(count * page_size, heads, dim, dtype=x.dtype, device=x.device)
        padded[:length] = tokens
        pages[table[row, :count].long().to(x.device)] = padded.unflatten(0, (count, page_size))
    return pages
