"""A cache of blocks: rows own blocks of tokens in one pool, and a table says which.

The tokens of all rows of a call are packed one after the other, so rows of different lengths cost
no padding and go on together. Block 0 belongs to nobody; it fills up the table.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor

from kvxform.runtime.inputs import Batch
from kvxform.runtime.onnx_engine import Binding, Engine, Port
from kvxform.runtime.pages import PagePool

LEAST_COLUMNS = 8  # of the table in decode steps


class PagedCache:
    """Rows of a package with cache `paged`; see `kvxform.runtime.onnx_cache.PackageCache`.

    Args:
        engine: The package.
        max_length: Tokens that a row has room for; the pool grows as it must if None.
        block_size: Tokens a block, a power of two, at least 16.
        cuda_graph: Capture decode steps.
    """

    def __init__(
        self,
        engine: Engine,
        max_length: int | None,
        *,
        block_size: int,
        cuda_graph: bool,
    ) -> None:
        self._engine, self._max_length, self._cuda_graph = engine, max_length, cuda_graph
        self._block_size = block_size
        self._pool = PagePool(1, block_size)
        self._planes: dict[str, Tensor] = {}
        self._steps: dict[tuple[int, int], PagedStep] = {}  # by shape of the table
        self._graph = 0
        self.lengths: tuple[int, ...] = ()

    @property
    def mask(self) -> Tensor:
        """Which columns of `planes` are tokens, int64 `[B, columns]`."""
        ends = torch.tensor(self.lengths, dtype=torch.int64)[:, None]
        return (torch.arange(max(self.lengths, default=0)) < ends).to(torch.int64)

    def append(self, batch: Batch, chunk_size: int | None, *, every: bool) -> Tensor:
        """Append prompts; logits of all tokens if `every`, else of the last one of each row."""
        counts, kept = batch.counts, self.lengths
        before = list(kept or (0,) * len(counts))
        self._reserve([n + new for n, new in zip(before, counts, strict=True)])
        width = max(counts)
        size = 1 if every and self._engine.is_last else chunk_size or width
        vocab = self._new_logits(1).shape[1]
        out = self._new_logits(1).new_zeros(len(counts), width if every else 1, vocab)
        for first in range(0, width, size):
            rows = [row for row, count in enumerate(counts) if count > first]
            new = [batch.input_ids[row, first : min(counts[row], first + size)] for row in rows]
            logits = self._run(rows, new, [before[row] for row in rows])
            for row, tokens, own in zip(rows, new, logits, strict=True):
                before[row] += len(tokens)
                place = slice(first, first + len(own)) if every else slice(0, 1)
                out[row, place] = own if every else own[-1:]
        self.lengths = tuple(before)
        return out if every else out[:, 0]

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token a row, int64 `[B]`; return the next logits `[B, vocab]`."""
        after = [n + 1 for n in self.lengths]
        self._reserve(after)
        columns = self._columns(max(after))
        step = self._step(len(after), columns)
        most, least = columns * self._block_size, 0
        if columns > LEAST_COLUMNS:  # else the narrower table would have done
            least = columns // 2 * self._block_size + 1
        blocks = self._pool.block_table(range(len(after)))
        logits = step.run(token_ids, self.lengths, blocks, (1, most, least))
        self.lengths = tuple(after)
        return logits

    def reset(self) -> None:
        """Forget all rows; the memory stays for the next ones."""
        self._pool.reorder(())
        self.lengths = ()

    def bytes(self) -> int:
        """Return bytes of the pool while there are rows."""
        return sum(plane.nbytes for plane in self._planes.values()) if self.lengths else 0

    def planned_rows(self) -> tuple[int, int]:
        """Return blocks of the pool, and tokens of each."""
        return (self._pool.num_pages, self._block_size) if self.lengths else (0, 0)

    def planes(self) -> dict[str, Tensor]:
        """Return copies of the planes by input name, `[B, Hk, columns, width]`."""
        columns = max(self.lengths, default=0)
        blocks = self._table(range(len(self.lengths)), self._blocks(columns)).long()
        found = {}
        for name, plane in self._planes.items():
            rows = _as_bytes(plane)[blocks.to(plane.device)]  # [B, blocks, tokens, Hk, width]
            found[name] = rows.flatten(1, 2)[:, :columns].transpose(1, 2).contiguous().cpu()
        return found

    def replace(self, planes: Mapping[str, Tensor], mask: Tensor) -> None:
        """Hold `planes` instead, of the columns in `mask`."""
        self.reset()
        lengths = tuple(mask.sum(1).tolist())
        self._reserve(lengths)
        self.lengths = lengths
        for row, length in enumerate(lengths):
            slots = self._slots(row, length)
            for name, plane in planes.items():
                pool = _as_bytes(self._planes[name])
                pool.flatten(0, 1)[slots] = plane[row, :, :length].transpose(0, 1).to(pool.device)

    def _run(
        self, rows: Sequence[int], new: Sequence[Tensor], before: Sequence[int]
    ) -> tuple[Tensor, ...]:
        """Run new tokens of some rows; return logits of each, `[tokens or 1, vocab]`."""
        counts = [len(tokens) for tokens in new]
        after = [n + count for n, count in zip(before, counts, strict=True)]
        positions = [torch.arange(n, m) for n, m in zip(before, after, strict=True)]
        device = self._engine.device
        feeds = {
            "input_ids": torch.cat(list(new)).to(device),
            "position_ids": torch.cat(positions).to(device),
            "cumulative_sequence_lengths": _int32([0, *counts])
            .cumsum(0, dtype=torch.int32)
            .to(device),
            "past_sequence_lengths": _int32(before).to(device),
            "block_table": self._table(rows, self._blocks(max(after))).to(device),
            "attention_metadata": _int32([max(counts), max(after), max(after)]),
        }
        binding = Binding(self._engine)
        for name in self._engine.inputs:
            binding.read(name, feeds[name].contiguous())
        binding.hold(self._planes)
        logits = self._new_logits(len(new) if self._engine.is_last else sum(counts))
        binding.write("logits", logits)
        self._engine.run(binding)
        sizes = [1] * len(new) if self._engine.is_last else counts
        return torch.split_with_sizes(logits, sizes)

    def _step(self, rows: int, columns: int) -> PagedStep:
        """Return the decode step for a table of that shape."""
        shape = (rows, columns)
        if shape not in self._steps:
            self._graph += 1  # neither this shape nor these addresses have been captured
            graph = self._graph if self._cuda_graph else None
            self._steps[shape] = PagedStep(self._engine, self._planes, rows, columns, graph)
        return self._steps[shape]

    def _new_logits(self, count: int) -> Tensor:
        return self._engine.new_logits(count, 1)[:, 0]

    def _reserve(self, lengths: Sequence[int]) -> None:
        """Give rows of `lengths` tokens their blocks; what is cached stays."""
        wanted: dict[Hashable, int] = {
            row: self._blocks(length) for row, length in enumerate(lengths)
        }
        missing = {row: n - len(self._pool.pages(row)) for row, n in wanted.items()}
        needed = sum(max(0, n) for n in missing.values())
        if needed > self._pool.num_free:
            self._enlarge(len(lengths), needed)
        self._pool.grow(wanted)

    def _enlarge(self, rows: int, needed: int) -> None:
        """Make the pool larger: to what `max_length` asks for, else at least double."""
        before = self._pool.num_pages
        least = before + needed - self._pool.num_free
        wished = 2 * before
        if self._max_length is not None:
            wished = 1 + rows * self._blocks(self._max_length)
        self._pool.add_pages(max(least, wished))
        self._steps = {}
        for name, port in self._engine.past.items():
            old = self._planes.pop(name, None)
            self._planes[name] = self._new_plane(port)
            if old is not None:
                _as_bytes(self._planes[name])[:before] = _as_bytes(old)

    def _new_plane(self, port: Port) -> Tensor:
        _, _, heads, width = port.shape
        shape = (self._pool.num_pages, self._block_size, heads, width)
        # Zeros: products with what no token has written must be finite.
        return torch.zeros(shape, dtype=port.dtype, device=self._engine.device)  # type: ignore[arg-type]

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self._block_size)

    def _columns(self, tokens: int) -> int:
        """Return columns of the table of a decode step, a power of two: few are captured."""
        columns = LEAST_COLUMNS
        while columns < self._blocks(tokens):
            columns *= 2
        return columns

    def _table(self, rows: Sequence[int] | range, columns: int) -> Tensor:
        """Return the blocks of some rows, int32 `[rows, columns]`."""
        table = self._pool.block_table(rows)[:, :columns]
        return torch.nn.functional.pad(table, (0, columns - table.shape[1]))

    def _slots(self, row: int, length: int) -> Tensor:
        """Return where the tokens of a row are, counted over the whole pool."""
        blocks = torch.tensor(self._pool.pages(row))[:, None] * self._block_size
        return (blocks + torch.arange(self._block_size)).flatten()[:length]


class PagedStep:
    """One new token a row, with inputs and outputs whose addresses stay.

    Args:
        engine: The package.
        planes: The pool.
        rows: Rows.
        columns: Columns of the table.
        graph: Number of the captured graph; None runs node by node.
    """

    def __init__(
        self,
        engine: Engine,
        planes: Mapping[str, Tensor],
        rows: int,
        columns: int,
        graph: int | None,
    ) -> None:
        self._engine, self._graph, device = engine, graph, engine.device
        self._ids = torch.zeros(rows, dtype=torch.int64, device=device)
        self._positions = torch.zeros_like(self._ids)
        self._past = torch.zeros(rows, dtype=torch.int32, device=device)
        self._table = torch.zeros(rows, columns, dtype=torch.int32, device=device)
        self._blocks: Tensor | None = None  # what the table was made from
        self._metadata = _int32([1, 0, 0])
        self._logits = engine.new_logits(rows, 1)[:, 0]
        self._binding = Binding(engine)
        feeds = {
            "input_ids": self._ids,
            "position_ids": self._positions,
            "cumulative_sequence_lengths": torch.arange(rows + 1, dtype=torch.int32, device=device),
            "past_sequence_lengths": self._past,
            "block_table": self._table,
            "attention_metadata": self._metadata,
        }
        for name in engine.inputs:
            self._binding.read(name, feeds[name])
        self._binding.hold(planes)
        self._binding.write("logits", self._logits)

    def run(
        self,
        token_ids: Tensor,
        lengths: Sequence[int],
        blocks: Tensor,
        metadata: Sequence[int],
    ) -> Tensor:
        """Append a token to rows of `lengths` tokens; return the logits `[B, vocab]`.

        Args:
            token_ids: int64 `[B]`.
            lengths: Cached tokens of each row.
            blocks: int32 `[B, n]`, the blocks of each row; the same tensor as long as they are.
            metadata: The input of that name; it must hold whenever this step runs.
        """
        self._ids.copy_(token_ids)
        self._past.copy_(_int32(lengths))
        self._positions.copy_(self._past)
        if blocks is not self._blocks:
            self._table.zero_()[:, : blocks.shape[1]].copy_(blocks)
            self._blocks = blocks
        self._metadata.copy_(_int32(metadata))
        self._engine.run(self._binding, self._graph)
        return self._logits.clone()


def _int32(numbers: Sequence[int]) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def _as_bytes(plane: Tensor) -> Tensor:
    """Return a plane of bytes as uint8, since torch can move few other kinds of them about."""
    return plane.view(torch.uint8) if plane.dtype is torch.float8_e4m3fn else plane
