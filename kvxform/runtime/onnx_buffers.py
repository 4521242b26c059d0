"""A cache of buffers: `past` and `present` of every plane are the same memory.

Rows start at slot 0 and the logical position of a token is its slot; behind the last token of a row
there is room. A step therefore copies nothing, and on CUDA it can be a captured graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvxform.errors import CacheFullError
from kvxform.runtime.inputs import Batch
from kvxform.runtime.one_thread import copy_alone
from kvxform.runtime.onnx_engine import Binding, Engine

FIRST_CAPACITY = 256  # tokens a row; it doubles from there on where no length was asked for
# Tokens of one run on the CPU: its kernels work out all scores of a run, also those of later keys.
CPU_CHUNK = 256


@dataclass(frozen=True)
class Piece:
    """Tokens of one run: of neighbouring rows, in the first `counts[b]` columns.

    Attributes:
        rows: Which rows.
        ids: int64 `[b, S]`.
        before: Cached tokens of each row.
        counts: New tokens of each row.
    """

    rows: slice
    ids: Tensor
    before: Sequence[int]
    counts: Sequence[int]


class BufferCache:
    """Rows of a package with cache `buffer`; see `kvxform.runtime.onnx_cache.PackageCache`.

    Args:
        engine: The package.
        max_length: Tokens that a row has room for; buffers grow as they must if None.
        limit: Tokens that a row may have, or None.
        cuda_graph: Capture decode steps.
    """

    def __init__(
        self, engine: Engine, max_length: int | None, limit: int | None, *, cuda_graph: bool
    ) -> None:
        self._engine, self._cuda_graph = engine, cuda_graph
        self._max_length, self._limit = max_length, limit
        self._planes: dict[str, Tensor] = {}
        self._decode: DecodeStep | None = None
        self._size = (0, 0)  # rows, and tokens that a row has room for
        self._graph = 0
        self.lengths: tuple[int, ...] = ()

    @property
    def mask(self) -> Tensor:
        """Which columns of `planes` are tokens, int64 `[B, columns]`."""
        return _run_of_ones(self.lengths, max(self.lengths, default=0))

    def append(self, batch: Batch, chunk_size: int | None, *, every: bool) -> Tensor:
        """Append prompts; logits of all tokens if `every`, else of the last one of each row."""
        counts, kept = batch.counts, self.lengths
        before = kept or (0,) * len(counts)
        self._reserve(len(counts), [n + new for n, new in zip(before, counts, strict=True)])
        width = max(counts)
        size = 1 if every and self._engine.is_last else chunk_size or self._best_chunk(width)
        empty = self._engine.new_logits(len(counts), width if every else 1)
        out = empty.new_zeros(len(counts), width if every else 1, empty.shape[2])
        try:
            for first in range(0, width, size):
                ids = batch.input_ids[:, first : first + size]
                new = [min(max(n - first, 0), size) for n in counts]
                self._append_columns(ids, new, out[:, first:] if every else out, every=every)
        except Exception:
            self.lengths = kept  # what was written behind the rows does not count
            raise
        return out if every else out[:, 0]

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token a row, int64 `[B]`; return the next logits `[B, vocab]`."""
        self._reserve(len(self.lengths), [n + 1 for n in self.lengths])
        if self._decode is None:
            self._graph += 1  # addresses have changed
            self._decode = DecodeStep(
                self._engine, self._planes, self._size, self._graph if self._cuda_graph else None
            )
        logits = self._decode.run(token_ids, self.lengths)
        self.lengths = tuple(n + 1 for n in self.lengths)
        return logits

    def reset(self) -> None:
        """Forget all rows; the memory stays for the next ones."""
        self.lengths = ()

    def bytes(self) -> int:
        """Return bytes of the buffers while there are rows."""
        return sum(plane.nbytes for plane in self._planes.values()) if self.lengths else 0

    def planned_rows(self) -> tuple[int, int]:
        """Return rows and the tokens that each has room for."""
        return self._size if self.lengths else (0, 0)

    def planes(self) -> dict[str, Tensor]:
        """Return copies of the planes by input name, `[B, Hk, columns, width]`."""
        columns = max(self.lengths, default=0)
        kept = {name: plane[:, :, :columns] for name, plane in self._planes.items()}
        return {name: plane.to("cpu", copy=True) for name, plane in kept.items()}

    def replace(self, planes: Mapping[str, Tensor], mask: Tensor) -> None:
        """Hold `planes` instead, of the columns in `mask`."""
        lengths = tuple(mask.sum(1).tolist())
        self.lengths = ()
        self._reserve(len(lengths), lengths)
        for name, plane in planes.items():
            self._planes[name][:, :, : plane.shape[2]] = plane.to(self._engine.device)
        self.lengths = lengths

    def _best_chunk(self, width: int) -> int:
        return min(width, CPU_CHUNK) if self._engine.provider == "cpu" else width

    def _append_columns(self, ids: Tensor, new: Sequence[int], out: Tensor, *, every: bool) -> None:
        """Append some columns of the prompts and write their logits into `out`."""
        before = self.lengths or (0,) * len(new)
        for part in self._parts(new):
            piece = Piece(part, ids[part, : max(new[part])], before[part], new[part])
            logits = self._run(piece)
            if every:
                copy_alone(logits, out[part, : logits.shape[1]])
            else:
                copy_alone(_last(logits, piece.counts), out[part, 0])
        self.lengths = tuple(n + count for n, count in zip(before, new, strict=True))

    def _parts(self, new: Sequence[int]) -> list[slice]:
        """Return which rows run together, where each gets some new tokens or none.

        First tokens of all rows do, whatever their number. Later ones do if they are equally many;
        GroupQueryAttention wants to see several tokens one row at a time.
        """
        is_first = not any(self.lengths) and min(new) > 0
        is_even = len(set(new)) == 1 and (self._engine.level != "L3" or new[0] == 1)
        if is_first or is_even:
            return [slice(0, len(new))]
        return [slice(row, row + 1) for row, count in enumerate(new) if count]

    def _run(self, piece: Piece) -> Tensor:
        """Run one piece on slices of the buffers; return its logits `[b, S or 1, vocab]`."""
        after = [n + count for n, count in zip(piece.before, piece.counts, strict=True)]
        tokens = piece.ids.shape[1]
        positions = torch.tensor(piece.before)[:, None] + torch.arange(tokens)
        feeds = {
            "input_ids": piece.ids.cpu().contiguous(),
            "position_ids": positions,
            "attention_mask": _run_of_ones(after, max(after)),
        }
        binding = Binding(self._engine)
        for name in self._engine.inputs:
            binding.read(name, feeds[name])
        binding.hold({name: plane[piece.rows] for name, plane in self._planes.items()})
        logits = self._engine.new_logits(len(piece.ids), tokens)
        binding.write("logits", logits)
        self._engine.run(binding)
        return logits

    def _reserve(self, batch_size: int, lengths: Sequence[int]) -> None:
        """Make room for rows of `lengths` tokens; what is cached stays."""
        tokens = max(lengths)
        rows, capacity = self._size
        if rows == batch_size and tokens <= capacity:
            return
        columns = max(self.lengths, default=0)
        if not columns:
            self._planes, self._decode = {}, None  # memory for what comes
            self._size = 0, 0
        size = batch_size, self._capacity(tokens, capacity if columns else 0)
        planes = self._new_planes(size)
        for name, plane in self._planes.items():
            planes[name][:, :, :columns] = plane[:, :, :columns]
        self._planes, self._size, self._decode = planes, size, None

    def _new_planes(self, size: tuple[int, int]) -> dict[str, Tensor]:
        """Return buffers for rows and tokens; zeros, for products with anything must be finite."""
        ports, device = self._engine.past, self._engine.device
        try:
            return {
                name: torch.zeros(port.sizes(*size), dtype=port.dtype, device=device)
                for name, port in ports.items()
            }
        except RuntimeError as error:  # torch has no class of its own for this on the CPU
            raise CacheFullError(
                "KVX703",
                f"buffers for {size[0]} rows of {size[1]} tokens must fit into memory",
                where="onnx",
                got=next(iter(str(error).splitlines())),
                hint="take fewer rows, or a smaller max_length",
            ) from error

    def _capacity(self, tokens: int, before: int) -> int:
        if self._max_length is not None:
            return max(self._max_length, tokens)
        grown = max(tokens, 2 * before, FIRST_CAPACITY)
        return grown if self._limit is None else max(tokens, min(grown, self._limit))


class DecodeStep:
    """One new token a row, with inputs and outputs whose addresses stay.

    Args:
        engine: The package.
        planes: The buffers.
        size: Rows, and tokens that each has room for.
        graph: Number of the captured graph; None runs node by node.
    """

    def __init__(
        self, engine: Engine, planes: Mapping[str, Tensor], size: tuple[int, int], graph: int | None
    ) -> None:
        rows, capacity = size
        self._engine, self._graph = engine, graph
        self._ids = torch.zeros(rows, 1, dtype=torch.int64, device=engine.device)
        self._positions = torch.zeros_like(self._ids)
        self._columns = torch.arange(capacity, device=engine.device)
        self._mask = self._ids.new_zeros(rows, capacity)
        self._logits = engine.new_logits(rows, 1)
        self._binding = Binding(engine)
        feeds = {
            "input_ids": self._ids,
            "position_ids": self._positions,
            "attention_mask": self._mask,
        }
        for name in engine.inputs:
            self._binding.read(name, feeds[name])
        self._binding.hold(planes)
        self._binding.write("logits", self._logits)

    def run(self, token_ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Append a token to rows of `lengths` tokens; return the logits `[B, vocab]`."""
        self._ids.copy_(token_ids[:, None])
        self._positions.copy_(torch.tensor(lengths)[:, None])
        if self._engine.provider == "cuda":  # a captured graph has one number of columns
            self._mask.copy_(self._columns <= self._positions)
        elif "attention_mask" in self._engine.inputs:
            self._binding.read("attention_mask", _run_of_ones(lengths, max(lengths), more=1))
        self._engine.run(self._binding, self._graph)
        found = torch.empty_like(self._logits[:, 0])
        copy_alone(self._logits[:, 0], found)
        return found


def _last(logits: Tensor, counts: Sequence[int]) -> Tensor:
    """Return the logits of the last token of each row, `[b, vocab]`."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    rows = torch.arange(len(counts), device=logits.device)
    return logits[rows, torch.tensor(counts, device=logits.device) - 1]


def _run_of_ones(lengths: Sequence[int], columns: int, more: int = 0) -> Tensor:
    """Return a mask int64 `[B, columns + more]` with `lengths[b] + more` ones from the left."""
    ends = torch.tensor(lengths, dtype=torch.int64)[:, None] + more
    return (torch.arange(columns + more) < ends).to(torch.int64)
