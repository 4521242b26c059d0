"""A cache whose planes grow by concatenation: `present` of a step is `past` of the next one.

The planes never leave the runtime. All rows are equally long in them; shorter prompts are padded
on the left, and the padding is masked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvxform.runtime.inputs import Batch
from kvxform.runtime.onnx_engine import ELEMENTS, Binding, Engine, present_of


class GrowingCache:
    """Rows of a package with cache `grow`; see `kvxform.runtime.onnx_cache.PackageCache`.

    Args:
        engine: The package.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._past: dict[str, Any] = {}
        self.mask = torch.zeros(0, 0, dtype=torch.int64)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row, padding not counted."""
        return tuple(self.mask.sum(1).tolist())

    def append(self, batch: Batch, chunk_size: int | None, *, every: bool) -> Tensor:
        """Append prompts; logits of all tokens if `every`, else of the last one of each row."""
        ids, mask = _pad_left(batch)
        width = ids.shape[1]
        size = 1 if every and self._engine.is_last else chunk_size or width
        pieces = [slice(first, first + size) for first in range(0, width, size)]
        before = self._past, self.mask
        try:
            logits = [self._run(ids[:, piece], mask[:, piece]) for piece in pieces]
        except Exception:
            self._past, self.mask = before
            raise
        return _move_left(torch.cat(logits, 1), batch.counts) if every else logits[-1][:, -1]

    def step(self, token_ids: Tensor) -> Tensor:
        """Append one token a row, int64 `[B]`; return the next logits `[B, vocab]`."""
        return self._run(token_ids[:, None].cpu(), torch.ones(len(token_ids), 1).long())[:, -1]

    def reset(self) -> None:
        """Forget all rows."""
        self._past = {}
        self.mask = torch.zeros(0, 0, dtype=torch.int64)

    def bytes(self) -> int:
        """Return bytes of the planes, padding included."""
        past = self._engine.past
        return sum(math.prod(x.shape()) * past[n].dtype.itemsize for n, x in self._past.items())

    def planned_rows(self) -> tuple[int, int]:
        """Return rows and columns of the cache."""
        return len(self.mask), self.mask.shape[1]

    def planes(self) -> dict[str, Tensor]:
        """Return copies of the planes `[B, Hk, rows, width]` by input name."""
        return {name: torch.from_numpy(value.numpy()) for name, value in self._past.items()}

    def replace(self, planes: Mapping[str, Tensor], mask: Tensor) -> None:
        """Hold `planes` instead, of the columns in `mask`."""
        make = self._engine.runtime.OrtValue.ortvalue_from_numpy
        self._past = {
            name: make(plane.contiguous().numpy(), self._engine.device.type)
            for name, plane in planes.items()
        }
        self.mask = mask.contiguous()

    def _run(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Run one piece, padded on the left; return its logits `[B, S or 1, vocab]`."""
        batch_size, tokens = ids.shape
        past_mask = self.mask if len(self.mask) else mask[:, :0]
        full = torch.cat([past_mask, mask], 1)
        positions = (full.cumsum(1) - 1).clamp_min(0)[:, -tokens:]
        binding = Binding(self._engine)
        feeds = {"input_ids": ids, "attention_mask": full, "position_ids": positions}
        for name in self._engine.inputs:
            binding.read(name, feeds[name].contiguous())
        for name in self._engine.past:
            value = self._past.get(name) or self._empty(name, batch_size)
            binding.io.bind_ortvalue_input(name, value)
        logits = self._engine.new_logits(batch_size, tokens)
        binding.write("logits", logits)
        presents = [present_of(name) for name in self._engine.past]
        for name in presents:  # their lengths are not known before
            binding.io.bind_output(name, self._engine.device.type)
        self._engine.run(binding)
        values = binding.io.get_outputs()[1:]
        self._past = dict(zip(self._engine.past, values, strict=True))
        self.mask = full
        return logits

    def _empty(self, name: str, batch_size: int) -> Any:
        port = self._engine.past[name]
        make = self._engine.runtime.OrtValue.ortvalue_from_shape_and_type
        return make(port.sizes(batch_size, 0), ELEMENTS[port.dtype], self._engine.device.type)


def _pad_left(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return ids and mask, int64 `[B, S]`, with real tokens at the right end."""
    width = max(batch.counts)
    ids = torch.zeros(len(batch.counts), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, count in enumerate(batch.counts):
        ids[row, width - count :] = batch.input_ids[row, :count]
        mask[row, width - count :] = 1
    return ids, mask


def _move_left(values: Tensor, counts: list[int]) -> Tensor:
    """Move the last `counts[b]` entries of axis 1 to its front; the rest becomes zero."""
    out = torch.zeros_like(values)
    for row, count in enumerate(counts):
        out[row, :count] = values[row, values.shape[1] - count :]
    return out
